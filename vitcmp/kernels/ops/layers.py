"""LayerNorm and what follows it, a linear layer or an MLP, in one pass on the CPU; and a linear layer and a sum.

torch takes many: each operation writes its result to memory, from where the next one reads it; under autocast, once
more in bf16. The values are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.ops.rows import MIN_NUMBERS, format_of, layer_norm, linear_gelu, products
from vitcmp.kernels.tensors import empty_rows, flat, num_rows
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator

MAX_WEIGHTS = 2**16
"""Weights of a linear layer beyond which they do not stay in a core's cache."""
LANES, PANEL = 16, 32
"""Widths that the kernels take are multiples of these (`numba.simd`, `numba.tiles`)."""


def norm_then_linear(
    x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None, eps: float, in_bf16: bool
) -> Tensor:
    """W LayerNorm(x) + b for x of [..., D] and W of [F, D]."""
    normal = layer_norm(x, weight, bias, eps, in_bf16)
    with products(in_bf16):
        return F.linear(normal, w, b)


def linear_then_sum(x: Tensor, y: Tensor, w: Tensor, b: Tensor | None, in_bf16: bool) -> Tensor:
    """x + W y + b for x of [..., F], y of [..., D] and W of [F, D]."""
    with products(in_bf16):
        return x + F.linear(y, w, b)


def norm_then_mlp(
    x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, in_bf16: bool
) -> Tensor:
    """x + W2 GELU(W1 LayerNorm(x) + b1) + b2 for x of [..., D] and W1 of [F, D]."""
    inside = linear_gelu(layer_norm(x, weight, bias, eps, in_bf16), w1, b1, in_bf16)
    with products(in_bf16):
        return x + F.linear(inside, w2, b2)


@torch_operator("norm_linear")
def _norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None, eps: float, in_bf16: bool
) -> Tensor:
    """As `norm_then_linear` for x in fp32; the product and the result in fp32 or bf16."""
    out, (w,) = _linear_result(x, weight, bias, w, b, eps, in_bf16), _in_format(in_bf16, w)
    _run("linear", x, w, x, weight, bias, eps, w, x.new_zeros(len(w)) if b is None else b, out)
    return out


@_norm_linear.register_fake
def _linear_result(
    x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None, eps: float, in_bf16: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(w), dtype=torch.bfloat16 if in_bf16 else torch.float32)


@torch_operator("norm_linear_backward")
def _norm_linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None, eps: float, in_bf16: bool
) -> list[Tensor]:
    """Gradients of x, the norm's weight and bias, w and b."""
    dx, (columns, width), (w,) = empty_rows(x), w.shape, _in_format(in_bf16, w)
    sizes = [w.numel(), columns, width, width]
    dw, db, dweight, dbias = _run_backward("linear_backward", sizes, x, w, dout, x, weight, bias, eps, w, dx)
    return [dx, dweight, dbias, dw.view(width, columns).t().contiguous(), db]


@_norm_linear_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None, eps: float, in_bf16: bool
) -> list[Tensor]:
    return [*map(empty_rows, (x, weight, bias, w)), w.new_empty(len(w))]


@torch_operator("add_linear")
def _add_linear(x: Tensor, y: Tensor, w: Tensor, b: Tensor | None, in_bf16: bool) -> Tensor:
    """As `linear_then_sum` for x in fp32, and y in fp32 or bf16, the product's format."""
    out = empty_rows(x)
    _run("add_linear", y, w, x, y, w.to(y.dtype), x.new_zeros(len(w)) if b is None else b, out)
    return out


@_add_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return empty_rows(x)


@torch_operator("add_linear_backward")
def _add_linear_backward(
    dout: Tensor, x: Tensor, y: Tensor, w: Tensor, b: Tensor | None, in_bf16: bool
) -> list[Tensor]:
    """Gradients of y, w and b; that of x is dout."""
    dy, (columns, width) = empty_rows(y), w.shape
    dw, db = _run_backward("add_linear_backward", [w.numel(), columns], y, w, dout, y, w.to(y.dtype), dy)
    return [dy, dw.view(width, columns).t().contiguous(), db]


@_add_linear_backward.register_fake
def _(dout: Tensor, x: Tensor, y: Tensor, w: Tensor, b: Tensor | None, in_bf16: bool) -> list[Tensor]:
    return [empty_rows(y), empty_rows(w), w.new_empty(len(w))]


@torch_operator("norm_mlp")
def _norm_mlp(
    x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, in_bf16: bool
) -> Tensor:
    """As `norm_then_mlp` for x in fp32; products in fp32 or bf16."""
    out, (w1, w2) = empty_rows(x), _in_format(in_bf16, w1, w2)
    _run("mlp", x, w1, x, weight, bias, eps, w1, b1, w2, b2, out)
    return out


@_norm_mlp.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return empty_rows(x)


@torch_operator("norm_mlp_backward")
def _norm_mlp_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float,
    in_bf16: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, the norm's weight and bias, w1, b1, w2 and b2."""
    dx, (hidden, width), (w1, w2) = empty_rows(x), w1.shape, _in_format(in_bf16, w1, w2)
    sizes = [w1.numel(), w2.numel(), hidden, width, width, width]
    dw1, dw2, db1, db2, dweight, dbias = _run_backward(
        "mlp_backward", sizes, x, w1, dout, x, weight, bias, eps, w1, b1, w2, dx
    )  # fmt: skip
    return [dx, dweight, dbias, dw1.view(width, hidden).t().contiguous(), db1, dw2.view(width, hidden), db2]


@_norm_mlp_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float,
    in_bf16: bool,
) -> list[Tensor]:  # fmt: skip
    return [*map(empty_rows, (x, weight, bias, w1, b1, w2, b2))]


