"""LSHSelfAttention of Hugging Face's Reformer, with our rounds and chunks; its projections hand on what they get."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, reformer

PAPER = "https://arxiv.org/abs/2001.04451"
COST = "O(r N m K + N log N)"
NUM_PROJECTIONS = 3


@dataclass(frozen=True)
class Config: ...


class Given(nn.Module):
    """A projection that returns the tensor it was given, [B, N, D]."""

    given: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.given


class Package(nn.Module):
    def __init__(self, layer: LayerConfig) -> None:
        super().__init__()
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        num_hashes, num_buckets, bucket_size = reformer.sizes(layer, reformer.Config())
        self.attention = LSHSelfAttention(
            ReformerConfig(
                attention_head_size=layer.head_dim,
                num_attention_heads=layer.num_heads,
                hidden_size=layer.dim,
                lsh_attn_chunk_length=bucket_size,
                num_hashes=num_hashes,
                num_buckets=num_buckets,
                max_position_embeddings=layer.grid.num_tokens,
                lsh_attention_probs_dropout_prob=0.0,
                is_decoder=False,
            )
        )
        self.attention.query_key, self.attention.value = Given(), Given()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        merged = [x.transpose(1, 2).flatten(2) for x in (q, v)]
        self.attention.query_key.given, self.attention.value.given = merged
        out = self.attention(merged[0]).hidden_states
        self.attention.query_key.given = self.attention.value.given = None
        return out.unflatten(2, (v.shape[1], -1)).transpose(1, 2)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return MultiHead(layer, Package(layer), shared_qk=True)


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
