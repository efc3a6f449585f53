"""Times every operator's forms on this machine: what `vitcmp doctor --measure` writes as a profile."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import torch

from vitcmp.kernels import cpu, switch
from vitcmp.kernels.forms import FORMATS, MODES, Cell, Profile
from vitcmp.kernels.operator import COMPILED, Operator, can_run, operators, test

ROUNDS = 7
MIN_SECONDS = 0.001
"""Of a sample: a shorter call is repeated."""
MAX_SECONDS = 0.15
"""Of a cell, after its first rounds: enough where a call is long."""
LONG_SECONDS = 0.02
"""Of a call that needs no second one to warm up."""


def measure(listen: Callable[[str, int, int], None] = lambda text, done, total: None) -> Profile:
    """The forms of all operators at the sizes of their grids, in turn, each the quickest of several samples.

    `listen` is told what is measured next, and how much is done.
    """
    plan = [(op, dtype, sizes) for op in operators().values() for dtype in op.dtypes for sizes in op.grid]
    cells = []
    for done, (op, dtype, sizes) in enumerate(plan):
        listen(f"{op.name}, {FORMATS[dtype]}, {'x'.join(map(str, sizes))}", done, len(plan))
        for trains in (False, True) if op.has_gradient else (False,):
            if ms := time_forms(op, dtype, sizes, trains):
                cells.append(Cell(op.name, FORMATS[dtype], MODES[trains], sizes, ms))
        gc.collect()
    return Profile(cpu.kind(), tuple(cells), facts())


def facts() -> dict[str, Any]:
    """What was measured on, for whoever reads the profile."""
    from importlib.metadata import version

    return {
        "cpu": cpu.info("model name"), "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__} | ({} if switch.no_numba() else {"numba": version("numba")}),
    }  # fmt: skip


def time_forms(op: Operator, dtype: torch.dtype, sizes: tuple[int, ...], trains: bool) -> dict[str, float]:
    """Milliseconds a call of each form that a call may take; empty where there is only one."""
    args = op.example(dtype, sizes)
    names = [form for form in op.choices if form != COMPILED or can_run(op, args, dtype, trains)]
    if len(names) < 2:
        return {}
    samples: dict[str, list[float]] = {name: [] for name in names}
    runs = {name: functools.partial(op.run, name, args, trains) for name in names}
    calls = {name: _calls(run) for name, run in runs.items()}
    began = time.perf_counter()
    for round_number in range(ROUNDS):
        for name in names:
            samples[name].append(_seconds(runs[name], calls[name]))
        if round_number >= 2 and time.perf_counter() - began > MAX_SECONDS:
            break
    # The quickest sample: what disturbs a machine only ever adds.
    return {name: round(1000 * min(taken), 4) for name, taken in samples.items()}


def _calls(call: Callable[[], object]) -> int:
    seconds = _seconds(call, 1)
    if seconds < LONG_SECONDS:
        seconds = _seconds(call, 1)
    return max(1, round(MIN_SECONDS / max(1e-6, seconds)))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def self_tests() -> Iterator[tuple[str, str]]:
    """Each operator with what its kernel's test says on this machine, in every number format, with gradients."""
    for name, op in operators().items():
        wrong = [f"{FORMATS[dtype]}: {found}" for dtype in op.dtypes if (found := test(name, dtype, True))]
        yield name, "; ".join(wrong)