_norm_linear.register_gradients(_norm_linear_backward, norm_then_linear, tensors=5)
_add_linear.register_gradients(_add_linear_backward, linear_then_sum, tensors=4, residual=True)
_norm_mlp.register_gradients(_norm_mlp_backward, norm_then_mlp, tensors=7)

# So many products of all rows with a matrix; backward, the MLP's first one is computed again.
_norm_linear.register_flops(lambda x, weight, bias, w, *rest: 2 * math.prod(x) * w[0])
_norm_linear_backward.register_flops(lambda dout, x, weight, bias, w, *rest: 4 * math.prod(x) * w[0])
_add_linear.register_flops(lambda x, y, w, *rest: 2 * math.prod(y) * w[0])
_add_linear_backward.register_flops(lambda dout, x, y, w, *rest: 4 * math.prod(y) * w[0])
_norm_mlp.register_flops(lambda x, weight, bias, w1, *rest: 4 * math.prod(x) * w1[0])
_norm_mlp_backward.register_flops(lambda dout, x, weight, bias, w1, *rest: 10 * math.prod(x) * w1[0])


def _in_format(in_bf16: bool, *weights: Tensor) -> list[Tensor]:
    return [w.bfloat16() if in_bf16 else w for w in weights]


def _run(kernel: str, x: Tensor, w: Tensor, *args: Tensor | float) -> None:
    """A kernel of `numba.layers` for all rows of x and a first matrix like w."""
    from vitcmp.kernels.numba import layers as cpu

    (columns, width), rows, block = w.shape, num_rows(x), cpu.block_of(w.numel())
    count = cpu.PARTS if kernel.endswith("backward") else cpu.blocks(rows, block)
    arrays = (flat(y) if isinstance(y, Tensor) else y for y in args)
    share_out(getattr(cpu, kernel), count, torch.get_num_threads(), *arrays, width, columns, rows, block)


def _run_backward(kernel: str, sizes: list[int], x: Tensor, w: Tensor, *args: Tensor | float) -> tuple[Tensor, ...]:
    """The same; returns its sums over rows, of these sizes."""
    from vitcmp.kernels.numba import layers as cpu

    sums = x.new_empty(cpu.PARTS, sum(sizes), dtype=torch.float32)
    _run(kernel, x, w, *args, sums)
    return sums.sum(dim=0).split(sizes)


def _fits(x: Tensor, w: Tensor, *parameters: Tensor | None, multiple: int = LANES) -> bool:
    """Whether the kernel takes a layer of weight w, [F, D], on rows of x: in whole vectors, in fp32, not small."""
    outputs, width = w.shape
    in_vectors = width % LANES == 0 == outputs % multiple and w.numel() <= MAX_WEIGHTS
    in_fp32 = all(p is None or p.dtype == torch.float32 for p in (w, *parameters))
    return in_vectors and in_fp32 and num_rows(x) * outputs >= MIN_NUMBERS


def _example(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    width, outputs, rows = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (width,), (width,), (outputs, width), (outputs,))
    x, weight, bias, w, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias, w / width**0.5, b, 1e-6, dtype == torch.bfloat16


def _example_sum(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    _, outputs, rows = sizes
    y, _, _, w, b, _, in_bf16 = _example(dtype, sizes)
    return torch.randn(rows, outputs, generator=torch.Generator().manual_seed(1)), y.to(dtype), w, b, in_bf16


def _example_mlp(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    width, hidden, _ = sizes
    x, weight, bias, w1, b1, eps, in_bf16 = _example(dtype, sizes)
    w2 = torch.randn(width, hidden, generator=torch.Generator().manual_seed(1)) / hidden**0.5
    return x, weight, bias, w1, b1, w2, bias, eps, in_bf16


def _grid(factor: int) -> list[tuple[int, ...]]:
    return [(width, factor * width, rows) for width in (32, 48, 128) for rows in (1024, 8192)]


_BOTH = (torch.float32, torch.bfloat16)

norm_linear = Operator(
    "norm_linear", "*D D D FD F", {"torch": norm_then_linear, "numba": _norm_linear},
    accepts=lambda x, weight, bias, w, b, eps, in_bf16: x.dtype == torch.float32 and _fits(x, w, weight, bias, b),
    sizes=lambda x, weight, bias, w, *rest: (x.shape[-1], len(w), num_rows(x)), dtype=format_of,
    example=_example, grid=_grid(3), dtypes=_BOTH, unmeasured=lambda dtype, trains: ("torch",),
)  # fmt: skip

add_linear = Operator(
    "add_linear", "*F *D FD F", {"torch": linear_then_sum, "numba": _add_linear},
    accepts=lambda x, y, w, b, in_bf16: x.dtype == torch.float32 and _fits(y, w, b)
    and y.dtype == (torch.bfloat16 if in_bf16 else torch.float32),
    sizes=lambda x, y, w, *rest: (y.shape[-1], len(w), num_rows(y)), dtype=format_of,
    example=_example_sum, grid=_grid(1), dtypes=_BOTH, unmeasured=lambda dtype, trains: ("torch",),
)  # fmt: skip

norm_mlp = Operator(
    "norm_mlp", "*D D D FD F DF D", {"torch": norm_then_mlp, "numba": _norm_mlp},
    accepts=lambda x, weight, bias, w1, b1, w2, b2, eps, in_bf16: x.dtype == torch.float32
    and _fits(x, w1, weight, bias, b1, w2, b2, multiple=PANEL),
    sizes=lambda x, weight, bias, w1, *rest: (x.shape[-1], len(w1), num_rows(x)), dtype=format_of,
    example=_example_mlp, grid=_grid(4), dtypes=_BOTH, unmeasured=lambda dtype, trains: ("torch",),
)  # fmt: skip
