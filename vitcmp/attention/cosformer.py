"""cosFormer: linear attention with ReLU features that a cosine weights by distance.

    A_ij = s_ij / max(sum_j s_ij, eps),   s_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j) / N)

i and j count tokens, the class token first. As cos(a - b) = cos a cos b + sin a sin b, the features
[relu(x) cos, relu(x) sin] turn the weighted sum into two products, and no N x N matrix is formed (Qin et al., 2022,
section 3; the paper's M is N here, as in the official code). A row whose query has no positive feature, or meets none
in the keys, is zero; every other row sums to 1.

`positions=grid` is ours: cos(pi/2 (row offset) / height) cos(pi/2 (column offset) / width), four products, with the
prefix tokens in the middle of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, wide
from vitcmp.kernels.feature_maps import FeatureMap, Products

PAPER = "https://arxiv.org/abs/2202.08791"
COST = "O(N K^2)"
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    positions: Literal["sequence", "grid"] = "sequence"
    """sequence: distance in the order of the tokens, as in the paper; grid: in rows and columns."""
    eps: float = 1e-6
    """Least value of the normaliser."""


class CosformerAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Computed in fp32 at least."""

    def __init__(self, grid: TokenGrid, positions: str, eps: float) -> None:
        super().__init__()
        self.grid, self.positions, self.eps = grid, positions, eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi = WavesOfRelu(self._waves(wide(q)).unsqueeze(-1))
        return Products(phi, phi, num_features=phi.waves.shape[1] * q.shape[-1], least=self.eps)(q, k, v)

    def _waves(self, like: Tensor) -> Tensor:
        """The cosine and sine of each token's place, [N, 2]; on the grid, their products by row and column, [N, 4]."""

        def places(length: int) -> Tensor:
            return torch.arange(length, dtype=like.dtype, device=like.device)

        if self.positions == "sequence":
            return _cos_sin(places(self.grid.num_tokens), self.grid.num_tokens)
        height, width = self.grid.height, self.grid.width
        down, across = places(height), places(width)
        patches = _cos_sin(down, height)[:, None, :, None] * _cos_sin(across, width)[:, None]  # [height, width, 2, 2]
        middle = _cos_sin(down.mean(), height)[:, None] * _cos_sin(across.mean(), width)  # [2, 2]
        return torch.cat([middle.expand(self.grid.num_prefix_tokens, 2, 2), patches.flatten(0, 1)]).flatten(-2)


class WavesOfRelu(FeatureMap):
    """T K features: each of T waves, [N, T, 1] over all tokens, times relu(x)."""

    def __init__(self, waves: Tensor) -> None:
        self.waves = waves

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        return (x.relu().unsqueeze(-2) * self.waves[tokens]).flatten(-2)

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        waves = self.waves[tokens]
        return upstream.unflatten(-1, (waves.shape[1], -1)).mul_(waves).sum(dim=-2).mul_(x > 0)


def _cos_sin(place: Tensor, length: int) -> Tensor:
    """cos and sin of pi/2 place / length, [..., 2]. None is negative, so no weight is."""
    angle = math.pi / 2 / length * place
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if not 0 < config.eps < math.inf:
        raise AttentionError(f"cosformer: eps ({config.eps}) must be above 0, and finite; the paper's code has 1e-6")
    return MultiHead(layer, core=CosformerAttention(layer.grid, config.positions, config.eps))


def macs(layer: LayerConfig, config: Config) -> int:
    waves = 2 if config.positions == "sequence" else 4
    return 2 * waves * layer.grid.num_tokens * layer.dim * layer.head_dim
