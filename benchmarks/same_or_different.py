"""How often `vitcmp bench` tells softmax from its copy (it should not), and from copies that are 5 and 10 % slower.

    python benchmarks/same_or_different.py [--runs 50] [--tokens 256]

Each run is a process of its own that benches softmax and three plug-in files, written here: a copy of softmax's file,
and two that wait, after each call, for 5 or 10 % of what it took. Two are different where neither the interval of
their ratio nor the noise floor of the run's A/A test makes a tie.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from tabulate import tabulate

from vitcmp.attention import softmax
from vitcmp.metrics.statistics import is_tie, paired_ratio

WAIT = """

import time

_build = build


def build(layer, config):
    block = _build(layer, config)
    forward = block.forward

    def slower(*inputs):
        start = time.perf_counter()
        out = forward(*inputs)
        end = start + {factor} * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return out

    block.forward = slower
    return block
"""
COPIES = {"same.py": 1.0, "slower5.py": 1.05, "slower10.py": 1.10}


def write_copies(folder: Path) -> None:
    source = Path(softmax.__file__).read_text()
    for name, factor in COPIES.items():
        (folder / name).write_text(source + (WAIT.format(factor=factor) if factor > 1 else ""))


def bench(folder: Path, tokens: int) -> dict[str, dict[str, Any]]:
    """One run's cells, by mechanism."""
    command = [sys.executable, "-m", "vitcmp", "--json", "--results", "results", "bench", "--tokens", str(tokens)]
    command += [
        "--no-memory",
        "--no-errors",
        *(part for name in ("softmax", *COPIES) for part in ("--attention", name)),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {cell["attention"]: cell for cell in json.loads(done.stdout)["cells"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    different: dict[str, list[bool]] = {name: [] for name in COPIES}
    ratios: dict[str, list[float]] = {name: [] for name in COPIES}
    rounds: dict[str, list[int]] = {name: [] for name in COPIES}
    floors: list[float] = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            write_copies(Path(folder))
            cells = bench(Path(folder), options.tokens)
        original = cells["softmax"]
        floors.append(original["noise_floor_pct"])
        for name in COPIES:
            samples = cells[name]["latency_samples_ms"], original["latency_samples_ms"]
            ratio = paired_ratio(*samples)
            different[name].append(not is_tie(ratio, original["noise_floor_pct"] / 100))
            ratios[name].append(ratio.value)
            rounds[name].append(min(map(len, samples)))
    rows = []
    for name, factor in COPIES.items():
        test = binomtest(sum(different[name]), options.runs)
        low, high = test.proportion_ci(method="wilson")
        rows.append([
            f"{factor:.2f}", f"{statistics.median(ratios[name]):.3f}", f"{min(ratios[name]):.3f}",
            f"{max(ratios[name]):.3f}", f"{test.k} of {options.runs}", f"{low:.0%} to {high:.0%}",
            f"{statistics.median(rounds[name]):.0f}", f"{max(rounds[name])}",
        ])  # fmt: skip
    headers = ["slower by", "median ratio", "least", "most", "called different", "95 %", "rounds", "most rounds"]
    print(tabulate(rows, headers, disable_numparse=True))
    print(f"noise floor: median {statistics.median(floors):.2f} %, at most {max(floors):.2f} %")


if __name__ == "__main__":
    main()
