"""Attention of each query to its own few keys on the CPU, pair by pair: nothing is copied, padded or masked.

Three products, of queries and keys, of weights and values, and of weights and what the queries hand back to the keys.
Each one's derivatives are the other two, so they can be differentiated any number of times.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp.attention._multihead import wide

MIN_RESULTS = 2**13
"""Numbers in a result below which a second thread costs more than it brings."""


def links(keys: Tensor, tokens: int) -> list[Tensor]:
    """What the products need to know of `keys`, [P, J]: the tokens that each query attends to, and these pairs by key.

    These are keys [P, J]; queries and places [P J], the pairs sorted by their key; ends [N + 1], where those of a key
    begin.
    """
    order = keys.flatten().argsort(stable=True)
    ends = F.pad(keys.flatten().bincount(minlength=tokens).cumsum(0), (1, 0))
    return [x.int().contiguous() for x in (keys, order // keys.shape[1], order % keys.shape[1], ends)]


def attend(q: Tensor, k: Tensor, v: Tensor, links: list[Tensor], dropout: float) -> Tensor:
    """(q of [B, H, P, K], k and v of [B, H, N, K]) -> the answers, [B, H, P, K], in fp32 at least."""
    batch_and_heads = q.shape[:2]
    q, k, v = (wide(x).flatten(0, 1).contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))
    weights = scores(q, k, links).softmax(dim=-1)  # [B H, P, J]
    return mixed(F.dropout(weights, dropout), v, links).unflatten(0, batch_and_heads)


@torch.library.custom_op("vitcmp::listed_attention_scores", mutates_args=())
def scores(q: Tensor, k: Tensor, links: list[Tensor]) -> Tensor:
    """(q of [G, P, K], k of [G, N, K]) -> [G, P, J]."""
    from vitcmp.attention import _neighbours_cpu as cpu

    return _run(cpu.scores, q.new_empty(*q.shape[:2], links[0].shape[1]), q, k, links[0])


@torch.library.custom_op("vitcmp::listed_attention_mixed", mutates_args=())
def mixed(weights: Tensor, v: Tensor, links: list[Tensor]) -> Tensor:
    """(weights of [G, P, J], v of [G, N, K]) -> [G, P, K]."""
    from vitcmp.attention import _neighbours_cpu as cpu

    return _run(cpu.mixed, v.new_empty(*weights.shape[:2], v.shape[2]), weights, v, links[0])


@torch.library.custom_op("vitcmp::listed_attention_spread", mutates_args=())
def spread(weights: Tensor, x: Tensor, links: list[Tensor]) -> Tensor:
    """(weights of [G, P, J], x of [G, P, K]) -> [G, N, K]."""
    from vitcmp.attention import _neighbours_cpu as cpu

    return _run(cpu.spread, x.new_empty(len(x), len(links[3]) - 1, x.shape[2]), weights, x, *links[1:])


def _run(kernel: Callable[..., None], out: Tensor, *inputs: Tensor) -> Tensor:
    """`out`, filled by as many threads as torch uses; the result does not depend on their number."""
    arrays = [x.detach().contiguous().numpy() for x in (*inputs, out)]
    rows = len(out) * out.shape[1]
    threads = torch.get_num_threads() if out.numel() > MIN_RESULTS else 1
    if threads == 1:
        kernel(*arrays, 0, rows)
        return out
    cuts = [rows * number // threads for number in range(threads + 1)]
    list(_pool(threads, os.getpid()).map(lambda begin, end: kernel(*arrays, begin, end), cuts[:-1], cuts[1:]))
    return out


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A forked child gets its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="neighbours")


scores.register_fake(lambda q, k, links: q.new_empty(*q.shape[:2], links[0].shape[1]))
mixed.register_fake(lambda weights, v, links: v.new_empty(*weights.shape[:2], v.shape[2]))
spread.register_fake(lambda weights, x, links: x.new_empty(len(x), len(links[3]) - 1, x.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, links = inputs
    ctx.save_for_backward(left, right, *links)


def _differentiate_scores(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, list[None]]:
    q, k, *links = ctx.saved_tensors
    return mixed(gradient, k, links), spread(gradient, q, links), [None] * len(links)


def _differentiate_mixed(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, list[None]]:
    weights, v, *links = ctx.saved_tensors
    return scores(gradient, v, links), spread(weights, gradient, links), [None] * len(links)


def _differentiate_spread(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, list[None]]:
    weights, x, *links = ctx.saved_tensors
    return scores(x, gradient, links), mixed(weights, gradient, links), [None] * len(links)


scores.register_autograd(_differentiate_scores, setup_context=_setup_context)
mixed.register_autograd(_differentiate_mixed, setup_context=_setup_context)
spread.register_autograd(_differentiate_spread, setup_context=_setup_context)


@register_flop_formula([torch.ops.vitcmp.listed_attention_mixed, torch.ops.vitcmp.listed_attention_spread])
def _product_flops(weights: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    heads, queries, keys = weights
    return 2 * heads * queries * keys * x[-1]


@register_flop_formula(torch.ops.vitcmp.listed_attention_scores)
def _scores_flops(q: Any, k: Any, links: Any, *args: Any, **kwargs: Any) -> int:
    heads, queries, width = q
    return 2 * heads * queries * links[0][1] * width
