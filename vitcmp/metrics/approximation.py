"""How far a mechanism is from what it approximates, in its output and in its map.

    error = |found - wanted| / |wanted|

in Frobenius norms over all images and heads of a layer; of several layers, the mean of their errors. Output and map are
the core's, in fp32: what a block adds after it (Nystromformer's convolution) is no part of the approximation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid
from vitcmp.attention.reformer import SELF
from vitcmp.configs import UserError
from vitcmp.data.augment import Normalise
from vitcmp.metrics.inference import micro_batch
from vitcmp.models.checkpoint import Run
from vitcmp.models.vit import ViT, initialise, resized

Core = Callable[[Tensor, Tensor, Tensor], Tensor]

LARGEST_MAP = 1024
"""Tokens up to which maps are compared: the time grows with their cube."""
BLOCK = 2**24
"""Entries of the target's weights that are held at once: 64 MiB."""


@dataclass(frozen=True)
class Inputs:
    """What cores are compared on."""

    layers: list[tuple[Tensor, Tensor, Tensor]]
    """q, k and v of each layer, [B, H, N, K]."""
    source: str
    """Where they come from, in words."""
    model: ViT | None = None
    """The model that they were read from, made for as many tokens."""


@dataclass(frozen=True)
class Errors:
    """Relative errors: 0 is exact, 1 as far off as zeros."""

    output: float
    map: float | None
    """None where it was not asked for."""
    uniform: float
    """Of the plain mean of the values, the output of no attention at all: what an approximation has to beat."""


def random_inputs(batch: int, num_heads: int, tokens: int, head_dim: int, std: float = 1.0, seed: int = 0) -> Inputs:
    """Gaussian q, k and v of one layer: the entries of q and k of standard deviation `std`, those of v of 1.

    Scores q.k / sqrt(K) then have the standard deviation std^2 for any K, as q.k sums K products of variance std^4.
    Those of shared-QK attention, q.k / (|k| sqrt(K)), have only std / sqrt(K): its map is nearly uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, num_heads, tokens, head_dim, generator=generator) for _ in range(3))
    return Inputs([(std * q, std * k, v)], f"random q, k of standard deviation {std:g}")


def run_inputs(run: Run, images: Tensor, grid: TokenGrid | None = None) -> Inputs:
    """What each core of a trained model reads for images, uint8 or 0..255, [B, C, any, any].

    For a `grid` of other patches than the model's, images are resized and positions interpolated, as for an evaluation
    at that size; the class token is the model's own affair.

    Raises: UserError or AttentionError where a mechanism cannot follow the grid, or its core has no q and k to read.
    """
    model, patch = run.model.eval(), run.model.config.patch
    if grid is not None and (grid.height, grid.width) != (model.grid.height, model.grid.width):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateWarning)
            # Any height and width will do; its signature names squares alone.
            model = resized(model, (grid.height * patch, grid.width * patch))  # type: ignore[arg-type]
    normalise = Normalise(run.info.mean, run.info.std, model.config.image_hw, model.pos_embed.device)
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in model.blocks]
    cores = [_core(block.attention, run.info.label) for block in model.blocks]
    hooks = [core.register_forward_pre_hook(lambda _, x, i=i: seen[i].append(x)) for i, core in enumerate(cores)]
    try:
        with torch.no_grad():
            for part in images.split(micro_batch(model, model.pos_embed.device, 512)):
                model(normalise(part.to(model.pos_embed.device)))
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for parts in seen:
        q, k, v = map(torch.cat, zip(*parts, strict=True))
        if not q.shape == k.shape == v.shape or torch.equal(q, v):
            raise UserError(f"the cores of {run.info.label} do not read a query, a key and a value of each token; "
                            "choose a run of another mechanism")  # fmt: skip
        layers.append((q, k, v))
    source = f"run {run.info.id}, {len(images)} images, {model.grid.num_tokens} tokens, layers' mean"
    return Inputs(layers, source, model)


def target(name: str) -> Core:
    """What `Mechanism.approximates` names: exact attention, a block of queries at a time.

    Raises: AttentionError for a name that is neither softmax nor shared-qk.
    """
    if name not in ("softmax", "shared-qk"):
        raise AttentionError(f"'{name}' is nothing to measure an error against; APPROXIMATES is softmax or shared-qk")
    return partial(_exact, shared_qk=name == "shared-qk")


def _exact(q: Tensor, k: Tensor, v: Tensor, shared_qk: bool) -> Tensor:
    keys = F.normalize(q, dim=-1) if shared_qk else k
    size = max(1, BLOCK // q.shape[:-1].numel())
    mixed = []
    for start in range(0, q.shape[-2], size):
        scores = q[..., start : start + size, :] * q.shape[-1] ** -0.5 @ keys.transpose(-2, -1)
        if shared_qk:
            scores.diagonal(start, -2, -1).fill_(SELF)
        mixed.append(scores.softmax(dim=-1) @ v)
    return torch.cat(mixed, dim=-2)


def cores_for(spec: str, inputs: Inputs, layer: LayerConfig | None = None) -> list[nn.Module]:
    """The mechanism's core for each layer of the inputs, in evaluation mode, on their device.

    A layer of the inputs' model that is of this very mechanism gives its trained core. Others are as a new model has
    them: built for the model's layers, or, where there is no model, for `layer` (default: the squarest grid).

    Raises: AttentionError where the mechanism does not fit a layer, or has no core.
    """
    mechanism, q = attention.load(spec), inputs.layers[0][0]
    if inputs.model is None:
        heads, tokens, width = q.shape[1:]
        layers = [layer or LayerConfig(heads * width, heads, TokenGrid.squarest(tokens))]
    else:
        layers = inputs.model.layer_configs()
    cores = []
    for config, own in zip(layers, _specs(inputs), strict=True):
        if inputs.model is not None and own == mechanism.spec:
            block = inputs.model.get_submodule(f"blocks.{config.index}.attention")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DegenerateWarning)
                block = mechanism.build(config)
            initialise(block, "auto", seed=config.index)
        cores.append(_core(block, mechanism.spec).eval().to(q.device))
    return cores


def _specs(inputs: Inputs) -> list[str]:
    """The mechanism that each layer's inputs were read from; empty text for random ones."""
    specs = inputs.model.config.attention_specs if inputs.model is not None else []
    return list(map(attention.canonical, specs)) or [""] * len(inputs.layers)


