"""Record how unevenly this machine computes: what tests/metrics/test_latency.py replays through its fake clock.

    python benchmarks/record_noise.py [--seconds 20] [--out tests/metrics/noise.npz]

The same small piece of torch's work again and again, with 1 thread and 2, alone and beside another process that
computes half of the time; repeated where anything else was running. Stored: each piece's duration over the median of
its condition, a time series as it came (nothing smoothed, nothing left out), and the median in ms.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

PIECE_MS = 1.0


def piece(repeats: int, x: torch.Tensor) -> None:
    """A product and a softmax: what attention does."""
    for _ in range(repeats):
        torch.softmax(x @ x, dim=-1)


def durations_ms(repeats: int, x: torch.Tensor, seconds: float) -> np.ndarray:
    """Of one piece after the other, without a gap."""
    stamps = [time.perf_counter()]
    while stamps[-1] - stamps[0] < seconds:
        piece(repeats, x)
        stamps.append(time.perf_counter())
    return np.diff(stamps) * 1e3


def record(threads: int, seconds: float) -> tuple[np.ndarray, float]:
    """Durations in units of their median, and the median in ms."""
    torch.set_num_threads(threads)
    x = torch.randn(192, 192)
    # The warm-up, which also sizes a piece; by the median, as a second thread may wait long for its turn.
    repeats = max(1, round(PIECE_MS / float(np.median(durations_ms(1, x, seconds=1)))))
    durations = durations_ms(repeats, x, seconds)
    middle = float(np.median(durations))
    return (durations / middle).astype(np.float16), middle


def busy_seconds() -> float:
    """What all programs have computed so far, in seconds of one core (Linux)."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(seconds: float = 3.0) -> None:
    """Until other programs take less than a tenth of a core."""
    while True:
        before = busy_seconds()
        time.sleep(seconds)
        if busy_seconds() - before < 0.1 * seconds:
            return


def other_program() -> None:
    """Computes and rests in turn, for times that nobody foresees."""
    torch.set_num_threads(1)
    x, rng = torch.randn(512, 512), np.random.default_rng(0)
    while True:
        end = time.perf_counter() + rng.exponential(0.2)
        while time.perf_counter() < end:
            x @ x
        time.sleep(rng.exponential(0.2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each condition")
    parser.add_argument("--out", type=Path, default=Path("tests/metrics/noise.npz"))
    parser.add_argument("--attempts", type=int, default=10, help="at a condition, until nothing else is running")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for company, threads in itertools.product(("quiet", "busy"), (1, 2)):
        name = f"{company}_{threads}"
        expected = 0.5 if company == "busy" else 0.0
        for _ in range(options.attempts):
            wait_for_quiet()
            other = multiprocessing.get_context("spawn").Process(target=other_program, daemon=True)
            if company == "busy":
                other.start()
                time.sleep(5)
            before, own, start = busy_seconds(), time.process_time(), time.perf_counter()
            series, middle = record(threads, options.seconds)
            others = (busy_seconds() - before - time.process_time() + own) / (time.perf_counter() - start)
            if company == "busy":
                other.kill()
                other.join()
            percentiles = np.percentile(series.astype(float), [1, 25, 75, 99]).round(3)
            print(f"{name}: {len(series)} pieces of {middle:.2f} ms; others used {others:.0%} of a core; "
                  f"percentiles 1, 25, 75, 99: {percentiles}", flush=True)  # fmt: skip
            if abs(others - expected) <= 0.15:
                found |= {name: series, f"{name}_ms": np.array(middle)}
                break
        else:
            print(f"{name}: left out, something else was running")
    np.savez_compressed(options.out, **found)
    print(options.out, f"{options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
