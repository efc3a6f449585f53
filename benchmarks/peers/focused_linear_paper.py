"""A plain transcription of focused linear attention, without its convolution of v: Han et al., 2023, equation 8."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead

PAPER = "https://arxiv.org/abs/2308.00442"
COST = "O(N K^2)"


@dataclass(frozen=True)
class Config:
    focusing_factor: float = 3


class FocusedLinearAttention(nn.Module):
    def __init__(self, focusing_factor: float) -> None:
        super().__init__()
        self.focusing_factor = focusing_factor

    def focused(self, x: Tensor) -> Tensor:
        x = x.relu() + 1e-6
        power = x**self.focusing_factor
        return power / power.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.focused(q), self.focused(k)
        normaliser = q @ k.sum(dim=-2).unsqueeze(-1)
        return q @ (k.transpose(-2, -1) @ v) / normaliser


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, FocusedLinearAttention(config.focusing_factor))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
