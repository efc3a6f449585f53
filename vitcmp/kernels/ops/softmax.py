"""Softmax attention: explicit weights, torch's fused form, and a kernel whose scores never leave a core's cache.

The kernel (`numba.softmax`) is for the CPU, in fp32 and bf16: where heads are narrow, the other forms spend their time
on moving scores and on thin matrix products. Backward, it computes the weights again; gradients are in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.tensors import (
    empty_like,
    joined,
    lines_of,
    memory,
    num_threads,
    side_by_side,
    sizes,
    wide,
)
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import TorchOperator, differentiable, torch_operator

GRID = (
    *((width, tokens, tokens) for width in (12, 32, 64) for tokens in (16, 64, 256, 1024)),
    *((64, *pair) for pair in ((64, 4096), (4096, 64))),
)
"""Head width, queries, keys."""
SQUARES = tuple((width, tokens, tokens) for width in (12, 64) for tokens in (16, 64, 256, 1024))
"""The same for the other attentions."""
TOKENS = 4096
"""Queries of a batch, about, in examples."""


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, as it is written; scores and weights in fp32 at least.

    Rounded to bf16, a score of 25 is off by up to 0.06, and its weight by 6 %.
    """
    with torch.autocast(q.device.type, enabled=False):
        weights = (wide(q) * q.shape[-1] ** -0.5 @ wide(k).transpose(-2, -1)).softmax(dim=-1)
        return weights.to(v.dtype) @ v


def scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(K): [..., N, K] and [..., M, K] -> [..., N, M]. The factor needs no pass of its own."""
    # Nothing is added: with beta = 0 what is to be added is not even read.
    nothing, factor = q.new_empty(1, 1, 1), q.shape[-1] ** -0.5
    scores = torch.baddbmm(nothing, q.flatten(0, -3), k.flatten(0, -3).mT, beta=0, alpha=factor)
    return scores.unflatten(0, q.shape[:-2])


def explicit(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """The same with dropout of weights, and without a pass for the factor."""
    with torch.autocast(q.device.type, enabled=False):
        weights = scaled_scores(wide(q), wide(k)).softmax(dim=-1)  # [B, H, N, M]
        return F.dropout(weights, dropout).to(v.dtype) @ v


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, in the format of its inputs as the other forms."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v)


def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel."""
    return attend(q, k, v)[0]


@torch_operator("softmax_attention")
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of q, [B, H, N, K], to k and v, [B, H, M, K], in fp32 or bf16.

    And the largest score and the weights' common factor of each query, [2, B H, N], for backward.
    """
    from vitcmp.kernels.numba import softmax as cpu

    q, k, v = (side_by_side(x) for x in (q, k, v))
    out, stats = _results(q, k, v)
    arrays = *map(memory, (q, k, v, out, stats)), lines_of(q, k, v, out), *sizes(q, k)
    share_out(cpu.forward, stats.shape[1], num_threads(q, k), *arrays)
    return out, stats


@attend.register_fake
def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(q), q.new_empty(2, q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32)


@torch_operator("softmax_attention_backward")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, together: bool
) -> list[Tensor]:
    """Gradients of q, k and v, or one tensor of all three, [B, N, 3, H, K]."""
    from vitcmp.kernels.numba import softmax as cpu

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


def _are_together(inputs: list[Tensor]) -> bool:
    """Whether q, k and v are one projection's."""
    heads_adjoin = all(x.stride(1) == x.shape[-1] for x in inputs)
    return heads_adjoin and joined([x.transpose(1, 2).flatten(2) for x in inputs]) is not None


def _apart(whole: Tensor) -> list[Tensor]:
    """Three of [B, H, N, K] from what has them together."""
    return [x.transpose(1, 2) for x in whole.unbind(2)]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, stats = ctx.saved_tensors
    if dout is None:
        return (None,) * 3
    if torch.is_grad_enabled():
        return differentiable(naive, tuple(inputs), dout)
    if _are_together(inputs):
        return tuple(_apart(*_backward(dout, *inputs, out, stats, True)))
    return tuple(_backward(dout, *inputs, out, stats, False))


attend.register_autograd(_differentiate, setup_context=_keep)


def register_flops(forward: TorchOperator, backward: TorchOperator) -> None:
    """Counts an attention and its gradients: scores and outputs; scores again, and four products."""
    forward.register_flops(lambda q, k, *rest: 4 * math.prod(q) * k[2])
    backward.register_flops(lambda dout, q, k, *rest: 10 * math.prod(q) * k[2])


register_flops(attend, _backward)


def same_format(*tensors: Tensor) -> bool:
    """Whether all are in fp32, or all in bf16, and equally wide."""
    first = tensors[0]
    formats, widths = {x.dtype for x in tensors}, {x.shape[-1] for x in tensors}
    return first.dtype in (torch.float32, torch.bfloat16) and len(formats) == len(widths) == 1


def sizes_of(q: Tensor, k: Tensor, *rest: Any) -> tuple[int, int, int]:
    """What the speed of an attention depends on: head width, queries, keys."""
    return q.shape[-1], q.shape[-2], k.shape[-2]


def example(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the projections hand them over: the heads of a token side by side."""
    width, queries, keys = sizes
    batch, generator = max(1, TOKENS // max(queries, keys)), torch.Generator().manual_seed(0)
    if queries == keys:
        x = torch.randn(batch, queries, 3, 4, width, generator=generator).to(dtype)
        q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
        return q, k, v
    q, k, v = (
        torch.randn(batch, tokens, 4, width, generator=generator).to(dtype).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )
    return q, k, v


def _hides_nan(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's fused form gives zeros where a query is NaN: on the CPU, with fewer than 16 keys."""
    return q.device.type == "cpu" and k.shape[-2] < 16


def _unmeasured(dtype: torch.dtype, trains: bool) -> tuple[str, ...]:
    """torch's fused form, but in half precision its backward pass is slow."""
    return ("merged", "fused") if trains and dtype in (torch.bfloat16, torch.float16) else ("fused", "merged")


_FORMS: dict[str, Callable[..., Tensor]] = {"naive": naive, "merged": explicit, "fused": fused, "numba": compiled}

softmax_attention = Operator(
    "softmax_attention", "BHNK BHMK BHMC -> BHNC", _FORMS,
    accepts=lambda q, k, v: same_format(q, k, v),
    sizes=sizes_of, unmeasured=_unmeasured, left_out=["naive"], unless={"fused": _hides_nan},
    example=example, grid=GRID, dtypes=(torch.float32, torch.bfloat16),
)  # fmt: skip
