"""Simple corruptions of test images, at five severities (in the spirit of Hendrycks and Dietterich, 2019)."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitcmp.configs import UserError, choose

NOISE_STD = (0.04, 0.06, 0.08, 0.09, 0.10)
BLUR_STD_PIXELS = (0.4, 0.6, 0.7, 0.8, 1.0)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
JPEG_QUALITY = (80, 65, 58, 50, 40)


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """uint8 images [N, C, height, width] with noise, blur, contrast or jpeg; the same seed gives the same noise.

    Blur is stated for 32 pixels, and grows with the side.

    Raises: UserError for an unknown kind, or a severity outside 1 to 5.
    """
    choose(kind, ("noise", "blur", "contrast", "jpeg"), "corruption")
    if not 1 <= severity <= 5:
        raise UserError(f"severity ({severity}) must be from 1 to 5")
    level = severity - 1
    if kind == "jpeg":
        return torch.stack([_jpeg(image, JPEG_QUALITY[level]) for image in images])
    return torch.cat([_chunk(part, kind, level, seed + i) for i, part in enumerate(images.split(1000))])


def _chunk(images: Tensor, kind: str, level: int, seed: int) -> Tensor:
    x = images.float()
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        x = x + 255 * NOISE_STD[level] * torch.randn(x.shape, generator=generator)
    elif kind == "contrast":
        mean = x.mean(dim=(-3, -2, -1), keepdim=True)
        x = mean + CONTRAST[level] * (x - mean)
    else:
        x = _blur(x, BLUR_STD_PIXELS[level] * x.shape[-1] / 32)
    return x.round().clamp(0, 255).to(torch.uint8)


def _blur(x: Tensor, std: float) -> Tensor:
    """A Gaussian of `std` pixels, with the border repeated."""
    radius = max(1, round(3 * std))
    kernel = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * std * std))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def _jpeg(image: Tensor, quality: int) -> Tensor:
    array = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(file, "JPEG", quality=quality)
    decoded = np.array(Image.open(file))
    return torch.from_numpy(decoded).reshape(array.shape).permute(2, 0, 1)
