"""Measure what mechanisms cost: latency, throughput, peak memory and multiply-adds over token counts.

Latency is taken in this process, all mechanisms in turn; peak memory in a fresh process a cell, so that nothing that
another cell left behind can hide or add to it. A cell that fails or runs out of memory is a record.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from vitcmp import attention, machine, store
from vitcmp.attention import DegenerateWarning, LayerConfig, TokenGrid
from vitcmp.configs import BenchConfig, ModelConfig, RuntimeConfig, UserError
from vitcmp.metrics import complexity
from vitcmp.metrics.latency import interleaved_ms, median_and_iqr
from vitcmp.metrics.memory import PeakMemory
from vitcmp.models.vit import ViT, initialise

MEMORY_TIMEOUT_S = 120
Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    model: ModelConfig
    """With the attention spec; at the level model also with the image size that gives the tokens."""
    bench: BenchConfig
    tokens: int
    """Patches, without the class token."""

    @property
    def name(self) -> str:
        """The mechanism."""
        return self.model.attention_name

    @property
    def grid(self) -> TokenGrid:
        """The squarest grid of the tokens, with the model's class token."""
        return TokenGrid.squarest(self.tokens, num_prefix_tokens=int(self.model.pool == "cls"))


def cells_of(specs: Sequence[str], model: ModelConfig, bench: BenchConfig) -> list[Cell]:
    """Every mechanism at every token count, each once, in the order of the token counts.

    Raises: UserError where mechanisms are mixed and the level measures one.
    """
    patch = model.patch
    cells = []
    for tokens in bench.token_counts:
        grid = TokenGrid.squarest(tokens)
        sized = replace(model, patch_size=patch, image_size=(grid.height * patch, grid.width * patch))
        if grid.height == grid.width:
            sized = replace(sized, image_size=grid.height * patch)
        for spec in specs:
            mixed = replace(sized, attention=spec)
            named = tuple(map(attention.canonical, mixed.attention_specs))
            cells.append(Cell(replace(mixed, attention=named), bench, tokens))
            if isinstance(cells[-1].model.attention, tuple) and bench.level != "model":
                raise UserError(f"'{cells[-1].name}' mixes mechanisms over layers: measure it with --level model")
    return list(dict.fromkeys(cells))


def run(
    cells: Sequence[Cell], runtime: RuntimeConfig, listen: Listener = lambda event: None, force: bool = True
) -> list[store.Record]:
    """Measure the cells and append a record each; those with the same tokens are interleaved.

    Unless `force`, cells that have an ok record from this code and machine are skipped.
    """
    device = machine.pick_device(runtime.device)
    store.check_writable(runtime.results)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    keys = {cell: _key(cell, device) for cell in cells}
    done = set() if force else {r.key for r in store.read(runtime.results) if r.kind == "bench" and r.status == "ok"}
    waiting = [cell for cell in cells if keys[cell] not in done]
    records = []
    for tokens in dict.fromkeys((cell.tokens, cell.bench, replace(cell.model, attention="")) for cell in waiting):
        group = [c for c in waiting if (c.tokens, c.bench, replace(c.model, attention="")) == tokens]
        for record in _measure(group, keys, runtime, device):
            store.append(runtime.results, record)
            records.append(record)
            listen({"event": "cell", "done": len(records), "total": len(waiting), "record": record})
    return records


def _measure(
    group: list[Cell], keys: dict[Cell, str], runtime: RuntimeConfig, device: torch.device
) -> list[store.Record]:
    """The records of cells that are timed in turn."""
    calls: dict[str, Callable[[], object]] = {}
    failures: dict[str, tuple[str, str]] = {}
    metrics: dict[str, dict[str, Any]] = {}
    notes: dict[str, list[str]] = {}
    for cell in group:
        spec = cell.name
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", DegenerateWarning)
                block = _build(cell).to(device)
            notes[spec] = list(dict.fromkeys(str(w.message) for w in caught))
            metrics[spec] = _sizes(cell, block)
            call = _call(cell, block, device)
            call()
            calls[spec] = call
        except Exception as error:
            failures[spec] = _failure(error)
    bench = group[0].bench
    try:
        samples = interleaved_ms(calls, bench.rounds, device)
    except Exception as error:
        failures |= {spec: _failure(error) for spec in calls}
        samples = {}
    records = []
    for cell in group:
        spec = cell.name
        status, reason = failures.get(spec, ("ok", None))
        found = metrics.get(spec, {})
        if spec in samples:
            middle, spread = median_and_iqr(samples[spec])
            found |= {
                "latency_ms": middle, "latency_iqr_ms": spread, "latency_samples_ms": samples[spec],
                "throughput_img_s": bench.batch_size / middle * 1e3,
            }  # fmt: skip
            if bench.memory:
                found["peak_memory_mib"], note = _peak_memory_mib(cell, device)
                notes[spec] += [note] if note else []
        records.append(
            store.new_record(
                kind="bench", status=status, key=keys[cell], config=_config(cell), hardware=machine.hardware(device),
                versions=machine.versions(), commit=machine.commit(), metrics=found, warnings=notes.get(spec, []),
                error=reason,
            )
        )  # fmt: skip
    return records


