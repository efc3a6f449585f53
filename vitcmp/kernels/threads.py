"""Threads that compute beside each other."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def pool(threads: int, each: int = 1) -> ThreadPoolExecutor:
    """`threads` threads, each with `each` threads for torch's operations; a forked child gets its own."""
    return _pool(threads, each, os.getpid())


@cache
def _pool(threads: int, each: int, process: int) -> ThreadPoolExecutor:
    total = torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # else torch would take the others' number at this thread's first operation
        torch.set_num_threads(each)

    executor = ThreadPoolExecutor(threads, thread_name_prefix="vitcmp", initializer=begin)
    started = Barrier(threads)
    list(executor.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(total)
    return executor


def run_beside(work: Callable[[], None], threads: int) -> None:
    """`work()` on this thread and `threads` - 1 others; torch's operations in it have one thread.

    The others are torch's own where these are OpenMP's of GCC: for a while after an operation they wait for the next
    at full speed, and threads beside them would have to share the processor.
    """
    errors: list[BaseException] = []

    def call(_: object = None) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    openmp = _openmp()
    if threads > 1 and openmp is not None:
        openmp.GOMP_parallel(_CALLBACK(call), None, ctypes.c_uint(threads), ctypes.c_uint(0))
    else:
        others = [pool(threads - 1).submit(call) for _ in range(threads - 1)]
        call()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


def share_out(kernel: Callable[..., None], count: int, threads: int, *args: Any) -> None:
    """`kernel(team, *args)` (see `compiling`) for 0 to `count`, on `threads` threads."""
    # More parts than threads: where one is held up, the others take its next part.
    size = max(1, -(-count // (1 if threads == 1 else 4 * threads)))
    if threads == 1:
        kernel((0, 1, 0, count, size), *args)
    elif openmp := _openmp():
        address = ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p).value
        kernel((address, threads, 0, count, size), *args)
    else:
        queue = iter(range(0, count, size))

        def work() -> None:
            for first in queue:
                kernel((0, 1, first, min(first + size, count), size), *args)

        run_beside(work, threads)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded, if it is GCC's and its threads are this process's own."""
    # A child forked after its parent came here has none of the threads, but would wait for them.
    return _loaded_openmp() if _first_process() == os.getpid() else None


@cache
def _first_process() -> int:
    return os.getpid()


@cache
def _loaded_openmp() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    folder = str(Path(torch.__file__).parent)  # torch/lib, or torch.libs beside it
    with open("/proc/self/maps") as lines:
        paths = [line.split(maxsplit=5)[-1].strip() for line in lines if "libgomp" in line]
    return next((ctypes.CDLL(path) for path in paths if path.startswith(folder)), None)
