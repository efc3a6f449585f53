"""Peak memory."""

from __future__ import annotations

from pathlib import Path

import torch


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
                self.start = _resident_mib("VmRSS")
            except OSError:
                self.start = float("nan")

    def mib(self) -> float | None:
        """The peak so far; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.start
        if self.device.type == "cpu" and self.start == self.start:
            return _resident_mib("VmHWM") - self.start
        return None


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024
