"""Augmentation: against obvious loops, by seed, and at the limits of each operation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import InterpolationMode

from vitcmp.configs import AugmentConfig
from vitcmp.data.augment import OPERATIONS, Batch, Normalise, TrainPipeline, cutmix, erase, operate, random_operation
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


@pytest.mark.parametrize(("channels", "padding", "flip"), [(3, 2, True), (1, 3, False), (1, 0, True), (3, 0, False)])
def test_both_ways_to_crop_agree(channels: int, padding: int, flip: bool) -> None:
    pipeline = make_pipeline(make_split(channels=channels), crop_padding=padding, flip=flip)
    assert pipeline.windows is not None  # rows of pixels on the CPU
    by_rows = list(pipeline.epoch(8, 0))
    pipeline.windows = None
    by_pixels = list(pipeline.epoch(8, 0))
    for a, b in zip(by_rows, by_pixels, strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("padding", [0, 2])
def test_images_may_be_a_view(padding: int) -> None:
    """A part of a larger tensor, or one whose channels come last in memory."""
    images = make_split().images
    last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wanted = list(make_pipeline(Split(images[5:].clone(), torch.arange(15)), crop_padding=padding).epoch(8, 0))
    for view in (images[5:], last[5:]):
        found = list(make_pipeline(Split(view, torch.arange(15)), crop_padding=padding).epoch(8, 0))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_after_the_changes(channels: int) -> None:
    config = AugmentConfig(crop_padding=1, flip=True, rand_augment=2, random_erasing=0.5, mixup=0.2, cutmix=1.0)
    normalise = Normalise((0.0,) * channels, (1.0,) * channels, (12, 20), CPU)
    for batch in TrainPipeline(make_split(channels=channels), config, normalise, CPU).epoch(8, 0):
        assert batch.images.shape == (len(batch.labels), channels, 12, 20)
        assert batch.images.isfinite().all()


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


def test_the_number_of_threads_changes_nothing() -> None:
    images = torch.randint(0, 256, (256, 3, 32, 32), generator=Generator().manual_seed(1), dtype=torch.uint8)
    config = AugmentConfig(crop_padding=4, flip=True, rand_augment=2, random_erasing=0.5, mixup=0.2, cutmix=1.0)
    normalise = Normalise((0.5,) * 3, (0.25,) * 3, (32, 32), CPU)
    pipeline = TrainPipeline(Split(images, torch.arange(256)), config, normalise, CPU)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(torch.cat([batch.images for batch in pipeline.epoch(128, 3)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_batch_stays_as_it_was_handed_out() -> None:
    pipeline = make_pipeline(make_split(), crop_padding=1, flip=True, rand_augment=2, random_erasing=1, cutmix=1)
    batches = pipeline.epoch(8, 0)
    first = next(batches)
    before = first.images.clone()
    list(batches)
    assert torch.equal(first.images, before)


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
    assert torch.equal(pipeline.padded, before)


def test_normalised_values() -> None:
    image = torch.tensor([[[0, 51]], [[102, 255]]], dtype=torch.uint8).unsqueeze(0)  # [1, 2, 1, 2]
    found = Normalise((0.2, 0.5), (0.5, 0.25), (1, 2), CPU)(image)
    torch.testing.assert_close(found, torch.tensor([[[[-0.4, 0.0]], [[-0.4, 2.0]]]]))


def test_normalising_leaves_its_input() -> None:
    images = torch.full((1, 1, 2, 2), 51.0)
    Normalise((0.2,), (0.5,), (2, 2), CPU)(images)
    assert (images == 51).all()


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


def test_what_is_erased_is_one_rectangle_of_the_size_asked() -> None:
    """At full size inside the border its area is 2 % to a third of the image, uniformly."""
    images = torch.zeros(4000, 1, 32, 32)
    erase(images, 1.0, Generator().manual_seed(0))
    areas = []
    for mask in (images != 0).squeeze(1):
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        if rows[0] > 0 and rows[-1] < 31 and columns[0] > 0 and columns[-1] < 31:
            areas.append(mask.double().mean().item())
    assert min(areas) == pytest.approx(0.02, abs=0.01)
    assert max(areas) == pytest.approx(1 / 3, abs=0.04)


def test_some_images_are_erased_and_others_left() -> None:
    images = torch.zeros(2000, 1, 8, 8)
    erase(images, 0.25, Generator().manual_seed(0))
    assert (images != 0).any(dim=(1, 2, 3)).double().mean().item() == pytest.approx(0.25, abs=0.03)


def soft_image() -> Tensor:
    """Float images in 50..200 with structure, so that every operation has something to change."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    colours = torch.stack([50 + 150 * y, 200 - 120 * x, 60 + 100 * x * y])
    return colours.round().expand(4, -1, -1, -1).clone()


