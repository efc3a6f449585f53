"""Differential attention: each map apart, or a kernel whose maps never leave a core's cache.

The kernel (`numba.differential`) is for the CPU, in fp32 and bf16, and mixes the maps before they meet the values.
Backward, it computes the maps again; gradients are in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.ops.softmax import SQUARES, example, register_flops, same_format, sizes_of, softmax_attention
from vitcmp.kernels.tensors import empty_like, lines_of, memory, num_threads, side_by_side, sizes, wide
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator


def apart(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> Tensor:
    """softmax(q1 k1^T / sqrt(K/2)) v - share softmax(q2 k2^T / sqrt(K/2)) v; the halves of q and k make the maps."""
    halves = zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True)
    first, second = (wide(softmax_attention(q_half, k_half, v)) for q_half, k_half in halves)
    return (first - share * second).to(v.dtype)


def explicit(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> Tensor:
    """The same with both maps in memory, differentiable any number of times."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = (wide(x).unflatten(-1, (2, -1)).movedim(-2, 0) for x in (q, k))
        first, second = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return (first - share * second).to(v.dtype) @ v


@torch_operator("differential_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of q, k, v of [B, H, N, K], in fp32 or bf16, and both maps' largest scores, [2, B H, N].

    The halves of q and k make the maps; the second one counts -`share` times, an fp32 number of no dimensions.
    """
    from vitcmp.kernels.numba import differential as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out, tops = _results(q, k, v, share)
    arrays = *map(memory, (q, k, v, share, out, tops)), lines_of(q, k, v, out), *sizes(q, k)
    share_out(cpu.forward, tops.shape[1], num_threads(q, k), *arrays)
    return out, tops


@_attend.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(2, q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32)


@torch_operator("differential_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, share: Tensor, tops: Tensor) -> list[Tensor]:
    """Gradients of q, k, v and of `share`."""
    from vitcmp.kernels.numba import differential as cpu

    q, k, v, dout = (side_by_side(x) for x in (q, k, v, dout))
    gradients, dshare = [empty_like(x) for x in (q, k, v)], torch.empty_like(tops[0])
    arrays = map(memory, (q, k, v, share, dout, tops, *gradients, dshare))
    lines = lines_of(q, k, v, dout, *gradients)
    share_out(cpu.backward, len(dshare), num_threads(q, k), *arrays, lines, *sizes(q, k))
    return [*gradients, dshare.sum()]


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, share: Tensor, tops: Tensor) -> list[Tensor]:
    return [*(empty_like(x) for x in (q, k, v)), torch.empty_like(share)]


_attend.register_gradients(_backward, explicit, tensors=4)
register_flops(_attend, _backward)


def _accepts(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> bool:
    is_number = share.dtype == torch.float32 and share.dim() == 0
    return same_format(q, k, v) and q.shape[-1] % 2 == 0 and is_number


differential_attention = Operator(
    "differential_attention", "BHNK BHMK BHMC -> BHNC",
    {"apart": apart, "explicit": explicit, "numba": lambda *args: _attend(*args)[0]},
    accepts=_accepts,
    sizes=sizes_of, unmeasured=lambda dtype, trains: ("apart",), left_out=["explicit"],
    example=lambda dtype, sizes: (*example(dtype, sizes), torch.tensor(0.5)),
    grid=SQUARES, dtypes=(torch.float32, torch.bfloat16),
)  # fmt: skip
