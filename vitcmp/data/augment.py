"""From uint8 tensors to training batches, on the device and a batch at a time.

Every random choice comes from a generator on the CPU, so that the same seed gives the same images on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
        x = images.float() if images.dtype == torch.uint8 else images
        if x.shape[-2:] != self.image_hw:
            x = F.interpolate(x, self.image_hw, mode="bilinear", antialias=True, align_corners=False)
        return torch.addcmul(-self.shift, x, self.scale)


class TrainPipeline:
    """Random crops and flips by one gather, then the stronger changes, then normalisation.

    `padded` stays on the device: the whole training set with a border of zeros, uint8, [N, C, pixels].
    """

    def __init__(self, split: Split, config: AugmentConfig, normalise: Normalise, device: torch.device) -> None:
        assert isinstance(config.crop_padding, int)
        assert isinstance(config.flip, bool)
        self.config, self.normalise, self.device = config, normalise, device
        self.padding = config.crop_padding
        self.height, self.width = split.images.shape[-2:]
        border = (self.padding,) * 4
        self.padded = F.pad(split.images, border).flatten(2).to(device)
        self.labels = split.labels.to(device)

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
            images = images.lerp(images[partner], 1 - share)
        return Batch(images, labels, labels[partner], torch.full((size,), share, device=self.device))

    def _crop_and_flip(self, index: Tensor, generator: Generator) -> Tensor:
        """uint8 [B, C, height, width]: one gather does both."""
        size, h, w, padded_w = len(index), self.height, self.width, self.width + 2 * self.padding
        if not self.padding and not self.config.flip:
            return self.padded[index.to(self.device)].unflatten(2, (h, w))
        top, left = torch.randint(0, 2 * self.padding + 1, (2, size, 1), generator=generator)
        rows = top + torch.arange(h)  # [B, height]
        columns = torch.arange(w).expand(size, w)
        if self.config.flip:
            flipped = torch.rand(size, 1, generator=generator) < 0.5
            columns = torch.where(flipped, w - 1 - columns, columns)
        pixels = rows.unsqueeze(2) * padded_w + (left + columns).unsqueeze(1)  # [B, height, width]
        pixels = pixels.view(size, 1, h * w).expand(-1, self.padded.shape[1], -1).to(self.device)
        return self.padded[index.to(self.device)].gather(2, pixels).unflatten(2, (h, w))


def random_operation(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """One operation of RandAugment's list for each image (Cubuk et al., 2020); float images in 0..255, [B, C, h, w].

    Each image draws its operation; those that drew the same one are changed together. Signs are random. Equalize is
    left out: it has no batched form.
    """
    choices = torch.randint(0, len(OPERATIONS), (len(images),), generator=generator)
    signs = torch.randint(0, 2, (len(images),), generator=generator) * 2 - 1
    result = images.clone()
    for number, operation in enumerate(OPERATIONS):
        chosen = (choices == number).nonzero().squeeze(1)
        if len(chosen):
            sign = signs[chosen].float().to(images.device).view(-1, 1, 1, 1)
            chosen = chosen.to(images.device)
            result[chosen] = operation(images[chosen], strength, sign).clamp(0, 255)
    return result


def _blend(images: Tensor, other: Tensor, strength: float, sign: Tensor) -> Tensor:
    """Towards `other`, or away from it, by up to 90 %."""
    return other + (images - other) * (1 + 0.9 * strength * sign)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _brightness(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), strength, sign)


def _contrast(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(-2, -1), keepdim=True), strength, sign)


def _colour(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _blend(images, _grey(images), strength, sign)


def _sharpness(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    blurred = (F.avg_pool2d(padded, 3, stride=1) * 9 + images * 4) / 13
    return _blend(images, blurred, strength, sign)


def _autocontrast(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    low, high = images.amin(dim=(-2, -1), keepdim=True), images.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (images - low) * 255 / (high - low).clamp(min=1), images)


def _posterize(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    step = 2 ** round(4 * strength)
    return images.div(step).floor() * step


def _solarize(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return torch.where(images >= 256 * (1 - strength), 255 - images, images)


def _identity(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return images


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample at matrix [B, 2, 3] (in coordinates -1..1), zeros outside."""
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _matrix(sign: Tensor, entries: Mapping[tuple[int, int], Tensor | float]) -> Tensor:
    matrix = torch.eye(2, 3, device=sign.device).repeat(len(sign), 1, 1)
    for (row, column), value in entries.items():
        matrix[:, row, column] = value
    return matrix


def _rotate(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    angle = math.radians(30) * strength * sign.view(-1)
    entries = {(0, 0): angle.cos(), (0, 1): -angle.sin(), (1, 0): angle.sin(), (1, 1): angle.cos()}
    return _affine(images, _matrix(sign, entries))


def _shear_x(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(sign, {(0, 1): 0.3 * strength * sign.view(-1)}))


def _shear_y(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(sign, {(1, 0): 0.3 * strength * sign.view(-1)}))


def _translate_x(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(sign, {(0, 2): 0.9 * strength * sign.view(-1)}))


def _translate_y(images: Tensor, strength: float, sign: Tensor) -> Tensor:
    return _affine(images, _matrix(sign, {(1, 2): 0.9 * strength * sign.view(-1)}))


OPERATIONS = (
    _identity, _brightness, _contrast, _colour, _sharpness, _autocontrast, _posterize, _solarize,
    _rotate, _shear_x, _shear_y, _translate_x, _translate_y,
)  # fmt: skip


def erase(images: Tensor, probability: float, generator: Generator) -> None:
    """In place: a rectangle of 2 % to a third of the image becomes noise (Zhong et al., 2020)."""
    size, _, height, width = images.shape
    area = 0.02 + (1 / 3 - 0.02) * torch.rand(size, generator=generator)
    ratio = torch.exp((2 * torch.rand(size, generator=generator) - 1) * math.log(3.3))
    inside = _rectangles((area * ratio).sqrt(), (area / ratio).sqrt(), height, width, generator)
    inside &= (torch.rand(size, generator=generator) < probability).view(-1, 1, 1)
    mask = inside.unsqueeze(1).expand(images.shape).to(images.device)
    noise = torch.randn(images.shape, generator=generator)
    images[mask] = noise.to(images)[mask]


def cutmix(images: Tensor, partner: Tensor, share: float, generator: Generator) -> float:
    """In place: one rectangle of about 1 - share of the area comes from the partner (Yun et al., 2019).

    Returns the exact share that is left of each image.
    """
    side = torch.tensor([math.sqrt(1 - share)])
    inside = _rectangles(side, side, images.shape[-2], images.shape[-1], generator).to(images.device)
    images.copy_(torch.where(inside, images[partner], images))
    return 1 - inside.float().mean().item()


def _rectangles(heights: Tensor, widths: Tensor, height: int, width: int, generator: Generator) -> Tensor:
    """Masks [B, height, width] of rectangles with these relative sides around random centres, cut at the border."""
    y, x = torch.rand(2, len(heights), 1, generator=generator)
    y_in = (torch.arange(height) + 0.5 - y * height).abs() < heights.view(-1, 1) * height / 2
    x_in = (torch.arange(width) + 0.5 - x * width).abs() < widths.view(-1, 1) * width / 2
    return y_in.unsqueeze(2) & x_in.unsqueeze(1)


def _beta(parameter: float, generator: Generator) -> float:
    """A draw from Beta(parameter, parameter) that depends on the generator alone."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return float(np.random.default_rng(seed).beta(parameter, parameter))
