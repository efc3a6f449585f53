"""Local attention: every patch attends to the square of patches around it.

    out_i = softmax_j(q_i k_j^T / sqrt(K)) v_j,   j in the w x w patches nearest to i, and the prefix tokens

A neighbourhood begins w // 2 patches before its own; at the border it is moved inwards, so that it always holds w x w
patches (Hassani et al., 2023, section 3.1; zero padding there, as in Ramachandran et al., 2019, would be attended to).
On a side shorter than w it is the whole side. Prefix tokens attend to all tokens. Here is no relative position bias,
which those papers add: the model's position embedding stands for it, as under every other mechanism.

On the CPU each query is multiplied with its own keys alone. Elsewhere it goes in tiles, as HaloNet does (Vaswani et
al., 2021): t x t queries share the (t + w - 1)^2 keys that any of them needs, and a mask leaves each its own. t is
about w / 2: smaller tiles copy the keys more often, larger ones mask more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid
from vitcmp.attention._windows import (
    SideTiles,
    WindowedPatches,
    check_window,
    even_length,
    num_pairs,
    partition,
    prefix_scores,
    spans,
    window_side,
    with_prefix,
)

PAPER = "https://arxiv.org/abs/2204.07143"
COST = "O(N w^2 K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    window_size: int | Literal["auto"] = "auto"
    """Side of the neighbourhood, in patches; auto: 7, but at most a quarter of the tokens in it."""


class LocalAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]."""

    def __init__(self, grid: TokenGrid, window: int, dropout: float) -> None:
        super().__init__()
        self.grid, self.dropout = grid, dropout
        self.patches = WindowedPatches(grid, *neighbourhoods(grid, window), dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return with_prefix(self.patches(q, k, v), q, k, v, self.dropout if self.training else 0.0)


def neighbourhoods(grid: TokenGrid, window: int) -> tuple[SideTiles, SideTiles]:
    """The tiles of the rows and of the columns."""
    return side_neighbourhoods(grid.height, window), side_neighbourhoods(grid.width, window)


def side_neighbourhoods(side: int, window: int) -> SideTiles:
    """Tiles of one side: neighbouring queries, and the keys from the first one's neighbourhood to the last one's."""
    window = min(window, side)
    length = even_length(side, most=-(-window // 2))
    query = partition(side, length)  # [t, a]
    halo = min(side, length + window - 1)
    key = spans((query[:, 0] - window // 2).clamp(0, side - halo), halo)  # [t, b]
    first = (query - window // 2).clamp(0, side - window).unsqueeze(-1)  # of each query's neighbourhood
    allowed = (first <= key.unsqueeze(1)) & (key.unsqueeze(1) < first + window)
    return SideTiles(query, key, allowed, torch.ones_like(query, dtype=torch.bool))


def build(layer: LayerConfig, config: Config) -> nn.Module:
    check_window("local", config.window_size, layer.grid)
    window = window_side(config.window_size, layer.grid)
    return MultiHead(layer, LocalAttention(layer.grid, window, layer.dropout))


def macs(layer: LayerConfig, config: Config) -> int:
    tiles = neighbourhoods(layer.grid, window_side(config.window_size, layer.grid))
    return 2 * layer.dim * (num_pairs(layer.grid, *tiles) + prefix_scores(layer.grid))
