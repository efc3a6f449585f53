"""NaN and infinity are not hidden: whoever reads one answers with one, and nobody else does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import DIM, Case, all_cases, make_block, make_layer, make_qkv, relative
from torch import Tensor

from vitcmp import attention
from vitcmp.attention import TokenGrid, attention_map

pytestmark = [pytest.mark.usefixtures("one_thread")]

GRIDS = [TokenGrid(2, 2), TokenGrid(4, 4, 1), TokenGrid(8, 8, 1)]
READS_NO_QUERY = {"uniform"}
SATURATES = {"sigmoid"}
"""A weight of 0 or 1 is the right answer to an infinite score."""
HIDES_IN_TORCH = {"softmax:impl=fused"}
"""torch's kernel takes a row without a largest score for one that attends to nothing, and answers with zeros."""

CASES = [case for case in all_cases() if case.spec not in HIDES_IN_TORCH]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)
every_core = pytest.mark.parametrize("case", [case for case in CASES if case.core], ids=lambda case: case.spec)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_value = pytest.mark.parametrize("value", [math.nan, math.inf])


def spoiled(x: Tensor, token: int, value: float) -> Tensor:
    """A copy with one entry of the first sample's first head replaced."""
    x = x.clone()
    x[0, 0, token, 5] = value
    return x


def make_core(case: Case, grid: TokenGrid) -> tuple[Any, list[Tensor]]:
    q, k, v = make_qkv(grid.num_tokens, dtype=torch.float32)
    shared = attention.load(case.spec).num_projections == 3
    return make_block(case.spec, make_layer(grid)).core, [q, q if shared else k, v]


def bad_rows(y: Tensor) -> Tensor:
    """Which tokens of the first sample's first head are not finite."""
    return ~y[0, 0].isfinite().all(dim=-1)


def some_tokens(grid: TokenGrid) -> list[int]:
    return sorted({0, grid.num_tokens // 2, grid.num_tokens - 1})


@every_core
@every_grid
@every_value
@torch.no_grad()
def test_a_query(case: Case, grid: TokenGrid, value: float) -> None:
    name = attention.load(case.spec).name
    if name in READS_NO_QUERY or (name in SATURATES and value == math.inf):
        return
    core, (q, k, v) = make_core(case, grid)
    clean = core(q, k, v)
    for token in some_tokens(grid):
        bad = spoiled(q, token, value)
        y = core(bad, bad if k is q else k, v)
        assert bad_rows(y)[token]
        assert relative(y[1], clean[1]) < 1e-6


@every_core
@every_grid
@torch.no_grad()
def test_a_key(case: Case, grid: TokenGrid) -> None:
    """NaN alone: an infinite key that scores -inf rightly has no weight."""
    core, (q, k, v) = make_core(case, grid)
    if attention.load(case.spec).name in READS_NO_QUERY or k is q:
        return
    clean, matrix = core(q, k, v), attention_map(core, q, k)
    for token in some_tokens(grid):
        y = core(q, spoiled(k, token, math.nan), v)
        assert bad_rows(y)[matrix[0, 0, :, token] != 0].all()
        assert relative(y[1], clean[1]) < 1e-6


@every_core
@every_grid
@every_value
@torch.no_grad()
def test_a_value(case: Case, grid: TokenGrid, value: float) -> None:
    core, (q, k, v) = make_core(case, grid)
    clean, matrix = core(q, k, v), attention_map(core, q, k)
    for token in some_tokens(grid):
        y = core(q, k, spoiled(v, token, value))
        assert bad_rows(y)[matrix[0, 0, :, token] != 0].all()
        assert relative(y[1], clean[1]) < 1e-6


@every_case
@every_grid
@every_value
@torch.no_grad()
def test_a_token_of_the_block(case: Case, grid: TokenGrid, value: float) -> None:
    block, x = make_block(case.spec, make_layer(grid)), torch.randn(2, grid.num_tokens, DIM)
    clean = block(x)
    for token in some_tokens(grid):
        bad = x.clone()
        bad[0, token, 5] = value
        y = block(bad)
        assert not y[0, token].isfinite().all()
        assert relative(y[1], clean[1]) < 1e-6
