"""Cross-covariance attention (XCiT's): channels attend to channels, by how alike they are over all tokens.

    a = out(v A),   A = softmax(tau_h k'^T q'),   block(x) = a + lpi(x + a),
    lpi(y) = conv2(norm2(GELU(conv1(norm1(y)))))

The channels of q' and k' have length 1 over the tokens; A is K x K in each head, its columns sum to 1, and tau_h is
learned, 1 at first (El-Nouby et al., 2021, section 3.2; it multiplies, as in the paper's code). Tokens meet in lpi, the
local patch interaction (section 3.3): 3 x 3 depthwise convolutions of the patches; prefix tokens get nothing from it.

Departures: in XCiT lpi is a residual branch of its own and reads the residual stream; a block here sees the stream's
norm x alone, and returns what is added to the stream, so lpi reads x + a. norm2 is a LayerNorm over channels and no
BatchNorm, which would let samples mix and make the result depend on the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError
from vitcmp.attention._convolution import GridConvolution
from vitcmp.attention._multihead import LayerConfig, TokenGrid, wide

PAPER = "https://arxiv.org/abs/2106.09681"
COST = "O(N K^2)"
EQUIVARIANT = False  # the convolutions
NO_MAP = "it mixes channels with a K x K matrix, and tokens with convolutions alone"


@dataclass(frozen=True)
class Config:
    lpi: bool = True
    """Local patch interaction: two depthwise convolutions after the attention."""


class LocalPatchInteraction(nn.Module):
    """Patches meet their neighbours, [B, N, D] -> [B, N, D]; prefix tokens get 0."""

    def __init__(self, dim: int, grid: TokenGrid) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.conv1 = GridConvolution(dim, kernel_size=3, grid=grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.conv2 = GridConvolution(dim, kernel_size=3, grid=grid)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv1(self.norm1(x).transpose(1, 2))).transpose(1, 2)
        return self.conv2(self.norm2(x).transpose(1, 2)).transpose(1, 2)


class CrossCovarianceAttention(nn.Module):
    """[B, N, D] -> [B, N, D]. Lengths and weights are computed in fp32 at least."""

    def __init__(self, layer: LayerConfig, lpi: bool) -> None:
        super().__init__()
        self.num_heads = layer.num_heads
        self.qkv = nn.Linear(layer.dim, 3 * layer.dim, bias=layer.qkv_bias)
        self.temperature = nn.Parameter(torch.ones(layer.num_heads, 1, 1))
        self.out = nn.Linear(layer.dim, layer.dim, bias=layer.out_bias)
        self.lpi = LocalPatchInteraction(layer.dim, layer.grid) if lpi else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1)  # [B, H, K, N] each
        q, k = (F.normalize(wide(y), dim=-1).to(v.dtype) for y in (q, k))
        weights = wide(q @ k.transpose(-2, -1))  # [B, H, K, K], A transposed
        with torch.autocast(x.device.type, enabled=False):
            weights = (weights * wide(self.temperature)).softmax(dim=-1)
        mixed = weights.to(v.dtype) @ v  # [B, H, K, N]
        a = self.out(mixed.flatten(1, 2).transpose(1, 2))
        return a if self.lpi is None else a + self.lpi(x + a)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    if layer.dropout:
        raise AttentionError(f"attention_dropout ({layer.dropout}): xca has no weights between tokens to drop; "
                             "set it to 0")  # fmt: skip
    return CrossCovarianceAttention(layer, config.lpi)


def macs(layer: LayerConfig, config: Config) -> int:
    convolutions = 2 * GridConvolution.macs(layer.dim, 3, layer.grid) if config.lpi else 0
    return 2 * layer.grid.num_tokens * layer.dim * layer.head_dim + convolutions
