"""Softmax attention, the reference.

    A = softmax(q k^T / sqrt(K)),   out = A v          (Vaswani et al., 2017, equation 1)

Four forms compute the same: `naive` (separate projections, explicit weights), `merged` (one projection, explicit
weights), `fused` (one projection, torch's scaled_dot_product_attention) and `numba` (one projection, kernels for
the CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention._multihead import LayerConfig, MultiHead, scaled_scores
from vitcmp.attention._softmax import attend

PAPER = "https://arxiv.org/abs/1706.03762"
COST = "O(N^2 K)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    impl: Literal["auto", "naive", "merged", "fused", "numba"] = "auto"
    """Form of the computation; auto: the quickest for the device, number format, head width and token count."""


class SoftmaxAttention(nn.Module):
    """Shapes: q and the result are [B, H, N, K], k and v too, or [B, H, M, K]."""

    def __init__(self, impl: str, dropout: float) -> None:
        super().__init__()
        self.impl, self.dropout = impl, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        impl = quickest(q, k, v, dropout) if self.impl == "auto" else self.impl
        if impl == "fused":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        if impl == "numba" and can_compile(q, k, v, dropout):
            return attend(q, k, v)[0]
        naive = impl == "naive"
        scores = q * q.shape[-1] ** -0.5 @ k.mT if naive else scaled_scores(q, k)  # [B, H, N, N]
        # The kernel sums in fp32 whatever its input, so autocast's fp32 copy of the scores buys nothing.
        with torch.autocast(q.device.type, enabled=False):
            weights = scores.softmax(dim=-1)
        return F.dropout(weights, dropout) @ v


def can_compile(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether the kernels can take it."""
    is_plain = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and q.numel() > 0
    fits = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1]
    return is_plain and fits and not dropout


def quickest(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> str:
    """A fixed table, so that a run is repeatable; `benchmarks/softmax_forms.py` prints the measurements behind it."""
    if q.device.type != "cpu":
        return "fused"
    in_bf16, queries, (keys, width) = q.dtype == torch.bfloat16, q.shape[-2], k.shape[-2:]
    # A vector's lanes are queries forward and keys backward: few of them leave it empty, which explicit weights do not.
    if in_bf16:
        fits = width <= 32 or min(queries, keys) >= 16 or max(queries, keys) >= 1024
    else:
        fits = width <= 32 or queries >= 8
    if fits and width <= 128 and can_compile(q, k, v, dropout):
        return "numba"
    # Its backward pass computes the scores again, which only many tokens repay; in bf16 it is slow at any size.
    return "fused" if not in_bf16 and keys > 128 else "merged"


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, SoftmaxAttention(config.impl, layer.dropout), merged=config.impl != "naive")


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
