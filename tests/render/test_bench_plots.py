"""Figures of bench records: each is a picture of the right size, drawn without a warning."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from bench_records import study

from vitcmp.render import bench_plots, bench_tables


def size_of(path: Path) -> tuple[int, int]:
    """Height and width in pixels; asserts that something is drawn."""
    picture = matplotlib.image.imread(path)
    assert picture.std() > 0.01
    return picture.shape[:2]


@pytest.fixture(scope="module")
def scaling() -> pd.DataFrame:
    return bench_tables.scaling(study().table)


@pytest.mark.parametrize("y", ["latency_ms", "peak_memory_mib"])
def test_scaling_plot_has_a_panel_for_each_set_of_conditions(tmp_path: Path, scaling: pd.DataFrame, y: str) -> None:
    bench_plots.scaling_plot(scaling[scaling["batch_size"] == 8], y, tmp_path / "one.png")
    three = pd.concat([scaling, scaling[scaling["batch_size"] == 8].assign(level="core")])
    bench_plots.scaling_plot(three, y, tmp_path / "three.png")
    sizes = size_of(tmp_path / "one.png"), size_of(tmp_path / "three.png")
    assert sizes == ((585, 1200), (1170, 1200))


def test_memory_of_zero_has_no_place_on_a_logarithmic_axis(tmp_path: Path, scaling: pd.DataFrame) -> None:
    zero = scaling.assign(peak_memory_mib=scaling["peak_memory_mib"].where(scaling["attention"] != "uniform", 0.0))
    bench_plots.scaling_plot(zero, "peak_memory_mib", tmp_path / "zero.png", among=["uniform"])
    rest = scaling[scaling["attention"] != "uniform"]
    bench_plots.scaling_plot(rest, "peak_memory_mib", tmp_path / "rest.png", among=["uniform"])
    assert (tmp_path / "zero.png").read_bytes() == (tmp_path / "rest.png").read_bytes()


def test_roofline_has_a_panel_for_each_set_of_conditions(tmp_path: Path, scaling: pd.DataFrame) -> None:
    found = bench_tables.roofline(scaling)
    bench_plots.roofline_plot(found[:1], tmp_path / "one.png")
    bench_plots.roofline_plot([*found, *found], tmp_path / "four.png")
    assert (size_of(tmp_path / "one.png"), size_of(tmp_path / "four.png")) == ((630, 1200), (1260, 1200))


def test_winner_map_grows_with_the_batch_sizes(tmp_path: Path, scaling: pd.DataFrame) -> None:
    ((title, part),) = bench_tables.winners(scaling)
    bench_plots.winner_map([(title, part)], tmp_path / "two.png")
    more = pd.concat([part, part.assign(batch_size=part["batch_size"] * 64, attention="/long/my_own_mechanism.py")])
    bench_plots.winner_map([(title, more)], tmp_path / "four.png")
    two, four = size_of(tmp_path / "two.png"), size_of(tmp_path / "four.png")
    assert four[0] - two[0] == round(2 * 0.62 * 150)


def test_a_tie_looks_unlike_a_win(tmp_path: Path, scaling: pd.DataFrame) -> None:
    (found,) = bench_tables.winners(scaling)
    bench_plots.winner_map([found], tmp_path / "won.png")
    bench_plots.winner_map([(found[0], found[1].assign(tied=2))], tmp_path / "tied.png")
    won, tied = (matplotlib.image.imread(tmp_path / name) for name in ("won.png", "tied.png"))
    assert tied.mean() > won.mean() + 0.05


def test_error_plot_leaves_out_what_is_exact(tmp_path: Path, scaling: pd.DataFrame) -> None:
    (title, part), _ = bench_tables.approximations(scaling)
    part = part[part["tokens"] == 4096]
    bench_plots.error_plot([(title, part)], tmp_path / "one.png", among=["softmax"])
    exact = pd.concat([part, part.assign(attention="linear", output_error=0.0)])
    bench_plots.error_plot([(title, exact)], tmp_path / "exact.png", among=["softmax"])
    assert size_of(tmp_path / "one.png") == (555, 1200)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "exact.png").read_bytes()
