"""Does measured cost grow as theory says? Exponents of memory and time over N >= 1,024, by `vitcmp bench`.

    python benchmarks/growth.py [--results DIR]

Memory of softmax where q, k and v exceed 64 MiB: 2 with explicit weights, 1 fused. Time of what is linear in N: 1,
and at 16,384 tokens at most 18 times that at 1,024. Prints each exponent with its bounds and exits with 1 if one is
outside.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from typing import Any

from vitcmp.configs import BenchConfig, RuntimeConfig, resolve_run
from vitcmp.metrics.statistics import exponent
from vitcmp.workflows import bench

MODEL = replace(resolve_run({"dataset": "fake"}).model, pool="mean")
MEMORY = (
    BenchConfig(level="core", tokens="1024..4096", batch_size=8, max_seconds=0.1, errors=False),
    replace(MODEL, dim=1024, num_heads=2),
    "peak_memory_mib",
    {"softmax:impl=naive": (1.8, 2.2), "softmax:impl=fused": (0.8, 1.2)},
)
TIME = (
    BenchConfig(level="core", tokens="1024..16384", batch_size=4, memory=False, counts=False, errors=False),
    replace(MODEL, dim=512, num_heads=8),
    "latency_ms",
    dict.fromkeys(("linear", "performer", "linformer", "nystromformer"), (0.8, 1.2)),
)
MOST_TIMES = 18
"""Of what is linear in N, over 16 times the tokens."""


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == "cell":
        print(".", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", default=tempfile.mkdtemp())
    results = parser.parse_args().results
    outside = 0
    for config, model, metric, bounds in (MEMORY, TIME):
        cells = bench.cells_of(list(bounds), model, config)
        records = bench.run(cells, RuntimeConfig(results=results), _tell)
        qkv_mib = 3 * config.several("batch_size")[0] * model.dim * 1024 * 4 / 2**20
        print(f"\n{metric}, dim {model.dim}, {model.num_heads} heads: q, k, v are {qkv_mib:.0f} MiB at 1,024 tokens")
        for name, (low, high) in bounds.items():
            points = {r.config["tokens"]: r.metrics[metric] for r in records if r.config["attention"] == name}
            fit = exponent(list(points), list(points.values()))
            assert fit is not None
            times = points[max(points)] / points[min(points)]
            inside = low <= fit.value <= high and (metric != "latency_ms" or times <= MOST_TIMES)
            outside += not inside
            values = ", ".join(f"{n}: {value:.1f}" for n, value in points.items())
            print(f"  {name:<20} N^{fit.value:.2f} ({fit.low:.2f} to {fit.high:.2f}), wanted {low} to {high}; "
                  f"{times:.1f} times in all: {'holds' if inside else 'DOES NOT HOLD'}   {values}")  # fmt: skip
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
