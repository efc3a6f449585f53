"""alpha-entmax attention: softmax's sparse relatives, which give exact zeros.

    A = entmax_alpha(q k^T / sqrt(K)),   p_i = [(alpha - 1) z_i - tau]_+ ^ (1 / (alpha - 1)), tau such that sum p = 1

alpha = 1 is softmax, alpha = 2 is sparsemax; between them, the larger alpha, the sparser (Peters, Niculae and
Martins, 2019, equation 8). The threshold is found by the `entmax` package: by sorting for 1.5 and 2, by bisection
else; neither costs multiply-adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from entmax import entmax15, entmax_bisect, sparsemax
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead, wide

PAPER = "https://arxiv.org/abs/1905.05702"
COST = "O(N^2 K + N^2 log N)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    alpha: float = 1.5
    """Sparsity, 1 (softmax) or more; 2 is sparsemax."""


class EntmaxAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Weights are computed in fp32 at least."""

    def __init__(self, alpha: float, dropout: float) -> None:
        super().__init__()
        self.alpha, self.dropout = alpha, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = wide(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1))  # [B, H, N, N]
        with torch.autocast(q.device.type, enabled=False):
            weights = self._weights(scores)
        return F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v

    def _weights(self, scores: Tensor) -> Tensor:
        # The package's bisection returns the uniform distribution at alpha = 1.
        if self.alpha == 1:
            return scores.softmax(dim=-1)
        if self.alpha == 1.5:
            return entmax15(scores, dim=-1)
        if self.alpha == 2:
            return sparsemax(scores, dim=-1)
        return entmax_bisect(scores, alpha=self.alpha, dim=-1)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if not 1 <= config.alpha < math.inf:
        raise AttentionError(f"entmax: alpha ({config.alpha}) must be 1 or more, and finite")
    return MultiHead(layer, core=EntmaxAttention(config.alpha, layer.dropout))


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
