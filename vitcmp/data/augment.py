"""From uint8 tensors to training batches, on the device and a batch at a time.

Every random choice comes from a generator on the CPU, so that the same seed gives the same images on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from vitcmp.configs import AugmentConfig
from vitcmp.data.datasets import Split


@dataclass(frozen=True)
class Batch:
    """Normalised images [B, C, height, width]; each counts `share` for its label and the rest for `other_labels`."""

    images: Tensor
    labels: Tensor
    other_labels: Tensor
    share: Tensor
    """[B]: 1 without mixing."""

    def split(self, size: int) -> list[Batch]:
        """Parts of `size` images, the last one perhaps smaller. Where nothing is mixed, both labels stay one tensor."""
        images, labels, share = self.images.split(size), self.labels.split(size), self.share.split(size)
        others = labels if self.other_labels is self.labels else self.other_labels.split(size)
        return [Batch(*part) for part in zip(images, labels, others, share, strict=True)]


class Normalise:
    """uint8 (or 0..255 float) images to float with mean 0 and standard deviation 1, resized if need be."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], image_hw: tuple[int, int], device: torch.device
    ) -> None:
        self.scale = (1 / (255 * torch.tensor(std))).view(-1, 1, 1).to(device)
        self.shift = (torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1).to(device)
        self.image_hw = image_hw

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, any, any] to [B, C, height, width]."""
        if images.shape[-2:] != self.image_hw:
            images = F.interpolate(images.float(), self.image_hw, mode="bilinear", antialias=True, align_corners=False)
        # Two passes over memory, and yet faster on the CPU than addcmul, which broadcasts slowly.
        return (images * self.scale).sub_(self.shift)


class TrainPipeline:
    """Random crops and flips of many images at once, then the stronger changes, then normalisation.

    `padded` stays on the device: the whole training set with a border of zeros, uint8, [N, C, height, width].
    """

    def __init__(self, split: Split, config: AugmentConfig, normalise: Normalise, device: torch.device) -> None:
        assert isinstance(config.crop_padding, int)
        assert isinstance(config.flip, bool)
        self.config, self.normalise, self.device = config, normalise, device
        self.padding = config.crop_padding
        self.height, self.width = split.images.shape[-2:]
        self.padded = F.pad(split.images, (self.padding,) * 4).contiguous().to(device)
        self.labels = split.labels.to(device)
        self.windows = self._windows() if device.type == "cpu" else None

    def epoch(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """All images once in a random order that depends on `seed` alone; the last batch may be smaller."""
        generator = Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        for index in order.split(batch_size):
            yield self.batch(index, generator)

    def batch(self, index: Tensor, generator: Generator) -> Batch:
        """One batch of the images at `index`."""
        c, size = self.config, len(index)
        images = self._crop_and_flip(index, generator)
        labels = self.labels[index.to(self.device)]
        if c.rand_augment:
            images = images.float()
            for _ in range(c.rand_augment):
                images = random_operation(images, c.rand_magnitude / 30, generator)
        images = self.normalise(images)
        if c.random_erasing:
            erase(images, c.random_erasing, generator)
        if not c.mixup and not c.cutmix:
            return Batch(images, labels, labels, torch.ones(size, device=self.device))
        partner = torch.randperm(size, generator=generator).to(self.device)
        use_cutmix = c.cutmix > 0 and (c.mixup == 0 or float(torch.rand((), generator=generator)) < 0.5)
        share = _beta(c.cutmix if use_cutmix else c.mixup, generator)
        if use_cutmix:
            share = cutmix(images, partner, share, generator)
        else:
            images = images.lerp(images.index_select(0, partner), 1 - share)
        return Batch(images, labels, labels[partner], torch.full((size,), share, device=self.device))

    def _windows(self) -> Tensor:
        """[*, C, height, width], a view: the window that begins at each byte of `padded`, most of them no crops."""
        _, channels, padded_h, padded_w = self.padded.shape
        last = ((channels - 1) * padded_h + self.height - 1) * padded_w + self.width - 1
        shape = (max(self.padded.numel() - last, 0), channels, self.height, self.width)
        return self.padded.as_strided(shape, (1, padded_h * padded_w, padded_w, 1))

    def _crop_and_flip(self, index: Tensor, generator: Generator) -> Tensor:
        """uint8 [B, C, height, width]."""
        size, (_, channels, padded_h, padded_w) = len(index), self.padded.shape
        top, left = torch.randint(0, 2 * self.padding + 1, (2, size), generator=generator)
        flipped = torch.rand(size, generator=generator) < (0.5 if self.config.flip else 0)
        if self.windows is not None:
            # On the CPU this copies whole rows of pixels, where an index for each pixel would copy bytes.
            images = self.windows.index_select(0, (index * channels * padded_h + top) * padded_w + left)
            if not self.config.flip:
                return images
            return torch.cat([images, images.flip(-1)]).index_select(0, torch.arange(size) + size * flipped)
        columns = torch.arange(self.width).expand(size, -1)
        columns = left.view(-1, 1) + torch.where(flipped.view(-1, 1), self.width - 1 - columns, columns)
        rows = top.view(-1, 1) + torch.arange(self.height)
        places = (index.view(-1, 1, 1, 1), torch.arange(channels).view(-1, 1, 1), rows[:, None, :, None])
        return self.padded[tuple(place.to(self.device) for place in (*places, columns[:, None, None, :]))]


def random_operation(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """One operation of RandAugment's list for each image (Cubuk et al., 2020); float images in 0..255, [B, C, h, w].

    Each image draws its operation and its sign, where the operation has one. Equalize is left out: it has no batched
    form.
    """
    choices = torch.randint(0, len(OPERATIONS), (len(images),), generator=generator)
    signs = torch.randint(0, 2, (len(images),), generator=generator) * 2 - 1
    return operate(images, choices, signs, strength)


def operate(images: Tensor, choices: Tensor, signs: Tensor, strength: float) -> Tensor:
    """Each image after the operation of this number in OPERATIONS, by `strength` (0 to 1) times its sign (1 or -1)."""
    # Those with the same operation are moved together, so that each operation changes one slice in place.
    choices, order = choices.sort(stable=True)
    amounts = strength * signs[order].float()
    images = images.index_select(0, order.to(images.device))
    counts = choices.bincount(minlength=len(OPERATIONS)).tolist()
    first = 0
    for change, count in zip(CHANGES, counts):
        if count:
            part = slice(first, first + count)
            change(images[part], strength, amounts[part].view(-1, 1, 1, 1).to(images.device))
        first += count
    if first < len(images):
        images[first:] = _move(images[first:], choices[first:] - len(CHANGES), amounts[first:])
    return images.clamp_(0, 255).index_select(0, order.argsort().to(images.device))


def _identity(images: Tensor, strength: float, amount: Tensor) -> None:
    pass


def _blend(images: Tensor, other: Tensor, amount: Tensor) -> None:
    """Towards `other`, or away from it, by up to 90 %."""
    factor = 1 + 0.9 * amount
    images.mul_(factor).add_(other * (1 - factor))


def _grey(images: Tensor) -> Tensor:
    """[B, C, ...] to [B, 1, ...]."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _brightness(images: Tensor, strength: float, amount: Tensor) -> None:
    images.mul_(1 + 0.9 * amount)


