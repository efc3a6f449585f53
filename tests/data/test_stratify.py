"""Our stratified split against scikit-learn's, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vitcmp.data.datasets import load_data
from vitcmp.data.stratify import stratified_split


def expected(labels: np.ndarray, share: float) -> list[np.ndarray]:
    return train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=0)


def test_the_split_is_scikit_learns() -> None:
    random, refused = np.random.default_rng(0), 0
    for _ in range(300):
        labels = random.integers(0, random.integers(1, 7), random.integers(2, 60))
        share = random.choice([0.05, 0.1, 1 / 3, 0.5, 0.77])
        try:
            kept, held_out = expected(labels, share)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="class"):
                stratified_split(labels, share)
            continue
        ours = stratified_split(labels, share)
        np.testing.assert_array_equal(ours[0], kept)
        np.testing.assert_array_equal(ours[1], held_out)
    assert 30 < refused < 270


@pytest.mark.parametrize("classes", [10, 100])
def test_a_split_of_many_classes_is_scikit_learns(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes, 20_011)
    for ours, theirs in zip(stratified_split(labels, 0.1), expected(labels, 0.1), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_digits_are_scikit_learns() -> None:
    bunch, data = load_digits(), load_data("digits")
    train, test = expected(bunch.target, 0.2)
    train = train[expected(bunch.target[train], 0.1)[0]]
    for part, places in ((data.train, train), (data.test, test)):
        np.testing.assert_array_equal(part.images[:, 0], np.round(bunch.images[places] * (255 / 16)))
        np.testing.assert_array_equal(part.labels, bunch.target[places])
