"""Efficient and linear attention whose features never leave a core's cache, a head at a time (`_kernels.summed`).

For the CPU, in fp32. Backward, the features are computed again, and the gradients are in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp.attention._feature_maps import elu_products
from vitcmp.attention._kernels.operators import differentiable, memory, operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.attention._multihead import wide
from vitcmp.attention._softmax import empty_like, lines_of, num_threads, side_by_side, sizes

VECTOR = 16
"""Numbers in a vector of the kernels (`_kernels.simd.LANES`, whose module is not to be imported at start-up)."""


def efficient_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention of q, k, v of [..., N, K] by torch, with all features in memory."""
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v)


def linear_at_once(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Linear attention of q, k, v of [..., N, K] by torch, with all features in memory."""
    return elu_products(q.shape[-1], eps).plain(q, k, v)


@operator("vitcmp::summed_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, softmax: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Efficient attention (with `softmax`) or linear, for q, [B, H, N, K], and k and v, [B, H, M, K], in fp32.

    And what backward needs of each head, [B H, W + 2, W], W being K up to whole vectors: the product of keys' features
    and values; the largest key of each feature; and the factors of its weights, or the sum of its features.
    """
    from vitcmp.attention._kernels import summed as cpu

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


@operator("vitcmp::summed_attention_backward")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, contexts: Tensor, softmax: bool, eps: float
) -> list[Tensor]:
    """Gradients of q, k and v."""
    from vitcmp.attention._kernels import summed as cpu

    q, k, v, dout = inputs = [side_by_side(x) for x in (q, k, v, dout)]
    gradients = [empty_like(x) for x in (q, k, v)]
    arrays = *map(memory, (*inputs, *gradients, contexts)), lines_of(*inputs, *gradients), *sizes(q, k)
    kernel = cpu.efficient_backward if softmax else cpu.linear_backward
    share_out(kernel, len(contexts), num_threads(q, q.mT), eps, *arrays)
    return gradients


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, contexts: Tensor, softmax: bool, eps: float) -> list[Tensor]:
    return [empty_like(x) for x in (q, k, v)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softmax, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, contexts = ctx.saved_tensors
    if dout is None:
        return (None,) * 5
    if torch.is_grad_enabled():
        plain = _at_once(ctx.softmax, ctx.eps)
        return *differentiable(plain, tuple(inputs), dout), None, None
    return *_backward(dout, *inputs, contexts, ctx.softmax, ctx.eps), None, None


_attend.register_autograd(_differentiate, setup_context=_setup_context)


def _at_once(softmax: bool, eps: float) -> Callable[..., Tensor]:
    return efficient_at_once if softmax else lambda q, k, v: linear_at_once(q, k, v, eps)


def can_sum(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels can take them, once they are in fp32."""
    is_plain = q.device.type == "cpu" and q.numel() > 0 and q.shape[-1] == v.shape[-1]
    return is_plain and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in (q, k, v))


def attend_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`efficient_at_once` by the kernels, for [B, H, N, K] in fp32 or less; computed in fp32."""
    return _attend(wide(q), wide(k), wide(v), True, 0.0)[0].to(v.dtype)


def attend_linear(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """`linear_at_once` by the kernels, for [B, H, N, K] in fp32 or less; computed in fp32."""
    return _attend(wide(q), wide(k), wide(v), False, eps)[0].to(v.dtype)


@register_flop_formula(torch.ops.vitcmp.summed_attention)
def _flops(q_shape: Any, k_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The context and the outputs."""
    return 2 * (math.prod(q_shape) + math.prod(k_shape)) * q_shape[-1]


@register_flop_formula(torch.ops.vitcmp.summed_attention_backward)
def _backward_flops(dout_shape: Any, q_shape: Any, k_shape: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """Of either product both gradients."""
    return 4 * (math.prod(q_shape) + math.prod(k_shape)) * q_shape[-1]
