"""Evaluate a trained model: accuracy, calibration, per class, at other resolutions and on corrupted images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitcmp import kernels, machine, store
from vitcmp.configs import DATASETS, RuntimeConfig, UserError, choose
from vitcmp.data.augment import Normalise
from vitcmp.data.corrupt import corrupt as corrupted
from vitcmp.data.datasets import Split, load_data
from vitcmp.kernels import forms
from vitcmp.metrics import accuracy
from vitcmp.metrics.inference import logits_of
from vitcmp.models.checkpoint import load_run
from vitcmp.models.vit import resized


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    record: store.Record
    class_names: tuple[str, ...]
    class_top1_pct: list[float | None]
    """Accuracy of each class; None for a class without images."""
    confusion: list[list[int]]
    """[true][predicted]."""
    predictions: Path
    """The file with every image's logits, label and prediction."""


def run(
    run: str,
    runtime: RuntimeConfig,
    dataset: str | None = None,
    split: str = "test",
    image_size: int | None = None,
    corrupt: str | None = None,
    severity: int = 3,
) -> Evaluation:
    """Evaluate a run or checkpoint, in fp32, and append a record; every image's prediction is kept beside the weights.

    `dataset` may be another one with as many classes and channels. An image whose logits are not finite counts as
    wrong, and the record's status is then `diverged`.

    Raises: UserError for no such run, or a data set, size or corruption that does not fit.
    """
    trained = load_run(run, runtime.results)
    config = trained.info.run_config
    if dataset is not None:
        facts = DATASETS[choose(dataset, DATASETS, "dataset")]
        for name in ("channels", "num_classes"):
            if facts[name] != getattr(trained.model.config, name):
                raise UserError(
                    f"{dataset} has {facts[name]} {name}, but '{run}' was trained for "
                    f"{getattr(trained.model.config, name)}; choose a data set that fits"
                )
        config = replace(config, data=replace(config.data, dataset=dataset))
    if not 1 <= severity <= 5:
        raise UserError(f"severity ({severity}) must be from 1 to 5")
    choose(split, ("train", "validation", "test"), "split")
    device = machine.pick_device(runtime.device)
    store.check_writable(runtime.results)
    machine.set_threads(runtime.threads)
    model = trained.model if image_size is None else resized(trained.model, image_size)
    data = load_data(config.data, runtime.data_dir)
    part: Split = getattr(data, split)
    if corrupt is not None:
        part = Split(corrupted(part.images, corrupt, severity), part.labels)
    info = trained.info
    kernels.forget_used()
    logits = logits_of(model.to(device), part, Normalise(info.mean, info.std, model.config.image_hw, device), device)
    labels = part.labels.numpy()
    class_top1_pct, confusion = accuracy.per_class(logits, labels)

    checkpoint = Path(run).stem if run.endswith(".safetensors") else "model"
    asked: dict[str, Any] = {
        "run": info.id, "checkpoint": checkpoint, "dataset": config.data.dataset, "split": split,
        "image_size": model.config.image_hw[0],
        "corrupt": corrupt, "severity": severity if corrupt else None,
    }  # fmt: skip
    metrics = {
        "images": len(labels),
        "kernels_used": kernels.used(),
        "kernel_profile": forms.active().digest,
        **accuracy.summary(logits, labels),
        "class_top1_pct": class_top1_pct,
        "confusion": confusion,
    }
    broken = accuracy.broken_text(logits)
    record = store.new_record(
        kind="eval", status="diverged" if broken else "ok", error=broken or None,
        key=store.cell_key("eval", {**info.config, **asked}, data.digest),
        config={**info.config, **asked}, hardware=machine.hardware(device), versions=machine.versions(),
        commit=machine.commit(), metrics=metrics, warnings=list(data.warnings),
    )  # fmt: skip
    changes = [
        *([checkpoint] if checkpoint != "model" else []),
        config.data.dataset,
        split,
        f"{model.config.image_hw[0]}px",
        f"{corrupt}{severity}" if corrupt else "",
    ]
    path = trained.folder / f"predictions-{'-'.join(filter(None, changes))}.npz"
    try:
        accuracy.save_predictions(path, logits, labels)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}); free some space or make it writable") from None
    store.append(runtime.results, record)
    return Evaluation(record, info.class_names, class_top1_pct, confusion, path)
