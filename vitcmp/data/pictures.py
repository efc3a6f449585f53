"""A user's own pictures, in the form that a model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitcmp.configs import UserError


def prepare_image(path: Path, channels: int, image_hw: tuple[int, int]) -> Tensor:
    """A picture as uint8 [channels, height, width]: its centre, cut to the model's shape and resized.

    A camera's orientation mark is respected, grey becomes colour and the reverse, transparency shows white.

    Raises: UserError where the file is missing or no picture, or for channels other than 1 (grey) and 3 (colour).
    """
    if channels not in (1, 3):
        raise UserError(f"{path}: a picture file cannot fill {channels} channels; use a model of 1 or 3")
    if not path.exists():
        raise UserError(f"no image '{path}'; check the path")
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; give image files, such as {path / '*.png'}")
    try:
        with Image.open(path) as file:
            image = _on_white(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"cannot read '{path}' as an image ({reason}); give a PNG or JPEG file") from None
    height, width = image_hw
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1).contiguous()


def _on_white(image: Image.Image) -> Image.Image:
    """The picture in 8 bits a channel, without transparency."""
    if image.mode.startswith("I;16"):
        # PIL's own conversion cuts everything above 255 off.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
