"""How functions are compiled by numba, where the result is kept, and how a compiled function runs on several threads.

A kernel that threads share is written twice: the work, `inner`, whose last two arguments say from where to where, and
its `kernel`, which hands it out:

    @inner
    def _double(x, out, first, last):
        for i in range(first, last):
            out[i] = 2 * x[i]

    @kernel
    def double(team, *args):
        in_parts(_double, team, args)

`threads.share_out(double, len(x), threads, x, out)` calls it. The threads run no Python: a thread that waits for
Python's lock wakes up too late for work of a tenth of a millisecond.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import config, njit, types
from numba.extending import intrinsic

from vitcmp.kernels.numba._numba import (
    ConfigStack,
    cgutils,
    compile_internal,
    excinfo_ptr_t,
    host_cpu,
    ir,
    optimised,
    return_error,
    signature,
    versions,
)

# Sums may be reordered. Not `nnan`, `ninf`: a diverging model must show.
options: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "no_cfunc_wrapper": True,
}  # fmt: skip
inner: Any = functools.partial(njit, **options | {"no_cpython_wrapper": True})


def digest_of(folder: Path) -> str:
    """16 hex digits of all kernels' sources: a kernel is made of several files, of which numba looks at one alone."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder a state of the sources, under NUMBA_CACHE_DIR or the user's cache."""
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "vitcmp" / "kernels" / digest_of(Path(__file__).parent)


CACHE = cache_folder()


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """numba's setting of where it keeps what it compiles, put back afterwards: other code has a cache of its own."""
    before = config.CACHE_DIR  # type: ignore[attr-defined]
    config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]


LEVEL = 2
"""Of optimisation: entmax is up to 1.2 times as fast as at numba's own level, 3, and the others are as fast."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled at its first call, and kept in `CACHE` where that can be written."""
    try:
        with _kept_in(CACHE):
            found = njit(function, **options, cache=True)
    except RuntimeError:
        found = njit(function, **options)
    compile_at_its_own_level = found.compile

    def compile(types: Any) -> Any:
        with optimised(LEVEL):
            return compile_at_its_own_level(types)

    found.compile = compile  # type: ignore[method-assign, assignment]
    return found


@intrinsic
def in_parts(typing, work, team, args):  # type: ignore[no-untyped-def]
    """`work(*args, first, last)` for ranges that make up a whole, on several threads.

    `team` is (address of OpenMP's GOMP_parallel, threads, first, last, size of a range); without an address, this
    thread does all at once. Raises: what `work` raised in one of the threads, which ends all of them.
    """
    place, byte, number = ir.IntType(64), ir.IntType(8), ir.IntType(32)
    pointer, nothing = byte.as_pointer(), ir.VoidType()
    of_work = signature(types.none, *args.types, types.intp, types.intp)

    def build(context, builder, sig, values):  # type: ignore[no-untyped-def]
        # In the kernel's own library: one of its own would be optimised and translated apart, for nothing.
        flags = ConfigStack().top().copy()
        flags.no_compile = flags.no_cpython_wrapper = True
        library, function = context.active_code_library, work.dispatcher.py_func
        found = compile_internal(
            context.typing_context, context, library, function, of_work.args, of_work.return_type, flags, {}
        ).fndesc
        address, threads, first, last, size = cgutils.unpack_tuple(builder, values[1], 5)
        # What the threads share: where the next range begins, the end, a range's size, the code and the description of
        # what one of them raised, arguments.
        shared = ir.LiteralStructType([place, place, place, number, excinfo_ptr_t, values[2].type])
        mine = cgutils.alloca_once(builder, shared)
        for slot, value in enumerate((first, last, size, number(0), excinfo_ptr_t(None), values[2])):
            builder.store(value, cgutils.gep_inbounds(builder, mine, 0, slot))

        kind = ir.FunctionType(nothing, [pointer])
        task = ir.Function(builder.module, kind, f"{builder.function.name}.task")
        task.linkage = "internal"
        inside = ir.IRBuilder(task.append_basic_block("entry"))
        ours = inside.bitcast(task.args[0], shared.as_pointer())
        end, step = (inside.load(cgutils.gep_inbounds(inside, ours, 0, slot)) for slot in (1, 2))
        arguments = cgutils.unpack_tuple(inside, inside.load(cgutils.gep_inbounds(inside, ours, 0, 5)), len(args.types))
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
        inside.store(status.code, cgutils.gep_inbounds(inside, ours, 0, 3))
        inside.store(status.excinfoptr, cgutils.gep_inbounds(inside, ours, 0, 4))
        # The others find nothing left to do.
        inside.store(end, cgutils.gep_inbounds(inside, ours, 0, 0))
        inside.branch(done)
        inside.position_at_end(done)
        inside.ret_void()

        data = builder.bitcast(mine, pointer)
        with builder.if_else(cgutils.is_null(builder, address)) as (alone, together):
            with alone:
                builder.call(task, [data])
            with together:
                parallel = ir.FunctionType(nothing, [kind.as_pointer(), pointer, number, number])
                call = builder.inttoptr(address, parallel.as_pointer())
                builder.call(call, [task, data, builder.trunc(threads, number), number(0)])
        code = builder.load(cgutils.gep_inbounds(builder, mine, 0, 3))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, code)):
            raised = builder.load(cgutils.gep_inbounds(builder, mine, 0, 4))
            return_error(context, builder, code, raised)
        return context.get_dummy_value()

    return types.none(work, team, args), build


def environment() -> str:
    """12 hex digits of all beside the sources that a compiled kernel depends on: versions, and the CPU's name."""
    facts = *versions(), config.CPU_NAME or host_cpu(), config.CPU_FEATURES or ""  # type: ignore[attr-defined]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
