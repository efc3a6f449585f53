"""Reformer (LSH attention): queries double as keys, and a token attends to those that hash into its bucket.

    out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),   s_ij = q_i . q_j / (|q_j| sqrt(K)),   s_ii = -1e5,

over the tokens j that i sees. It sees j if in one round at least both have one hash, h(x) = argmax([x R; -x R]), and j
lies in i's chunk, or the chunk before, of the tokens sorted by hash; the last chunk comes before the first (Kitaev,
Kaiser and Levskaya, 2020, section 2 and appendix A). A token that sees no other attends to itself. One bucket needs no
hash and is one chunk: dense shared-QK attention, which the mechanism approximates.

Departures: a pair seen in several rounds counts in the first of them; the paper counts it in each, divided by their
number, which comes to the same. The rotations R are drawn once from the seed, not anew at each step, so that evaluation
repeats. If tokens do not fill the last chunk, empty slots do, which no token sees. Sorting costs no multiply-adds.
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

PAPER = "https://arxiv.org/abs/2001.04451"
COST = "O(r N m K + N log N)"
APPROXIMATES = "shared-qk"
ROW_STOCHASTIC = True
EQUIVARIANT = False  # where a bucket is cut into chunks depends on the order of its tokens
NUM_PROJECTIONS = 3

SELF = -1e5
"""A token's score with itself: finite, as it may see no other."""


@dataclass(frozen=True)
class Config:
    num_hashes: int = 4
    """Rounds of hashing, r: the more, the fewer close pairs are missed."""
    bucket_size: int | Literal["auto"] = "auto"
    """Tokens in a chunk, and in a bucket on average, m. auto: 64, or fewer, so that all the r x 2 m slots that a token
    looks at are at most half of N; where not even 1 would do, one bucket."""


class LSHAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. k stands for the queries again and is not read.

    Hashes, weights and the sum over rounds are computed in fp32 at least.
    """

    rotations: Tensor

    def __init__(self, head_dim: int, num_hashes: int, num_buckets: int, bucket_size: int, dropout: float) -> None:
        super().__init__()
        self.num_buckets, self.bucket_size, self.dropout = num_buckets, bucket_size, dropout
        self.register_buffer("rotations", torch.empty(num_hashes, head_dim, num_buckets // 2))
        self.reset_random_state(int(torch.randint(2**62, ())))

    def reset_random_state(self, seed: int) -> None:
        """Draw the rotations from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        self.rotations.copy_(torch.randn(self.rotations.shape, generator=generator))

    def resized_state(self, old: LSHAttention) -> dict[str, Tensor]:
        """Nothing is learned here: another number of buckets takes the rotations it was built with."""
        return {"rotations": old.rotations if old.rotations.shape == self.rotations.shape else self.rotations}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[-1]
        buckets = self._hash(q)  # [B, H, R, N]
        order = buckets.argsort(dim=-1, stable=True)  # the token in each slot
        tokens = torch.arange(order.shape[-1], device=q.device).expand_as(order)
        slots = torch.empty_like(order).scatter_(-1, order, tokens)  # the slot of each token

        # An empty slot takes any row.
        chunks = self._chunks(order, 0)
        keys = F.normalize(wide(q), dim=-1).to(q.dtype)
        queries = take(q * width**-0.5, chunks)  # [B, H, R, C, m, K]
        seen = window(chunks, chunks)
        keys, values = take(keys, seen), take(v, seen)

        scores = wide(queries @ keys.transpose(-2, -1))  # [B, H, R, C, m, 2m]
        hidden = self._hidden(buckets, order, slots)
        with torch.autocast(q.device.type, enabled=False):
            itself = scores[..., -self.bucket_size :].diagonal(dim1=-2, dim2=-1)
            own = 0 * itself.detach() + SELF  # NaN stays NaN, or a token that sees only itself would hide it
            scores.masked_fill_(hidden, -torch.inf)
            # A token meets itself in every round, in its own slot, so no row is all -inf. As low as the score is, it
            # counts only for a token that sees no other.
            itself.copy_(own)
            highest = scores.detach().amax(dim=-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            weights = F.dropout(weights, self.dropout, self.training)
        mixed = weights.to(v.dtype) @ values  # [B, H, R, C, m, K]

        # Back in the order of the tokens, the rounds come to one scale and are summed.
        first = torch.arange(order.shape[2], device=q.device).unsqueeze(-1) * highest.shape[3:].numel()
        mixed, total, highest = (take(x.flatten(2, 4), first + slots) for x in (mixed, total, highest))
        scale = (highest - highest.amax(dim=2, keepdim=True)).exp()  # [B, H, R, N, 1]
        return ((scale * mixed).sum(dim=2) / (scale * total).sum(dim=2)).to(v.dtype)

    def _hash(self, q: Tensor) -> Tensor:
        """The bucket of each token in each round, [B, H, R, N]."""
        if self.num_buckets == 1:
            return q.new_zeros(q.shape[:-1], dtype=torch.int64).unsqueeze(2)
        with torch.autocast(q.device.type, enabled=False):
            q = wide(q.detach())
            rotated = torch.einsum("bhnk,rkc->bhrnc", q, self.rotations.to(q.dtype))
        return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)

    def _hidden(self, buckets: Tensor, order: Tensor, slots: Tensor) -> Tensor:
        """Which pairs are not seen, or were in an earlier round: [B, H, R, C, m, 2m]."""
        num_rounds, num_chunks = buckets.shape[2], -(-buckets.shape[3] // self.bucket_size)
        chunk = slots // self.bucket_size
        # A key is seen by the queries of its bucket in its own chunk and in the next.
        kind = torch.int16 if self.num_buckets * num_chunks < 2**15 else torch.int32
        own = (buckets * num_chunks + chunk).to(kind)
        following = (buckets * num_chunks + (chunk + 1) % num_chunks).to(kind)

        def places(back: int) -> tuple[Tensor, Tensor, Tensor]:
            """Of the queries, and the two of the keys, `back` rounds before each, for rounds that have one there."""
            x, y = (
                self._chunks(place[:, :, : num_rounds - back].gather(-1, order[:, :, back:]), -1)
                for place in (own, following)
            )
            return x.unsqueeze(-1), x, y

        queries, x, y = places(back=0)
        hidden = queries != window(y, x).unsqueeze(-2)  # it is known which key is in which chunk
        for back in range(1, num_rounds):
            queries, x, y = places(back)
            hidden[:, :, back:] |= queries == window(x, x).unsqueeze(-2)
            hidden[:, :, back:] |= queries == window(y, y).unsqueeze(-2)
        return hidden

    def _chunks(self, x: Tensor, empty: int) -> Tensor:
        """Slots in chunks, [B, H, R, N] -> [B, H, R, C, m]; `empty` in those at the end that have no token."""
        return F.pad(x, (0, -x.shape[-1] % self.bucket_size), value=empty).unflatten(-1, (-1, self.bucket_size))


def window(before: Tensor, itself: Tensor) -> Tensor:
    """What each chunk looks at, the chunk before it and itself: [B, H, R, C, m] each -> [B, H, R, C, 2m]."""
    return torch.cat([before.roll(1, dims=3), itself], dim=4) if itself.shape[3] > 1 else itself


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, S, C] at index [B, H, ...]: [B, H, ..., C]."""
    batch, heads, rows, width = x.shape
    # Whole rows of a matrix: `gather` reads and adds entry by entry, ten times slower on a CPU.
    first = torch.arange(batch * heads, device=x.device).mul(rows).view(batch, heads, *[1] * (index.dim() - 2))
    return x.reshape(-1, width).index_select(0, (first + index).flatten()).view(*index.shape, width)


def sizes(layer: LayerConfig, config: Config) -> tuple[int, int, int]:
    """Rounds, buckets (an even number, or one) and the size of a chunk, with `auto` resolved."""
    tokens = layer.grid.num_tokens
    most = min(64, max(2, tokens // 2) // (2 * config.num_hashes)) or tokens
    size = most if config.bucket_size == "auto" else config.bucket_size
    chunks = -(-tokens // size)
    # With one bucket all rounds would be alike.
    return (config.num_hashes, chunks + chunks % 2, size) if chunks > 1 else (1, 1, tokens)


def build(layer: LayerConfig, config: Config) -> nn.Module:
    tokens, hashes, size = layer.grid.num_tokens, config.num_hashes, config.bucket_size
    if hashes < 1:
        raise AttentionError(f"reformer: num_hashes ({hashes}) must be 1 or more")
    if size != "auto" and not 1 <= size <= tokens:
        raise AttentionError(f"reformer: bucket_size ({size}) must be between 1 and the {tokens} tokens, or auto")
    if size != "auto" and 2 * hashes * size >= tokens:
        warnings.warn(
            f"reformer: {hashes} rounds x {2 * size} slots = {2 * hashes * size} for {tokens} tokens cost more than "
            "full attention",
            DegenerateWarning,
            2,
        )
    return MultiHead(layer, LSHAttention(layer.head_dim, *sizes(layer, config), layer.dropout), shared_qk=True)


def macs(layer: LayerConfig, config: Config) -> int:
    hashes, buckets, size = sizes(layer, config)
    if buckets == 1:
        return 2 * layer.grid.num_tokens**2 * layer.dim
    slots = -(-layer.grid.num_tokens // size) * size
    hashing = layer.grid.num_tokens * layer.dim * hashes * (buckets // 2)
    return hashing + 2 * hashes * slots * 2 * size * layer.dim
