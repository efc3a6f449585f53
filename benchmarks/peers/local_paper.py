"""A plain transcription of neighbourhood attention (Hassani et al., 2023, section 3.1): each query gathers its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, TokenGrid
from vitcmp.attention._windows import window_side

PAPER = "https://arxiv.org/abs/2204.07143"
COST = "O(N w^2 K)"


@dataclass(frozen=True)
class Config: ...


class Neighbourhoods(nn.Module):
    def __init__(self, grid: TokenGrid, window: int) -> None:
        super().__init__()
        rows, columns = (
            (torch.arange(side) - window // 2).clamp(0, side - window)[:, None] + torch.arange(window)
            for side in (grid.height, grid.width)
        )
        self.register_buffer("keys", (rows[:, None, :, None] * grid.width + columns[:, None, :]).reshape(-1, window**2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.index_select(2, self.keys.flatten()).unflatten(2, self.keys.shape) for x in (k, v))
        scores = (q.unsqueeze(3) * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, N, 1, w^2]
        return (scores.softmax(dim=-1) @ v).squeeze(3)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, Neighbourhoods(layer.grid, window_side("auto", layer.grid)))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
