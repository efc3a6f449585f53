"""Threads beside each other."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vitcmp.attention import _threads
from vitcmp.attention._threads import run_beside, share_out


@pytest.fixture(params=["torch's", "own"])
def _threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "own":
        monkeypatch.setattr(_threads, "_openmp", lambda: None)


@pytest.mark.usefixtures("_threads_of")
def test_parts_are_done_once_each_by_several_threads() -> None:
    done, by = [0] * 37, set()

    def task(first: int, last: int) -> None:
        time.sleep(0.01)  # time for the others to come
        by.add(threading.get_ident())
        for i in range(first, last):
            done[i] += 1

    share_out(task, 37, threads=3)
    assert done == [1] * 37
    assert 2 <= len(by) <= 3


@pytest.mark.usefixtures("_threads_of")
def test_an_error_in_a_thread_is_raised() -> None:
    started = threading.Barrier(2)

    def work() -> None:
        started.wait(timeout=20)
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("in a thread")

    with pytest.raises(KeyError, match="in a thread"):
        run_beside(work, threads=2)


def count(queue: Any) -> None:
    done = [0] * 8

    def task(first: int, last: int) -> None:
        for i in range(first, last):
            done[i] += 1

    share_out(task, 8, threads=2)
    queue.put(done)


def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    share_out(lambda first, last: None, 8, threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=count, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [1] * 8
    finally:
        child.kill()


def test_nothing_to_do() -> None:
    share_out(lambda first, last: pytest.fail("called"), 0, threads=2)


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP is the one of torch on Linux")
def test_torchs_threads_are_found() -> None:
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch has another OpenMP")
    torch.zeros(1)
    assert _threads._openmp() is not None
