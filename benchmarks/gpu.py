"""One CUDA GPU in under 8 minutes: attention cores, exact sparse attention in Triton, and a training step.

    python benchmarks/gpu.py [--out results/speed/gpu.jsonl]
    python benchmarks/gpu.py --device cpu --quick          # the same code on tiny sizes, without what needs Triton

Cores: mechanisms against torch's scaled_dot_product_attention in fp32 and bf16, forward and with backward; 8 heads of
width 64, 16,384 tokens a batch, normal q, k and v, no projections. Entmax: `entmax:impl=triton` against the package
adasplash. Training step: vitcmp's ViT against timm's of equal sizes under bf16 autocast, both with fused AdamW and
clipping on prepared images. Sides take turns within one process, in shuffled rounds; medians of CUDA events. Memory:
the peak of one call above what was allocated before it, by torch's allocator. All of it is appended to `--out`, as one
line of JSON. Where something does not fit in the memory or in the time, the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mechanisms import PEERS
from tabulate import tabulate
from torch import Tensor, nn
from train_step import timm_vit

from vitcmp import machine
from vitcmp.configs import BenchConfig, resolve_run
from vitcmp.data.augment import Batch
from vitcmp.metrics.latency import interleaved_ms, median_and_iqr
from vitcmp.metrics.memory import give_back
from vitcmp.metrics.workload import DTYPES, build_module
from vitcmp.models.fast import fast
from vitcmp.models.vit import ViT
from vitcmp.plain_json import to_json
from vitcmp.workflows.bench import cells_of
from vitcmp.workflows.train import make_optimizer, train_step

MECHANISMS = (
    "softmax", "linear", "performer", "efficient", "sigmoid", "linformer", "nystromformer:conv_kernel_size=0",
    "agent:conv_kernel_size=0",
)  # fmt: skip
SDPA = "torch sdpa"
TRITON, ADASPLASH = "entmax:impl=triton", "adasplash"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: as published, or tiny."""

    tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    batch_tokens: int = 16384
    num_heads: int = 8
    head_dim: int = 64
    preset: str = "vit-small-16-224"
    images: int = 128


QUICK = Sizes(tokens=(64, 256), batch_tokens=256, num_heads=2, head_dim=16, preset="tiny", images=8)


class Clock:
    """The time that is left; what would begin after its end is left out."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    def taken(self) -> float:
        return time.perf_counter() - self.start

    def is_over(self) -> bool:
        return self.taken() > self.seconds


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Row]:
    """Of each call: the median and quartile distance in ms and the peak in MiB, or why there is none."""
    found: dict[str, Row] = {}
    for name, call in calls.items():
        try:
            call()  # what compiles and what libraries allocate once
            found[name] = {"peak_mib": peak_mib(call, device)}
            give_back(device)
        except Exception as error:
            found[name] = {"lost": reason_of(error)}
    working = {name: call for name, call in calls.items() if "lost" not in found[name]}
    try:
        times = interleaved_ms(working, rounds, device)
    except Exception as error:
        return found | {name: {"lost": reason_of(error)} for name in working}
    for name, samples in times.items():
        middle, spread = median_and_iqr(samples)
        found[name] |= {"ms": middle, "iqr_ms": spread, "samples_ms": samples}
    return found


def reason_of(error: Exception) -> str:
    """Why there is no number, in one line."""
    return "out of memory" if machine.out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """What one call allocates at once; None on a CPU, whose allocator does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def core_of(spec: str, tokens: int, batch: int, sizes: Sizes) -> nn.Module:
    """A mechanism from queries, keys and values on."""
    model = replace(
        resolve_run({"dataset": "fake"}).model, pool="mean", dim=sizes.num_heads * sizes.head_dim,
        num_heads=sizes.num_heads,
    )  # fmt: skip
    (cell,) = cells_of([spec], model, BenchConfig(level="core", tokens=tokens, batch_size=batch))
    return build_module(cell)[0]