def _key(cell: Cell, device: torch.device) -> str:
    digests = [attention.load(spec).digest for spec in cell.model.attention_specs]
    return store.cell_key("bench", _config(cell), machine.hardware(device), *dict.fromkeys(digests))


def _config(cell: Cell) -> dict[str, Any]:
    """Flat, with the cell's own token count in place of the list."""
    return {**asdict(cell.model), **asdict(cell.bench), "tokens": cell.tokens}


def _layer(cell: Cell) -> LayerConfig:
    m = cell.model
    return LayerConfig(m.dim, m.num_heads, cell.grid, m.qkv_bias, m.out_bias)


def _build(cell: Cell) -> nn.Module:
    """The block or model, with the same weights in every process."""
    if cell.bench.level == "model":
        block: nn.Module = ViT(cell.model)
    else:
        block = attention.load(cell.name).build(_layer(cell))
        initialise(block, "auto", seed=0)
    return block.train(cell.bench.mode == "train-step")


def _input(cell: Cell, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = (cell.bench.batch_size, cell.grid.num_tokens, cell.model.dim)
    if cell.bench.level == "model":
        assert cell.model.channels is not None
        shape = (cell.bench.batch_size, cell.model.channels, *cell.model.image_hw)
    return torch.randn(shape, generator=generator).to(device)


def _call(cell: Cell, block: nn.Module, device: torch.device) -> Callable[[], object]:
    """What is timed."""
    x = _input(cell, device)
    bf16 = machine.precision(cell.bench.precision, device) == "bf16"

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return block(x)

    def inference() -> None:
        with torch.inference_mode():
            forward()

    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, fused=True)
    labels = torch.arange(cell.bench.batch_size, device=device) % (cell.model.num_classes or 1)

    def train_step() -> None:
        block.zero_grad()
        y = forward().float()
        loss = F.cross_entropy(y, labels) if cell.bench.level == "model" else y.square().mean()
        loss.backward()
        if cell.bench.level == "model":
            optimizer.step()

    return inference if cell.bench.mode == "forward" else train_step


def _sizes(cell: Cell, block: nn.Module) -> dict[str, Any]:
    """Parameters and MACs of one image; at the level attention, MACs with the projections."""
    if isinstance(block, ViT):
        macs, in_attention = complexity.model_macs(block), complexity.attention_macs(block)
    else:
        mechanism, layer = attention.load(cell.name), _layer(cell)
        macs, in_attention = mechanism.block_macs(layer), mechanism.macs(layer)
    return {
        "params_m": complexity.parameters_m(block),
        "macs_g": macs / 1e9,
        "attention_macs_g": in_attention / 1e9,
        "precision_used": machine.precision(cell.bench.precision, _device_of(block)),
    }


def _device_of(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


def _peak_memory_mib(cell: Cell, device: torch.device) -> tuple[float | None, str | None]:
    """Peak memory of one call above what stood before it, in a process of its own; else None, and why."""
    if device.type == "cpu" and not _can_fork_a_server():
        return None, "peak memory: this system does not tell"
    context = machine.process_context(device, preload=__name__)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory_child, args=(cell, str(device), torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(MEMORY_TIMEOUT_S):
            return None, f"peak memory: no answer in {MEMORY_TIMEOUT_S} s"
        return receiver.recv(), None
    except EOFError:
        process.join()
        return None, f"peak memory: the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _can_fork_a_server() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods() and PeakMemory(torch.device("cpu")).mib() is not None


def _memory_child(cell: Cell, device_name: str, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    warnings.simplefilter("ignore", DegenerateWarning)
    # One image first: what the libraries allocate once is not the mechanism's.
    one = replace(cell, bench=replace(cell.bench, batch_size=1))
    _call(one, _build(one).to(device), device)()
    call = _call(cell, _build(cell).to(device), device)
    memory = PeakMemory(device)
    call()
    machine.synchronize(device)
    sender.send(memory.mib())


def _failure(error: Exception) -> tuple[Literal["failed", "oom"], str]:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return ("oom" if machine.out_of_memory(error) else "failed"), text
