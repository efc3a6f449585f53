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

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid
from vitcmp.attention._windows import (
    SideTiles,
    WindowedPatches,
    check_window,
    even_length,
    partition,
    prefix_scores,
    spans,
    window_side,
    with_prefix,
)
from vitcmp.kernels.ops import neighbour_attention
from vitcmp.kernels.ops.neighbours import links_of

PAPER = "https://arxiv.org/abs/2204.07143"
COST = "O(N w^2 K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    window_size: int | Literal["auto"] = "auto"
    """Side of the neighbourhood, in patches; auto: 7, but at most a quarter of the tokens in it."""


class LocalAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K].

    Raises: AttentionError for another number of tokens than the grid has.
    """

    keys: Tensor
    query: Tensor
    place: Tensor
    ends: Tensor

    def __init__(self, grid: TokenGrid, window: int, dropout: float) -> None:
        super().__init__()
        self.grid, self.dropout = grid, dropout
        self.in_tiles = WindowedPatches(grid, *neighbourhoods(grid, window), dropout)
        for name, link in links_of(neighbours(grid, window), grid.num_tokens).items():
            self.register_buffer(name, link, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if {q.shape[2], k.shape[2]} != {self.grid.num_tokens}:
            raise AttentionError(f"local: {q.shape[2]} queries and {k.shape[2]} keys, but it was built for "
                                 f"{self.grid.num_tokens} tokens; build it for another grid")  # fmt: skip
        dropout = self.dropout if self.training else 0.0
        if q.device.type in ("cpu", "meta"):
            links = [self.keys, self.query, self.place, self.ends]
            patches = neighbour_attention(q[:, :, self.grid.num_prefix_tokens :], k, v, links, dropout)
        else:
            patches = self.in_tiles(q, k, v)
        return with_prefix(patches, q, k, v, dropout)


def neighbours(grid: TokenGrid, window: int) -> Tensor:
    """The tokens that each patch attends to, [P, prefix + w^2]."""
    rows, columns = (
        spans(side_first(torch.arange(side), side, min(window, side)), min(window, side))
        for side in (grid.height, grid.width)
    )
    patches = (rows[:, None, :, None] * grid.width + columns[:, None, :]).flatten(2, 3).flatten(0, 1)
    prefix = torch.arange(grid.num_prefix_tokens).expand(len(patches), -1)
    return torch.cat([prefix, patches + grid.num_prefix_tokens], dim=1)


def neighbourhoods(grid: TokenGrid, window: int) -> tuple[SideTiles, SideTiles]:
    """The tiles of the rows and of the columns."""
    return side_neighbourhoods(grid.height, window), side_neighbourhoods(grid.width, window)


def side_first(position: Tensor, side: int, window: int) -> Tensor:
    """Where the neighbourhood of a position on a side begins."""
    return (position - window // 2).clamp(0, side - window)


def side_neighbourhoods(side: int, window: int) -> SideTiles:
    """Tiles of one side: neighbouring queries, and the keys from the first one's neighbourhood to the last one's."""
    window = min(window, side)
    length = even_length(side, most=-(-window // 2))
    query = partition(side, length)  # [t, a]
    halo = min(side, length + window - 1)
    key = spans((query[:, 0] - window // 2).clamp(0, side - halo), halo)  # [t, b]
    first = side_first(query, side, window).unsqueeze(-1)
    allowed = (first <= key.unsqueeze(1)) & (key.unsqueeze(1) < first + window)
    return SideTiles(query, key, allowed, torch.ones_like(query, dtype=torch.bool))


def build(layer: LayerConfig, config: Config) -> nn.Module:
    check_window("local", config.window_size, layer.grid)
    window = window_side(config.window_size, layer.grid)
    return MultiHead(layer, LocalAttention(layer.grid, window, layer.dropout))


def macs(layer: LayerConfig, config: Config) -> int:
    """As on the CPU; in tiles, the masked scores come on top."""
    pairs = neighbours(layer.grid, window_side(config.window_size, layer.grid)).numel()
    return 2 * layer.dim * (pairs + prefix_scores(layer.grid))
