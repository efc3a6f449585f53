"""Our functions as operators of torch, which its autograd, compiler and counters see as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Operator:
    """As `torch.library.custom_op`, but the first call does not import torch's compiler, which takes a second."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that gives results of the right shapes, without their numbers."""
        torch.library.register_fake(self.name, function)
        return function

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


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
    last = sum((size - 1) * line for size, line in zip(x.shape, x.stride(), strict=True))
    flat = x.detach().as_strided((last + 1,), (1,))
    return (flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat).numpy()
