"""Nystromformer: softmax attention from a few landmark tokens, by Nystrom's method.

    out = F Z B v + convolution(v),   Z ~ A^+
    F = softmax(q k'^T / sqrt(K)),   A = softmax(q' k'^T / sqrt(K)),   B = softmax(q' k^T / sqrt(K))

The landmarks q' and k' are means of m contiguous segments of the tokens; where m does not divide N, the first N mod m
segments are one token longer (no padding). The pseudo-inverse is found by iteration from Z = A^T / (|A|_1 |A|_inf),
with norms of each matrix alone:

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4        (Xiong et al., 2021, algorithm 1)

The iteration amplifies rounding, so all of this is in fp32 at least. Its 6 default steps leave Z short of A^+: rows of
the map may be negative, and sum to 1 only where it has converged. For m = N, more steps bring softmax attention; for
m < N they need not come nearer to it, as A^+ blows up what A nearly loses: on random tokens the 6 are far better than
30. The convolution of each head's values runs along the token sequence, after the map.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, wide
from vitcmp.attention.softmax import SoftmaxAttention
from vitcmp.kernels.ops import pseudo_inverse

PAPER = "https://arxiv.org/abs/2102.03902"
COST = "O(N m K + m^3)"
APPROXIMATES = "softmax"
EQUIVARIANT = False
MAP_NOTE = "map without the convolution"


@dataclass(frozen=True)
class Config:
    num_landmarks: int | Literal["auto"] = "auto"
    """Landmarks, m; auto: 32, but at most a quarter of the tokens."""
    pinv_iterations: int = 6
    """Steps of the iteration for the pseudo-inverse."""
    conv_kernel_size: int = 33
    """Tokens that the convolution of the values spans, odd (0: no convolution)."""


class NystromAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K], N at least the number of landmarks."""

    def __init__(self, num_landmarks: int, pinv_iterations: int) -> None:
        super().__init__()
        self.num_landmarks, self.pinv_iterations = num_landmarks, pinv_iterations
        self.softmax = SoftmaxAttention("auto", dropout=0.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q, k = wide(q), wide(k)
            q_landmarks, k_landmarks = (segment_means(x, self.num_landmarks) for x in (q, k))  # [B, H, m, K]
            a = (q_landmarks * q.shape[-1] ** -0.5 @ k_landmarks.transpose(-2, -1)).softmax(dim=-1)  # [B, H, m, m]
            z = pseudo_inverse(a, self.pinv_iterations)
            # From the right: no N x N, and the fewest products wherever N > K. Either end is softmax attention.
            mixed = self.softmax(q_landmarks, k, wide(v))  # B v
            return self.softmax(q, k_landmarks, z @ mixed).to(v.dtype)


def segment_means(x: Tensor, num_segments: int) -> Tensor:
    """[..., N, K] -> [..., num_segments, K]: means of contiguous segments, the first N mod num_segments one longer."""
    length, num_longer = divmod(x.shape[-2], num_segments)
    if num_longer == 0:
        return mean(x.unflatten(-2, (num_segments, length)))
    split = num_longer * (length + 1)
    longer = x[..., :split, :].unflatten(-2, (num_longer, length + 1))
    shorter = x[..., split:, :].unflatten(-2, (num_segments - num_longer, length))
    return torch.cat([mean(longer), mean(shorter)], dim=-2)


def mean(x: Tensor) -> Tensor:
    """[..., m, n, K] -> [..., m, K]: means over n. To divide the sum is quicker than `mean`, backward most of all."""
    return (x.sum(dim=-2, dtype=wide(x[:0]).dtype) / x.shape[-2]).to(x.dtype)


class AddSequenceConvolution(nn.Module):
    """(A v, v) -> A v + a convolution of v along the tokens, a kernel a head; all [B, H, N, K]."""

    def __init__(self, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_heads, num_heads, (kernel_size, 1), groups=num_heads, bias=False)

    def forward(self, mixed: Tensor, v: Tensor) -> Tensor:
        heads, width = v.shape[1], v.shape[-1]
        # As H K channels that lie together, as the projection left them, each head's kernel repeated: the same numbers
        # as H channels of [N, K] images, and on a CPU several times quicker.
        x = v.transpose(1, 2).flatten(2).transpose(1, 2).unsqueeze(-1)  # [B, H K, N, 1]
        kernel = self.conv.weight.repeat_interleave(width, dim=0)
        y = F.conv2d(x, kernel, padding=(kernel.shape[-2] // 2, 0), groups=heads * width)
        return mixed + y.squeeze(-1).unflatten(1, (heads, width)).transpose(-2, -1)


def num_landmarks(layer: LayerConfig, config: Config) -> int:
    """m, with `auto` resolved."""
    return max(1, min(32, layer.grid.num_tokens // 4)) if config.num_landmarks == "auto" else config.num_landmarks


def build(layer: LayerConfig, config: Config) -> nn.Module:
    landmarks, tokens, kernel = num_landmarks(layer, config), layer.grid.num_tokens, config.conv_kernel_size
    if not 1 <= landmarks <= tokens:
        raise AttentionError(f"nystromformer: num_landmarks ({landmarks}) must be from 1 to the number of tokens "
                             f"({tokens}); choose fewer, or auto")  # fmt: skip
    if config.pinv_iterations < 1:
        raise AttentionError(f"nystromformer: pinv_iterations ({config.pinv_iterations}) must be 1 or more")
    if kernel < 0 or (kernel and kernel % 2 == 0):
        raise AttentionError(f"nystromformer: conv_kernel_size ({kernel}) must be odd, or 0 for no convolution")
    if landmarks == tokens and config.num_landmarks != "auto":
        warnings.warn(f"nystromformer: {landmarks} landmarks for {tokens} tokens cost more than full attention",
                      DegenerateWarning, 2)  # fmt: skip
    core = NystromAttention(landmarks, config.pinv_iterations)
    return MultiHead(layer, core, after=AddSequenceConvolution(layer.num_heads, kernel) if kernel else None)


def macs(layer: LayerConfig, config: Config) -> int:
    m, tokens = num_landmarks(layer, config), layer.grid.num_tokens
    # F, B, B v and F (...); A and Z (...); the iteration; the convolution, its border's zeros included.
    products = (4 * tokens * m + 2 * m**2) * layer.dim
    return products + config.pinv_iterations * 4 * m**3 * layer.num_heads + config.conv_kernel_size * tokens * layer.dim
