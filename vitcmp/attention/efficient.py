"""Efficient attention: softmax over the features of a query and over the tokens of the keys, then two products.

    out = rho_q(q) (rho_k(k)^T v),   rho_q: softmax over the features of each query, rho_k: over the tokens

Each feature of the keys is one map over all tokens, and a query mixes these K maps, so the map has rank K at most. No
scale is applied to q (Shen et al., 2021, section 3). The paper's other normalisation, q k^T v / N, gives signed rows
and is left out, as is its residual connection, which the transformer's block already has.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention._multihead import LayerConfig, MultiHead
from vitcmp.kernels.ops import efficient_attention

PAPER = "https://arxiv.org/abs/1812.01243"
COST = "O(N K^2)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    pass


class EfficientAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Computed in fp32 at least."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return efficient_attention(q, k, v)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, core=EfficientAttention())


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens * layer.dim * layer.head_dim
