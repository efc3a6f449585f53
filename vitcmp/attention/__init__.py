"""Attention mechanisms, a file each: `available()` names them, `load(spec)` brings one.

Installed packages may offer more, in the entry-point group `vitcmp.attention`: a name, and the module that has it.

    >>> from vitcmp import attention
    >>> mechanism = attention.load("entmax:alpha=1.25")
    >>> layer = attention.LayerConfig(dim=64, num_heads=4, grid=attention.TokenGrid(8, 8))
    >>> block = mechanism.build(layer)  # [B, N, dim] -> [B, N, dim]

Importing this package does not import torch; loading a mechanism does.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import nn

    from vitcmp.attention._multihead import LayerConfig, MultiHead, TokenGrid, attention_map

__all__ = [
    "AttentionError", "DegenerateWarning", "LayerConfig", "Mechanism", "MultiHead", "TokenGrid",
    "attention_map", "available", "canonical", "load",
]  # fmt: skip

GROUP = "vitcmp.attention"
"""The entry points of other packages' mechanisms."""


class AttentionError(ValueError):
    """An unknown mechanism or option, or a size that cannot work; the message names the remedy."""


class DegenerateWarning(UserWarning):
    """A configuration that runs but cannot show what the mechanism is for."""


@dataclass(frozen=True)
class Mechanism:
    """One attention mechanism with its options set."""

    name: str
    spec: str
    """The canonical name with options: options sorted, defaults dropped."""
    config: Any
    module: ModuleType

    @property
    def summary(self) -> str:
        """The first line of the mechanism's docstring."""
        return (self.module.__doc__ or self.name).strip().splitlines()[0]

    @property
    def paper(self) -> str:
        """The link to the paper, empty if the file names none."""
        return getattr(self.module, "PAPER", "")

    @property
    def cost(self) -> str:
        """How time grows with tokens N, head width K and the mechanism's own sizes."""
        return getattr(self.module, "COST", "")

    @property
    def approximates(self) -> str | None:
        """softmax, shared-qk, or None: what an error is measured against; a function where options decide."""
        target = getattr(self.module, "APPROXIMATES", None)
        return target(self.config) if callable(target) else target

    @property
    def no_map(self) -> str:
        """Why there is no attention map; empty where there is one."""
        return getattr(self.module, "NO_MAP", "")

    @property
    def has_map(self) -> bool:
        """Whether the output is A(q, k) v with one A for all channels of a head."""
        return not self.no_map

    @property
    def map_note(self) -> str:
        """What figures say of the map, such as `map without the convolution`; empty where it is the whole."""
        return getattr(self.module, "MAP_NOTE", "")

    @property
    def row_stochastic(self) -> bool:
        """Whether the rows of the map are non-negative and sum to 1."""
        return getattr(self.module, "ROW_STOCHASTIC", False)

    @property
    def equivariant(self) -> bool:
        """Whether permuting the tokens permutes the output: the mechanism itself knows no positions."""
        return getattr(self.module, "EQUIVARIANT", True)

    @property
    def num_projections(self) -> int:
        """Projections of dim x dim around the core: four, three where queries and keys share theirs, or fewer."""
        return getattr(self.module, "NUM_PROJECTIONS", 4)

    @property
    def bounds(self) -> dict[str, tuple[float, str]]:
        """Checks of the contract whose usual bound does not fit this mechanism: another bound, and why."""
        return getattr(self.module, "BOUNDS", {})

    @property
    def digest(self) -> str | None:
        """SHA-256 of the module's file where the mechanism is not part of vitcmp, else None."""
        if self.module.__name__.startswith(f"{__name__}."):
            return None
        file = self.name if self.name.endswith(".py") else str(self.module.__file__)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def build(self, layer: LayerConfig) -> nn.Module:
        """The attention block of one layer: [B, N, dim] -> [B, N, dim].

        Raises: AttentionError where the options cannot work with the layer's sizes.
        """
        return self.module.build(layer, self.config)

    def macs(self, layer: LayerConfig) -> int:
        """Multiply-adds for one image of all that the block computes beside its projections."""
        return self.module.macs(layer, self.config)

    def block_macs(self, layer: LayerConfig) -> int:
        """Multiply-adds for one image of the whole block, projections included."""
        return self.macs(layer) + self.num_projections * layer.grid.num_tokens * layer.dim**2


