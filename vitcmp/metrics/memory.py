"""Peak memory of a process, what a call holds, and a limit that turns running out into an error."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vitcmp import machine

CGROUPS = Path("/sys/fs/cgroup")


class PeakMemory:
    """Peak memory since its creation, in MiB above what was in use then.

    On CUDA, what torch's allocator held. On Linux, the process's resident set: writing 5 to /proc/self/clear_refs
    resets its high-water mark, which is read from /proc/self/status. Elsewhere unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / 2**20
        elif device.type == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.start = _status_mib("VmRSS")
            except OSError:
                self.start = float("nan")

    def mib(self) -> float | None:
        """The peak so far; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.start
        if self.device.type == "cpu" and self.start == self.start:
            return _status_mib("VmHWM") - self.start
        return None

    def held_mib(self) -> float | None:
        """What is in use now; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 2**20 - self.start
        if self.device.type == "cpu" and self.start == self.start:
            return _status_mib("VmRSS") - self.start
        return None


def return_freed_memory() -> None:
    """Have glibc map all but small allocations of this process by themselves, so that they are unmapped when freed.

    Before anything is allocated that will be freed: memory kept for later would be used again unseen, or would count
    as in use.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            # M_MMAP_THRESHOLD, which freeing would otherwise raise, and M_MMAP_MAX of <malloc.h>.
            mallopt(-3, 2**16)
            mallopt(-4, 2**16)


def measure_memory(
    device: torch.device,
    inference: Callable[[], object],
    forward: Callable[[], Tensor] | None = None,
    backward: Callable[[Tensor], object] | None = None,
) -> dict[str, float | None]:
    """Memory of one call, in MiB above what was in use before; None where the system does not tell.

    For `inference` alone, its peak_memory_mib. With `forward` and `backward`, a call is both: peak_memory_mib is
    theirs, activation_memory_mib what is held between them, inference_memory_mib the peak of `inference`. On CUDA also
    reserved_memory_mib, by how much the allocator's own share of the device grew at most.

    Call it in a fresh process that has warmed up on something small, since libraries keep what they once allocated,
    and on a CPU after `return_freed_memory`.
    """
    peak = _begin(device)
    reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    inference()
    machine.synchronize(device)
    found = {"peak_memory_mib": peak.mib()}
    if forward is not None and backward is not None:
        peak = _begin(device)
        loss = forward()
        machine.synchronize(device)
        give_back(device)
        held = peak.held_mib()
        backward(loss)
        machine.synchronize(device)
        found = {
            "peak_memory_mib": peak.mib(),
            "inference_memory_mib": found["peak_memory_mib"],
            "activation_memory_mib": held,
        }
    if device.type == "cuda":
        found["reserved_memory_mib"] = (torch.cuda.max_memory_reserved(device) - reserved) / 2**20
    return found


def limit_memory(mib: int) -> bool:
    """Let this process's data grow by at most so much; True where the system enforces that.

    Beyond, allocations fail: torch raises "can't allocate memory", others MemoryError. Without, the kernel would kill
    the process, or another one.
    """
    if sys.platform != "linux":
        return False
    import resource

    # Threads that cannot start end the process: OpenMP starts all of its own with the first large operation.
    torch.ones(2**20).sqrt_()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int((_status_mib("VmData") + mib) * 2**20)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return True


def default_limit_mib() -> int:
    """Half of the memory that this process may have: the machine's, or its container's; 0 where unknown."""
    if sys.platform == "win32":
        return 0
    membership = Path("/proc/self/cgroup")
    text = membership.read_text() if membership.exists() else ""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits(text, CGROUPS)]) // 2**21


def _cgroup_limits(membership: str, root: Path) -> list[int]:
    """Limits in bytes on the groups of /proc/self/cgroup and on those above them, of either version.

    Inside a container the names may be those outside; then only the root is there to read, which is its own group.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / name.strip("/")
        for folder in [group, *group.parents][: len(group.relative_to(top).parts) + 1]:
            with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                limits.append(int((folder / file).read_text()))
    return limits


def _begin(device: torch.device) -> PeakMemory:
    give_back(device)
    return PeakMemory(device)


def give_back(device: torch.device) -> None:
    """Give back what was freed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024
