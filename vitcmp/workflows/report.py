"""Write what a results store shows: tables, figures, and a page that holds them all."""

from __future__ import annotations

import base64
import html
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup, escape

from vitcmp import store
from vitcmp.configs import UserError, choose
from vitcmp.render import bench_plots, bench_tables, plots, tables
from vitcmp.render.tables import Comparison

FORMATS = ("md", "csv", "tex", "html")

MOST_PANELS = 8
"""Of a figure: beyond, only the largest token count is drawn."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vitcmp report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td { white-space: nowrap; }
img { max-width: 100%; width: 50rem; display: block; margin: 1rem 0; }
li, .facts { color: #555; }
</style>
</head>
<body>
<h1>vitcmp report</h1>
<p class="facts">{{ facts }}</p>
{% if notes %}<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for caption, table in section.tables %}
{% if caption %}<h3>{{ caption }}</h3>{% endif %}
<div class="wide"><table>
<thead><tr>{% for heading in table.columns %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.values.tolist() %}
<tr>{% for cell in row %}<td>{{ cell | bold }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% if section.notes %}<ul>{% for note in section.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% for caption, path in section.pictures %}
<img src="{{ path | inline }}" alt="{{ caption }}">
{% endfor %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True, eq=False)
class Report:
    """What was found, and the files that hold it."""

    comparisons: list[Comparison]
    scaling: pd.DataFrame
    """The bench records, as `bench_tables.scaling` gives them; empty where there are none."""
    notes: list[str]
    """What concerns the whole store, such as lines that could not be read."""
    paths: list[Path] = field(default_factory=list)
    """All files, the pages first."""


@dataclass(frozen=True, eq=False)
class _Section:
    title: str
    tables: list[tuple[str, pd.DataFrame]]
    """Caption and text."""
    notes: Sequence[str]
    pictures: list[tuple[str, Path]]
    """Caption and file."""
    raw: pd.DataFrame
    """All columns, as numbers."""
    data: str
    """Name of the CSV file of `raw`."""


def run(results: str, out: Path | None = None, formats: Sequence[str] = ("md", "csv")) -> Report:
    """Write the report of a results store into `out` (default: its folder `report`); figures are always drawn.

    Formats: md, csv, tex, html (one page that needs no other file), or all. What a previous report left under the
    same names is replaced.

    Raises: UserError where there is nothing to report, a format is unknown or `out` cannot be written.
    """
    wanted = {choose(name, (*FORMATS, "all"), "format") for name in formats}
    if "all" in wanted:
        wanted = set(FORMATS)
    folder = out or Path(results) / "report"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", store.StoreWarning)
        records = store.load(results)
        if records.empty or not records["kind"].isin(["train", "bench"]).any():
            raise UserError(f"nothing to report in '{results}'; run `vitcmp train` or `vitcmp compare` first, or give "
                            "another --results")  # fmt: skip
        report = Report(tables.comparison(records), bench_tables.scaling(records), notes=[])
        logs = [_logs(Path(results), comparison) for comparison in report.comparisons]
    for warning in caught:
        if issubclass(warning.category, store.StoreWarning):
            report.notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(report, logs, folder, wanted, _facts(records))
    except OSError as error:
        raise UserError(f"cannot write to '{folder}' ({error.strerror}); choose another folder with --out") from None
    return report


def _write(report: Report, logs: list[dict[str, list[plots.Log]]], folder: Path, wanted: set[str], facts: str) -> None:
    """Every file of the report, and its path into the report."""
    names = {name for comparison in report.comparisons for name in comparison.runs} | set(report.scaling["attention"])
    sections = [
        _comparison_section(comparison, log, folder, "" if number == 1 else f"-{number}", sorted(names))
        for number, (comparison, log) in enumerate(zip(report.comparisons, logs, strict=True), start=1)
    ]
    sections += _bench_sections(report.scaling, folder, sorted(names))
    if "md" in wanted:
        _text(report, folder / "report.md", _markdown(sections, report.notes, facts, links="csv" in wanted))
    if "html" in wanted:
        _text(report, folder / "report.html", _html(sections, report.notes, facts))
    for section in sections:
        if "csv" in wanted and section.tables:
            _text(report, folder / section.data, tables.to_csv(section.raw))
        if "tex" in wanted and section.tables:
            parts = [tables.to_latex(text, ", ".join(filter(None, (section.title, caption))))
                     for caption, text in section.tables]  # fmt: skip
            _text(report, folder / Path(section.data).with_suffix(".tex"), "\n".join(parts))
    report.paths.extend(path for section in sections for _, path in section.pictures)


def _comparison_section(
    comparison: Comparison, logs: dict[str, list[plots.Log]], folder: Path, number: str, among: Sequence[str]
) -> _Section:
    table, pictures = comparison.table, []
    for x, stem, caption in (
        ("latency_ms", "accuracy-vs-latency", "Test accuracy over latency"),
        ("macs_g", "accuracy-vs-macs", "Test accuracy over multiply-adds"),
    ):
        # One point says no more than the table.
        if x in table and table[x].notna().sum() > 1:
            path = folder / f"{stem}{number}.png"
            store.write_atomic(path, partial(plots.accuracy_against, table, x, among=among))
            pictures.append((caption, path))
    if logs:
        path = folder / f"learning-curves{number}.png"
        store.write_atomic(path, partial(plots.learning_curves, logs, among=among))
        pictures.append(("Training loss and validation accuracy by epoch", path))
        path = folder / f"epoch-seconds{number}.png"
        store.write_atomic(path, partial(plots.epoch_seconds, logs, among=among))
        pictures.append(("Training time by epoch", path))
    several = any(len(runs) > 1 for runs in logs.values())
    notes = [
        *comparison.notes,
        *(["Curves: mean over seeds, with a band from the lowest to the highest."] if several else []),
        *(["No run of this group ended well, so there is no table."] if table.empty else []),
    ]
    shown = [] if table.empty else [("", tables.formatted(table))]
    return _Section(comparison.title, shown, notes, pictures, table, f"table{number}.csv")


def _bench_sections(scaling: pd.DataFrame, folder: Path, among: Sequence[str]) -> list[_Section]:
    """What bench records show; sections with nothing to show are left out."""
    if scaling.empty:
        return []
    sections = [
        _scaling_section(scaling, folder, among),
        _growth_section(scaling),
        _winner_section(scaling, folder, among),
        _macs_section(scaling),
        _roofline_section(scaling, folder, among),
        _approximation_section(scaling, folder, among),
    ]
    return [section for section in sections if section.tables]


def _scaling_section(scaling: pd.DataFrame, folder: Path, among: Sequence[str]) -> _Section:
    shown, pictures = [], []
    for y, heading, stem in (
        ("latency_ms", "Latency (ms)", "latency-vs-tokens"),
        ("cold_latency_ms", "Latency with a cold cache (ms)", None),
        ("peak_memory_mib", "Peak memory (MiB)", "memory-vs-tokens"),
        ("inference_memory_mib", "Peak memory of inference (MiB)", None),
        ("activation_memory_mib", "Held for the backward pass (MiB)", "activations-vs-tokens"),
    ):
        parts = bench_tables.by_conditions(scaling)
        if y != "latency_ms":
            parts = [(title, part) for title, part in parts if part[y].notna().any()]
        shown += [(f"{heading}: {title}", bench_tables.pivot(part, y)) for title, part in parts]
        growing = [part for _, part in parts if part[part[y] > 0]["tokens"].nunique() > 1]
        if stem and growing:
            path = folder / f"{stem}.png"
            store.write_atomic(path, partial(bench_plots.scaling_plot, pd.concat(growing), y, among=among))
            pictures.append((f"{heading} over tokens", path))
    floors = scaling["noise_floor_pct"].dropna()
    notes = [
        "Latency is the median of a batch; bands are its 95 % interval. N counts patch tokens.",
        "Bold: the quickest, and those that cannot be told from it; the control `uniform` is left aside.",
        *([f"Copies of one mechanism differed by up to {floors.max():.1f} %: no more than in its own rounds is a tie."]
          if len(floors) else []),
        "A line ends where a cell gave no number: the tables show why (oom: out of memory).",
        f"Models: {'; '.join(sorted(scaling['model'].unique()))}.",
        f"Measured on {'; '.join(sorted(scaling['machine'].unique()))}.",
        *bench_tables.bench_notes(scaling),
    ]  # fmt: skip
    raw = scaling.drop(columns=list(bench_tables.LISTS))
    return _Section("Scaling with the number of tokens", shown, notes, pictures, raw, "scaling.csv")


def _growth_section(scaling: pd.DataFrame) -> _Section:
    found = bench_tables.growth(scaling)
    notes = [
        "p: slope on a log-log scale; in brackets, 95 % intervals.",
        "Quicker than softmax from N: the token count from which on a mechanism is quicker than the best softmax "
        "measured at each N; nothing is said beyond the largest N.",
    ]
    shown = [(title, bench_tables.growth_text(rows)) for title, rows in found]
    return _Section("Growth and crossovers", shown, notes, [], bench_tables.growth_numbers(found), "growth.csv")


def _winner_section(scaling: pd.DataFrame, folder: Path, among: Sequence[str]) -> _Section:
    found, pictures = bench_tables.winners(scaling), []
    if found:
        path = folder / "winners.png"
        store.write_atomic(path, partial(bench_plots.winner_map, found, among=among))
        pictures.append(("The quickest mechanism over tokens and batch size", path))
    notes = [
        "The quickest, the control `uniform` left aside, and by how much the second is slower; tie: as many cannot be "
        "told from the quickest; alone: no other gave a number."
    ]
    shown = [(title, bench_tables.winners_text(part)) for title, part in found]
    return _Section("Quickest over tokens and batch size", shown, notes, pictures, _joined(found), "winners.csv")


def _macs_section(scaling: pd.DataFrame) -> _Section:
    found = bench_tables.macs(scaling)
    notes = ["Of one image's forward pass. Bold: more than 2 % away from the closed form."]
    notes += [note for _, part in found for note in bench_tables.macs_notes(part)]
    shown = [(title, bench_tables.macs_text(part)) for title, part in found]
    return _Section(
        "Multiply-adds, counted three ways", shown, list(dict.fromkeys(notes)), [], _joined(found), "macs.csv"
    )


def _roofline_section(scaling: pd.DataFrame, folder: Path, among: Sequence[str]) -> _Section:
    found, pictures = bench_tables.roofline(scaling), []
    if found:
        path = folder / "roofline.png"
        store.write_atomic(path, partial(bench_plots.roofline_plot, found, among=among))
        pictures.append(("Achieved speed over arithmetic intensity, below the machine's roof", path))
    notes = [
        "Work: counted, 2 FLOP a multiply-add. Traffic: what the operations read and write, as executed. The roof: the "
        "fastest matrix product and copy that this machine showed.",
        "At the largest N that at least half of the mechanisms reached; all are in scaling.csv.",
    ]
    columns = ["attention", "tokens", "work_gflop", "moved_mib", "intensity_flop_byte", "achieved_gflop_s",
               "fraction_of_peak", "peak_gflop_s", "copy_gb_s"]  # fmt: skip
    shown = [(title, bench_tables.roofline_text(part)) for title, part in found]
    return _Section("Roofline", shown, notes, pictures, _joined(found, columns), "roofline.csv")


def _approximation_section(scaling: pd.DataFrame, folder: Path, among: Sequence[str]) -> _Section:
    found, pictures = bench_tables.approximations(scaling), []
    panels = [(f"{title}, N = {n}", part[part["tokens"] == n]) for title, part in found
              for n in sorted(part["tokens"].unique())]  # fmt: skip
    if len(panels) > MOST_PANELS:
        largest = [(title, part, bench_tables.largest_common(part)) for title, part in found]
        panels = [(f"{title}, N = {n}", part[part["tokens"] == n]) for title, part, n in largest]
    panels = [(title, part) for title, part in panels if part[["output_error", "latency_ms"]].notna().all(axis=1).any()]
    if panels:
        path = folder / "latency-vs-error.png"
        store.write_atomic(path, partial(bench_plots.error_plot, panels, among=among))
        pictures.append(("Latency over the error of the output", path))
    measured_on = sorted({text for _, part in found for text in part["error_on"].dropna()})
    notes = [
        "Relative Frobenius errors against what the mechanism stands in for; plain mean: the error that the mean of "
        "all values would have, without any attention.",
        *([f"Measured on {'; '.join(measured_on)}."] if measured_on else []),
    ]
    columns = ["attention", "tokens", "error_target", "error_on", "output_error", "map_error", "uniform_error",
               "latency_ms", "of_softmax_latency"]  # fmt: skip
    shown = bench_tables.errors_text(scaling)
    shown += [(f"Latency over that of the quickest softmax: {title}", bench_tables.pivot(part, "of_softmax_latency"))
              for title, part in found if part["of_softmax_latency"].notna().any()]  # fmt: skip
    return _Section("Speed against error", shown, notes, pictures, _joined(found, columns), "approximation.csv")


def _joined(parts: Sequence[tuple[str, pd.DataFrame]], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Parts of a table as one, with their titles in the column `conditions`."""
    if not parts:
        return pd.DataFrame()
    titled = [(part if columns is None else part[list(columns)]).assign(conditions=title) for title, part in parts]
    return pd.concat(titled, ignore_index=True)


