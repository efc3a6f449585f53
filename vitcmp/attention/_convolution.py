"""Depthwise convolution on the token grid, which linear mechanisms add to restore what their low rank loses."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from vitcmp.attention._multihead import TokenGrid


class GridConvolution(nn.Module):
    """A depthwise k x k convolution of the patches: [B, C, N] -> [B, C, N]; prefix tokens get 0.

    `kernel_size` is odd.
    """

    def __init__(self, channels: int, kernel_size: int, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        prefix = self.grid.num_prefix_tokens
        image = x[..., prefix:].unflatten(-1, (self.grid.height, self.grid.width))
        return pad(self.conv(image).flatten(-2), (prefix, 0))

    @staticmethod
    def macs(channels: int, kernel_size: int, grid: TokenGrid) -> int:
        """Multiply-adds for one image, the border's zeros included."""
        return channels * kernel_size**2 * grid.height * grid.width


class AddConvolvedValues(nn.Module):
    """(A v, v) -> A v + convolution(v), all [B, H, N, K]; `shared`: one kernel for all heads."""

    def __init__(self, num_heads: int, head_dim: int, kernel_size: int, grid: TokenGrid, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.convolution = GridConvolution(head_dim if shared else num_heads * head_dim, kernel_size, grid)

    def forward(self, mixed: Tensor, v: Tensor) -> Tensor:
        channels_first = v.transpose(-2, -1)  # [B, H, K, N]
        x = channels_first.flatten(0, 1) if self.shared else channels_first.flatten(1, 2)
        return mixed + self.convolution(x).reshape(channels_first.shape).transpose(-2, -1)
