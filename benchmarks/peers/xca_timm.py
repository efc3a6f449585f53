"""XCA of timm's XCiT with its own projections, so to be measured at the level attention, against xca:lpi=false."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitcmp.attention import LayerConfig

PAPER = "https://arxiv.org/abs/2106.09681"
COST = "O(N K^2)"
NO_MAP = "it mixes channels"


@dataclass(frozen=True)
class Config:
    pass


def build(layer: LayerConfig, config: Config) -> nn.Module:
    from timm.models.xcit import XCA

    return XCA(layer.dim, layer.num_heads, qkv_bias=layer.qkv_bias)


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
