"""Differential attention: one softmax map minus a learned share of another, so that their common noise cancels.

    A = softmax(q1 k1^T / sqrt(K/2)) - lambda softmax(q2 k2^T / sqrt(K/2)),   out = (1 - lambda_init) RMSNorm(A v),
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 index)

(Ye et al., 2025, equations 1 to 3). The halves of each head's q and k make its two maps; its v keeps the full width, so
a head here is one of the paper's heads of d = K/2, and has the multiply-adds of a softmax head. The heads of a layer
share lambda and the weight of the norm; `index` counts layers from 0. Rows of A sum to 1 - lambda, and entries may be
negative. With attention dropout each map drops weights of its own. On the CPU a compiled kernel mixes the maps, a few
queries at a time, before they meet the values; elsewhere each map is a softmax attention, so that they meet the values
apart, for half as many multiply-adds again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead, wide
from vitcmp.attention.softmax import SoftmaxAttention
from vitcmp.kernels.ops import differential_attention

PAPER = "https://arxiv.org/abs/2410.05258"
COST = "O(N^2 K)"
MAP_NOTE = "map without the norm"


@dataclass(frozen=True)
class Config:
    pass


class DifferentialAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Maps and lambda are computed in fp32 at least."""

    def __init__(self, head_dim: int, lambda_init: float, dropout: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.dropout = dropout  # says that it is known here; `map` applies it
        self.map = SoftmaxAttention("auto", dropout)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(head_dim // 2)) for _ in range(4)
        )
        self.reset_random_state(int(torch.randint(2**62, ())))

    def reset_random_state(self, seed: int) -> None:
        """Draw the vectors of lambda from `seed`, with standard deviation 0.1."""
        generator = torch.Generator().manual_seed(seed)
        for vector in self.parameters():
            vector.data.copy_(0.1 * torch.randn(vector.shape, generator=generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = self._lambda()
        if not self.training or not self.dropout:
            return differential_attention(q, k, v, share)
        first, second = (
            wide(self.map(qm, km, v)) for qm, km in zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
        )
        return (first - share * second).to(v.dtype)

    def _lambda(self) -> Tensor:
        q1, k1, q2, k2 = map(wide, (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init


class HeadNorm(nn.Module):
    """(A v, v) -> scale * RMSNorm(A v), all [B, H, N, K]: over the channels of a head; heads share the weight."""

    def __init__(self, head_dim: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.RMSNorm(head_dim, eps=1e-5)

    def forward(self, mixed: Tensor, v: Tensor) -> Tensor:
        return (self.norm(wide(mixed)) * self.scale).to(v.dtype)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if layer.head_dim % 2:
        raise AttentionError(f"differential: the head width ({layer.head_dim}) must be even, as each head makes two "
                             f"maps; change dim ({layer.dim}) or num_heads ({layer.num_heads})")  # fmt: skip
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer.index)
    core = DifferentialAttention(layer.head_dim, lambda_init, layer.dropout)
    return MultiHead(layer, core, after=HeadNorm(layer.head_dim, 1 - lambda_init))


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
