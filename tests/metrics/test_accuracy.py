"""Accuracy and calibration, on examples whose answers can be written down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from vitcmp.metrics import accuracy

# Three classes, four samples; the second-largest logit decides top-2.
LOGITS = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
LABELS = np.array([0, 2, 2, 0])


def test_top_k() -> None:
    assert [accuracy.top_k_pct(LOGITS, LABELS, k) for k in (1, 2, 3)] == [50, 75, 100]


def test_a_tie_is_what_argmax_says() -> None:
    """Or a model whose logits are all equal would be always right."""
    logits = np.zeros((10, 10))
    assert accuracy.top_k_pct(logits, np.arange(10), 1) == 10
    assert accuracy.top_k_pct(logits, np.arange(10), 5) == 50
    rounded = np.random.default_rng(0).integers(0, 4, (500, 10)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 10, 500)
    assert accuracy.top_k_pct(rounded, labels, 1) == (rounded.argmax(axis=1) == labels).mean() * 100


BROKEN = [
    np.full((4, 3), np.nan),
    np.full((4, 3), np.inf),
    np.full((4, 3), -np.inf),
    np.where(np.eye(3)[LABELS] == 1, np.nan, LOGITS),
    np.where(np.eye(3)[LABELS] == 1, np.inf, LOGITS),
]


@pytest.mark.parametrize("logits", BROKEN)
def test_a_broken_model_is_never_right(logits: np.ndarray, tmp_path: Path) -> None:
    assert accuracy.predicted(logits).tolist() == [-1] * 4
    assert accuracy.top_k_pct(logits, LABELS, 1) == 0
    assert accuracy.top_k_pct(logits, LABELS, 3) == 0
    assert accuracy.per_class(logits, LABELS) == ([0, None, 0], [[0] * 3] * 3)
    assert np.isnan(accuracy.probabilities(logits)).all()
    found = accuracy.summary(logits, LABELS)
    assert (found["top1_pct"], found["top1_low_pct"]) == (0, 0)
    assert np.isnan([found["nll"], found["ece_pct"]]).all()
    assert "4 of 4 images; train it again with a lower --lr" in accuracy.broken_text(logits)
    accuracy.save_predictions(tmp_path / "predictions.npz", logits, LABELS)
    with np.load(tmp_path / "predictions.npz") as kept:
        assert kept["predicted"].tolist() == [-1] * 4


def test_a_broken_sample_alone_is_wrong_and_in_no_column() -> None:
    logits = LOGITS.copy()
    logits[0, 2] = np.nan
    assert accuracy.predicted(logits).tolist() == [-1, 1, 2, 2]
    assert accuracy.top_k_pct(logits, LABELS, 1) == 25
    assert accuracy.per_class(logits, LABELS) == ([0, None, 50], [[0, 0, 1], [0, 0, 0], [0, 1, 1]])
    assert np.isnan(accuracy.probabilities(logits)).all(axis=1).tolist() == [True, False, False, False]
    assert "1 of 4 images" in accuracy.broken_text(logits)


def test_a_class_that_is_excluded_breaks_nothing() -> None:
    logits = np.array([[-np.inf, 0.0, np.log(3)], [1.0, 0.0, -np.inf]])
    assert accuracy.predicted(logits).tolist() == [2, 0]
    np.testing.assert_allclose(accuracy.probabilities(logits)[0], [0, 0.25, 0.75])
    assert accuracy.nll(logits[:1], np.array([2])) == pytest.approx(-np.log(0.75))
    assert accuracy.broken_text(logits) == ""


def test_probabilities_and_likelihood() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]) + 7
    np.testing.assert_allclose(accuracy.probabilities(logits), [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    assert accuracy.nll(logits, np.array([0, 1])) == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
    assert accuracy.nll(np.array([[1000.0, 0.0]]), np.array([1])) == 1000


def two_class(confidences: list[float]) -> np.ndarray:
    return np.log([[p, 1 - p] for p in confidences])


def test_calibration_error() -> None:
    # Bins of a half: (0.5, 1] holds all; mean confidence 0.75, accuracy 0.5.
    logits = two_class([0.6, 0.7, 0.8, 0.9])
    assert accuracy.ece_pct(logits, np.array([0, 0, 1, 1]), bins=2) == pytest.approx(25)
    # Bins of a tenth: 0.58 and 0.62 stand apart; |0.58 - 1| and |0.62 - 0| do not cancel.
    assert accuracy.ece_pct(two_class([0.58, 0.62]), np.array([0, 1]), bins=10) == pytest.approx(52)
    # The upper edge belongs to the bin: a half stands in (0, 0.5], apart from 0.75, so the gaps do not cancel.
    assert accuracy.ece_pct(two_class([0.5, 0.75]), np.array([0, 1]), bins=2) == pytest.approx((0.5 + 0.75) / 2 * 100)


def test_certain_and_right_is_calibrated() -> None:
    logits = np.array([[50.0, 0.0], [0.0, 50.0]])
    assert accuracy.ece_pct(logits, np.array([0, 1])) == pytest.approx(0, abs=1e-9)
    assert accuracy.ece_pct(logits, np.array([1, 0])) == pytest.approx(100)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (7, 10), (9123, 10_000), (1, 3)])
def test_intervals_are_wilsons(correct: int, total: int) -> None:
    wanted = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert accuracy.wilson_pct(correct, total) == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=1e-4)


def test_summary_names_its_numbers() -> None:
    summary = accuracy.summary(LOGITS, LABELS, prefix="test_")
    names = ("top1_pct", "top1_low_pct", "top1_high_pct", "nll", "ece_pct")
    assert set(summary) == {f"test_{name}" for name in names}
    assert summary["test_top1_pct"] == 50
    assert summary["test_top1_low_pct"] < 50 < summary["test_top1_high_pct"]
    logits = np.random.default_rng(0).normal(size=(50, 6))
    wide = accuracy.summary(logits, np.zeros(50, dtype=int))
    assert wide["top5_pct"] >= wide["top1_pct"]


def test_per_class() -> None:
    shares, matrix = accuracy.per_class(LOGITS, LABELS)
    assert shares == [50, None, 50]
    assert matrix == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
