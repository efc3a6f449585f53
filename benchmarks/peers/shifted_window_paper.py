"""Swin's attention as its authors and timm write it: pad, roll, cut into windows, mask, fused attention with a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead
from vitcmp.attention._windows import window_side

PAPER = "https://arxiv.org/abs/2103.14030"
COST = "O(N w^2 K)"


@dataclass(frozen=True)
class Config:
    shifted: bool = False
    """Whether the windows are moved by half a window."""
    fused: bool = True
    """Fused attention, as in timm; else explicit scores, as in the authors' code."""


class Swin(nn.Module):
    def __init__(self, layer: LayerConfig, window: int, shift: int, fused: bool) -> None:
        super().__init__()
        self.height, self.width, self.window, self.shift, self.fused = (
            layer.grid.height, layer.grid.width, window, shift, fused,
        )  # fmt: skip
        self.pad = (-self.height % window, -self.width % window)
        self.table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, layer.num_heads))
        y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
        index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("index", index.flatten())
        region = torch.zeros(1, self.height + self.pad[0], self.width + self.pad[1], 1)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else ()
        for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
            region[:, rows, columns] = number
        region = self.cut(region).squeeze(-1)  # [windows, w^2]
        mask = torch.zeros(len(region), window**2, window**2)
        self.register_buffer("mask", mask.masked_fill(region[:, :, None] != region[:, None], -100.0) if shift else None)

    def cut(self, x: Tensor) -> Tensor:
        """[B, height, width, C] -> [B * windows, w^2, C]."""
        batch, height, width, channels = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, channels)
        return x.transpose(2, 3).reshape(-1, self.window**2, channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, width = q.shape
        x = torch.stack([q, k, v], dim=2).permute(0, 3, 2, 1, 4).reshape(batch, self.height, self.width, -1)
        x = F.pad(x, (0, 0, 0, self.pad[1], 0, self.pad[0]))
        x = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = self.cut(x).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)  # [3, B * windows, H, w^2, K]
        bias = self.table[self.index].view(self.window**2, self.window**2, heads).permute(2, 0, 1).unsqueeze(0)
        if self.mask is not None:
            bias = (bias + self.mask.unsqueeze(1)).repeat(batch, 1, 1, 1)
        if self.fused:
            x = F.scaled_dot_product_attention(*x, attn_mask=bias)
        else:
            x = ((x[0] * width**-0.5) @ x[1].transpose(-2, -1) + bias).softmax(dim=-1) @ x[2]
        rows, columns = (self.height + self.pad[0]) // self.window, (self.width + self.pad[1]) // self.window
        x = x.unflatten(0, (batch, rows, columns)).unflatten(4, (self.window, self.window))
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * self.window, columns * self.window, heads, width)
        x = x.roll((self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, : self.height, : self.width].reshape(batch, tokens, heads, width).transpose(1, 2)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    window = window_side("auto", layer.grid)
    return MultiHead(layer, Swin(layer, window, window // 2 if config.shifted else 0, config.fused))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
