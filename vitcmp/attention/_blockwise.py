"""Attention whose N x N weights exist a block of queries at a time: in a core's cache on the CPU, never all in memory.

    A = f(s_1) - share f(s_2),   s_m = q_m k_m^T / sqrt(K_m),   f = softmax, or x -> sigmoid(x + bias)

with one map, or with two that halve the heads' q and k. Forward, a block's scores become its weights in place and meet
the values; backward, they are computed again, and the gradients are in closed form. So memory is O(N K), and scores
make no way to memory and back between two products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp.attention._multihead import wide
from vitcmp.attention._operators import differentiable, operator

aten = torch.ops.aten

BLOCK_SCORES = {"cpu": 2**20, "cuda": 2**26}
"""Scores of a block: as many as caches hold; on a GPU, as many as keep it busy."""
MIN_QUERIES = 32
"""Queries of a block at least, or its matrix products are thin."""
MIN_TOKENS = 128
"""Below, weights of one map are few, and quicker kept than computed again; of two maps, below half as many."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, share: Tensor | None = None, bias: float | None = None, dropout: float = 0.0
) -> Tensor:
    """The attention of q, k, v of [B, H, N, K]: two maps for a `share` (of no dimensions), sigmoid for a `bias`."""
    maps = 1 if share is None else 2
    # The first axis counts maps: [M, B, H, N, K / M].
    q, k = (x.unflatten(-1, (maps, -1)).movedim(-2, 0) for x in (q, k))
    if dropout or q.device.type not in BLOCK_SCORES or q.shape[-2] < MIN_TOKENS // maps:
        return attend_at_once(q, k, v, share, bias, dropout)
    flat = [x.flatten(-4, -3).contiguous() for x in (q, k, v)]
    return _attend(*flat, share, bias).unflatten(0, v.shape[:2])


def attend_at_once(
    q: Tensor, k: Tensor, v: Tensor, share: Tensor | None, bias: float | None, dropout: float = 0.0
) -> Tensor:
    """The same with all weights in memory, for q and k of [M, ..., N, K / M]: drops weights of each map by itself."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    with torch.autocast(q.device.type, enabled=False):
        maps = wide(scores).softmax(dim=-1) if bias is None else (wide(scores) + bias).sigmoid()
        maps = F.dropout(maps, dropout)
        weights = maps[0] if share is None else maps[0] - share * maps[1]
    return weights.to(v.dtype) @ v


# Heads of all images form one axis, in groups that a block holds.


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """The heads and the queries of each block, the largest first."""
    maps, heads, tokens, _ = q.shape
    most = BLOCK_SCORES[q.device.type] // (maps * tokens)  # queries
    rows = min(tokens, max(MIN_QUERIES, most))
    group = min(heads, max(1, most // rows))
    for head in range(0, heads, group):
        for row in range(0, tokens, rows):
            yield slice(head, min(head + group, heads)), slice(row, min(row + rows, tokens))


def _space(q: Tensor) -> Tensor:
    """Memory for the scores of one block, [M, its scores]."""
    heads, rows = next(_blocks(q))
    return q.new_empty(len(q), (heads.stop - heads.start) * (rows.stop - rows.start) * q.shape[2])


def _product(a: Tensor, b: Tensor, space: Tensor) -> Tensor:
    """a b in `space`."""
    shape = (len(a), a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=space[: math.prod(shape)].view(shape))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; totals of half precision are wider than what is added to them."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b


def _maps(q: Tensor, k: Tensor, bias: float | None, space: Tensor) -> list[Tensor]:
    """The maps of a block, from scaled queries, in fp32 at least."""
    maps = []
    for queries, keys, room in zip(q, k, space, strict=True):
        scores = wide(_product(queries, keys.mT, room))
        maps.append(aten._softmax.out(scores, -1, False, out=scores) if bias is None else scores.add_(bias).sigmoid_())
    return maps


def _mix(maps: list[Tensor], share: Tensor | None) -> Tensor:
    """The weights, in the place of the first map."""
    return maps[0] if share is None else maps[0].sub_(maps[1].mul_(share))


def _to_scores(gradient: Tensor, weights: Tensor, bias: float | None, out: Tensor) -> Tensor:
    """The gradient of a map's scores from that of its weights."""
    if bias is None:
        return aten._softmax_backward_data.out(gradient, weights, -1, weights.dtype, grad_input=out)
    return aten.sigmoid_backward.grad_input(gradient, weights, grad_input=out)


@operator("vitcmp::blockwise_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, share: Tensor | None, bias: float | None) -> Tensor:
    """For q and k of [M, B H, N, K / M] and v of [B H, N, K]."""
    out, space, q = torch.empty_like(v), _space(q), q * q.shape[-1] ** -0.5
    for heads, rows in _blocks(q):
        weights = _mix(_maps(q[:, heads, rows], k[:, heads], bias, space), share)
        torch.bmm(weights.to(v.dtype), v[heads], out=out[heads, rows])
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, share: Tensor | None, bias: float | None) -> Tensor:
    return torch.empty_like(v)


@operator("vitcmp::blockwise_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, share: Tensor | None, bias: float | None) -> list[Tensor]:
    """Gradients of q, k, v, and of `share` where there is one."""
    scale = q.shape[-1] ** -0.5
    q = q * scale
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
    dshare = [] if share is None else [torch.zeros_like(share)]
    space, more = _space(q), _space(q)
    for heads, rows in _blocks(q):
        upstream = dout[heads, rows]
        maps = _maps(q[:, heads, rows], k[:, heads], bias, space)
        dweights = _product(upstream, v[heads].mT, more[0]).to(maps[0].dtype)
        dscores = [dweights]
        if share is not None:
            product = dweights * maps[1]
            dshare[0] -= product.sum()
            dscores.append(_to_scores(dweights, maps[1], bias, out=product))
        _to_scores(dweights, maps[0], bias, out=dweights)
        _add_product(dv[heads], _mix(maps, share).to(v.dtype).mT, upstream)
        for number, gradient in enumerate(dscores):
            gradient = gradient.to(q.dtype)
            torch.bmm(gradient, k[number, heads], out=dq[number, heads, rows])
            _add_product(dk[number, heads], gradient.mT, q[number, heads, rows])
    dq *= scale
    if share is not None:
        dq[1] *= -share
        dk[1] *= -share
    return [dq, dk.to(k.dtype), dv.to(v.dtype), *dshare]


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, share: Tensor | None, bias: float | None) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, share) if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bias = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, share = inputs = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *differentiable(lambda q, k, v, share: attend_at_once(q, k, v, share, ctx.bias), inputs, dout), None
    gradients = _backward(dout.contiguous(), q, k, v, share, ctx.bias)
    return (*gradients, *[None] * (5 - len(gradients)))


_attend.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.vitcmp.blockwise_attention)
def _flops(q_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores and outputs."""
    maps, heads, tokens, width = q_shape
    return 4 * maps * heads * tokens**2 * width


@register_flop_formula(torch.ops.vitcmp.blockwise_attention_backward)
def _backward_flops(dout_shape: Any, q_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Scores again, and four products."""
    maps, heads, tokens, width = q_shape
    return 10 * maps * heads * tokens**2 * width
