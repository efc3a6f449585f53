"""Record how unevenly this machine computes: what tests/metrics/test_latency.py replays through its fake clock.

    python benchmarks/record_noise.py [--seconds 20] [--out tests/metrics/noise.npz]

The same small piece of torch's work again and again, with 1 thread and 2, alone and beside another process that
computes half of the time. Stored: each piece's duration over the median of its condition, a time series as it came
(nothing smoothed, nothing left out), and the median in ms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch

PIECE_MS = 1.0


def piece(repeats: int, x: torch.Tensor) -> None:
    """A product and a softmax: what attention does."""
    for _ in range(repeats):
        torch.softmax(x @ x, dim=-1)


def record(threads: int, seconds: float) -> tuple[np.ndarray, float]:
    """Durations in units of their median, and the median in ms."""
    torch.set_num_threads(threads)
    x = torch.randn(192, 192)
    # The warm-up, which also sizes a piece.
    calls, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < 1:
        piece(1, x)
        calls += 1
    repeats = max(1, round(PIECE_MS / 1e3 * calls / taken))
    stamps = [time.perf_counter()]
    while stamps[-1] - stamps[0] < seconds:
        piece(repeats, x)
        stamps.append(time.perf_counter())
    durations = np.diff(stamps) * 1e3
    middle = float(np.median(durations))
    return (durations / middle).astype(np.float16), middle


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
    options = parser.parse_args()
    found: dict[str, np.ndarray] = {}
    context = multiprocessing.get_context("spawn")
    for company in ("quiet", "busy"):
        other = context.Process(target=other_program, daemon=True)
        if company == "busy":
            other.start()
            time.sleep(5)
        for threads in (1, 2):
            name = f"{company}_{threads}"
            found[name], middle = record(threads, options.seconds)
            found[f"{name}_ms"] = np.array(middle)
            percentiles = np.percentile(found[name].astype(float), [1, 25, 75, 99])
            print(
                f"{name}: {len(found[name])} pieces of {middle:.2f} ms, percentiles 1, 25, 75, 99:",
                *percentiles.round(3),
            )
        if company == "busy":
            other.kill()
            other.join()
    np.savez_compressed(options.out, **found)
    print(options.out, f"{options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
