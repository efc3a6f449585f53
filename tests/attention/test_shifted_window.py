"""Shifted-window attention: cells, bias, and Swin itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attention_cases import DIM, HEADS, Case, make_block, make_layer, make_qkv, relative
from test_local import GRIDS, allowed_tokens, auto_window, masked_twin
from torch import Tensor

from vitcmp import attention, build_model
from vitcmp.attention import AttentionError, LayerConfig, TokenGrid
from vitcmp.models.vit import resized


def swin_twin(core: Any, q: Tensor, k: Tensor, v: Tensor, shifted: bool = False, window: int | None = None) -> Tensor:
    """Softmax within cells, cut at every w-th position from the shift on; the bias pair by pair."""
    grid, window = core.grid, window or auto_window(core.grid)

    def cell_mates(side: int) -> dict[int, set[int]]:
        w = min(window, side)
        shift = w // 2 if shifted and w < side else 0
        return {i: {j for j in range(side) if (j - shift) // w == (i - shift) // w} for i in range(side)}

    rows, columns = cell_mates(grid.height), cell_mates(grid.width)
    bias, prefix = q.new_zeros(q.shape[1], grid.num_tokens, grid.num_tokens), grid.num_prefix_tokens
    middle_y, middle_x = (size // 2 for size in core.bias.shape[1:])
    pairs = [
        (y, x, y2, x2)
        for y in range(grid.height) for x in range(grid.width) for y2 in rows[y] for x2 in columns[x]
    ]  # fmt: skip
    y, x, y2, x2 = torch.tensor(pairs).T
    i, j = prefix + y * grid.width + x, prefix + y2 * grid.width + x2
    bias = bias.index_put((torch.arange(q.shape[1])[:, None], i, j), core.bias[:, middle_y + y - y2, middle_x + x - x2])
    return masked_twin(q, k, v, allowed_tokens(grid, rows, columns), bias)


CASES = [
    Case("shifted-window", swin_twin),
    Case("shifted-window:shift=all", lambda *args: swin_twin(*args, shifted=True)),
]


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(10, 15, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shift", ["none", "all"])
def test_shifted_window_equals_its_twin_at_any_window(grid: TokenGrid, window: int, shift: str) -> None:
    core = make_block(f"shifted-window:window_size={window},shift={shift}", make_layer(grid)).core.double()
    q, k, v = make_qkv(grid.num_tokens)
    assert relative(core(q, k, v), swin_twin(core, q, k, v, shift == "all", window)) < 1e-12


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 4), (14, 7, 7), (6, 9, 3)])
def test_shifted_window_is_timms_swin_where_the_window_divides_the_grid(
    height: int, width: int, window: int, index: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from timm.models.swin_transformer import SwinTransformerBlock
    swin = SwinTransformerBlock(DIM, (height, width), HEADS, window_size=window, shift_size=index * (window // 2))
    layer = LayerConfig(DIM, HEADS, TokenGrid(height, width), index=index)
    block = attention.load(f"shifted-window:window_size={window}").build(layer)
    table = swin.attn.relative_position_bias_table  # [offsets, H]
    with torch.no_grad():
        table.normal_()
        state = {"core.bias": table.T.reshape(block.core.bias.shape)}
        for ours, theirs in (("qkv", swin.attn.qkv), ("out", swin.attn.proj)):
            state |= {f"{ours}.weight": theirs.weight, f"{ours}.bias": theirs.bias}
        block.load_state_dict(state)
        x = torch.randn(2, height, width, DIM, dtype=torch.float64)
        wanted = swin.double().eval()._attn(x)
        assert relative(block.double().eval()(x.flatten(1, 2)), wanted.flatten(1, 2)) < 1e-12


def test_odd_layers_are_shifted() -> None:
    grid = TokenGrid(9, 9)
    q, k, v = make_qkv(81)
    cores = {
        (shift, index): attention.load(f"shifted-window:window_size=4,shift={shift}")
        .build(LayerConfig(DIM, HEADS, grid, index=index))
        .core.double()
        for shift in ("odd", "all", "none") for index in (0, 1, 2)
    }  # fmt: skip
    for core in cores.values():
        core.load_state_dict(cores["odd", 0].state_dict())
    plain, shifted = cores["none", 0](q, k, v), cores["all", 0](q, k, v)
    assert relative(shifted, plain) > 0.1
    for (shift, index), core in cores.items():
        is_shifted = shift == "all" or (shift == "odd" and index == 1)
        assert torch.equal(core(q, k, v), shifted if is_shifted else plain)


def test_the_cyclic_tiles_cost_no_more_than_the_plain_ones() -> None:
    even, odd = (LayerConfig(DIM, HEADS, TokenGrid(8, 8, 1), index=index) for index in (0, 1))
    mechanism = attention.load("shifted-window:window_size=4")
    assert mechanism.macs(even) == mechanism.macs(odd) == 2 * DIM * (64 * (16 + 1) + 65)


def test_the_table_is_drawn_from_the_seed() -> None:
    tables = [
        build_model("tiny", attention="shifted-window", image_size=8, channels=1, seed=seed)
        .blocks[1]
        .attention.core.bias
        for seed in (0, 0, 1)
    ]
    assert tables[0].shape == (4, 7, 7)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert float(tables[0].detach().std()) == pytest.approx(0.02, rel=0.3)


def test_resized_keeps_the_table_or_resamples_it() -> None:
    fixed = build_model("tiny", attention="shifted-window:window_size=4", image_size=8, channels=1)
    assert torch.equal(resized(fixed, 16).blocks[1].attention.core.bias, fixed.blocks[1].attention.core.bias)
    model = build_model("tiny", attention="shifted-window", image_size=8, channels=1)  # window 4
    table = model.blocks[0].attention.core.bias
    with torch.no_grad():
        table.normal_(generator=torch.Generator().manual_seed(0))
        table[1] = 3
    larger = resized(model, 16).blocks[0].attention.core.bias  # window 7
    assert larger.shape == (4, 13, 13)
    # Offsets -3, 0 and 3 become -6, 0 and 6.
    assert torch.allclose(larger[:, ::2, ::2], table, atol=1e-5)
    assert torch.allclose(larger[1], torch.tensor(3.0))


def test_other_shifts_are_refused() -> None:
    with pytest.raises(AttentionError, match="shift=even must be 'odd', 'all' or 'none'"):
        attention.load("shifted-window:shift=even")
