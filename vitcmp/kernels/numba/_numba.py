"""All that the kernels use of numba and llvmlite beyond what their documentation promises.

A new version of either may move these; then importing this module fails, and every operator runs its reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]
from llvmlite.binding import get_host_cpu_name as host_cpu
from numba.core import cgutils, config
from numba.core.callconv import excinfo_ptr_t
from numba.core.compiler import compile_internal
from numba.core.registry import cpu_target
from numba.core.targetconfig import ConfigStack
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

__all__ = [
    "AbstractTemplate", "ConfigStack", "cgutils", "compile_internal", "excinfo_ptr_t", "get_host_cpu_features",
    "host_cpu", "infer_global", "ir", "optimised", "return_error", "signature", "versions",
]  # fmt: skip


def return_error(context, builder, code, raised):  # type: ignore[no-untyped-def]
    """Emits a return with the code and the description of what a function raised that was called before."""
    convention = context.call_conv
    convention.return_status_propagate(builder, convention._get_return_status(builder, code, raised))


@contextmanager
def optimised(level: int) -> Iterator[None]:
    """numba's level of optimisation for what is compiled meanwhile, put back afterwards."""
    cpu_target.target_context  # noqa: B018  made now, at the process's own level, which later code keeps
    before = config.OPT  # type: ignore[attr-defined]
    config.OPT = type(before)(level)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config.OPT = before  # type: ignore[attr-defined]


def versions() -> tuple[str, str, str]:
    """Of numba, llvmlite and NumPy."""
    return numba.__version__, llvmlite.__version__, numpy.__version__
