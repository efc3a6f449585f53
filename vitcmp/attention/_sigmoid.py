"""Sigmoid attention whose weights never leave a core's cache, a head at a time (`_kernels.sigmoid`).

For the CPU, in fp32 and bf16. Backward, the weights are computed again, and the gradients are in closed form.
"""

from __future__ import annotations

from torch import Tensor

from vitcmp.attention._blockwise import register_gradients
from vitcmp.attention._kernels.operators import memory, operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.attention._softmax import empty_like, lines_of, num_threads, register_flops, side_by_side, sizes


@operator("vitcmp::sigmoid_attention")
def attend(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    """sigmoid(q k^T / sqrt(K) + bias) v for q, k and v of [B, H, N, K], in fp32 or bf16."""
    from vitcmp.attention._kernels import sigmoid as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out = empty_like(q)
    arrays = *map(memory, (q, k, v, out)), lines_of(q, k, v, out), *sizes(q, k), bias
    share_out(cpu.forward, q.shape[0] * q.shape[1], num_threads(q, k), *arrays)
    return out


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    return empty_like(q)


@operator("vitcmp::sigmoid_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: float) -> list[Tensor]:
    """Gradients of q, k and v."""
    from vitcmp.attention._kernels import sigmoid as cpu

    q, k, v, dout = inputs = [side_by_side(x) for x in (q, k, v, dout)]
    gradients = [empty_like(x) for x in (q, k, v)]
    arrays = *map(memory, (*inputs, *gradients)), lines_of(*inputs, *gradients), *sizes(q, k)
    share_out(cpu.backward, q.shape[0] * q.shape[1], num_threads(q, k), bias, *arrays)
    return gradients


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: float) -> list[Tensor]:
    return [empty_like(x) for x in (q, k, v)]


register_gradients(attend, _backward)
register_flops("sigmoid_attention")
