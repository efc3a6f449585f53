"""Focused linear attention (FLatten): linear attention with sharpened features, and a convolution of the values.

    out = phi(q) (phi(k)^T v) / (phi(q) sum_j phi(k_j)) + DWConv(v),   phi(x) = f_p(relu(x) + 1e-6),
    f_p(x) = |x| / |x^p| x^p

f_p keeps a vector's norm and turns it towards its largest features; the depthwise convolution of the patches restores
the rank that linear attention lacks (Han et al., 2023, section 4). The 1e-6 is the official code's: no row is without
weight. Beside that code: norms are those of a head, as in the paper's formulas (the code takes those of all heads
together); its learned scale of the features and its learned positions of the keys are left out, as no other
mechanism here has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._convolution import AddConvolvedValues, GridConvolution
from vitcmp.attention._multihead import LayerConfig, MultiHead
from vitcmp.kernels.feature_maps import FeatureMap, Products

PAPER = "https://arxiv.org/abs/2308.00442"
COST = "O(N K^2)"
ROW_STOCHASTIC = True
EQUIVARIANT = False
MAP_NOTE = "map without the convolution"


@dataclass(frozen=True)
class Config:
    focusing_factor: float = 3
    """The power p, 1 (no sharpening) or more."""
    conv_kernel_size: int = 5
    """Side of the depthwise convolution of the values, shared by the heads; odd (0: none)."""


class FocusedLinearAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Computed in fp32 at least."""

    def __init__(self, focusing_factor: float) -> None:
        super().__init__()
        self.focusing_factor = focusing_factor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The norm of a query cancels in the quotient, so its powers serve as phi(q).
        phi, psi = Power(self.focusing_factor), Focused(self.focusing_factor)
        # Above p = 4, every product of a query's and a key's features can underflow: then the row is zero.
        return Products(phi, psi, num_features=q.shape[-1], least=1e-30)(q, k, v)


class Power(FeatureMap):
    """y^p for y = relu(x) + 1e-6, divided by a number for each row: y^p itself would overflow."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        return self._power(x.relu() + 1e-6)

    def _power(self, y: Tensor) -> Tensor:
        return (y / y.amax(dim=-1, keepdim=True).detach()) ** self.p

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        return upstream.mul_(features).mul_(self.p).div_(x.relu().add_(1e-6)).mul_(x > 0)


class Focused(Power):
    """f_p(y), which cancels that number."""

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        y = x.relu() + 1e-6
        power = self._power(y)
        return power * (y.norm(dim=-1, keepdim=True) / power.norm(dim=-1, keepdim=True))

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        # With f = f_p(y), |f| = |y| and g upstream: dy = p f / y (g - f (g.f) / |f|^2) + y (g.f) / |y|^2.
        y = x.relu().add_(1e-6)
        share = (upstream * features).sum(dim=-1, keepdim=True) / y.square().sum(dim=-1, keepdim=True)
        turned = upstream.addcmul_(features, share, value=-1).mul_(features).mul_(self.p).div_(y)
        return turned.addcmul_(y, share).mul_(x > 0)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    power, size = config.focusing_factor, config.conv_kernel_size
    if not 1 <= power < math.inf:
        raise AttentionError(f"focused-linear: focusing_factor ({power}) must be 1 or more, and finite")
    if size != 0 and (size < 0 or size % 2 == 0):
        raise AttentionError(f"focused-linear: conv_kernel_size ({size}) must be odd, or 0 for no convolution")
    convolution = AddConvolvedValues(layer.num_heads, layer.head_dim, size, layer.grid, shared=True) if size else None
    return MultiHead(layer, core=FocusedLinearAttention(power), after=convolution)


def macs(layer: LayerConfig, config: Config) -> int:
    convolution = GridConvolution.macs(layer.dim, config.conv_kernel_size, layer.grid)
    return 2 * layer.grid.num_tokens * layer.dim * layer.head_dim + convolution
