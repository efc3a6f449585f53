"""What this machine has, and what to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from vitcmp import machine
from vitcmp.configs import RuntimeConfig, UserError
from vitcmp.kernels import cpu, forms, switch
from vitcmp.kernels import measure as kernels_measure

EXTRAS = {
    "Grad-CAM": ("pytorch_grad_cam", "pip install 'vitcmp[viz]'"),
    "TensorBoard": ("tensorboard", "pip install 'vitcmp[track]'"),
}
DATA = {
    "mnist": "**/train-images-idx3-ubyte*",
    "cifar10": "**/cifar-10-*",
    "cifar100": "**/cifar-100-*",
}


TRIED = {"torch": ("2.11", "2.15"), "numba": ("0.62", "0.68"), "llvmlite": ("0.45", "0.50")}
"""The oldest and the newest version, major and minor, with which the kernels' tests have passed."""


def run(runtime: RuntimeConfig, listen: Callable[[str], None] = lambda text: None) -> dict[str, str]:
    """One line a fact, in the order to read them; tests every kernel against its reference."""
    with machine.kernels_as(runtime.kernels):
        return _run(runtime, listen)


def measure(runtime: RuntimeConfig, listen: Callable[[str, int, int], None] = lambda *_: None) -> Path:
    """Time the forms of all operators, and write the profile that later runs choose by; returns its file.

    Raises: UserError where the file cannot be written.
    """
    if machine.is_ours():
        machine.keep_freed_memory()
    with switch.switched(runtime.kernels or switch.mode()):
        profile, path = kernels_measure.measure(listen), forms.measured_file()
    try:
        profile.save(path)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}); set XDG_CACHE_HOME to another folder") from None
    forms.forget()
    return path


def _run(runtime: RuntimeConfig, listen: Callable[[str], None]) -> dict[str, str]:
    device = machine.pick_device(runtime.device)
    facts = machine.hardware(device)
    results = Path(runtime.results).absolute()
    disk = shutil.disk_usage(next(p for p in (results, *results.parents) if p.exists()))
    found = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
        "commit": machine.commit() or "not a checkout",
        "device": f"{facts['device']} (--device auto)" if runtime.device == "auto" else facts["device"],
        "CPU": f"{facts['cpu']}, {facts['cores']} cores, torch uses {facts['threads']}",
        "memory": f"{facts['memory_gib']} GiB",
        "native bf16": "yes: --precision auto trains in bf16"
        if facts["native_bf16"]
        else "no: --precision auto is fp32",
        "kind of CPU": cpu.kind(),
        "kernels": _kernels(listen),
        "profile": _profile(),
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "C++ compiler": machine.compiler() or "none: --compile runs eagerly; install g++ or clang for it",
        "disk": f"{disk.free / 2**30:.1f} GiB free for {runtime.results}",
    }
    for name, (module, remedy) in EXTRAS.items():
        found[name] = "installed" if importlib.util.find_spec(module) else f"not installed: {remedy}"
    root = Path(runtime.data_dir or os.environ.get("VITCMP_DATA") or "~/.cache/vitcmp").expanduser()
    here = [name for name, pattern in DATA.items() if root.is_dir() and next(root.glob(pattern), None)]
    found["data"] = f"digits, fake (always); in {root}: {', '.join(here) or 'none'}"
    return found


def _kernels(listen: Callable[[str], None]) -> str:
    """Whether compiled kernels run here, and whether each computes what its reference does."""
    if switch.mode() == "off":
        return f"off ({switch.VARIABLE})"
    if why := switch.no_numba():
        return f"none: {why}; references run, more slowly"
    listen("testing the kernels, which are compiled the first time: up to two minutes")
    wrong = {name: found for name, found in kernels_measure.self_tests() if found}
    tested = "all agree with their references" if not wrong else "; ".join(f"{n}: {w}" for n, w in wrong.items())
    return ", ".join(filter(None, [f"{switch.mode()}: {tested}", *_untried()]))


def _untried() -> list[str]:
    """Versions beyond those that the kernels were tried with: the test above is what vouches for them."""
    found = []
    for package, (oldest, newest) in TRIED.items():
        version = importlib.metadata.version(package)
        short = tuple(map(int, version.split(".")[:2]))
        if not tuple(map(int, oldest.split("."))) <= short <= tuple(map(int, newest.split("."))):
            found.append(f"{package} {version} was never tried (tried: {oldest} to {newest})")
    return found


def _profile() -> str:
    """Which measurements decide about the forms of operators."""
    profile, setting = forms.active(), os.environ.get(forms.VARIABLE)
    if not profile.cells:
        return f"nothing measured on {profile.kind}: vitcmp doctor --measure does it in two minutes"
    when = (profile.facts or {}).get("time", "")
    source = setting if setting not in (None, "", "none") else "this machine" if _is_own(profile) else "vitcmp's own"
    return f"{profile.digest} ({source}, {profile.kind}, {len(profile.cells)} measurements, {when[:10]})"


def _is_own(profile: forms.Profile) -> bool:
    return profile is not forms.published(profile.kind)
