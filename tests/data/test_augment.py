"""Augmentation: against obvious loops, by seed, and at the limits of each operation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from vitcmp.configs import AugmentConfig
from vitcmp.data.augment import OPERATIONS, Batch, Normalise, TrainPipeline, cutmix, erase, random_operation
from vitcmp.data.datasets import Split

CPU = torch.device("cpu")
HEIGHT, WIDTH = 6, 8


def make_split(count: int = 20, channels: int = 3) -> Split:
    generator = Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, channels, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def make_pipeline(split: Split, **settings: Any) -> TrainPipeline:
    config = AugmentConfig(**{"crop_padding": 0, "flip": False, **settings})
    channels = split.images.shape[1]
    # Values stay as they are: (x - 0) / 1 after 0..255 became 0..1.
    plain = Normalise((0.0,) * channels, (1.0,) * channels, (HEIGHT, WIDTH), CPU)
    return TrainPipeline(split, config, plain, CPU)


def pixels(batch: Batch) -> Tensor:
    """A batch's images as bytes again."""
    return (batch.images * 255).round().to(torch.uint8)


def shifted(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """The crop of a zero-padded image that begins `down`, `right` of its corner, pixel by pixel."""
    result = torch.zeros_like(image)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            source_y, source_x = y + down, (WIDTH - 1 - x if flip else x) + right
            if 0 <= source_y < HEIGHT and 0 <= source_x < WIDTH:
                result[:, y, x] = image[:, source_y, source_x]
    return result


@pytest.mark.parametrize("flip", [True, False])
def test_each_image_is_a_crop_and_flip_of_its_own(flip: bool) -> None:
    split = make_split()
    batch = make_pipeline(split, crop_padding=1, flip=flip).batch(torch.arange(20), Generator().manual_seed(0))
    moves = set()
    for found, image in zip(pixels(batch), split.images, strict=True):
        fitting = [
            (down, right, mirrored)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for mirrored in ((False, True) if flip else (False,))
            if torch.equal(found, shifted(image, down, right, mirrored))
        ]
        assert len(fitting) == 1
        moves.update(fitting)
    assert {move[0] for move in moves} == {move[1] for move in moves} == {-1, 0, 1}
    assert {move[2] for move in moves} == ({True, False} if flip else {False})


def test_crops_and_flips_are_uniform() -> None:
    image = torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    image[0, 0, 3, 4] = 255
    split = Split(image.expand(6000, -1, -1, -1).clone(), torch.zeros(6000, dtype=torch.int64))
    batch = make_pipeline(split, crop_padding=1).batch(torch.arange(6000), Generator().manual_seed(0))
    seen = batch.images[:, 0, 2:5, 3:6].mean(dim=0)
    torch.testing.assert_close(seen, torch.full((3, 3), 1 / 9), rtol=0, atol=0.02)


def test_an_epoch_shows_every_image_once_in_the_order_of_its_seed() -> None:
    split = make_split()
    pipeline = make_pipeline(split, crop_padding=1, flip=True, rand_augment=2, random_erasing=0.5, mixup=0.5, cutmix=1)
    first, again, other = (list(pipeline.epoch(8, seed)) for seed in (3, 3, 4))
    assert [len(batch.labels) for batch in first] == [8, 8, 4]
    for batches in (first, other):
        assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(20))
    for a, b in zip(first, again, strict=True):
        for field in dataclasses.fields(Batch):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name
    assert not torch.equal(first[0].labels, other[0].labels)


def test_without_changes_the_images_are_themselves() -> None:
    split = make_split()
    batch = make_pipeline(split).batch(torch.tensor([3, 1]), Generator().manual_seed(0))
    assert torch.equal(pixels(batch), split.images[[3, 1]])
    assert batch.labels.tolist() == batch.other_labels.tolist() == [3, 1]
    assert batch.share.tolist() == [1, 1]


def test_the_data_set_is_left_as_it_is() -> None:
    split = make_split()
    before = split.images.clone()
    pipeline = make_pipeline(split, rand_augment=2, random_erasing=1, cutmix=1)
    for _ in pipeline.epoch(8, 0):
        pass
    assert torch.equal(split.images, before)
    assert torch.equal(pipeline.padded, before.flatten(2))


def test_normalised_values() -> None:
    image = torch.tensor([[[0, 51]], [[102, 255]]], dtype=torch.uint8).unsqueeze(0)  # [1, 2, 1, 2]
    found = Normalise((0.2, 0.5), (0.5, 0.25), (1, 2), CPU)(image)
    torch.testing.assert_close(found, torch.tensor([[[[-0.4, 0.0]], [[-0.4, 2.0]]]]))


def test_normalising_resizes() -> None:
    found = Normalise((0.0,), (1.0,), (4, 4), CPU)(torch.full((2, 1, 8, 8), 51, dtype=torch.uint8))
    torch.testing.assert_close(found, torch.full((2, 1, 4, 4), 0.2))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 0.999])
