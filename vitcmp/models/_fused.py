"""Bias with GELU, and LayerNorm in the number format that the next product reads, each in one pass on the CPU.

torch takes several: it spreads the bias before the product adds to it, sums it up in a pass of its own backward, and
under autocast normalises in fp32 and copies that to bf16, in both directions. The values are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.attention._kernels.operators import differentiable, memory, operator
from vitcmp.attention._kernels.threads import share_out

MIN_NUMBERS = 2**15
"""Numbers below which calling the kernels costs more than they save."""


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x weight^T + bias), exact (by the normal distribution function): [..., D] -> [..., F]."""
    if not can_compile(x, bias) or x.numel() // x.shape[-1] * len(weight) < MIN_NUMBERS:
        return F.gelu(F.linear(x, weight, bias))
    return bias_gelu(F.linear(x, weight), bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis; under autocast to bf16 on the CPU in bf16, computed in fp32."""
    if not can_compile(x, bias) or x.numel() < MIN_NUMBERS:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return norm(x, weight, bias, eps, autocasts() or x.dtype == torch.bfloat16)[0]


def autocasts() -> bool:
    """Whether products are of bf16 now."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def can_compile(x: Tensor, bias: Tensor) -> bool:
    """Whether the kernels can take it."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and bias.dtype == torch.float32


@operator("vitcmp::bias_gelu")
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) for x of [..., F] in fp32 or bf16, and the bias in fp32."""
    from vitcmp.models import _fused_cpu as cpu

    out, rows = empty_rows(x), num_rows(x)
    share_out(cpu.gelu, cpu.chunks(rows), torch.get_num_threads(), *map(flat, (x, bias, out)), len(bias), rows)
    return out


@bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return empty_rows(x)


@operator("vitcmp::bias_gelu_backward")
def _gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of x and of the bias."""
    from vitcmp.models import _fused_cpu as cpu

    dx, rows = empty_rows(x), num_rows(x)
    dbias = bias.new_empty(cpu.chunks(rows), len(bias))
    arrays = map(flat, (x, bias, dout, dx, dbias))
    share_out(cpu.gelu_backward, len(dbias), torch.get_num_threads(), *arrays, len(bias), rows)
    return [dx, dbias.sum(dim=0)]


@_gelu_backward.register_fake
def _(dout: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    return [empty_rows(x), empty_rows(bias)]


def _keep_gelu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        return differentiable(lambda x, bias: F.gelu(x + bias).to(x.dtype), (x, bias), dout)
    return tuple(_gelu_backward(dout, x, bias))


bias_gelu.register_autograd(_differentiate_gelu, setup_context=_keep_gelu)


@operator("vitcmp::layer_norm")
def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, in_bf16: bool) -> tuple[Tensor, Tensor]:
    """LayerNorm of x, [..., D], and of each row the mean and 1 / standard deviation, [rows, 2]."""
    from vitcmp.models import _fused_cpu as cpu

    (out, stats), rows = _norm_results(x, weight, bias, eps, in_bf16), num_rows(x)
    arrays = map(flat, (x, weight, bias, out, stats))
    share_out(cpu.norm, cpu.chunks(rows), torch.get_num_threads(), *arrays, eps, len(bias), rows)
    return out, stats


@norm.register_fake
def _norm_results(x: Tensor, weight: Tensor, bias: Tensor, eps: float, in_bf16: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    return empty_rows(x, dtype), x.new_empty(num_rows(x), 2, dtype=torch.float32)


@operator("vitcmp::layer_norm_backward")
def _norm_backward(dout: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> list[Tensor]:
    """Gradients of x, the weight and the bias."""
    from vitcmp.models import _fused_cpu as cpu

    dx, rows = empty_rows(x), num_rows(x)
    dparameters = weight.new_empty(cpu.chunks(rows), 2, len(weight))
    arrays = map(flat, (x, weight, stats, dout, dx, dparameters))
    share_out(cpu.norm_backward, len(dparameters), torch.get_num_threads(), *arrays, len(weight), rows)
    return [dx, *dparameters.sum(dim=0).unbind()]


@_norm_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> list[Tensor]:
    return [empty_rows(x), empty_rows(weight), empty_rows(weight)]


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, stats = ctx.saved_tensors
    if dout is None:
        return (None,) * 5
    if torch.is_grad_enabled():

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x.float(), weight.shape, weight, bias, ctx.eps).to(dout.dtype)

        return *differentiable(plain, (x, weight, bias), dout), None, None
    return *_norm_backward(dout, x, weight, stats), None, None


norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)


def num_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def empty_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for as many numbers, row after row, however x lies in memory."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def flat(x: Tensor) -> np.ndarray:
    """The numbers, row after row, for a kernel."""
    return memory(x.contiguous())
