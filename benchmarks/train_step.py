"""Images a second of a training step: vitcmp against timm, Hugging Face and vit-pytorch at equal sizes.

    python benchmarks/train_step.py [--preset vit] [--like-for-like fp32|bf16] [--compile] [--shares]

Best against best (the default): vitcmp as `vitcmp train --dataset cifar10` runs it, on batches that its pipeline
augments in the measured time; the peers as they come, a plain fp32 loop with AdamW on prepared batches.
Like for like: prepared batches for all, and the peers get number format, fused AdamW, allocator settings,
micro-batches and compiler of vitcmp. `--shares`: vitcmp alone, with one of its settings changed at a time.

All do forward, backward, clipping and AdamW. A side is a process, and the sides take turns, a round each. All have the
same dim, depth, heads, MLP, patches and classes; SimpleViT has no class token, so one token less.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from vitcmp import machine
from vitcmp.configs import PRESETS, ModelConfig, RunConfig, resolve_run
from vitcmp.data.augment import Batch, Normalise, TrainPipeline
from vitcmp.data.datasets import Data, load_data
from vitcmp.kernels import cpu, forms
from vitcmp.metrics.inference import micro_batch
from vitcmp.models.fast import fast
from vitcmp.models.vit import ViT
from vitcmp.workflows.train import Schedule, keeps_memory, lanes, make_optimizer, train_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Side:
    """What one process runs."""

    model: str
    precision: str = "fp32"
    micro_batch: int = 128
    lanes: bool = True
    """Of vitcmp's own: parts of a batch beside each other, where the workflow would."""
    fused: bool = False
    """AdamW in one kernel."""
    keep: bool = False
    """glibc keeps freed memory."""
    compiled: bool = False
    augment: bool = False
    """The pipeline's work is in the measured time."""
    passes: bool = True
    """Of vitcmp's own: LayerNorm and what follows it in one pass, where this CPU would."""
    impl: str = "auto"
    """Form of vitcmp's softmax."""
    pool: str = "cls"
    """mean: vitcmp without a class token, as SimpleViT."""
    whole: bool = False
    """Of vitcmp's own: all tokens go through the last MLP, as in evaluation, which without dropout is the same."""

    def __str__(self) -> str:
        facts = [self.precision, f"{self.micro_batch} at a time", "fused AdamW" if self.fused else "plain AdamW"]
        more = {"memory kept": self.keep, "compiled": self.compiled, "with augmentation": self.augment}
        return ", ".join(facts + [name for name, holds in more.items() if holds])


def timm_vit(m: ModelConfig, fused: bool) -> nn.Module:
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    set_fused_attn(fused)
    return VisionTransformer(
        img_size=m.image_hw[0], patch_size=m.patch, embed_dim=m.dim, depth=m.depth, num_heads=m.num_heads,
        mlp_ratio=m.mlp_dim / m.dim, num_classes=m.num_classes or 10,
    )  # fmt: skip


class HuggingFace(nn.Module):
    def __init__(self, m: ModelConfig, attention: str) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        self.vit = ViTForImageClassification(
            ViTConfig(
                image_size=m.image_hw[0], patch_size=m.patch, hidden_size=m.dim, num_hidden_layers=m.depth,
                num_attention_heads=m.num_heads, intermediate_size=m.mlp_dim, num_labels=m.num_classes or 10,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=attention,
            )
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit(images).logits


def vit_pytorch(m: ModelConfig, simple: bool) -> nn.Module:
    from vit_pytorch import SimpleViT
    from vit_pytorch import ViT as OtherViT

    cls = SimpleViT if simple else OtherViT
    return cls(
        image_size=m.image_hw[0], patch_size=m.patch, num_classes=m.num_classes or 10, dim=m.dim, depth=m.depth,
        heads=m.num_heads, mlp_dim=m.mlp_dim, dim_head=m.dim // m.num_heads,
    )  # fmt: skip


class OperationByOperation(forms.Profile):
    """What was measured here, but LayerNorm and what follows it by torch."""

    def order(self, operator: str, *args: Any) -> tuple[str, ...]:
        in_one_pass = ("norm_linear", "add_linear", "norm_mlp")
        return ("torch",) if operator in in_one_pass else forms.published(cpu.kind()).order(operator, *args)


PEERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "timm, naive": lambda m: timm_vit(m, fused=False),
    "timm, fused": lambda m: timm_vit(m, fused=True),
    "Hugging Face, eager": lambda m: HuggingFace(m, "eager"),
    "Hugging Face, sdpa": lambda m: HuggingFace(m, "sdpa"),
    "vit-pytorch, ViT": lambda m: vit_pytorch(m, simple=False),
    "vit-pytorch, SimpleViT": lambda m: vit_pytorch(m, simple=True),
}


