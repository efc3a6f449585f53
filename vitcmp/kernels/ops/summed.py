"""Efficient and linear attention: by torch, or by a kernel whose features never leave a core's cache.

The kernel (`numba.summed`, one for both) is for the CPU, in fp32. Backward, it computes the features again; gradients
are in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitcmp.kernels.feature_maps import elu_products
from vitcmp.kernels.operator import Operator
from vitcmp.kernels.ops.softmax import SQUARES, example, sizes_of
from vitcmp.kernels.tensors import empty_like, lines_of, memory, num_threads, side_by_side, sizes, wide
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator

VECTOR = 16
"""Numbers in a vector of the kernels (`numba.simd.LANES`, in a module that is not imported where numba is absent)."""


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over features of q, times (softmax over tokens of k)^T v; computed in fp32 at least."""
    with torch.autocast(q.device.type, enabled=False):
        weights = wide(k).softmax(dim=-2).transpose(-2, -1)  # [B, H, K, M]
        return (wide(q).softmax(dim=-1) @ (weights @ wide(v))).to(v.dtype)


def linear(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + eps), phi = elu + 1; computed in fp32 at least."""
    return elu_products(q.shape[-1], eps)(q, k, v)


@torch_operator("summed_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, softmax: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Efficient attention (with `softmax`) or linear, for q, [B, H, N, K], and k and v, [B, H, M, K], in fp32.

    And what backward needs of each head, [B H, W + 2, W], W being K up to whole vectors: the product of keys' features
    and values; the largest key of each feature; and the factors of its weights, or the sum of its features.
    """
    from vitcmp.kernels.numba import summed as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out, contexts = _results(q, k, v, softmax, eps)
    arrays = *map(memory, (q, k, v, out, contexts)), lines_of(q, k, v, out), *sizes(q, k)
    kernel = cpu.efficient if softmax else cpu.linear
    share_out(kernel, len(contexts), num_threads(q, q.mT), eps, *arrays)
    return out, contexts


@_attend.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor, softmax: bool, eps: float) -> tuple[Tensor, Tensor]:
    wide = -(-q.shape[-1] // VECTOR) * VECTOR
    return empty_like(q), q.new_empty(q.shape[0] * q.shape[1], wide + 2, wide)


@torch_operator("summed_attention_backward")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, contexts: Tensor, softmax: bool, eps: float
) -> list[Tensor]:
    """Gradients of q, k and v."""
    from vitcmp.kernels.numba import summed as cpu

    q, k, v, dout = inputs = [side_by_side(x) for x in (q, k, v, dout)]
    gradients = [empty_like(x) for x in (q, k, v)]
    arrays = *map(memory, (*inputs, *gradients, contexts)), lines_of(*inputs, *gradients), *sizes(q, k)
    kernel = cpu.efficient_backward if softmax else cpu.linear_backward
    share_out(kernel, len(contexts), num_threads(q, q.mT), eps, *arrays)
    return gradients


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, contexts: Tensor, softmax: bool, eps: float) -> list[Tensor]:
    return [empty_like(x) for x in (q, k, v)]


def _plain(q: Tensor, k: Tensor, v: Tensor, softmax: bool, eps: float) -> Tensor:
    return efficient(q, k, v) if softmax else elu_products(q.shape[-1], eps).in_one_block(q, k, v)


_attend.register_gradients(_backward, _plain, tensors=3)
_attend.register_flops(lambda q, k, *rest: 2 * (math.prod(q) + math.prod(k)) * q[-1])  # the context and the outputs
_backward.register_flops(lambda dout, q, k, *rest: 4 * (math.prod(q) + math.prod(k)) * q[-1])  # of either, both


def _compiled_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(wide(q), wide(k), wide(v), True, 0.0)[0].to(v.dtype)


def _compiled_linear(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return _attend(wide(q), wide(k), wide(v), False, eps)[0].to(v.dtype)


def _accepts(q: Tensor, k: Tensor, v: Tensor, *rest: float) -> bool:
    is_half_or_single = all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v))
    return is_half_or_single and q.shape[-1] == v.shape[-1]


efficient_attention = Operator(
    "efficient_attention", "BHNK BHMK BHMC -> BHNC", {"torch": efficient, "numba": _compiled_efficient},
    accepts=_accepts, sizes=sizes_of, unmeasured=lambda dtype, trains: ("torch",),
    example=example, grid=SQUARES, dtypes=(torch.float32, torch.bfloat16),
)  # fmt: skip

linear_attention = Operator(
    "linear_attention", "BHNK BHMK BHMC -> BHNC", {"torch": linear, "numba": _compiled_linear},
    accepts=_accepts, sizes=sizes_of, unmeasured=lambda dtype, trains: ("torch",),
    example=lambda dtype, sizes: (*example(dtype, sizes), 1e-6), grid=SQUARES, dtypes=(torch.float32, torch.bfloat16),
)  # fmt: skip
