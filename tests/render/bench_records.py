"""Bench records in memory, as a store's table holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from vitcmp.configs import ModelConfig

NOISE = np.random.default_rng(0).lognormal(0, 0.05, 15)
"""What the rounds of a group share."""


BASE: dict[str, Any] = {
    "kind": "bench", "status": "ok", "error": None, "warnings": [], "level": "attention", "mode": "forward",
    "tokens": 64, "batch_size": 8, "precision": "fp32", "execution": "eager", "hardware_device": "cpu",
    "hardware_cpu": "Fast 9000", "hardware_threads": 2, "dim": 48, "depth": 4, "num_heads": 4, "mlp_dim": 192,
    "pool": ModelConfig.pool, "stem": ModelConfig.stem, "qkv_bias": True, "out_bias": True, "final_norm": True,
}  # fmt: skip


class Bench:
    """Records a minute apart; what `cell` is not told stands as in `BASE`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def cell(self, attention: str, latency: float | None = None, jitter: float = 0.001, **fields: Any) -> None:
        """One record; its samples share the noise of the rounds and have a jitter of their own."""
        count = len(self.rows)
        row = {**BASE, "id": str(count), "time": f"2026-01-01T{count // 60:02}:{count % 60:02}:00+00:00",
               "attention": attention}  # fmt: skip
        if latency is not None:
            own = np.random.default_rng(count).lognormal(0, jitter, 15)
            samples = (latency * NOISE * own).tolist()
            row |= {"latency_ms": float(np.median(samples)), "latency_samples_ms": samples}
        self.rows.append({**row, **fields})

    @property
    def table(self) -> pd.DataFrame:
        """The records, as `store.load` gives them."""
        return pd.DataFrame(self.rows)


def study() -> Bench:
    """Quadratic softmax in two forms, a linear mechanism and a control over tokens and batches, with all metrics."""
    bench = Bench()
    for batch in (1, 8):
        for n in (256, 1024, 2048, 4096):
            for name, latency, memory, error in (
                ("softmax:impl=naive", 2e-6 * n**2, n**2 / 1e4, None),
                ("softmax", 1e-6 * n**2, n / 100, None),
                ("performer:num_features=64", 1.5e-3 * n, n / 50, 0.4),
                ("uniform", 1e-4 * n, n / 100, None),
            ):
                fields: dict[str, Any] = {"tokens": n, "batch_size": batch, "group": f"{batch} {n}"}
                if name == "softmax:impl=naive" and n == 4096:
                    bench.cell(name, status="oom", **fields)
                    continue
                metrics: dict[str, Any] = {
                    "peak_memory_mib": batch * memory, "noise_floor_pct": 0.5, "macs_g": n / 1e3,
                    "counted_macs_g": n / 1e3, "ptflops_macs_g": n / (2e3 if name == "softmax" else 1e3),
                    "macs_note": "ptflops finds 50 % less: it does not see attention" if name == "softmax" else None,
                    "work_gflop": 1.0, "moved_mib": 10.0, "intensity_flop_byte": 5.0, "achieved_gflop_s": 20.0,
                    "peak_gflop_s": 100.0, "copy_gb_s": 10.0, "fraction_of_peak": 0.2, "output_error": error,
                    "map_error": error, "uniform_error": error and 0.9, "error_target": error and "softmax",
                    "error_on": error and "random q, k",
                }  # fmt: skip
                bench.cell(name, batch * latency, **fields, **metrics)
    return bench