def make_config(preset: str, batch_size: int) -> RunConfig:
    """CIFAR-10 if VITCMP_DATA has it, else noise of the same shape."""
    root = Path(os.environ.get("VITCMP_DATA", "nowhere"))
    there = any((root / part / "cifar-10-python.tar.gz").exists() for part in (".", "cifar10", "CIFAR10"))
    there |= any((root / part / "cifar-10-batches-py").exists() for part in (".", "cifar10", "CIFAR10"))
    return resolve_run({"dataset": "cifar10" if there else "fake", "preset": preset, "batch_size": batch_size})


def as_run(config: RunConfig) -> Side:
    """vitcmp's side with what the workflow chooses by itself."""
    return with_precision(Side("vitcmp", fused=True), config, machine.precision("auto", CPU))


def with_precision(side: Side, config: RunConfig, precision: str) -> Side:
    """A side in a number format, with what the workflow chooses for that format."""
    size = micro_batch(ViT(config.model), CPU, config.train.batch_size)
    keep = keeps_memory(CPU, precision, size < config.train.batch_size)
    return replace(side, precision=precision, micro_batch=size, keep=keep)


def choose_sides(
    config: RunConfig, like_for_like: str | None, precision: str | None, compiled: bool, shares: bool
) -> dict[str, Side]:
    ours, batch_size = as_run(config), config.train.batch_size
    if like_for_like or precision:
        ours = with_precision(ours, config, like_for_like or precision or "")
    if like_for_like:
        ours = replace(ours, compiled=compiled)
    if shares:
        other = {"bf16": "fp32", "fp32": "bf16"}[ours.precision]
        large = ours.micro_batch == batch_size
        return {
            "vitcmp": ours,
            f"in {other}": with_precision(ours, config, other),
            "memory given back" if ours.keep else "memory kept": replace(ours, keep=not ours.keep),
            "in micro-batches of 32" if large else "in whole batches": replace(
                ours, micro_batch=32 if large else batch_size
            ),
            "one lane": replace(ours, lanes=False),
            "all tokens to the end": replace(ours, whole=True),
            "plain AdamW": replace(ours, fused=False),
            "layers operation by operation": replace(ours, passes=False),
            "explicit scores": replace(ours, impl="merged"),
            "fused attention": replace(ours, impl="fused"),
            "compiled": replace(ours, compiled=True),
        }
    if like_for_like:
        sides = {"vitcmp": ours, "vitcmp, no class token": replace(ours, pool="mean")}
        return sides | {name: replace(ours, model=name) for name in PEERS}
    ours = replace(ours, augment=True)
    sides = {"vitcmp": ours}
    if compiled:
        sides["vitcmp, compiled"] = replace(ours, compiled=True)
    return sides | {name: Side(name, micro_batch=batch_size) for name in PEERS}


def endless(pipeline: TrainPipeline, batch_size: int) -> Iterator[Batch]:
    """Whole batches of one epoch after the other."""
    for epoch in count():
        yield from (batch for batch in pipeline.epoch(batch_size, epoch) if len(batch.labels) == batch_size)


