"""A plain transcription of our hybrid's formula: dilated windows on all heads, linear attention, and a gate."""

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


class Hybrid(nn.Module):
    def __init__(self, layer: LayerConfig, dilations: list[int], window: int) -> None:
        super().__init__()
        self.windows = nn.ModuleList(Regional(layer.grid, d, window) for d in dilations)
        self.gate = nn.Parameter(torch.zeros(layer.num_heads, len(dilations) + 1, layer.head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answers = [branch(q, k, v) for branch in self.windows]
        a, b = F.elu(q) + 1, F.elu(k) + 1
        total = (a * b.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
        answers.append(a @ (b.transpose(-2, -1) @ v) / (total + 1e-6))
        shares = (q @ self.gate.transpose(-2, -1)).softmax(dim=-1)  # [B, H, N, branches]
        return torch.einsum("bhnr,rbhnk->bhnk", shares, torch.stack(answers))


def build(layer: LayerConfig, config: Config) -> nn.Module:
    dilations = [d for d in (1, 2, 4) if d == 1 or min(layer.grid.height, layer.grid.width) // d > 1]
    return MultiHead(layer, Hybrid(layer, dilations, window_side("auto", layer.grid)))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
