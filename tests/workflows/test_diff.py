"""What changed between two benches, and which limits that breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitcmp import store
from vitcmp.configs import UserError
from vitcmp.workflows import diff
from vitcmp.workflows.diff import Limit


def cell(latency_ms: float = 1.0, status: str = "ok", tokens: int = 64, **metrics: Any) -> dict[str, Any]:
    """A measured cell whose 40 samples spread by 1 %."""
    samples = (latency_ms * np.random.default_rng(int(1000 * latency_ms)).normal(1, 0.01, 40)).tolist()
    settings = dict(zip(diff.IDENTITY, ["linear", "core", "forward", tokens, 8, "fp32", "eager", 48, 4, 4, 192,
                                         "cls", True, True]))  # fmt: skip
    settings["hardware"] = {"cpu": "x"}
    if status != "ok":
        return {**settings, "status": status}
    measured = {"latency_ms": float(np.median(samples)), "latency_samples_ms": samples, "peak_memory_mib": 10.0}
    return {**settings, "status": status, **measured, **metrics}


@pytest.mark.parametrize(
    ("text", "old", "new", "broken"),
    [
        ("latency_ms:+10%", 1.0, 1.11, True),
        ("latency_ms:+10%", 1.0, 1.09, False),
        ("latency_ms:+10%", 1.0, 0.5, False),
        ("throughput_img_s:-5%", 100.0, 94.0, True),
        ("throughput_img_s:-5%", 100.0, 200.0, False),
        ("top1_pct:-1", 97.0, 95.9, True),
        ("peak_memory_mib:+64", 10.0, 75.0, True),
    ],
)
def test_limits(text: str, old: float, new: float, broken: bool) -> None:
    assert Limit.parse(text).broken(old, new) is broken


@pytest.mark.parametrize("text", ["latency_ms", "latency_ms:10%", "latency_ms:+", ":+10%", "latency_ms:+0%"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is no limit; write a metric .* latency_ms:\+10%"):
        Limit.parse(text)


def test_a_slower_cell_breaks_the_limit_and_noise_does_not() -> None:
    limits = [Limit.parse("latency_ms:+10%")]
    (slower, memory) = diff.run([cell(1.2)], [cell(1.0)], limits)
    assert slower.broken == "latency_ms:+10%"
    assert slower.ratio is not None
    assert 1.15 < slower.ratio.low < slower.ratio.high < 1.25
    assert (memory.metric, memory.tie, memory.broken) == ("peak_memory_mib", True, "")
    (same, _) = diff.run([cell(1.001)], [cell(1.0)], limits)
    assert (same.tie, same.broken) == (True, "")
    # Beyond the limit, but the machine's noise was as large.
    (noisy, _) = diff.run([cell(1.2, noise_floor_pct=25.0)], [cell(1.0)], limits)
    assert (noisy.tie, noisy.broken) == (True, "")


def test_a_cell_that_gives_no_numbers_any_more_breaks_any_limit() -> None:
    (change,) = diff.run([cell(status="oom")], [cell()], [Limit.parse("latency_ms:+10%")])
    assert (change.metric, change.old, change.new, change.broken) == ("status", "ok", "oom", "it gave numbers before")
    assert diff.run([cell()], [cell(status="oom")]) == []


def test_the_newest_of_the_old_cells_counts_and_others_are_left_out() -> None:
    (change, _) = diff.run([cell(2.0), cell(tokens=128)], [cell(1.0), cell(2.0)], [Limit.parse("latency_ms:+10%")])
    assert change.tie
    for other in (cell(tokens=128), cell(hardware={"cpu": "y"})):
        with pytest.raises(UserError, match="the old records hold none of these cells"):
            diff.run([other], [cell()])


def test_a_limit_on_what_is_gone_is_broken_and_one_on_what_never_was_is_refused() -> None:
    limits = [Limit.parse("peak_memory_mib:+10%")]
    _, change = diff.run([cell(peak_memory_mib=None)], [cell()], limits)
    assert (change.metric, change.new, change.broken) == ("peak_memory_mib", None, "there was a number before")
    diff.check(limits, [cell()])
    with pytest.raises(UserError, match=r"unknown metric 'peak_memory'; did you mean 'peak_memory_mib'\?"):
        diff.check([Limit.parse("peak_memory:+10%")], [cell()])


def test_old_cells_come_from_a_store_or_from_printed_json(tmp_path: Path) -> None:
    wanted = cell(1.5)
    (tmp_path / "old.json").write_text(json.dumps({"cells": [wanted]}))
    config = {name: wanted[name] for name in diff.IDENTITY}
    metrics = {name: value for name, value in wanted.items() if name not in (*diff.IDENTITY, "status", "hardware")}
    record = store.new_record(
        kind="bench", status="ok", key="k", config=config, metrics=metrics, hardware={"cpu": "x"}, versions={}
    )
    store.append(tmp_path / "results", record)
    from_json, from_store = diff.read(tmp_path / "old.json"), diff.read(tmp_path / "results")
    assert from_json == [wanted]
    assert from_store == [wanted]
    for name in ("none.json", "results/records"):
        with pytest.raises(UserError, match=r"neither a results folder nor a file|holds no bench records"):
            diff.read(tmp_path / name)
