"""Every mechanism's core against its public implementations, or a plain transcription of its paper.

    python benchmarks/mechanisms.py                              # all; more than an hour
    python benchmarks/mechanisms.py --only performer --tokens 64 256
    python benchmarks/mechanisms.py --table                      # of the records that there are

Eight heads of width 64 and 4,096 tokens a batch (at N = 16,384 two heads of one image), fp32, normal q, k and v; no
projections on either side (`xca`, which mixes channels, with them on both). Rivals are the plug-in mechanisms in
`peers/`, measured by `vitcmp bench`: in turn in one worker process, each call's peak memory in a process of its own. A
ratio is the fastest rival's time over ours, so above 1 we are ahead; a rival that ran out of memory or of time has lost
that size. The records go to `results/speed`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from vitcmp import attention, machine, store
from vitcmp.configs import BenchConfig, RuntimeConfig, resolve_run
from vitcmp.metrics.statistics import is_tie, paired_ratio
from vitcmp.workflows import bench

PEERS = Path(os.path.relpath(Path(__file__).parent / "peers"))
"""Relative, as it stands in the records."""
SPARSE = ("entmax", "sparsemax", "entmax:alpha=1.3")
RIVALS = {
    "softmax": ("softmax:impl=fused", "softmax_paper"),
    **{spec: (f"{spec}{',' if ':' in spec else ':'}impl=package",) for spec in SPARSE},
    "sigmoid": ("sigmoid_paper",),
    "differential": ("differential_timm", "differential_timm:fused=false", "differential_paper"),
    "gated-positional": ("gated_positional_paper",),
    "linear": ("linear_paper",),
    "performer": ("performer_pytorch",),
    "efficient": ("linear_attention_transformer", "efficient_paper"),
    "cosformer": ("cosformer_paper",),
    "focused-linear:conv_kernel_size=0": ("focused_linear_paper",),
    "xca:lpi=false": ("xca_timm",),
    "linformer": ("linformer_package", "linformer_paper"),
    "nystromformer:conv_kernel_size=0": ("nystrom_attention", "nystromformer_huggingface"),
    "agent:conv_kernel_size=0": ("agent_paper",),
    "spatial-reduction": ("spatial_reduction_paper", "spatial_reduction_paper:fused=false"),
    "reformer": ("reformer_pytorch", "reformer_huggingface"),
    "local": ("local_paper", "local_attention_package"),
    "shifted-window": ("shifted_window_paper",),
    "dilated": ("dilated_paper",),
    "hybrid": ("hybrid_paper",),
}
"""Ours, without the convolutions that their rivals lack, and the rivals: files of `peers`, or forms of ours."""
TOKENS = (64, 256, 1024, 4096, 16384)
MODES = {"forward": "forward", "train-step": "forward + backward"}


def measure(ours: str, tokens: Iterable[int], runtime: RuntimeConfig) -> None:
    model = replace(resolve_run({"dataset": "fake"}).model, pool="mean")
    level = "attention" if ours.startswith("xca") else "core"  # which mixes channels, so it has no core
    for count in tokens:
        heads = 8 if count <= 4096 else 2
        for mode in MODES:
            config = BenchConfig(
                level=level, mode=mode, tokens=count, batch_size=max(1, 4096 // count), rounds=10, max_seconds=0.6,
                timeout=30.0, counts=False, errors=False, memory=mode != "forward",
            )  # fmt: skip
            sized = replace(model, dim=64 * heads, num_heads=heads)
            bench.run(bench.cells_of([ours, *map(_spec, RIVALS[ours])], sized, config), runtime, _tell)


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == "cell":
        record = event["record"]
        outcome = f"{record.metrics['latency_ms']:.2f} ms" if record.status == "ok" else record.status
        where = [record.config[name] for name in ("tokens", "mode", "attention")]
        print(*where, outcome, record.error or "", file=sys.stderr, flush=True)


def newest(results: str) -> dict[tuple[str, str, int], store.Record]:
    """The last record of each mechanism, mode and token count."""
    found = {}
    for record in store.read(results):
        c = record.config
        found[_name(c["attention"]), c["mode"], c["tokens"]] = record
    return found


def _spec(rival: str) -> str:
    """What `vitcmp bench` takes."""
    stem, colon, options = rival.partition(":")
    file = PEERS / f"{stem}.py"
    return f"{file}{colon}{options}" if file.exists() else rival


def _name(spec: str) -> str:
    """The inverse, of what stands in a record."""
    return spec.rpartition("/")[2].replace(".py", "")


def rows(ours: str, records: dict[tuple[str, str, int], store.Record]) -> Iterable[list[str]]:
    """A line a token count: our time, the fastest rival and its time over ours in both modes, and memory."""
    name, rivals = attention.canonical(ours), [_name(attention.canonical(_spec(rival))) for rival in RIVALS[ours]]
    for tokens in TOKENS:
        line = [ours.partition(":conv")[0], f"{tokens:,}"]
        for mode in MODES:
            own = records.get((name, mode, tokens))
            if own is None:
                break
            if own.status != "ok":
                line += [own.status, ""]
                continue
            theirs = {rival: records[rival, mode, tokens] for rival in rivals if (rival, mode, tokens) in records}
            line += [f"{own.metrics['latency_ms']:.3g}", _against(own, theirs)]
        else:
            yield [*line, *_memory(name, rivals, tokens, records)]


def _against(own: store.Record, theirs: dict[str, store.Record]) -> str:
    timed = {rival: r for rival, r in theirs.items() if r.status == "ok" and r.metrics["group"] == own.metrics["group"]}
    lost = ", ".join(f"{rival}: {r.status}" for rival, r in theirs.items() if r.status != "ok")
    if not timed:
        return lost
    best = min(timed, key=lambda rival: timed[rival].metrics["latency_ms"])
    ratio = paired_ratio(timed[best].metrics["latency_samples_ms"], own.metrics["latency_samples_ms"])
    verdict = "tie" if is_tie(ratio, own.metrics["noise_floor_pct"] / 100) else "" if ratio.value > 1 else "BEHIND"
    return " ".join(filter(None, [f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})", best, verdict]))


def _memory(ours: str, rivals: list[str], tokens: int, records: dict[tuple[str, str, int], store.Record]) -> list[str]:
    """Peak MiB forward and forward + backward: ours, and the rival's that takes least."""
    cells = []
    for metric in ("inference_memory_mib", "peak_memory_mib"):
        own, *theirs = (
            records[name, "train-step", tokens].metrics.get(metric)
            for name in (ours, *rivals)
            if (name, "train-step", tokens) in records
        )
        known = [mib for mib in theirs if mib is not None]
        cells.append(f"{'-' if own is None else f'{own:.0f}'} / {f'{min(known):.0f}' if known else '-'}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="MECHANISM")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--results", default="results/speed")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    runtime = RuntimeConfig(results=args.results, device="auto")
    if not args.table:
        for ours in args.only:
            measure(ours, args.tokens, runtime)
    records = newest(args.results)
    facts = machine.hardware(machine.pick_device("auto"))
    print(f"{facts['device']}, {facts['cpu']}, {facts['threads']} threads, torch {torch.__version__}")
    headers = ["mechanism", "N", "forward ms", "fastest rival / ours", "fwd + bwd ms", "fastest rival / ours",
               "forward MiB, ours / least", "fwd + bwd MiB, ours / least"]  # fmt: skip
    table = [line for ours in args.only for line in rows(ours, records)]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
