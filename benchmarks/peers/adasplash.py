"""AdaSplash of the package adasplash: alpha-entmax attention in Triton. CUDA, a power of two of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError, LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2502.12082"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    alpha: float = 1.5


class AdaSplash(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from adasplash import adasplash

        # The newer kernels are causal only: for full attention the package takes those with a mask of blocks.
        return adasplash(q.contiguous(), k.contiguous(), v.contiguous(), alpha=self.alpha, is_causal=False)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if not torch.cuda.is_available():
        raise AttentionError("adasplash needs CUDA")
    tokens = layer.grid.num_tokens
    if tokens & (tokens - 1):
        raise AttentionError(f"adasplash: num_tokens ({tokens}) must be a power of two")
    if layer.head_dim not in (16, 32, 64, 128, 256):
        raise AttentionError(f"adasplash: head_dim ({layer.head_dim}) must be 16, 32, 64, 128 or 256")
    return MultiHead(layer, AdaSplash(config.alpha))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
