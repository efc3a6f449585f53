"""A plain transcription of linear attention: Katharopoulos et al., 2020, equations 4 to 7."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2006.16236"
COST = "O(N K^2)"


@dataclass(frozen=True)
class Config:
    pass


class LinearAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        normaliser = q @ k.sum(dim=-2).unsqueeze(-1) + 1e-6
        return q @ (k.transpose(-2, -1) @ v) / normaliser


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, LinearAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
