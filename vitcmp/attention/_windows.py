"""Softmax attention within tiles of the token grid: what the mechanisms with windows share.

A tile is some query patches and some key patches; each query attends to its tile's keys, as far as the tile allows it,
and to the prefix tokens. Prefix tokens attend to all tokens. Both sides of the grid are tiled on their own, and every
pair of a row tile and a column tile is one tile of the grid. Nothing is padded: a tile that would pass the border is
moved inwards, and what it computes twice is dropped.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import TokenGrid, scaled_scores, wide
from vitcmp.attention.softmax import SoftmaxAttention


@dataclass(frozen=True)
class SideTiles:
    """`t` tiles of one side of the grid, with `a` queries and `b` keys each, as positions on that side."""

    query: Tensor
    """[t, a]"""
    key: Tensor
    """[t, b]"""
    allowed: Tensor
    """[t, a, b]: whether the query may attend to the key."""
    kept: Tensor
    """[t, a]: whether this is an answer to keep; where a position has several, the first is taken."""


def spans(starts: Tensor, length: int) -> Tensor:
    """Positions [t, length] from each start on."""
    return starts.unsqueeze(-1) + torch.arange(length)


def partition(side: int, length: int) -> Tensor:
    """Positions [t, length] of a side cut into parts, the last one moved inwards where it does not fit."""
    return spans(torch.arange(0, side, length).clamp(max=side - length), length)


def even_length(side: int, most: int) -> int:
    """The length of the parts of a side that is cut into as few as parts of `most` would be, but evenly."""
    num_parts = -(-side // most)
    return -(-side // num_parts)


class WindowedPatches(nn.Module):
    """(q, k, v), each [B, H, N, K] -> the answers of the P patches, [B, H, P, K]."""

    query: Tensor
    key: Tensor
    answer: Tensor
    mask: Tensor | None

    def __init__(self, grid: TokenGrid, rows: SideTiles, columns: SideTiles, dropout: float) -> None:
        super().__init__()
        self.dropout, self.softmax = dropout, SoftmaxAttention("auto", dropout)
        prefix, patches = grid.num_prefix_tokens, grid.height * grid.width
        # Every row tile with every column tile: [t, t', a, a'], flattened to [T, A].
        query, key = (
            (y[:, None, :, None] * grid.width + x[:, None, :]).flatten(2, 3).flatten(0, 1)
            for y, x in ((rows.query, columns.query), (rows.key, columns.key))
        )
        kept = (rows.kept[:, None, :, None] & columns.kept[:, None, :]).flatten()
        allowed = rows.allowed[:, None, :, None, :, None] & columns.allowed[:, None, :, None, :]
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf).view(*query.shape, key.shape[1])
        # The place among all the tiles' queries where each patch finds its answer.
        places = torch.arange(query.numel())[kept]
        answer = torch.full((patches,), query.numel()).scatter_reduce(0, query.flatten()[kept], places, "amin")
        key = torch.cat([torch.arange(prefix).expand(len(key), prefix), key + prefix], dim=1)
        self.register_buffer("query", query + prefix, persistent=False)  # [T, A], as tokens
        self.register_buffer("key", key, persistent=False)  # [T, prefix + B], as tokens
        self.register_buffer("answer", answer, persistent=False)  # [P]
        # Added to the scores, [T, A, prefix + B]; None where all is allowed.
        self.register_buffer("mask", None if allowed.all() else F.pad(mask, (prefix, 0)), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias`, [H, A, prefix + B], is added to the scores of every tile."""
        added = self.mask if bias is None else bias.unsqueeze(1) + (0 if self.mask is None else self.mask)
        if added is None:
            tiles = take(q, self.query), take(k, self.key), take(v, self.key)  # [B, H, T, A or prefix + B, K]
            answers = self.softmax(*(x.flatten(0, 2).unsqueeze(1) for x in tiles)).view(tiles[0].shape)
        else:
            # Rounded to bf16, a score of 25 is off by up to 0.06, and its weight by 6 %.
            with torch.autocast(q.device.type, enabled=False):
                scores = scaled_scores(take(wide(q), self.query), take(wide(k), self.key))  # [B, H, T, A, prefix + B]
                scores += added.to(scores.dtype)
                weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
                answers = weights.to(v.dtype) @ take(v, self.key)
        return answers.flatten(2, 3).index_select(2, self.answer)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` of `x`, [B, H, N, K] -> [B, H, *index.shape, K]."""
    # index_select, as the gradient of x[:, :, index] is far slower.
    return x.index_select(2, index.flatten()).unflatten(2, index.shape)


def with_prefix(patches: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """[B, H, N, K]: the patches' answers [B, H, P, K] behind those of the prefix tokens, which attend to all tokens."""
    prefix = q.shape[2] - patches.shape[2]
    if prefix:
        with torch.autocast(q.device.type, enabled=False):
            weights = scaled_scores(wide(q[:, :, :prefix]), wide(k)).softmax(dim=-1)  # [B, H, prefix, N]
            answers = F.dropout(weights, dropout).to(v.dtype) @ v
        patches = torch.cat([answers, patches], dim=2)
    return patches.to(v.dtype)


def num_scores(grid: TokenGrid, rows: SideTiles, columns: SideTiles) -> int:
    """Scores that a head computes for the patches, the masked and the dropped ones included."""
    queries = rows.query.numel() * columns.query.numel()
    return queries * (grid.num_prefix_tokens + rows.key.shape[1] * columns.key.shape[1])


def prefix_scores(grid: TokenGrid) -> int:
    """Scores that a head computes for the prefix tokens."""
    return grid.num_prefix_tokens * grid.num_tokens


def window_side(window_size: int | Literal["auto"], grid: TokenGrid) -> int:
    """The side of a window, with `auto` resolved: at most 7, and at most a quarter of the tokens in a window."""
    return min(7, max(1, math.isqrt(grid.num_tokens // 4))) if window_size == "auto" else window_size


def check_window(name: str, window_size: int | Literal["auto"], grid: TokenGrid) -> None:
    """Raises: AttentionError for a side below 1 or beyond the grid; warns where one window holds the whole grid."""
    if window_size == "auto":
        return
    shape = f"the grid of {grid.height} x {grid.width} patches"
    if not 1 <= window_size <= max(grid.height, grid.width):
        raise AttentionError(f"{name}: window_size ({window_size}) must be 1 or more and not beyond {shape}; "
                             "leave it at auto, or choose a smaller one")  # fmt: skip
    if window_size >= max(grid.height, grid.width):
        warnings.warn(f"{name}: a window of side {window_size} holds all of {shape}", DegenerateWarning, 3)
