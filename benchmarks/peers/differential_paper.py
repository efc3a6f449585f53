"""A plain transcription of differential attention: Ye et al., 2025, equations 1 to 3, with both maps explicit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2410.05258"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    pass


class DifferentialAttention(nn.Module):
    def __init__(self, head_dim: int, lambda_init: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(0.1 * torch.randn(head_dim // 2)) for _ in range(4))
        self.norm = nn.RMSNorm(head_dim, eps=1e-5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = (self.q1 @ self.k1).exp() - (self.q2 @ self.k2).exp() + self.lambda_init
        first, second = (
            (qm @ km.transpose(-2, -1) * qm.shape[-1] ** -0.5).softmax(dim=-1)
            for qm, km in zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        )
        return (1 - self.lambda_init) * self.norm((first - share * second) @ v)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer.index)
    return MultiHead(layer, DifferentialAttention(layer.head_dim, lambda_init))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
