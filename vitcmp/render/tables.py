"""Tables of training runs under equal conditions, and any table as text.

A DataFrame of records, as `store.load` gives it, becomes tables; nothing is measured or read.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from vitcmp.configs import ModelConfig, RunConfig, attention_name

Row = dict[str, Any]

MISSING = "–"
BOLD = re.compile(r"\*\*(.+?)\*\*")
"""What Markdown shows in bold: tables of text use it whatever they become."""

HEADINGS = {
    "attention": "Mechanism",
    "seeds": "Seeds",
    "top1_pct": "Top-1 (%)",
    "top5_pct": "Top-5 (%)",
    "validation_top1_pct": "Validation top-1 (%)",
    "params_m": "Params (M)",
    "macs_g": "MACs (G)",
    "attention_macs_g": "Attention MACs (G)",
    "tokens": "Tokens",
    "status": "Status",
    "latency_ms": "Latency (ms)",
    "latency_iqr_ms": "Latency IQR (ms)",
    "forward_peak_memory_mib": "Forward memory (MiB)",
    "train_throughput_img_s": "Train img/s",
    "seconds_per_epoch": "s/epoch",
    "train_seconds": "Training (s)",
    "train_peak_memory_mib": "Train memory (MiB)",
    "peak_memory_mib": "Memory (MiB)",
    "intensity_flop_byte": "Intensity (FLOP/byte)",
    "achieved_gflop_s": "Achieved (GFLOP/s)",
    "fraction_of_peak": "Fraction of peak",
}
"""Columns that a person sees, in their order, with their unit; a CSV file has the column names themselves."""

STD_OF = {"top1_pct": "top1_std_pct", "top5_pct": "top5_std_pct"}
SMALLER_UNIT = {"(M)": "(k)", "(G)": "(M)"}
TERMINAL_COMPARISON = (
    "attention", "seeds", "top1_pct", "top5_pct", "params_m", "macs_g", "latency_ms", "train_throughput_img_s",
    "train_peak_memory_mib",
)  # fmt: skip
NARROW = tuple(name for name in TERMINAL_COMPARISON if name not in ("top5_pct", "params_m"))
TERMINAL_SCALING = ("attention", "tokens", "status", "latency_ms", "latency_iqr_ms", "peak_memory_mib", "macs_g")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Mechanisms that were trained under equal conditions."""

    title: str
    conditions: dict[str, Any]
    """Every setting but the mechanism and the seed; `precision` is what was used, not what was asked for."""
    table: pd.DataFrame
    """One row a mechanism, best test accuracy first; units stand in the column names, standard deviations are of the
    sample of seeds. Empty where no run of the group ended well."""
    notes: tuple[str, ...]
    """What must be read beside the table: how latency was measured, cells that failed, warnings of the runs."""
    runs: dict[str, tuple[str, ...]]
    """Mechanism -> ids of the runs in its row, by seed."""


def comparison(records: pd.DataFrame) -> list[Comparison]:
    """The training runs, a table for each set of equal conditions: the one with most runs first.

    A mechanism and seed that ran twice under the same conditions count once, the newest. Latency and memory of the
    forward pass come from the bench records of the same model, all from one batch size, precision and machine.
    """
    rows = plain_rows(records)
    benches = [r for r in rows if (r["kind"], r.get("level"), r.get("mode")) == ("bench", "model", "forward")]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == "train":
            groups.setdefault(tuple(_conditions(row).items()), []).append(row)
    # A run that failed early under `auto` does not know its precision, so only the key tells that it was repeated.
    last_ok = {r["key"]: i for i, r in enumerate(rows) if r["status"] == "ok"}
    gone = {r["id"] for i, r in enumerate(rows) if r["status"] != "ok" and last_ok.get(r["key"], -1) > i}
    kept = {key: [r for r in group if r["id"] not in gone] for key, group in groups.items()}
    found = [(dict(key), group) for key, group in kept.items() if group]
    found.sort(key=lambda item: -sum(r["status"] == "ok" for r in item[1]))
    titles = _titles([conditions for conditions, _ in found])
    return [_compare(title, *item, benches) for title, item in zip(titles, found, strict=True)]


def formatted(table: pd.DataFrame, columns: Iterable[str] = HEADINGS) -> pd.DataFrame:
    """The table as text under readable headings: sensible digits, mean ± standard deviation, small numbers in a
    smaller unit, `–` for what is missing. Columns without a heading are left out."""  # noqa: RUF002
    shown = {}
    for name in columns:
        if name not in table:
            continue
        heading, values = HEADINGS[name], table[name]
        if name in STD_OF and STD_OF[name] in table:
            pairs = zip(values, table[STD_OF[name]], strict=True)
            shown[heading] = [_percent(mean) + (f" ± {std:.1f}" if pd.notna(std) else "") for mean, std in pairs]
        elif name.endswith("_pct"):
            shown[heading] = [_percent(value) for value in values]
        else:
            unit = next((unit for unit in SMALLER_UNIT if heading.endswith(unit)), None)
            if unit and values.max() < 1:
                heading, values = heading.replace(unit, SMALLER_UNIT[unit]), values * 1000
            shown[heading] = [number(value) for value in values]
    return pd.DataFrame(shown)


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table of a comparison's or a scaling table; a table of text, such as a pivot, stays as it is."""
    text = _text(table).map(lambda cell: cell.replace("|", "\\|"))
    align = ["left", *["right"] * (text.shape[1] - 1)]
    return tabulate(
        text.to_numpy().tolist(), headers=list(text.columns), tablefmt="pipe", disable_numparse=True, colalign=align
    )


