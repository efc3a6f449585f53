"""A plain transcription of spatial reduction by average pooling: Wang et al., 2021, equation 2 (PVT v2's form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, TokenGrid, spatial_reduction

PAPER = "https://arxiv.org/abs/2102.12122"
COST = "O(N^2 K / r^2)"


@dataclass(frozen=True)
class Config:
    fused: bool = True
    """torch's fused attention, in place of explicit scores."""


class SpatialReductionAttention(nn.Module):
    """For a grid without prefix tokens."""

    def __init__(self, grid: TokenGrid, sr_ratio: int, fused: bool) -> None:
        super().__init__()
        self.grid, self.regions, self.fused = grid, spatial_reduction.region_grid(grid, sr_ratio), fused

    def reduced(self, x: Tensor) -> Tensor:
        image = x.transpose(-2, -1).reshape(-1, x.shape[-1], self.grid.height, self.grid.width)
        pooled = F.adaptive_avg_pool2d(image, (self.regions.height, self.regions.width))
        return pooled.flatten(2).transpose(-2, -1).unflatten(0, x.shape[:2])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.reduced(k), self.reduced(v)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def build(layer: LayerConfig, config: Config) -> nn.Module:
    ratio = spatial_reduction.sr_ratio(layer, spatial_reduction.Config())
    return MultiHead(layer, SpatialReductionAttention(layer.grid, ratio, config.fused))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
