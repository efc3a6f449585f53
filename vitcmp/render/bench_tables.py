"""Tables of bench records: cost over tokens, exponents and crossovers, winners, multiply-adds, roofline and errors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from vitcmp.configs import LAYERS, ModelConfig, attention_name
from vitcmp.metrics.statistics import (
    Crossover,
    Exponent,
    crossover,
    exponent,
    is_tie,
    median_interval,
    paired_ratio,
    unpaired_ratio,
)
from vitcmp.render.tables import HEADINGS, MISSING, Row, formatted, machine_text, number, plain_rows, precision_of

LEVELS = {
    "core": "attention core",
    "attention": "attention with projections",
    "block": "block",
    "model": "whole model",
}
CONDITIONS = ("level", "mode", "batch_size", "precision", "execution", "model", "machine")
METRICS = (
    "latency_ms", "latency_low_ms", "latency_high_ms", "latency_iqr_ms", "latency_min_ms", "cold_latency_ms",
    "throughput_img_s", "noise_floor_pct", "peak_memory_mib", "inference_memory_mib", "activation_memory_mib",
    "reserved_memory_mib", "macs_g", "attention_macs_g", "counted_macs_g", "ptflops_macs_g", "params_m", "work_gflop",
    "moved_mib", "intensity_flop_byte", "peak_gflop_s", "copy_gb_s", "achieved_gflop_s", "fraction_of_peak",
    "output_error", "map_error", "uniform_error",
)  # fmt: skip
TEXTS = ("error_target", "error_on", "macs_note", "group", "error")
LISTS = ("latency_samples_ms", "warnings")
"""Columns of the scaling table that no CSV file holds: the records have them."""

GROWING = {"latency": "latency_ms", "memory": "peak_memory_mib"}
LARGE = 1024
"""Tokens from which exponents are fitted, where four sizes are as large, else to the four largest: fixed costs hide the
growth below."""
CONTROL = "uniform"
"""No attention at all, and so quicker than all: it never counts as the quickest."""
PERCENTAGE = re.compile(r"[+-]*\d+(\.\d+)? ?%")
DISAGREE = 0.02
"""Relative difference from which two counts of multiply-adds are said to disagree."""


def scaling(records: pd.DataFrame) -> pd.DataFrame:
    """The bench records, one row for each mechanism, token count and set of conditions: the newest counts.

    A cell that ran out of memory, out of time or failed is a row too, with its status and without a latency. Columns:
    the conditions (level, mode, batch_size, precision, execution, model, machine), attention, tokens, status, metrics
    (an interval that the record lacks is read off its samples), and `tied_with_quickest`: whether it is the quickest
    of its conditions and tokens, the control left aside, or cannot be told from it.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for row in plain_rows(records):
        if row["kind"] != "bench":
            continue
        samples = row.get("latency_samples_ms")
        if samples and row.get("latency_low_ms") is None:
            row["latency_low_ms"], row["latency_high_ms"] = median_interval(samples)
        cell = {
            "level": row["level"], "mode": row["mode"], "batch_size": row["batch_size"],
            "precision": precision_of(row), "execution": row.get("execution") or "eager", "model": _model_text(row),
            "machine": machine_text(row), "attention": attention_name(row["attention"]), "tokens": row["tokens"],
        }  # fmt: skip
        found = {name: row.get(name) for name in (*METRICS, *TEXTS, *LISTS)}
        newest[tuple(cell.values())] = {**cell, "status": row["status"], **found}
    columns = [*CONDITIONS, "attention", "tokens", "status", *METRICS, *TEXTS, *LISTS]
    table = pd.DataFrame(list(newest.values()), columns=columns)
    # Columns of None alone would have no numbers to compare.
    table = table.astype(dict.fromkeys(METRICS, float))
    table = table.sort_values([*CONDITIONS, "tokens", "attention"], ignore_index=True)
    return table.assign(tied_with_quickest=_tied(table))


