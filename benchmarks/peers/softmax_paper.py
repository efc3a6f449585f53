"""A plain transcription of softmax attention: Vaswani et al., 2017, equation 1, with explicit weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/1706.03762"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    pass


class SoftmaxAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, SoftmaxAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
