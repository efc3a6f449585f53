"""cosFormer: cosine weights, positions, and rows without weight."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import HEADS, WIDTH, Case, make_layer, make_qkv, relative
from torch import Tensor

from vitcmp import attention
from vitcmp.attention import AttentionError, TokenGrid, attention_map
from vitcmp.attention.cosformer import CosformerAttention


def cosformer_twin(core: Any, q: Tensor, k: Tensor, v: Tensor, positions: str = "sequence") -> Tensor:
    """The explicit N x N matrix, each weight with the cosine of its offset."""
    weights = torch.einsum("bhik,bhjk->bhij", q.relu(), k.relu()) * cosines(core.grid, positions)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6) @ v


def cosines(grid: TokenGrid, positions: str) -> Tensor:
    tokens = grid.num_tokens
    matrix = torch.empty(tokens, tokens, dtype=torch.float64)
    for i in range(tokens):
        for j in range(tokens):
            if positions == "sequence":
                matrix[i, j] = math.cos(math.pi / 2 * (i - j) / tokens)
            else:
                (row, column), (other_row, other_column) = place(grid, i), place(grid, j)
                matrix[i, j] = math.cos(math.pi / 2 * (row - other_row) / grid.height)
                matrix[i, j] *= math.cos(math.pi / 2 * (column - other_column) / grid.width)
    return matrix


def place(grid: TokenGrid, token: int) -> tuple[float, float]:
    if token < grid.num_prefix_tokens:
        return (grid.height - 1) / 2, (grid.width - 1) / 2
    row, column = divmod(token - grid.num_prefix_tokens, grid.width)
    return row, column


CASES = [
    Case("cosformer", cosformer_twin),
    Case("cosformer:positions=grid", partial(cosformer_twin, positions="grid")),
]


@pytest.mark.parametrize("positions", ["sequence", "grid"])
def test_equal_queries_and_keys_leave_the_cosine(positions: str) -> None:
    grid = TokenGrid(4, 6, 2)
    ones = torch.ones(1, 1, grid.num_tokens, 8, dtype=torch.float64)
    matrix = attention_map(CosformerAttention(grid, positions, eps=1e-6), ones, ones)[0, 0]
    wanted = cosines(grid, positions)
    assert relative(matrix, wanted / wanted.sum(dim=-1, keepdim=True)) < 1e-12


def test_on_the_grid_the_prefix_tokens_stand_in_the_middle() -> None:
    grid = TokenGrid(3, 5, 1)
    ones = torch.ones(1, 1, 16, 8, dtype=torch.float64)
    row = attention_map(CosformerAttention(grid, "grid", eps=1e-6), ones, ones)[0, 0, 0, 1:].view(3, 5)
    assert torch.allclose(row, row.flip(0), rtol=1e-12)
    assert torch.allclose(row, row.flip(1), rtol=1e-12)
    assert row.argmax() == 7


def test_a_row_without_a_positive_feature_is_zero_and_every_other_sums_to_one() -> None:
    q, k, v = make_qkv(17)
    q[0, 0, 5] = -q[0, 0, 5].abs()
    q.requires_grad_()
    core = CosformerAttention(TokenGrid(4, 4, 1), "sequence", eps=1e-6)
    core(q, k, v).square().sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    sums = attention_map(core, q.detach(), k).sum(dim=-1)
    assert sums[0, 0, 5] == 0
    sums[0, 0, 5] = 1
    assert torch.allclose(sums, torch.ones_like(sums), rtol=1e-12)


def test_keys_without_a_positive_feature_give_zero() -> None:
    q, k, v = make_qkv(17)
    y = CosformerAttention(TokenGrid(4, 4, 1), "sequence", eps=1e-6)(q, -k.abs(), v)
    assert not y.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_no_more_than_its_inputs(dtype: torch.dtype) -> None:
    """At N = 1025 and K = 64 the normaliser leaves fp16's range."""
    grid = TokenGrid(32, 32, 1)
    core = CosformerAttention(grid, "sequence", eps=1e-6)
    q, k, v = make_qkv(grid.num_tokens, width=64, dtype=dtype, std=3)
    assert (q.double().relu() * k.double().relu().sum(dim=-2, keepdim=True)).sum(dim=-1).max() > 65504
    assert relative(core(q, k, v), core(q.double(), k.double(), v.double())) < torch.finfo(dtype).eps


def test_it_counts_two_products_of_2k_and_on_the_grid_of_4k() -> None:
    layer = make_layer(64)
    assert attention.load("cosformer").macs(layer) == 4 * 64 * HEADS * WIDTH**2
    assert attention.load("cosformer:positions=grid").macs(layer) == 8 * 64 * HEADS * WIDTH**2


@pytest.mark.parametrize("eps", [0, -1e-6, math.inf, math.nan])
def test_it_refuses_a_normaliser_that_can_be_zero(eps: float) -> None:
    with pytest.raises(AttentionError, match=r"cosformer: eps \(.*\) must be above 0"):
        attention.load(f"cosformer:eps={eps}").build(make_layer())
