"""Logits of a model over many images."""

from __future__ import annotations

import math

import numpy as np
import torch

from vitcmp.data.augment import Normalise
from vitcmp.data.datasets import Split
from vitcmp.models.fast import fast
from vitcmp.models.vit import ViT


def micro_batch(model: ViT, device: torch.device, batch_size: int) -> int:
    """Images a pass so that one activation of the MLP takes about 16 MiB on a CPU; elsewhere the whole batch.

    Larger tensors are returned to the system and page-fault at every step. A fixed rule, so that a run is repeatable.
    """
    if device.type != "cpu":
        return batch_size
    bytes_an_image = 4 * model.grid.num_tokens * model.config.mlp_dim
    return min(batch_size, 1 << max(0, round(math.log2(2**24 / bytes_an_image))))


def logits_of(model: ViT, split: Split, normalise: Normalise, device: torch.device) -> np.ndarray:
    """Logits in fp32, [N, classes], in the order of `split`; the model is left in evaluation mode."""
    model = fast(model.eval())
    size = micro_batch(model, device, 512)
    with torch.inference_mode():
        parts = [model(normalise(images.to(device))).float().cpu() for images in split.images.split(size)]
    return torch.cat(parts).numpy()
