"""NystromformerSelfAttention of the package transformers, without its linear layers and its convolution of v."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, nystromformer

PAPER = "https://arxiv.org/abs/2102.03902"
COST = "O(N m K + m^3)"


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


class NystromformerSelfAttention(nn.Module):
    """Each head is an image of one head to the package, so that splitting and merging heads costs it no copies."""

    def __init__(self, head_dim: int, num_tokens: int, num_landmarks: int) -> None:
        super().__init__()
        from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention as Package

        # The module allows for no convolution; the package's own class of settings does not.
        settings = SimpleNamespace(
            hidden_size=head_dim, num_attention_heads=1, num_landmarks=num_landmarks, segment_means_seq_len=num_tokens,
            conv_kernel_size=None, inv_coeff_init_option=False, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.attention = Package(settings)
        self.attention.query, self.attention.key, self.attention.value = Given(), Given(), Given()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        linear_layers = self.attention.query, self.attention.key, self.attention.value
        for layer, x in zip(linear_layers, (q, k, v), strict=True):
            layer.value = x.flatten(0, 1)
        (y,) = self.attention(q.flatten(0, 1))
        for layer in linear_layers:
            layer.value = None
        return y.view_as(q)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    landmarks, tokens = nystromformer.num_landmarks(layer, nystromformer.Config()), layer.grid.num_tokens
    return MultiHead(layer, NystromformerSelfAttention(layer.head_dim, tokens, landmarks))


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
