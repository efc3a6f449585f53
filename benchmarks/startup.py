"""Seconds until `vitcmp --help` is printed and until `vitcmp train` has taken its first optimizer step.

    python benchmarks/startup.py

Both against `import torch` alone, each in a fresh process, in turn; the first round, which fills the caches of the
disk and of Python's bytecode, does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tabulate import tabulate

VITCMP = "import sys; from vitcmp.cli import main; sys.argv[0] = 'vitcmp'; main()"
# The process ends with the first step of whatever optimizer.
FIRST_STEP = """
import os
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
"""


def seconds(code: str, *arguments: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up times of vitcmp against that of torch.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds

    with tempfile.TemporaryDirectory() as results:
        cases = {
            "import torch": ("import torch",),
            "vitcmp --help": (VITCMP, "--help"),
            "vitcmp train, to the first step": (FIRST_STEP + VITCMP, "--results", results, "train"),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for round_number in range(rounds + 1):
            for name, case in cases.items():
                taken = seconds(*case)
                if round_number:
                    times[name].append(taken)

    torch_alone = statistics.median(times["import torch"])
    rows = []
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append([name, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{middle - torch_alone:+.2f}"])
    print(f"median (quartiles) of {rounds} fresh processes each")
    print(tabulate(rows, ["", "seconds", "beyond import torch"], disable_numparse=True))


if __name__ == "__main__":
    main()
