"""What changed between two measurements of the same cells, and whether a limit was broken."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcmp import store
from vitcmp.configs import UserError, attention_name, choose
from vitcmp.metrics.statistics import Ratio, is_tie, unpaired_ratio

IDENTITY = (
    "attention", "level", "mode", "tokens", "batch_size", "precision", "execution", "dim", "num_heads", "depth",
    "mlp_dim", "pool", "qkv_bias", "out_bias",
)  # fmt: skip
"""What makes two cells the same, on the same hardware."""
HARDWARE = ("device", "cpu", "threads")
Cell = Mapping[str, Any]
"""Settings, status and metrics of a bench record under their own names, as `vitcmp --json bench` prints them."""


@dataclass(frozen=True)
class Limit:
    """How much a metric may grow (above 0) or fall (below 0) before that is a regression."""

    metric: str
    change: float
    relative: bool
    """Whether `change` is a fraction of the old value."""

    @classmethod
    def parse(cls, text: str) -> Limit:
        """`latency_ms:+10%`, `peak_memory_mib:+64` or `throughput_img_s:-5%`.

        Raises: UserError for anything else.
        """
        match = re.fullmatch(r"(\w+):([+-]\d+(?:\.\d+)?)(%?)", text.strip())
        if match is None or float(match[2]) == 0:
            raise UserError(f"'{text}' is no limit; write a metric and by how much it may change: latency_ms:+10%")
        return cls(match[1], float(match[2]) / (100 if match[3] else 1), bool(match[3]))

    def broken(self, old: float, new: float) -> bool:
        """Whether a change goes beyond the limit."""
        change = new - old
        if self.relative:
            change = change / abs(old) if old else math.copysign(math.inf, change) if change else 0.0
        return change > self.change if self.change > 0 else change < self.change


@dataclass(frozen=True)
class Change:
    """One metric of one cell, then and now; the metric `status` where a cell no longer gives numbers."""

    cell: str
    metric: str
    old: Any
    new: Any
    ratio: Ratio | None
    """New over old with its interval; without one where there are no samples."""
    tie: bool
    """Whether then and now cannot be told apart."""
    broken: str
    """The limit that this change breaks; empty: none."""


def cells(records: Iterable[store.Record]) -> list[dict[str, Any]]:
    """Bench records as flat cells."""
    return [
        {
            **{name: record.config.get(name) for name in IDENTITY},
            "attention": attention_name(record.config["attention"]), "status": record.status, **record.metrics,
            "precision": record.metrics.get("precision_used", record.config["precision"]),
            "hardware": record.hardware,
        }
        for record in records
        if record.kind == "bench"
    ]  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The cells in a results folder, or in what `vitcmp --json bench` printed.

    Raises: UserError where there are none.
    """
    if path.is_dir():
        found = cells(store.read(path))
    else:
        try:
            found = json.loads(path.read_text())["cells"]
            list(map(_identity, found))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"'{path}' is neither a results folder nor a file that `vitcmp --json bench` wrote"
            ) from None
    if not found:
        raise UserError(f"'{path}' holds no bench records to compare with")
    return found


def check(limits: Sequence[Limit], old: Sequence[Cell]) -> None:
    """Raise UserError for a limit on what the old cells do not have: it could never be broken."""
    for limit in limits:
        known = {name for cell in old for name, value in cell.items() if isinstance(value, int | float)}
        if limit.metric not in known:
            choose(limit.metric, sorted(name for name in known if name not in IDENTITY), "metric")


def run(new: Sequence[Cell], old: Sequence[Cell], limits: Sequence[Limit] = ()) -> list[Change]:
    """The changes of latency, peak memory and all metrics with a limit, in every cell that both have; of the old ones,
    the last of each counts.

    A latency breaks a limit only where the interval of the ratio says too that it changed that way.

    Raises: UserError where no cell is in both.
    """
    before = {_identity(cell): cell for cell in old}
    pairs = [(before[_identity(cell)], cell) for cell in new if _identity(cell) in before]
    if not pairs:
        raise UserError(
            "the old records hold none of these cells; measure the same mechanisms, sizes and settings on one machine"
        )
    metrics = dict.fromkeys(["latency_ms", "peak_memory_mib", *(limit.metric for limit in limits)])
    changes = []
    for was, now in pairs:
        if was["status"] == "ok" != now["status"]:
            changes.append(Change(_name(now), "status", "ok", now["status"], None, False, "it gave numbers before"))
            continue
        for metric in metrics:
            if not isinstance(was.get(metric), int | float):
                continue
            mine = [limit for limit in limits if limit.metric == metric]
            if isinstance(now.get(metric), int | float):
                changes.append(_change(metric, was, now, mine))
            elif mine:
                changes.append(Change(_name(now), metric, was[metric], None, None, False, "there was a number before"))
    return changes


def _change(metric: str, was: Cell, now: Cell, limits: Sequence[Limit]) -> Change:
    ratio, tie = None, was[metric] == now[metric]
    before, after = was.get("latency_samples_ms"), now.get("latency_samples_ms")
    if metric == "latency_ms" and before and after:
        ratio = unpaired_ratio(after, before)
        floor = max(cell.get("noise_floor_pct") or 0.0 for cell in (was, now)) / 100
        tie = is_tie(ratio, floor)
    broken = [limit for limit in limits if not tie and limit.broken(was[metric], now[metric])]
    text = ", ".join(f"{limit.metric}:{limit.change * (100 if limit.relative else 1):+g}{'%' * limit.relative}"
                     for limit in broken)  # fmt: skip
    return Change(_name(now), metric, was[metric], now[metric], ratio, tie, text)


def _identity(cell: Cell) -> tuple[Any, ...]:
    hardware = cell.get("hardware") or {}
    return (*(cell.get(name) for name in IDENTITY), *(hardware.get(name) for name in HARDWARE))


def _name(cell: Cell) -> str:
    return (
        f"{cell['attention']}, {cell['level']}, {cell['mode']}, N = {cell['tokens']}, batch {cell['batch_size']}, "
        f"{cell['precision']}, {cell['execution']}"
    )
