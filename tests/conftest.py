"""What all tests share: few threads, a results folder of their own, and the folder of real data where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)
# What was measured on one machine must not decide what is tested there.
os.environ["VITCMP_PROFILE"] = "none"


@pytest.fixture(scope="session", autouse=True)
def _results_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITCMP_RESULTS", str(tmp_path_factory.mktemp("results")))
        # For subprocesses: the tests must not occupy the whole machine.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For what two threads slow down where something else holds a core: each step of one waits for the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_dir() -> Path:
    """The folder with the real CIFAR-10 and MNIST."""
    folder = os.environ.get("VITCMP_DATA")
    if not folder:
        pytest.skip("VITCMP_DATA is not set: this test reads the real data set")
    return Path(folder)
