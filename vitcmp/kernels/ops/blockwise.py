"""Sigmoid attention whose N x M weights exist a block of queries at a time, never all in memory; in torch alone.

Forward, a block's scores become its weights in place and meet the values; backward, they are computed again, and the
gradients are in closed form. So memory is O(N K), and on the CPU scores stay in cache between two products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.tensors import wide
from vitcmp.kernels.torch_operator import torch_operator

BLOCK_SCORES = {"cpu": 2**20, "cuda": 2**26}
"""Scores of a block: as many as caches hold; on a GPU, as many as keep it busy."""
MIN_QUERIES = 32
"""Queries of a block at least, or its matrix products are thin."""
MIN_TOKENS = 128
"""Below, weights are few, and quicker kept than computed again."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    """sigmoid(q k^T / sqrt(K) + bias) v for q of [B, H, N, K], k and v of [B, H, M, K]."""
    few = q.device.type not in BLOCK_SCORES or q.shape[-2] < MIN_TOKENS or not q.numel() * k.numel()
    if few or not q.dtype == k.dtype == v.dtype or q.shape[-1] != v.shape[-1]:
        return explicit(q, k, v, bias)
    return _attend(*(x.flatten(0, 1).contiguous() for x in (q, k, v)), bias).unflatten(0, v.shape[:2])


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: float, dropout: float = 0.0) -> Tensor:
    """The same with all weights in memory; dropout of weights."""
    with torch.autocast(q.device.type, enabled=False):
        scores = wide(q) * q.shape[-1] ** -0.5 @ wide(k).transpose(-2, -1)
        return F.dropout((scores + bias).sigmoid(), dropout).to(v.dtype) @ v


# Heads of all images form one axis, in groups that a block holds.


def _blocks(q: Tensor, keys: int) -> Iterator[tuple[slice, slice]]:
    """The heads and the queries of each block, the largest first."""
    heads, tokens, _ = q.shape
    most = BLOCK_SCORES[q.device.type] // keys  # queries
    rows = min(tokens, max(MIN_QUERIES, most))
    group = min(heads, max(1, most // rows))
    for head in range(0, heads, group):
        for row in range(0, tokens, rows):
            yield slice(head, min(head + group, heads)), slice(row, min(row + rows, tokens))


def _space(q: Tensor, keys: int) -> Tensor:
    """Memory for the scores of one block."""
    heads, rows = next(_blocks(q, keys))
    return q.new_empty((heads.stop - heads.start) * (rows.stop - rows.start) * keys)


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


def _weights(q: Tensor, k: Tensor, bias: float, space: Tensor) -> Tensor:
    """The weights of a block, from scaled queries, in fp32 at least."""
    return wide(_product(q, k.mT, space)).add_(bias).sigmoid_()


@torch_operator("blockwise_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    """For q of [B H, N, K], k and v of [B H, M, K]."""
    out, space, q = torch.empty_like(q), _space(q, k.shape[1]), q * q.shape[-1] ** -0.5
    for heads, rows in _blocks(q, k.shape[1]):
        weights = _weights(q[heads, rows], k[heads], bias, space)
        torch.bmm(weights.to(v.dtype), v[heads], out=out[heads, rows])
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    return torch.empty_like(q)


@torch_operator("blockwise_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: float) -> list[Tensor]:
    """Gradients of q, k and v."""
    scale, dout = q.shape[-1] ** -0.5, dout.contiguous()
    q = q * scale
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
    space, more = _space(q, k.shape[1]), _space(q, k.shape[1])
    for heads, rows in _blocks(q, k.shape[1]):
        upstream = dout[heads, rows]
        weights = _weights(q[heads, rows], k[heads], bias, space)
        gradient = _product(upstream, v[heads].mT, more).to(weights.dtype)
        torch.ops.aten.sigmoid_backward.grad_input(gradient, weights, grad_input=gradient)
        _add_product(dv[heads], weights.to(v.dtype).mT, upstream)
        gradient = gradient.to(q.dtype)
        torch.bmm(gradient, k[heads], out=dq[heads, rows])
        _add_product(dk[heads], gradient.mT, q[heads, rows])
    return [dq.mul_(scale), dk.to(k.dtype), dv.to(v.dtype)]


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: float) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v)]


_attend.register_gradients(_backward, explicit, tensors=3)
_attend.register_flops(lambda q, k, *rest: 4 * math.prod(q) * k[1])  # scores and outputs
_backward.register_flops(lambda dout, q, k, *rest: 10 * math.prod(q) * k[1])  # scores again, and four products
