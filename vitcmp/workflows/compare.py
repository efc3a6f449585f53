"""Run a whole study: train every mechanism with every seed, bench, visualize, report.

Each training cell runs in a process of its own, so that one that is killed costs no other. Finished cells are
skipped, unfinished ones resumed, failed ones recorded and passed over.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from vitcmp import machine, store
from vitcmp.attention import AttentionError
from vitcmp.configs import BenchConfig, RunConfig, RuntimeConfig, UserError, resolve_run
from vitcmp.data.datasets import load_data
from vitcmp.models.checkpoint import load_info
from vitcmp.workflows import bench, report, train, visualize
from vitcmp.workflows.train import Listener

QUICK: dict[str, Any] = {
    "dataset": "digits",
    "attention": ["softmax", "linear", "performer", "entmax"],
    "seeds": "0-1",
}
QUICK_BENCH: dict[str, Any] = {"batch_size": 2, "max_seconds": 1.0}


@dataclass(frozen=True)
class TrainCell:
    """One mechanism and seed."""

    config: RunConfig
    key: str
    finished: bool = False
    unfinished: Path | None = None
    """The folder of a run of this cell that was stopped."""

    @property
    def text(self) -> str:
        """For a person."""
        state = "finished" if self.finished else f"resume {self.unfinished.name}" if self.unfinished else "to do"
        return (
            f"train {self.config.model.attention_name} on {self.config.data.dataset}, "
            f"seed {self.config.train.seed}: {state}"
        )


@dataclass
class Study:
    """What a study left."""

    records: list[store.Record] = field(default_factory=list)
    """Of the cells that were run now; finished ones are in the store already."""
    skipped: int = 0
    failed: int = 0
    report: report.Report | None = None
    pictures: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def plan(
    specs: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any], runtime: RuntimeConfig, force: bool
) -> list[TrainCell]:
    """The training cells, seed by seed, so that a study that is cut short has compared all mechanisms.

    Raises: UserError or AttentionError for settings that do not fit.
    """
    given = [resolve_run({**settings, "attention": spec, "seed": seed}) for seed in seeds for spec in specs]
    configs = list(dict.fromkeys(map(train.canonical, given)))
    data = load_data(configs[0].data, runtime.data_dir)
    store.check_writable(runtime.results)
    records = store.read(runtime.results)
    done = {r.key for r in records if r.kind == "train" and r.status == "ok"}
    finished_ids = {r.id for r in records}
    stopped = {}
    for state in sorted((Path(runtime.results) / "runs").glob("*/state.pt")):
        if state.parent.name not in finished_ids:
            with contextlib.suppress(UserError):  # A damaged folder of another run is no reason to stop.
                stopped[load_info(state.parent).key] = state.parent
    cells = []
    for config in configs:
        key = train.run_key(config, data)
        cells.append(TrainCell(config, key, not force and key in done, None if force else stopped.get(key)))
    return cells


def bench_cells(cells: Sequence[TrainCell], measure: BenchConfig) -> list[bench.Cell]:
    """What is benched: every model as it was trained, and every mechanism as `measure` says.

    Raises: UserError where sizes do not fit.
    """
    model, names = cells[0].config.model, dict.fromkeys(cell.config.model.attention_name for cell in cells)
    # Of a mixed model, the attention alone is that of the mechanisms in it.
    single = dict.fromkeys(spec for cell in cells for spec in cell.config.model.attention_specs)
    patch = model.patch
    own = (model.image_hw[0] // patch) * (model.image_hw[1] // patch)
    as_trained = replace(
        measure, level="model", mode="forward", tokens=own, image_sizes=None, execution="eager",
        precision=cells[0].config.train.precision,
    )  # fmt: skip
    measured = bench.cells_of(list(names), model, as_trained)
    measured += bench.cells_of(list(names if measure.level == "model" else single), model, measure)
    return list(dict.fromkeys(measured))


def run(
    cells: Sequence[TrainCell],
    measured: Sequence[bench.Cell],
    runtime: RuntimeConfig,
    force: bool = False,
    listen: Listener = lambda event: None,
) -> Study:
    """Do what is to do, then bench every mechanism, and write the report and the pictures."""
    study = Study(skipped=sum(cell.finished for cell in cells))
    to_do = [cell for cell in cells if not cell.finished]
    for number, cell in enumerate(to_do):
        name = f"{cell.config.model.attention_name}, seed {cell.config.train.seed}"
        listen({"event": "cell", "number": number, "total": len(to_do), "text": name})
        record = _train_apart(cell, runtime, listen)
        study.records.append(record)
        if record.status != "ok":
            listen({"event": "note", "text": f"{name}: {record.status} ({record.error})"})

    listen({"event": "stage", "text": f"bench: {len(measured)} cells, of which finished ones are skipped"})
    study.records += bench.run(measured, runtime, force=force)
    study.failed = sum(record.status != "ok" for record in study.records)

    listen({"event": "stage", "text": "drawing"})
    study.report = report.run(runtime.results, formats=("md", "csv", "html"))
    # A run whose folder was removed, or whose record was merged from elsewhere, has no weights to draw.
    newest = {record.key: record.id for record in store.read(runtime.results) if record.status == "ok"}
    first: dict[str, str] = {}
    for cell in cells:
        if cell.key in newest and (Path(runtime.results) / "runs" / newest[cell.key] / "model.safetensors").is_file():
            first.setdefault(cell.config.model.attention_name, newest[cell.key])
    if first:
        pictures = visualize.run(
            list(first.values()), runtime.results, runtime.data_dir, runtime.device, None, what=["all"]
        )
        study.pictures, study.notes = pictures.paths, pictures.notes
    return study


def _train_apart(cell: TrainCell, runtime: RuntimeConfig, listen: Listener) -> store.Record:
    """Train in a child process; if it dies without a record, the record says so."""
    context = machine.process_context(machine.pick_device(runtime.device), preload=__name__)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(cell.config, runtime, cell.unfinished, sender))
    process.start()
    sender.close()
    reason = "failed"
    try:
        while True:
            event = receiver.recv()
            if event["event"] == "record":
                process.join()
                return store.Record.model_validate(event["record"])
            if event["event"] == "error":
                reason = event["text"]
            listen(event)
    except EOFError:
        process.join()
        if process.exitcode and process.exitcode < 0:
            reason = machine.exit_reason(process.exitcode)
    except (KeyboardInterrupt, SystemExit):
        # A Ctrl-C reached the child too; either way it writes its own record before it ends.
        process.terminate()
        process.join()
        raise
    record = store.new_record(
        kind="train", status="failed", key=cell.key, config={**cell.config.flat(), "name": runtime.name},
        hardware=machine.hardware(machine.pick_device(runtime.device)), versions=machine.versions(),
        commit=machine.commit(), error=reason,
    )  # fmt: skip
    store.append(runtime.results, record)
    return record


def _child(config: RunConfig, runtime: RuntimeConfig, resume: Path | None, sender: Connection) -> None:
    signal.signal(signal.SIGTERM, _leave)
    try:
        record = train.run(config, runtime, resume=resume, listen=sender.send)
        sender.send({"event": "record", "record": record.model_dump()})
    except (UserError, AttentionError) as error:
        sender.send({"event": "error", "text": str(error)})
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
