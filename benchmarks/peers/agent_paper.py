"""A plain transcription of agent attention, without its convolution of v: Han et al., 2024, equations 4 and 6."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, TokenGrid, agent

PAPER = "https://arxiv.org/abs/2312.08874"
COST = "O(N n K)"


@dataclass(frozen=True)
class Config:
    pass


class AgentAttention(nn.Module):
    """For a grid without prefix tokens; the biases by row and column, as in the mechanism that this is held against."""

    def __init__(self, num_heads: int, grid: TokenGrid, agents: TokenGrid) -> None:
        super().__init__()
        self.grid, self.agents, n = grid, agents, agents.num_tokens
        self.collect_rows = nn.Parameter(0.02 * torch.randn(num_heads, n, grid.height, 1))
        self.collect_columns = nn.Parameter(0.02 * torch.randn(num_heads, n, 1, grid.width))
        self.read_rows = nn.Parameter(0.02 * torch.randn(num_heads, grid.height, 1, n))
        self.read_columns = nn.Parameter(0.02 * torch.randn(num_heads, 1, grid.width, n))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        image = q.transpose(-2, -1).reshape(-1, q.shape[-1], self.grid.height, self.grid.width)
        pooled = F.adaptive_avg_pool2d(image, (self.agents.height, self.agents.width))
        pooled = pooled.flatten(2).transpose(-2, -1).unflatten(0, q.shape[:2])  # [B, H, n, K]
        collect_bias = (self.collect_rows + self.collect_columns).flatten(2)
        read_bias = (self.read_rows + self.read_columns).flatten(1, 2)
        collected = (pooled * scale @ k.transpose(-2, -1) + collect_bias).softmax(dim=-1) @ v
        return (q * scale @ pooled.transpose(-2, -1) + read_bias).softmax(dim=-1) @ collected


def build(layer: LayerConfig, config: Config) -> nn.Module:
    agents = agent.agent_grid(layer, agent.Config())
    return MultiHead(layer, AgentAttention(layer.num_heads, layer.grid, agents))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
