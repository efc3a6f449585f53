"""Softmax attention, the reference.

    A = softmax(q k^T / sqrt(K)),   out = A v          (Vaswani et al., 2017, equation 1)

Four forms compute the same: `naive` (separate projections, explicit weights), `merged` (one projection, explicit
weights), `fused` (one projection, torch's scaled_dot_product_attention) and `numba` (one projection, kernels for
the CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vitcmp.attention._multihead import LayerConfig, MultiHead
from vitcmp.kernels.ops import softmax_attention
from vitcmp.kernels.ops.softmax import explicit

PAPER = "https://arxiv.org/abs/1706.03762"
COST = "O(N^2 K)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    impl: Literal["auto", "naive", "merged", "fused", "numba"] = "auto"
    """Form of the computation; auto: the quickest of merged, fused and numba, as measured on this kind of CPU."""


class SoftmaxAttention(nn.Module):
    """Shapes: q and the result are [B, H, N, K], k and v too, or [B, H, M, K]."""

    def __init__(self, impl: str, dropout: float) -> None:
        super().__init__()
        self.impl, self.dropout = impl, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return softmax_attention(q, k, v, form=self.impl)
        if self.impl == "fused":
            return scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return explicit(q, k, v, self.dropout)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, SoftmaxAttention(config.impl, layer.dropout), merged=config.impl != "naive")


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
