"""How functions are compiled by numba, and how a compiled function runs on several threads.

A kernel that threads share is written twice: the work, `inner`, whose last two arguments say from where to where, and
its `kernel`, which hands it out:

    @inner
    def _double(x, out, first, last):
        for i in range(first, last):
            out[i] = 2 * x[i]

    @kernel
    def double(team, *args):
        in_parts(_double, team, args)

`threads.share_out(double, len(x), threads, x, out)` calls it. Python has no part in what the threads do: those that
wait for its lock wake up too late for work of a tenth of a millisecond.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils, targetconfig
from numba.core.compiler import compile_internal
from numba.core.typing.templates import signature
from numba.extending import intrinsic

# Sums may be reordered. Not `nnan`, `ninf`: a diverging model must show.
options: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "no_cfunc_wrapper": True,
}  # fmt: skip
inner: Any = functools.partial(njit, **options | {"no_cpython_wrapper": True})


def forget_stale(package: Path) -> None:
    """Lets go of kernels cached in a checkout before its newest change to what they are made of.

    numba looks at the file of the kernel alone, and neither at others nor at the level of optimisation.
    """
    sources = [*package.glob("attention/_kernels/*.py"), *package.glob("models/_*_cpu.py")]
    newest = max(path.stat().st_mtime for path in sources)
    for folder in {path.parent for path in sources}:
        for index in folder.glob("__pycache__/*.nbi"):
            with contextlib.suppress(OSError):  # another process did, or this one may not
                if index.stat().st_mtime < newest:
                    index.unlink()


forget_stale(Path(__file__).parents[2])


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled at its first call, and cached where numba finds a folder that it may write to."""
    try:
        return njit(function, **options, cache=True)
    except RuntimeError:
        return njit(function, **options)


@intrinsic
def in_parts(typing, work, team, args):  # type: ignore[no-untyped-def]
    """`work(*args, first, last)` for ranges that make up a whole, on several threads.

    `team` is (address of OpenMP's GOMP_parallel, threads, first, last, size of a range); without an address, this
    thread does all at once. Raises: MemoryError if any thread lacked memory.
    """
    place, byte, count = ir.IntType(64), ir.IntType(8), ir.IntType(32)
    pointer, nothing = byte.as_pointer(), ir.VoidType()
    of_work = signature(types.none, *args.types, types.intp, types.intp)

    def build(context, builder, sig, values):  # type: ignore[no-untyped-def]
        # In the kernel's own library: one of its own would be optimised and translated apart, for nothing.
        flags = targetconfig.ConfigStack().top().copy()
        flags.no_compile = flags.no_cpython_wrapper = True
        library, function = context.active_code_library, work.dispatcher.py_func
        found = compile_internal(
            context.typing_context, context, library, function, of_work.args, of_work.return_type, flags, {}
        ).fndesc
        address, threads, first, last, size = cgutils.unpack_tuple(builder, values[1], 5)
        # What the threads share: where the next range begins, the end, a range's size, whether one failed, arguments.
        shared = ir.LiteralStructType([place, place, place, count, values[2].type])
        mine = cgutils.alloca_once(builder, shared)
        for number, value in enumerate((first, last, size, count(0), values[2])):
            builder.store(value, cgutils.gep_inbounds(builder, mine, 0, number))

        kind = ir.FunctionType(nothing, [pointer])
        task = ir.Function(builder.module, kind, f"{builder.function.name}.task")
        task.linkage = "internal"
        inside = ir.IRBuilder(task.append_basic_block("entry"))
        ours = inside.bitcast(task.args[0], shared.as_pointer())
        end, step = (inside.load(cgutils.gep_inbounds(inside, ours, 0, number)) for number in (1, 2))
        arguments = cgutils.unpack_tuple(inside, inside.load(cgutils.gep_inbounds(inside, ours, 0, 4)), len(args.types))
        again, go, failed, done = (inside.append_basic_block(name) for name in ("again", "go", "failed", "done"))
        inside.branch(again)
        inside.position_at_end(again)
        begin = inside.atomic_rmw("add", cgutils.gep_inbounds(inside, ours, 0, 0), step, "monotonic")
        inside.cbranch(inside.icmp_signed("<", begin, end), go, done)
        inside.position_at_end(go)
        stop = inside.add(begin, step)
        stop = inside.select(inside.icmp_signed("<", stop, end), stop, end)
        status, _ = context.call_internal_no_propagate(inside, found, of_work, [*arguments, begin, stop])
        inside.cbranch(status.is_error, failed, again)
        inside.position_at_end(failed)
        inside.store(count(1), cgutils.gep_inbounds(inside, ours, 0, 3))
        inside.branch(done)
        inside.position_at_end(done)
        inside.ret_void()

        data = builder.bitcast(mine, pointer)
        with builder.if_else(cgutils.is_null(builder, address)) as (alone, together):
            with alone:
                builder.call(task, [data])
            with together:
                parallel = ir.FunctionType(nothing, [kind.as_pointer(), pointer, count, count])
                call = builder.inttoptr(address, parallel.as_pointer())
                builder.call(call, [task, data, builder.trunc(threads, count), count(0)])
        lacks = cgutils.is_not_null(builder, builder.load(cgutils.gep_inbounds(builder, mine, 0, 3)))
        with cgutils.if_unlikely(builder, lacks):
            context.call_conv.return_user_exc(builder, MemoryError, ("out of memory",))
        return context.get_dummy_value()

    return types.none(work, team, args), build
