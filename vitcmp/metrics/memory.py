"""Peak memory of a process, what a call holds, and a limit that turns running out into an error."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

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
            # M_MMAP_THRESHOLD, which freeing would otherwise raise, M_MMAP_MAX and M_TOP_PAD of <malloc.h>.
            mallopt(-3, 2**16)
            mallopt(-4, 2**16)
            mallopt(-2, 2**17)


class NotKnown(Exception):
    """A reading of memory that this system or its allocator does not allow, and why."""


@contextlib.contextmanager
def exact_peak(device: torch.device, pool: ThreadPoolExecutor | None = None, threads: int = 0) -> Iterator[PeakMemory]:
    """A reading of what is held at once, whatever this process has freed before.

    glibc keeps freed memory for later, where it would be used again unseen. So it is given back, and its places in the
    heap are taken: then all but small allocations are mapped by themselves, and unmapped when freed. `pool` has
    `threads` threads that will allocate, too; each has a heap of its own.

    Raises: NotKnown where the system does not tell, or another allocator keeps what is freed.
    """
    gc.collect()
    give_back(device)
    if device.type != "cpu":
        peak = PeakMemory(device)
        if peak.mib() is None:
            raise NotKnown("this system does not tell")
        yield peak
        return
    taken: list[int] = []
    try:
        return_freed_memory()
        taken += _take_free_memory()
        if pool is not None:
            together = Barrier(threads)  # so that each thread takes one of the calls

            def take(_: int) -> list[int]:
                together.wait()
                return _take_free_memory()

            taken += [address for part in pool.map(take, range(threads)) for address in part]
        probe = PeakMemory(device)
        torch.ones(16 * 2**18)
        held = probe.held_mib()
        if held is None:
            raise NotKnown("this system does not tell")
        if held > 4:
            raise NotKnown("this process's allocator keeps freed memory")
        yield PeakMemory(device)
    finally:
        if libc := _glibc():
            for address in taken:
                libc.free(address)
            # The limits that glibc comes to by itself where blocks of 32 MiB are freed.
            libc.mallopt(-3, 2**25)
            libc.mallopt(-1, 2**26)


def _take_free_memory() -> list[int]:
    """Allocate all free places of 64 KiB and more in this thread's heap, and touch none; their addresses.

    After `return_freed_memory`, an allocation that finds no place in the heap is mapped by itself.
    """
    taken: list[int] = []
    libc = _glibc()
    if libc is None:
        return taken
    for size in (2**power for power in range(34, 15, -1)):
        while (address := libc.malloc(size)) and len(taken) < 100_000:
            # In glibc's heap, a block has up to some words more than asked for; mapped by itself, it has whole pages.
            if not size < libc.malloc_usable_size(address) < size + 512:
                libc.free(address)
                break
            taken.append(address)
    return taken


def _glibc() -> ctypes.CDLL | None:
    """The functions of glibc's allocator, if it is there."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.malloc_usable_size.argtypes, libc.malloc_usable_size.restype = [ctypes.c_void_p], ctypes.c_size_t
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc


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