def to_csv(table: pd.DataFrame) -> str:
    """All columns as they are, at full precision; a missing value is an empty field."""
    return table.to_csv(index=False)


def to_latex(table: pd.DataFrame, caption: str | None = None) -> str:
    """A booktabs table."""
    text = _text(table)
    body = text.to_latex(index=False, escape=True, caption=caption, column_format="l" + "r" * (text.shape[1] - 1))
    return BOLD.sub(r"\\textbf{\1}", body).replace(MISSING, "--").replace("±", r"$\pm$").replace("≥", r"$\geq$")


def to_rich(table: pd.DataFrame, title: str = "", notes: Sequence[str] = (), width: int = 100) -> Table:
    """The main columns for a terminal of `width` columns, fewer below 100, with the notes below."""
    comparing = TERMINAL_COMPARISON if width >= 100 else NARROW
    text = formatted(table, comparing if "top1_pct" in table else TERMINAL_SCALING)
    view = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
    view.caption = Text("\n".join(notes)) if notes else None
    if text.empty:
        # rich prints neither title nor notes of a table without columns.
        view.add_column(Text("No run ended well"))
    for position, heading in enumerate(text.columns):
        if position:
            # Numbers never wrap, so their headings are broken here.
            view.add_column(Text(heading.replace(" ", "\n")), justify="right", vertical="bottom", no_wrap=True)
        else:
            view.add_column(Text(heading), overflow="fold", min_width=14)
    for cells in text.itertuples(index=False):
        view.add_row(*map(Text, cells))
    return view


def machine_text(row: Row) -> str:
    """The machine of a record, in a few words."""
    device, cpu = row.get("hardware_device"), row.get("hardware_cpu")
    name = f"{device} ({cpu}, {row.get('hardware_threads')} threads)" if device == "cpu" else device
    return name or "unknown machine"


def plain_rows(records: pd.DataFrame) -> list[Row]:
    """Records as dicts, oldest first, with pandas' traces removed: no NaN, no float for an integer, no list."""
    rows = [{str(name): _plain(value) for name, value in row.items()} for row in records.to_dict("records")]
    return sorted(rows, key=lambda row: row["time"])


def precision_of(row: Row) -> str:
    """The precision that was used, where the record tells, else the one that was asked for."""
    return row.get("precision_used") or row["precision"]


def number(value: Any) -> str:
    """Text as it is, integers in full, other numbers with three significant digits."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return MISSING
    if not isinstance(value, float) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _conditions(row: Row) -> dict[str, Any]:
    """All settings that must agree; one that the record lacks is older than the setting and has its default."""
    defaults = {name: value for name, value in RunConfig().flat().items() if name not in ("attention", "seed")}
    settings = {name: default if row.get(name) is None else row[name] for name, default in defaults.items()}
    return {**settings, "precision": precision_of(row)}


def _titles(groups: Sequence[dict[str, Any]]) -> list[str]:
    """`cifar10, vit-48x4, 20 epochs`, and the settings in which groups that share such a title differ."""
    heads = [f"{c['dataset']}, {c['preset']}, {c['epochs']} epochs" for c in groups]
    titles = []
    for head, conditions in zip(heads, groups, strict=True):
        siblings = [other for other_head, other in zip(heads, groups, strict=True) if other_head == head]
        differing = [name for name in conditions if len({other[name] for other in siblings}) > 1]
        titles.append(", ".join([head, *(f"{name} {conditions[name]}" for name in differing)]))
    return titles


def _compare(title: str, conditions: dict[str, Any], group: list[Row], benches: list[Row]) -> Comparison:
    finished: dict[tuple[str, int], Row] = {}
    failed: dict[tuple[str, int], Row] = {}
    for row in group:
        cell = (attention_name(row["attention"]), row["seed"])
        if row["status"] == "ok":
            finished[cell] = row
            failed.pop(cell, None)
        else:
            failed[cell] = row
    used: dict[str, list[Row]] = {}
    for (name, _), row in sorted(finished.items(), key=lambda item: item[0]):
        used.setdefault(name, []).append(row)
    forward, forward_notes = _forward(used, benches)
    lines = [_line(name, rows, forward.get(name, {})) for name, rows in used.items()]
    lines.sort(key=lambda line: (-line["top1_pct"], line["attention"]))
    notes = [
        _settings_note(conditions),
        "± is the sample standard deviation over seeds." if len(finished) > len(used) else "",
        *_inequality_notes(used),
        *forward_notes,
        *(f"Not in the table: {name}, seed {seed}: {r['status']}{': ' + r['error'] if r.get('error') else ''}"
          for (name, seed), r in sorted(failed.items(), key=lambda item: item[0])),
        *dict.fromkeys(f"{name}: {text}" for name, rows in used.items() for r in rows for text in r["warnings"] or ()),
    ]  # fmt: skip
    runs = {name: tuple(r["id"] for r in rows) for name, rows in used.items()}
    return Comparison(title, conditions, pd.DataFrame(lines), tuple(filter(None, notes)), runs)


def _line(name: str, rows: list[Row], forward: Row) -> Row:
    """One mechanism's row of a comparison: means over its seeds."""

    def values(metric: str) -> list[float]:
        return [r[metric] for r in rows if r.get(metric) is not None]

    def mean(metric: str) -> float | None:
        return statistics.fmean(values(metric)) if values(metric) else None

    def std(metric: str) -> float | None:
        return statistics.stdev(values(metric)) if len(values(metric)) > 1 else None

    line = {
        "attention": name,
        "seeds": len(rows),
        "top1_pct": mean("top1_pct"),
        "top1_std_pct": std("top1_pct"),
        "top5_pct": mean("top5_pct"),
        "top5_std_pct": std("top5_pct"),
        "validation_top1_pct": mean("validation_top1_pct"),
        "params_m": mean("params_m"),
        "macs_g": mean("macs_g"),
        "attention_macs_g": mean("attention_macs_g"),
        "latency_ms": forward.get("latency_ms"),
        "latency_iqr_ms": forward.get("latency_iqr_ms"),
        "latency_batch_size": forward.get("batch_size"),
        "forward_peak_memory_mib": forward.get("peak_memory_mib"),
        "train_throughput_img_s": mean("throughput_img_s"),
        "seconds_per_epoch": mean("seconds_per_epoch"),
        "train_seconds": mean("train_seconds"),
        "train_peak_memory_mib": mean("peak_memory_mib"),
    }
    # NaN keeps a column of numbers numeric where all of it is missing.
    return {key: math.nan if value is None else value for key, value in line.items()}


