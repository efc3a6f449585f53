"""Which form of an operator is taken where the caller leaves it open: by measurements on this kind of CPU.

Nothing is timed while a model runs, so that a run can be repeated. Measurements are a `Profile`: one that
`vitcmp doctor --measure` wrote for this machine (`VITCMP_PROFILE` names another file, or `none`), else the one in
`profiles/` for this kind of CPU, else nothing; then each operator says what it takes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitcmp.kernels import cpu
from vitcmp.kernels.switch import SettingError, warn

VARIABLE = "VITCMP_PROFILE"
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
MODES = {False: "forward", True: "train"}
"""A forward pass alone, or with the backward pass."""
FARTHEST = 4.0
"""Doublings of sizes, all together, beyond which a measurement says nothing."""


@dataclass(frozen=True)
class Cell:
    """One measurement: the forms of an operator at certain sizes, in milliseconds a call."""

    operator: str
    dtype: str
    mode: str
    sizes: tuple[int, ...]
    """Of attention: head width, queries, keys; of layers: their widths, rows."""
    ms: Mapping[str, float | None]
    """Null where only the order of the forms was kept."""

    @property
    def order(self) -> tuple[str, ...]:
        """The forms, the quickest first."""
        return tuple(sorted(self.ms, key=lambda form: self.ms[form] or 0.0))


@dataclass(frozen=True)
class Profile:
    """Measurements on one CPU."""

    kind: str
    """Of CPU (`cpu.kind`)."""
    cells: tuple[Cell, ...] = ()
    facts: Mapping[str, Any] | None = None
    """CPU, threads, versions, time: for whoever reads the file."""

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits of what is decided by it."""
        decided = [(c.operator, c.dtype, c.mode, c.sizes, c.order) for c in self.cells]
        return hashlib.sha256(json.dumps([self.kind, decided]).encode()).hexdigest()[:12]

    @functools.cached_property
    def _by_case(self) -> dict[tuple[str, str, str], list[tuple[tuple[float, ...], tuple[str, ...]]]]:
        found: dict[tuple[str, str, str], list[tuple[tuple[float, ...], tuple[str, ...]]]] = {}
        for c in self.cells:
            found.setdefault((c.operator, c.dtype, c.mode), []).append((tuple(map(math.log2, c.sizes)), c.order))
        return found

    def order(self, operator: str, dtype: str, mode: str, sizes: Sequence[int]) -> tuple[str, ...]:
        """The forms as measured at the nearest sizes, the quickest first; empty where nothing near was measured."""
        here = [math.log2(max(1, size)) for size in sizes]
        best = FARTHEST
        order: tuple[str, ...] = ()
        for place, forms in self._by_case.get((operator, dtype, mode), ()):
            if len(place) != len(here):
                continue  # of another version
            distance = sum(abs(a - b) for a, b in zip(here, place, strict=True))
            if distance < best:
                best, order = distance, forms
        return order

    def save(self, path: Path) -> None:
        """Write it as JSON, a line a cell; whole, or not at all."""
        head = json.dumps({"kind": self.kind, "facts": self.facts}, indent=1)[:-2]
        lines = ",\n".join(f"  {json.dumps(asdict(cell))}" for cell in self.cells)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(f'{head},\n "cells": [\n{lines}\n ]\n}}\n')
        temporary.replace(path)


def read(path: Path) -> Profile:
    """A profile from its file.

    Raises: SettingError where there is none, or it is damaged.
    """
    try:
        content = json.loads(path.read_text())
        cells = tuple(_cell(cell) for cell in content["cells"])
        return Profile(str(content["kind"]), cells, dict(content["facts"] or {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(
            f"cannot read the profile '{path}' ({error}); measure again: vitcmp doctor --measure"
        ) from None


def _cell(found: dict[str, Any]) -> Cell:
    cell = Cell(**{**found, "sizes": tuple(map(int, found["sizes"]))})
    times = [ms for ms in cell.ms.values() if ms is not None]
    if min(cell.sizes) < 1 or not all(isinstance(ms, int | float) for ms in times):
        raise ValueError(f"sizes {cell.sizes} and times {times} must be numbers above 0")
    return cell


def measured_file() -> Path:
    """Where this machine's own profile is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "vitcmp" / "profiles" / f"{cpu.kind()}.json"


def active() -> Profile:
    """The profile that decides now."""
    return _kept[-1] if _kept else _find(os.environ.get(VARIABLE, ""))


_kept: list[Profile] = []


@contextmanager
def kept(profile: Profile) -> Iterator[None]:
    """This profile decides for a while, as in a resumed run, which keeps the forms that it began with."""
    _kept.append(profile)
    try:
        yield
    finally:
        _kept.pop()


@functools.cache
def _find(setting: str) -> Profile:
    if setting and setting != "none":
        return read(Path(setting).expanduser())
    if not setting and (profile := _own()) is not None:
        return profile
    return published(cpu.kind())


def _own() -> Profile | None:
    """This machine's own profile; none where there is no such file, or one of another CPU."""
    try:
        if not measured_file().exists():
            return None
        profile = read(measured_file())
    except (OSError, RuntimeError) as error:  # no home, or a damaged file
        warn(f"{error}; what was measured on other CPUs of this kind decides until then")
        return None
    return profile if (profile.facts or {}).get("cpu") == cpu.info("model name") else None


@functools.cache
def published(kind: str) -> Profile:
    """What was measured on this kind of CPU before; empty where nothing was."""
    path = Path(__file__).parent / "profiles" / f"{kind}.json"
    return read(path) if path.exists() else Profile(kind)


def forget() -> None:
    """Read the files again at the next call: one has been written."""
    _find.cache_clear()
