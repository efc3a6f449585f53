"""The command line: parse, build a config, call one workflow, print.

Before a command runs, only the standard library, Typer, rich, the configs and the names of mechanisms are imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import vitcmp
from vitcmp import __version__, attention
from vitcmp.configs import (
    PRESETS,
    AugmentConfig,
    BenchConfig,
    DataConfig,
    Diverged,
    GridConfig,
    ModelConfig,
    RuntimeConfig,
    TrainConfig,
    UserError,
    attention_name,
    help_texts,
    integers,
    resolve_run,
)
from vitcmp.console import (
    bench_progress,
    counted_progress,
    err,
    make_list,
    make_table,
    out,
    output,
    study_progress,
    text_of,
    training_progress,
)
from vitcmp.options import only, options, read_yaml, take
from vitcmp.plain_json import plain, to_json

if TYPE_CHECKING:
    from vitcmp.store import Record
    from vitcmp.workflows.check import Finding
    from vitcmp.workflows.compare import Study
    from vitcmp.workflows.diff import Change

RUN = (ModelConfig, DataConfig, AugmentConfig, TrainConfig)
TRAINING_ONLY = "name save_every log_every tracker"

app = typer.Typer(
    help="Compare attention mechanisms in Vision Transformers: train, evaluate, benchmark, look inside, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
everywhere: dict[str, Any] = {}
"""The global options that are settings: results, device, data_dir."""

AttentionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attention",
        help="Mechanism, as a spec such as performer:num_features=64; repeat it for several, or all.",
        metavar="SPEC",
        rich_help_panel="Model",
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attention-layers",
        help="Layers with another mechanism, from 0, such as 4-=performer or 0,2=linear; repeat it, the last one wins.",
        metavar="LAYERS=SPEC",
        rich_help_panel="Model",
    ),
]
SeedsOption = Annotated[
    str | None, typer.Option("--seeds", "--seed", help="Seeds, such as 0-2 or 0,5.", rich_help_panel="Train")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file of settings, named as the options (underscores for dashes).")
]
ShowConfigOption = Annotated[bool, typer.Option("--show-config", help="Print the resolved settings and leave.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and leave.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write to (default: in the results folder).")]


def _show_versions(wanted: bool) -> None:
    if wanted:
        from vitcmp import machine

        versions = {**machine.versions(), "vitcmp": __version__, "commit": machine.commit()}
        out.print(", ".join(f"{name} {value}" for name, value in versions.items() if value), highlight=False)
        raise typer.Exit


@app.callback()
def global_options(
    results: Annotated[
        str | None, typer.Option(envvar="VITCMP_RESULTS", help="Folder of the results store (default: results).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps (default: auto).")] = None,
    data_dir: Annotated[
        str | None, typer.Option(envvar="VITCMP_DATA", help="Folder of the data sets (default: ~/.cache/vitcmp).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Data as JSON on stdout, all else on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the versions and leave.", is_eager=True, callback=_show_versions)
    ] = False,
) -> None:
    """Compare attention mechanisms in Vision Transformers: train, evaluate, benchmark, look inside, report."""
    output.json, output.quiet = as_json, quiet
    given = {"results": results, "device": device, "data_dir": data_dir}
    everywhere.clear()
    everywhere.update({name: value for name, value in given.items() if value is not None})


@app.command(rich_help_panel="Work")
@options(*RUN, RuntimeConfig, without="attention seed")
def train(
    given: dict[str, Any],
    attention_specs: AttentionOption = None,
    layers: LayersOption = None,
    seeds: SeedsOption = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this unfinished run.")] = None,
    config: ConfigOption = None,
    show_config: ShowConfigOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train a model for each mechanism and seed, test each once, and record it."""
    settings = _settings(given, attention_specs, layers, seeds, config)
    settings.pop("bench", None)
    runtime = take(settings, RuntimeConfig)
    if resume is not None:
        if show_config or dry_run:
            raise UserError("--resume goes on with a run as it is; `vitcmp runs show RUN` shows its settings")
        _resume(resume, runtime, settings, given)
        return
    specs, numbers = _grid(settings)
    from vitcmp.workflows.train import canonical

    runs = [resolve_run({**settings, "attention": spec, "seed": seed}) for seed in numbers for spec in specs]
    runs = list(dict.fromkeys(map(canonical, runs)))
    if "dataset" not in settings:
        output.say("no --dataset given: training on scikit-learn's digits (8 x 8 pixels, 64 patches)")
    if show_config:
        _show_config([run.flat() for run in runs])
    elif dry_run:
        lines = [f"train {run.model.attention_name} on {run.data.dataset}, seed {run.train.seed}" for run in runs]
        output.show(lines, "\n".join(lines))
    else:
        from vitcmp.workflows.train import check
        from vitcmp.workflows.train import run as workflow

        if len(runs) > 1:
            for run in runs:
                check(run)
        records = []
        for run in runs:
            with training_progress() as listen:
                records.append(workflow(run, runtime, listen=listen))
        _finish_training(records, runtime)


