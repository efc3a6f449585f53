"""Draw every mechanism's attention map on one image and the same weights: those of a run trained with softmax.

    vitcmp train --attention softmax
    python benchmarks/all_maps.py RUN --out results/study/figures/mechanisms.png

The first layer, where all mechanisms see the same tokens, queries and keys. For each: the map of one patch, the mean
over the heads, on the grid of patches (blue: negative), and below it the whole matrix. A mechanism's own parameters,
which softmax does not train, keep their initial values.
"""

from __future__ import annotations

import argparse
import textwrap
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import attention_map
from vitcmp.data.augment import Normalise
from vitcmp.data.datasets import load_data
from vitcmp.models.checkpoint import load_run
from vitcmp.models.vit import ViT, build_model


def with_mechanism(model: ViT, spec: str) -> ViT:
    """The model with another mechanism and the same weights wherever both have them."""
    config = model.config
    names = ("image_size", "channels", "num_classes", "patch_size", "pool", "stem")
    other = build_model(config.preset, attention=spec, **{name: getattr(config, name) for name in names})
    state = dict(model.state_dict())
    for name, value in model.state_dict().items():
        before, merged, after = name.partition("qkv")
        state.update({before + part + after: rows for part, rows in zip("qkv", value.chunk(3))} if merged else {})
    known = other.state_dict()
    shared = {name: value for name, value in state.items() if name in known and value.shape == known[name].shape}
    other.load_state_dict(shared, strict=False)
    return other.eval()


@torch.no_grad()
def first_map(model: ViT, images: Tensor) -> Tensor:
    """[N, N]: the first layer's map of one image, the mean over the heads."""
    caught: list[tuple[Tensor, ...]] = []
    core: nn.Module = model.blocks[0].get_submodule("attention.core")
    hook = core.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    model(images)
    hook.remove()
    return attention_map(core, *caught[0][:2])[0].mean(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="id of a run trained with softmax")
    parser.add_argument("--results", default="results")
    parser.add_argument("--data-dir")
    parser.add_argument("--index", type=int, default=0, help="which test image")
    parser.add_argument("--patch", type=int, default=27, help="which patch looks, counted row by row")
    parser.add_argument("--out", type=Path, default=Path("mechanisms.png"))
    options = parser.parse_args()
    run = load_run(options.run, options.results)
    info, model, grid = run.info, run.model, run.model.grid
    data = load_data(info.run_config.data.dataset, data_dir=options.data_dir)
    pixels = data.test.images[options.index : options.index + 1]
    images = Normalise(info.mean, info.std, model.config.image_hw, torch.device("cpu"))(pixels)

    specs = attention.available(own=True)
    columns = 8
    rows = -(-(len(specs) + 1) // columns)
    figure, axes = plt.subplots(2 * rows, columns, figsize=(2.1 * columns, 4.6 * rows), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    row, column = divmod(options.patch, grid.width)
    axes[0, 0].imshow(pixels[0].permute(1, 2, 0).squeeze(-1), cmap="gray")
    side = pixels.shape[-1] / grid.width
    corner = (column * side - 0.5, row * side - 0.5)
    axes[0, 0].add_patch(plt.Rectangle(corner, side, side, fill=False, color="red", linewidth=2))
    axes[0, 0].set_title("image, and the patch that looks", fontsize=8)
    for place, spec in enumerate(specs, start=1):
        above, below = (axes[2 * (place // columns) + i, place % columns] for i in (0, 1))
        mechanism = attention.load(spec)
        above.set_title(spec, fontsize=11)
        if mechanism.no_map:
            above.text(0.5, 0.5, textwrap.fill(f"no map: {mechanism.no_map}", 24), ha="center", va="center", fontsize=8)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attention.DegenerateWarning)
            matrix = first_map(with_mechanism(model, spec), images)
        patches = matrix[grid.num_prefix_tokens + options.patch, grid.num_prefix_tokens :]
        for axis, picture in ((above, patches.view(grid.height, grid.width)), (below, matrix)):
            limit = float(picture.abs().max())
            axis.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
        zeros = float((matrix == 0).float().mean())
        notes = [f"{zeros:.0%} zeros"] if zeros > 0.005 else []
        notes += [mechanism.map_note.replace("map ", "")] if mechanism.map_note else []
        below.set_title(", ".join(notes), fontsize=7)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=70)
    print(options.out)


if __name__ == "__main__":
    main()
