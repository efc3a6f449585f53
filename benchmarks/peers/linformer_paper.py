"""A plain transcription of Linformer, E = F shared by all heads: Wang et al., 2020, equation 7."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, linformer

PAPER = "https://arxiv.org/abs/2006.04768"
COST = "O(N k K)"


@dataclass(frozen=True)
class Config:
    pass


class LinformerAttention(nn.Module):
    def __init__(self, num_tokens: int, proj_dim: int) -> None:
        super().__init__()
        self.e = nn.Parameter(torch.randn(proj_dim, num_tokens) * proj_dim**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.e @ k, self.e @ v
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ v


def build(layer: LayerConfig, config: Config) -> nn.Module:
    length = linformer.proj_dim(layer, linformer.Config())
    return MultiHead(layer, LinformerAttention(layer.grid.num_tokens, length))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
