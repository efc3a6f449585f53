"""LayerNorm and what follows it, a linear layer or an MLP, in one pass on the CPU.

torch takes many: each operation writes its result to memory, from where the next one reads it; under autocast, once
more in bf16. The values are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp import machine
from vitcmp.attention._kernels.operators import differentiable, operator
from vitcmp.attention._kernels.threads import share_out
from vitcmp.models._fused import MIN_NUMBERS, autocasts, can_compile, empty_rows, flat, num_rows

MAX_WEIGHTS = 2**16
"""Weights of a linear layer beyond which they do not stay in a core's cache."""
WIDE_VECTORS = {in_bf16: machine.has_wide_vectors(in_bf16) for in_bf16 in (False, True)}
"""By number format; a constant, as torch's compiler would trace how it is found."""


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, multiple: int = 16) -> bool:
    """Whether one pass is the quickest for LayerNorm of x and a layer of this weight, [F, D]."""
    outputs, width = weight.shape
    has_sizes = width % 16 == 0 == outputs % multiple and weight.numel() <= MAX_WEIGHTS
    is_plain = x.dtype == torch.float32 and can_compile(x, weight) and (bias is None or bias.dtype == torch.float32)
    is_large = x.numel() // width * outputs >= MIN_NUMBERS
    return has_sizes and is_plain and is_large and WIDE_VECTORS[autocasts()]


@operator("vitcmp::norm_linear")
def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, w: Tensor, b: Tensor | None, in_bf16: bool
) -> Tensor:
    """W LayerNorm(x) + b for x of [..., D] in fp32 and W of [F, D]; the product and the result in fp32 or bf16."""
    out, (w,) = _linear_result(x, weight, bias, eps, w, b, in_bf16), _in_format(in_bf16, w)
    _run("linear", x, w, x, weight, bias, eps, w, x.new_zeros(len(w)) if b is None else b, out)
    return out


@norm_linear.register_fake
def _linear_result(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, w: Tensor, b: Tensor | None, in_bf16: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(w), dtype=torch.bfloat16 if in_bf16 else torch.float32)


@operator("vitcmp::norm_linear_backward")
def _linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, w: Tensor, in_bf16: bool
) -> list[Tensor]:
    """Gradients of x, the norm's weight and bias, w and b."""
    dx, (columns, width), (w,) = empty_rows(x), w.shape, _in_format(in_bf16, w)
    sizes = [w.numel(), columns, width, width]
    dw, db, dweight, dbias = _run_backward("linear_backward", sizes, x, w, dout, x, weight, bias, eps, w, dx)
    return [dx, dweight, dbias, dw.view(width, columns).t().contiguous(), db]


@_linear_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, w: Tensor, in_bf16: bool) -> list[Tensor]:
    return [*map(empty_rows, (x, weight, bias, w)), w.new_empty(len(w))]


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, w, b, ctx.in_bf16 = inputs
    ctx.save_for_backward(x, weight, bias, w, b)


