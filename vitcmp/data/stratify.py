"""The stratified split of a data set: scikit-learn's, to the sample, without the second that its import takes."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def stratified_split(labels: Array, share: float) -> tuple[Array, Array]:
    """Places kept and held out ([kept], [held]), each in a fixed random order, with every class in proportion.

    `labels` are class numbers, [N]; ceil(share N) places are held out. Equal to scikit-learn's
    `train_test_split(range(N), test_size=share, stratify=labels, random_state=0)`.

    Raises: ValueError where a class has a single sample, or a part would have fewer samples than there are classes.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    held = math.ceil(share * len(labels))
    kept = len(labels) - held
    if sizes.min() < 2:
        raise ValueError(f"class {classes[sizes.argmin()]} has a single sample")
    if min(kept, held) < len(classes):
        raise ValueError(f"{kept} and {held} samples cannot both hold {len(classes)} classes")

    random = np.random.RandomState(0)
    kept_sizes = _in_proportion(sizes, kept, random)
    held_sizes = _in_proportion(sizes - kept_sizes, held, random)
    kept_places, held_places = [], []
    for index, size, kept_size, held_size in zip(classes, sizes, kept_sizes, held_sizes, strict=True):
        places = np.flatnonzero(labels == index)[random.permutation(size)]
        kept_places.append(places[:kept_size])
        held_places.append(places[kept_size : kept_size + held_size])
    return random.permutation(np.concatenate(kept_places)), random.permutation(np.concatenate(held_places))


def _in_proportion(sizes: Array, total: int, random: np.random.RandomState) -> Array:
    """How many of each class make `total`: the nearest whole numbers, equal remainders drawn by lot."""
    exact = sizes / sizes.sum() * total
    counts = np.floor(exact)
    remainders = exact - counts
    for value in np.unique(remainders)[::-1]:
        missing = int(total - counts.sum())
        if missing == 0:
            break
        equal = np.flatnonzero(remainders == value)
        counts[random.choice(equal, min(len(equal), missing), replace=False)] += 1
    return counts.astype(int)
