"""Measure what mechanisms cost: latency, throughput, peak memory and multiply-adds over token counts.

Cells that differ in their mechanism alone form a group. A worker process holds all of a group and takes their samples
in turn, in shuffled rounds; the first mechanism runs twice, as two copies, which tells how large a difference means
nothing. Peak memory is taken in a fresh process a cell. A cell that fails, runs out of memory or of time is a record,
and costs no other.
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from vitcmp import attention, machine, store
from vitcmp.attention import AttentionError, TokenGrid
from vitcmp.configs import BenchConfig, ModelConfig, RuntimeConfig, UserError, resolve_run, split
from vitcmp.metrics import latency, memory, roofline
from vitcmp.metrics.latency import CellLost, Plan
from vitcmp.metrics.statistics import median_interval
from vitcmp.metrics.worker import Worker
from vitcmp.metrics.workload import Cell, MemoryStation, Station, build_module
from vitcmp.models.checkpoint import load_info

COLD_SAMPLES = 25
Listener = Callable[[dict[str, Any]], None]


def cells_of(specs: Sequence[str], model: ModelConfig, bench: BenchConfig) -> list[Cell]:
    """Every mechanism under every combination of settings, each once, in groups that differ in the mechanism alone.

    Raises: UserError where mechanisms are mixed and the level measures one, or sizes do not fit.
    """
    counts = bench.several("tokens")
    if sides := bench.several("image_sizes"):
        for side in sides:
            if side % model.patch:
                raise UserError(f"image_size ({side}) must be divisible by patch_size ({model.patch})")
        counts = tuple((side // model.patch) ** 2 for side in sides)
    cells = []
    for tokens, batch_size, precision, execution, mode in itertools.product(
        counts, *map(bench.several, ("batch_size", "precision", "execution", "mode"))
    ):
        single = replace(
            bench, tokens=tokens, batch_size=batch_size, precision=precision, execution=execution, mode=mode,
            image_sizes=None,
        )  # fmt: skip
        sized = _with_tokens(model, tokens)
        for spec in specs:
            mixed = replace(sized, attention=spec)
            named = tuple(map(attention.canonical, mixed.attention_specs))
            cells.append(Cell(replace(mixed, attention=named), single))
            if isinstance(cells[-1].model.attention, tuple) and bench.level != "model":
                raise UserError(f"'{cells[-1].name}' mixes mechanisms over layers: measure it with --level model")
    return list(dict.fromkeys(cells))


def model_of(bench: BenchConfig, runtime: RuntimeConfig, given: Mapping[str, Any]) -> ModelConfig:
    """The model to measure: of the given settings, on top of the trained run's, where `bench` names one.

    Raises: UserError for no such run, or settings that do not fit.
    """
    if bench.run is None:
        return resolve_run({"dataset": "fake", **given}).model
    trained = asdict(load_info(store.find_run(runtime.results, bench.run)).run_config.model)
    for name in ("dim", "num_heads", "patch_size", "pool", "image_size"):
        if given.get(name, trained[name]) != trained[name]:
            raise UserError(f"--run brings its model's sizes: {name} is {trained[name]}, so leave out {name}")
    (model,) = split({**trained, "attention": "softmax", **given}, ModelConfig)
    return model


def _with_tokens(model: ModelConfig, tokens: int) -> ModelConfig:
    """The model for images that have so many patches, on their squarest grid."""
    grid, patch = TokenGrid.squarest(tokens), model.patch
    height, width = grid.height * patch, grid.width * patch
    return replace(model, patch_size=patch, image_size=height if height == width else (height, width))


def check(cells: Sequence[Cell], runtime: RuntimeConfig) -> None:
    """Whether there is anything to measure of each mechanism.

    Raises: UserError where cells need a compiler that is absent, AttentionError for a mechanism that fits no size.
    """
    device = machine.pick_device(runtime.device)
    if any(cell.bench.execution == "compiled" for cell in cells) and device.type == "cpu" and not machine.compiler():
        raise UserError("compiling for the CPU needs a C++ compiler; install g++ or leave out --execution compiled")
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.name, []).append(cell)
    for mine in by_name.values():
        # Any size that can be built will do: a size that cannot is a record.
        for cell in (smallest := {c.tokens: c for c in sorted(mine, key=lambda c: c.tokens)}).values():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    build_module(cell)
                break
            except AttentionError:
                if cell.tokens == max(smallest):
                    raise
            except Exception:
                break


def finished(cells: Sequence[Cell], runtime: RuntimeConfig) -> dict[Cell, store.Record]:
    """The newest ok record of each cell that was measured by this code on this machine."""
    device = machine.pick_device(runtime.device)
    machine.set_threads(runtime.threads)
    newest = {r.key: r for r in store.read(runtime.results) if r.kind == "bench" and r.status == "ok"}
    keys = {cell: _key(cell, device) for cell in cells}
    return {cell: newest[key] for cell, key in keys.items() if key in newest}


def run(
    cells: Sequence[Cell], runtime: RuntimeConfig, listen: Listener = lambda event: None, force: bool = True
) -> list[store.Record]:
    """Measure the cells and append a record each, as soon as it is measured.

    Unless `force`, cells that have an ok record from this code and machine are skipped.
    """
    with machine.kernels_as(runtime.kernels):
        return _run(cells, runtime, listen, force)


def _run(cells: Sequence[Cell], runtime: RuntimeConfig, listen: Listener, force: bool) -> list[store.Record]:
    device = machine.pick_device(runtime.device)
    store.check_writable(runtime.results)
    machine.set_threads(runtime.threads)
    done = {} if force else finished(cells, runtime)
    waiting = [cell for cell in cells if cell not in done]
    records: list[store.Record] = []
    with _Bench(device, runtime, listen) as bench:
        for group in _groups(waiting):
            for cell, outcome in bench.measure(group):
                record = store.new_record(
                    kind="bench", key=_key(cell, device), config=_config(cell), hardware=machine.hardware(device),
                    versions=machine.versions(), commit=machine.commit(), **outcome,
                )  # fmt: skip
                store.append(runtime.results, record)
                records.append(record)
                listen({"event": "cell", "done": len(records), "total": len(waiting), "record": record})
    return records


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.bench, replace(cell.model, attention="")), []).append(cell)
    return list(groups.values())


class _Bench:
    """The measuring of one device: the worker, what is measured once, and what became of each cell."""

    def __init__(self, device: torch.device, runtime: RuntimeConfig, listen: Listener) -> None:
        self.device, self.runtime, self.listen = device, runtime, listen
        self.worker: Worker | None = None
        self.ceilings: dict[torch.dtype, roofline.Ceilings | CellLost] = {}
        self.errors: dict[tuple[str, int], dict[str, Any] | CellLost] = {}

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self.worker is not None:
            self.worker.stop(at_once=kind is not None)

    def _process(self, station: type, bench: BenchConfig) -> Worker:
        limit = memory.default_limit_mib() if bench.memory_limit == "auto" else bench.memory_limit
        return Worker(
            station, str(self.device), torch.get_num_threads(), limit, device=self.device, timeout_s=bench.timeout
        )

    def measure(self, group: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The cells of a group, each with the status, metrics, warnings and error of its record.

        The samples come last, so that nothing is between them and the records.
        """
        bench = group[0].bench
        self.worker = self.worker or self._process(Station, bench)
        self.worker.timeout_s = bench.timeout
        metrics: dict[str, dict[str, Any]] = {cell.name: {} for cell in group}
        notes: dict[str, list[str]] = {cell.name: [] for cell in group}
        lost: dict[str, CellLost] = {}
        for cell in group:
            self._step(cell, "work")
            try:
                metrics[cell.name], notes[cell.name] = self._ask("describe", cell)
            except CellLost as loss:
                lost[cell.name] = loss
        for cell in group:
            if cell.name not in lost:
                self._add_untimed(cell, metrics[cell.name], notes[cell.name])
        self._release()
        for cell in group:
            if cell.name not in lost:
                self._step(cell, "warm-up")
                try:
                    self._ask("prepare", cell, 0)
                    metrics[cell.name] |= self._ask("what_ran", cell)
                except CellLost as loss:
                    lost[cell.name] = loss
        state = machine.state(self.device)
        samples, more, floor = self._time([cell for cell in group if cell.name not in lost])
        lost |= more
        together = uuid.uuid4().hex[:12]
        for cell in group:
            found = metrics[cell.name]
            if cell.name in lost:
                end = lost[cell.name]
                yield cell, dict(status=end.status, error=end.reason, metrics=found, warnings=notes[cell.name])
                continue
            found |= {**_latency(samples[cell.name], cell), "noise_floor_pct": floor, "group": together, **state}
            notes[cell.name] += latency.instability(samples[cell.name], plan_of(bench))
            if floor is None:
                notes[cell.name].append("no noise floor: the copy of the first mechanism was lost")
            if self.device.type == "cuda":
                self._add_cold(cell, found, notes[cell.name])
            if "work_gflop" in found and "peak_gflop_s" in found:
                work, ceilings = found["work_gflop"], roofline.Ceilings(found["peak_gflop_s"], found["copy_gb_s"])
                found["achieved_gflop_s"] = roofline.achieved_gflop_s(work, found["latency_ms"])
                found["fraction_of_peak"] = roofline.fraction_of_peak(work, found["latency_ms"], ceilings)
            yield cell, dict(status="ok", metrics=found, warnings=notes[cell.name])
        self._release()

    def _time(self, cells: list[Cell]) -> tuple[dict[str, list[float]], dict[str, CellLost], float | None]:
        """The samples of what could be timed, what was lost on the way, and the noise floor in percent."""
        if not cells:
            return {}, {}, None
        by_name = {cell.name: (cell, 0) for cell in cells}
        twin = f"{cells[0].name} again"
        # The twin is no cell: without it, there is no noise floor, and nothing else is lost.
        with contextlib.suppress(CellLost):
            self._ask("prepare", cells[0], 1)
            by_name[twin] = (cells[0], 1)
        taken, spent = itertools.count(1), 0.0

        def sample(name: str) -> float:
            nonlocal spent
            cell, copy = by_name[name]
            self._step(cell, f"sample {next(taken)}")
            ms, seconds = self._ask("sample", cell, copy)
            spent += seconds
            return ms

        samples, lost = latency.measure(sample, list(by_name), plan_of(cells[0].bench), clock=lambda: spent)
        lost.pop(twin, None)
        again, first = samples.pop(twin, None), samples.get(cells[0].name)
        floor = None if again is None or first is None else 100 * latency.noise_floor(first, again)
        return samples, lost, floor

    def _step(self, cell: Cell, text: str) -> None:
        self.listen({"event": "step", "cell": cell, "text": text})

    def _ask(self, method: str, cell: Cell, *args: object) -> Any:
        """Ask the worker; out of memory counts only in a process that no other cell has filled."""
        assert self.worker is not None
        try:
            return self.worker.ask(method, cell, *args)
        except CellLost as loss:
            # After a fault on CUDA, nothing works in that process any more.
            if loss.status == "oom" or self.device.type == "cuda":
                self.worker.stop()
            if loss.status != "oom":
                raise
        try:
            return self.worker.ask(method, cell, *args)
        except CellLost as loss:
            self.worker.stop()
            if loss.status == "oom" and self.device.type == "cpu":
                raise CellLost("oom", f"{loss.reason}; --memory-limit allows more") from None
            raise

    def _release(self) -> None:
        """So that what the worker freed does not stand beside what the processes for memory take."""
        assert self.worker is not None
        if self.worker.process is not None:
            try:
                self.worker.ask("release")
            except CellLost:
                self.worker.stop()

    def _add_untimed(self, cell: Cell, found: dict[str, Any], notes: list[str]) -> None:
        """The machine's ceilings, memory and errors; what cannot be had is left out, with a note."""
        dtype = cell.dtype(self.device)
        if dtype not in self.ceilings:
            self.ceilings[dtype] = self._try("ceilings", dtype)
        ceilings = self.ceilings[dtype]
        if isinstance(ceilings, CellLost):
            notes.append(f"the machine's ceilings: {ceilings.reason}")
        else:
            found |= {"peak_gflop_s": ceilings.gflop_s, "copy_gb_s": ceilings.copy_gb_s}
        if cell.bench.memory:
            self._add_memory(cell, found, notes)
        if cell.bench.errors and isinstance(cell.model.attention, str) and attention.load(cell.name).approximates:
            # They depend on the mechanism and the tokens alone, so they are measured once.
            key = (cell.name, cell.tokens)
            if key not in self.errors:
                self._step(cell, "error")
                self.errors[key] = self._try("errors", cell, cell.bench.run, self.runtime)
            errors = self.errors[key]
            if isinstance(errors, CellLost):
                notes.append(f"error against what it approximates: {errors.reason}")
            else:
                found |= errors

    def _try(self, method: str, *args: object) -> Any:
        """What the worker answers, or the CellLost."""
        assert self.worker is not None
        try:
            return self.worker.ask(method, *args)
        except CellLost as loss:
            self.worker.stop()
            return loss

    def _add_memory(self, cell: Cell, found: dict[str, Any], notes: list[str]) -> None:
        """A CPU's memory in a fresh process; a device that counts its own tells in the worker, too."""
        self._step(cell, "memory")
        try:
            if self.device.type != "cpu":
                found |= self._ask("memory", cell)
            else:
                self._release()
                with self._process(MemoryStation, cell.bench) as child:
                    found |= child.ask("memory", cell)
            if found["peak_memory_mib"] is None:
                notes.append("peak memory: this system does not tell")
        except CellLost as loss:
            notes.append(f"peak memory: {loss.reason}")

    def _add_cold(self, cell: Cell, found: dict[str, Any], notes: list[str]) -> None:
        try:
            found["cold_latency_ms"] = float(np.median(self._ask("cold_ms", cell, COLD_SAMPLES)))
        except CellLost as loss:
            notes.append(f"cold latency: {loss.reason}")


def plan_of(bench: BenchConfig) -> Plan:
    """When a cell has enough samples."""
    return Plan(rounds=bench.rounds, max_seconds=bench.max_seconds, most_rounds=max(Plan.most_rounds, bench.rounds))


def _latency(samples: list[float], cell: Cell) -> dict[str, Any]:
    samples = [round(ms, 6) for ms in samples]  # to the nanosecond
    middle, spread = latency.median_and_iqr(samples)
    low, high = median_interval(samples)
    return {
        "latency_ms": middle, "latency_low_ms": low, "latency_high_ms": high, "latency_iqr_ms": spread,
        "latency_min_ms": min(samples), "latency_samples_ms": samples,
        "throughput_img_s": cell.batch_size / middle * 1e3,
    }  # fmt: skip


def _key(cell: Cell, device: torch.device) -> str:
    digests = [attention.load(spec).digest for spec in cell.model.attention_specs]
    return store.cell_key("bench", _config(cell), machine.hardware(device), *dict.fromkeys(digests))


def _config(cell: Cell) -> dict[str, Any]:
    """Flat, as a record holds it."""
    return {**asdict(cell.model), **asdict(cell.bench)}
