"""Pictures of what models look at: numpy arrays in, a PNG out. Nothing is measured here.

Images are [height, width] or [height, width, 3] in 0..1. Every function writes `path` and returns the figure.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Colormap, ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from vitcmp.render.plots import style
from vitcmp.store import write_atomic

Array = np.ndarray

DPI = 150


def _see_through(name: str, opacity: Array) -> Colormap:
    """A colour map whose unimportant values let the image through."""
    colours = colormaps[name](np.linspace(0, 1, len(opacity)))
    colours[:, 3] = opacity
    return ListedColormap(colours, name)


HEAT = _see_through("inferno", np.linspace(0.15, 0.95, 256))
DIVERGING = _see_through("RdBu_r", 0.15 + 0.8 * np.abs(np.linspace(-1, 1, 256)))


def maps_by_layer_and_head(image: Array, maps: Array, path: Path, title: str, note: str = "") -> Figure:
    """What is attended to over the image, a row a layer and a column a head; all share one colour scale.

    `maps` is [layers, heads, height, width], in patches. The scale runs to the largest entry, by square roots, so that
    one large entry does not hide the others; where some are negative it is linear and diverges around zero.
    """
    layers, heads = maps.shape[:2]
    figure = _figure(1.15 * heads + 3.4, max(1.15 * layers + 1.1, 2.9), title, note)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.9, 1.15 * heads + 1.5))[0]
    shown = left.subplots()
    _image(shown, image, "image")
    shown.set_anchor("N")
    panels = right.subplots(layers, heads, squeeze=False)
    norm, colours = _scale(maps)
    if colours is HEAT:
        norm = PowerNorm(0.5, 0, max(float(maps.max()), 1e-12))
    for (layer, head), axes in np.ndenumerate(panels):
        drawn = _overlay(axes, image, maps[layer, head], norm, colours)
        if layer == 0:
            axes.set_title(f"head {head}", fontsize=8)
        if head == 0:
            axes.set_ylabel(f"layer {layer}", fontsize=8)
    bar = right.colorbar(drawn, ax=panels, fraction=0.04, pad=0.02)
    # The colours lie over the image: here over its middle grey.
    bar.ax.set_facecolor("0.4")
    bar.set_label("attention paid to the patch", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _save(figure, path)


def side_by_side(
    image: Array,
    views: Mapping[str, Mapping[str, Array | str]],
    path: Path,
    title: str = "",
    captions: Mapping[str, str] | None = None,
    note: str = "",
) -> Figure:
    """Mechanisms as rows, views as columns, the image first.

    A view is a map [height, width], or the reason why there is none. Each map has a scale of its own, written under
    it: views differ in unit. `captions` are written under the image, a mechanism each.
    """
    columns = list(dict.fromkeys(name for row in views.values() for name in row))
    figure = _figure(1.9 * (len(columns) + 1) + 0.6, 2.05 * len(views) + 0.9, title, note)
    panels = figure.subplots(len(views), len(columns) + 1, squeeze=False)
    for axes, (mechanism, row) in zip(panels, views.items(), strict=True):
        _image(axes[0], image)
        axes[0].set_ylabel(_plain(textwrap.fill(mechanism, 24)), fontsize=9)
        axes[0].set_xlabel(_plain((captions or {}).get(mechanism, "")), fontsize=8)
        for cell, column in zip(axes[1:], columns, strict=True):
            view = row.get(column, "not drawn")
            if isinstance(view, str):
                _reason(cell, view, image.shape[1] / image.shape[0])
                continue
            norm, colours = _scale(view)
            _overlay(cell, image, view, norm, colours)
            cell.set_xlabel(f"{view.min():.2g} … {view.max():.2g}", fontsize=7)
    for axes, column in zip(panels[0], ["image", *columns], strict=True):
        axes.set_title(_plain(column), fontsize=9)
    return _save(figure, path)


def sample_sheet(images: Array, labels: Sequence[str], path: Path, title: str) -> Figure:
    """Images [N, height, width] or [N, height, width, 3] in rows of eight, a label under each."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = _figure(1.15 * columns + 0.2, 1.35 * rows + 0.5, title)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, image, label in zip(panels, images, labels, strict=False):
        _image(axes, image)
        axes.set_xlabel(_plain(label), fontsize=7)
    for axes in panels[len(images) :]:
        axes.remove()
    return _save(figure, path)