def _core(block: Any, name: str) -> nn.Module:
    core = getattr(block, "core", None)
    if not isinstance(core, nn.Module):
        raise AttentionError(f"{name} has no core (q, k, v) -> out, so it has no such error, nor q and k to measure on")
    return core


@torch.no_grad()
def errors(cores: Sequence[Core], inputs: Inputs, wanted: Core, with_map: bool = False) -> Errors:
    """The errors of a core a layer against `wanted`, means over the layers.

    Images go one by one and maps a few columns at a time, so that no [B, H, N, N] is held here.
    """
    output, of_map, uniform = torch.stack(
        [_layer_errors(core, *qkv, wanted, with_map) for core, qkv in zip(cores, inputs.layers, strict=True)]
    ).mean(dim=0).tolist()  # fmt: skip
    return Errors(output, of_map if with_map else None, uniform)


def _layer_errors(core: Core, q: Tensor, k: Tensor, v: Tensor, wanted: Core, with_map: bool) -> Tensor:
    """Of output, map and mean, [3] in fp64."""
    tokens, width = q.shape[-2:]
    sums = torch.zeros(3, 2, dtype=torch.float64)  # squares of the differences and of what is wanted
    for image in zip(q.split(1), k.split(1), v.split(1), strict=True):
        exact = wanted(*image)
        sums[0] += _squares(core(*image), exact)
        sums[2] += _squares(image[2].mean(dim=-2, keepdim=True), exact)
        for start in range(0, tokens if with_map else 0, width):
            # Columns of the identity as values give columns of the map, as in `attention_map`.
            identity = q.new_zeros(tokens, width)
            identity[start : start + width].fill_diagonal_(1)
            columns = (*image[:2], identity.expand(image[2].shape))
            sums[1] += _squares(core(*columns), wanted(*columns))
    return (sums[:, 0] / sums[:, 1]).sqrt()


def _squares(found: Tensor, wanted: Tensor) -> Tensor:
    return torch.stack([(found - wanted).square().sum(), wanted.square().sum()]).cpu().double()


def metrics(
    spec: str, inputs: Inputs, layer: LayerConfig | None = None, largest_map: int = LARGEST_MAP
) -> dict[str, Any]:
    """What a record says of a mechanism's error; empty where it approximates nothing.

    Where the target is shared-QK attention, the queries are also the keys. `map_error` is None where there is no map,
    or one of more than `largest_map` tokens.

    Raises: AttentionError as `cores_for` and `target` do.
    """
    mechanism = attention.load(spec)
    if mechanism.approximates is None:
        return {}
    if mechanism.approximates == "shared-qk":
        inputs = replace(inputs, layers=[(q, q, v) for q, _, v in inputs.layers])
    cores = cores_for(spec, inputs, layer)
    with_map = mechanism.has_map and inputs.layers[0][0].shape[-2] <= largest_map
    found = errors(cores, inputs, target(mechanism.approximates), with_map)
    state = ""
    if any(list(core.parameters()) for core in cores):
        trained = _specs(inputs).count(mechanism.spec)
        state = f", parameters trained in {trained} of {len(cores)} layers" if trained else ", parameters untrained"
    return {
        "output_error": found.output, "map_error": found.map, "uniform_error": found.uniform,
        "error_target": mechanism.approximates, "error_on": inputs.source + state,
    }  # fmt: skip
