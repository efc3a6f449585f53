"""Agent attention: a few pooled queries collect from all tokens, and all tokens read from them.

    out = softmax(q a^T / sqrt(K) + B2) softmax(a k^T / sqrt(K) + B1) v + convolution(v),   a = pool(q)

The agents a are means of the patches' queries over the cells of a small grid; prefix tokens are not pooled, but are
queries, keys and values like the others (Han et al., 2024). Cells do not overlap; the authors' adaptive pooling
overlaps them where they do not divide the grid. It is a mechanism of its own, no estimate of softmax attention.

The biases hold, for each head and agent, a part for the row of a patch, one for its column, and one for each prefix
token. The paper adds a third part, interpolated from 7 x 7 blocks, which is left out here: rows and columns are enough
to tell an agent where it looks. The depthwise convolution of the values (3 x 3 patches) stands after the map.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._convolution import AddConvolvedValues, GridConvolution
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, wide
from vitcmp.attention.spatial_reduction import region_means

PAPER = "https://arxiv.org/abs/2312.08874"
COST = "O(N n K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False
MAP_NOTE = "map without the convolution"


@dataclass(frozen=True)
class Config:
    num_agents: int | Literal["auto"] = "auto"
    """Agents, n: the nearest grid of at most so many, its cells near squares; auto: 49, at most a quarter of N."""
    bias: bool = True
    """Whether agents have biases for rows, columns and prefix tokens."""
    conv_kernel_size: int = 3
    """Side of the depthwise convolution of the values, odd (0: no convolution)."""


class AgentBias(nn.Module):
    """How much each agent favours each token."""

    def __init__(self, num_heads: int, agents: TokenGrid, grid: TokenGrid) -> None:
        super().__init__()
        self.agents, prefix = agents, grid.num_prefix_tokens
        self.rows = nn.Parameter(torch.empty(num_heads, agents.num_tokens, grid.height))
        self.columns = nn.Parameter(torch.empty(num_heads, agents.num_tokens, grid.width))
        self.prefix = nn.Parameter(torch.empty(num_heads, agents.num_tokens, prefix)) if prefix else None
        self.reset_random_state(int(torch.randint(2**62, ())))

    def reset_random_state(self, seed: int) -> None:
        """Draw the biases from `seed`: truncated normal of standard deviation 0.02, as in the authors' code."""
        generator = torch.Generator().manual_seed(seed)
        for bias in self.parameters():
            values = torch.empty(bias.shape)
            bias.data.copy_(nn.init.trunc_normal_(values, std=0.02, a=-0.04, b=0.04, generator=generator))

    def resized_state(self, old: AgentBias) -> dict[str, Tensor]:
        """The biases of `old`, interpolated to this grid's agents (bicubic), rows and columns (linear)."""
        state = {}
        for name, bias in self.named_parameters():
            values = old.get_parameter(name).detach().transpose(-2, -1)
            values = old.agents.resample(values, self.agents).transpose(-2, -1)  # [H, n, a side of the old grid]
            state[name] = F.interpolate(values, bias.shape[-1], mode="linear")
        return state

    def forward(self) -> Tensor:
        """[H, n, N]."""
        patches = (self.rows.unsqueeze(-1) + self.columns.unsqueeze(-2)).flatten(-2)
        return patches if self.prefix is None else torch.cat([self.prefix, patches], dim=-1)

    def by_token(self) -> Tensor:
        """[H, N, n], made as it lies in memory: to transpose the whole costs more than all the sums."""
        rows, columns = (bias.transpose(-2, -1).contiguous() for bias in (self.rows, self.columns))
        patches = (rows.unsqueeze(-2) + columns.unsqueeze(-3)).flatten(-3, -2)
        return patches if self.prefix is None else torch.cat([self.prefix.transpose(-2, -1), patches], dim=-2)


class AgentAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Agents, scores and weights are computed in fp32 at least."""

    def __init__(self, num_heads: int, grid: TokenGrid, agents: TokenGrid, bias: bool, dropout: float) -> None:
        super().__init__()
        self.grid, self.agents, self.dropout = grid, agents, dropout
        self.collect_bias = AgentBias(num_heads, agents, grid) if bias else None
        self.read_bias = AgentBias(num_heads, agents, grid) if bias else None

    def _weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            scores = scores.add_(bias) if scores.dtype == bias.dtype else scores + bias
        return F.dropout(scores.softmax(dim=-1), self.dropout, self.training)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q, k = wide(q), wide(k)
            agents = region_means(q[..., self.grid.num_prefix_tokens :, :], self.grid, self.agents)  # [B, H, n, K]
            agents = agents * q.shape[-1] ** -0.5
            collect_bias = None if self.collect_bias is None else self.collect_bias()
            collected = self._weights(agents @ k.transpose(-2, -1), collect_bias).to(v.dtype) @ v  # [B, H, n, K]
            read_bias = None if self.read_bias is None else self.read_bias.by_token()
            return self._weights(q @ agents.transpose(-2, -1), read_bias).to(v.dtype) @ collected


def agent_grid(layer: LayerConfig, config: Config) -> TokenGrid:
    """The grid of agents, with `auto` resolved: at most `num_agents`, in proportion to the grid of patches."""
    grid = layer.grid
    most = max(1, min(49, grid.num_tokens // 4, grid.height * grid.width))
    limit = most if config.num_agents == "auto" else config.num_agents
    if not 1 <= limit <= grid.height * grid.width:
        raise AttentionError(f"agent: num_agents ({limit}) must be from 1 to the number of patches "
                             f"({grid.height * grid.width}); choose fewer, or auto")  # fmt: skip
    height = min(limit, grid.height, max(1, round((limit * grid.height / grid.width) ** 0.5)))
    return TokenGrid(height, min(grid.width, limit // height))


def build(layer: LayerConfig, config: Config) -> nn.Module:
    agents, patches, kernel = agent_grid(layer, config), layer.grid.height * layer.grid.width, config.conv_kernel_size
    if kernel < 0 or (kernel and kernel % 2 == 0):
        raise AttentionError(f"agent: conv_kernel_size ({kernel}) must be odd, or 0 for no convolution")
    if agents.num_tokens == patches and config.num_agents != "auto":
        warnings.warn(
            f"agent: {patches} agents for {patches} patches cost more than full attention", DegenerateWarning, 2
        )
    core = AgentAttention(layer.num_heads, layer.grid, agents, config.bias, layer.dropout)
    after = AddConvolvedValues(layer.num_heads, layer.head_dim, kernel, layer.grid, shared=False) if kernel else None
    return MultiHead(layer, core, after=after)


def macs(layer: LayerConfig, config: Config) -> int:
    attention = 4 * layer.grid.num_tokens * layer.dim * agent_grid(layer, config).num_tokens
    return attention + GridConvolution.macs(layer.dim, config.conv_kernel_size, layer.grid)
