"""Efficient attention."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, make_qkv, relative
from torch import Tensor, nn

from vitcmp.attention import attention_map
from vitcmp.attention.efficient import EfficientAttention


def efficient_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, feature by feature: feature f is a map over the tokens, and a query weights the maps."""
    heads = []
    for qh, kh, vh in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):  # [N, K] each
        matrix = torch.zeros(len(qh), len(kh), dtype=qh.dtype)
        of_query = qh.exp() / qh.exp().sum(dim=1, keepdim=True)
        for f in range(qh.shape[1]):
            of_tokens = kh[:, f].exp() / kh[:, f].exp().sum()
            matrix = matrix + torch.outer(of_query[:, f], of_tokens)
        heads.append(matrix @ vh)
    return torch.stack(heads).view_as(q)


CASES = [Case("efficient", efficient_twin)]


def test_equal_keys_are_uniform_attention() -> None:
    q, k, v = make_qkv(17)
    wanted = v.mean(dim=-2, keepdim=True).expand_as(v)
    assert relative(EfficientAttention()(q, k[..., :1, :].expand_as(k), v), wanted) < 1e-12


def test_a_query_of_one_feature_reads_that_feature_s_map() -> None:
    q, k, _ = make_qkv(17)
    q[:] = -1e4
    q[..., 3] = 1e4
    wanted = k[..., 3].softmax(dim=-1).unsqueeze(-2).expand(-1, -1, 17, -1)
    assert relative(attention_map(EfficientAttention(), q, k), wanted) < 1e-12


def test_the_map_has_rank_k_at_most() -> None:
    q, k, _ = make_qkv(65, width=8)
    assert (torch.linalg.matrix_rank(attention_map(EfficientAttention(), q, k)) <= 8).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_no_more_than_its_inputs(dtype: torch.dtype) -> None:
    """At N = 1025 a key's weight is near 1e-3, below fp16's normal numbers where keys differ much."""
    inputs = make_qkv(1025, width=64, dtype=dtype, std=3)
    wanted = EfficientAttention()(*(x.double() for x in inputs))
    assert relative(EfficientAttention()(*inputs), wanted) < torch.finfo(dtype).eps