def available(own: bool = False) -> list[str]:
    """The names of all mechanisms, sorted; with `own`, without those of other packages."""
    names = {p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[!_]*.py")}
    return sorted(names if own else names | _installed().keys())


def load(spec: str) -> Mechanism:
    """The mechanism that a spec such as `performer:num_features=64` names.

    A name that ends in `.py` is the path of a file with the same contract.

    Raises: AttentionError for an unknown name or option, or a value that does not fit.
    """
    name, _, options = spec.strip().partition(":")
    module = _module(name)
    config = module.Config(**_options(module.Config, name, options))
    changed = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
    }
    name = str(Path(name)) if name.endswith(".py") else name.replace("_", "-")  # ./mine.py is mine.py
    text = ",".join(f"{key}={_text(changed[key])}" for key in sorted(changed))
    return Mechanism(name, f"{name}:{text}" if text else name, config, module)


def canonical(spec: str) -> str:
    """The spec with its options sorted and its defaults dropped: equal things have equal names."""
    return load(spec).spec


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _file(Path(name))
    dashed, installed = name.replace("_", "-"), _installed()
    if dashed in available(own=True):
        return importlib.import_module(f"{__name__}.{dashed.replace('-', '_')}")
    if dashed in installed:
        return _package(installed[dashed])
    near = difflib.get_close_matches(dashed, available(), n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    if "," in name or "=" in name:
        hint = "for several mechanisms repeat --attention, for one in some layers write softmax,1-=performer; "
    raise AttentionError(f"unknown attention '{name}'; {hint}available: {', '.join(available())}")


@functools.cache
def _installed() -> dict[str, EntryPoint]:
    """What other packages offer, by name; vitcmp's own names are not theirs to take."""
    from importlib.metadata import entry_points

    found: dict[str, EntryPoint] = {}
    own = available(own=True)
    for entry in entry_points(group=GROUP):
        name = entry.name.replace("_", "-")
        taken = "vitcmp" if name in own else _owner(found[name]) if name in found else ""
        if taken:
            warnings.warn(f"the mechanism '{name}' of {_owner(entry)} is not used: {taken} has one of that name; give "
                          "it another name, or give the path of its file", stacklevel=2)  # fmt: skip
        else:
            found[name] = entry
    return found


def _owner(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name}" if entry.dist else entry.value


def _package(entry: EntryPoint) -> ModuleType:
    """Another package's mechanism."""
    try:
        module = entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise AttentionError(f"cannot import {entry.value} of {_owner(entry)} ({reason}); uninstall it") from error
    _check(module, f"{entry.value} of {_owner(entry)}")
    return module


def _file(path: Path) -> ModuleType:
    """A user's own mechanism, imported once a version of its file."""
    if not path.is_file():
        raise AttentionError(f"no mechanism file '{path}'; give the path of a Python file with Config, build and macs")
    name = f"vitcmp_mechanism_{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        try:
            specification.loader.exec_module(module)
            _check(module, str(path))
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, AttentionError):
                raise
            raise AttentionError(f"cannot import {path} ({type(error).__name__}: {error}); mend the file") from error
    return sys.modules[name]


def _check(module: ModuleType, what: str) -> None:
    """Raise AttentionError where someone else's module is no mechanism."""
    missing = [needed for needed in ("Config", "build", "macs") if not hasattr(module, needed)]
    if missing:
        raise AttentionError(f"{what} lacks {', '.join(missing)}: a mechanism has Config, build and macs")
    if not dataclasses.is_dataclass(module.Config):
        raise AttentionError(f"{what}: Config must be a dataclass; put @dataclass(frozen=True) above it")
    for field in dataclasses.fields(module.Config):
        if field.default is dataclasses.MISSING:
            raise AttentionError(f"{what}: the option '{field.name}' needs a default in Config")


def _text(value: Any) -> str:
    """An option's value as a spec writes it: true, 64, 1+2+4."""
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(config: type[Any], name: str, text: str) -> dict[str, Any]:
    """`a=1,b=x` as keyword arguments of a mechanism's Config, converted to its types."""
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(config)
    known = [f.name for f in dataclasses.fields(config)]
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise AttentionError(f"'{part}' in '{name}:{text}' is no option: write {name}:option=value; for several "
                                 "mechanisms, repeat --attention")  # fmt: skip
        if key in options:
            raise AttentionError(f"{name}: the option '{key}' is given twice; keep one")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise AttentionError(f"{name} has no option '{key}'; {hint}available: {', '.join(known) or 'none'}")
        several = get_origin(hints[key]) is tuple
        try:
            options[key] = TypeAdapter(hints[key]).validate_python(value.split("+") if several else value.strip())
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower().replace("input should be", "must be")
            raise AttentionError(f"{name}: {key}={value} {reason}") from None
    return options


def __getattr__(name: str) -> Any:
    """The names that need torch, imported when they are first used."""
    if name in ("LayerConfig", "MultiHead", "TokenGrid", "attention_map"):
        return getattr(importlib.import_module("vitcmp.attention._multihead"), name)
    raise AttributeError(f"module 'vitcmp.attention' has no attribute '{name}'")
