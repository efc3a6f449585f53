"""Sigmoid attention: the bias, and rows that are free."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin, strided, with_gradients
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, attention_map
from vitcmp.kernels.ops.blockwise import explicit
from vitcmp.kernels.ops.sigmoid import _attend as attend


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


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 3), (16, 16), (33, 7), (65, 12), (100, 64), (257, 16)])
def test_the_kernels_are_as_exact_as_torch(tokens: int, width: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        inputs = strided(2, 3, tokens, width, dtype)
        exact = with_gradients(lambda *x: explicit(*x, -1.0), *(x.double() for x in inputs))
        for ours, wanted in zip(with_gradients(lambda *x: attend(*x, -1.0), *inputs), exact, strict=True):
            assert ours.dtype == dtype
            assert relative(ours, wanted) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_the_kernels_take_any_number_of_queries_and_keys(dtype: torch.dtype, tolerance: float) -> None:
    few, in_parts = ((65, 1), (65, 4), (18, 33), (65, 34)), ((1050, 1), (1042, 17), (2101, 33), (9, 2501), (1101, 1059))
    for queries, keys in few + in_parts:
        q, k, v, dout = strided(2, 2, max(queries, keys), 12, dtype)
        inputs = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], dout[:, :, :queries]
        exact = with_gradients(lambda *x: explicit(*x, -1.0), *(x.double() for x in inputs))
        for ours, wanted in zip(with_gradients(lambda *x: attend(*x, -1.0), *inputs), exact, strict=True):
            assert relative(ours, wanted) < tolerance


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_scores_of_any_size(scale: float) -> None:
    q, k, v, dout = strided(1, 2, 20, 8, torch.float32)
    inputs = q * scale, k, v, dout
    exact = with_gradients(lambda *x: explicit(*x, -1.0), *(x.double() for x in inputs))
    of_torch = with_gradients(lambda *x: explicit(*x, -1.0), *inputs)
    found = with_gradients(lambda *x: attend(*x, -1.0), *inputs)
    for ours, theirs, wanted in zip(found, of_torch, exact, strict=True):
        assert (ours - wanted).norm() < 3 * (theirs - wanted).norm() + 1e-6 * dout.norm()


def test_a_bad_query_spoils_its_own_row_alone() -> None:
    q, k, v, _ = (x.detach() for x in strided(1, 2, 20, 8, torch.float32))
    fine = attend(q, k, v, -1.0)
    q = q.clone()
    q[0, 1, 3, 2] = math.nan
    found = attend(q, k, v, -1.0)
    assert found[0, 1, 3].isnan().all()
    found[0, 1, 3] = fine[0, 1, 3]
    assert torch.equal(found, fine)


def test_gradients_of_gradients() -> None:
    leaves = [x.detach().requires_grad_() for x in strided(1, 2, 9, 4, torch.float32)[:3]]
    found = []
    for form in (attend, explicit):
        (dq,) = torch.autograd.grad(form(*leaves, -1.0).square().sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), leaves))
    for ours, wanted in zip(*found, strict=True):
        assert relative(ours, wanted) < 1e-4