def _contrast(images: Tensor, strength: float, amount: Tensor) -> None:
    _blend(images, _grey(images.mean(dim=(-2, -1), keepdim=True)), amount)


def _colour(images: Tensor, strength: float, amount: Tensor) -> None:
    _blend(images, _grey(images), amount)


def _sharpness(images: Tensor, strength: float, amount: Tensor) -> None:
    # The sum of 3 x 3 pixels by rows, then by columns: faster on the CPU than avg_pool2d.
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    blurred = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(images, alpha=4).div_(13)
    _blend(images, blurred, amount)


def _autocontrast(images: Tensor, strength: float, amount: Tensor) -> None:
    low, high = images.amin(dim=(-2, -1), keepdim=True), images.amax(dim=(-2, -1), keepdim=True)
    several = high > low
    images.sub_(low * several).mul_(torch.where(several, 255 / (high - low).clamp(min=1), 1.0))


def _posterize(images: Tensor, strength: float, amount: Tensor) -> None:
    step = 2 ** round(4 * strength)
    images.div_(step).floor_().mul_(step)


def _solarize(images: Tensor, strength: float, amount: Tensor) -> None:
    images.copy_(torch.where(images >= 256 * (1 - strength), 255 - images, images))


CHANGES = (_identity, _brightness, _contrast, _colour, _sharpness, _autocontrast, _posterize, _solarize)
"""In place: images, strength, and strength times sign [B, 1, 1, 1]."""

