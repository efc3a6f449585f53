"""LinformerSelfAttention of the package linformer, its linear layers taken away."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, linformer

PAPER = "https://arxiv.org/abs/2006.04768"
COST = "O(N k K)"


@dataclass(frozen=True)
class Config:
    pass


class Given(nn.Module):
    """In place of a linear layer: hands over what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        return self.value


class LinformerSelfAttention(nn.Module):
    """Each head is an image of one head to the package, so that splitting and merging heads costs it no copies."""

    def __init__(self, head_dim: int, num_tokens: int, proj_dim: int) -> None:
        super().__init__()
        from linformer import LinformerSelfAttention as Package

        # Its `share_kv` would make the values equal the keys, too. Two projections take as long as one used twice.
        self.attention = Package(head_dim, num_tokens, proj_dim, heads=1)
        self.attention.to_q, self.attention.to_k, self.attention.to_v = Given(), Given(), Given()
        self.attention.to_out = nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        linear_layers = self.attention.to_q, self.attention.to_k, self.attention.to_v
        for layer, x in zip(linear_layers, (q, k, v), strict=True):
            layer.value = x.flatten(0, 1)
        y = self.attention(q.flatten(0, 1))
        for layer in linear_layers:
            layer.value = None
        return y.view_as(q)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    length = linformer.proj_dim(layer, linformer.Config())
    return MultiHead(layer, LinformerSelfAttention(layer.head_dim, layer.grid.num_tokens, length))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
