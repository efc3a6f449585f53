"""What a trained model says to a user's own pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vitcmp import machine
from vitcmp.configs import Diverged, RuntimeConfig, UserError
from vitcmp.data.augment import Normalise
from vitcmp.data.datasets import Split
from vitcmp.data.pictures import prepare_image
from vitcmp.metrics.accuracy import broken_text, probabilities
from vitcmp.metrics.inference import logits_of
from vitcmp.models.checkpoint import load_run


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one picture, the likeliest first."""

    image: str
    """The file, as it was given."""
    classes: tuple[tuple[str, float], ...]
    """Name and probability in percent."""


def run(
    run: str,
    images: Sequence[Path],
    results: str = RuntimeConfig.results,
    device: torch.device | str = RuntimeConfig.device,
    top: int = 5,
    invert: bool = False,
) -> list[Prediction]:
    """The `top` classes of each picture, prepared as the run's own images were.

    `invert` swaps black and white: for dark ink on white paper where the run was trained on white on black. A run that
    was trained on inverted images inverts pictures by itself, and `invert` then undoes it.

    Raises: UserError for no run, no or an unreadable picture, or a `top` below 1; Diverged where logits are not finite.
    """
    if not images:
        raise UserError("no image given; give one or more image files")
    if top < 1:
        raise UserError(f"top ({top}) must be 1 or more")
    device = machine.pick_device(device) if isinstance(device, str) else device
    trained = load_run(run, results)
    model, info = trained.model.to(device), trained.info
    assert model.config.channels is not None
    pixels = torch.stack([prepare_image(path, model.config.channels, model.config.image_hw) for path in images])
    if invert != info.run_config.data.invert:
        pixels = 255 - pixels
    normalise = Normalise(info.mean, info.std, model.config.image_hw, device)
    logits = logits_of(model, Split(pixels, torch.zeros(len(pixels), dtype=torch.int64)), normalise, device)
    if broken := broken_text(logits):
        raise Diverged(broken)
    predictions = []
    for path, shares in zip(images, probabilities(logits), strict=True):
        best = shares.argsort()[::-1][:top]
        predictions.append(Prediction(str(path), tuple((info.class_names[i], float(100 * shares[i])) for i in best)))
    return predictions
