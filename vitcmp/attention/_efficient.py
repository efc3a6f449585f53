"""Efficient attention whose weights never leave a core's cache, a head at a time (`_kernels.efficient`).

For the CPU, in fp32. Backward, the weights are computed again, and the gradients are in closed form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp.attention._kernels.operators import differentiable, memory, operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.attention._softmax import empty_like, lines_of, num_threads, side_by_side, sizes

VECTOR = 16
"""Numbers in a vector of the kernels (`_kernels.simd.LANES`, whose module is not to be imported at start-up)."""


def attend_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for q, k, v of [..., N, K] by torch, with all weights in memory."""
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)


@operator("vitcmp::efficient_attention")
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """rho_q(q) (rho_k(k)^T v) for q, k and v of [B, H, N, K], in fp32; and what backward needs of each head.

    That is [B H, W + 2, W], W being K up to whole vectors: rho_k(k)^T v, and of each feature its largest key and the
    factor that makes its weights sum to 1.
    """
    from vitcmp.attention._kernels import efficient as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out, contexts = _results(q, k, v)
    arrays = *map(memory, (q, k, v, out, contexts)), lines_of(q, k, v, out), *sizes(q, k)
    share_out(cpu.forward, len(contexts), num_threads(q, q.mT), *arrays)
    return out, contexts


@attend.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = -(-q.shape[-1] // VECTOR) * VECTOR
    return empty_like(q), q.new_empty(q.shape[0] * q.shape[1], wide + 2, wide)


@operator("vitcmp::efficient_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, contexts: Tensor) -> list[Tensor]:
    """Gradients of q, k and v."""
    from vitcmp.attention._kernels import efficient as cpu

    q, k, v, dout = inputs = [side_by_side(x) for x in (q, k, v, dout)]
    gradients = [empty_like(x) for x in (q, k, v)]
    arrays = *map(memory, (*inputs, *gradients, contexts)), lines_of(*inputs, *gradients), *sizes(q, k)
    share_out(cpu.backward, len(contexts), num_threads(q, q.mT), *arrays)
    return gradients


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, contexts: Tensor) -> list[Tensor]:
    return [empty_like(x) for x in (q, k, v)]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, contexts = ctx.saved_tensors
    if dout is None:
        return (None,) * 3
    if torch.is_grad_enabled():
        return differentiable(attend_at_once, tuple(inputs), dout)
    return tuple(_backward(dout, *inputs, contexts))


attend.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.vitcmp.efficient_attention)
def _flops(q_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The context and the outputs."""
    return 4 * math.prod(q_shape) * q_shape[-1]


@register_flop_formula(torch.ops.vitcmp.efficient_attention_backward)
def _backward_flops(dout_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of either product both gradients."""
    return 8 * math.prod(dout_shape) * dout_shape[-1]
