"""Bias with GELU, and LayerNorm in the number format that the next product reads, each in one pass on the CPU.

torch takes several: it spreads the bias before the product adds to it, sums it up in a pass of its own backward, and
under autocast normalises in fp32 and copies that to bf16, in both directions. The values are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.tensors import empty_rows, flat, num_rows
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator

MIN_NUMBERS = 2**15
"""Numbers below which calling a kernel costs more than it saves."""


def gelu_of_sum(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias), exact (by the normal distribution function), in the format of x."""
    with torch.autocast(x.device.type, enabled=False):
        return F.gelu(x + bias.to(x.dtype))


def products(in_bf16: bool) -> torch.autocast:
    """Where a block's products are taken: in bf16, or in the format that they have or autocast gives them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=in_bf16)


def linear_then_gelu(x: Tensor, weight: Tensor, bias: Tensor, in_bf16: bool) -> Tensor:
    """GELU(x weight^T + bias): [..., D] -> [..., F]."""
    with products(in_bf16):
        return F.gelu(F.linear(x, weight, bias))


def _linear_then_kernel(x: Tensor, weight: Tensor, bias: Tensor, in_bf16: bool) -> Tensor:
    with products(in_bf16):
        y = F.linear(x, weight)
    return _gelu(y, bias)


def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, in_bf16: bool) -> Tensor:
    """LayerNorm over the last axis, computed in fp32 at least; in bf16 if asked for."""
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    return out.bfloat16() if in_bf16 and out.dtype == torch.float32 else out


@torch_operator("bias_gelu")
def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) for x of [..., F] in fp32 or bf16, and the bias in fp32."""
    from vitcmp.kernels.numba import rows as cpu

    out, rows = empty_rows(x), num_rows(x)
    share_out(cpu.gelu, cpu.chunks(rows), torch.get_num_threads(), *map(flat, (x, bias, out)), len(bias), rows)
    return out


@_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return empty_rows(x)


@torch_operator("bias_gelu_backward")
def _gelu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of x and of the bias."""
    from vitcmp.kernels.numba import rows as cpu

    dx, rows = empty_rows(x), num_rows(x)
    dbias = bias.new_empty(cpu.chunks(rows), len(bias))
    arrays = map(flat, (x, bias, dout, dx, dbias))
    share_out(cpu.gelu_backward, len(dbias), torch.get_num_threads(), *arrays, len(bias), rows)
    return [dx, dbias.sum(dim=0)]


@_gelu_backward.register_fake
def _(dout: Tensor, x: Tensor, bias: Tensor) -> list[Tensor]:
    return [empty_rows(x), empty_rows(bias)]


_gelu.register_gradients(_gelu_backward, gelu_of_sum, tensors=2)


@torch_operator("layer_norm")
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, in_bf16: bool) -> tuple[Tensor, Tensor]:
    """LayerNorm of x, [..., D], and of each row the mean and 1 / standard deviation, [rows, 2]."""
    from vitcmp.kernels.numba import rows as cpu

    (out, stats), rows = _norm_results(x, weight, bias, eps, in_bf16), num_rows(x)
    arrays = map(flat, (x, weight, bias, out, stats))
    share_out(cpu.norm, cpu.chunks(rows), torch.get_num_threads(), *arrays, eps, len(bias), rows)
    return out, stats


@_norm.register_fake
def _norm_results(x: Tensor, weight: Tensor, bias: Tensor, eps: float, in_bf16: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    return empty_rows(x, dtype), x.new_empty(num_rows(x), 2, dtype=torch.float32)


@torch_operator("layer_norm_backward")
def _norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, in_bf16: bool
) -> list[Tensor]:
    """Gradients of x, the weight and the bias."""
    from vitcmp.kernels.numba import rows as cpu

    dx, rows = empty_rows(x), num_rows(x)
    dparameters = weight.new_empty(cpu.chunks(rows), 2, len(weight))
    arrays = map(flat, (x, weight, stats, dout, dx, dparameters))
    share_out(cpu.norm_backward, len(dparameters), torch.get_num_threads(), *arrays, len(weight), rows)
    return [dx, *dparameters.sum(dim=0).unbind()]


@_norm_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, eps: float, in_bf16: bool) -> list[Tensor]:
    return [empty_rows(x), empty_rows(weight), empty_rows(weight)]


_norm.register_gradients(_norm_backward, normalised, tensors=3)


_gelu.register_flops(lambda *shapes: 0)
_gelu_backward.register_flops(lambda *shapes: 0)
_norm.register_flops(lambda *shapes: 0)
_norm_backward.register_flops(lambda *shapes: 0)


def format_of(*args: Any) -> torch.dtype:
    """That of products: the last argument says whether it is bf16."""
    return torch.bfloat16 if args[-1] else args[0].dtype


def _has_formats(x: Tensor, *parameters: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16) and all(p.dtype == torch.float32 for p in parameters)


def _example(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    width, rows = sizes
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, width), (width,), (width,)))
    return x, weight, bias, 1e-6, dtype == torch.bfloat16


def _example_linear(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    width, outputs, rows = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (outputs, width), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight / width**0.5, bias, dtype == torch.bfloat16


linear_gelu = Operator(
    "linear_gelu", "*D FD F", {"torch": linear_then_gelu, "numba": _linear_then_kernel},
    accepts=lambda x, weight, bias, in_bf16: _has_formats(x, weight, bias)
    and num_rows(x) * len(weight) >= MIN_NUMBERS,
    sizes=lambda x, weight, *rest: (x.shape[-1], len(weight), num_rows(x)), dtype=format_of,
    example=_example_linear, dtypes=(torch.float32, torch.bfloat16), unmeasured=lambda dtype, trains: ("torch",),
    grid=[(width, 4 * width, rows) for width in (48, 128, 384) for rows in (1024, 8192)],
)  # fmt: skip

layer_norm = Operator(
    "layer_norm", "*D D D", {"torch": normalised, "numba": lambda *args: _norm(*args)[0]},
    accepts=lambda x, weight, bias, eps, in_bf16: _has_formats(x, weight, bias)
    and (in_bf16 or x.dtype == torch.float32) and x.numel() >= MIN_NUMBERS,
    sizes=lambda x, *rest: (x.shape[-1], num_rows(x)), dtype=format_of,
    example=_example, dtypes=(torch.float32, torch.bfloat16), unmeasured=lambda dtype, trains: ("torch",),
    grid=[(width, rows) for width in (48, 128, 512) for rows in (1024, 8192)],
)  # fmt: skip
