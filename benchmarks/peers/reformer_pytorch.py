"""LSHAttention of the package `reformer-pytorch`, with our rounds and chunks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitcmp.attention import LayerConfig, MultiHead, reformer

PAPER = "https://arxiv.org/abs/2001.04451"
COST = "O(r N m K + N log N)"
NUM_PROJECTIONS = 3


@dataclass(frozen=True)
class Config:
    exact: bool = False
    """Pairs of other buckets masked and repeated pairs discounted, as the paper has it and we compute; the package's
    defaults do neither."""


class Package(nn.Module):
    def __init__(self, num_hashes: int, bucket_size: int, exact: bool) -> None:
        super().__init__()
        from reformer_pytorch import LSHAttention

        self.attention = LSHAttention(
            bucket_size=bucket_size,
            n_hashes=num_hashes,
            attend_across_buckets=not exact,
            allow_duplicate_attention=not exact,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q.flatten(0, 1), v.flatten(0, 1))[0].view(v.shape)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    num_hashes, _, bucket_size = reformer.sizes(layer, reformer.Config())
    return MultiHead(layer, Package(num_hashes, bucket_size, config.exact), shared_qk=True)


def macs(layer: LayerConfig, config: Config) -> int:
    return 0
