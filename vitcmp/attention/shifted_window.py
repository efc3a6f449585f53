"""Shifted-window attention (Swin): separate windows, moved by half a window in every other layer.

    A = softmax(q k^T / sqrt(K) + B) within each window,   B of a pair: a learned table's entry for its offset

(Liu et al., 2021, equation 4.) Layers count from 0; those with an odd index cut the grid half a window later, which
leaves smaller windows at the border. On sides that the window divides, this is Swin to the letter: the parts that
share a tile after its cyclic shift attend to themselves alone. Elsewhere Swin pads the image and attends to the
padding; here the last window is smaller. A smaller window is computed as a whole one moved inwards, with a mask. On a
side that is no longer than the window, the window is the side, and is not moved.

The table has an entry a head and offset in rows and columns, (2w - 1) x (2w - 1). All patches attend to the prefix
tokens as well, and these to all tokens, without B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention._multihead import LayerConfig, MultiHead
from vitcmp.attention._windows import (
    SideTiles,
    WindowedPatches,
    check_window,
    num_scores,
    prefix_scores,
    spans,
    window_side,
    with_prefix,
)

PAPER = "https://arxiv.org/abs/2103.14030"
COST = "O(N w^2 K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    window_size: int | Literal["auto"] = "auto"
    """Side of a window, in patches; auto: 7, but at most a quarter of the tokens in it."""
    shift: Literal["odd", "all", "none"] = "odd"
    """Layers whose windows are moved by half a window: those with an odd index, all or none."""


class ShiftedWindowAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]."""

    offset: Tensor

    def __init__(self, layer: LayerConfig, window: int, shifted: bool) -> None:
        super().__init__()
        self.grid, self.dropout = layer.grid, layer.dropout
        rows, columns = cells(layer, window, shifted)
        self.patches = WindowedPatches(layer.grid, rows, columns, layer.dropout)
        height, width = rows.query.shape[1], columns.query.shape[1]
        self.bias = nn.Parameter(torch.empty(layer.num_heads, 2 * height - 1, 2 * width - 1))
        # All windows are laid out alike, so a pair's entry depends on its places in the window alone.
        y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
        offset = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
        self.register_buffer("offset", offset, persistent=False)  # [a, a], places in the flattened table
        self.reset_random_state(int(torch.randint(2**62, ())))

    def reset_random_state(self, seed: int) -> None:
        """Draw the table, truncated normal of 0.02 as in Swin's code."""
        generator = torch.Generator().manual_seed(seed)
        values = nn.init.trunc_normal_(torch.empty(self.bias.shape), std=0.02, generator=generator)
        self.bias.data.copy_(values)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.bias.flatten(1).index_select(1, self.offset.flatten()).view(-1, *self.offset.shape)  # [H, a, a]
        bias = F.pad(bias, (self.grid.num_prefix_tokens, 0))
        return with_prefix(self.patches(q, k, v, bias), q, k, v, self.dropout if self.training else 0.0)

    def resized_state(self, old: ShiftedWindowAttention) -> dict[str, Tensor]:
        """The table for a window of another size: bicubic, the largest offsets on the largest."""
        size = self.bias.shape[1:]
        if old.bias.shape[1:] == size:
            return {"bias": old.bias}
        return {"bias": F.interpolate(old.bias[None], size, mode="bicubic", align_corners=True)[0]}


def cells(layer: LayerConfig, window: int, shifted: bool) -> tuple[SideTiles, SideTiles]:
    """The tiles of the rows and of the columns."""
    return side_cells(layer.grid.height, window, shifted), side_cells(layer.grid.width, window, shifted)


def side_cells(side: int, window: int, shifted: bool) -> SideTiles:
    """Tiles of one side cut at every `window` patches from the shift on; positions attend within their cell."""
    window = min(window, side)
    shift = window // 2 if shifted and window < side else 0
    if side % window == 0:
        # As under Swin's cyclic shift, the last tile holds what is left of both border cells.
        positions = spans(torch.arange(shift, side, window), window) % side  # [t, window]
        kept = torch.ones_like(positions, dtype=torch.bool)
    else:
        starts = torch.arange(shift - window if shift else 0, side, window)  # of each cell, before it is clipped
        positions = spans(starts.clamp(0, side - window), window)
        kept = (positions >= starts.unsqueeze(-1)) & (positions < starts.unsqueeze(-1) + window)
    cell = (positions - shift).div(window, rounding_mode="floor")
    return SideTiles(positions, positions, cell.unsqueeze(-1) == cell.unsqueeze(-2), kept)


def is_shifted(layer: LayerConfig, config: Config) -> bool:
    """Whether the windows of this layer are moved."""
    return config.shift == "all" or (config.shift == "odd" and layer.index % 2 == 1)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    check_window("shifted-window", config.window_size, layer.grid)
    window = window_side(config.window_size, layer.grid)
    return MultiHead(layer, ShiftedWindowAttention(layer, window, is_shifted(layer, config)))


def macs(layer: LayerConfig, config: Config) -> int:
    tiles = cells(layer, window_side(config.window_size, layer.grid), is_shifted(layer, config))
    return 2 * layer.dim * (num_scores(layer.grid, *tiles) + prefix_scores(layer.grid))
