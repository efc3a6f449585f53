"""Images a second of a training step: vitcmp as `vitcmp train --dataset cifar10` runs it, against timm's ViT.

    python benchmarks/train_step.py [--preset vit]

vitcmp: its own train_step with its automatic number format, micro-batches and allocator settings, on batches that its
pipeline augments in the measured time. timm: the model of the same size in a plain fp32 loop, on prepared batches.
Both do forward, backward, clipping and AdamW. A side is a process, and the sides take turns, a round each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from vitcmp import machine
from vitcmp.configs import PRESETS, RunConfig, resolve_run
from vitcmp.data.augment import Batch, Normalise, TrainPipeline
from vitcmp.data.datasets import Data, load_data
from vitcmp.metrics.inference import micro_batch
from vitcmp.models.vit import ViT
from vitcmp.workflows.train import Schedule, make_optimizer, train_step

CPU = torch.device("cpu")
SIDES = ("vitcmp", "timm, fused attention", "timm, unfused attention")


def make_config(settings: dict[str, Any]) -> RunConfig:
    """CIFAR-10 if VITCMP_DATA has it, else noise of the same shape."""
    root = Path(os.environ.get("VITCMP_DATA", "nowhere"))
    there = any((root / part / "cifar-10-python.tar.gz").exists() for part in (".", "cifar10", "CIFAR10"))
    there |= any((root / part / "cifar-10-batches-py").exists() for part in (".", "cifar10", "CIFAR10"))
    return resolve_run({"dataset": "cifar10" if there else "fake", **settings})


def make_pipeline(config: RunConfig, data: Data) -> TrainPipeline:
    return TrainPipeline(data.train, config.augment, Normalise(data.mean, data.std, config.model.image_hw, CPU), CPU)


def endless(pipeline: TrainPipeline, batch_size: int) -> Iterator[Batch]:
    """Whole batches of one epoch after the other."""
    for epoch in count():
        yield from (batch for batch in pipeline.epoch(batch_size, epoch) if len(batch.labels) == batch_size)


def vitcmp_step(config: RunConfig, data: Data) -> tuple[Callable[[], object], str]:
    """One step as the workflow takes it, and what was chosen for it."""
    c = config.train
    model = ViT(config.model).train()
    counting: list[Any] = [module for module in model.modules() if hasattr(module, "after_optimizer_step")]
    size = micro_batch(model, CPU, c.batch_size) if c.micro_batch == "auto" else c.micro_batch
    precision = machine.precision(c.precision, CPU)
    kept = size == c.batch_size and machine.keep_freed_memory()
    optimizer, batches = make_optimizer(model, c, CPU), endless(make_pipeline(config, data), c.batch_size)
    schedule, steps = Schedule(c, len(data.train) // c.batch_size), count()

    def step() -> None:
        schedule.set_lr(optimizer, next(steps))
        train_step(model, next(batches), optimizer, c, size, precision)
        for module in counting:
            module.after_optimizer_step()

    chosen = [precision, f"micro-batches of {size}" if size < c.batch_size else "whole batch"]
    return step, ", ".join(chosen + ["freed memory kept"] * kept)


def timm_step(config: RunConfig, data: Data, fused: bool) -> tuple[Callable[[], object], str]:
    """One step of a plain loop around timm's model."""
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    set_fused_attn(fused)
    m, c = config.model, config.train
    model = VisionTransformer(
        img_size=m.image_hw[0], patch_size=m.patch, embed_dim=m.dim, depth=m.depth, num_heads=m.num_heads,
        mlp_ratio=m.mlp_dim / m.dim, num_classes=m.num_classes or 10,
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    prepared = cycle(list(islice(endless(make_pipeline(config, data), c.batch_size), 8)))

    def step() -> None:
        batch = next(prepared)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels, label_smoothing=c.label_smoothing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()

    return step, f"fp32, whole batch, {sum(p.numel() for p in model.parameters()):,} parameters"


def work(side: str, settings: dict[str, Any], threads: int, pipe: Connection) -> None:
    """Answer each number of steps with the seconds that they took."""
    torch.set_num_threads(threads)
    config = make_config(settings)
    data = load_data(config.data)
    step, chosen = vitcmp_step(config, data) if side == "vitcmp" else timm_step(config, data, "unfused" not in side)
    pipe.send(chosen)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send(time.perf_counter() - start)


def measure(settings: dict[str, Any], rounds: int, steps: int, threads: int) -> tuple[list[list[float]], list[str]]:
    """Images a second, a list a side with a value a round, and what each side chose."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for side in SIDES:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(side, settings, threads, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    chosen = [pipe.recv() for pipe in pipes]
    rates: list[list[float]] = [[] for _ in SIDES]
    for round_number in range(rounds + 1):
        for pipe, side_rates in zip(pipes, rates, strict=True):
            pipe.send(steps)
            rate = steps * settings["batch_size"] / pipe.recv()
            if round_number:  # the first round warms up
                side_rates.append(rate)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(0)
        process.join()
    return rates, chosen


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def machine_line(threads: int) -> str:
    facts = machine.hardware(CPU)
    native = "native bf16" if facts["native_bf16"] else "no native bf16"
    return f"{facts['cpu']}, {facts['cores']} cores, {threads} threads, {native}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second of a training step, vitcmp against timm.")
    parser.add_argument("--preset", default="vit-48x4", choices=[n for n in PRESETS if "224" not in n and n[-1] != "x"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of vitcmp's side")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="steps a round (default: 4, from 200 tokens on 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    settings = {"preset": args.preset, "batch_size": args.batch_size, "precision": args.precision}
    config = make_config(settings)
    tokens = (config.model.image_hw[0] // config.model.patch) ** 2 + 1
    steps = args.steps or (4 if tokens < 200 else 1)
    rates, chosen = measure(settings, args.rounds, steps, args.threads)

    print(machine_line(args.threads))
    print(f"{args.preset}, {tokens} tokens, {config.data.dataset}, batch {args.batch_size}, "
          f"median (quartiles) of {args.rounds} rounds of {steps} steps, in turn")  # fmt: skip
    ours = statistics.median(rates[0])
    rows = [
        [side, quartiles(values), f"{ours / statistics.median(values):.2f}", how]
        for side, values, how in zip(SIDES, rates, chosen, strict=True)
    ]
    print(tabulate(rows, ["", "images/s", "vitcmp is times", "settings"], disable_numparse=True))


if __name__ == "__main__":
    main()
