"""What the machine could do: its rates of multiplying matrices and of copying, measured (Williams et al., 2009).

attainable FLOP/s = min(peak FLOP/s, intensity * bytes/s),   intensity = FLOP / bytes moved
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitcmp import machine

GEMM_SIZES = (512, 1024, 2048, 4096, 8192)
COPY_BYTES = 2**28
"""Of the buffer that is copied: many times any cache."""
SAMPLE_S = 0.02
SAMPLES = 7


@dataclass(frozen=True)
class Ceilings:
    """The best rates that were seen on a device, for one number format."""

    gflop_s: float
    """Of a product of square matrices, 2 FLOP a multiply-add."""
    copy_gb_s: float
    """Of a copy in main memory, bytes read and bytes written together, in 10^9."""


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the device with the threads and settings that this process has; takes a second or two."""
    return Ceilings(_gemm_gflop_s(device, dtype), _copy_gb_s(device))


def achieved_gflop_s(work_gflop: float, latency_ms: float) -> float:
    """The rate of a call that does so much work in so much time."""
    return 1000 * work_gflop / latency_ms


def fraction_of_peak(work_gflop: float, latency_ms: float, ceilings: Ceilings) -> float:
    """The achieved rate over that of the best matrix product."""
    return achieved_gflop_s(work_gflop, latency_ms) / ceilings.gflop_s


def attainable_gflop_s(intensity_flop_byte: float, ceilings: Ceilings) -> float:
    """The roof over a call of this intensity, were all that it moves in main memory; caches may lift it higher."""
    return min(ceilings.gflop_s, intensity_flop_byte * ceilings.copy_gb_s)


def _gemm_gflop_s(device: torch.device, dtype: torch.dtype) -> float:
    """The best of growing sizes, up to the first product that fills a sample."""
    best = 0.0
    for size in GEMM_SIZES:
        # Of equal numbers, a GPU would multiply more in a second: they cost less power.
        a, b, product = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        seconds = best_s(functools.partial(torch.mm, a, b, out=product), device)
        best = max(best, 2 * size**3 / seconds / 1e9)
        if seconds >= SAMPLE_S:
            break
    return best


def _copy_gb_s(device: torch.device) -> float:
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPY_BYTES / best_s(functools.partial(target.copy_, source), device) / 1e9


def best_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call at its quickest: noise only ever adds."""

    def seconds(calls: int) -> float:
        machine.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        machine.synchronize(device)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = math.ceil(SAMPLE_S / seconds(1))
    return min(seconds(calls) for _ in range(SAMPLES))
