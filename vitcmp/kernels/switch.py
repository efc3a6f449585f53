"""Whether compiled kernels run in this process: the user's switch, numba, and what has failed."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MODES = ("auto", "off", "strict")
VARIABLE = "VITCMP_KERNELS"


class KernelError(RuntimeError):
    """A compiled kernel cannot run, and `strict` forbids its reference; the message says why."""


class SettingError(KernelError):
    """An unknown value of the switch, or a profile that can't be read; the message names the remedy."""


class KernelWarning(UserWarning):
    """A compiled kernel cannot run; its reference, which computes the same, takes over."""


_broken: dict[str, str] = {}
"""Operators whose kernel failed in this process, and why."""


def mode() -> str:
    """auto: kernels where they can run and are quick; off: references alone; strict: an error where one can't run.

    Raises: SettingError for another value of VITCMP_KERNELS.
    """
    value = os.environ.get(VARIABLE, "auto") or "auto"
    if value not in MODES:
        raise SettingError(f"{VARIABLE}={value} is unknown; available: {', '.join(MODES)}")
    return value


@contextmanager
def switched(value: str) -> Iterator[None]:
    """Another mode for a while, in this process and the ones that it starts."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = value
    try:
        mode()
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@functools.cache
def no_numba() -> str:
    """Why numba compiles nothing here; empty where it does."""
    try:
        from numba import config

        importlib.import_module("vitcmp.kernels.numba.tiles")
    except Exception as error:
        return f"numba cannot be used ({type(error).__name__}: {error})".splitlines()[0]
    return "numba is switched off (NUMBA_DISABLE_JIT)" if config.DISABLE_JIT else ""  # type: ignore[attr-defined]


def reason(name: str) -> str:
    """Why the kernel of an operator cannot run here; empty where it can, as far as known."""
    return no_numba() or _broken.get(name, "")


def fails(name: str, why: str) -> None:
    """Note that an operator's kernel cannot run in this process.

    Raises: KernelError in strict mode.
    """
    if mode() == "strict":
        raise KernelError(f"{name}: {why}; VITCMP_KERNELS=auto takes the reference")
    if name not in _broken:
        _broken[name] = why
        warn(f"{name}: {why}; its reference computes the same, more slowly")


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out; the CPU's allocator has no exception type of its own."""
    texts = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(t in str(error).lower() for t in texts)


def warn(text: str) -> None:
    """A warning, once a process and text."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, KernelWarning, stacklevel=4)


_told: set[str] = set()
