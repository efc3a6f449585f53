"""Threads that compute beside each other, each with a share of torch's threads for its own operations."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


def pool(threads: int, each: int = 1) -> ThreadPoolExecutor:
    """`threads` threads whose operations are of `each` threads; a forked child gets its own."""
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
