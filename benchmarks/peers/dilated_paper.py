"""A plain transcription of attention in dilated windows (ACC-ViT's regional attention, all phases, shared by heads)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, TokenGrid
from vitcmp.attention._windows import window_side

PAPER = "https://arxiv.org/abs/2406.08859"
COST = "O(N w^2 K)"


@dataclass(frozen=True)
class Config: ...


class Regional(nn.Module):
    """Attention within the windows of all phases at one dilation; what fills up the last windows is masked."""

    def __init__(self, grid: TokenGrid, dilation: int, window: int) -> None:
        super().__init__()
        self.grid, self.dilation = grid, dilation
        self.window = min(window, min(grid.height, grid.width) // dilation)
        step = dilation * self.window
        self.pad = (-grid.height % step, -grid.width % step)
        real = F.pad(torch.ones(grid.height, grid.width), (0, self.pad[1], 0, self.pad[0]))
        mask = torch.zeros(real.shape).masked_fill(real == 0, -math.inf).view(1, 1, *real.shape, 1)
        self.register_buffer("mask", self.cut(mask).transpose(-2, -1) if sum(self.pad) else None)

    def cut(self, x: Tensor) -> Tensor:
        """[B, H, height, width, C] -> [B, H, windows, w^2, C]."""
        x = x.unflatten(3, (-1, self.window, self.dilation)).unflatten(2, (-1, self.window, self.dilation))
        # [B, H, rows, w, d, columns, w, d, C]: a window keeps its place and its phase.
        return x.permute(0, 1, 2, 4, 5, 7, 3, 6, 8).flatten(6, 7).flatten(2, 5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = self.grid.height, self.grid.width
        images = (F.pad(x.unflatten(2, (height, width)), (0, 0, 0, self.pad[1], 0, self.pad[0])) for x in (q, k, v))
        q, k, v = map(self.cut, images)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        x = (scores if self.mask is None else scores + self.mask).softmax(dim=-1) @ v
        rows, columns = ((side + pad) // (self.window * self.dilation)
                         for side, pad in zip((height, width), self.pad, strict=True))  # fmt: skip
        x = x.unflatten(3, (self.window, self.window)).unflatten(2, (rows, self.dilation, columns, self.dilation))
        # [B, H, rows, d, columns, d, w, w, C] -> the image
        x = x.permute(0, 1, 2, 6, 3, 4, 7, 5, 8).flatten(5, 7).flatten(2, 4)
        return x[:, :, :height, :width].flatten(2, 3)


class Dilated(nn.Module):
    def __init__(self, grid: TokenGrid, dilations: list[int], window: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Regional(grid, d, window) for d in dilations)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = zip(*(x.tensor_split(len(self.groups), dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([group(*qkv) for group, qkv in zip(self.groups, heads, strict=True)], dim=1)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    dilations = [d for d in (1, 2, 4) if d == 1 or min(layer.grid.height, layer.grid.width) // d > 1]
    return MultiHead(layer, Dilated(layer.grid, dilations, window_side("auto", layer.grid)))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
