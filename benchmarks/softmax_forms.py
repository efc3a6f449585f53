"""Whether `auto` takes the quickest form of each operator on this CPU.

    python benchmarks/softmax_forms.py                 # softmax attention
    python benchmarks/softmax_forms.py --operators     # every operator against its other forms

Softmax: cores of [batch, 4 heads, N, K], about 4,096 tokens a batch, widths 12, 32 and 64, N = 64, 256 and 1,024, in
fp32 and bf16; forward, and with backward. Operators: at 64 and 1,024 tokens (layers: 1,024 and 8,192 rows). All forms
take turns, with the allocator set as in training. A cell is marked where the 95 % interval of the paired ratio of the
form that auto takes to the quickest one lies wholly above 1.03; then the script exits with 1. `vitcmp doctor --measure`
measures what auto chooses by, and `VITCMP_PROFILE=none` shows what it takes without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from tabulate import tabulate

from vitcmp import machine
from vitcmp.kernels import COMPILED, Operator, forms, operators
from vitcmp.kernels.operator import can_run, leaves_of
from vitcmp.metrics.latency import interleaved_ms, median_and_iqr
from vitcmp.metrics.statistics import paired_ratio

CPU = torch.device("cpu")
MOST_SLOWER = 1.03
Cell = tuple[Operator, torch.dtype, tuple[int, ...], bool]


def of_softmax() -> Iterator[Cell]:
    op = operators()["softmax_attention"]
    for dtype in op.dtypes:
        for width in (12, 32, 64):
            for tokens in (64, 256, 1024):
                for trains in (False, True):
                    yield op, dtype, (width, tokens, tokens), trains


def of_operators() -> Iterator[Cell]:
    for name, op in operators().items():
        for dtype in op.dtypes if name != "softmax_attention" else ():
            for sizes in op.grid:
                is_attention = len(sizes) == 3 and sizes[1] == sizes[2]
                if is_attention and sizes[1] not in (64, 1024):
                    continue
                for trains in (False, True) if op.has_gradient else (False,):
                    yield op, dtype, sizes, trains


def compare(cell: Cell, rounds: int) -> tuple[list[str], bool]:
    """A line of the table, and whether auto is behind."""
    op, dtype, sizes, trains = cell
    args = op.example(dtype, sizes)
    names = [f for f in op.choices if f != COMPILED or can_run(op, args, dtype, trains)]
    calls = {name: lambda name=name: op.run(name, args, trains) for name in names}
    samples = interleaved_ms(calls, rounds, CPU)
    times = {name: median_and_iqr(found)[0] for name, found in samples.items()}
    with torch.set_grad_enabled(trains):
        taken = op.quickest(*leaves_of(args, trains))
    best = min(times, key=lambda name: times[name])
    ratio = paired_ratio(samples[taken], samples[best])
    behind = ratio.low > MOST_SLOWER
    listed = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())
    slower = "" if taken == best else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    place = [op.name, forms.FORMATS[dtype], "x".join(map(str, sizes)), "both" if trains else "forward"]
    return [*place, listed, taken, slower, "BEHIND" if behind else ""], behind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", action="store_true", help="all operators but softmax attention")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    machine.keep_freed_memory()
    rows, behind = [], 0
    for cell in of_operators() if options.operators else of_softmax():
        line, is_behind = compare(cell, options.rounds)
        rows.append(line)
        behind += is_behind
    facts, profile = machine.hardware(CPU), forms.active()
    print(f"{facts['cpu']} ({facts['cpu_kind']}), {facts['threads']} threads, torch {torch.__version__}, "
          f"profile {profile.digest} of {len(profile.cells)} measurements")  # fmt: skip
    headers = ["operator", "format", "sizes", "passes", "ms", "auto takes", "times the quickest", ""]
    print(tabulate(rows, headers, disable_numparse=True))
    print(f"{behind} of {len(rows)} cells are more than 3 % behind the quickest form, beyond noise")
    return int(behind > 0)


if __name__ == "__main__":
    sys.exit(main())
