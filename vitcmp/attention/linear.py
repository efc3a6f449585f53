"""Linear attention: a positive feature map in place of the softmax, so that tokens are summed once.

    out_i = phi(q_i) . sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps),   phi(x) = elu(x) + 1

No scale is applied to q. The map has rank K at most (Katharopoulos et al., 2020, equations 4 to 7).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention._multihead import LayerConfig, MultiHead
from vitcmp.kernels.ops import linear_attention

PAPER = "https://arxiv.org/abs/2006.16236"
COST = "O(N K^2)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    eps: float = 1e-6
    """Added to the normaliser, so that it is never zero."""


class LinearAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K].

    Computed in fp32 at least: at N = 1025 and K = 64 numerator and normaliser both leave fp16's range.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, self.eps)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, core=LinearAttention(config.eps))


def macs(layer: LayerConfig, config: Config) -> int:
    return 2 * layer.grid.num_tokens * layer.dim * layer.head_dim
