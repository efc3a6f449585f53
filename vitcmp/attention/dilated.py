"""Dilated (atrous) attention: windows that take every d-th patch, another d for every group of heads.

    out_i = softmax_j(q_i k_j^T / sqrt(K)) v_j,   j in the window of i on its own phase at dilation d, and the prefix

At dilation d the grid falls into d x d phases: the patches whose row and column leave the same remainders by d. Each
phase is cut into windows of w x w. Where w does not divide its side, nothing is padded: the side is cut into as many
parts, but even ones (the last one moved inwards; a patch in two parts belongs to the first), and each part attends to
the window of w patches around it. On short phases, w is the side of the shortest.

ACC-ViT (Ibtehaz et al., 2024) keeps one phase at each dilation, and so drops tokens; here all phases are kept. It runs
every dilation on all heads and gates them (see `hybrid`); here the heads share the dilations, as in DilateFormer (Jiao
et al., 2023, https://arxiv.org/abs/2302.01791): of D dilations the first H / D heads take the first, and so on.
ACC-ViT's relative position bias is left out: the model's position embedding stands for it, as under every other
mechanism. Prefix tokens attend to all tokens.

A dilation that leaves some phase empty, or a phase of a single patch, is left out, and so are those beyond the heads.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid
from vitcmp.attention._windows import (
    SideTiles,
    WindowedPatches,
    check_window,
    even_length,
    num_scores,
    partition,
    prefix_scores,
    spans,
    window_side,
    with_prefix,
)

PAPER = "https://arxiv.org/abs/2406.08859"
COST = "O(N w^2 K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    dilations: tuple[int, ...] = (1, 2, 4)
    """Steps between the patches of a window; the heads share them."""
    window_size: int | Literal["auto"] = "auto"
    """Side of a window, in patches of its phase; auto: 7, but at most a quarter of the tokens in it."""


class DilatedAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]."""

    def __init__(self, layer: LayerConfig, dilations: tuple[int, ...], window: int) -> None:
        super().__init__()
        self.grid, self.dropout = layer.grid, layer.dropout
        self.heads = heads_of(layer.num_heads, dilations)
        tiles = (phases(self.grid, dilation, window) for dilation in dilations)
        self.groups = nn.ModuleList(WindowedPatches(self.grid, *sides, self.dropout) for sides in tiles)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Not tensor_split: its gradient is one tensor of zeros per group, and their sum.
        heads = zip(*(x.split(self.heads, dim=1) for x in (q, k, v)), strict=True)
        patches = torch.cat([group(*qkv) for group, qkv in zip(self.groups, heads, strict=True)], dim=1)
        return with_prefix(patches, q, k, v, self.dropout if self.training else 0.0)


def heads_of(num_heads: int, dilations: tuple[int, ...]) -> list[int]:
    """How many heads each dilation has."""
    return [num_heads // len(dilations) + (group < num_heads % len(dilations)) for group in range(len(dilations))]


def phases(grid: TokenGrid, dilation: int, window: int) -> tuple[SideTiles, SideTiles]:
    """The tiles of the rows and of the columns at one dilation."""
    return side_phases(grid.height, dilation, window), side_phases(grid.width, dilation, window)


def side_phases(side: int, dilation: int, window: int) -> SideTiles:
    """Tiles of one side: the parts of all phases, each with the window around it."""
    positions = [torch.arange(phase, side, dilation) for phase in range(dilation)]
    window = min(window, side // dilation)
    length = max(even_length(len(phase), most=window) for phase in positions)
    queries, keys = [], []
    for phase in positions:
        part = partition(len(phase), length)  # [t, a]
        start = (part[:, 0] - (window - length) // 2).clamp(0, len(phase) - window)
        queries.append(phase[part])
        keys.append(phase[spans(start, window)])
    query, key = torch.cat(queries), torch.cat(keys)
    allowed = torch.ones(*query.shape, window, dtype=torch.bool)
    return SideTiles(query, key, allowed, torch.ones_like(query, dtype=torch.bool))


def fitting(name: str, dilations: tuple[int, ...], grid: TokenGrid) -> tuple[int, ...]:
    """The dilations whose every phase holds two patches or more; 1 where none is left.

    Raises: AttentionError for dilations that are none.
    """
    if not dilations or min(dilations) < 1 or len({*dilations}) < len(dilations):
        text = "+".join(map(str, dilations)) or "none"
        raise AttentionError(f"{name}: dilations ({text}) must be different numbers, each 1 or more, as in 1+2+4")
    return tuple(d for d in dilations if d == 1 or (grid.height // d) * (grid.width // d) > 1) or (1,)


def warn_of_dropped(name: str, wanted: tuple[int, ...], used: tuple[int, ...], layer: LayerConfig) -> None:
    """Warn where a choice, not the default, is not followed."""
    if wanted not in (used, Config.dilations):
        wanted_text, used_text = ("+".join(map(str, dilations)) for dilations in (wanted, used))
        warnings.warn(f"{name}: dilations {wanted_text} do not fit {layer.num_heads} heads on {layer.grid.height} x "
                      f"{layer.grid.width} patches; used: {used_text}", DegenerateWarning, 3)  # fmt: skip


def build(layer: LayerConfig, config: Config) -> nn.Module:
    check_window("dilated", config.window_size, layer.grid)
    dilations = fitting("dilated", config.dilations, layer.grid)[: layer.num_heads]
    warn_of_dropped("dilated", config.dilations, dilations, layer)
    window = window_side(config.window_size, layer.grid)
    return MultiHead(layer, DilatedAttention(layer, dilations, window))


def macs(layer: LayerConfig, config: Config) -> int:
    window = window_side(config.window_size, layer.grid)
    dilations = fitting("dilated", config.dilations, layer.grid)[: layer.num_heads]
    scores = layer.num_heads * prefix_scores(layer.grid)
    for heads, dilation in zip(heads_of(layer.num_heads, dilations), dilations, strict=True):
        scores += heads * num_scores(layer.grid, *phases(layer.grid, dilation, window))
    return 2 * layer.head_dim * scores
