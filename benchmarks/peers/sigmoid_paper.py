"""A plain transcription of sigmoid attention: Ramapuram et al., 2025, equation 3, with b = -log N."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2409.04431"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    pass


class SigmoidAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return (scores - math.log(q.shape[-2])).sigmoid() @ v


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, SigmoidAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
