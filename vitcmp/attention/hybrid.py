"""Hybrid attention: dilated windows and linear attention side by side, shared out by a gate.

    A = sum_b diag(g_b) A_b,   g_b(i) = softmax_b(q_i . w_b)

The branches are regional attention at each of the dilations (`dilated`, here with all heads at every dilation) and
linear attention over all tokens (`linear`). The gate reads the query, so the whole has a map; its vectors w_b, one a
head and branch, start at 0: equal shares. Prefix tokens attend to all tokens by softmax, without a gate.

This mix is this project's own, in the spirit of ACC-ViT (Ibtehaz et al., 2024), whose atrous attention gates windows
at several dilations; ACC-ViT has no linear branch, keeps one phase at each dilation, and gates by the block's input.
The options switch the parts off, so that the whole can be compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, wide
from vitcmp.attention._windows import (
    WindowedPatches,
    check_window,
    num_scores,
    prefix_scores,
    window_side,
    with_prefix,
)
from vitcmp.attention.dilated import fitting, phases, warn_of_dropped
from vitcmp.attention.linear import LinearAttention

PAPER = "https://arxiv.org/abs/2406.08859"
COST = "O(N (w^2 + K) K)"
ROW_STOCHASTIC = True
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    dilations: tuple[int, ...] = (1, 2, 4)
    """Steps between the patches of a window, a branch each; those too wide for the grid are left out."""
    window_size: int | Literal["auto"] = "auto"
    """Side of a window, in patches of its phase; auto: 7, but at most a quarter of the tokens in it."""
    local: bool = True
    """Whether there are branches with windows."""
    linear: bool = True
    """Whether there is a branch with linear attention over all tokens."""
    gate: bool = True
    """Whether each query weighs the branches; without, they have equal shares."""


class HybridAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. `dilations` may be empty."""

    def __init__(
        self, layer: LayerConfig, dilations: tuple[int, ...], window: int, linear: bool, gate: bool, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.grid, self.dropout = layer.grid, layer.dropout
        self.branches = (*dilations, *(["linear"] if linear else []))
        self.windows = nn.ModuleList(
            WindowedPatches(layer.grid, *phases(layer.grid, d, window), layer.dropout) for d in dilations
        )
        self.linear = LinearAttention(eps) if linear else None
        shape = layer.num_heads, len(self.branches), layer.head_dim
        self.gate = nn.Parameter(torch.zeros(shape)) if gate and len(self.branches) > 1 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = q[:, :, self.grid.num_prefix_tokens :]
        answers = [branch(q, k, v) for branch in self.windows]
        if self.linear is not None:
            answers.append(self.linear(q, k, v)[:, :, self.grid.num_prefix_tokens :])
        shares = self.shares(queries)
        mixed = shares[0] * answers[0]
        for share, answer in zip(shares[1:], answers[1:], strict=True):
            mixed = torch.addcmul(mixed, share, answer)
        return with_prefix(mixed, q, k, v, self.dropout if self.training else 0.0)

    def shares(self, queries: Tensor) -> Sequence[Tensor]:
        """The weight of each branch, [B, H, P, 1]; without a gate of no dimensions."""
        if self.gate is None:
            return [queries.new_tensor(1 / len(self.branches))] * len(self.branches)
        with torch.autocast(queries.device.type, enabled=False):
            logits = wide(queries) @ wide(self.gate).transpose(-2, -1)  # [B, H, P, branches]
            return logits.softmax(dim=-1).split(1, dim=-1)

    def resized_state(self, old: HybridAttention) -> dict[str, Tensor]:
        """The gate of each branch that the old grid had too; a new branch starts with logits of 0."""
        if self.gate is None:
            return {}
        gate = torch.zeros_like(self.gate)
        if old.gate is not None:
            for place, name in enumerate(self.branches):
                if name in old.branches:
                    gate[:, place] = old.gate[:, old.branches.index(name)]
        return {"gate": gate}


def branch_dilations(grid: TokenGrid, config: Config) -> tuple[int, ...]:
    """The dilations of the branches with windows."""
    return fitting("hybrid", config.dilations, grid) if config.local else ()


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if not (config.local or config.linear):
        raise AttentionError("hybrid: local=false and linear=false leave no branch; keep one of them")
    if layer.dropout and not config.local:
        raise AttentionError(f"attention_dropout ({layer.dropout}): hybrid:local=false has no weights to drop; "
                             "set it to 0")  # fmt: skip
    dilations = branch_dilations(layer.grid, config)
    if config.local:
        check_window("hybrid", config.window_size, layer.grid)
        warn_of_dropped("hybrid", config.dilations, dilations, layer)
    window = window_side(config.window_size, layer.grid)
    return MultiHead(layer, HybridAttention(layer, dilations, window, config.linear, config.gate))


def macs(layer: LayerConfig, config: Config) -> int:
    grid, window = layer.grid, window_side(config.window_size, layer.grid)
    patches, dilations = grid.height * grid.width, branch_dilations(grid, config)
    scores = prefix_scores(grid) + sum(num_scores(grid, *phases(grid, d, window)) for d in dilations)
    linear = 2 * grid.num_tokens * layer.head_dim if config.linear else 0
    branches = len(dilations) + config.linear
    gate = patches * branches if config.gate and branches > 1 else 0
    return layer.dim * (2 * scores + linear + gate)
