"""The machine's ceilings, and what they say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from vitcmp.metrics import roofline
from vitcmp.metrics.roofline import Ceilings

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ceilings_of_this_machine_are_plausible(dtype: torch.dtype) -> None:
    found = roofline.ceilings(CPU, dtype)
    # A CPU without the format in hardware still manages a tenth of a billion; none has 100,000 or copies 10 TB/s.
    assert 0.1 < found.gflop_s < 1e5
    assert 0.5 < found.copy_gb_s < 1e4
    assert roofline.ceilings(CPU, dtype) is found


def best_so_far(call: Callable[[], object]) -> Iterator[tuple[Ceilings, float]]:
    """Ceilings and seconds of a call, twelve times: what runs beside them comes and goes, and only slows them down."""
    peak, seconds = Ceilings(0.0, 0.0), math.inf
    for _ in range(12):
        found = roofline.ceilings.__wrapped__(CPU, torch.float32)
        peak = Ceilings(max(peak.gflop_s, found.gflop_s), max(peak.copy_gb_s, found.copy_gb_s))
        seconds = min(seconds, roofline.best_s(call, CPU))
        yield peak, seconds


@pytest.mark.usefixtures("one_thread")
def test_a_large_product_reaches_the_ceiling() -> None:
    a, b = torch.randn(2, 768, 768)
    for peak, seconds in best_so_far(lambda: a @ b):
        if 0.6 < roofline.fraction_of_peak(2 * 768**3 / 1e9, 1000 * seconds, peak) < 1.2:
            return
    pytest.fail(f"a product took {seconds} s under {peak}")


def test_a_sum_of_vectors_is_held_back_by_memory() -> None:
    x, y, total = torch.ones(3, 2**25)
    for peak, seconds in best_so_far(lambda: torch.add(x, y, out=total)):
        attainable = roofline.attainable_gflop_s(1 / 12, peak)
        if 0.3 * attainable < x.numel() / seconds / 1e9 < 2 * attainable < 0.5 * peak.gflop_s:
            return
    pytest.fail(f"a sum took {seconds} s under {peak}")


def test_the_roof_by_hand() -> None:
    peak = Ceilings(gflop_s=200.0, copy_gb_s=20.0)
    assert [roofline.attainable_gflop_s(i, peak) for i in (0.5, 10, 40)] == [10, 200, 200]
    assert roofline.achieved_gflop_s(work_gflop=3.0, latency_ms=20.0) == 150
    assert roofline.fraction_of_peak(3.0, 20.0, peak) == 0.75


def test_the_best_of_several_calls() -> None:
    durations = iter([0.2, 0.03, 0.05, 0.1, 0.03, 0.04, 0.03, 0.03, 0.2])
    assert roofline.best_s(lambda: time.sleep(next(durations)), CPU) == pytest.approx(0.03, abs=0.005)
