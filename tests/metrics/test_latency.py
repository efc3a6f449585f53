"""The protocol, in simulation on recorded noise and for real.

The noise is that of `benchmarks/record_noise.py`: the durations of constant work on two cores of a virtual machine.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from vitcmp.metrics import latency
from vitcmp.metrics.latency import Call, CellLost, Plan, Timer, instability, interleaved_ms, measure, noise_floor
from vitcmp.metrics.statistics import is_tie, paired_ratio

CPU = torch.device("cpu")
NOISE = np.load(Path(__file__).parent / "noise.npz")
RUNS = 1000


class Replay:
    """A machine that computes as unevenly as one did: work takes what it took there, from some moment on.

    Neighbouring samples share the noise, and a longer sample averages over more of it.
    """

    def __init__(self, condition: str, start: float, speed: Callable[[float], float] = lambda now: 1.0) -> None:
        self.piece_ms = float(NOISE[f"{condition}_ms"])
        self.ends = _ends(condition)
        self.place = start * len(self.ends)
        """Work done, in pieces of the recording."""
        self.now_ms = 0.0
        self.speed = speed

    def work(self, ms: float) -> float:
        """How long work that takes so many ms on a machine without noise takes now."""
        before = self._until(self.place)
        self.place += ms / self.piece_ms
        taken = (self._until(self.place) - before) * self.piece_ms / self.speed(self.now_ms / 1e3)
        self.now_ms += taken
        return taken

    def clock(self) -> float:
        return self.now_ms / 1e3

    def _until(self, place: float) -> float:
        laps, rest = divmod(place, len(self.ends))
        whole = int(rest)
        before = self.ends[whole - 1] if whole else 0.0
        return laps * self.ends[-1] + before + (rest - whole) * (self.ends[whole] - before)


def _ends(condition: str, cache: dict[str, list[float]] = {}) -> list[float]:  # noqa: B006
    if condition not in cache:
        cache[condition] = np.cumsum(NOISE[condition].astype(float)).tolist()
    return cache[condition]


def compare(condition: str, ms: float, slower: float, run: int, plan: Plan = Plan()) -> tuple[bool, int]:
    """Whether B, which takes `slower` times as long as A, is called different, and after how many rounds of both."""
    machine = Replay(condition, start=np.random.default_rng(run).random())
    work = {"a": ms, "a again": ms, "b": slower * ms}
    samples = measure(lambda name: machine.work(work[name]), list(work), plan, seed=run, clock=machine.clock).samples
    floor = noise_floor(samples["a"], samples["a again"])
    return not is_tie(paired_ratio(samples["b"], samples["a"]), floor), min(map(len, samples.values()))
