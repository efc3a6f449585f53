"""Draw what trained models look at, how they learned, what they confuse, and what they were shown.

Runs of one data set and image size share a comparison; those of others get pictures of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitcmp import attention, machine, store
from vitcmp.configs import RuntimeConfig, UserError, choose
from vitcmp.data.augment import Normalise, TrainPipeline
from vitcmp.data.datasets import Data, load_data
from vitcmp.data.pictures import prepare_image
from vitcmp.metrics import accuracy, interpret
from vitcmp.models.checkpoint import Run, load_run
from vitcmp.models.vit import ViT
from vitcmp.render import figures, plots

WHAT = ("maps", "rollout", "gradcam", "profiles", "samples", "curves", "confusion")
LAST = "mean attention, last layer"


@dataclass(frozen=True)
class Pictures:
    """What was drawn, and what was not."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    """Why something that belongs to `all` is missing."""


@dataclass(frozen=True)
class _Subject:
    """One run to draw."""

    run: Run
    stem: str
    """What its files' names begin with."""
    label: str
    normalise: Normalise

    @property
    def model(self) -> ViT:
        """The run's model."""
        return self.run.model

    def to_input(self, pixels: Tensor) -> Tensor:
        """uint8 images of any size as the model takes them, on its device."""
        return self.normalise(pixels.to(self.normalise.scale.device))

    def to_images(self, normalised: Tensor) -> np.ndarray:
        """The inverse, as figures take it: [B, height, width] or [B, height, width, 3] in 0..1, clipped."""
        pixels = (normalised + self.normalise.shift) / self.normalise.scale / 255
        images = pixels.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return images[..., 0] if images.shape[-1] == 1 else images

    @property
    def kind(self) -> tuple[str, bool, tuple[int, int]]:
        """Runs of a kind can look at the same images."""
        data = self.run.info.run_config.data
        return data.dataset, data.invert, self.model.config.image_hw


@dataclass(frozen=True)
class _Picture:
    """One image to look at: uint8 pixels [C, height, width] of any size."""

    pixels: Tensor
    title: str
    suffix: str
    """Ends the names of its files."""


