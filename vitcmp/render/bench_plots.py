"""Figures of bench records: cost over tokens, the roofline, who is quickest where, and speed against error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from vitcmp.render.bench_tables import by_conditions, lead_text
from vitcmp.render.plots import legend, new_figure, plain_log_ticks, save, short, style

SCALING_AXES = {
    "latency_ms": "Latency (ms)",
    "peak_memory_mib": "Peak memory (MiB)",
    "activation_memory_mib": "Held for the backward pass (MiB)",
}
Parts = Sequence[tuple[str, pd.DataFrame]]
"""Title and rows of each panel."""


def scaling_plot(scaling: pd.DataFrame, y: str, path: Path, among: Sequence[str] = ()) -> None:
    """A metric of `SCALING_AXES` over tokens, both logarithmic, latency with a band of its interval: one panel for
    each set of conditions of the scaling table. Cells without a number, or with 0, are left out."""
    among = among or tuple(scaling["attention"].unique())
    parts = by_conditions(scaling[scaling[y] > 0])
    figure, panels = new_figure(len(parts), 3.9)
    for axes, (title, part) in zip(panels, parts, strict=True):
        for name, rows in part.groupby("attention"):
            look = style(str(name), among)
            axes.plot(rows["tokens"], rows[y], label=short(str(name)), markersize=5, linewidth=1.4, **look._asdict())
            if y == "latency_ms":
                low, high = rows["latency_low_ms"], rows["latency_high_ms"]
                axes.fill_between(rows["tokens"], low, high, color=look.color, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        counts = sorted(part["tokens"].unique())
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        plain_log_ticks(axes, "y")
        _title(axes, title, len(parts))
        axes.set(xlabel="Patch tokens", ylabel=SCALING_AXES[y])
    legend(figure, panels)
    save(figure, path)


def roofline_plot(parts: Parts, path: Path, among: Sequence[str] = ()) -> None:
    """Achieved speed over arithmetic intensity under the machine's measured roof, both logarithmic; `parts` as
    `bench_tables.roofline` gives them."""
    among = among or tuple({name for _, part in parts for name in part["attention"]})
    figure, panels = new_figure(len(parts), 4.2)
    for axes, (title, part) in zip(panels, parts, strict=True):
        peak, copy = part["peak_gflop_s"].max(), part["copy_gb_s"].max()
        ridge = peak / copy
        x = part["intensity_flop_byte"]
        ends = [min(x.min(), ridge) / 3, max(x.max(), ridge) * 3]
        axes.plot([ends[0], ridge, ends[1]], [ends[0] * copy, peak, peak], color="0.35", linewidth=1.6, zorder=2)
        roof = f"roof: {copy:.3g} GB/s, {peak:.3g} GFLOP/s"
        axes.text(0.99, 0.98, roof, transform=axes.transAxes, ha="right", va="top", fontsize=8, color="0.35")
        for row in part.to_dict("records"):
            look = style(row["attention"], among)
            axes.plot(row["intensity_flop_byte"], row["achieved_gflop_s"], color=look.color, marker=look.marker,
                      markersize=8, linestyle="", label=short(row["attention"]), zorder=3)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(*ends)
        y = part["achieved_gflop_s"]
        axes.set_ylim(min(y.min(), ends[0] * copy) / 1.5, max(y.max(), peak) * 2.5)
        plain_log_ticks(axes, "x")
        plain_log_ticks(axes, "y")
        _title(axes, title, len(parts))
        axes.set(xlabel="Work over memory traffic (FLOP/byte)", ylabel="Achieved (GFLOP/s)")
    legend(figure, panels)
    save(figure, path)


def winner_map(parts: Parts, path: Path, among: Sequence[str] = ()) -> None:
    """Who is quickest at each token count and batch size, and by how much; `parts` as `bench_tables.winners` gives
    them."""
    among = among or tuple({name for _, part in parts for name in part["attention"]})
    rows = max(part["batch_size"].nunique() for _, part in parts)
    figure, panels = new_figure(len(parts), 1.1 + 0.62 * rows, columns=1)
    for axes, (title, part) in zip(panels, parts, strict=True):
        counts, batches = sorted(part["tokens"].unique()), sorted(part["batch_size"].unique())
        size = 7.5 if len(counts) > 4 else 9
        width = int(750 / size) // len(counts)
        for cell in part.to_dict("records"):
            x, y = counts.index(cell["tokens"]), batches.index(cell["batch_size"])
            tied = cell["tied"] > 1
            # Pale enough for black text; what is tied is paler still.
            colour = 1 - (0.22 if tied else 0.5) * (1 - np.array(to_rgb(style(cell["attention"], among).color)))
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            text = f"{_wrapped(cell['attention'], width)}\n{lead_text(cell['lead_pct'], cell['tied'])}"
            axes.text(x, y, text, ha="center", va="center", fontsize=size, style="italic" if tied else "normal")
        axes.set_xlim(-0.5, len(counts) - 0.5)
        axes.set_ylim(-0.5, len(batches) - 0.5)
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        _title(axes, title, 1)
        axes.set(xlabel="Patch tokens", ylabel="Batch size")
    save(figure, path)


def error_plot(parts: Parts, path: Path, among: Sequence[str] = ()) -> None:
    """Latency over the error of the output, both logarithmic, with lines at the latency of softmax and at the error of
    the plain mean of the values; `parts` as `bench_tables.approximations` gives them, each with one token count."""
    among = among or tuple({name for _, part in parts for name in part["attention"]})
    figure, panels = new_figure(len(parts), 3.7)
    for axes, (title, part) in zip(panels, parts, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        # An exact one would have no place on a logarithmic axis.
        for row in part[part["output_error"] > 0].to_dict("records"):
            look = style(row["attention"], among)
            axes.plot(row["output_error"], row["latency_ms"], color=look.color, marker=look.marker, markersize=9,
                      linestyle="", label=short(row["attention"]), zorder=3)  # fmt: skip
        for target, rows in part.dropna(subset=["uniform_error"]).groupby("error_target"):
            axes.axvline(rows["uniform_error"].mean(), color="0.55", linewidth=1.4, zorder=1,
                         linestyle="--" if target == "softmax" else ":", label=f"plain mean, for {target}")  # fmt: skip
        softmax = part["softmax_latency_ms"].min()
        if softmax > 0:
            axes.axhline(softmax, color="0.3", linewidth=1.2, zorder=1, label="softmax (no error)")
        axes.margins(x=0.15, y=0.15)
        plain_log_ticks(axes, "x")
        plain_log_ticks(axes, "y")
        _title(axes, title, len(parts))
        axes.set(xlabel="Relative error of the output", ylabel="Latency (ms)")
    legend(figure, panels)
    save(figure, path)


def _title(axes: Axes, title: str, panels: int) -> None:
    # A word and its number stay on one line.
    title = re.sub(r" (?==)|(?<==) |(?<=[a-z]) (?=\d)", "\N{NO-BREAK SPACE}", title)
    axes.set_title(fill(title, 44 if panels > 1 else 90), fontsize=10)


def _wrapped(name: str, width: int) -> str:
    """A name in lines of about this many letters, broken where its words end."""
    lines = [""]
    for word in re.split(r"(?<=[:,=_-])", short(name, 3 * width)):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)
