"""Dilated attention: phases, windows and heads."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from attention_cases import HEADS, WIDTH, Case, make_block, make_layer, make_qkv, relative
from test_local import GRIDS, allowed_tokens, auto_window, masked_twin
from torch import Tensor

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map


@cache
def dilated_allowed(grid: TokenGrid, window: int, dilation: int) -> Tensor:
    """[N, N]: window by window, phase by phase."""

    def companions(side: int) -> dict[int, set[int]]:
        w, found = min(window, side // dilation), {}
        phases = [list(range(phase, side, dilation)) for phase in range(dilation)]
        num_parts = [math.ceil(len(phase) / w) for phase in phases]
        length = max(math.ceil(len(phase) / parts) for phase, parts in zip(phases, num_parts, strict=True))
        for phase, parts in zip(phases, num_parts, strict=True):
            for part in range(parts):
                first = min(part * length, len(phase) - length)
                start = min(max(first - (w - length) // 2, 0), len(phase) - w)
                for i in phase[first : first + length]:
                    found.setdefault(i, set(phase[start : start + w]))
        return found

    return allowed_tokens(grid, companions(grid.height), companions(grid.width))


def fitting(grid: TokenGrid, dilations: tuple[int, ...]) -> tuple[int, ...]:
    """Those at which every phase has two patches."""
    shortest = {d: (grid.height // d) * (grid.width // d) for d in dilations}  # phase, in patches
    return tuple(d for d in dilations if d == 1 or shortest[d] >= 2) or (1,)


def dilated_twin(
    core: Any, q: Tensor, k: Tensor, v: Tensor, dilations: tuple[int, ...] = (1, 2, 4), window: int | None = None
) -> Tensor:
    """Head by head; heads are dealt to the dilations in turn, then sorted."""
    dilations = fitting(core.grid, dilations)
    dealt = sorted(h % len(dilations) for h in range(q.shape[1]))
    window = window or auto_window(core.grid)
    allowed = torch.stack([dilated_allowed(core.grid, window, dilations[place]) for place in dealt])
    return masked_twin(q, k, v, allowed)


CASES = [
    Case("dilated", dilated_twin),
    Case("dilated:dilations=2", lambda *args: dilated_twin(*args, dilations=(2,))),
    Case("dilated:dilations=3+1", lambda *args: dilated_twin(*args, dilations=(3, 1))),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", [1, 4, 5])
def test_dilated_equals_its_twin_at_any_window_and_heads(grid: TokenGrid, window: int, heads: int) -> None:
    core = make_block(f"dilated:window_size={window}", LayerConfig(heads * 4, heads, grid)).core
    q, k, v = torch.randn(3, 2, heads, grid.num_tokens, 4, dtype=torch.float64)
    assert relative(core(q, k, v), dilated_twin(core, q, k, v, window=window)) < 1e-12


def test_every_token_is_attended_to_at_every_dilation() -> None:
    """ACC-ViT's own form keeps one phase; here none is dropped, and each patch keeps to its phase."""
    grid = TokenGrid(9, 10, 1)
    core = make_block("dilated:window_size=2", LayerConfig(12, 3, grid)).core
    maps = attention_map(core, *torch.randn(2, 1, 3, grid.num_tokens, 4, dtype=torch.float64))[0]
    rows = torch.arange(90) // 10
    for dilation, used in zip((1, 2, 4), maps[:, 1:, 1:] > 0, strict=True):
        assert used.diagonal().all()
        assert (used.sum(dim=1) == 4).all()
        steps = (rows[:, None] - rows)[used]
        assert set(steps.abs().tolist()) == {0, dilation}


@pytest.mark.parametrize(
    ("grid", "used"),
    [
        (TokenGrid(1, 1), 1), (TokenGrid(1, 17), 1), (TokenGrid(2, 2), 1), (TokenGrid(2, 5), 2),
        (TokenGrid(4, 4, 1), 2),         (TokenGrid(5, 7), 2), (TokenGrid(4, 8), 3), (TokenGrid(8, 8), 3),
    ],
)  # fmt: skip
def test_dilations_too_wide_for_the_grid_are_left_out(grid: TokenGrid, used: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DegenerateWarning)
        core = attention.load("dilated").build(LayerConfig(16, 4, grid)).core
    assert len(core.groups) == used


def test_a_choice_of_dilations_that_is_not_followed_brings_a_warning() -> None:
    with pytest.warns(DegenerateWarning, match=r"dilations 1\+6 do not fit 2 heads on 4 x 4 patches; used: 1$"):
        attention.load("dilated:dilations=1+6").build(make_layer(TokenGrid(4, 4)))
    with pytest.warns(DegenerateWarning, match=r"used: 1\+2$"):
        attention.load("dilated:dilations=1+2+3").build(make_layer(TokenGrid(8, 8)))


@pytest.mark.parametrize("dilations", ["0", "1+-2", "2+2"])
def test_dilations_that_are_none_are_refused(dilations: str) -> None:
    for name in ("dilated", "hybrid"):
        with pytest.raises(AttentionError, match=rf"{name}: dilations .* must be different numbers, each 1 or more"):
            attention.load(f"{name}:dilations={dilations}").build(make_layer())


def test_dilation_one_is_attention_in_plain_windows() -> None:
    q, k, v = make_qkv(64)
    blocks = (
        q.view(2, HEADS, 2, 4, 2, 4, WIDTH),
        k.view(2, HEADS, 2, 4, 2, 4, WIDTH),
        v.view(2, HEADS, 2, 4, 2, 4, WIDTH),
    )
    tiles = [x.permute(0, 1, 2, 4, 3, 5, 6).reshape(2, HEADS, 4, 16, WIDTH) for x in blocks]
    wanted = torch.nn.functional.scaled_dot_product_attention(*tiles)
    wanted = wanted.view(2, HEADS, 2, 2, 4, 4, WIDTH).permute(0, 1, 2, 4, 3, 5, 6).reshape(q.shape)
    core = make_block("dilated:dilations=1,window_size=4", make_layer(TokenGrid(8, 8))).core
    assert relative(core(q, k, v), wanted) < 1e-12
