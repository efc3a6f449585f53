"""Efficient attention."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, make_qkv, relative
from test_softmax import strided, with_gradients
from torch import Tensor, nn

from vitcmp.attention import attention_map
from vitcmp.attention._efficient import VECTOR, attend, attend_at_once
from vitcmp.attention._kernels.simd import LANES
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


def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)[0]


@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 2), (5, 3), (16, 16), (33, 7), (65, 12), (100, 64), (257, 33), (300, 128), (1025, 16)]
)
def test_the_kernels_are_as_exact_as_torch(tokens: int, width: int) -> None:
    inputs = strided(2, 3, tokens, width, torch.float32)
    exact = with_gradients(attend_at_once, *(x.double() for x in inputs))
    for ours, wanted in zip(with_gradients(by_kernel, *inputs), exact, strict=True):
        # One token's keys have no gradient.
        assert (ours - wanted).norm() <= 1e-6 * max(float(wanted.norm()), 1.0)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("tokens", [20, 600])
def test_features_of_any_size(tokens: int, scale: float) -> None:
    q, k, v, dout = (x.detach() for x in strided(1, 2, tokens, 8, torch.float32))
    # The largest keys come first, or last, so that what came before stays, or shrinks to nothing.
    k = torch.cat([k[:, :1].sort(dim=-2).values, k[:, 1:].sort(dim=-2, descending=True).values], dim=1)
    inputs = q * scale, k * scale, v, dout
    exact = with_gradients(attend_at_once, *(x.double() for x in inputs))
    of_torch = with_gradients(attend_at_once, *inputs)
    for ours, theirs, wanted in zip(with_gradients(by_kernel, *inputs), of_torch, exact, strict=True):
        assert (ours - wanted).norm() < 3 * (theirs - wanted).norm() + 1e-6 * max(1, scale) * dout.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_spoils_its_own_row_alone_and_a_bad_key_its_head(bad: float) -> None:
    q, k, v, _ = (x.detach() for x in strided(1, 2, 50, 8, torch.float32))
    fine = by_kernel(q, k, v)
    spoilt = q.clone()
    spoilt[0, 1, 49, 2] = bad
    found = by_kernel(spoilt, k, v)
    assert found[0, 1, 49].isnan().all()
    found[0, 1, 49] = fine[0, 1, 49]
    assert torch.equal(found, fine)
    spoilt = k.clone()
    spoilt[0, 1, 3, 2] = bad
    found = by_kernel(q, spoilt, v)
    assert found[0, 1].isnan().all()
    assert torch.equal(found[0, 0], fine[0, 0])


def test_gradients_of_gradients() -> None:
    inputs = [x.detach().requires_grad_() for x in strided(1, 2, 9, 4, torch.float32)[:3]]
    found = []
    for form in (by_kernel, attend_at_once):
        (dq,) = torch.autograd.grad(form(*inputs).square().sum(), inputs[0], create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), inputs))
    for ours, wanted in zip(*found, strict=True):
        assert relative(ours, wanted) < 1e-4


def test_a_vector_is_the_kernels() -> None:
    assert VECTOR == LANES
