"""Local attention: neighbourhoods, and what all mechanisms with windows share."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention, build_model
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map
from vitcmp.kernels._torch import TorchDispatchMode
from vitcmp.kernels.ops import neighbour_attention
from vitcmp.models.vit import resized


def auto_window(grid: TokenGrid) -> int:
    return max(w for w in range(1, 8) if w == 1 or w * w <= grid.num_tokens // 4)


def masked_twin(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax over the allowed keys, `allowed` of [N, N] or [H, N, N]."""
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5 + bias
    weights = torch.where(allowed, scores.exp(), 0)
    return torch.einsum("bhij,bhjk->bhik", weights / weights.sum(dim=-1, keepdim=True), v)


def allowed_tokens(grid: TokenGrid, rows: dict[int, set[int]], columns: dict[int, set[int]]) -> Tensor:
    """[N, N]: patches at the rows and columns that belong to theirs; prefix tokens with everything."""
    prefix, patches = grid.num_prefix_tokens, [(y, x) for y in range(grid.height) for x in range(grid.width)]
    allowed = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    pairs = [[b[0] in rows[a[0]] and b[1] in columns[a[1]] for b in patches] for a in patches]
    allowed[prefix:, prefix:] = torch.tensor(pairs)
    return allowed


@cache
def local_allowed(grid: TokenGrid, window: int) -> Tensor:
    def nearest(side: int) -> dict[int, set[int]]:
        w = min(window, side)
        # Of all runs of w positions, the one whose middle is nearest.
        starts = [min(range(side - w + 1), key=lambda start: abs(start + w // 2 - i)) for i in range(side)]
        return {i: set(range(start, start + w)) for i, start in enumerate(starts)}

    return allowed_tokens(grid, nearest(grid.height), nearest(grid.width))


def local_twin(core: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    return masked_twin(q, k, v, local_allowed(core.grid, window or auto_window(core.grid)))


CASES = [Case("local", local_twin)]
GRIDS = [TokenGrid(8, 8, 1), TokenGrid(9, 6), TokenGrid(1, 17), TokenGrid(3, 11, 2), TokenGrid(13, 7, 1)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@every_grid
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_local_equals_its_twin_at_any_window(grid: TokenGrid, window: int) -> None:
    core = make_block(f"local:window_size={window}", make_layer(grid)).core
    q, k, v = make_qkv(grid.num_tokens)
    assert relative(core(q, k, v), local_twin(core, q, k, v, window)) < 1e-12


def test_local_attends_to_a_whole_square_everywhere() -> None:
    grid, window = TokenGrid(8, 9, 1), 5
    core = make_block(f"local:window_size={window}", make_layer(grid)).core
    q, k, _ = make_qkv(grid.num_tokens)
    used = attention_map(core, q, k)[0, 0] > 0
    assert used[0].all()  # the prefix token's row
    assert used[:, 0].all()
    assert (used[1:, 1:].sum(dim=1) == window**2).all()
    middle = used[1 + 4 * 9 + 4, 1:].view(8, 9)
    assert middle[2:7, 2:7].all()


def test_local_with_one_window_over_the_grid_is_softmax() -> None:
    grid = TokenGrid(5, 7, 1)
    with pytest.warns(DegenerateWarning, match="side 7 holds all of the grid of 5 x 7"):
        core = attention.load("local:window_size=7").build(make_layer(grid)).core
    q, k, v = make_qkv(grid.num_tokens)
    assert relative(core(q, k, v), softmax_twin(nn.Identity(), q, k, v)) < 1e-12


@every_grid
@pytest.mark.parametrize("window", [1, 3, 4])
def test_pairs_and_tiles_agree(grid: TokenGrid, window: int) -> None:
    core = make_block(f"local:window_size={window}", make_layer(grid)).core.double()
    leaves = [x.requires_grad_() for x in make_qkv(grid.num_tokens)]
    links = [core.keys, core.query, core.place, core.ends]
    queries = leaves[0][:, :, grid.num_prefix_tokens :]
    pairs, gathered = (neighbour_attention(queries, *leaves[1:], links, 0.0, form=f) for f in ("numba", "gathered"))
    upstream = torch.randn(pairs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    in_tiles, *results = [
        (y, *torch.autograd.grad(y, leaves, upstream)) for y in (core.in_tiles(*leaves), pairs, gathered)
    ]
    for result in results:
        for found, wanted in zip(result, in_tiles, strict=True):
            assert (found - wanted).norm() <= 1e-12 * (1 + wanted.norm())


def test_products_of_pairs_can_be_differentiated_again() -> None:
    core = make_block("local:window_size=2", make_layer(TokenGrid(2, 3, 1))).core
    q, k, v = (x[:1, :1].requires_grad_() for x in make_qkv(7, width=2))
    assert torch.autograd.gradcheck(core, (q, k, v))
    assert torch.autograd.gradgradcheck(core, (q, k, v))


def test_products_of_pairs_do_not_depend_on_the_threads() -> None:
    core = make_block("local", make_layer(TokenGrid(16, 16))).core
    q, k, v = make_qkv(256, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(core(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


# What all mechanisms with windows share.

FAMILY = ["local", "dilated", "hybrid", "shifted-window"]
every_member = pytest.mark.parametrize("name", FAMILY)


@every_member
def test_windows_beyond_the_grid_are_refused(name: str) -> None:
    for size in (0, 9):
        with pytest.raises(AttentionError, match=rf"{name}: window_size \({size}\).*8 x 5 patches"):
            attention.load(f"{name}:window_size={size}").build(make_layer(TokenGrid(8, 5)))
    with pytest.warns(DegenerateWarning, match="8 holds all"):
        attention.load(f"{name}:window_size=8").build(make_layer(TokenGrid(8, 5)))


@every_member
def test_a_default_window_holds_a_quarter_of_the_tokens_at_most(name: str) -> None:
    sides = {TokenGrid(1, 1): 1, TokenGrid(4, 4, 1): 2, TokenGrid(8, 8): 4, TokenGrid(14, 14, 1): 7,
             TokenGrid(32, 32): 7}  # fmt: skip
    for grid, side in sides.items():
        own, explicit = (attention.load(spec).macs(make_layer(grid)) for spec in (name, f"{name}:window_size={side}"))
        assert own == explicit


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, y.numel() if isinstance(y, Tensor) else 0)
        return y


@every_member
def test_no_matrix_of_tokens_by_tokens_is_made(name: str) -> None:
    grid = TokenGrid(32, 32, 1)
    layer = LayerConfig(4, 1, grid)
    with Largest() as largest, torch.no_grad():
        attention.load(name).build(layer)(torch.zeros(1, grid.num_tokens, 4))
    assert largest.numel < grid.num_tokens**2 / 8
    assert attention.load(name).macs(layer) < attention.load("softmax").macs(layer) / 3


@every_member
def test_a_model_with_windows_follows_another_grid_without_warnings(name: str) -> None:
    model = build_model("tiny", attention=name, image_size=8, channels=1)
    larger = resized(model, 20)
    logits = larger(torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)))
    assert logits.isfinite().all()
    assert math.isclose(float(relative(resized(larger, 8).head.weight, model.head.weight)), 0)


def test_another_number_of_tokens_is_refused() -> None:
    block = make_block("local", make_layer(TokenGrid(4, 4, 1)))
    with pytest.raises(AttentionError, match="25 queries and 25 keys, but it was built for 17 tokens"):
        block(torch.zeros(1, 25, make_layer().dim))
