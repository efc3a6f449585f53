"""A plain transcription of cosFormer: Qin et al., 2022, equations 10 to 12."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2202.08791"
COST = "O(N K^2)"


@dataclass(frozen=True)
class Config:
    pass


class CosformerAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[-2]
        angle = math.pi / 2 * torch.arange(tokens, dtype=q.dtype, device=q.device).unsqueeze(-1) / tokens
        cos, sin = angle.cos(), angle.sin()
        q, k = q.relu(), k.relu()
        q = torch.cat([q * cos, q * sin], dim=-1)
        k = torch.cat([k * cos, k * sin], dim=-1)
        normaliser = (q @ k.sum(dim=-2).unsqueeze(-1)).clamp(min=1e-6)
        return q @ (k.transpose(-2, -1) @ v) / normaliser


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, CosformerAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