def core_calls(
    cores: dict[str, Callable[..., Tensor]], qkv: list[Tensor], precision: str, trains: bool
) -> dict[str, Callable[[], object]]:
    """A forward pass of each core under autocast, or with the gradients of its inputs and parameters."""
    device, upstream = qkv[0].device, torch.randn_like(qkv[0])

    def call(core: Callable[..., Tensor]) -> None:
        with torch.set_grad_enabled(trains), torch.autocast(device.type, DTYPES["bf16"], enabled=precision == "bf16"):
            y = core(*qkv)
        if trains:
            parameters = list(core.parameters()) if isinstance(core, nn.Module) else []
            torch.autograd.grad(y, [*qkv, *parameters], upstream.to(y.dtype), allow_unused=True)

    return {name: lambda core=core: call(core) for name, core in cores.items()}


def measure_cores(
    specs: dict[str, str], sizes: Sizes, precisions: Iterable[str], rounds: int, device: torch.device, clock: Clock
) -> Iterable[Row]:
    """A row a core, token count, format and pass; `specs` are mechanisms by the name to show."""
    for tokens in sizes.tokens:
        batch = max(1, sizes.batch_tokens // tokens)
        cores: dict[str, Callable[..., Tensor]] = {SDPA: F.scaled_dot_product_attention}
        lost: dict[str, Row] = {}
        for name, spec in specs.items():
            try:
                cores[name] = core_of(spec, tokens, batch, sizes).to(device)
            except Exception as error:
                lost[name] = {"lost": reason_of(error)}
        for precision in precisions:
            shape = (batch, sizes.num_heads, tokens, sizes.head_dim)
            qkv = [torch.randn(shape, device=device, dtype=DTYPES[precision]).requires_grad_() for _ in "qkv"]
            for trains in (False, True):
                if clock.is_over():
                    found: dict[str, Row] = {name: {"lost": "out of time"} for name in cores}
                else:
                    found = measure(core_calls(cores, qkv, precision, trains), rounds, device)
                for name, row in {**found, **lost}.items():
                    place = {"tokens": tokens, "batch": batch, "precision": precision}
                    yield {"core": name, **place, "passes": "both" if trains else "forward", **row}


def differences(sizes: Sizes, device: torch.device) -> list[Row]:
    """The largest difference between the outputs of both sparse attentions in fp32, at the smaller token counts."""
    rows = []
    for tokens in sizes.tokens[:2]:
        cores = [core_of(spec, tokens, 1, sizes).to(device) for spec in (TRITON, str(PEERS / "adasplash.py"))]
        qkv = [torch.randn(1, sizes.num_heads, tokens, sizes.head_dim, device=device) for _ in "qkv"]
        with torch.no_grad():
            ours, theirs = (core(*qkv) for core in cores)
        rows.append({"tokens": tokens, "difference": (ours - theirs).abs().max().item()})
    return rows


def step_calls(sizes: Sizes, device: torch.device) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """A training step of each model, and millions of parameters: the same loop and optimizer around both."""
    config = resolve_run({"dataset": "fake", "preset": sizes.preset, "num_classes": 10, "batch_size": sizes.images})
    m = replace(config.model, pool="cls", stem="linear")
    models: dict[str, nn.Module] = {"vitcmp": fast(ViT(m))}
    if importlib.util.find_spec("timm"):
        models["timm"] = timm_vit(m, fused=True)
    images = torch.randn(sizes.images, m.channels or 3, *m.image_hw, device=device)
    labels = torch.arange(sizes.images, device=device) % 10
    batch = Batch(images, labels, labels, torch.ones(sizes.images, device=device))

    def step_of(model: nn.Module) -> Callable[[], object]:
        model.to(device).train()
        optimizer = make_optimizer(model, config.train, device)
        return lambda: train_step(model, batch, optimizer, config.train, sizes.images, "bf16")

    calls = {name: step_of(model) for name, model in models.items()}
    return calls, {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}


def facts_of(device: torch.device) -> Row:
    """The machine and the versions of what is measured."""
    packages = ("triton", "timm", "adasplash")
    found: Row = {**machine.hardware(device), **machine.versions(), "commit": machine.commit()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["fp32_products"] = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu_memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.split()[0]
    return found


def print_rows(title: str, rows: list[Row], base: str) -> None:
    """A line a row: its time, how many times as fast as `base` it is under the same conditions, and its peak."""
    conditions = [name for name in ("tokens", "batch", "precision", "passes") if name in rows[0]]

    def place(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in conditions)

    times = {place(row): row.get("ms") for row in rows if row["core"] == base}
    lines = []
    for name in dict.fromkeys(row["core"] for row in rows):
        for row in (row for row in rows if row["core"] == name):
            other, own = times.get(place(row)), row.get("ms")
            ratio = f"{other / own:.2f}" if other and own else ""
            peak = "" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f}"
            ms = row["lost"] if own is None else f"{own:.3g} ± {row['iqr_ms'] / 2:.2g}"
            lines.append([name, *place(row), ms, ratio, peak])
    headers = ["", *conditions, "ms ± half the IQR", f"{base} / own", "peak MiB"]
    print(f"\n{title}\n{tabulate(lines, headers, disable_numparse=True)}", flush=True)


def train_steps(sizes: Sizes, rounds: int, device: torch.device, clock: Clock) -> list[Row]:
    calls, params_m = step_calls(sizes, device)
    if "timm" not in calls:
        print("\ntimm is not installed: vitcmp's training step stands alone (pip install timm)")
    found = measure(calls, rounds, device)
    rows = [{"core": name, "params_m": params_m[name], **row} for name, row in found.items()]
    parameters = " and ".join(f"{value:.2f} M ({name})" for name, value in params_m.items())
    print_rows(f"Training step: {sizes.preset}, {sizes.images} images, bf16, {parameters} parameters", rows, "timm")
    return rows


def all_cores(sizes: Sizes, rounds: int, device: torch.device, clock: Clock) -> list[Row]:
    specs = {spec.partition(":")[0]: spec for spec in MECHANISMS}
    rows = list(measure_cores(specs, sizes, ("fp32", "bf16"), rounds, device, clock))
    print_rows(f"Cores: {sizes.num_heads} heads of width {sizes.head_dim}", rows, SDPA)
    return rows


def sparse_cores(sizes: Sizes, rounds: int, device: torch.device, clock: Clock) -> list[Row]:
    if device.type != "cuda":
        print("\nExact sparse attention in Triton needs CUDA: left out")
        return []
    specs = {TRITON: TRITON}
    if importlib.util.find_spec("adasplash"):
        specs[ADASPLASH] = str(PEERS / "adasplash.py")
    else:
        print("\nadasplash is not installed: entmax in Triton stands alone (pip install adasplash)")
    rows = list(measure_cores(specs, sizes, ("fp32", "bf16"), rounds, device, clock))
    title = f"Exact sparse attention: alpha 1.5, {sizes.num_heads} heads of width {sizes.head_dim}"
    print_rows(title, rows, ADASPLASH if ADASPLASH in specs else SDPA)
    if ADASPLASH in specs:
        try:
            rows += [{"core": "difference", **row} for row in differences(sizes, device)]
            print("largest difference of the outputs in fp32:", *(f"{r['difference']:.1e} at N = {r['tokens']}"
                  for r in rows if r["core"] == "difference"))  # fmt: skip
        except Exception as error:
            print(f"the outputs were not compared: {reason_of(error)}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each call, at least 7")
    parser.add_argument("--minutes", type=float, default=7.0, help="what has not begun by then is left out")
    parser.add_argument("--out", type=Path, default=Path("results/speed/gpu.jsonl"))
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error(f"--rounds ({options.rounds}) must be at least 7")
    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA GPU here; `--device cpu --quick` tries the script out", file=sys.stderr)
        return 2
    device, clock = machine.pick_device(options.device), Clock(60 * options.minutes)
    if device.index is not None:
        torch.cuda.set_device(device)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    facts = facts_of(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    result: Row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "quick": options.quick, "facts": facts}
    sizes = QUICK if options.quick else Sizes()
    try:
        # In Triton last: a kernel that fails can leave CUDA in a state in which nothing works any more.
        for name, section in (("train_step", train_steps), ("cores", all_cores), ("entmax", sparse_cores)):
            result[name] = section(sizes, options.rounds, device, clock)
            give_back(device)
    finally:
        result["seconds"] = clock.taken()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.write(to_json(result) + "\n")
        print(f"\n{clock.taken():.0f} s; appended to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
