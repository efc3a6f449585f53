"""What a model looks at: rollout, Grad-CAM, and profiles of its attention maps.

Maps are lists of [B, H, N, N], a layer each, as `model(images, return_maps=True)` gives them. Their entries may be
negative and their rows need not sum to 1 (`extremes` tells); where a number needs weights, it takes absolute values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitcmp.attention import TokenGrid
from vitcmp.configs import UserError
from vitcmp.models.vit import ViT

Maps = list[Tensor]


def rollout(maps: Maps) -> Tensor:
    """Attention through all layers, [B, N, N] (Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928).

    Each layer is the mean over its heads plus the identity (the residual connection), its rows divided by the sum of
    their absolute values, which is their sum unless entries are negative.
    """
    result = None
    for layer in maps:
        mixed = layer.mean(dim=1)
        mixed = mixed + torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
        mixed = _weights(mixed)
        result = mixed if result is None else mixed @ result
    if result is None:
        raise ValueError("rollout needs at least one map")
    return result


def relevance(matrix: Tensor, grid: TokenGrid, pool: Literal["cls", "mean"]) -> Tensor:
    """How much the head's input takes from each patch, [B, height, width], out of [B, N, N].

    With a class token that is its row; with mean pooling, the mean over the patches' rows.
    """
    prefix = grid.num_prefix_tokens
    row = matrix[:, 0] if pool == "cls" else matrix[:, prefix:].mean(dim=1)
    return row[:, prefix:].unflatten(1, (grid.height, grid.width))


def require_grad_cam() -> None:
    """Raise UserError where the grad-cam package cannot be imported."""
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError:
        raise UserError("Grad-CAM needs the grad-cam package: pip install 'vitcmp[viz]'") from None


def grad_cam(model: ViT, image: Tensor, target: int) -> Tensor:
    """Grad-CAM of one normalised image [C, height, width] for class `target`, at the image's size, in 0..1, on the CPU.

    It is taken at the last block's first norm: with a class token, gradients of the patches vanish after it.

    Raises: UserError where the grad-cam package is not installed.
    """
    require_grad_cam()
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    grid = model.grid

    def patches(tokens: Tensor) -> Tensor:
        """[B, N, D] to [B, D, height, width], without the prefix tokens."""
        return tokens[:, grid.num_prefix_tokens :].transpose(1, 2).unflatten(2, (grid.height, grid.width))

    layer = model.blocks[-1].norm1
    with torch.enable_grad(), GradCAM(model, [layer], reshape_transform=patches) as cam:
        result = cam(image.unsqueeze(0), targets=[ClassifierOutputTarget(target)])
    model.zero_grad(set_to_none=True)
    return torch.from_numpy(result[0])


def entropy(maps: Maps) -> Tensor:
    """Entropy of the rows in nats, [layers, H]: 0 where each token attends to one, ln N where to all alike."""
    return torch.stack([torch.special.entr(_weights(layer).abs()).sum(dim=-1).mean(dim=(0, 2)) for layer in maps])


def zero_share(maps: Maps) -> Tensor:
    """Share of the entries that are exactly zero, [layers, H]."""
    return torch.stack([(layer == 0).float().mean(dim=(0, 2, 3)) for layer in maps])


def attention_distance(maps: Maps, grid: TokenGrid) -> Tensor:
    """How far, in patches, a patch's attention reaches on average, [layers, H].

    Weights are those of the patches alone: prefix tokens have no place. Rows without any weight on a patch do not
    count; NaN for a head that has no other.
    """
    y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).to(maps[0])
    distances = (places.unsqueeze(0) - places.unsqueeze(1)).norm(dim=-1)  # [patches, patches]
    prefix = grid.num_prefix_tokens
    result = []
    for layer in maps:
        patches = layer[..., prefix:, prefix:]
        reach = (_weights(patches).abs() * distances).sum(dim=-1)  # [B, H, patches]
        reach = reach.where(patches.abs().sum(dim=-1) > 0, torch.nan)
        result.append(reach.nanmean(dim=(0, 2)))
    return torch.stack(result)


@dataclass(frozen=True)
class Extremes:
    """How far maps are from weights that are not negative and sum to 1."""

    lowest: float
    """The smallest entry."""
    row_sums: tuple[float, float]
    """The smallest and the largest sum of a row."""

    @property
    def are_weights(self) -> bool:
        """Whether every row is a distribution, to 1 %."""
        low, high = self.row_sums
        return self.lowest >= -1e-6 and low > 0.99 and high < 1.01


def extremes(maps: Maps) -> Extremes:
    """The smallest entry and the range of the row sums over all layers, heads and images."""
    sums = [layer.sum(dim=-1) for layer in maps]
    low, high = min(s.min().item() for s in sums), max(s.max().item() for s in sums)
    return Extremes(min(layer.min().item() for layer in maps), (low, high))


def _weights(matrix: Tensor) -> Tensor:
    """Rows divided by the sum of their absolute values; the entries keep their signs, rows of zeros stay."""
    total = matrix.abs().sum(dim=-1, keepdim=True)
    return matrix / total.clamp(min=torch.finfo(matrix.dtype).tiny)
