"""Windowed attention of the package `local-attention`, in one dimension: about as many keys a query as our squares.

A query sees its own run of tokens and the runs before and after it: along the rows, not around it on the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead
from vitcmp.attention._windows import window_side

PAPER = "https://arxiv.org/abs/2003.05997"
COST = "O(N w K)"


@dataclass(frozen=True)
class Config: ...


class Package(nn.Module):
    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        from local_attention import LocalAttention

        tokens, keys = layer.grid.num_tokens, window_side("auto", layer.grid) ** 2
        run = min((w for w in range(1, tokens + 1) if tokens % w == 0), key=lambda w: abs(3 * w - keys))
        self.attention = LocalAttention(run, look_forward=1, use_rotary_pos_emb=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, Package(layer))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
