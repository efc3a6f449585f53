"""The forms of softmax attention: what `impl=auto` chooses by, and whether it chooses well here.

    python benchmarks/softmax_forms.py [--quick]

One core of [batch, 4 heads, N, K], with about as many tokens a batch at each N, in fp32, and bf16 where it is native;
forward, and forward + backward. The forms (explicit weights, torch's fused attention, compiled kernels) take turns,
with the allocator set as in training. Exits with 1 where auto takes one that is more than 10 % slower than another.
`--quick` leaves most sizes out.
"""

from __future__ import annotations

import argparse
import sys

import torch
from tabulate import tabulate

from vitcmp import machine
from vitcmp.attention.softmax import SoftmaxAttention, quickest
from vitcmp.metrics.latency import interleaved_ms, median_and_iqr

CPU = torch.device("cpu")
WIDTHS, TOKENS = (8, 12, 16, 32, 64), (17, 50, 65, 197, 257, 1025)
FORMS = ("merged", "fused", "numba")
QUICK_WIDTHS, QUICK_TOKENS = (12, 64), (17, 65, 257)
MOST_SLOWER = 1.1


def call(impl: str, qkv: list[torch.Tensor], trains: bool) -> None:
    with torch.set_grad_enabled(trains):
        y = SoftmaxAttention(impl, dropout=0.0)(*qkv)
    if trains:
        torch.autograd.grad(y, qkv, torch.ones_like(y))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two widths and three token counts")
    quick = parser.parse_args().quick
    machine.keep_freed_memory()
    facts = machine.hardware(CPU)
    rows, worst = [], 1.0
    for dtype in (torch.float32, torch.bfloat16) if facts["native_bf16"] else (torch.float32,):
        for width in QUICK_WIDTHS if quick else WIDTHS:
            for tokens in QUICK_TOKENS if quick else TOKENS:
                # As the projections hand them over: heads of a token lie beside each other.
                x = torch.randn(max(1, 4096 // tokens), tokens, 3, 4, width, dtype=dtype)
                qkv = [part.transpose(1, 2).requires_grad_() for part in x.unbind(2)]
                for trains in (False, True):
                    calls = {i: lambda i=i, qkv=qkv, t=trains: call(i, qkv, t) for i in FORMS}
                    times = {i: median_and_iqr(s)[0] for i, s in interleaved_ms(calls, 9, CPU).items()}
                    with torch.set_grad_enabled(trains):
                        taken = quickest(*qkv, dropout=0.0)
                    slower = times[taken] / min(times.values())
                    worst = max(worst, slower)
                    mark = f"{slower:.2f} times" if slower > MOST_SLOWER else ""
                    mode = "both" if trains else "forward"
                    rows.append([str(dtype)[6:], width, tokens, mode, *times.values(), taken, mark])
    print(f"{facts['cpu']}, {facts['threads']} threads, native bf16: {facts['native_bf16']}, torch {torch.__version__}")
    headers = ["dtype", "K", "N", "passes", *(f"{form} ms" for form in FORMS), "auto takes", "slower than the quickest"]
    print(tabulate(rows, headers, floatfmt=".2f"))
    print(f"auto is at most {worst:.2f} times as slow as the quickest form")
    return int(worst > MOST_SLOWER)


if __name__ == "__main__":
    sys.exit(main())
