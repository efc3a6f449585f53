"""Our functions as operators of torch, which its autograd, compiler and counters see as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter


class Operator:
    """As `torch.library.custom_op`, but the first call does not import torch's compiler, which takes a second.

    And where none of torch's tools looks on, a call goes past its dispatcher, whose Python takes as long as a kernel
    does for an image or two.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.direct = function
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *args: Any) -> Any:
        return (self.overload if observed(args) else self.direct)(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that gives results of the right shapes, without their numbers."""
        torch.library.register_fake(self.name, function)
        return function

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)
        function = self.direct

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                found = function(*args)
                setup_context(ctx, args, found)
                ctx.gives_list = isinstance(found, list)
                return tuple(found) if ctx.gives_list else found

            @staticmethod
            def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
                found = backward(ctx, list(upstream)) if ctx.gives_list else backward(ctx, *upstream)
                # torch.library wants a gradient of each tensor in a list that was given, autograd none of the list.
                return tuple(None if isinstance(x, list) else x for x in found)

        self.direct = Direct.apply


def observed(args: tuple[Any, ...]) -> bool:
    """Whether torch's compiler, tracer or profiler, a mode (a counter of operations is one) or a transform looks on,

    or one of these is no plain tensor in memory.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._are_functorch_transforms_active() or torch.autograd.profiler._is_profiler_enabled:
        return True
    if torch.jit.is_tracing():
        return True
    return any(isinstance(x, Tensor) and (type(x) not in (Tensor, Parameter) or x.device.type != "cpu") for x in args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an operator of a function that changes none of its arguments and returns new tensors."""
    return lambda function: Operator(name, function)


def differentiable(
    plain: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `plain(*inputs)` by torch alone, for who will differentiate them again."""
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(plain(*inputs), leaves, upstream, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


def memory(x: Tensor) -> np.ndarray:
    """The memory from the first to the last number of a tensor, for a kernel; bf16 as int16."""
    flat = x.detach()
    if not x.is_contiguous():
        last = sum((size - 1) * line for size, line in zip(x.shape, x.stride(), strict=True))
        flat = flat.as_strided((last + 1,), (1,))
    return (flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat).numpy().reshape(-1)
