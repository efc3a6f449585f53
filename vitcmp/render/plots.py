"""Figures from tables and logs, one PNG file each.

A mechanism keeps its colour and marker in every figure. The object API of matplotlib is used throughout: no pyplot
figure is created, so nothing here touches a caller's figures or needs a display.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vitcmp import attention

Log = Sequence[Mapping[str, Any]]
"""The epochs of one run, as `store.read_log` gives them."""

WIDTH = 8.0
"""Inches: 1200 pixels at 150 dots an inch, about the width of a README."""
DPI = 150

# Okabe and Ito's colours, which remain apart for the colour-blind, without yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The number of markers shares no divisor with that of colours, so 70 pairs differ.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")


class Style(NamedTuple):
    """How a mechanism looks."""

    color: str
    marker: str
    linestyle: Any


def style(name: str, among: Sequence[str] = ()) -> Style:
    """The look of a mechanism: by its place among vitcmp's own, or, with options or from a user's file, after these
    by its place in the sorted `among`, which holds the names of all figures that are read together."""
    own = attention.available(own=True)
    others = sorted({*among, name} - set(own))
    place = own.index(name) if name in own else len(own) + others.index(name)
    return Style(
        COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], LINES[place // len(COLOURS) % len(LINES)]
    )


def pareto(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Which points no other beats: none has an x as low and a y as high, and one of them better. NaN is never in."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    as_good = (xs[None] <= xs[:, None]) & (ys[None] >= ys[:, None])  # [point, other]
    better = (xs[None] < xs[:, None]) | (ys[None] > ys[:, None])
    return ~(as_good & better).any(axis=1) & ~np.isnan(xs) & ~np.isnan(ys)


def accuracy_against(table: pd.DataFrame, x: str, path: Path, among: Sequence[str] = ()) -> None:
    """Test accuracy over a cost, `latency_ms` or `macs_g`, of a comparison's table, with the Pareto front.

    Error bars are standard deviations over seeds. Mechanisms without the cost are left out.
    """
    table = table.dropna(subset=[x]).sort_values(x)
    costs, unit = table[x], {"latency_ms": "Latency of a forward pass (ms)", "macs_g": "Cost of an image (G MACs)"}[x]
    if x == "macs_g" and costs.max() < 1:
        costs, unit = costs * 1000, unit.replace("(G ", "(M ")
    figure, (axes,) = new_figure(1, 4.8)
    texts, markers, halo = [], [], withStroke(linewidth=2.5, foreground="white")
    for name, cost, top1, std in zip(table["attention"], costs, table["top1_pct"], table["top1_std_pct"], strict=True):
        look = style(name, among or tuple(table["attention"]))
        if pd.notna(std):
            axes.errorbar(cost, top1, yerr=std, color=look.color, alpha=0.6, capsize=3, elinewidth=1, zorder=2)
        texts.append(axes.text(cost, top1, short(name), fontsize=9, zorder=3, path_effects=[halo]))
        markers += axes.plot(cost, top1, color=look.color, marker=look.marker, markersize=8, linestyle="", zorder=4)
    front = pareto(costs.tolist(), table["top1_pct"].tolist())
    axes.step(costs[front], table["top1_pct"][front], where="post", color="0.6", linewidth=1.2, label="Pareto front")
    if costs.max() > 8 * costs.min():
        axes.set_xscale("log")
        plain_log_ticks(axes, "x")
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel=unit, ylabel="Test top-1 (%)")
    figure.legend(loc="outside upper right", frameon=False, fontsize=9)
    # Labels move off each other and off the markers; a thin line leads back from one that had to go far.
    adjust_text(
        texts, objects=markers, ax=axes, iter_lim=500, max_move=None, expand=(1.2, 1.6), force_static=(0.5, 1.0),
        force_pull=(0.005, 0.005),
        arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.7},
    )  # fmt: skip
    save(figure, path)


def learning_curves(logs: Mapping[str, Sequence[Log]], path: Path, among: Sequence[str] = ()) -> None:
    """Training loss and validation accuracy by epoch, side by side; mechanism -> the logs of its seeds."""
    figure, (left, right) = new_figure(2, 3.6)
    _curves(left, logs, "train_loss", among)
    _curves(right, logs, "validation_top1_pct", among)
    left.set(xlabel="Epoch", ylabel="Training loss")
    right.set(xlabel="Epoch", ylabel="Validation top-1 (%)")
    legend(figure, [left, right])
    save(figure, path)


def epoch_seconds(logs: Mapping[str, Sequence[Log]], path: Path, among: Sequence[str] = ()) -> None:
    """Seconds that the training part of each epoch took; mechanism -> the logs of its seeds."""
    figure, (axes,) = new_figure(1, 4.2)
    _curves(axes, logs, "train_seconds", among)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="Epoch", ylabel="Training time of an epoch (s)")
    legend(figure, [axes])
    save(figure, path)


def confusion(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Counts [true class, predicted class], coloured by the share of the true class; numbers up to 20 classes."""
    matrix = np.asarray(matrix)
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = len(class_names)
    figure, (axes,) = new_figure(1, 6.8)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="Share of the true class (%)", shrink=0.8)
    # More names than this would touch each other: show every second, third, ...
    shown = range(0, size, math.ceil(size / 30))
    names = [short(class_names[i], 16) for i in shown]
    upright = max(map(len, names)) <= 3
    axes.set_xticks(list(shown), names, fontsize=8, rotation=0 if upright else 60, ha="center" if upright else "right",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_yticks(list(shown), names, fontsize=8)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.grid(False)
    if size <= 20:
        for i, j in np.argwhere(matrix > 0):
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=8 if size <= 10 else 6,
                      color="white" if share[i, j] > 55 else "black")  # fmt: skip
    save(figure, path)


