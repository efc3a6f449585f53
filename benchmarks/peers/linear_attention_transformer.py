"""linear_attn of the package linear-attention-transformer: efficient attention, with a scale of 1 / sqrt(K)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/1812.01243"
COST = "O(N K^2)"


@dataclass(frozen=True)
class Config:
    pass


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from linear_attention_transformer.linear_attention_transformer import linear_attn

        self.attend = linear_attn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, LinearAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