def rough_images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 12, 16), generator=Generator().manual_seed(0)).float()


def changed_by(name: str, images: Tensor, strength: float = 1.0, sign: int = 1) -> Tensor:
    """All images after one operation."""
    number, signs = OPERATIONS.index(name), torch.full((len(images),), sign)
    return operate(images, torch.full((len(images),), number), signs, strength)


def blended(image: Tensor, other: Tensor, amount: float) -> Tensor:
    return (other + (image - other) * (1 + 0.9 * amount)).clamp(0, 255)


def neighbours(image: Tensor, y: int, x: int) -> Tensor:
    """The weighted mean of [C, 3, 3] pixels around one, the border's repeated."""
    _, height, width = image.shape
    total = 4 * image[:, y, x]
    for j in (y - 1, y, y + 1):
        for i in (x - 1, x, x + 1):
            total = total + image[:, min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
    return total / 13


def sampled(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """Each pixel from where the matrix says, coordinates in -1..1, between the four pixels around, zeros outside."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            place = ((2 * x + 1) / width - 1, (2 * y + 1) / height - 1, 1)
            from_x, from_y = (sum(m * p for m, p in zip(row, place, strict=True)) for row in matrix)
            i, j = ((from_x + 1) * width - 1) / 2, ((from_y + 1) * height - 1) / 2
            for row in (math.floor(j), math.floor(j) + 1):
                for column in (math.floor(i), math.floor(i) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        weight = (1 - abs(j - row)) * (1 - abs(i - column))
                        result[:, y, x] += weight * image[:, row, column]
    return result


def expected(name: str, image: Tensor, strength: float, sign: int) -> Tensor:
    """One operation on one image [C, height, width], as defined."""
    amount = strength * sign
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2] if len(image) == 3 else image[0]
    if name == "identity":
        return image
    if name == "brightness":
        return blended(image, torch.zeros_like(image), amount)
    if name == "contrast":
        return blended(image, grey.mean().expand_as(image), amount)
    if name == "colour":
        return blended(image, grey.expand_as(image), amount)
    if name == "sharpness":
        _, height, width = image.shape
        rows = [torch.stack([neighbours(image, y, x) for x in range(width)], dim=1) for y in range(height)]
        return blended(image, torch.stack(rows, dim=1), amount)
    if name == "autocontrast":
        channels = [(c - c.min()) * 255 / (c.max() - c.min()) if c.max() > c.min() else c for c in image]
        return torch.stack(channels)
    if name == "posterize":
        return (image.int() >> round(4 * strength) << round(4 * strength)).float()
    if name == "solarize":
        return image.clone().apply_(lambda value: 255 - value if value >= 256 * (1 - strength) else value)
    angle = math.radians(30) * amount
    return sampled(image, {
        "rotate": [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]],
        "shear_x": [[1, 0.3 * amount, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [0.3 * amount, 1, 0]],
        "translate_x": [[1, 0, 0.9 * amount], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, 0.9 * amount]],
    }[name])  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_are_as_defined(name: str, channels: int) -> None:
    images = rough_images()[:, :channels]
    images[1, 0] = 77  # nothing to stretch
    for strength, sign in ((0.3, 1), (0.3, -1), (1.0, 1), (1.0, -1)):
        wanted = torch.stack([expected(name, image, strength, sign) for image in images])
        torch.testing.assert_close(changed_by(name, images, strength, sign), wanted, rtol=0, atol=2e-3)


def torchvision_operation(name: str, image: Tensor, strength: float, sign: int) -> Tensor:
    """torchvision's, for a square image, where it means the same."""
    amount, still, side = strength * sign, [0, 0], image.shape[-1]
    if name in ("brightness", "contrast", "saturation", "sharpness"):
        return getattr(tv, f"adjust_{name}")(image / 255, 1 + 0.9 * amount) * 255
    if name == "autocontrast":
        return tv.autocontrast(image / 255) * 255
    if name == "posterize":
        return tv.posterize(image.byte(), 8 - round(4 * strength)).float()
    if name == "solarize":
        return tv.solarize(image / 255, 256 / 255 * (1 - strength)) * 255 if strength else image
    bilinear = InterpolationMode.BILINEAR
    if name == "rotate":
        return tv.rotate(image, 30 * amount, bilinear)
    shear, move = math.degrees(math.atan(0.3 * amount)), -0.9 * amount * side / 2
    shears = {"shear_x": [shear, 0.0], "shear_y": [0.0, shear]}
    moves = {"translate_x": [move, 0], "translate_y": [0, move]}
    return tv.affine(image, 0, moves.get(name, still), 1, shears.get(name, [0.0, 0.0]), bilinear)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_operations_are_those_of_torchvision(name: str) -> None:
    images = rough_images()[..., :12]
    # torchvision rounds the weights of grey to 4 digits, and does not sharpen the border.
    theirs, edge = {"colour": "saturation"}.get(name, name), 1 if name == "sharpness" else 0
    inside = (..., slice(edge, 12 - edge), slice(edge, 12 - edge))
    for strength, sign in ((0.0, 1), (0.3, 1), (0.3, -1), (0.7, 1)):
        wanted = torchvision_operation(theirs, images, strength, sign)
        torch.testing.assert_close(changed_by(name, images, strength, sign)[inside], wanted[inside], rtol=0, atol=0.03)


def test_each_image_gets_its_own_operation_sign_and_place() -> None:
    images = rough_images()[:1].repeat(60, 1, 1, 1) * torch.linspace(0.5, 1, 60).view(-1, 1, 1, 1)
    before, generator = images.clone(), Generator().manual_seed(0)
    choices = torch.randint(0, len(OPERATIONS), (60,), generator=generator)
    signs = torch.randint(0, 2, (60,), generator=generator) * 2 - 1
    changed = operate(images, choices, signs, 0.3)
    assert torch.equal(images, before)
    for i in range(60):
        alone = changed_by(OPERATIONS[choices[i]], images[i : i + 1], 0.3, int(signs[i]))
        torch.testing.assert_close(changed[i : i + 1], alone, rtol=0, atol=2e-3)


def test_operations_have_the_known_values() -> None:
    image = torch.tensor([[[[0.0, 100.0], [200.0, 255.0]]]])
    assert changed_by("solarize", image, 0.5).flatten().tolist() == [0, 100, 55, 0]
    assert changed_by("posterize", image, 1.0).flatten().tolist() == [0, 96, 192, 240]
    torch.testing.assert_close(changed_by("brightness", image, 1.0, -1), 0.1 * image)
    soft = torch.tensor([[[[50.0, 100.0], [125.0, 200.0]]]])
    assert changed_by("autocontrast", soft).flatten().tolist() == [0, 85, 127.5, 255]
    moved = changed_by("translate_x", soft, 1 / 0.9)  # half the width
    torch.testing.assert_close(moved, torch.tensor([[[[100.0, 0.0], [200.0, 0.0]]]]))


def test_strength_zero_moves_nothing() -> None:
    for name in OPERATIONS:
        if name != "autocontrast":  # it has no strength
            torch.testing.assert_close(changed_by(name, soft_image(), 0.0), soft_image(), rtol=0, atol=1e-2)


def test_each_image_draws_its_own_operation() -> None:
    images = soft_image()[:1].expand(400, -1, -1, -1)
    changed = random_operation(images, 1.0, Generator().manual_seed(0))
    assert changed.min() >= 0
    assert changed.max() <= 255
    # Two signs each, but identity, autocontrast, posterize and solarize have none. By place in the batch, sums may be
    # rounded otherwise.
    assert len(changed.round().flatten(1).unique(dim=0)) == 2 * (len(OPERATIONS) - 4) + 4


def test_operations_and_signs_are_drawn_equally_often() -> None:
    images = torch.zeros(13_000, 1, 4, 4) + torch.tensor([60.0, 100, 140, 180])
    changed = random_operation(images, 0.5, Generator().manual_seed(0))
    for name in ("brightness", "translate_x"):
        for sign in (1, -1):
            share = (changed - changed_by(name, images[:1], 0.5, sign)).abs().amax(dim=(1, 2, 3)) < 1e-3
            assert share.double().mean().item() == pytest.approx(1 / 26, abs=0.006)


def test_grey_images_take_every_operation() -> None:
    images = soft_image()[:, :1].repeat(50, 1, 1, 1)
    changed = random_operation(images, 0.5, Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.isfinite().all()
