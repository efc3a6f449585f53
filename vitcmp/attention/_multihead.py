"""What all mechanisms share: the token grid, the projections around a core, and the attention map.

Axes are B N D for tokens and B H N K inside a head: batch, heads, tokens, head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.kernels.ops.softmax import scaled_scores as scaled_scores
from vitcmp.kernels.tensors import wide as wide


@dataclass(frozen=True)
class TokenGrid:
    """How the tokens lie: prefix tokens (the class token) first, then the patches row by row."""

    height: int
    width: int
    num_prefix_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in all, with the prefix."""
        return self.num_prefix_tokens + self.height * self.width

    @classmethod
    def squarest(cls, num_patches: int, num_prefix_tokens: int = 0) -> TokenGrid:
        """The grid of `num_patches` whose sides are nearest to each other."""
        height = next(h for h in range(int(num_patches**0.5), 0, -1) if num_patches % h == 0)
        return cls(height, num_patches // height, num_prefix_tokens)

    def resample(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """`x` of [..., N], a number a token of this grid, for another grid: prefix tokens kept, patches bicubic."""
        fixed, patches = x[..., : self.num_prefix_tokens], x[..., self.num_prefix_tokens :]
        images = patches.reshape(1, -1, self.height, self.width)
        images = F.interpolate(images, (grid.height, grid.width), mode="bicubic", antialias=True)
        return torch.cat([fixed, images.view(*x.shape[:-1], -1)], dim=-1)


@dataclass(frozen=True)
class LayerConfig:
    """All that a mechanism may know of its place in a model."""

    dim: int
    num_heads: int
    grid: TokenGrid
    qkv_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0
    """Dropout of attention weights."""
    index: int = 0
    """The layer's place, counted from 0."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise AttentionError(f"dim ({self.dim}) must be divisible by num_heads ({self.num_heads})")

    @property
    def head_dim(self) -> int:
        """Width of one head, K."""
        return self.dim // self.num_heads


class MultiHead(nn.Module):
    """Query, key, value and output projections around a core: [B, N, D] -> [B, N, D].

    The core maps q, k, v of [B, H, N, K] to [B, H, N, K]. `merged` keeps the three input projections in one matrix;
    both forms start from the same weights and have as many. With `shared_qk` the keys are the queries. `after` maps
    (core's output, v), both [B, H, N, K], to what the output projection reads: the place of what is no matrix times v
    (a convolution of v, a norm), so that the core keeps its map.

    Raises: AttentionError where the layer drops attention weights and the core has none.
    """

    def __init__(
        self,
        layer: LayerConfig,
        core: nn.Module,
        merged: bool = True,
        shared_qk: bool = False,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if layer.dropout and not hasattr(core, "dropout"):
            name = type(core).__name__
            raise AttentionError(f"attention_dropout ({layer.dropout}): {name} has no weights to drop; set it to 0")
        self.num_heads, self.merged, self.shared_qk = layer.num_heads, merged and not shared_qk, shared_qk
        if self.merged:
            self.qkv = nn.Linear(layer.dim, 3 * layer.dim, bias=layer.qkv_bias)
        else:
            self.q = nn.Linear(layer.dim, layer.dim, bias=layer.qkv_bias)
            if not shared_qk:
                self.k = nn.Linear(layer.dim, layer.dim, bias=layer.qkv_bias)
            self.v = nn.Linear(layer.dim, layer.dim, bias=layer.qkv_bias)
        self.core = core
        self.after = after
        self.out = nn.Linear(layer.dim, layer.dim, bias=layer.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(*self.project(x)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, [B, N, D] each."""
        if self.merged:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q, k, v
        q = self.q(x)
        return q, q if self.shared_qk else self.k(x), self.v(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the output projection reads, [B, N, D], of queries, keys and values, [B, N, D] each."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, K]
        mixed = self.core(q, k, v)  # [B, H, N, K]
        if self.after is not None:
            mixed = self.after(mixed, v)
        return mixed.transpose(1, 2).flatten(2)


def attention_map(core: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    """The matrix A with core(q, k, v) = A v, [B, H, N, N], from q and k of [B, H, N, K].

    It is read off the code that trains: the core is fed the identity's columns as values, in blocks of the head
    width (fused kernels want equal widths), the last one padded with zeros. Exact where out = A(q, k) v with one A
    for all channels; the rows need not be non-negative nor sum to 1. With attention dropout, call it in eval mode.
    """
    batch, heads, tokens, width = q.shape
    blocks = []
    for start in range(0, tokens, width):
        used = min(width, tokens - start)
        identity = q.new_zeros(tokens, width)
        identity[start : start + used, :used].fill_diagonal_(1)
        blocks.append(core(q, k, identity.expand(batch, heads, tokens, width))[..., :used])
    return torch.cat(blocks, dim=-1)
