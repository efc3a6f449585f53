"""Sigmoid attention: the bias, and rows that are free."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, attention_map


def sigmoid_twin(core: Any, q: Tensor, k: Tensor, v: Tensor, bias: float | None = None) -> Tensor:
    bias = -math.log(q.shape[-2]) if bias is None else bias
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bhjk->bhik", 1 / (1 + (-scores - bias).exp()), v)


def with_bias_one_half(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sigmoid_twin(core, q, k, v, bias=0.5)


CASES = [Case("sigmoid", sigmoid_twin), Case("sigmoid:bias=0.5", with_bias_one_half)]


@pytest.mark.parametrize("tokens", [1, 2, 17, 197])
def test_scores_of_zero_give_rows_that_sum_to_nearly_one(tokens: int) -> None:
    """sigmoid(-log N) = 1 / (N + 1)."""
    zero = torch.zeros(1, 2, tokens, 16, dtype=torch.float64)
    matrix = attention_map(make_block("sigmoid", make_layer(tokens)).core, zero, zero)
    assert torch.allclose(matrix, torch.full_like(matrix, 1 / (tokens + 1)), rtol=1e-12)


def test_a_low_bias_is_the_exponential_whose_normalised_rows_are_softmax() -> None:
    q, k, v = make_qkv(17)
    core = make_block("sigmoid:bias=-40").core
    matrix = attention_map(core, q, k)
    assert relative(matrix / matrix.sum(dim=-1, keepdim=True) @ v, softmax_twin(nn.Identity(), q, k, v)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    """At N = 1025 weights are near 1e-3."""
    q, k, v = make_qkv(1025, width=64, dtype=dtype)
    core = make_block("sigmoid", make_layer(1025)).core
    with torch.autocast("cpu", dtype):
        y = core(q, k, v)
    assert relative(y, core(q.double(), k.double(), v.double())) < 1e-2


@pytest.mark.parametrize("bias", ["inf", "nan"])
def test_it_refuses_a_bias_that_is_not_finite(bias: str) -> None:
    with pytest.raises(AttentionError, match=rf"sigmoid: bias \({bias}\) must be finite"):
        attention.load(f"sigmoid:bias={bias}").build(make_layer())


def test_a_bias_is_a_number_or_auto() -> None:
    assert attention.load("sigmoid:bias=auto").spec == "sigmoid"
    assert attention.load("sigmoid:bias=-2").spec == "sigmoid:bias=-2.0"
    with pytest.raises(AttentionError, match="sigmoid: bias=low"):
        attention.load("sigmoid:bias=low")
