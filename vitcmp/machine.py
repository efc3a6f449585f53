"""The machine at hand: device, native bf16, threads, allocator, and the fingerprint that stands in every record."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import vitcmp
from vitcmp.configs import UserError, check_threads
from vitcmp.kernels import cpu, forms, switch
from vitcmp.kernels.switch import out_of_memory as out_of_memory


def pick_device(name: str) -> torch.device:
    """The torch device for auto, cpu, cuda, cuda:N or mps.

    Raises: UserError for an unknown name, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device '{name}'; available: auto, cpu, cuda, cuda:N, mps") from None
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in present:
        raise UserError(f"device '{name}' is not supported; use auto, cpu, cuda or mps")
    if (device.index or 0) >= present[device.type]:
        raise UserError(f"device '{name}' is not on this machine; use --device auto")
    return device


def set_threads(threads: int | None) -> None:
    """Have torch compute with so many CPU threads; None leaves its own choice.

    Raises: UserError for more threads than can be of use.
    """
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


@functools.cache
def native_bf16(device_type: str) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; a CPU that emulates it is slower than in fp32."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device_type == "mps":
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu.flags())


def precision(wanted: str, device: torch.device) -> str:
    """fp32 or bf16 for auto, fp32 or bf16."""
    return ("bf16" if native_bf16(device.type) else "fp32") if wanted == "auto" else wanted


@contextlib.contextmanager
def kernels_as(wanted: str | None) -> Iterator[None]:
    """The switch of compiled kernels for a while; None: as the environment says.

    Raises: UserError for an unknown value.
    """
    try:
        with switch.switched(wanted or switch.mode()):
            forms.active()
            yield
    except switch.SettingError as error:
        raise UserError(str(error)) from None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_ours() -> bool:
    """Whether this process is one of vitcmp's commands or workers, whose settings are vitcmp's to change."""
    return vitcmp.is_own_process


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory instead of returning it page by page; True where that could be set.

    Training frees and asks for the same sizes every step, and each return to the system costs page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>; each returns 1 where it was set.
    return all([mallopt(-4, 0), mallopt(-1, 2**31 - 1), mallopt(-2, 10**9)])


def process_context(device: torch.device, preload: str) -> Any:
    """How to start child processes that compute on the device, with the module `preload` imported in them.

    On the CPU, forks of a server that has imported torch and computed nothing: they start in milliseconds. CUDA does
    not survive a fork, so there each child starts from nothing.
    """
    if device.type != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def exit_reason(code: int) -> str:
    """Why a process ended, from its exit code: below 0, the number of the signal."""
    if code >= 0:
        return f"the process ended with code {code}"
    name = signal.Signals(-code).name
    return f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def compiler() -> str | None:
    """The path of the C++ compiler that torch.compile would use on the CPU, if there is one."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def hardware(device: torch.device) -> dict[str, Any]:
    """What the machine is made of: no host name, no path."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu.info("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "cpu_kind": cpu.kind(),
        "native_bf16": native_bf16(device.type),
        "system": f"{platform.system()} {platform.machine()}",
    }


def state(device: torch.device) -> dict[str, float]:
    """What the machine is doing at the moment: processes that want to run (mean of a minute), and its clock."""
    found = {}
    if hasattr(os, "getloadavg"):
        found["load_1min"] = os.getloadavg()[0]
    if device.type == "cuda":
        # torch asks NVIDIA's library, which may be absent or may not tell; it has exceptions of its own.
        with contextlib.suppress(Exception):
            found["gpu_mhz"] = float(torch.cuda.clock_rate(device))
    if mhz := cpu.info("cpu MHz"):
        found["cpu_mhz"] = float(mhz)
    return found


def versions() -> dict[str, str]:
    """Versions of all that could change a number."""
    packages = ("torch", "torchvision", "entmax", "numpy", "ptflops")
    return {
        "vitcmp": vitcmp.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **({"cuda": torch.version.cuda} if torch.cuda.is_available() and torch.version.cuda else {}),
    }


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that vitcmp runs from, with `+` if files differ from it; None outside one."""
    root = Path(vitcmp.__file__).parent
    try:
        ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10)
        inside = ask(["git", "ls-files", "--error-unmatch", "__init__.py"])
        head = ask(["git", "rev-parse", "--short=12", "HEAD"])
        if inside.returncode or head.returncode:
            return None
        changed = ask(["git", "status", "--porcelain", "--untracked-files=no", "."]).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def _total_memory() -> int:
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