def run(
    runs: Sequence[str],
    results: str = RuntimeConfig.results,
    data_dir: str | None = None,
    device: torch.device | str = RuntimeConfig.device,
    out: Path | None = None,
    images: Sequence[Path] = (),
    index: int = 0,
    what: Sequence[str] = ("all",),
) -> Pictures:
    """Draw runs (ids, folders or checkpoint files) on image files, or on the `index`-th test image of their data set.

    `what` names views of WHAT, or `all`, which leaves out with a note what cannot be drawn. The pictures go to `out`,
    by default the folder `figures` of the results.

    Raises: UserError for an unknown run or view, an unreadable image, an index out of range, a view that was asked for
    by name and cannot be drawn, or where nothing could be drawn at all.
    """
    wanted = {choose(view, (*WHAT, "all"), "view") for view in what}
    if not runs:
        raise UserError("no run given; `vitcmp runs` lists them")
    if "gradcam" in wanted:
        interpret.require_grad_cam()
    device = machine.pick_device(device) if isinstance(device, str) else device
    subjects = _subjects(runs, results, device)
    groups: dict[object, list[_Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.kind, []).append(subject)
    artist = _Artist(_writable(out or Path(results) / "figures"), data_dir, wanted)
    for group in groups.values():
        artist.draw(group, images, index, name=_name(group, len(groups)))
    if not artist.paths:
        raise UserError("; ".join(artist.notes) or "nothing to draw")
    return Pictures(tuple(dict.fromkeys(artist.paths)), tuple(dict.fromkeys(artist.notes)))


def _subjects(runs: Sequence[str], results: str, device: torch.device) -> list[_Subject]:
    """The runs, each once, with stems and labels that tell them apart."""
    loaded: dict[str, Run] = {}
    for name in runs:
        run = load_run(name, results)
        file = Path(name).stem if name.endswith(".safetensors") else "model"
        stem = run.info.id if file == "model" else f"{run.info.id}-{file}"
        if stem in loaded and loaded[stem].folder.resolve() != run.folder.resolve():
            raise UserError(f"two runs are called '{stem}'; draw them one at a time, each into its own --out")
        loaded[stem] = run
    labels = [run.info.label for run in loaded.values()]
    subjects = []
    for stem, run in loaded.items():
        model, info = run.model.to(device), run.info
        normalise = Normalise(info.mean, info.std, model.config.image_hw, device)
        label = info.label if labels.count(info.label) == 1 else stem
        subjects.append(_Subject(run, stem, label, normalise))
    return subjects


def _name(group: list[_Subject], groups: int) -> str:
    """What the names of a group's own files begin with."""
    if len(group) == 1:
        return f"{group[0].stem}-"
    dataset, invert, (height, width) = group[0].kind
    return f"{dataset}{'-inverted' * invert}-{height}x{width}-" if groups > 1 else ""


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{folder}' ({error.strerror}); choose another --out") from None
    return folder


class _Artist:
    """Draws, and remembers what was drawn and what was not."""

    def __init__(self, out: Path, data_dir: str | None, what: set[str]) -> None:
        self.out, self.data_dir, self.what = out, data_dir, what
        self.paths: list[Path] = []
        self.notes: list[str] = []

    def draw(self, group: list[_Subject], images: Sequence[Path], index: int, name: str) -> None:
        """All the wanted views of runs of one kind."""
        if self._wants("maps", "rollout", "gradcam", "profiles"):
            pictures = self._pictures(group[0], images, index)
            for picture in pictures:
                self._look(group, picture, name)
            self._attempt("profiles", self._profiles, group, pictures if images else None, name)
        # Runs that were shown the same get one sheet.
        shown = {(s.run.info.run_config.data, s.run.info.run_config.augment): s for s in reversed(group)}
        for subject in reversed(shown.values()):
            self._attempt("samples", self._samples, subject)
        self._attempt("curves", self._curves, group, name)
        for subject in group:
            self._attempt("confusion", self._confusion, subject)

    def _wants(self, *views: str) -> bool:
        return "all" in self.what or not self.what.isdisjoint(views)

    def _attempt(self, view: str, draw: Callable[..., None], *args: Any) -> None:
        """Draw a view, if wanted; asked for by name it must work, with `all` it may leave a note instead."""
        if not self._wants(view):
            return
        try:
            draw(*args)
        except UserError as error:
            if view in self.what:
                raise
            self.notes.append(f"no {view}: {error}")

    def _path(self, name: str) -> Path:
        self.paths.append(self.out / f"{name}.png")
        return self.paths[-1]

    def _data(self, subject: _Subject) -> Data:
        return load_data(subject.run.info.run_config.data, self.data_dir)

    def _pictures(self, subject: _Subject, images: Sequence[Path], index: int) -> list[_Picture]:
        """The image files, or else the test image."""
        config, data = subject.model.config, subject.run.info.run_config.data
        if not images:
            test = self._data(subject).test
            if not 0 <= index < len(test):
                raise UserError(f"index ({index}) must be from 0 to {len(test) - 1}, as {data.dataset} has {len(test)} "
                                "test images")  # fmt: skip
            label = subject.run.info.class_names[int(test.labels[index])]
            title = f"{data.dataset}, test image {index}: {label}"
            return [_Picture(test.images[index], title, f"-{index}" if index else "")]
        assert config.channels is not None
        pictures: list[_Picture] = []
        for path in images:
            pixels = prepare_image(path, config.channels, config.image_hw)
            again = sum(path.stem == other.stem for other in images[: len(pictures)])
            suffix = f"-{path.stem}-{again + 1}" if again else f"-{path.stem}"
            pictures.append(_Picture(255 - pixels if data.invert else pixels, path.name, suffix))
        return pictures

    def _look(self, group: list[_Subject], picture: _Picture, name: str) -> None:
        """The maps of each run, and their views side by side."""
        pixels = picture.pixels.unsqueeze(0)
        image = group[0].to_images(group[0].to_input(pixels))[0]
        views: dict[str, dict[str, np.ndarray | str]] = {}
        captions, caveats = {}, []
        for subject in group:
            x = subject.to_input(pixels)
            with torch.no_grad():
                logits = subject.model(x).cpu().numpy()
            if broken := accuracy.broken_text(logits):
                self.notes.append(f"nothing of {subject.stem}: {broken}")
                captions[subject.label] = "says nothing"
                views[subject.label] = {LAST: broken}
                continue
            said = int(accuracy.predicted(logits)[0])
            share = 100 * accuracy.probabilities(logits)[0, said]
            captions[subject.label] = f"says {subject.run.info.class_names[said]} ({share:.0f} %)"
            views[subject.label], caveat = self._views(subject, x, image, picture)
            caveats += [f"{subject.label}: {caveat}"] if caveat else []
            if self._wants("gradcam"):
                try:
                    views[subject.label]["Grad-CAM"] = interpret.grad_cam(subject.model, x[0], said).numpy()
                except UserError as error:
                    views[subject.label]["Grad-CAM"] = str(error)
                    self.notes.append(f"no gradcam: {error}")
        if self._wants("rollout", "gradcam"):
            note = "Each map has its own scale, written under it."
            note += " Grad-CAM is for the class that the model says." if self._wants("gradcam") else ""
            path = self._path(name + ("comparison" if len(group) > 1 else "views") + picture.suffix)
            figures.side_by_side(image, views, path, picture.title, captions, " ".join([note, *caveats]))

    def _views(
        self, subject: _Subject, x: Tensor, image: np.ndarray, picture: _Picture
    ) -> tuple[dict[str, np.ndarray | str], str]:
        """One run's views that come from its maps, and what their reader must know; draws the maps too."""
        model, grid, pool = subject.model, subject.model.grid, subject.model.config.pool
        try:
            maps = maps_of(model, x)
        except UserError as error:
            self.notes.append(f"no maps: {error}")
            rest = {"rollout": "no rollout without attention maps"} if self._wants("rollout") else {}
            return {LAST: str(error), **rest}, ""
        patches = [interpret.relevance(layer[0], grid, pool).cpu().numpy() for layer in maps]
        views: dict[str, np.ndarray | str] = {LAST: patches[-1].mean(axis=0)}
        if self._wants("rollout"):
            views["rollout"] = interpret.relevance(interpret.rollout(maps), grid, pool)[0].cpu().numpy()
        caveat = caveats_of(model, maps)
        if self._wants("maps"):
            reader = "the class token attends" if pool == "cls" else "the patches attend, on average"
            path = self._path(f"{subject.stem}-maps{picture.suffix}")
            title, note = f"{subject.stem}: {picture.title}", f"Where {reader}. {caveat}".strip()
            figures.maps_by_layer_and_head(image, np.stack(patches), path, title, note)
        return views, caveat

    def _profiles(self, group: list[_Subject], pictures: list[_Picture] | None, name: str) -> None:
        mapped = [s for s in group if not s.model.no_map]
        remarks = [f"{s.label} has {s.model.no_map}." for s in group if s not in mapped]
        if not mapped:
            raise UserError(" ".join(remarks))
        if pictures is None:
            configs = [(s.model.config, s.model.grid.num_tokens) for s in mapped]
            entries = max(config.depth * config.num_heads * tokens**2 for config, tokens in configs)
            # All maps at once take at most 128 MiB.
            pixels = self._data(group[0]).test.images[: max(1, min(64, 2**25 // entries))]
            title = f"{group[0].kind[0]}, mean over {len(pixels)} test images"
        else:
            pixels = torch.stack([picture.pixels for picture in pictures])
            title = ", ".join(picture.title for picture in pictures)
        values = {}
        for subject in mapped:
            maps = maps_of(subject.model, subject.to_input(pixels))
            values[subject.label] = {
                "entropy": interpret.entropy(maps).cpu().numpy(),
                "distance": interpret.attention_distance(maps, subject.model.grid).cpu().numpy(),
                "zeros": 100 * interpret.zero_share(maps).cpu().numpy(),
            }
            if caveat := caveats_of(subject.model, maps):
                signed = not interpret.extremes(maps).are_weights
                caveat += " Entropy and distance are of absolute values." * signed
                remarks.append(f"{subject.label}: {caveat}")
        tokens = {subject.model.grid.num_tokens for subject in mapped}
        uniform = math.log(tokens.pop()) if len(tokens) == 1 else None
        figures.profiles(values, self._path(f"{name}profiles"), title, " ".join(remarks), uniform)

    def _samples(self, subject: _Subject) -> None:
        config, data = subject.run.info.run_config, self._data(subject)
        names = data.class_names
        places = torch.arange(min(32, len(data.train)))
        normalise = subject.normalise
        pipeline = TrainPipeline(data.train.take(places), config.augment, normalise, normalise.scale.device)
        generator = torch.Generator().manual_seed(config.train.seed)
        # A batch a row, as a batch is mixed in one way.
        batches = [pipeline.batch(part, generator) for part in places.split(8)]
        labels = []
        for batch in batches:
            for label, other, share in zip(batch.labels.tolist(), batch.other_labels.tolist(), batch.share.tolist()):
                whole = share == 1 or label == other
                parts = f"{100 * share:.0f} % {names[label]}\n{100 - 100 * share:.0f} % {names[other]}"
                labels.append(names[label] if whole else parts)
        images = subject.to_images(torch.cat([batch.images for batch in batches]))
        path = self._path(f"{subject.stem}-samples")
        figures.sample_sheet(images, labels, path, f"{config.data.dataset}: training images as the model sees them")

    def _curves(self, group: list[_Subject], name: str) -> None:
        """Runs that differ in their seed alone share a curve."""
        logs: dict[str, list[list[dict[str, object]]]] = {}
        same: dict[object, str] = {}
        for subject in group:
            log = store.read_log(subject.run.folder)
            if not log:
                self.notes.append(f"no curves of {subject.stem}: no log of it in {subject.run.folder}")
                continue
            config = subject.run.info.config
            cell = tuple((key, str(value)) for key, value in sorted(config.items()) if key != "seed")
            label = subject.run.info.label
            label = same.setdefault(cell, label if label not in same.values() else subject.stem)
            logs.setdefault(label, []).append(log)
        if not logs:
            raise UserError("no run has a log; give runs instead of copied checkpoints")
        plots.learning_curves(logs, self._path(f"{name}curves"))
        plots.epoch_seconds(logs, self._path(f"{name}epoch-seconds"))

    def _confusion(self, subject: _Subject) -> None:
        path = subject.run.folder / "predictions.npz"
        if not path.is_file():
            raise UserError(f"{subject.stem} has no predictions beside it; finish it with `vitcmp train --resume`")
        with np.load(path) as kept:
            _, matrix = accuracy.per_class(kept["logits"], kept["labels"])
        plots.confusion(np.array(matrix), subject.run.info.class_names, self._path(f"{subject.stem}-confusion"))


def maps_of(model: ViT, images: Tensor) -> list[Tensor]:
    """Attention maps [B, H, N, N] of normalised images, a layer each.

    Raises: UserError where a mechanism has none.
    """
    with torch.no_grad():
        return model(images, return_maps=True)[1]


def caveats_of(model: ViT, maps: Iterable[Tensor]) -> str:
    """What a reader of these maps must know; empty where they are all there is to the attention."""
    parts = []
    found = interpret.extremes(list(maps))
    if not found.are_weights:
        low, high = found.row_sums
        parts.append(f"Entries go down to {found.lowest:.2g} and rows sum to {low:.2g} … {high:.2g}.")
    notes: dict[str, str] = {}
    for spec, block in zip(model.config.attention_specs, model.blocks, strict=True):
        outside = sorted({type(module).__name__ for module in _outside_core(block)})
        note = attention.load(spec).map_note or (f"map of the core, without {', '.join(outside)}" if outside else "")
        if note:
            notes[spec] = note
    mixed = isinstance(model.config.attention, tuple)
    parts += dict.fromkeys(f"{n[0].upper()}{n[1:]}{f' of {spec}' * mixed}." for spec, n in notes.items())
    return " ".join(parts)


def _outside_core(block: nn.Module) -> list[nn.Module]:
    """What changes values in a block's attention beside its core and its linear projections."""
    mixer = block.get_submodule("attention")
    core = set(mixer.get_submodule("core").modules())
    plain = (nn.Linear, nn.Dropout, nn.Identity)
    return [m for m in mixer.modules() if m is not mixer and m not in core and not isinstance(m, plain)]
