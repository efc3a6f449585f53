"""Spatial reduction (PVT): softmax attention over keys and values pooled on the token grid.

    out = softmax(q (P k)^T / sqrt(K)) P v

P keeps prefix tokens as they are and takes means over regions of the grid, sr_ratio x sr_ratio patches or, where that
does not divide a side, a little less (no padding). PVT (Wang et al., 2021, equations 2 to 4) reduces by a learned
convolution, which mixes channels: there would be no one map for all channels, and more projections than its rivals
have. The mean is PVT v2's (linear SRA, arXiv 2106.13797, which pools to 7 x 7), here without the convolution, norm and
GELU that follow it there; it is the same before and after the linear projections to keys and values. The papers do not
offer this as an estimate of softmax attention, so no error against it is measured.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, wide
from vitcmp.attention.softmax import SoftmaxAttention

PAPER = "https://arxiv.org/abs/2102.12122"
COST = "O(N^2 K / r^2)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    sr_ratio: int | Literal["auto"] = "auto"
    """Side of a pooled region in patches, r; auto: the smallest whose regions are at most a quarter of the tokens."""


class SpatialReductionAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Means and weights are computed in fp32 at least."""

    def __init__(self, grid: TokenGrid, sr_ratio: int, dropout: float) -> None:
        super().__init__()
        self.grid, self.regions, self.dropout = grid, region_grid(grid, sr_ratio), dropout
        self.softmax = SoftmaxAttention("auto", dropout)

    def _reduced(self, x: Tensor) -> Tensor:
        """P x: [B, H, N, K] -> [B, H, prefix tokens + regions, K]."""
        prefix, patches = x.split([self.grid.num_prefix_tokens, self.grid.height * self.grid.width], dim=-2)
        means = region_means(patches, self.grid, self.regions)
        return torch.cat([prefix, means], dim=-2) if self.grid.num_prefix_tokens else means

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return self.softmax(wide(q), self._reduced(wide(k)), self._reduced(wide(v))).to(v.dtype)


def region_means(patches: Tensor, grid: TokenGrid, regions: TokenGrid) -> Tensor:
    """[..., patches of grid, K] -> [..., regions, K]: means over rectangles that cover the grid once.

    Of rows and columns, the first regions are one patch longer where their number does not divide the side.
    """
    return _RegionMeans.apply(patches, grid, regions)


class _RegionMeans(torch.autograd.Function):
    """Rows of patches are summed first, then columns; a patch's gradient is its share of its region's, in one pass."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, grid: TokenGrid, regions: TokenGrid) -> Tensor:
        ctx.heights, ctx.widths = _lengths(grid.height, regions.height), _lengths(grid.width, regions.width)
        image = wide(patches).unflatten(-2, (grid.height, grid.width))
        sums = _segment_sums(_segment_sums(image, -3, regions.height), -2, regions.width).flatten(-3, -2)
        return (sums / _areas(ctx.heights, ctx.widths, sums)).to(patches.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        heights, widths = ctx.heights, ctx.widths
        upstream_wide = wide(upstream)
        areas = _areas(heights, widths, upstream_wide)
        shares = (upstream_wide / areas).to(upstream.dtype)
        if isinstance(areas, int):
            cells = shares.unflatten(-2, (len(heights), 1, len(widths), 1))
            return cells.expand(*cells.shape[:-4], heights[0], -1, widths[0], -1).flatten(-5, -2), None, None
        row, column = (
            torch.tensor([place for place, length in enumerate(lengths) for _ in range(length)])
            for lengths in (heights, widths)
        )
        region = (row.unsqueeze(-1) * len(widths) + column).flatten()  # of each patch
        return shares.index_select(-2, region.to(upstream.device)), None, None


def _lengths(size: int, segments: int) -> list[int]:
    length, num_longer = divmod(size, segments)
    return [length + 1] * num_longer + [length] * (segments - num_longer)


def _areas(heights: list[int], widths: list[int], like: Tensor) -> Tensor | int:
    """Patches of each region, [regions, 1]; one number where all have the same."""
    if len(set(heights)) == len(set(widths)) == 1:
        return heights[0] * widths[0]
    return (like.new_tensor(heights).unsqueeze(-1) * like.new_tensor(widths)).view(-1, 1)


def _segment_sums(x: Tensor, axis: int, segments: int) -> Tensor:
    """Sums over contiguous segments of one axis, the first of them one longer where they do not divide it."""
    length, num_longer = divmod(x.shape[axis], segments)
    parts, start = [], 0
    for count, size in ((num_longer, length + 1), (segments - num_longer, length)):
        if count:
            cells = x.narrow(axis, start, count * size).unflatten(axis, (count, size))
            # Two or three are added quicker than summed.
            parts.append(reduce(torch.add, cells.unbind(axis)) if size <= 3 else cells.sum(axis))
            start += count * size
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


def region_grid(grid: TokenGrid, sr_ratio: int) -> TokenGrid:
    """The regions that a grid is cut into, at most sr_ratio patches high and wide."""
    return TokenGrid(-(-grid.height // sr_ratio), -(-grid.width // sr_ratio))


def sr_ratio(layer: LayerConfig, config: Config) -> int:
    """r, with `auto` resolved."""
    if config.sr_ratio != "auto":
        return config.sr_ratio
    grid, r = layer.grid, 1
    while region_grid(grid, r).num_tokens > max(1, grid.num_tokens // 4):
        r += 1
    return r


def build(layer: LayerConfig, config: Config) -> nn.Module:
    r, grid = sr_ratio(layer, config), layer.grid
    longest = max(grid.height, grid.width)
    if not 1 <= r <= longest:
        raise AttentionError(f"spatial-reduction: sr_ratio ({r}) must be from 1 to the longer side of the grid "
                             f"({longest}); choose a smaller one, or auto")  # fmt: skip
    if r == 1 and config.sr_ratio != "auto":
        warnings.warn(f"spatial-reduction: sr_ratio 1 keeps all {grid.num_tokens} tokens: it is softmax attention",
                      DegenerateWarning, 2)  # fmt: skip
    return MultiHead(layer, SpatialReductionAttention(grid, r, layer.dropout))


def macs(layer: LayerConfig, config: Config) -> int:
    kept = layer.grid.num_prefix_tokens + region_grid(layer.grid, sr_ratio(layer, config)).num_tokens
    return 2 * layer.grid.num_tokens * kept * layer.dim
