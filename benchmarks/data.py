"""Images a second of vitcmp's data pipeline, against torchvision's DataLoader with the same transforms.

    python benchmarks/data.py

plain: RandomCrop(32, 4), flip, normalise. strong: RandAugment(2, 9) without Equalize (which vitcmp lacks), erasing, and
mixup or CutMix of each batch too. torchvision starts from PIL images, as its data sets serve them, or from uint8
tensors (its v1 transforms: v2 was no faster with either), with 0 and 2 workers; vitcmp is compared to the best of the
four. A training step stands beside them, for the pipeline must never be what training waits for. glibc keeps freed
memory for all, as in training. The sources take turns, a round each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from tabulate import tabulate
from train_step import CPU, as_run, endless, machine_line, make_config, make_step, quartiles, ratio

from vitcmp import machine
from vitcmp.configs import AugmentConfig, resolve_run
from vitcmp.data.augment import Batch, Normalise, TrainPipeline
from vitcmp.data.datasets import Data, Split, load_data

BATCH = 128


class Images(torch.utils.data.Dataset[tuple[Any, int]]):
    """PIL images from arrays, as torchvision's CIFAR10 serves them, or uint8 tensors; then the transforms."""

    def __init__(self, part: Split, transform: Callable[[Any], Any], pil: bool) -> None:
        self.tensors, self.labels = part.images, part.labels.tolist()
        self.arrays = part.images.permute(0, 2, 3, 1).numpy() if pil else None
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        from PIL import Image

        image = self.tensors[place] if self.arrays is None else Image.fromarray(self.arrays[place])
        return self.transform(image), self.labels[place]


def torchvision_batches(data: Data, config: AugmentConfig, workers: int, pil: bool) -> Iterator[object]:
    from torchvision import transforms as t
    from torchvision.transforms import v2

    class RandAugment(t.RandAugment):
        def _augmentation_space(self, *args: Any) -> dict[str, Any]:
            return {name: space for name, space in super()._augmentation_space(*args).items() if name != "Equalize"}

    assert isinstance(config.crop_padding, int)
    strong = config.rand_augment > 0
    bilinear = t.InterpolationMode.BILINEAR
    changes = [
        t.RandomCrop(32, config.crop_padding),
        t.RandomHorizontalFlip(),
        *[RandAugment(config.rand_augment, int(config.rand_magnitude), interpolation=bilinear)] * strong,
        t.ToTensor() if pil else t.ConvertImageDtype(torch.float32),
        t.Normalize(data.mean, data.std),
        *[t.RandomErasing(config.random_erasing, value="random")] * strong,
    ]
    classes = len(data.class_names)
    mix = v2.RandomChoice([
        v2.MixUp(alpha=config.mixup or 1, num_classes=classes), v2.CutMix(alpha=config.cutmix or 1, num_classes=classes)
    ])  # fmt: skip

    def collate(samples: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(samples)
        return mix(*batch) if strong else batch

    loader = torch.utils.data.DataLoader(
        Images(data.train, t.Compose(changes), pil), BATCH, shuffle=True, drop_last=True, collate_fn=collate,
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
    parser = argparse.ArgumentParser(description="Images a second of the data pipeline, against torchvision.")
    parser.add_argument("--preset", default="vit-48x4", help="the model of the training step")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    machine.keep_freed_memory()
    config = make_config(args.preset, BATCH)
    data = load_data(config.data)
    normalise = Normalise(data.mean, data.std, config.model.image_hw, CPU)
    recipes = {
        name: resolve_run({"dataset": config.data.dataset, "recipe": name}).augment for name in ("plain", "strong")
    }

    # A taker, the batches of a round, and those that may lie ready before it (two a worker).
    sources: dict[str, tuple[Callable[[], object], int, int]] = {}
    for recipe, augment in recipes.items():
        ours: Iterator[Batch] = endless(TrainPipeline(data.train, augment, normalise, CPU), BATCH)
        sources[f"{recipe}: vitcmp"] = (ours.__next__, 150 if recipe == "plain" else 40, 1)
        for kind, workers in product(("PIL", "tensors"), (0, 2)):
            theirs = torchvision_batches(data, augment, workers, kind == "PIL")
            batches = (10 if recipe == "plain" else 5) * (1 + workers)
            name = f"{recipe}: torchvision, {kind}, {workers} workers"
            sources[name] = (theirs.__next__, batches, 1 + 2 * workers if workers else 1)
    step = f"plain: training step, {args.preset}"
    sources[step] = (make_step(replace(as_run(config), augment=True), config, data), 3, 1)

    rates: dict[str, list[float]] = {name: [] for name in sources}
    for round_number in range(args.rounds + 1):
        for name, source in sources.items():
            found = rate(*source)
            if round_number:  # the first round warms up
                rates[name].append(found)

    print(machine_line(torch.get_num_threads()))
    print(f"{config.data.dataset}, batch {BATCH}; images a second, median (quartiles) of {args.rounds} rounds, in turn")
    rows = [
        [name, quartiles(values), f"{ratio(rates[name.split(':')[0] + ': vitcmp'], values):.1f}"]
        for name, values in rates.items()
    ]
    print(tabulate(rows, ["", "images/s", "vitcmp is times"], disable_numparse=True))
    for recipe in recipes:
        peers = [name for name in rates if name.startswith(f"{recipe}: torchvision")]
        best = max(peers, key=lambda name: statistics.median(rates[name]))
        print(f"{recipe}: vitcmp is {ratio(rates[f'{recipe}: vitcmp'], rates[best]):.1f} times the best ({best})")


if __name__ == "__main__":
    main()