def _resume(name: str, runtime: RuntimeConfig, settings: dict[str, Any], given: dict[str, Any]) -> None:
    if settings:
        raise UserError(f"--resume takes the run's own settings; leave out {', '.join(settings)}")
    from vitcmp import store
    from vitcmp.models.checkpoint import load_info
    from vitcmp.workflows.train import run as workflow

    folder = store.find_run(runtime.results, name)
    if any(record.id == folder.name for record in store.read(runtime.results)):
        raise UserError(f"run '{folder.name}' is finished; there is nothing to resume")
    info = load_info(folder)
    kept = {name: value for name, value in info.logging.items() if name not in given}
    with training_progress() as listen:
        record = workflow(info.run_config, dataclasses.replace(runtime, **kept), resume=folder, listen=listen)
    _finish_training([record], runtime)


def _finish_training(records: Sequence[Record], runtime: RuntimeConfig) -> None:
    output.show([record.model_dump() for record in records], lambda: list(map(_tell_training, records)))
    if any(record.status != "ok" for record in records):
        raise typer.Exit(1)
    output.say(f"recorded in {runtime.results}; next: vitcmp report, vitcmp visualize {records[-1].id}")


def _tell_training(record: Record) -> None:
    m, name = record.metrics, f"{attention_name(record.config['attention'])}, seed {record.config['seed']}"
    if record.status != "ok":
        out.print(f"{name}: {record.status}: {record.error}", highlight=False, markup=False, soft_wrap=True)
        return
    out.print(
        f"{name}: test {m['top1_pct']:.2f} % (95 % interval {m['top1_low_pct']:.1f} to {m['top1_high_pct']:.1f}), "
        f"validation {m['validation_top1_pct']:.2f} %, train {m['train_top1_pct']:.2f} %; "
        f"{m['train_seconds']:.0f} s, {m['throughput_img_s']:,.0f} images/s in {m['precision_used']}; run {record.id}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command("eval", rich_help_panel="Work")
@options(RuntimeConfig, without=TRAINING_ONLY)
def evaluate(
    given: dict[str, Any],
    run: Annotated[str, typer.Argument(help="Run (id or the beginning of one) or checkpoint file.")],
    dataset: Annotated[str | None, typer.Option(help="Another data set with as many classes.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    image_size: Annotated[int | None, typer.Option(help="Evaluate at this resolution; positions interpolate.")] = None,
    corrupt: Annotated[str | None, typer.Option(help="noise, blur, contrast or jpeg.")] = None,
    severity: Annotated[int, typer.Option(help="Of the corruption, 1 to 5.")] = 3,
    config: ConfigOption = None,
) -> None:
    """Evaluate a trained model: top-1, top-5, per class, confusion, calibration."""
    from vitcmp.workflows.eval import run as workflow

    if image_size is not None and image_size < 1:
        raise UserError(f"image_size ({image_size}) must be above 0")
    found = workflow(run, _runtime(given, config), dataset, split, image_size, corrupt, severity)
    record, m = found.record, found.record.metrics

    def tell() -> None:
        name = attention_name(record.config["attention"])
        lines = [f"{name} on {record.config['dataset']} ({split}, {m['images']} images)"]
        if record.status != "ok":
            text = f"{lines[0]}: {record.status}: {record.error}"
            out.print(text, highlight=False, markup=False, soft_wrap=True)
            return
        if "top5_pct" in m:
            lines.append(f"top-5 {m['top5_pct']:.2f} %")
        lines.insert(1, f"top-1 {m['top1_pct']:.2f} % (95 % interval {m['top1_low_pct']:.1f} to "
                        f"{m['top1_high_pct']:.1f})")  # fmt: skip
        lines.append(f"NLL {m['nll']:.4f}, calibration error (ECE) {m['ece_pct']:.2f} %")
        out.print("\n".join(lines), highlight=False)
        rows = [
            [name, "–" if share is None else f"{share:.1f}", *_confused(found.confusion[i], i, found.class_names)]
            for i, (name, share) in enumerate(zip(found.class_names, found.class_top1_pct, strict=True))
        ]
        out.print(make_table(["class", "top-1 %", "most often taken for"], rows))
        out.print(f"predictions: {found.predictions}", highlight=False, soft_wrap=True)

    output.show(record.model_dump(), tell)
    if record.status != "ok":
        raise typer.Exit(1)


def _confused(row: list[int], own: int, names: Sequence[str]) -> list[str]:
    """The most frequent wrong class of one row of the confusion matrix."""
    wrong = [(count, name) for i, (count, name) in enumerate(zip(row, names, strict=True)) if i != own]
    count, name = max(wrong, default=(0, ""))
    return [f"{name} ({count})" if count else ""]


@app.command(rich_help_panel="Work")
@options(RuntimeConfig, without=TRAINING_ONLY)
def predict(
    given: dict[str, Any],
    run: Annotated[str, typer.Argument(help="Run (id or the beginning of one) or checkpoint file.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(help="Classes to show.")] = 5,
    invert: Annotated[bool, typer.Option("--invert", help="Swap black and white first.")] = False,
    config: ConfigOption = None,
) -> None:
    """Classify your own pictures with a trained model."""
    from vitcmp.workflows.predict import run as workflow

    runtime = _runtime(given, config)
    predictions = workflow(run, images, runtime.results, runtime.device, top, invert)
    rows = [
        [p.image if i == 0 else "", name, f"{share:.1f}"]
        for p in predictions
        for i, (name, share) in enumerate(p.classes)
    ]
    output.show([dataclasses.asdict(p) for p in predictions], make_table(["image", "class", "probability %"], rows))


@app.command(rich_help_panel="Work")
@options(BenchConfig, ModelConfig, RuntimeConfig, without=f"attention image_size image_sizes {TRAINING_ONLY}")
def bench(
    given: dict[str, Any],
    attention_specs: AttentionOption = None,
    layers: LayersOption = None,
    image_sizes: Annotated[
        str | None,
        typer.Option("--image-size", help=help_texts(BenchConfig)["image_sizes"], rich_help_panel="Bench"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip cells that are in the store already.")] = False,
    diff: Annotated[
        Path | None,
        typer.Option(help="Compare with the records of a results folder, or with what --json bench printed."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="With --diff: exit with 3 where a metric changed by more, such as latency_ms:+10%; repeat."),
    ] = None,
    config: ConfigOption = None,
    show_config: ShowConfigOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Measure latency, throughput, peak memory and MACs over token counts."""
    from vitcmp.workflows import diff as comparing

    if fail_on and diff is None:
        raise UserError("--fail-on needs records to compare with: give --diff")
    limits = [comparing.Limit.parse(text) for text in fail_on or ()]
    old = comparing.read(diff) if diff else []
    comparing.check(limits, old)
    settings = _settings(given, attention_specs, layers, None, config, BenchConfig, ModelConfig)
    runtime = take(settings, RuntimeConfig)
    settings = {**settings.pop("bench", {}), **settings}
    if image_sizes is not None:
        if "tokens" in given:
            raise UserError("give --tokens or --image-size: each says how many tokens there are")
        settings["image_sizes"] = image_sizes
    everyone = "all" in _listed(settings.get("attention", "all"))
    specs, _ = _grid(settings, everything=True)
    measure = take(settings, BenchConfig)
    if everyone and measure.level == "core":
        without = [name for name in attention.available() if not attention.load(name).has_map]
        specs = [spec for spec in specs if spec not in without]
        output.say(f"left out, as they have no core from queries, keys and values on: {', '.join(without)}")
    from vitcmp.workflows import bench as workflow

    model = workflow.model_of(measure, runtime, settings)
    cells = workflow.cells_of(specs, model, measure)
    if show_config:
        names = list(dict.fromkeys(cell.name for cell in cells))
        _show_config([{**dataclasses.asdict(model), **dataclasses.asdict(measure), "attention": names}])
        return
    if dry_run:
        lines = [f"bench {cell}" for cell in cells]
        output.show(lines, "\n".join(lines))
        return
    workflow.check(cells, runtime)
    finished = workflow.finished(cells, runtime) if resume else {}
    if finished:
        output.say(f"{len(finished)} cells are in {runtime.results} already")
    with bench_progress(len(cells) - len(finished)) as listen:
        measured = workflow.run(cells, runtime, listen, force=not resume)
    records = [*finished.values(), *measured]
    changes: list[Change] = []
    # Numbers that took long are shown even where there is nothing to compare them with.
    try:
        changes = comparing.run(comparing.cells(records), old, limits) if old else []
    finally:
        output.show(
            {"cells": comparing.cells(records), **({"changes": list(map(dataclasses.asdict, changes))} if old else {})},
            lambda: _tell_bench(records, changes),
        )
    if limits and any(change.broken for change in changes):
        raise typer.Exit(3)
    if any(record.status != "ok" for record in records):
        raise typer.Exit(1)


def _tell_bench(records: list[Record], changes: list[Change]) -> None:
    from vitcmp import store
    from vitcmp.render import bench_tables, bench_text

    table = bench_tables.scaling(store.table(records))
    for title, text, notes in bench_text.terminal(table):
        out.print(make_table(list(text.columns), text.to_numpy().tolist(), title, notes, lines=False), "")
    for note in bench_tables.bench_notes(table):
        output.say(note)
    if changes:
        rows = [[c.cell, c.metric, _number(c.old), _number(c.new), _ratio_text(c), c.broken or "–"] for c in changes]
        out.print(
            make_table(["cell", "metric", "before", "now", "ratio (95 %)", "beyond"], rows, "Changes", lines=False)
        )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text_of(value)


def _ratio_text(change: Change) -> str:
    if change.ratio is None:
        return "–"
    r = change.ratio
    return f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f}){', a tie' if change.tie else ''}"


@app.command(rich_help_panel="Show")
@options(RuntimeConfig, without=TRAINING_ONLY)
def visualize(
    given: dict[str, Any],
    runs: Annotated[list[str], typer.Argument(help="Runs or checkpoint files; several are set side by side.")],
    image: Annotated[list[Path] | None, typer.Option(help="Draw on this picture; repeat it for several.")] = None,
    index: Annotated[int, typer.Option(help="Without --image: which test image, from 0.")] = 0,
    what: Annotated[
        str, typer.Option(help="maps, rollout, gradcam, profiles, samples, curves, confusion or all; comma-separated.")
    ] = "all",
    out_dir: OutOption = None,
    config: ConfigOption = None,
) -> None:
    """Draw attention maps, rollout, Grad-CAM, learning curves, a sheet of samples."""
    from vitcmp.workflows.visualize import run as workflow

    runtime = _runtime(given, config)
    pictures = workflow(
        runs, runtime.results, runtime.data_dir, runtime.device, out_dir, image or (), index, what.split(",")
    )
    for note in pictures.notes:
        output.say(note)
    output.show({"paths": pictures.paths, "notes": pictures.notes}, "\n".join(map(str, pictures.paths)))


@app.command(rich_help_panel="Show")
@options(RuntimeConfig, without=TRAINING_ONLY)
def report(
    given: dict[str, Any],
    formats: Annotated[str, typer.Option("--format", help="md, csv, tex, html or all; comma-separated.")] = "md,csv",
    out_dir: OutOption = None,
    config: ConfigOption = None,
) -> None:
    """Write tables and plots of everything in the store."""
    from vitcmp.render.tables import to_rich
    from vitcmp.workflows.report import run as workflow

    written = workflow(_runtime(given, config).results, out_dir, formats.split(","))
    for note in written.notes:
        output.say(note)

    def tell() -> None:
        for comparison in written.comparisons:
            out.print(to_rich(comparison.table, comparison.title, comparison.notes, out.width))
        out.print("\n".join(map(str, written.paths)), highlight=False, soft_wrap=True)

    tables = [
        {"title": c.title, "notes": c.notes, "rows": json.loads(c.table.to_json(orient="records"))}
        for c in written.comparisons
    ]
    output.show({"comparisons": tables, "paths": written.paths, "notes": written.notes}, tell)


@app.command(rich_help_panel="Work")
@options(*RUN, RuntimeConfig, without="attention seed")
def compare(
    given: dict[str, Any],
    study: Annotated[Path | None, typer.Argument(help="YAML file of settings, with attention and seeds.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The main mechanisms on digits, two seeds.")] = False,
    attention_specs: AttentionOption = None,
    layers: LayersOption = None,
    seeds: SeedsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Do finished cells again.")] = False,
    config: ConfigOption = None,
    show_config: ShowConfigOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Run a whole study: train every mechanism with every seed, bench, report, visualize."""
    if study is not None and config is not None:
        raise UserError(f"give the study once: '{study}' or --config '{config}'")
    settings = _settings(given, attention_specs, layers, seeds, study or config)
    from vitcmp.workflows import compare as workflow

    if quick:
        settings = {**workflow.QUICK, **settings}
        settings["bench"] = {**workflow.QUICK_BENCH, **settings.get("bench", {})}
    measured = settings.pop("bench", {})
    runtime = take(settings, RuntimeConfig)
    specs, numbers = _grid(settings, everything=True)
    cells = workflow.plan(specs, numbers, settings, runtime, force)
    benched = workflow.bench_cells(cells, take(measured, BenchConfig))
    if show_config:
        _show_config([cell.config.flat() for cell in cells])
        return
    if dry_run:
        lines = [*(cell.text for cell in cells), *(f"bench {cell}" for cell in benched)]
        output.show(lines, "\n".join(lines))
        return
    with study_progress() as listen:
        finished = workflow.run(cells, benched, runtime, force, listen)
    _tell_study(finished)
    if finished.failed:
        raise typer.Exit(1)


def _tell_study(study: Study) -> None:
    from vitcmp.render.tables import to_rich

    assert study.report is not None
    written = study.report
    for note in [*study.notes, *written.notes]:
        output.say(note)
    if study.skipped:
        output.say(f"{study.skipped} finished cells were not done again (--force does)")

    def tell() -> None:
        for comparison in written.comparisons[:1]:
            out.print(to_rich(comparison.table, comparison.title, comparison.notes, out.width))
        out.print("\n".join(map(str, [*written.paths, *study.pictures])), highlight=False, soft_wrap=True)

    records = [record.model_dump() for record in study.records]
    output.show({"records": records, "failed": study.failed, "paths": [*written.paths, *study.pictures]}, tell)


@app.command("list", rich_help_panel="Look up")
def list_mechanisms(
    specs: Annotated[list[str] | None, typer.Argument(help="Mechanisms to show in full, with their options.")] = None,
) -> None:
    """The mechanisms, with paper, cost and map; of one, its options too."""
    mechanisms = []
    for spec in specs or attention.available():
        try:
            mechanisms.append(attention.load(spec))
        except attention.AttentionError as error:
            # One broken package must not hide the rest.
            if specs:
                raise
            output.say(f"not listed: {error}")
    values = [_facts_of(m) for m in mechanisms]
    output.show(values, lambda: list(map(_tell_mechanism, values)) if specs else _tell_mechanisms(values))


def _tell_mechanisms(values: list[dict[str, Any]]) -> None:
    rows = [
        [v["name"], v["cost"], "no" if v["no_map"] else "weights" if v["row_stochastic"] else "yes",
         "any" if v["equivariant"] else "grid", v["approximates"] or "–",
         re.sub(r"https?://(arxiv\.org/abs/)?", "", v["paper"])]
        for v in values
    ]  # fmt: skip
    sharing: dict[str, list[str]] = {}
    for v in values:
        if v["map_note"]:
            sharing.setdefault(v["map_note"], []).append(v["name"])
    notes = [
        "",
        *(f"no map of {v['name']}: {v['no_map']}" for v in values if v["no_map"]),
        *(f"{note}: {', '.join(names)}" for note, names in sharing.items()),
        "map: weights are not negative and sum to 1 in a row; yes: any numbers",
        "order: any, where permuted tokens permute the output; grid, where it knows their places",
        "paper: on arXiv.org; `vitcmp list NAME` tells more, and the options",
    ]
    out.print(make_table(["mechanism", "cost a head", "map", "order", "estimates", "paper"], rows, "", notes, False))


def _tell_mechanism(v: dict[str, Any]) -> None:
    rows = "its rows are weights" if v["row_stochastic"] else "its rows are no weights"
    facts = {
        "paper": v["paper"] or "–",
        "cost": f"{v['cost'] or '–'} a head",
        "map": f"no: {v['no_map']}" if v["no_map"] else ", ".join(filter(None, ["yes", rows, v["map_note"]])),
        "approximates": v["approximates"] or "nothing: it is its own",
        "order": "permuted tokens permute the output" if v["equivariant"] else "knows where its tokens lie",
        "options": "none" if not v["options"] else "",
        **{f"  {name}={o['default']}": o["help"] for name, o in v["options"].items()},
    }
    out.print(make_list(f"{v['name']}: {v['summary']}", facts), "")


def _facts_of(m: attention.Mechanism) -> dict[str, Any]:
    """All that is known of a mechanism without building it."""
    texts = {name: " ".join(text.split()) for name, text in help_texts(type(m.config)).items()}
    options = {
        f.name: {"default": f.default, "value": getattr(m.config, f.name), "help": texts.get(f.name, "")}
        for f in dataclasses.fields(m.config)
    }
    names = "name summary paper cost has_map no_map map_note row_stochastic equivariant approximates"
    return {**{name: getattr(m, name) for name in names.split()}, "options": options}


@app.command(rich_help_panel="Look up")
def check(
    specs: Annotated[
        list[str], typer.Argument(help="Mechanisms, as specs or as files of your own, or all.", metavar="SPEC|FILE...")
    ],
) -> None:
    """Measure whether a mechanism keeps its contract: shapes, map, gradients, multiply-adds and more."""
    from vitcmp.workflows import check as workflow

    names = list(dict.fromkeys(n for spec in specs for n in (attention.available() if spec == "all" else [spec])))
    mechanisms = [attention.load(name) for name in names]
    done = count(1)
    with counted_progress("check", len(mechanisms) * len(workflow.CHECKS)) as advance:
        results = {m.spec: workflow.run(m.spec, lambda finding: advance(next(done))) for m in mechanisms}
    values = [
        {
            "spec": spec,
            "holds": all(f.holds for f in findings),
            "findings": [
                {"check": f.check, "meaning": workflow.MEANING[f.check], "applies": f.applies,
                 "measured": f.measured, "bound": f.bound, "holds": f.holds, "note": f.note}
                for f in findings
            ],
        }
        for spec, findings in results.items()
    ]  # fmt: skip

    def tell() -> None:
        for spec, findings in results.items():
            _tell_check(spec, findings, workflow.MEANING)

    output.show(values, tell)
    if not all(value["holds"] for value in values):
        raise typer.Exit(1)


def _tell_check(spec: str, findings: Sequence[Finding], meaning: dict[str, str]) -> None:
    rows = [
        [f.check, meaning[f.check], "–" if f.measured is None else f"{f.measured:.2g}", f"{f.bound:g}",
         ("yes" if f.holds else "NO") if f.applies else "n/a"]
        for f in findings
    ]  # fmt: skip
    notes = [f"{f.check}: {f.note}" for f in findings if f.note]
    out.print(make_table(["check", "what it means", "measured", "bound", "holds"], rows, spec, notes))
    failed = [f.check for f in findings if not f.holds]
    verdict = f"{len(failed)} of {len(findings)} checks fail: {', '.join(failed)}" if failed else "all checks hold"
    out.print(f"{spec}: {verdict}", highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel="Look up")
@options(RuntimeConfig, without=TRAINING_ONLY)
def runs(
    given: dict[str, Any],
    action: Annotated[str, typer.Argument(help="list, show or rm.")] = "list",
    run: Annotated[str | None, typer.Argument(help="The run, for show and rm.")] = None,
    config: ConfigOption = None,
) -> None:
    """List the runs in the results folder, show one, or remove one's files."""
    from vitcmp.configs import choose
    from vitcmp.workflows import runs as workflow

    choose(action, ("list", "show", "rm"), "action")
    results = _runtime(given, config).results
    if action == "list":
        rows = workflow.overview(results)
        columns = ["run", "status", "attention", "dataset", "seed", "epochs", "top1_pct"]
        table = make_table(columns, [[text_of(row[name]) for name in columns] for row in rows], lines=False)
        output.show(rows, table if rows else f"no runs in {results}; `vitcmp train` makes one")
        return
    if run is None:
        raise UserError(f"`vitcmp runs {action}` needs a run; `vitcmp runs` lists them")
    if action == "show":
        shown = workflow.show(results, run)
        output.show(shown, to_json(shown, indent=2))
    else:
        folder = workflow.remove(results, run)
        output.show({"removed": folder}, f"removed {folder}; its record stays in the store")


@app.command(rich_help_panel="Look up")
@options(RuntimeConfig, without=TRAINING_ONLY)
def doctor(
    given: dict[str, Any],
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the forms of all operators first, for auto to choose by.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """What this machine has, whether its kernels compute right, and what to install."""
    from vitcmp.workflows import doctor as workflow

    runtime = _runtime(given, config)
    if measure:
        with counted_progress("measuring", 100) as tell:
            path = workflow.measure(runtime, lambda text, done, total: tell(100 * done // total))
        output.say(f"written to {path}; auto chooses by it from now on, but where VITCMP_PROFILE=none")
    facts = workflow.run(runtime, output.say)
    output.show(facts, make_table(["what", "found"], [[name, text] for name, text in facts.items()]))


def _settings(
    given: dict[str, Any],
    specs: list[str] | None,
    layers: list[str] | None,
    seeds: str | None,
    file: Path | None,
    *classes: type[Any],
) -> dict[str, Any]:
    """File, global options and command line in one flat mapping; the later wins. A study's file serves train too."""
    settings = read_yaml(file, *(classes or RUN), RuntimeConfig, GridConfig, sections={"bench": BenchConfig})
    settings |= {**everywhere, **given}
    if specs:
        settings["attention"] = specs
    if layers:
        settings["attention_layers"] = layers
    if seeds is not None:
        settings["seeds"] = seeds
    return settings


def _runtime(given: dict[str, Any], file: Path | None) -> RuntimeConfig:
    """For commands that need to know no more than where things are; the rest of a file is not for them."""
    runtime = take(only(_settings(given, None, None, None, file), RuntimeConfig), RuntimeConfig)
    if runtime.kernels:
        os.environ["VITCMP_KERNELS"] = runtime.kernels
    return runtime


def _grid(settings: dict[str, Any], everything: bool = False) -> tuple[list[str], list[int]]:
    """Take mechanisms, with those of other layers, and seeds out of `settings`; none given: softmax, or everything."""
    own = PRESETS.get(settings.get("preset", ""), {}).get("attention", GridConfig.attention)
    named = settings.pop("attention", "all" if everything else own)
    named, layers = _listed(named), _listed(settings.pop("attention_layers", ()))
    seeds = settings.pop("seeds", settings.pop("seed", 0))
    numbers = integers(seeds)
    if not named or not numbers:
        raise UserError(f"{'attention' if not named else 'seeds'} must name at least one")
    for text in layers:
        if not re.fullmatch(r"\d[\d,+-]*=.+", text):
            raise UserError(f"attention_layers: '{text}' must be layers, =, and a mechanism, such as 4-=performer")
    specs = [name for spec in named for name in (attention.available() if spec == "all" else [spec])]
    return [",".join([spec, *layers]) for spec in specs], list(numbers)


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _show_config(configs: list[dict[str, Any]]) -> None:
    import yaml

    text = "---\n".join(yaml.safe_dump(plain(c), sort_keys=False) for c in configs)
    output.show(configs, text.rstrip())


# The base of all of Typer's complaints; it has no public name that old and new versions share.
_UsageMistake: Any = typer.BadParameter.__mro__[2]


def _terminated(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def main() -> NoReturn:
    """Run the command line. Exit: 0 ok, 1 failed or diverged, 2 bad input, 3 a regression, 130 and 143 interrupted."""
    vitcmp.is_own_process = True
    signal.signal(signal.SIGTERM, _terminated)
    warnings.showwarning = lambda message, *rest: output.say(f"warning: {message}")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (UserError, attention.AttentionError) as error:
        _fail(str(error))
    except _UsageMistake as error:
        _fail(error.format_message())
    except Diverged as error:
        _fail(str(error), code=1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        from vitcmp.kernels.switch import KernelError, SettingError  # whatever failed has imported torch

        if not isinstance(error, KernelError):
            raise
        _fail(str(error), code=2 if isinstance(error, SettingError) else 1)
    except SystemExit as stopped:
        code = stopped.code
    if code in (130, 143):
        err.print("interrupted; what is finished is recorded. Go on with `vitcmp train --resume RUN` (`vitcmp runs` "
                  "lists it), `vitcmp bench --resume`, or the same `vitcmp compare`",
                  highlight=False, soft_wrap=True)  # fmt: skip
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    err.print(f"vitcmp: {' '.join(message.split())}", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
