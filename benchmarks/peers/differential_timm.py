"""DiffAttention of timm without its linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2410.05258"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    fused: bool = True
    """Two calls of torch's scaled_dot_product_attention, in place of explicit maps."""


class Given(nn.Module):
    """In place of the projection, whose result timm cuts in three: hands over what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Given:
        return self

    def chunk(self, parts: int, dim: int) -> tuple[Tensor, ...]:
        return self.value


class DiffAttention(nn.Module):
    """Each head is an image of one head to timm, so that splitting and merging heads costs it no copies."""

    def __init__(self, layer: LayerConfig, fused: bool) -> None:
        super().__init__()
        from timm.layers import DiffAttention as Package

        self.attention = Package(layer.head_dim, num_heads=1, depth=layer.index)
        self.attention.fused_attn = fused
        self.attention.qkv, self.attention.proj = Given(), nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.attention.qkv.value = tuple(x.flatten(0, 1) for x in (q, k, v))
        y = self.attention(q.flatten(0, 1))
        self.attention.qkv.value = ()
        return y.view_as(q)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, DiffAttention(layer, config.fused))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
