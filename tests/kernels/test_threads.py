"""Threads beside each other."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitcmp.kernels import threads
from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.threads import run_beside, share_out


@pytest.fixture(params=["torch's", "own"])
def _threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "own":
        monkeypatch.setattr(threads, "_openmp", lambda: None)


@inner
def _count(done, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        done[i] += 1


@kernel
def count(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_count, team, args)


@inner
def _ask(bytes_, first, last):  # type: ignore[no-untyped-def]
    for _ in range(first, last):
        np.empty(bytes_, np.uint8)[0] = 1


@kernel
def ask(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_ask, team, args)


@pytest.mark.usefixtures("_threads_of")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 7, 37, 1000])
def test_parts_are_done_once_each(size: int, threads: int) -> None:
    done = np.zeros(size + 1)
    share_out(count, size, threads, done)
    assert done.tolist() == [1] * size + [0]


@pytest.mark.usefixtures("_threads_of")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_without_memory_says_so(threads: int) -> None:
    with pytest.raises(MemoryError):
        share_out(ask, 8, threads, 1 << 60)


@inner
def _refuse(limit, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        if i > limit:
            raise ValueError("beyond the limit")


@kernel
def refuse(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_refuse, team, args)


@pytest.mark.usefixtures("_threads_of")
@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_kernel_raises_is_raised(threads: int) -> None:
    share_out(refuse, 8, threads, 7)
    with pytest.raises(ValueError, match="beyond the limit"):
        share_out(refuse, 8, threads, 5)


@pytest.mark.usefixtures("_threads_of")
def test_work_is_done_by_several_threads() -> None:
    by, started = set(), threading.Barrier(3)

    def work() -> None:
        started.wait(timeout=20)
        by.add(threading.get_ident())

    run_beside(work, threads=3)
    assert len(by) == 3


@pytest.mark.usefixtures("_threads_of")
def test_an_error_in_a_thread_is_raised() -> None:
    started = threading.Barrier(2)

    def work() -> None:
        started.wait(timeout=20)
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("in a thread")

    with pytest.raises(KeyError, match="in a thread"):
        run_beside(work, threads=2)


def count_in_child(queue: Any) -> None:
    done = np.zeros(8)
    share_out(count, 8, 2, done)
    queue.put(done.tolist())


def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    share_out(count, 8, 2, np.zeros(8))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=count_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [1] * 8
    finally:
        child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP is the one of torch on Linux")
def test_torchs_threads_are_found() -> None:
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch has another OpenMP")
    torch.zeros(1)
    assert threads._openmp() is not None
