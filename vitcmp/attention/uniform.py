"""Uniform attention: every token gets the mean of all values. A control, which shows what attending itself gains.

    A_ij = 1 / N,   out = A v

There are no queries and no keys: two projections, and nothing to learn about which token to look at. That a
transformer's block learns much even with so simple a mixer is the finding of Yu et al., 2022 (PoolFormer), whose mixer
is a local mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, wide

PAPER = "https://arxiv.org/abs/2111.11418"
COST = "O(N K)"
ROW_STOCHASTIC = True
NUM_PROJECTIONS = 2


@dataclass(frozen=True)
class Config:
    pass


class Mean(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]; q and k are not read. Summed in fp32 at least."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wide(v).mean(dim=-2, keepdim=True).to(v.dtype).expand(v.shape)


class UniformAttention(nn.Module):
    """Value and output projections around the mean: [B, N, D] -> [B, N, D]; they start as MultiHead's do."""

    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        self.num_heads = layer.num_heads
        self.v = nn.Linear(layer.dim, layer.dim, bias=layer.qkv_bias)
        self.core = Mean()
        self.out = nn.Linear(layer.dim, layer.dim, bias=layer.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, K]
        # The values stand for queries and keys, so that whatever reads a map from the core's inputs finds some.
        return self.out(self.core(v, v, v).transpose(1, 2).flatten(-2))


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if layer.dropout:
        raise AttentionError(f"attention_dropout ({layer.dropout}): uniform has no weights to drop; set it to 0")
    return UniformAttention(layer)


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
