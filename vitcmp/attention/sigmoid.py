"""Sigmoid attention: each weight by itself, with no normalisation of the rows.

    A = sigmoid(q k^T / sqrt(K) + b),   out = A v,   b = -log N

The bias makes a row sum to about 1 where scores are near 0, as softmax would; rows are free to sum to more or less
(Ramapuram et al., 2025, section 2). The norms of queries and keys and the LayerScale with which the paper steadies some
of its models are no part of the mechanism here. Weights exist a block of tokens at a time, so without an N x N matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead
from vitcmp.kernels.ops import sigmoid_attention
from vitcmp.kernels.ops.blockwise import explicit

PAPER = "https://arxiv.org/abs/2409.04431"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    bias: float | Literal["auto"] = "auto"
    """Added to each score; auto: -log N."""


class SigmoidAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Weights are computed in fp32 at least."""

    def __init__(self, bias: float, dropout: float) -> None:
        super().__init__()
        self.bias, self.dropout = bias, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.training and self.dropout:
            return explicit(q, k, v, self.bias, self.dropout)
        return sigmoid_attention(q, k, v, self.bias)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    bias = -math.log(layer.grid.num_tokens) if config.bias == "auto" else config.bias
    if not math.isfinite(bias):
        raise AttentionError(f"sigmoid: bias ({bias}) must be finite, or auto for -log N")
    return MultiHead(layer, core=SigmoidAttention(bias, layer.dropout))


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
