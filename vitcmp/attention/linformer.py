"""Linformer: keys and values projected from N tokens to k, with learned weights.

    out = softmax(q (E k)^T / sqrt(K)) F v,   E and F of [proj_dim, N]      (Wang et al., 2020, equation 7)

The map is softmax(q (E k)^T / sqrt(K)) F: its rows need not be positive nor sum to 1. The paper argues that softmax
attention is of low rank and so can be met; that takes training, and the error of an untrained projection against
softmax is the error of random numbers.

All heads share one matrix by default, for keys and values alike: the paper finds that sharing costs no accuracy, and
it leaves a model nearly as many parameters as its rivals. Sharing over layers, the paper's furthest form, is left
out: blocks would depend on each other. The initial entries are those of the paper's proof, N(0, 1/proj_dim).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, wide
from vitcmp.attention.softmax import SoftmaxAttention

PAPER = "https://arxiv.org/abs/2006.04768"
COST = "O(N k K)"
APPROXIMATES = "softmax"
EQUIVARIANT = False


@dataclass(frozen=True)
class Config:
    proj_dim: int | Literal["auto"] = "auto"
    """Projected length, k; auto: 64, but at most a quarter of the tokens."""
    sharing: Literal["none", "heads", "key-value"] = "key-value"
    """none: each head has its own E and F; heads: all share E and F; key-value: all share one matrix, E = F."""


class LinformerAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Fewer tokens than the grid has use the first columns.

    Computed in fp32 at least: a projected key sums all tokens, and its rounding to half precision would move scores.

    Raises: AttentionError for more tokens than the grid has.
    """

    def __init__(self, num_heads: int, grid: TokenGrid, proj_dim: int, sharing: str, dropout: float) -> None:
        super().__init__()
        self.grid, self.dropout = grid, dropout
        self.softmax = SoftmaxAttention("auto", dropout)
        shape = (num_heads if sharing == "none" else 1, proj_dim, grid.num_tokens)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = None if sharing == "key-value" else nn.Parameter(torch.empty(shape))
        self.reset_random_state(int(torch.randint(2**62, ())))

    def reset_random_state(self, seed: int) -> None:
        """Draw the projections from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        for matrix in self.parameters():
            matrix.data.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-2] ** -0.5)

    def resized_state(self, old: LinformerAttention) -> dict[str, Tensor]:
        """The projections of `old` for this grid: columns interpolated, rows repeated where there are more of them.

        Columns of patches keep about their sum, so that the projected keys keep their size. With every row twice
        the attention is the same, as the softmax then gives each copy half the weight.
        """
        patches, prefix = self.grid.height * self.grid.width, self.grid.num_prefix_tokens
        rows = self.key_projection.shape[-2]
        state = {}
        for name, matrix in old.named_parameters():
            columns = old.grid.resample(matrix.detach(), self.grid)
            columns[..., prefix:] *= old.grid.height * old.grid.width / patches
            kept = torch.arange(rows, device=matrix.device) * matrix.shape[-2] // rows
            state[name] = columns[:, kept]
        return state

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[-2]
        if tokens > self.grid.num_tokens:
            raise AttentionError(f"linformer: {tokens} tokens, but its projections were built for "
                                 f"{self.grid.num_tokens}; build it for the larger grid")  # fmt: skip
        e = self.key_projection
        f = e if self.value_projection is None else self.value_projection
        with torch.autocast(q.device.type, enabled=False):
            keys, values = (wide(matrix[..., :tokens]) @ wide(x) for matrix, x in ((e, k), (f, v)))
            return self.softmax(wide(q), keys, values).to(v.dtype)


def proj_dim(layer: LayerConfig, config: Config) -> int:
    """k, with `auto` resolved."""
    return max(1, min(64, layer.grid.num_tokens // 4)) if config.proj_dim == "auto" else config.proj_dim


def build(layer: LayerConfig, config: Config) -> nn.Module:
    length, tokens = proj_dim(layer, config), layer.grid.num_tokens
    if not 1 <= length <= tokens:
        raise AttentionError(f"linformer: proj_dim ({length}) must be from 1 to the number of tokens ({tokens}); "
                             "choose a smaller one, or auto")  # fmt: skip
    if length == tokens and config.proj_dim != "auto":
        warnings.warn(f"linformer: proj_dim {length} of {tokens} tokens compresses nothing", DegenerateWarning, 2)
    core = LinformerAttention(layer.num_heads, layer.grid, length, config.sharing, layer.dropout)
    return MultiHead(layer, core)


def macs(layer: LayerConfig, config: Config) -> int:
    # Two projections, scores, weighted sum.
    return 4 * layer.grid.num_tokens * layer.dim * proj_dim(layer, config)
