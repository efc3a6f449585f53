"""Softmax attention whose scores never leave a core's cache, a head at a time (`_kernels.softmax`).

For the CPU, in fp32 and bf16: where heads are narrow, other forms spend their time on moving scores and on thin matrix
products. Backward, the weights are computed again, and the gradients are in closed form.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp.attention._kernels.operators import differentiable, memory, operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.attention._multihead import joined

MIN_SCORES = 2**15
"""Scores below which a second thread costs more than it brings."""


def attend_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of q, k, v of [..., N, K] with all weights in memory."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@operator("vitcmp::softmax_attention")
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of q, [B, H, N, K], to k and v, [B, H, M, K], in fp32 or bf16.

    And the largest score and the weights' common factor of each query, [2, B H, N], for backward.
    """
    from vitcmp.attention._kernels import softmax as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out, stats = _results(q, k, v)
    arrays = *map(memory, (q, k, v, out, stats)), lines_of(q, k, v, out), *sizes(q, k)
    share_out(cpu.forward, stats.shape[1], num_threads(q, k), *arrays)
    return out, stats


@attend.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(2, q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32)


@operator("vitcmp::softmax_attention_backward")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, together: bool
) -> list[Tensor]:
    """Gradients of q, k and v, or one tensor of all three, [B, N, 3, H, K]."""
    from vitcmp.attention._kernels import softmax as cpu

    out, *inputs = (side_by_side(x) for x in (out, q, k, v, dout))
    results = _gradients(dout, q, k, v, out, stats, together)
    gradients = _apart(results[0]) if together else results
    given, lines = (memory(stats), memory(out)), lines_of(*inputs, *gradients, out)
    arrays = [memory(x) for x in (*inputs, *gradients)]
    share_out(cpu.backward, stats.shape[1], num_threads(q, k), given, *arrays, lines, *sizes(q, k))
    return results


@_backward.register_fake
def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, together: bool
) -> list[Tensor]:
    batch, heads, tokens, width = q.shape
    return [q.new_empty(batch, tokens, 3, heads, width)] if together else [empty_like(x) for x in (q, k, v)]


def _together(inputs: list[Tensor]) -> bool:
    """Whether q, k and v are one projection's."""
    heads_adjoin = all(x.stride(1) == x.shape[-1] for x in inputs)
    return heads_adjoin and joined([x.transpose(1, 2).flatten(2) for x in inputs]) is not None


def _apart(whole: Tensor) -> list[Tensor]:
    """Three of [B, H, N, K] from what has them together."""
    return [x.transpose(1, 2) for x in whole.unbind(2)]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, stats = ctx.saved_tensors
    if dout is None:
        return (None,) * 3
    if torch.is_grad_enabled():
        return differentiable(attend_at_once, tuple(inputs), dout)
    if _together(inputs):
        return tuple(_apart(*_backward(dout, *inputs, out, stats, True)))
    return tuple(_backward(dout, *inputs, out, stats, False))


attend.register_autograd(_differentiate, setup_context=_setup_context)


def register_flops(name: str) -> None:
    """Counts an operator and its backward: scores and outputs; scores again, and four products."""

    @register_flop_formula(getattr(torch.ops.vitcmp, name))
    def forward(q_shape: Any, k_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 4 * math.prod(q_shape) * k_shape[2]

    @register_flop_formula(getattr(torch.ops.vitcmp, f"{name}_backward"))
    def backward(dout_shape: Any, q_shape: Any, k_shape: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
        return 10 * math.prod(q_shape) * k_shape[2]


register_flops("softmax_attention")


def side_by_side(x: Tensor) -> Tensor:
    """The same, with the numbers of each token side by side in memory, and no number for two tokens."""
    return x if x.stride(-1) == 1 and min(x.stride()[:-1]) > 0 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """[B, H, N, K] as the output projection wants to read it: the heads of a token side by side."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """Heads, queries, keys, and the heads' width."""
    _, heads, tokens, width = q.shape
    return heads, tokens, k.shape[2], width


def lines_of(*tensors: Tensor) -> np.ndarray:
    return np.array([x.stride()[:3] for x in tensors])


def num_threads(q: Tensor, k: Tensor) -> int:
    heads = q.shape[0] * q.shape[1]
    return min(torch.get_num_threads(), heads, max(1, heads * q.shape[2] * k.shape[2] // MIN_SCORES))
