"""Attention of each query to its own few keys on the CPU, pair by pair: nothing is copied, padded or masked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from vitcmp.attention import AttentionError
from vitcmp.attention._kernels.operators import operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.attention._multihead import wide

MIN_RESULTS = 2**13
"""Numbers in a result below which a second thread costs more than it brings."""


class Pairs(nn.Module):
    """(q of [B, H, P, K], k and v of [B, H, N, K]) -> the answers, [B, H, P, K], in fp32 at least.

    `keys`, [P, J], are the tokens that each query attends to, the same for all heads.

    Raises: AttentionError for any other number of tokens.
    """

    def __init__(self, keys: Tensor, num_tokens: int) -> None:
        super().__init__()
        # The pairs once more, sorted by key: query, place among its keys, and where the pairs of each key begin.
        order = keys.flatten().argsort(stable=True)
        ends = F.pad(keys.flatten().bincount(minlength=num_tokens).cumsum(0), (1, 0))
        links = {"keys": keys, "query": order // keys.shape[1], "place": order % keys.shape[1], "ends": ends}
        for name, link in links.items():
            self.register_buffer(name, link.int().contiguous(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        batch_and_heads, links = q.shape[:2], list(self.buffers())
        found, wanted = (q.shape[2], k.shape[2]), (len(links[0]), len(links[3]) - 1)
        if found != wanted:
            raise AttentionError(
                f"{found[0]} queries of {found[1]} tokens where {wanted[0]} of {wanted[1]} were expected"
            )
        q, k, v = (wide(x).flatten(0, 1).contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))
        weights = product("scores", q, k, links).softmax(dim=-1)  # [B H, P, J]
        return product("mixed", F.dropout(weights, dropout), v, links).unflatten(0, batch_and_heads)


@operator("vitcmp::listed_attention")
def product(kind: str, x: Tensor, y: Tensor, links: list[Tensor]) -> Tensor:
    """One of three products over all pairs; the derivatives of each are the other two.

    scores: queries [G, P, K], keys [G, N, K] -> [G, P, J]; mixed: weights [G, P, J], values [G, N, K] -> [G, P, K];
    spread: weights [G, P, J], what the queries hand back to their keys [G, P, K] -> [G, N, K].
    """
    from vitcmp.attention._kernels import neighbours as cpu

    out = _result(kind, x, y, links)
    kernel = {"scores": cpu.scores, "mixed": cpu.mixed, "spread": cpu.spread}[kind]
    used = links[1:] if kind == "spread" else links[:1]
    arrays = [t.detach().contiguous().numpy() for t in (x, y, *used, out)]
    # Each part fills rows of its own, so the result does not depend on the number of threads.
    threads = torch.get_num_threads() if out.numel() >= MIN_RESULTS else 1
    share_out(kernel, len(out) * out.shape[1], threads, *arrays)
    return out


@product.register_fake
def _result(kind: str, x: Tensor, y: Tensor, links: list[Tensor]) -> Tensor:
    rows = len(links[3]) - 1 if kind == "spread" else x.shape[1]
    return y.new_empty(len(x), rows, links[0].shape[1] if kind == "scores" else y.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.kind, x, y, links = inputs
    ctx.save_for_backward(x, y, *links)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, Tensor, list[None]]:
    x, y, *links = ctx.saved_tensors
    if ctx.kind == "scores":
        dx, dy = product("mixed", upstream, y, links), product("spread", upstream, x, links)
    elif ctx.kind == "mixed":
        dx, dy = product("scores", upstream, y, links), product("spread", x, upstream, links)
    else:
        dx, dy = product("scores", y, upstream, links), product("mixed", x, upstream, links)
    return None, dx, dy, [None] * len(links)


product.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.vitcmp.listed_attention)
def _flops(kind: str, x: Any, y: Any, links: Any, *args: Any, **kwargs: Any) -> int:
    queries, keys = links[0]
    return 2 * x[0] * queries * keys * y[2]