def _forward(used: dict[str, list[Row]], benches: list[Row]) -> tuple[dict[str, Row], list[str]]:
    """The bench record of each mechanism's model, and notes.

    All come from one batch size, precision, execution and machine, since latencies of several do not compare: from
    those that cover most mechanisms, and of these from the newest.
    """
    wanted = {_model_settings(rows[-1]): name for name, rows in used.items()}
    settings: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in benches:
        name = wanted.get(_model_settings(row))
        if name is not None:
            how = (row["batch_size"], precision_of(row), row.get("execution") or "eager", machine_text(row))
            # Taken out and put back, so that the last entry is the newest.
            settings[how] = {**settings.pop(how, {}), name: row}
    if not settings:
        return {}, []
    how = max(reversed(settings), key=lambda how: sum(r["status"] == "ok" for r in settings[how].values()))
    chosen = settings[how]
    notes = [f"Latency and forward memory: the whole model, batch size {how[0]}, {how[1]}, {how[2]}, on {how[3]}."]
    missing = sorted(set(used) - set(chosen))
    notes += [f"No latency under these conditions: {', '.join(missing)}."] if missing else []
    notes += [f"No latency: {name}: {r['status']}" for name, r in sorted(chosen.items()) if r["status"] != "ok"]
    return {name: row for name, row in chosen.items() if row["status"] == "ok"}, notes


def _model_settings(row: Row) -> tuple[Any, ...]:
    """What a bench record and a training run of the same model share, with `auto` resolved."""
    model = ModelConfig(image_size=row["image_size"], patch_size=row["patch_size"])
    names = ("dim", "depth", "num_heads", "mlp_dim", "pool", "stem")
    return (attention_name(row["attention"]), model.image_hw, model.patch, *(row[name] for name in names))


def _settings_note(conditions: dict[str, Any]) -> str:
    """The conditions that are no default, in one line: with the defaults, they repeat the table."""
    defaults = RunConfig().flat()
    changed = [f"{name} {value}" for name, value in conditions.items() if value != defaults[name]]
    return f"Equal conditions: {', '.join(changed)}; all else as by default."


def _inequality_notes(used: dict[str, list[Row]]) -> list[str]:
    """What differs between the runs of a table although no setting does."""
    notes = []
    seeds = {name: ", ".join(str(r["seed"]) for r in rows) for name, rows in used.items()}
    if len(set(seeds.values())) > 1:
        notes.append("Seeds differ: " + "; ".join(f"{name}: {text}" for name, text in seeds.items()) + ".")
    rows = list(itertools.chain.from_iterable(used.values()))
    machines = sorted({machine_text(r) for r in rows})
    if len(machines) > 1:
        notes.append(f"Training ran on several machines, so its times do not compare: {'; '.join(machines)}.")
    commits = sorted({r["commit"] or "unknown" for r in rows})
    if len(commits) > 1:
        notes.append(f"Training ran from several versions of the code: {', '.join(commits)}.")
    return notes


def _text(table: pd.DataFrame) -> pd.DataFrame:
    return formatted(table) if "attention" in table else table


def _percent(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.1f}"