def _curves(axes: Axes, logs: Mapping[str, Sequence[Log]], metric: str, among: Sequence[str]) -> None:
    """The mean over seeds of a metric by epoch, with a band from the lowest to the highest."""
    for name in sorted(logs):
        values: dict[int, list[float]] = {}
        for log in logs[name]:
            for line in log:
                # A loss that was not finite stands as None in a log.
                values.setdefault(line["epoch"], []).append(math.nan if line[metric] is None else line[metric])
        epochs = sorted(values)
        look = style(name, among or tuple(logs))
        axes.plot(
            epochs, [float(np.mean(values[e])) for e in epochs], label=short(name), linewidth=1.5, markersize=4,
            markevery=max(1, len(epochs) // 8), **look._asdict(),
        )  # fmt: skip
        if len(logs[name]) > 1:
            low, high = [min(values[e]) for e in epochs], [max(values[e]) for e in epochs]
            axes.fill_between(epochs, low, high, color=look.color, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def new_figure(panels: int, row_height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of README width with this many panels, at most `columns` a row."""
    columns = min(columns, max(1, panels))
    rows = math.ceil(max(1, panels) / columns)
    figure = Figure(figsize=(WIDTH, row_height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for one in axes:
        one.grid(color="0.9", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """A PNG file of README width."""
    figure.savefig(path, format="png", dpi=DPI)


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels, with every label once; a long one makes the figure higher."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(text, handle)
    longest = max(map(len, found), default=1)
    columns = max(1, min(5, len(found), 100 // (longest + 8)))
    names = sorted(found)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, math.ceil(len(names) / columns) - 2))
    figure.legend(
        [found[n] for n in names], names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        handlelength=3,
    )  # fmt: skip


def plain_log_ticks(axes: Axes, which: str) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as plain numbers; fewer where the axis spans much."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def short(name: str, longest: int = 40) -> str:
    """A name that fits: a path is cut to its file, and what is still too long in its middle."""
    name = re.sub(r"[^,:=]*/", "", name)
    half = longest // 2 - 1
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
