"""Images a second of vitcmp's data pipeline alone, beside a training step and torchvision's DataLoader.

    python benchmarks/data.py

The pipeline must never be what training waits for: the table says how many times as fast as a training step it is.
torchvision: PIL images, RandomCrop(32, 4), flip, ToTensor, Normalize. The sources take turns, a round each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from train_step import endless, machine_line, make_config, make_pipeline, quartiles, vitcmp_step

from vitcmp.data.datasets import Data, Split, load_data

BATCH = 128


class PilImages(torch.utils.data.Dataset[tuple[Any, int]]):
    """As torchvision's CIFAR10 serves them: an image from an array, then the transforms."""

    def __init__(self, part: Split, transform: Callable[[Any], Any]) -> None:
        self.arrays, self.labels = part.images.permute(0, 2, 3, 1).numpy(), part.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[place])), self.labels[place]


def torchvision_batches(data: Data, workers: int) -> Iterator[object]:
    from torchvision import transforms as t

    change = t.Compose([t.RandomCrop(32, 4), t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(data.mean, data.std)])
    loader = torch.utils.data.DataLoader(
        PilImages(data.train, change), BATCH, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from loader


def rate(take: Callable[[], object], batches: int, ahead: int) -> float:
    """Images a second over `batches`, after `ahead` that may lie ready."""
    for _ in range(ahead):
        take()
    start = time.perf_counter()
    for _ in range(batches):
        take()
    seconds = time.perf_counter() - start
    # Workers that load ahead come to rest before the next source has its turn.
    time.sleep(0.5 if ahead > 1 else 0)
    return batches * BATCH / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second of the data pipeline alone.")
    parser.add_argument("--preset", default="vit-48x4", help="the model of the training step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    configs = {recipe: make_config({"preset": args.preset, "recipe": recipe}) for recipe in ("plain", "strong")}
    data = load_data(configs["plain"].data)
    pipelines = {recipe: endless(make_pipeline(config, data), BATCH) for recipe, config in configs.items()}
    loaders = {workers: torchvision_batches(data, workers) for workers in (0, 2)}
    step, chosen = vitcmp_step(configs["plain"], data)
    # A taker, the batches of a round, and those that may lie ready before it (two a worker).
    sources: dict[str, tuple[Callable[[], object], int, int]] = {
        "vitcmp, recipe plain": (lambda: next(pipelines["plain"]), 100, 1),
        "vitcmp, recipe strong": (lambda: next(pipelines["strong"]), 30, 1),
        "torchvision, 0 workers": (lambda: next(loaders[0]), 20, 1),
        "torchvision, 2 workers": (lambda: next(loaders[2]), 40, 4),
        f"training step, {args.preset}": (step, 4, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(args.rounds):
        for name, source in sources.items():
            rates[name].append(rate(*source))

    print(machine_line(torch.get_num_threads()))
    print(f"{configs['plain'].data.dataset}, batch {BATCH}, median (quartiles) of {args.rounds} rounds, in turn; "
          f"training: {chosen}")  # fmt: skip
    training = statistics.median(rates[f"training step, {args.preset}"])
    rows = [[name, quartiles(values), f"{statistics.median(values) / training:.1f}"] for name, values in rates.items()]
    print(tabulate(rows, ["", "images/s", "times training"], disable_numparse=True))


if __name__ == "__main__":
    main()
