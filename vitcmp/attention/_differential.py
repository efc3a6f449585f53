"""Differential attention whose maps never leave a core's cache, a head at a time (`_kernels.differential`).

For the CPU, in fp32 and bf16. Backward, the maps are computed again, and the gradients are in closed form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitcmp.attention._kernels.operators import differentiable, memory, operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.attention._softmax import empty_like, lines_of, num_threads, register_flops, side_by_side, sizes


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> Tensor:
    """The attention of q, k, v of [..., N, K] with both maps in memory."""
    q, k = (x.unflatten(-1, (2, -1)).movedim(-2, 0) for x in (q, k))
    first, second = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return (first - share.to(v.dtype) * second) @ v


@operator("vitcmp::differential_attention")
def attend(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of q, k, v of [B, H, N, K], in fp32 or bf16, and both maps' largest scores, [2, B H, N].

    The halves of q and k make the maps; the second one counts -`share` times, an fp32 number of no dimensions.
    """
    from vitcmp.attention._kernels import differential as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out, tops = _results(q, k, v, share)
    arrays = *map(memory, (q, k, v, share, out, tops)), lines_of(q, k, v, out), *sizes(q, k)
    share_out(cpu.forward, tops.shape[1], num_threads(q, k), *arrays)
    return out, tops


@attend.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(2, q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32)


@operator("vitcmp::differential_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, share: Tensor, tops: Tensor) -> list[Tensor]:
    """Gradients of q, k, v and of `share`."""
    from vitcmp.attention._kernels import differential as cpu

    q, k, v, dout = (side_by_side(x) for x in (q, k, v, dout))
    gradients, dshare = [empty_like(x) for x in (q, k, v)], torch.empty_like(tops[0])
    arrays = map(memory, (q, k, v, share, dout, tops, *gradients, dshare))
    lines = lines_of(q, k, v, dout, *gradients)
    share_out(cpu.backward, len(dshare), num_threads(q, k), *arrays, lines, *sizes(q, k))
    return [*gradients, dshare.sum()]


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, share: Tensor, tops: Tensor) -> list[Tensor]:
    return [*(empty_like(x) for x in (q, k, v)), torch.empty_like(share)]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, tops = ctx.saved_tensors
    if dout is None:
        return (None,) * 4
    if torch.is_grad_enabled():
        return differentiable(attend_at_once, tuple(inputs), dout)
    return tuple(_backward(dout, *inputs, tops))


attend.register_autograd(_differentiate, setup_context=_setup_context)
register_flops("differential_attention")
