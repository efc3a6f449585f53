"""This checkout against another one, such as the commit before: training steps and cores, in turn in one run.

    git worktree add ../before HEAD~1
    python benchmarks/against_checkout.py ../before [--only vit-48x4 softmax]

Each side is a process of its own, and the sides take turns, a round each. Training: as `vitcmp train` does a step on a
batch of 128, bf16 where it is native, prepared batches. Cores: 8 heads of width 64 and about 4,096 tokens a batch,
fp32, N = 64 and 1,024, forward, and with backward. A ratio is the other's time over ours; the script exits with 1
where a 95 % interval lies wholly below 0.97.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

PRESETS = ("vit-48x4", "vit")
MECHANISMS = ("softmax", "linear", "performer", "entmax", "nystromformer")
MIN_SECONDS = 0.05
"""Of a sample."""


def task_of(name: str) -> Any:
    """In a side's process: what is timed, by public names that both checkouts have."""
    import torch

    from vitcmp import attention, machine
    from vitcmp.configs import resolve_run
    from vitcmp.metrics.inference import micro_batch
    from vitcmp.models.vit import ViT
    from vitcmp.workflows import train

    torch.set_num_threads(2)
    machine.keep_freed_memory()
    what, *rest = name.split()
    if what in PRESETS:
        config = resolve_run({"dataset": "fake", "preset": what, "batch_size": 128})
        model = ViT(config.model)
        size, precision = micro_batch(model, torch.device("cpu"), 128), machine.precision("auto", torch.device("cpu"))
        lanes = train.lanes(config, torch.device("cpu"), size < 128)
        try:
            from vitcmp.models.fast import fast
        except ImportError:  # a checkout in which all blocks were fast
            fast = lambda model: model  # noqa: E731
        trained = fast(model).train()
        optimizer = train.make_optimizer(model, config.train, torch.device("cpu"))
        from vitcmp.data.augment import Batch

        labels = torch.arange(128) % 10
        batch = Batch(torch.randn(128, 3, 32, 32), labels, labels, torch.ones(128))
        return lambda: train.train_step(trained, batch, optimizer, config.train, size, precision, lanes)
    tokens, mode = int(rest[0]), rest[1]
    layer = attention.LayerConfig(512, 8, attention.TokenGrid.squarest(tokens))
    core = attention.load(what).build(layer).core
    x = torch.randn(max(1, 4096 // tokens), tokens, 3, 8, 64)
    q, k, v = (part.transpose(1, 2).requires_grad_(mode == "both") for part in x.unbind(2))

    def call() -> None:
        with torch.set_grad_enabled(mode == "both"):
            out = core(q, k, v)
        if mode == "both":
            torch.autograd.grad(out.square().mean(), (q, k, v))

    return call


def work() -> None:
    """Answers each line on standard input, a task's name, with the seconds that a call took."""
    import time

    tasks: dict[str, tuple[Any, int]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in tasks:
            call = task_of(name)
            for _ in range(3):
                start = time.perf_counter()
                call()
                taken = time.perf_counter() - start
            tasks[name] = call, max(1, round(MIN_SECONDS / taken))
        call, count = tasks[name]
        start = time.perf_counter()
        for _ in range(count):
            call()
        print((time.perf_counter() - start) / count, flush=True)


def side(checkout: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-W", "ignore", __file__, "--work"]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def ask(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(name, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=[*PRESETS, *MECHANISMS])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    from vitcmp.metrics.statistics import paired_ratio

    names = [n for n in options.only if n in PRESETS]
    names += [f"{n} {t} {m}" for n in options.only if n in MECHANISMS for t in (64, 1024) for m in ("forward", "both")]
    here, other = side(Path(__file__).resolve().parents[1]), side(options.other.resolve())
    rows, behind = [], 0
    for name in names:
        ours, theirs = [], []
        for number in range(options.rounds + 1):
            pair = [(here, ours), (other, theirs)]
            for process, samples in pair if number % 2 else reversed(pair):
                seconds = ask(process, name)
                if number:
                    samples.append(seconds)
        ratio = paired_ratio(theirs, ours)
        behind += ratio.high < 0.97
        middle = sorted(ours)[len(ours) // 2]
        rows.append([name, f"{1000 * middle:.2f}", f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"])
        print(*rows[-1], file=sys.stderr, flush=True)
    for process in (here, other):
        process.terminate()
    print(tabulate(rows, ["task", "ours, ms", "other's time / ours"], disable_numparse=True))
    return int(behind > 0)


if __name__ == "__main__":
    sys.exit(main())
