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
from vitcmp.render import plots


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


def test_a_long_legend_does_not_squeeze_the_panels(tmp_path: Path) -> None:
    heights = []
    for count in (2, 40):
        plots.epoch_seconds({f"m{i}.py": [log(2.0)] for i in range(count)}, tmp_path / "a.png")
        heights.append(size_of(tmp_path / "a.png")[0])
    assert heights[0] == 630
    # 8 lines of 5 names, of which the first 2 were always there.
    assert heights[1] == 630 + round(6 * 0.19 * 150)


def test_neither_torch_nor_a_figure_manager_is_needed(tmp_path: Path) -> None:
    code = f"""
import sys
from vitcmp.render import bench_plots, plots
plots.epoch_seconds({{"softmax": [{log(1.0)}]}}, {str(tmp_path / "a.png")!r})
from matplotlib import _pylab_helpers
print("torch" in sys.modules, len(_pylab_helpers.Gcf.figs))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]