def _differentiate_linear(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, w, b = ctx.saved_tensors
    if torch.is_grad_enabled():

        def plain(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return F.linear(F.layer_norm(x, weight.shape, weight, bias, ctx.eps), w, b).to(dout.dtype)

        found = differentiable(plain, (x, weight, bias, w, b), dout)
    else:
        found = tuple(_linear_backward(dout, x, weight, bias, ctx.eps, w, ctx.in_bf16))
    return *found[:3], None, found[3], found[4] if b is not None else None, None


norm_linear.register_autograd(_differentiate_linear, setup_context=_keep_linear)


@operator("vitcmp::add_linear")
def add_linear(x: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x + W y + b for x of [..., F] in fp32, y of [..., D] in fp32 or bf16, the product's format, and W of [F, D]."""
    out = empty_rows(x)
    _run("add_linear", y, w, x, y, w.to(y.dtype), x.new_zeros(len(w)) if b is None else b, out)
    return out


@add_linear.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return empty_rows(x)


@operator("vitcmp::add_linear_backward")
def _add_backward(dout: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    """Gradients of y, w and b."""
    dy, (columns, width) = empty_rows(y), w.shape
    dw, db = _run_backward("add_linear_backward", [w.numel(), columns], y, w, dout, y, w.to(y.dtype), dy)
    return [dy, dw.view(width, columns).t().contiguous(), db]


@_add_backward.register_fake
def _(dout: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    return [empty_rows(y), empty_rows(w), w.new_empty(len(w))]


def _keep_added(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, w, b = inputs
    ctx.save_for_backward(y, w, b)


def _differentiate_added(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, w, b = ctx.saved_tensors
    if torch.is_grad_enabled():
        plain = lambda y, w, b: F.linear(y.float(), w, b)  # noqa: E731
        return dout, *differentiable(plain, (y, w, b), dout)
    dy, dw, db = _add_backward(dout, y, w)
    return dout, dy, dw, db if b is not None else None


add_linear.register_autograd(_differentiate_added, setup_context=_keep_added)


@operator("vitcmp::norm_mlp")
def norm_mlp(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, in_bf16: bool
) -> Tensor:
    """x + W2 GELU(W1 LayerNorm(x) + b1) + b2 for x of [..., D] in fp32, W1 of [F, D]; products in fp32 or bf16."""
    out, (w1, w2) = empty_rows(x), _in_format(in_bf16, w1, w2)
    _run("mlp", x, w1, x, weight, bias, eps, w1, b1, w2, b2, out)
    return out


@norm_mlp.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return empty_rows(x)


@operator("vitcmp::norm_mlp_backward")
def _mlp_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, w1: Tensor, b1: Tensor, w2: Tensor, in_bf16: bool
) -> list[Tensor]:
    """Gradients of x, the norm's weight and bias, w1, b1, w2 and b2."""
    dx, (hidden, width), (w1, w2) = empty_rows(x), w1.shape, _in_format(in_bf16, w1, w2)
    sizes = [w1.numel(), w2.numel(), hidden, width, width, width]
    dw1, dw2, db1, db2, dweight, dbias = _run_backward(
        "mlp_backward", sizes, x, w1, dout, x, weight, bias, eps, w1, b1, w2, dx
    )  # fmt: skip
    return [dx, dweight, dbias, dw1.view(width, hidden).t().contiguous(), db1, dw2.view(width, hidden), db2]


@_mlp_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, w1: Tensor, b1: Tensor, w2: Tensor, in_bf16: bool
) -> list[Tensor]:
    return [*map(empty_rows, (x, weight, bias, w1, b1, w2, weight))]


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, *matrices, ctx.in_bf16 = inputs
    ctx.save_for_backward(x, weight, bias, *matrices)


def _differentiate_mlp(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, w1, b1, w2, _ = ctx.saved_tensors
    if torch.is_grad_enabled():

        def plain(x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            normal = F.layer_norm(x, weight.shape, weight, bias, ctx.eps)
            return x + F.linear(F.gelu(F.linear(normal, w1, b1)), w2, b2)

        found = differentiable(plain, ctx.saved_tensors, dout)
    else:
        found = tuple(_mlp_backward(dout, x, weight, bias, ctx.eps, w1, b1, w2, ctx.in_bf16))
    return *found[:3], None, *found[3:], None


norm_mlp.register_autograd(_differentiate_mlp, setup_context=_keep_mlp)


def _register_flops(name: str, x_place: int, w_place: int, products: int) -> None:
    @register_flop_formula(getattr(torch.ops.vitcmp, name))
    def flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """Those of as many products of all rows with a matrix."""
        return 2 * products * math.prod(shapes[x_place]) * shapes[w_place][0]


for _args in (
    ("norm_linear", 0, 4, 1), ("norm_linear_backward", 1, 5, 2), ("add_linear", 1, 2, 1),
    ("add_linear_backward", 1, 2, 2), ("norm_mlp", 0, 4, 2), ("norm_mlp_backward", 1, 5, 5),
):  # fmt: skip
    _register_flops(*_args)


def _in_format(in_bf16: bool, *weights: Tensor) -> list[Tensor]:
    return [w.bfloat16() if in_bf16 else w for w in weights]


def _run(kernel: str, x: Tensor, w: Tensor, *args: Tensor | float) -> None:
    """A kernel of `_normed_cpu` for all rows of x and a first matrix like w."""
    from vitcmp.models import _normed_cpu as cpu

    (columns, width), rows, block = w.shape, num_rows(x), cpu.block_of(w.numel())
    count = cpu.PARTS if kernel.endswith("backward") else cpu.blocks(rows, block)
    arrays = (flat(y) if isinstance(y, Tensor) else y for y in args)
    share_out(getattr(cpu, kernel), count, torch.get_num_threads(), *arrays, width, columns, rows, block)


def _run_backward(kernel: str, sizes: list[int], x: Tensor, w: Tensor, *args: Tensor | float) -> tuple[Tensor, ...]:
    """The same; returns its sums over rows, of these sizes."""
    from vitcmp.models import _normed_cpu as cpu

    sums = x.new_empty(cpu.PARTS, sum(sizes), dtype=torch.float32)
    _run(kernel, x, w, *args, sums)
    return sums.sum(dim=0).split(sizes)