def _logs(results: Path, comparison: Comparison) -> dict[str, list[plots.Log]]:
    """The epochs of each mechanism's runs; runs whose folder is gone are left out."""
    found = {
        name: [log for run in runs if (log := store.read_log(results / "runs" / run))]
        for name, runs in comparison.runs.items()
    }
    return {name: list(logs) for name, logs in found.items() if logs}


def _facts(records: pd.DataFrame) -> str:
    """What the records are and where they come from, in one line."""
    rows = tables.plain_rows(records)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(r["kind"] for r in rows).items()))
    machines = sorted({tables.machine_text(r) for r in rows})
    versions = []
    for name in (column for column in records.columns if column.startswith("versions_")):
        values = sorted({str(r[name]) for r in rows if r[name] is not None})
        versions.append(f"{name.removeprefix('versions_')} {'/'.join(values)}")
    commits = sorted({r["commit"] for r in rows if r["commit"]})
    return "; ".join([
        f"{len(rows)} records ({kinds})", f"hardware: {', '.join(machines)}", f"versions: {', '.join(versions)}",
        f"commit: {', '.join(commits) or 'unknown'}",
    ])  # fmt: skip


def _markdown(sections: list[_Section], notes: Sequence[str], facts: str, links: bool) -> str:
    blocks = ["# vitcmp report", _escape(facts), _bullets(notes)]
    for section in sections:
        blocks.append(f"## {_escape(section.title)}")
        for caption, table in section.tables:
            blocks += [f"### {_escape(caption)}" if caption else "", tables.to_markdown(table)]
        blocks.append(f"All columns: [{section.data}]({section.data})" if links and section.tables else "")
        blocks.append(_bullets(section.notes))
        blocks += [f"![{caption}]({path.name})" for caption, path in section.pictures]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _html(sections: list[_Section], notes: Sequence[str], facts: str) -> str:
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["inline"] = lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    environment.filters["bold"] = lambda text: Markup(tables.BOLD.sub(r"<b>\1</b>", str(escape(text))))
    return environment.from_string(PAGE).render(sections=sections, notes=notes, facts=facts)


def _bullets(notes: Sequence[str]) -> str:
    return "\n".join(f"- {_escape(note)}" for note in notes)


def _escape(text: str) -> str:
    """Markdown passes HTML through, so that `<module>` in an error would vanish."""
    return html.escape(text, quote=False)


def _text(report: Report, path: Path, text: str) -> None:
    store.write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    report.paths.append(path)
