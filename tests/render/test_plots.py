"""Figures: the numbers behind them, and that each is a picture of the right size, drawn without a warning."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from vitcmp import attention
from vitcmp.render import plots, tables


def size_of(path: Path) -> tuple[int, int]:
    """Height and width in pixels; asserts that something is drawn."""
    picture = matplotlib.image.imread(path)
    assert picture.std() > 0.01
    return picture.shape[:2]


def comparison(rows: int) -> pd.DataFrame:
    names = [f"performer:num_features={i}" for i in range(rows)]
    return pd.DataFrame({
        "attention": names, "top1_pct": np.linspace(90, 91, rows), "top1_std_pct": [math.nan, *[0.3] * (rows - 1)],
        "latency_ms": np.geomspace(1, 40, rows), "macs_g": np.linspace(0.001, 0.002, rows),
    })  # fmt: skip


def scaling(*conditions: tuple[str, int]) -> pd.DataFrame:
    lines = [
        {"level": level, "mode": "forward", "batch_size": batch, "precision": "fp32", "model": "dim 48",
         "machine": "cpu", "attention": name, "tokens": tokens, "status": "ok", "latency_ms": tokens / 100,
         "latency_q1_ms": tokens / 110, "latency_q3_ms": tokens / 90, "peak_memory_mib": tokens % 1024}
        for level, batch in conditions for name in ("linear", "softmax") for tokens in (64, 256, 1024)
    ]  # fmt: skip
    lines.append({**lines[0], "tokens": 4096, "status": "oom", "latency_ms": math.nan})
    return pd.DataFrame(lines)


def log(loss: float, epochs: int = 3) -> list[dict[str, float]]:
    return [
        {"epoch": e, "train_loss": loss / e, "validation_top1_pct": 30.0 * e, "train_seconds": 0.5}
        for e in range(1, epochs + 1)
    ]


def test_pareto_front_of_four_points() -> None:
    assert plots.pareto([1, 2, 3, 2], [90, 95, 94, 89]).tolist() == [True, True, False, False]


def test_pareto_keeps_ties_and_drops_nan() -> None:
    assert plots.pareto([1, 1, math.nan], [90, 90, 99]).tolist() == [True, True, False]
    assert plots.pareto([1, 1], [90, 91]).tolist() == [False, True]
    assert plots.pareto([], []).tolist() == []


def test_a_mechanism_looks_the_same_in_every_figure_and_like_no_other() -> None:
    others = [f"performer:num_features={i}" for i in range(40)]
    names = [*attention.available(own=True), *others]
    looks = [plots.style(name, names) for name in names]
    assert len({look[:2] for look in looks}) == len(names)
    assert plots.style("softmax") == plots.style("softmax", others)
    assert plots.style(others[1], others[:2]) == plots.style(others[1], [others[1], others[0], "softmax"])


@pytest.mark.parametrize("x", ["latency_ms", "macs_g"])
@pytest.mark.parametrize("rows", [1, 12])
def test_accuracy_against(tmp_path: Path, x: str, rows: int) -> None:
    plots.accuracy_against(comparison(rows), x, tmp_path / "a.png")
    assert size_of(tmp_path / "a.png") == (720, 1200)


def test_accuracy_against_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    table = comparison(3)
    plots.accuracy_against(table, "macs_g", tmp_path / "three.png")
    gap = pd.concat([table, table.head(1).assign(attention="softmax", macs_g=math.nan, top1_pct=0.0)])
    plots.accuracy_against(gap, "macs_g", tmp_path / "gap.png", among=table["attention"].tolist())
    three, with_gap = (matplotlib.image.imread(tmp_path / name) for name in ("three.png", "gap.png"))
    assert np.array_equal(three, with_gap)


@pytest.mark.parametrize("y", ["latency_ms", "peak_memory_mib"])
def test_scaling_plot_has_a_panel_for_each_set_of_conditions(tmp_path: Path, y: str) -> None:
    plots.scaling_plot(scaling(("attention", 8)), y, tmp_path / "one.png")
    plots.scaling_plot(scaling(("attention", 8), ("attention", 1), ("model", 8)), y, tmp_path / "three.png")
    one, three = size_of(tmp_path / "one.png"), size_of(tmp_path / "three.png")
    assert one[1] == three[1] == 1200
    assert three[0] == 2 * one[0]


def test_curves_of_logs_of_several_lengths_and_a_loss_that_was_lost(tmp_path: Path) -> None:
    broken = [{**log(2.0)[0], "train_loss": None}]
    logs = {"softmax": [log(2.0), log(2.2, epochs=2)], "linear": [log(3.0)], "mine.py": [broken]}
    plots.learning_curves(logs, tmp_path / "curves.png")
    plots.epoch_seconds(logs, tmp_path / "seconds.png")
    assert size_of(tmp_path / "curves.png")[1] == size_of(tmp_path / "seconds.png")[1] == 1200


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion(tmp_path: Path, classes: int) -> None:
    matrix = np.eye(classes, dtype=int) * 9
    matrix[0] = 0
    plots.confusion(matrix, [f"class {i}" for i in range(classes)], tmp_path / "c.png")
    assert size_of(tmp_path / "c.png")[1] == 1200


def test_by_conditions_titles_name_what_differs() -> None:
    titles = [title for title, _ in tables.by_conditions(scaling(("attention", 8), ("model", 8)))]
    assert titles == ["attention, forward, batch 8, fp32", "whole model, forward, batch 8, fp32"]


def test_neither_torch_nor_a_figure_manager_is_needed(tmp_path: Path) -> None:
    code = f"""
import sys
from vitcmp.render import plots, tables
plots.epoch_seconds({{"softmax": [{log(1.0)}]}}, {str(tmp_path / "a.png")!r})
from matplotlib import _pylab_helpers
print("torch" in sys.modules, len(_pylab_helpers.Gcf.figs))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]
