"""All that the kernels use of numba and llvmlite beyond what their documentation promises.

A new version of either may move these; then importing this module fails, and every operator runs its reference.
"""

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]
from llvmlite.binding import get_host_cpu_name as host_cpu
from numba.core import cgutils
from numba.core.callconv import excinfo_ptr_t
from numba.core.compiler import compile_internal
from numba.core.targetconfig import ConfigStack
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

__all__ = [
    "AbstractTemplate", "ConfigStack", "cgutils", "compile_internal", "excinfo_ptr_t", "get_host_cpu_features",
    "host_cpu", "infer_global", "ir", "return_error", "signature", "versions",
]  # fmt: skip


def return_error(context, builder, code, raised):  # type: ignore[no-untyped-def]
    """Emits a return with the code and the description of what a function raised that was called before."""
    convention = context.call_conv
    convention.return_status_propagate(builder, convention._get_return_status(builder, code, raised))


def versions() -> tuple[str, str, str]:
    """Of numba, llvmlite and NumPy."""
    return numba.__version__, llvmlite.__version__, numpy.__version__
