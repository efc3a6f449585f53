"""Softmax attention: three forms of one function."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DIM, Case, make_block, relative
from torch import Tensor, nn


def softmax_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bhjk->bhik", weights, v)


CASES = [Case(spec, softmax_twin) for spec in ("softmax", *(f"softmax:impl={i}" for i in ("naive", "merged", "fused")))]


@pytest.mark.parametrize("tokens", [17, 197])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_forms_of_softmax_agree(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    naive = make_block("softmax:impl=naive").to(dtype)
    state = naive.state_dict()
    for end in ("weight", "bias"):
        state[f"qkv.{end}"] = torch.cat([state.pop(f"{part}.{end}") for part in "qkv"])
    x = torch.randn(2, tokens, DIM, dtype=dtype)
    for form in ("merged", "fused", "auto"):
        other = make_block(f"softmax:impl={form}").to(dtype)
        other.load_state_dict(state)
        assert relative(other(x), naive(x)) < tolerance
