"""All that vitcmp uses of torch beyond what its documentation promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.modules import module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "TorchDispatchMode", "add_all", "constant_when_compiled", "forget_compiled", "has_global_hooks", "is_watched",
    "keep_compiled_buffers", "transforms_are_active", "tree_leaves",
]  # fmt: skip


Function = TypeVar("Function", bound=Callable[..., Any])


def is_watched() -> bool:
    """Whether a mode (a counter of operations is one), a transform or the profiler sees each operation."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transforms_are_active()
        or torch.autograd.profiler._is_profiler_enabled
    )


def transforms_are_active() -> bool:
    """Whether torch.func (vmap, grad, ...) is at work."""
    return torch._C._are_functorch_transforms_active()


def constant_when_compiled(function: Function) -> Function:
    """The function, called once while torch.compile traces, its result taken as a constant.

    As `torch.compiler.assume_constant_result`, which imports the compiler, a second's work, to set this mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_global_hooks() -> bool:
    """Whether someone listens to the calls of all modules."""
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or module._global_backward_hooks
        or module._global_backward_pre_hooks
    )


def add_all(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of two lists, in new tensors: what autograd returns may be one tensor for two parameters."""
    return list(torch._foreach_add(a, b))


def keep_compiled_buffers() -> None:
    """Let a compiled backward pass be called more than once."""
    from torch._functorch import config

    config.donated_buffer = False


def forget_compiled() -> None:
    """Drop all that torch.compile has compiled in this process."""
    torch._dynamo.reset()
