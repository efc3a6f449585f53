"""How good the predictions are: accuracy, calibration, and the intervals around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vitcmp import store

Array = np.ndarray


NO_CLASS = -1
"""The prediction for a sample whose logits give none."""


def predicted(logits: Array) -> Array:
    """The class with the largest logit, [N]; NO_CLASS where that logit is NaN or infinite.

    argmax alone would take the first NaN for the largest, so that a broken model would always say class 0.
    """
    return np.where(np.isfinite(logits.max(axis=1)), logits.argmax(axis=1), NO_CLASS)


def broken_text(logits: Array) -> str:
    """How many images have no prediction, and the remedy; empty where all have one."""
    lost = int((predicted(logits) == NO_CLASS).sum())
    if not lost:
        return ""
    remedy = "train it again with a lower --lr or longer --warmup-epochs"
    return f"the model's logits are not finite for {lost} of {len(logits)} images; {remedy}"


def top_k_pct(logits: Array, labels: Array, k: int) -> float:
    """Share of samples, in percent, whose label is among the k largest logits ([N, classes]).

    Ties go to the lower class, as in argmax; a sample without a prediction is wrong, so a broken model scores 0.
    """
    largest = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    right = (largest == labels[:, None]).any(axis=1) & (predicted(logits) != NO_CLASS)
    return float(right.mean() * 100)


def probabilities(logits: Array) -> Array:
    """Softmax over classes, [N, classes], in fp64; NaN for a sample without a prediction."""
    weights = np.exp(_shifted(logits))
    return weights / weights.sum(axis=1, keepdims=True)


def nll(logits: Array, labels: Array) -> float:
    """Mean negative log-likelihood of the labels, in nats; NaN where a sample has no prediction."""
    shifted = _shifted(logits)
    log_total = np.log(np.exp(shifted).sum(axis=1))
    return float((log_total - shifted[np.arange(len(labels)), labels]).mean())


def ece_pct(logits: Array, labels: Array, bins: int = 15) -> float:
    """Expected calibration error in percent: |confidence - accuracy| over equal-width bins of the confidence.

    Guo et al., 2017 (arXiv 1706.04599), equation 5; a bin holds (low, high]. NaN where a sample has no prediction, and
    so no confidence.
    """
    said = predicted(logits)
    if (said == NO_CLASS).any():
        return float("nan")
    confidence, correct = probabilities(logits).max(axis=1), said == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels) * 100)


def _shifted(logits: Array) -> Array:
    """Logits minus the largest of their sample, in fp64; NaN for a sample without a prediction."""
    largest = np.where(predicted(logits) == NO_CLASS, np.nan, logits.max(axis=1))
    return logits.astype(np.float64) - largest[:, None]


def wilson_pct(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion in percent (Wilson, 1927): of the test images, not of the seeds."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return float(max(0, centre - half) * 100), float(min(1, centre + half) * 100)


def summary(logits: Array, labels: Array, prefix: str = "") -> dict[str, Any]:
    """Top-1, top-5 (top-1 alone below 6 classes), NLL, ECE and the interval of top-1, under prefixed names."""
    top1 = top_k_pct(logits, labels, 1)
    low, high = wilson_pct(round(top1 * len(labels) / 100), len(labels))
    metrics = {"top1_pct": top1, "top1_low_pct": low, "top1_high_pct": high}
    if logits.shape[1] > 5:
        metrics["top5_pct"] = top_k_pct(logits, labels, 5)
    metrics |= {"nll": nll(logits, labels), "ece_pct": ece_pct(logits, labels)}
    return {prefix + name: value for name, value in metrics.items()}


def per_class(logits: Array, labels: Array) -> tuple[list[float | None], list[list[int]]]:
    """Accuracy of each class in percent (None for a class without samples), and the confusion matrix [true][said].

    A sample without a prediction is wrong, and in no column of the matrix.
    """
    classes, said = logits.shape[1], predicted(logits)
    cells = (labels * classes + said)[said != NO_CLASS]
    matrix = np.bincount(cells, minlength=classes * classes).reshape(classes, classes)
    totals = np.bincount(labels, minlength=classes)
    shares = [float(matrix[i, i] / n * 100) if n else None for i, n in enumerate(totals)]
    return shares, matrix.tolist()


def save_predictions(path: Path, logits: Array, labels: Array) -> None:
    """Logits, label and prediction of every image, in the data set's order; whole, or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, logits=logits, labels=labels, predicted=predicted(logits))

    store.write_atomic(path, write)
