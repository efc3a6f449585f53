"""NystromAttention of the package nystrom-attention, without its linear layers and its convolution of v."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, nystromformer

PAPER = "https://arxiv.org/abs/2102.03902"
COST = "O(N m K + m^3)"


@dataclass(frozen=True)
class Config:
    pass


class Given(nn.Module):
    """In place of the projection, whose result the package cuts in three: hands over what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Given:
        return self

    def chunk(self, parts: int, dim: int) -> tuple[Tensor, ...]:
        return self.value


class NystromAttention(nn.Module):
    """Each head is an image of one head to the package, so that splitting and merging heads costs it no copies."""

    def __init__(self, head_dim: int, num_landmarks: int) -> None:
        super().__init__()
        from nystrom_attention import NystromAttention as Package

        self.attention = Package(head_dim, head_dim, heads=1, num_landmarks=num_landmarks, residual=False)
        self.attention.to_qkv, self.attention.to_out = Given(), nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.attention.to_qkv.value = tuple(x.flatten(0, 1) for x in (q, k, v))
        y = self.attention(q.flatten(0, 1))
        self.attention.to_qkv.value = ()
        return y.view_as(q)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    landmarks = nystromformer.num_landmarks(layer, nystromformer.Config())
    return MultiHead(layer, NystromAttention(layer.head_dim, landmarks))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
