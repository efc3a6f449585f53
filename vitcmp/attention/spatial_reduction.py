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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid
from vitcmp.attention.nystromformer import segment_means
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
    """Shapes: q, k, v and the result are [B, H, N, K]."""

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
        return self.softmax(q, self._reduced(k), self._reduced(v)).to(v.dtype)


def region_means(patches: Tensor, grid: TokenGrid, regions: TokenGrid) -> Tensor:
    """[..., patches of grid, K] -> [..., regions, K]: means over rectangles that cover the grid once.

    Of rows and columns, the first regions are one patch longer where their number does not divide the side.
    """
    if grid.height % regions.height == 0 and grid.width % regions.width == 0:
        return _EvenMeans.apply(patches, grid, regions)
    image = patches.unflatten(-2, (grid.height, grid.width))
    rows = segment_means(image.flatten(-2), regions.height).unflatten(-1, (grid.width, -1))
    return segment_means(rows, regions.width).flatten(-3, -2)  # from [..., regions.height, regions.width, K]


class _EvenMeans(torch.autograd.Function):
    """Means over equal rectangles: forward, pooling is the quickest, and backward a broadcast."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, grid: TokenGrid, regions: TokenGrid) -> Tensor:
        height, width = grid.height // regions.height, grid.width // regions.width
        ctx.cells = (regions.height, height, regions.width, width)
        # As images with the channels last, which is how tokens lie: no copy.
        images = patches.transpose(-2, -1).flatten(0, -3).unflatten(-1, (grid.height, grid.width))
        pooled = F.avg_pool2d(images, (height, width))
        return pooled.flatten(-2).transpose(-2, -1).unflatten(0, patches.shape[:-2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        rows, height, columns, width = ctx.cells
        cells = (upstream / (height * width)).unflatten(-2, (rows, 1, columns, 1))
        return cells.expand(*cells.shape[:-5], rows, height, columns, width, -1).flatten(-5, -2), None, None


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
