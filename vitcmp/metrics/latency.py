"""How long a call takes: in interleaved, shuffled rounds, synchronised, until the median is known; all samples kept."""

from __future__ import annotations

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from vitcmp.machine import synchronize
from vitcmp.metrics.statistics import median_interval, paired_ratio

SHORTEST_S = 2e-3
"""A sample lasts at least this long: a quicker call is repeated within the sample."""


@dataclass(frozen=True)
class Plan:
    """When enough samples of a cell were taken."""

    rounds: int = 15
    """Samples of a cell before its median may count as known."""
    max_seconds: float = 2.0
    """What the samples of a cell may take; the last may end beyond it."""
    most_rounds: int = 200
    """Samples of a cell at which it ends in any case."""
    settle: float = 0.02
    """A median is known when its 95 % interval lies within this fraction of it, to both sides."""
    fewest: int = 10
    """Samples that are taken whatever they cost: with 10 rounds, the quickest of 25 can still be told from the rest."""


class CellLost(Exception):
    """What a cell's sample raises when the cell gives no more of them."""

    def __init__(self, status: Literal["failed", "oom", "timeout"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Measured(NamedTuple):
    """The samples of the cells that went through, and what became of the others."""

    samples: dict[str, list[float]]
    lost: dict[str, CellLost]


def measure(
    sample: Callable[[str], float],
    names: Sequence[str],
    plan: Plan,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Samples of every name, in ms a call, in order of the rounds; `sample` takes one, `clock` tells seconds.

    Every round takes one sample of each name, in a new random order: a machine that slows down or speeds up does so for
    all alike, and two copies of one cell differ by chance only. The rounds end for all together, when every median is
    known, so that medians of one group are of the same time; only a cell at its cap ends before. A cell is judged by
    its own median, never by a difference, and not after every round, so that stopping does not favour a verdict.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    lost: dict[str, CellLost] = {}
    known: set[str] = set()
    shuffler, waiting = random.Random(seed), list(samples)
    while not known.issuperset(waiting):
        shuffler.shuffle(waiting)
        for name in waiting:
            start = clock()
            try:
                samples[name].append(sample(name))
            except CellLost as loss:
                lost[name] = loss
                del samples[name]
            seconds[name] += clock() - start
        waiting = [name for name in waiting if name in samples and not _at_cap(samples[name], seconds[name], plan)]
        known |= {name for name in waiting if len(samples[name]) in _looks(plan) and settled(samples[name], plan)}
    return Measured(samples, lost)


def _at_cap(samples: Sequence[float], seconds: float, plan: Plan) -> bool:
    return len(samples) >= plan.most_rounds or (len(samples) >= plan.fewest and seconds >= plan.max_seconds)


@functools.cache
def _looks(plan: Plan) -> frozenset[int]:
    """The numbers of samples at which the interval is looked at: each a third above the last."""
    looks = [max(plan.rounds, plan.fewest)]
    while looks[-1] < plan.most_rounds:
        looks.append(math.ceil(looks[-1] * 4 / 3))
    return frozenset(looks)


def settled(samples: Sequence[float], plan: Plan) -> bool:
    """Whether the median is known as well as the plan asks."""
    return _half_width(samples) <= plan.settle


def _half_width(samples: Sequence[float]) -> float:
    """How far the interval of the median reaches from it to the farther side, as a fraction."""
    low, high = median_interval(samples)
    middle = float(np.median(samples))
    return max(high - middle, middle - low) / middle


def noise_floor(samples: Sequence[float], twin: Sequence[float]) -> float:
    """The difference, as a fraction, that two copies of one mechanism showed: below it, nothing can be told."""
    return abs(paired_ratio(samples, twin).value - 1)


def instability(samples: Sequence[float], plan: Plan) -> list[str]:
    """What makes the samples doubtful, and what to do about it, a line each."""
    low, middle, high = np.percentile(samples, [25, 50, 75])
    third = max(1, len(samples) // 3)
    drift = float(np.median(samples[-third:]) / np.median(samples[:third]) - 1)
    notes = []
    if not settled(samples, plan):
        notes.append(
            f"the median is known to +-{_half_width(samples):.1%} only: "
            f"give it {'more --rounds' if len(samples) >= plan.most_rounds else 'longer with --max-seconds'}, "
            "or close other programs"
        )
    if abs(drift) > 0.1:
        notes.append(f"the latency drifted by {drift:+.0%} during the run: let the machine settle and repeat")
    if (high - low) / middle > 0.2:
        notes.append(f"half of the samples spread over {(high - low) / middle:.0%}: close other programs")
    return notes


@dataclass(frozen=True)
class Call:
    """What is timed, and what must be done, untimed, before each sample of it.

    `run` may be called several times after one `prepare`.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


class Timer:
    """Takes samples of one call on one device; warms it up when it is made."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call = call
        self.device = device
        self.warm_up()
        self.repeats = self._enough()
        """Calls in a sample."""

    def warm_up(self, most: int = 30, seconds: float = 1.0) -> None:
        """Call until three samples in a row differ by less than 5 %, or `most` calls or `seconds` are spent.

        The first call, which may compile, does not count towards the seconds; at least one follows it.
        """
        taken = [self._sample_ms(1)]
        start = time.perf_counter()
        while len(taken) < most:
            taken.append(self._sample_ms(1))
            if time.perf_counter() - start > seconds:
                return
            last = taken[-3:]
            if len(last) == 3 and max(last) < 1.05 * min(last):
                return

    def sample_ms(self) -> float:
        """Milliseconds a call, over as many calls as last 2 ms."""
        return self._sample_ms(self.repeats)

    def cold_ms(self) -> float:
        """Milliseconds of one call on CUDA whose inputs lie in no cache: a buffer twice the L2's size is written first.

        The work on the device alone where the host asks for it quicker than the buffer is written.
        """
        if self.call.prepare:
            self.call.prepare()
        self._flush.zero_()
        return self._elapsed_ms(1)

    def _enough(self) -> int:
        """How often to call so that a sample is long enough for the clock; sized by samples of that very length."""
        repeats = 1
        while (total := self._sample_ms(repeats) * repeats / 1e3) < SHORTEST_S:
            # A bit more than it takes, so that a quicker moment does not ask for another step.
            repeats = max(repeats + 1, min(10 * repeats, math.ceil(1.1 * repeats * SHORTEST_S / max(total, 1e-9))))
        return repeats

    def _sample_ms(self, repeats: int) -> float:
        if self.call.prepare:
            self.call.prepare()
        synchronize(self.device)
        with _no_collection():
            return self._elapsed_ms(repeats)

    def _elapsed_ms(self, repeats: int) -> float:
        run = self.call.run
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            for _ in range(repeats):
                run()
            end.record(stream)
            end.synchronize()
            return begin.elapsed_time(end) / repeats
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3 / repeats

    @functools.cached_property
    def _flush(self) -> torch.Tensor:
        size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        return torch.empty(size, dtype=torch.uint8, device=self.device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector of cycles does not run inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds a call, exactly `rounds` samples each, interleaved as in `measure`."""
    timers = {name: Timer(Call(run), device) for name, run in calls.items()}
    plan = Plan(rounds=rounds, most_rounds=rounds, fewest=rounds, max_seconds=math.inf)
    return measure(lambda name: timers[name].sample_ms(), list(timers), plan, seed).samples


def median_and_iqr(samples: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles."""
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return float(middle), float(high - low)