MOVES = {"rotate": math.radians(30), "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.9, "translate_y": 0.9}
"""At full strength: radians, or shares of half the image's side."""

OPERATIONS = (*(change.__name__.strip("_") for change in CHANGES), *MOVES)


def _move(images: Tensor, choices: Tensor, amounts: Tensor) -> Tensor:
    """Each image moved by its amount in the way of this number in MOVES; bilinear, zeros outside."""
    height, width = images.shape[-2:]
    limits = torch.tensor([*MOVES.values()]).diag()[choices]
    angle, shear_x, shear_y, move_x, move_y = (limits * amounts.view(-1, 1)).t()
    # The source of the pixel at (x, y), both in -1..1, is matrix @ (x, y, 1).
    rows = [angle.cos(), shear_x - angle.sin(), move_x, angle.sin() + shear_y, angle.cos(), move_y]
    matrix = torch.stack(rows, dim=1).view(-1, 1, 1, 2, 3).to(images.device)
    x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=images.device) * 2 + 1) / height - 1
    # As F.affine_grid, whose batched product of small matrices takes longer on the CPU than the sampling.
    grid = matrix[..., 0] * x.view(-1, 1) + (matrix[..., 1] * y.view(-1, 1, 1) + matrix[..., 2])
    return F.grid_sample(images, grid, align_corners=False)


def erase(images: Tensor, probability: float, generator: Generator) -> None:
    """In place: a rectangle of 2 % to a third of the image becomes noise (Zhong et al., 2020)."""
    channels, height, width = images.shape[1:]
    chosen = (torch.rand(len(images), generator=generator) < probability).nonzero().squeeze(1)
    area, ratio, y, x = torch.rand(4, len(chosen), generator=generator)
    area = 0.02 + (1 / 3 - 0.02) * area
    ratio = torch.exp((2 * ratio - 1) * math.log(3.3))
    top, bottom = _span(y, (area * ratio).sqrt(), height).unsqueeze(2)
    left, right = _span(x, (area / ratio).sqrt(), width).unsqueeze(2)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < bottom)).unsqueeze(2) & ((columns >= left) & (columns < right)).unsqueeze(1)
    noise = torch.randn(channels * int(inside.sum()), generator=generator).to(images)
    chosen, inside = chosen.to(images.device), inside.unsqueeze(1).to(images.device)
    images[chosen] = images.index_select(0, chosen).masked_scatter_(inside, noise)


def cutmix(images: Tensor, partner: Tensor, share: float, generator: Generator) -> float:
    """In place: one rectangle of about 1 - share of the area comes from the partner (Yun et al., 2019).

    Returns the exact share that is left of each image.
    """
    height, width = images.shape[-2:]
    side = torch.tensor(math.sqrt(1 - share))
    y, x = torch.rand(2, generator=generator)
    (top, bottom), (left, right) = _span(y, side, height).tolist(), _span(x, side, width).tolist()
    inside = images[:, :, top:bottom, left:right]
    inside.copy_(inside.index_select(0, partner))
    return 1 - (bottom - top) * (right - left) / (height * width)


def _span(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """[2, ...]: first pixel and one past the last of a span of this relative centre and side, cut at the border."""
    ends = torch.stack([centre - side / 2, centre + side / 2])
    return (ends * length).round().clamp(0, length).long()


def _beta(parameter: float, generator: Generator) -> float:
    """A draw from Beta(parameter, parameter) that depends on the generator alone."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return float(np.random.default_rng(seed).beta(parameter, parameter))
