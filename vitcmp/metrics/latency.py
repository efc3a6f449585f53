"""How long a call takes: interleaved, in shuffled rounds, synchronised, every sample kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from vitcmp.machine import synchronize

WARM_UP = 3
SHORTEST_S = 2e-3
"""A sample lasts at least this long: a quicker call is repeated within the sample."""


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds a call, `rounds` samples each.

    Every round takes one sample of each call, in a new random order, so that a machine that slows down or speeds up
    does so for all alike.
    """
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffler, names = random.Random(seed), list(calls)
    for _ in range(rounds):
        shuffler.shuffle(names)
        for name in names:
            samples[name].append(_sample_ms(calls[name], repeats[name], device))
    return samples


def _repeats(call: Callable[[], object], device: torch.device) -> int:
    """How often to call within a sample; also the warm-up."""
    slowest = min(_sample_ms(call, 1, device) for _ in range(WARM_UP))
    return max(1, int(SHORTEST_S * 1e3 / max(slowest, 1e-6)))


def _sample_ms(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / repeats


def median_and_iqr(samples: list[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles."""
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return float(middle), float(high - low)
