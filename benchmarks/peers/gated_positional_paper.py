"""A plain transcription of ConViT's gated positional attention: d'Ascoli et al., 2021, equations 6 to 8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, TokenGrid

PAPER = "https://arxiv.org/abs/2103.10697"
COST = "O(N^2 K)"


@dataclass(frozen=True)
class Config:
    pass


class GatedPositionalAttention(nn.Module):
    """The relative positions [N, N, 3] are kept from call to call, as the authors' code keeps them."""

    relative: Tensor

    def __init__(self, num_heads: int, grid: TokenGrid) -> None:
        super().__init__()
        self.position = nn.Linear(3, num_heads)
        self.gate = nn.Parameter(torch.ones(num_heads))
        y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
        dx, dy = (place.flatten() - place.flatten()[:, None] for place in (x, y))
        relative = torch.stack([dx, dy, dx**2 + dy**2], dim=-1).float()
        self.register_buffer("relative", relative, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        content = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        positional = self.position(self.relative).permute(2, 0, 1).softmax(dim=-1)  # [H, N, N]
        gate = self.gate.sigmoid()[:, None, None]
        weights = (1 - gate) * content + gate * positional
        return weights / weights.sum(dim=-1, keepdim=True) @ v


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, GatedPositionalAttention(layer.num_heads, layer.grid))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
