"""FastAttention of the package performer-pytorch, not causal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, performer

PAPER = "https://arxiv.org/abs/2009.14794"
COST = "O(N m K)"


@dataclass(frozen=True)
class Config:
    relu: bool = False
    """Its generalised attention, in place of its estimate of softmax."""


class FastAttention(nn.Module):
    def __init__(self, head_dim: int, num_features: int, relu: bool) -> None:
        super().__init__()
        import performer_pytorch

        self.attention = performer_pytorch.FastAttention(head_dim, num_features, generalized_attention=relu)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    features = performer.num_features(layer, performer.Config())
    return MultiHead(layer, FastAttention(layer.head_dim, features, config.relu))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