def test_cutmix_returns_the_exact_share(share: float) -> None:
    for seed in range(20):
        images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
        left = cutmix(images, torch.tensor([1, 0]), share, Generator().manual_seed(seed))
        assert images[0].mean().item() == pytest.approx(1 - left, abs=1e-6)
        assert images[1].mean().item() == pytest.approx(left, abs=1e-6)
        assert left >= share - 0.14  # smaller where the border cuts it; up to a pixel more on each side
        rows = images[0, 0].amax(dim=1).nonzero().flatten()
        columns = images[0, 0].amax(dim=0).nonzero().flatten()
        if len(rows):
            inside = images[0, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (inside == 1).all()  # one rectangle


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixed_images_are_the_sum_that_their_labels_say(settings: dict[str, float]) -> None:
    """Each image is one constant, so that its mean tells how much of which label is in it."""
    values = torch.arange(10, dtype=torch.uint8) * 25
    split = Split(values.view(10, 1, 1, 1).expand(10, 1, HEIGHT, WIDTH).clone(), torch.arange(10))
    pipeline, kinds = make_pipeline(split, **settings), set()
    for seed in range(30):
        (batch,) = pipeline.epoch(10, seed)
        assert ((batch.share >= 0) & (batch.share <= 1)).all()
        wanted = batch.share * values[batch.labels] + (1 - batch.share) * values[batch.other_labels]
        torch.testing.assert_close(batch.images.mean(dim=(1, 2, 3)) * 255, wanted, rtol=0, atol=1e-2)
        assert sorted(batch.other_labels.tolist()) == list(range(10))
        kinds.add(bool((batch.images.std(dim=(1, 2, 3)) > 1e-3).any()))
    if len(settings) == 2:
        assert kinds == {True, False}  # batches of both sorts


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_erasing_happens_as_often_as_asked(probability: float) -> None:
    images = torch.zeros(64, 3, 16, 16)
    erase(images, probability, Generator().manual_seed(0))
    shares = (images != 0).double().mean(dim=(1, 2, 3))
    if probability == 0:
        assert (shares == 0).all()
    else:
        assert (shares > 0).all()
        assert (shares < 0.45).all()
        erased = images[images != 0]
        assert erased.mean().item() == pytest.approx(0, abs=0.05)
        assert erased.std().item() == pytest.approx(1, abs=0.05)


def soft_image() -> Tensor:
    """Float images in 50..200 with structure, so that every operation has something to change."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    colours = torch.stack([50 + 150 * y, 200 - 120 * x, 60 + 100 * x * y])
    return colours.round().expand(4, -1, -1, -1).clone()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_operations_keep_range_and_shape_and_do_something(operation: Any, direction: float) -> None:
    images = soft_image()
    sign = torch.full((4, 1, 1, 1), direction)
    changed = operation(images, 1.0, sign).clamp(0, 255)
    assert changed.shape == images.shape
    assert changed.isfinite().all()
    assert torch.equal(images, soft_image())  # not in place
    identity = operation.__name__ == "_identity"
    for before, after in zip(images, changed, strict=True):
        assert torch.equal(before, after) is identity


def operation_named(name: str) -> Any:
    return next(f for f in OPERATIONS if f.__name__ == f"_{name}")


def test_operations_have_the_known_values() -> None:
    plus = torch.ones(1, 1, 1, 1)
    image = torch.tensor([[[[0.0, 100.0], [200.0, 255.0]]]])
    assert operation_named("solarize")(image, 0.5, plus).flatten().tolist() == [0, 100, 55, 0]
    assert operation_named("posterize")(image, 1.0, plus).flatten().tolist() == [0, 96, 192, 240]
    dim = operation_named("brightness")(image, 1.0, -plus)
    torch.testing.assert_close(dim, 0.1 * image)
    soft = torch.tensor([[[[50.0, 100.0], [125.0, 200.0]]]])
    assert operation_named("autocontrast")(soft, 1.0, plus).flatten().tolist() == [0, 85, 127.5, 255]
    moved = operation_named("translate_x")(soft, 1 / 0.9, plus)  # half the width
    torch.testing.assert_close(moved, torch.tensor([[[[100.0, 0.0], [200.0, 0.0]]]]))


def test_strength_zero_moves_nothing() -> None:
    images, sign = soft_image(), torch.ones(4, 1, 1, 1)
    for operation in OPERATIONS:
        if operation.__name__ != "_autocontrast":  # it has no strength
            torch.testing.assert_close(operation(images, 0.0, sign), images, rtol=0, atol=1e-2)


def test_each_image_draws_its_own_operation() -> None:
    images = soft_image()[:1].expand(400, -1, -1, -1)
    changed = random_operation(images, 1.0, Generator().manual_seed(0))
    assert changed.min() >= 0
    assert changed.max() <= 255
    # Two signs each, but identity, autocontrast, posterize and solarize have none.
    assert len(changed.flatten(1).unique(dim=0)) == 2 * (len(OPERATIONS) - 4) + 4


def test_grey_images_take_every_operation() -> None:
    images = soft_image()[:, :1].expand(-1, -1, -1, -1).repeat(50, 1, 1, 1)
    changed = random_operation(images, 0.5, Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.isfinite().all()
