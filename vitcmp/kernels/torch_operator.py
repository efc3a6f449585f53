"""A fast form as an operator of torch, which autograd, the compiler and counters of operations see as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from vitcmp.kernels._torch import is_watched


class TorchOperator:
    """As `torch.library.custom_op`, with two differences.

    The first call does not import torch's compiler, which takes a second. And where none of torch's tools watches, a
    call goes past its dispatcher, whose Python takes as long as a kernel does for an image or two.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.direct = function
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        namespace, short = name.split("::")
        self.packet = getattr(getattr(torch.ops, namespace), short)
        self.overload = self.packet.default

    def __call__(self, *args: Any) -> Any:
        """The operator's result."""
        return (self.overload if _is_seen(args) else self.direct)(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that gives results of the right shapes, without their numbers."""
        torch.library.register_fake(self.name, function)
        return function

    def register_flops(self, formula: Callable[..., int]) -> None:
        """FLOP (2 a multiply-add) of a call: `formula` gets the arguments, shapes in place of tensors."""
        counts = lambda *args, out_shape=None, **kwargs: formula(*args)  # noqa: E731  torch names the keywords
        register_flop_formula(self.packet)(counts)

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

    def register_gradients(
        self, backward: TorchOperator, reference: Callable[..., Tensor], tensors: int, residual: bool = False
    ) -> None:
        """Makes it differentiable, any number of times.

        Its first `tensors` arguments are tensors or None, the others constants. What it returns beside the output is
        for backward: `backward(dout, *tensors, *what else was returned, *constants)` lists the tensors' gradients; with
        `residual`, the output is the first tensor plus something, and the list begins with the second one's.
        Where gradients are to be differentiated again, they come from the reference.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = (output,) if isinstance(output, Tensor) else tuple(output)
            ctx.save_for_backward(*inputs[:tensors], *outputs[1:])
            ctx.constants = inputs[tensors:]
            ctx.set_materialize_grads(False)

        def differentiate(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
            rest = (None,) * len(ctx.constants)
            if dout is None:
                return (None,) * tensors + rest
            saved = ctx.saved_tensors
            if torch.is_grad_enabled():
                again = lambda *inputs: reference(*inputs, *ctx.constants)  # noqa: E731
                return differentiable(again, saved[:tensors], dout) + rest
            gradients = [dout] * residual + backward(dout, *saved, *ctx.constants)
            return *(None if x is None else g for x, g in zip(saved, gradients)), *rest

        self.register_autograd(differentiate, setup_context=setup_context)


def _is_seen(args: tuple[Any, ...]) -> bool:
    """Whether torch's compiler, tracer, profiler or a mode sees the call, or a tensor is no plain one on the CPU."""
    if torch.compiler.is_compiling() or is_watched() or torch.jit.is_tracing():
        return True
    return any(isinstance(x, Tensor) and (type(x) not in (Tensor, Parameter) or x.device.type != "cpu") for x in args)


def torch_operator(name: str) -> Callable[[Callable[..., Any]], TorchOperator]:
    """Makes an operator of a function that changes none of its arguments and returns new tensors."""
    return lambda function: TorchOperator(f"vitcmp::{name}", function)


def differentiable(
    reference: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `reference(*inputs)` by torch alone, for a caller who will differentiate them again."""
    # Aliases, so that an input which was made of another one does not count twice.
    inputs = tuple(None if x is None else x.view_as(x) for x in inputs)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(reference(*inputs), leaves, upstream, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)
