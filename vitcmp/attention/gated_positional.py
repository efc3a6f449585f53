"""Gated positional self-attention (ConViT's): each head mixes softmax attention with one that knows positions alone.

    A_h = (1 - g_h) softmax(q k^T / sqrt(K)) + g_h softmax_j(p_h . r_ij),   g_h = sigmoid(lambda_h),   lambda_h = 1,

with r_ij = (dx, dy, |d|^2) for the offset d from patch i to patch j, in patches (d'Ascoli et al., 2021, section 3; the
paper normalises A's rows, which sum to 1 as they are). At first p_h = locality_strength (2 Dx, 2 Dy, -1): head h looks
where |d - D_h| is small, as a convolution would. The H offsets D_h form a square around the patch itself; where H is no
square, they are those of the next larger square that lie nearest to its centre. A square of an even side has them
between patches.

p . r is a term of dx plus a term of dy, so its softmax over the grid is a softmax over columns times one over rows: the
positional part needs no N x N matrix. Where a head's map is no larger than its values, the two parts are mixed as maps.
Prefix tokens have no position: their rows are softmax alone, and the positional part gives them no weight. Attention
dropout drops weights of the softmax. Left out: the paper starts the value projection as the identity; ours starts as in
all other mechanisms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, scaled_scores, wide
from vitcmp.attention.softmax import SoftmaxAttention

PAPER = "https://arxiv.org/abs/2103.10697"
COST = "O(N^2 K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    locality_strength: float = 1.0
    """How narrowly each head looks at first, 0 (everywhere) or more."""


class GatedPositionalAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Gates and weights are computed in fp32 at least."""

    columns: Tensor
    rows: Tensor

    def __init__(self, num_heads: int, grid: TokenGrid, locality_strength: float, dropout: float) -> None:
        super().__init__()
        self.grid = grid
        self.dropout = dropout
        self.content = SoftmaxAttention("auto", dropout)
        self.gate = nn.Parameter(torch.ones(num_heads))  # lambda
        offsets = 2 * square_of_offsets(num_heads)
        self.position = nn.Parameter(locality_strength * F.pad(offsets, (0, 1), value=-1.0))  # p, [H, 3]
        self.register_buffer("columns", side_offsets(grid.width), persistent=False)
        self.register_buffer("rows", side_offsets(grid.height), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = self.grid
        with torch.autocast(q.device.type, enabled=False):
            along_x, along_y, nearness = wide(self.position).T[:, :, None, None]  # [H, 1, 1] each
            in_row = (along_x * self.columns + nearness * self.columns.square()).softmax(dim=-1)  # [H, width, width]
            in_column = (along_y * self.rows + nearness * self.rows.square()).softmax(dim=-1)  # [H, height, height]
            gate = wide(self.gate).sigmoid()[:, None, None].expand(-1, grid.height * grid.width, 1)
            gate = F.pad(gate, (0, 0, grid.num_prefix_tokens, 0))  # [H, N, 1], 0 for prefix tokens
        mix = self._mix_maps if mixes_maps(grid, v.shape[-1]) else self._mix_outputs
        return mix(q, k, v, in_row, in_column, gate)

    def _mix_maps(self, q: Tensor, k: Tensor, v: Tensor, in_row: Tensor, in_column: Tensor, gate: Tensor) -> Tensor:
        prefix = self.grid.num_prefix_tokens
        positional = (in_column[:, :, None, :, None] * in_row[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        positional = F.pad(positional, (prefix, 0, prefix, 0)) * gate  # [H, N, N]
        with torch.autocast(q.device.type, enabled=False):
            content = scaled_scores(wide(q), wide(k)).softmax(dim=-1)
            content = F.dropout(content, self.dropout, self.training)
            return torch.addcmul(positional, content, 1 - gate).to(v.dtype) @ v

    def _mix_outputs(self, q: Tensor, k: Tensor, v: Tensor, in_row: Tensor, in_column: Tensor, gate: Tensor) -> Tensor:
        prefix = self.grid.num_prefix_tokens
        image = v[:, :, prefix:].unflatten(2, (self.grid.height, self.grid.width))
        image = torch.einsum("hij,bhyjk->bhyik", in_row.to(v.dtype), image)
        image = torch.einsum("hij,bhjxk->bhixk", in_column.to(v.dtype), image)
        positional = image.flatten(2, 3)
        if prefix:
            positional = F.pad(positional, (0, 0, prefix, 0))  # [B, H, N, K]
        return self.content(q, k, v).lerp(positional, gate.to(v.dtype))


def mixes_maps(grid: TokenGrid, width: int) -> bool:
    """Whether both parts meet as maps, [N, N] a head, and not as outputs, [N, K]: where those are no larger."""
    return grid.num_tokens <= width


def side_offsets(side: int) -> Tensor:
    """j - i along one side of the grid, [side, side]."""
    places = torch.arange(side, dtype=torch.float32)
    return places - places[:, None]


def square_of_offsets(count: int) -> Tensor:
    """The (x, y) of a square grid nearest to its centre, which is (0, 0): [count, 2], row by row."""
    side = math.isqrt(count - 1) + 1
    places = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    offsets = torch.stack([x.flatten(), y.flatten()], dim=1)
    nearest = offsets.square().sum(dim=1).argsort(stable=True)[:count]
    return offsets[nearest.sort().values]


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if not 0 <= config.locality_strength < math.inf:
        raise AttentionError(f"gated-positional: locality_strength ({config.locality_strength}) must be 0 or more, and "
                             "finite")  # fmt: skip
    core = GatedPositionalAttention(layer.num_heads, layer.grid, config.locality_strength, layer.dropout)
    return MultiHead(layer, core)


def macs(layer: LayerConfig, config: Config) -> int:
    grid = layer.grid
    positional = 0 if mixes_maps(grid, layer.head_dim) else grid.height * grid.width * (grid.height + grid.width)
    return (2 * grid.num_tokens**2 + positional) * layer.dim
