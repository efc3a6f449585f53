"""Softmax attention, the reference.

    A = softmax(q k^T / sqrt(K)),   out = A v          (Vaswani et al., 2017, equation 1)

Three forms compute the same: `naive` (separate projections, explicit weights), `merged` (one projection, explicit
weights) and `fused` (one projection, torch's scaled_dot_product_attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention._multihead import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/1706.03762"
COST = "O(N^2 K)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    impl: Literal["auto", "naive", "merged", "fused"] = "auto"
    """Form of the computation; auto: the quickest for the device, number format, head width and token count."""


class SoftmaxAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]."""

    def __init__(self, impl: str, dropout: float) -> None:
        super().__init__()
        self.impl, self.dropout = impl, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.impl == "fused" or (self.impl == "auto" and fused_is_quicker(q)):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # [B, H, N, N]
        # The kernel sums in fp32 whatever its input, so autocast's fp32 copy of the scores buys nothing.
        with torch.autocast(q.device.type, enabled=False):
            weights = scores.softmax(dim=-1)
        return F.dropout(weights, dropout) @ v


def fused_is_quicker(q: Tensor) -> bool:
    """A fixed table, so that a run is repeatable; `benchmarks/softmax_forms.py` prints the measurements behind it."""
    if q.device.type != "cpu":
        return True
    # Its backward pass computes the scores again, which only many tokens repay; in bf16 it is slow at any size.
    return q.dtype != torch.bfloat16 and q.shape[-2] > 128


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, SoftmaxAttention(config.impl, layer.dropout), merged=config.impl != "naive")


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