PROFILES = {
    "entropy": "entropy of a token's attention (nats)",
    "distance": "mean attention distance (patches)",
    "zeros": "attention that is exactly zero (%)",
}


def profiles(
    values: Mapping[str, Mapping[str, Array]], path: Path, title: str = "", note: str = "", uniform: float | None = None
) -> Figure:
    """Profiles over the layers, a panel for each of PROFILES: a line is the mean over heads, a dot a head.

    `values` holds an array [layers, heads] for each mechanism and profile; `uniform` is the entropy of attention that
    is the same everywhere, drawn as a reference.
    """
    figure = _figure(4.0 * len(PROFILES), 3.9, title, note)
    panels = figure.subplots(1, len(PROFILES))
    count = len(values)
    for axes, (name, label) in zip(panels, PROFILES.items(), strict=True):
        for place, (mechanism, profile) in enumerate(values.items()):
            array = profile[name]
            # Side by side, so that equal values of two mechanisms stay visible.
            layers = np.arange(len(array)) + (place - (count - 1) / 2) * 0.5 / max(count, 4)
            look = style(mechanism, tuple(values))
            axes.plot(layers, array.mean(axis=1), label=_plain(mechanism), **look._asdict())
            axes.plot(layers, array, linestyle="", marker=".", markersize=4, alpha=0.45, color=look.color)
        if name == "entropy" and uniform is not None:
            axes.axhline(uniform, color="grey", linestyle="--", linewidth=1)
            axes.annotate(
                "the same for all tokens", (1, uniform), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                textcoords="offset points", ha="right", fontsize=7, color="grey",
            )  # fmt: skip
        depth = max(len(profile[name]) for profile in values.values())
        axes.set_xticks(range(depth))
        axes.set_xlim(-0.4, depth - 0.6)
        axes.margins(y=0.1)
        if name == "zeros":
            axes.set_ylim(-3, 103)
        axes.set_xlabel("layer", fontsize=9)
        axes.set_title(label, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return _save(figure, path)


def _figure(width: float, height: float, title: str, note: str = "") -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    # Letters an inch at these font sizes.
    figure.suptitle(_plain(textwrap.fill(title, int(12 * width))), fontsize=10)
    if note:
        figure.supxlabel(_plain(textwrap.fill(note, int(15 * width))), fontsize=8)
    return figure


def _image(axes: Axes, image: Array, title: str = "") -> None:
    height, width = image.shape[:2]
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")
    axes.set_title(title, fontsize=8)
    _bare(axes)


def _overlay(axes: Axes, image: Array, values: Array, norm: Normalize, colours: Colormap) -> AxesImage:
    """The map over the image in pale grey: enough to see where it is, too little to change the colours' meaning."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    grey = image.mean(axis=-1) if image.ndim == 3 else image
    axes.imshow(0.1 + 0.6 * grey, cmap="gray", vmin=0, vmax=1, extent=extent)
    drawn = axes.imshow(values, norm=norm, cmap=colours, extent=extent, interpolation="nearest")
    _bare(axes)
    return drawn


def _scale(values: Array) -> tuple[Normalize, Colormap]:
    """From the lowest to the highest value, or, where some are negative, as far to both sides of zero."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return CenteredNorm(halfrange=max(-low, high)), DIVERGING
    return Normalize(low, high if high > low else low + 1), HEAT


def _reason(axes: Axes, text: str, aspect: float) -> None:
    """An empty cell of the shape of an image, with a text."""
    axes.set_xlim(0, aspect)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_facecolor("0.95")
    lines = _plain(textwrap.fill(text, 26))
    axes.text(aspect / 2, 0.5, lines, ha="center", va="center", fontsize=7, color="0.3")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _plain(text: str) -> str:
    """Text as it stands: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> Figure:
    with warnings.catch_warnings():
        # A class or a file may be named in a script that the font lacks; it shows boxes then.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))
    return figure
