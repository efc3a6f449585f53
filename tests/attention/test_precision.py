"""Half precision: under autocast, every mechanism against itself in fp64, on the same rounded inputs.

Scores of trained models reach 25, where the spacing of bf16 is 0.125: what comes before the scores, and what is added
to them, is not to be rounded to half precision.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_cases import make_block, make_layer, relative, taking
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import TokenGrid

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = ["linformer:sharing=none", "shifted-window:shift=all", "softmax:impl=naive", "softmax:impl=merged"]
WAYS = {"as measured": (), "kernels": ("numba",), "references": ("merged", "explicit", "apart", "torch", "gathered")}
"""By which forms operators compute: none of these may depend on the CPU's kind."""
GRIDS = {TokenGrid(32, 32, 1): 1, TokenGrid(7, 7, 1): 4}
"""And images: as many tokens as a large picture has, and fewer than heads are wide, where some have another form."""
HEADS, WIDTH = 2, 64
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}

every_form = pytest.mark.parametrize("spec", [*attention.available(own=True), *FORMS])
every_format = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_way = pytest.mark.parametrize("forms", WAYS.values(), ids=WAYS)


def make_module(spec: str, grid: TokenGrid) -> nn.Module:
    """The core, or the block of a mechanism without one."""
    block = make_block(spec, make_layer(grid, dim=HEADS * WIDTH, heads=HEADS))
    return getattr(block, "core", block)


def make_inputs(spec: str, grid: TokenGrid, std: float, dtype: torch.dtype) -> list[Tensor]:
    """q and k of this standard deviation, and v of 1; for a block its tokens x."""
    mechanism, generator = attention.load(spec), torch.Generator().manual_seed(grid.num_tokens)
    shape = (3, GRIDS[grid], HEADS, grid.num_tokens, WIDTH)
    q, k, v = torch.randn(shape, generator=generator)
    if mechanism.no_map:
        return [(std * q).transpose(1, 2).flatten(2).to(dtype)]
    q = std * q
    return [x.to(dtype) for x in (q, q if mechanism.num_projections == 3 else std * k, v)]


@torch.no_grad()
def answer(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype, forms: tuple[str, ...] = ()) -> Any:
    with torch.autocast("cpu", dtype), taking(*forms) if forms else nullcontext():
        return module(*inputs)


@every_form
@every_format
@every_grid
@every_way
def test_half_precision_is_near_fp64(spec: str, dtype: torch.dtype, grid: TokenGrid, forms: tuple[str, ...]) -> None:
    module = make_module(spec, grid)
    twin = copy.deepcopy(module).double()
    bound, _ = attention.load(spec).bounds.get("precision", (BOUNDS[dtype], ""))
    for std in (1, 5, 10):
        inputs = make_inputs(spec, grid, std, dtype)
        found = answer(module, inputs, dtype, forms)
        with torch.no_grad():
            wanted = twin(*(x.double() for x in inputs))
        assert found.dtype == dtype
        assert relative(found, wanted) < bound
        # The class token is all that a classifier reads.
        token = slice(1) if attention.load(spec).no_map else (..., slice(1), slice(None))
        assert relative(found[token], wanted[token]) < 2 * bound


@every_form
@every_format
@every_grid
def test_half_precision_is_finite(spec: str, dtype: torch.dtype, grid: TokenGrid) -> None:
    assert answer(make_module(spec, grid), make_inputs(spec, grid, 30, dtype), dtype).isfinite().all()
