"""What `vitcmp bench` shows in a terminal: a table for each set of conditions, and how cost grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from vitcmp.render import bench_tables
from vitcmp.render.tables import MISSING, number

COLUMNS = (
    ("peak_memory_mib", "memory\nMiB", 1), ("macs_g", "MACs\nM", 1000),
    ("fraction_of_peak", "% of\npeak", 100), ("output_error", "error", 1),
)  # fmt: skip


def terminal(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Title, table of text, and notes, of a scaling table: the cells of each set of conditions, and what grows with the
    tokens."""
    growth = dict(bench_tables.growth(table))
    shown = []
    for title, part in bench_tables.by_conditions(table):
        shown.append((f"{title}; {part['machine'][0]}", _cells(part), _notes(part)))
        if title in growth:
            notes = ["in brackets, 95 % intervals; softmax: the quickest form of it that was measured"]
            shown.append(("Growth with the number of tokens", bench_tables.growth_text(growth[title]), notes))
    return shown


def _cells(part: pd.DataFrame) -> pd.DataFrame:
    rivals = part[part["tied_with_quickest"]]
    quickest = rivals.groupby("tokens")["latency_ms"].min()
    lines = []
    for row in part.to_dict("records"):
        ok = row["status"] == "ok"
        best = quickest.get(row["tokens"])
        line = {
            "attention": row["attention"], "N": str(row["tokens"]),
            "latency\nms": number(row["latency_ms"]) if ok else row["status"],
            "95 %\n± %": _half_width(row) if ok else "",
            "times the\nquickest": "tie" if row["tied_with_quickest"] and row["latency_ms"] != best
            else number(row["latency_ms"] / best) if ok and best else "",
        }  # fmt: skip
        lines.append(line | {heading: number(row[name] * factor) for name, heading, factor in COLUMNS})
    text = pd.DataFrame(lines)
    return text.drop(columns=[heading for _, heading, _ in COLUMNS if set(text[heading]) == {MISSING}])


def _half_width(row: Mapping[Any, Any]) -> str:
    """How far the interval of the median reaches, in percent of it."""
    middle = row["latency_ms"]
    return f"{100 * max(row['latency_high_ms'] / middle - 1, 1 - row['latency_low_ms'] / middle):.1f}"


def _notes(part: pd.DataFrame) -> list[str]:
    rounds = part["latency_samples_ms"].dropna().map(len)
    floors = part["noise_floor_pct"].dropna()
    notes = []
    if len(rounds):
        notes.append(f"medians of {rounds.min()} to {rounds.max()} rounds; tie: cannot be told from the quickest")
    if len(floors):
        notes.append(f"noise: two copies of one mechanism differed by {floors.min():.1f} to {floors.max():.1f} %")
    return notes