def make_step(side: Side, config: RunConfig, data: Data) -> Callable[[], object]:
    """One step on the next batch: vitcmp's own, or a plain loop around a peer."""
    c = config.train
    normalise = Normalise(data.mean, data.std, config.model.image_hw, CPU)
    batches = endless(TrainPipeline(data.train, config.augment, normalise, CPU), c.batch_size)
    batches = batches if side.augment else cycle(list(islice(batches, 8)))
    if side.model == "vitcmp":
        impl = config.model.attention if side.impl == "auto" else f"softmax:impl={side.impl}"
        model: nn.Module = fast(ViT(replace(config.model, attention=impl, pool=side.pool)))
    else:
        model = PEERS[side.model](config.model)
    model.train(not side.whole)
    if side.fused:
        optimizer: torch.optim.Optimizer = make_optimizer(model, c, CPU)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    if side.compiled:
        model = torch.compile(model)  # type: ignore[assignment]
    schedule, steps = Schedule(c, len(data.train) // c.batch_size), count()
    in_parts = side.micro_batch < c.batch_size
    num_lanes = lanes(config, CPU, in_parts) if side.lanes and not side.compiled else 1

    def ours() -> None:
        schedule.set_lr(optimizer, next(steps))
        train_step(model, next(batches), optimizer, c, side.micro_batch, side.precision, num_lanes)

    def plain() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        parts = zip(batch.images.split(side.micro_batch), batch.labels.split(side.micro_batch), strict=True)
        for images, labels in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=side.precision == "bf16"):
                loss = F.cross_entropy(model(images), labels, label_smoothing=c.label_smoothing)
            (loss * (len(labels) / c.batch_size)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()

    return ours if side.model == "vitcmp" else plain


def work(side: Side, settings: tuple[str, int], threads: int, pipe: Connection) -> None:
    """Answer each number of steps with the seconds that they took."""
    machine.set_threads(threads)
    if side.keep:
        machine.keep_freed_memory()
    config = make_config(*settings)
    # What an earlier run compiled must not shorten this one's start.
    profile = forms.active() if side.passes else OperationByOperation("none")
    with tempfile.TemporaryDirectory() as cache, forms.kept(profile):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        step = make_step(side, config, load_data(config.data))
        pipe.send(None)
        while steps := pipe.recv():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            pipe.send(time.perf_counter() - start)


def measure(
    sides: dict[str, Side], settings: tuple[str, int], rounds: int, steps: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images a second of each side and round, and the seconds of its first step (a compiled side compiles in it)."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(side, settings, threads, theirs), daemon=True))
        processes[-1].start()
        theirs.close()

    def run(name: str, number: int) -> float:
        pipes[name].send(number)
        return pipes[name].recv()

    for pipe in pipes.values():
        pipe.recv()
    first = {name: run(name, 1) for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds):
        for name, values in rates.items():
            values.append(steps * settings[1] / run(name, steps))
        print(f"round {round_number + 1}:", ", ".join(f"{v[-1]:,.0f}" for v in rates.values()), flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    for process in processes:
        process.join()
    return rates, first


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def machine_line(threads: int) -> str:
    facts = machine.hardware(CPU)
    native = "native bf16" if facts["native_bf16"] else "no native bf16"
    return f"{facts['cpu']}, {facts['cores']} cores, {threads} threads, {native}, torch {torch.__version__}"


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds: what slows the machine slows both sides of a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def what_compiling_costs(rates: dict[str, list[float]], first: dict[str, float], images: int) -> str:
    eager, compiled = "vitcmp", "vitcmp, compiled"
    extra = first[compiled] - first[eager]
    saved = images / statistics.median(rates[eager]) - images / statistics.median(rates[compiled])
    epochs = f"it pays from {extra / saved:.1f} epochs on" if saved > 0 else "it does not pay"
    return f"compiling took {extra:.1f} s more in the first step and saves {saved:.1f} s an epoch: {epochs}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second of a training step, vitcmp against its peers.")
    parser.add_argument("--preset", default="vit-48x4", choices=[n for n in PRESETS if "224" not in n and n[-1] != "x"])
    parser.add_argument("--like-for-like", choices=["fp32", "bf16"], help="the peers get vitcmp's settings")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of vitcmp alone: without native bf16 it is fp32")
    parser.add_argument("--compile", action="store_true", help="like for like, all compiled; else vitcmp compiled too")
    parser.add_argument("--shares", action="store_true", help="vitcmp alone, one setting changed at a time")
    parser.add_argument("--sides", nargs="+", metavar="TEXT", help="vitcmp, and sides whose names contain one of these")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="steps a round (default: 4, from 200 tokens on 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    machine.set_threads(args.threads)
    settings = (args.preset, args.batch_size)
    config = make_config(*settings)
    tokens = (config.model.image_hw[0] // config.model.patch) ** 2 + 1
    steps = args.steps or (4 if tokens < 200 else 1)
    sides = choose_sides(config, args.like_for_like, args.precision, args.compile, args.shares)
    if args.sides:
        sides = {n: s for n, s in sides.items() if n == "vitcmp" or any(text in n for text in args.sides)}

    print(machine_line(args.threads))
    kind = "shares" if args.shares else f"all {args.like_for_like}" if args.like_for_like else "best against best"
    print(f"{args.preset}, {tokens} tokens, {config.data.dataset}, batch {args.batch_size}, {kind}; images a second, "
          f"median (quartiles) of {args.rounds} rounds of {steps} steps, in turn")  # fmt: skip
    print(", ".join(sides), flush=True)
    if args.compile:
        # Numba's cache is filled, or the eager side's first step would seem as slow as the compiled one's.
        measure({"vitcmp": sides["vitcmp"]}, settings, 0, steps, args.threads)
    rates, first = measure(sides, settings, args.rounds, steps, args.threads)
    rows = [
        [name, quartiles(values), f"{ratio(rates['vitcmp'], values):.2f}", str(sides[name])]
        for name, values in rates.items()
    ]
    print(tabulate(rows, ["", "images/s", "vitcmp is times", "settings"], disable_numparse=True))
    peers = [name for name in rates if name in PEERS]
    if peers:
        best = max(peers, key=lambda name: statistics.median(rates[name]))
        for name in [n for n in rates if n not in PEERS]:
            print(f"{name} is {ratio(rates[name], rates[best]):.2f} times the best peer ({best})")
    if "vitcmp, compiled" in rates:
        print(what_compiling_costs(rates, first, len(load_data(config.data).train)))


if __name__ == "__main__":
    main()