def by_conditions(scaling_table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a scaling table that share all conditions, with a title that tells them apart."""
    return _parts(scaling_table, CONDITIONS)


def pivot(scaling_part: pd.DataFrame, y: str) -> pd.DataFrame:
    """One metric as text, mechanisms by token counts; a cell that gave no number shows its status.

    Of latencies, the quickest at a token count and those that cannot be told from it are bold.
    """
    counts = sorted(scaling_part["tokens"].unique())
    cells = {(r["attention"], r["tokens"]): r for r in scaling_part.to_dict("records")}
    several = scaling_part[scaling_part["status"] == "ok"]["tokens"].value_counts()
    lines = []
    for name in sorted(scaling_part["attention"].unique()):
        line = {HEADINGS["attention"]: name}
        for count in counts:
            cell = cells.get((name, count))
            text = MISSING if cell is None else cell["status"] if cell["status"] != "ok" else number(cell[y])
            if y == "latency_ms" and cell is not None and cell["tied_with_quickest"] and several[count] > 1:
                text = f"**{text}**"
            line[f"N = {count}"] = text
        lines.append(line)
    return pd.DataFrame(lines)


def growth(scaling_table: pd.DataFrame) -> list[tuple[str, list[Row]]]:
    """How cost grows, for each set of conditions of three token counts or more, a row for each mechanism:
    `attention`, `latency` and `memory` (the fitted Exponent, or None), `crossover` (against the quickest softmax at
    each token count; None for softmax itself and where there is none)."""
    found = []
    for title, part in by_conditions(scaling_table[scaling_table["status"] == "ok"]):
        if part["tokens"].nunique() < 3:
            continue
        reference: dict[int, list[Sequence[float]]] = {}
        for cell in part[part["attention"].map(_is_softmax)].to_dict("records"):
            reference.setdefault(cell["tokens"], []).append(_samples(cell))
        rows = []
        for name, cells in part.groupby("attention"):
            own = {cell["tokens"]: _samples(cell) for cell in cells.to_dict("records")}
            row: Row = {"attention": name, "crossover": None}
            row |= {kind: _exponent(cells, metric) for kind, metric in GROWING.items()}
            if not _is_softmax(str(name)) and any(own[n] and any(reference.get(n, ())) for n in own):
                row["crossover"] = crossover(own, reference)
            rows.append(row)
        found.append((title, rows))
    return found


def growth_text(rows: Sequence[Row]) -> pd.DataFrame:
    """`growth` of one set of conditions, to read. A fit over other sizes than the heading says names them."""
    firsts = [row[kind].sizes[0] for row in rows for kind in GROWING if row[kind] is not None]
    first = max(firsts, key=firsts.count, default=LARGE)
    where = f"N ≥ {first:,}"
    lines = [
        {
            HEADINGS["attention"]: row["attention"],
            f"Latency ~ N^p, {where}": _exponent_text(row["latency"], first),
            f"Memory ~ N^p, {where}": _exponent_text(row["memory"], first),
            "Quicker than softmax from N": MISSING if row["crossover"] is None else str(row["crossover"]),
        }
        for row in rows
    ]
    return pd.DataFrame(lines)


def growth_numbers(found: Iterable[tuple[str, list[Row]]]) -> pd.DataFrame:
    """`growth` of all conditions as numbers, for a CSV file."""
    lines = []
    for title, rows in found:
        for row in rows:
            line = {"conditions": title, "attention": row["attention"]}
            for kind in GROWING:
                fit: Exponent | None = row[kind]
                line |= {
                    f"{kind}_exponent": fit and fit.value, f"{kind}_exponent_low": fit and fit.low,
                    f"{kind}_exponent_high": fit and fit.high, f"{kind}_sizes": fit and " ".join(map(str, fit.sizes)),
                }  # fmt: skip
            crossed: Crossover | None = row["crossover"]
            line |= {
                "crossover_tokens": crossed and crossed.tokens, "crossover_low": crossed and crossed.low,
                "crossover_high": crossed and crossed.high,
                "crossover_sizes": crossed and " ".join(map(str, crossed.sizes)),
            }  # fmt: skip
            lines.append(line)
    return pd.DataFrame(lines)


def winners(scaling_table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The quickest mechanism over tokens and batch size, where both vary and there was a choice, for each set of other
    conditions. Columns: `tokens`, `batch_size`, `attention`, `lead_pct` (by how much the second is slower; NaN where
    there is no second), `tied` (how many cannot be told from the quickest, with itself)."""
    others = tuple(name for name in CONDITIONS if name != "batch_size")
    timed = _rivals(scaling_table)
    found = []
    for title, part in _parts(timed, others):
        if min(part[name].nunique() for name in ("batch_size", "tokens", "attention")) < 2:
            continue
        lines = []
        for (tokens, batch_size), cells in part.groupby(["tokens", "batch_size"]):
            first, *rest = cells.sort_values("latency_ms").to_dict("records")
            lead = 100 * (rest[0]["latency_ms"] / first["latency_ms"] - 1) if rest else math.nan
            lines.append({
                "tokens": tokens, "batch_size": batch_size, "attention": first["attention"], "lead_pct": lead,
                "tied": int(cells["tied_with_quickest"].sum()),
            })  # fmt: skip
        found.append((title, pd.DataFrame(lines)))
    return found


def lead_text(lead_pct: float, tied: int) -> str:
    """How clearly a cell of `winners` was won."""
    if tied > 1:
        return f"tie of {tied}"
    if math.isnan(lead_pct):
        return "alone"
    return f"by {lead_pct:.0f} %" if lead_pct < 995 else f"{lead_pct / 100 + 1:.0f} times"


def winners_text(part: pd.DataFrame) -> pd.DataFrame:
    """`winners` of one set of conditions, to read: batch sizes by token counts."""
    cells = {(r["batch_size"], r["tokens"]): f"{r['attention']} ({lead_text(r['lead_pct'], r['tied'])})"
             for r in part.to_dict("records")}  # fmt: skip
    return pd.DataFrame([
        {"Batch": str(batch)} | {f"N = {n}": cells.get((batch, n), MISSING) for n in sorted(part["tokens"].unique())}
        for batch in sorted(part["batch_size"].unique())
    ])  # fmt: skip


def macs(scaling_table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Closed form, torch's count and ptflops' (G MACs of an image's forward pass) where a count was taken, for each
    level and model: a row for each mechanism and token count, with the note of what sees less or more."""
    counted = scaling_table.dropna(subset=["counted_macs_g", "ptflops_macs_g"], how="all")
    names = ["attention", "tokens", "macs_g", "counted_macs_g", "ptflops_macs_g"]
    found = []
    for title, part in _parts(counted, ("level", "model")):
        # Neither the batch size nor the mode changes what one image's forward pass costs.
        rows = part.drop_duplicates(["attention", "tokens"]).sort_values(["attention", "tokens"])
        found.append((title, rows[names].assign(macs_note=rows["macs_note"].fillna("")).reset_index(drop=True)))
    return found


def macs_text(part: pd.DataFrame) -> pd.DataFrame:
    """`macs` of one level and model, to read; counts that depart from the closed form are bold."""
    unit, scale = ("M", 1000) if part["macs_g"].min() < 0.1 else ("G", 1)

    def cell(value: float, closed: float) -> str:
        text = number(value * scale)
        return f"**{text}**" if abs(value - closed) > DISAGREE * closed else text

    columns = (("macs_g", "Closed form"), ("counted_macs_g", "Counted"), ("ptflops_macs_g", "ptflops"))
    shown = {
        HEADINGS["attention"]: part["attention"],
        HEADINGS["tokens"]: part["tokens"].map(str),
        **{
            f"{heading} ({unit})": [cell(*both) for both in zip(part[name], part["macs_g"], strict=True)]
            for name, heading in columns
        },
    }
    return pd.DataFrame(shown)


def macs_notes(part: pd.DataFrame) -> list[str]:
    """Which mechanisms' counts depart from their closed forms, by how much, and why where that is known."""
    found: dict[str, list[str]] = {}
    for name, rows in part.groupby("attention"):
        for column, counter in (("counted_macs_g", "torch's counter"), ("ptflops_macs_g", "ptflops")):
            if rows[column].isna().any():
                found.setdefault(f"{counter} gave no count", []).append(str(name))
            off = 100 * (rows[column] / rows["macs_g"] - 1)
            off = off[off.abs() > 100 * DISAGREE]
            if off.empty:
                continue
            said = [text for note in rows["macs_note"][off.index] for text in note.split("; ") if counter in text]
            # The size of the gap is ours to say: of `ptflops finds 20 % less: it ...`, only the cause is wanted.
            reasons = dict.fromkeys(text.partition(": ")[2] or text for text in said)
            size = " to ".join(dict.fromkeys(f"{value:+.0f}" for value in (off.min(), off.max())))
            where = "every N" if len(off) == len(rows) else f"N = {', '.join(map(str, rows['tokens'][off.index]))}"
            why = "; ".join(reasons) or "a cause is not known"
            found.setdefault(f"{counter} departs ({why})", []).append(f"{name} by {size} % at {where}")
    return [f"{what}: {'; '.join(cells)}." for what, cells in found.items()]


def roofline(scaling_table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The cells with a share of the machine's peak, for each set of conditions at the largest common token count."""
    placed = scaling_table.dropna(subset=["intensity_flop_byte", "achieved_gflop_s", "peak_gflop_s", "copy_gb_s"])
    return [(f"{title}, N = {largest_common(part)}", part[part["tokens"] == largest_common(part)])
            for title, part in by_conditions(placed)]  # fmt: skip


def roofline_text(part: pd.DataFrame) -> pd.DataFrame:
    """`roofline` of one set of conditions, to read."""
    return formatted(part, ("attention", "intensity_flop_byte", "achieved_gflop_s", "fraction_of_peak"))


def approximations(scaling_table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The cells that were compared with what they stand in for, for each set of conditions, with their latency over
    that of the quickest softmax at the same token count, `of_softmax_latency` (NaN where there is none)."""
    found = []
    for title, part in by_conditions(scaling_table):
        softmax = part[part["attention"].map(_is_softmax)].groupby("tokens")["latency_ms"].min()
        rows = part.dropna(subset=["output_error"]).sort_values(["attention", "tokens"])
        if not rows.empty:
            against = rows["tokens"].map(softmax).astype(float)
            found.append(
                (title, rows.assign(softmax_latency_ms=against, of_softmax_latency=rows["latency_ms"] / against))
            )
    return found


def errors_text(scaling_table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Errors of output and map over tokens, to read, for each level and model, with those of the plain mean."""
    shown = []
    measured = scaling_table.dropna(subset=["output_error"])
    for title, part in _parts(measured, ("level", "model")):
        # Neither the batch size nor the mode changes an error: the same is in every record of a mechanism and N.
        rows = part.drop_duplicates(["attention", "tokens"])
        names = "plain mean, for " + rows["error_target"].fillna("its target")
        means = rows.assign(attention=names, output_error=rows["uniform_error"]).dropna(subset=["output_error"])
        means = means.drop_duplicates(["attention", "tokens"])
        both = pd.concat([pivot(rows, "output_error"), pivot(means, "output_error")])
        shown.append((f"Error of the output: {title}", both.fillna(MISSING)))
        if rows["map_error"].notna().any():
            shown.append((f"Error of the map: {title}", pivot(rows, "map_error")))
    return shown


def bench_notes(scaling_table: pd.DataFrame) -> list[str]:
    """What the cells say: why they gave no number, and their warnings. What many say alike, but for percentages, stands
    once."""
    said: dict[str, tuple[list[str], dict[str, set[int]]]] = {}
    for row in scaling_table.to_dict("records"):
        texts = list(row["warnings"] or ())
        if row["status"] != "ok":
            texts.append(": ".join(filter(lambda x: isinstance(x, str), (row["status"], row["error"]))))
        for text in texts:
            alike, where = said.setdefault(PERCENTAGE.sub("%", text), ([], {}))
            alike.append(text)
            where.setdefault(row["attention"], set()).add(row["tokens"])
    notes = []
    for alike, where in said.values():
        cells = "; ".join(f"{name} at N = {', '.join(map(str, sorted(sizes)))}" for name, sizes in where.items())
        notes.append(f"{_with_range(alike)}: {cells}")
    return notes


def _with_range(alike: Sequence[str]) -> str:
    """Texts that differ in their first percentage alone as one, with the least and the largest."""
    numbers = [match[0] for text in alike if (match := PERCENTAGE.search(text))]
    found = sorted(numbers, key=lambda number: float(number.replace("+-", "").strip("% ")))
    if not found or found[0] == found[-1]:
        return alike[0]
    return PERCENTAGE.sub(f"{found[0]} to {found[-1]}", alike[0], count=1)


def largest_common(part: pd.DataFrame) -> int:
    """The largest token count at which at least half of the mechanisms have a row."""
    names = part.groupby("tokens")["attention"].nunique()
    return int(names[names >= part["attention"].nunique() / 2].index.max()) if len(names) else 0


def _parts(table: pd.DataFrame, conditions: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a scaling table that share these conditions. Model and machine are in a title where they differ."""
    parts = []
    for key, part in table.groupby(list(conditions), sort=False, dropna=False):
        of = {name: str(value) for name, value in zip(conditions, key, strict=True)}
        words = [LEVELS.get(of["level"], of["level"])]
        words += [of["mode"]] if "mode" in of else []
        words += [f"batch {of['batch_size']}"] if "batch_size" in of else []
        words += [of["precision"]] if "precision" in of else []
        words += [of["execution"]] if of.get("execution", "eager") != "eager" else []
        words += [of["model"]] if table[table["level"] == of["level"]]["model"].nunique() > 1 else []
        words += [of["machine"]] if "machine" in of and table["machine"].nunique() > 1 else []
        parts.append((", ".join(words), part.reset_index(drop=True)))
    return parts


def _tied(table: pd.DataFrame) -> list[bool]:
    """Whether each row is the quickest of its conditions and tokens, or cannot be told from it."""
    tied = dict.fromkeys(table.index, False)
    for _, cells in _rivals(table).groupby([*CONDITIONS, "tokens"], dropna=False):
        rows = cells.to_dict("records")
        quickest = min(rows, key=lambda row: row["latency_ms"])
        marks = [row is quickest or _cannot_be_told(row, quickest, len(rows) - 1) for row in rows]
        tied |= dict(zip(cells.index, marks, strict=True))
    return list(tied.values())


def _rivals(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["latency_ms"].notna() & (table["attention"] != CONTROL)]


def _cannot_be_told(cell: Mapping[Any, Any], quickest: Mapping[Any, Any], rivals: int) -> bool:
    """At 5 % over all of the quickest's rivals (Bonferroni): which one is the quickest was found by looking."""
    own, other = _samples(cell), _samples(quickest)
    if not (own and other):
        return cell["latency_ms"] == quickest["latency_ms"]
    floors = [pct / 100 for pct in (cell["noise_floor_pct"], quickest["noise_floor_pct"]) if not math.isnan(pct)]
    together = isinstance(cell["group"], str) and cell["group"] == quickest["group"]
    ratio = (paired_ratio if together else unpaired_ratio)(own, other, 1 - 0.05 / rivals)
    return is_tie(ratio, max(floors, default=0.0))


def _samples(cell: Mapping[Any, Any]) -> Sequence[float]:
    """The samples of latency of a row; none where the record has none."""
    samples = cell["latency_samples_ms"]
    return samples if isinstance(samples, tuple) else ()


def _exponent(cells: pd.DataFrame, y: str) -> Exponent | None:
    """Over the large sizes where there are four, else over the four largest; None below three."""
    cells = cells[cells[y] > 0]
    large = cells[cells["tokens"] >= LARGE]
    cells = large if len(large) >= 4 else cells.nlargest(4, "tokens")
    return exponent(cells["tokens"].tolist(), cells[y].tolist()) if len(cells) >= 3 else None


def _exponent_text(fit: Exponent | None, first: int) -> str:
    if fit is None:
        return MISSING
    elsewhere = f", N = {fit.sizes[0]} to {fit.sizes[-1]}" if fit.sizes[0] != first else ""
    # Three points leave one degree of freedom: an interval so wide says nothing.
    interval = f" ({fit.low:.2f} to {fit.high:.2f})" if len(fit.sizes) > 3 else ""
    return f"{fit.value:.2f}{interval}{elsewhere}"


def _is_softmax(name: str) -> bool:
    return name.partition(":")[0] == "softmax" and LAYERS.search(name) is None


def _model_text(row: Row) -> str:
    """The model settings that the level depends on: sizes always, the rest where it is no default."""
    names = {
        "core": ["dim", "num_heads", "pool"],
        "attention": ["dim", "num_heads", "qkv_bias", "out_bias", "pool"],
        "block": ["dim", "num_heads", "mlp_dim", "qkv_bias", "out_bias", "pool"],
        "model": ["dim", "num_heads", "qkv_bias", "out_bias", "depth", "mlp_dim", "pool", "stem", "final_norm"],
    }[row["level"]]
    defaults = ModelConfig()
    sizes = ("dim", "num_heads", "depth", "mlp_dim")
    shown = [name for name in names if name in sizes or row.get(name) not in (None, getattr(defaults, name))]
    return ", ".join(f"{name} {row.get(name)}" for name in shown)
