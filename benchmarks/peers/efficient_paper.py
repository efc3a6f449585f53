"""A plain transcription of efficient attention: Shen et al., 2021, section 3, with softmax normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/1812.01243"
COST = "O(N K^2)"


@dataclass(frozen=True)
class Config:
    pass


class EfficientAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, EfficientAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
