"""alpha-entmax attention: softmax's sparse relatives, which give exact zeros.

    A = entmax_alpha(q k^T / sqrt(K)),   p_i = [(alpha - 1) z_i - tau]_+ ^ (1 / (alpha - 1)), tau such that sum p = 1

alpha = 1 is softmax, alpha = 2 is sparsemax; the larger alpha, the sparser (Peters, Niculae and Martins, 2019,
equation 8). A learned alpha is one a head, between 1 and 2 (Correia, Niculae and Martins, 2019,
https://arxiv.org/abs/1909.00015). The threshold is exact, found by Newton's method; that costs no multiply-adds, and
those stated are all of both products, of which zeros save a part.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, wide
from vitcmp.attention.softmax import SoftmaxAttention
from vitcmp.kernels.ops import entmax_attention
from vitcmp.kernels.ops.entmax import attend_in_torch

PAPER = "https://arxiv.org/abs/1905.05702"
COST = "O(N^2 K)"
ROW_STOCHASTIC = True

Impl = Literal["auto", "numba", "torch", "triton", "package"]


@dataclass(frozen=True)
class Config:
    alpha: float | Literal["learned"] = 1.5
    """1 (softmax) to 4, beyond which digits are lost; 2 is sparsemax; learned: one a head in 1.01 to 1.99, from 1.5."""
    impl: Impl = "auto"
    """auto: numba on the CPU, torch elsewhere; triton: on CUDA, for alpha up to 2, memory grows with N, but it has not
    run on a GPU yet; package: the entmax package (sorting, or bisection)."""


class EntmaxAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Weights are computed in fp32 at least."""

    def __init__(self, alpha: float | Literal["learned"], num_heads: int, impl: str, dropout: float) -> None:
        super().__init__()
        self.fixed_alpha, self.impl, self.dropout = alpha, impl, dropout
        if alpha == "learned":
            self.raw_alpha = nn.Parameter(torch.zeros(1, num_heads, 1, 1))

    def alpha(self, like: Tensor) -> Tensor:
        """[1, 1 or H, 1, 1], of the type of `like`."""
        if self.fixed_alpha == "learned":
            # The gradient carries 1 / (alpha - 1)^2: alpha stays off 1, and off 2, where sparsemax begins.
            return 1.01 + 0.98 * self.raw_alpha.to(like.dtype).sigmoid()
        return like.new_full((1, 1, 1, 1), self.fixed_alpha)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype, dropout = v.dtype, self.dropout if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            if self.impl == "triton":
                return self._triton(q, k, v)
            q, k, v = wide(q), wide(k), wide(v)
            alpha = self.alpha(q)
            if self.impl == "package":
                return (F.dropout(self._package(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)), dropout) @ v).to(dtype)
            convex = self.fixed_alpha == "learned" or self.fixed_alpha <= 2
            if dropout:
                return attend_in_torch(q, k, v, alpha, convex, dropout).to(dtype)
            return entmax_attention(q, k, v, alpha, convex, form=self.impl).to(dtype)

    def _triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda or find_spec("triton") is None:
            raise AttentionError("entmax: impl=triton needs CUDA and the package triton; leave impl at auto")
        from vitcmp.kernels.triton import entmax as kernels

        if not kernels.available(q, k, v):
            raise AttentionError(f"entmax: impl=triton has no kernel for {q.dtype}, head width {q.shape[-1]} on this "
                                 "GPU; leave impl at auto")  # fmt: skip
        alpha = self.fixed_alpha
        return kernels.attend(q, k, v, self.alpha(q.new_empty(0, dtype=torch.float32)) if alpha == "learned" else alpha)

    def _package(self, scores: Tensor) -> Tensor:
        import entmax

        if self.fixed_alpha == 1.5:
            return entmax.entmax15(scores, dim=-1)
        if self.fixed_alpha == 2:
            return entmax.sparsemax(scores, dim=-1)
        return entmax.entmax_bisect(scores, alpha=self.alpha(scores), dim=-1)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if config.alpha != "learned" and not 1 <= config.alpha < math.inf:
        raise AttentionError(f"entmax: alpha ({config.alpha}) must be 1 or more, and finite, or learned")
    if config.alpha != "learned" and config.alpha > 4:
        warnings.warn(
            f"entmax: at alpha {config.alpha} the rounding of a score moves its weight by eps^(1 / (alpha - 1)), which "
            f"is {torch.finfo(torch.float32).eps ** (1 / (config.alpha - 1)):.0e}; stay at 4 or below",
            DegenerateWarning,
            2,
        )
    if config.impl in ("numba", "triton") and layer.dropout:
        raise AttentionError(f"entmax: impl={config.impl} keeps no weights to drop; set attention_dropout "
                             f"({layer.dropout}) to 0, or impl to torch")  # fmt: skip
    if config.impl == "triton" and config.alpha != "learned" and config.alpha > 2:
        raise AttentionError(f"entmax: impl=triton takes alpha up to 2, not {config.alpha}; leave impl at auto")
    if config.alpha == 1:  # the limit has a closed form
        return MultiHead(layer, SoftmaxAttention("auto", layer.dropout))
    return MultiHead(layer, EntmaxAttention(config.alpha, layer.num_heads, config.impl, layer.dropout))


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens**2 * layer.dim
