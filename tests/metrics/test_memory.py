"""Peak memory, in processes of their own: what a process freed before, it uses again unseen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitcmp.metrics.memory import PeakMemory

MEASURE = """
import torch
from vitcmp.metrics.memory import PeakMemory

torch.ones(2**20).add(1)
before = torch.ones(300 * 2**18)
del before
peak = PeakMemory(torch.device("cpu"))
kept = torch.ones(16 * 2**18)
for mib in {mib}:
    torch.ones(mib * 2**18)
print(peak.mib())
"""


def known() -> bool:
    return PeakMemory(torch.device("cpu")).mib() is not None


@pytest.mark.skipif(not known(), reason="this system does not tell a process's peak memory")
@pytest.mark.parametrize(("mib", "wanted"), [((128, 64), 144), ((32, 32, 32), 48)])
def test_the_peak_is_that_of_what_was_held_at_once(mib: tuple[int, ...], wanted: int) -> None:
    code = MEASURE.format(mib=mib)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(wanted, abs=8)


def test_other_devices_are_unknown() -> None:
    assert PeakMemory(torch.device("mps")).mib() is None
