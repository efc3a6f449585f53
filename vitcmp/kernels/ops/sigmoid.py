"""Sigmoid attention: explicit weights, blocks of queries, and a kernel whose weights never leave a core's cache.

The kernel (`numba.sigmoid`) is for the CPU, in fp32 and bf16. Backward, blocks and kernel compute the weights again;
gradients are in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.ops import blockwise
from vitcmp.kernels.ops.softmax import SQUARES, example, register_flops, same_format, sizes_of
from vitcmp.kernels.tensors import empty_like, lines_of, memory, num_threads, side_by_side, sizes
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator


@torch_operator("sigmoid_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    """sigmoid(q k^T / sqrt(K) + bias) v for q of [B, H, N, K], k and v of [B, H, M, K], in fp32 or bf16."""
    from vitcmp.kernels.numba import sigmoid as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out = empty_like(q)
    arrays = *map(memory, (q, k, v, out)), lines_of(q, k, v, out), *sizes(q, k), bias
    share_out(cpu.forward, q.shape[0] * q.shape[1], num_threads(q, k), *arrays)
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: float) -> Tensor:
    return empty_like(q)


@torch_operator("sigmoid_attention_backward")
def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: float) -> list[Tensor]:
    """Gradients of q, k and v."""
    from vitcmp.kernels.numba import sigmoid as cpu

    q, k, v, dout = inputs = [side_by_side(x) for x in (q, k, v, dout)]
    gradients = [empty_like(x) for x in (q, k, v)]
    arrays = *map(memory, (*inputs, *gradients)), lines_of(*inputs, *gradients), *sizes(q, k)
    share_out(cpu.backward, q.shape[0] * q.shape[1], num_threads(q, k), bias, *arrays)
    return gradients


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: float) -> list[Tensor]:
    return [empty_like(x) for x in (q, k, v)]


_attend.register_gradients(_backward, blockwise.explicit, tensors=3)
register_flops(_attend, _backward)

sigmoid_attention = Operator(
    "sigmoid_attention", "BHNK BHMK BHMC -> BHNC",
    {"explicit": blockwise.explicit, "blocks": blockwise.attend, "numba": _attend},
    accepts=lambda q, k, v, bias: same_format(q, k, v),
    sizes=sizes_of, unmeasured=lambda dtype, trains: ("blocks", "explicit"),
    example=lambda dtype, sizes: (*example(dtype, sizes), -math.log(sizes[2])),
    grid=SQUARES, dtypes=(torch.float32, torch.bfloat16),
)  # fmt: skip
