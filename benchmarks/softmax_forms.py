"""Fused against explicit softmax attention, forward and backward: what `impl=auto` chooses by.

    python benchmarks/softmax_forms.py

One core of [batch, 4 heads, N, K], with about as many tokens a batch at each N; the two forms take turns.
"""

from __future__ import annotations

import torch
from tabulate import tabulate

from vitcmp import machine
from vitcmp.attention.softmax import SoftmaxAttention, fused_is_quicker
from vitcmp.metrics.latency import interleaved_ms, median_and_iqr

CPU = torch.device("cpu")


def step(impl: str, q: torch.Tensor) -> None:
    SoftmaxAttention(impl, dropout=0.0)(q, q, q).sum().backward()
    q.grad = None


def main() -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (8, 16, 64):
            for tokens in (65, 197, 257, 1025):
                shape = (max(1, 4096 // tokens), 4, tokens, head_dim)
                q = torch.randn(shape, dtype=dtype, requires_grad=True)
                calls = {impl: lambda impl=impl, q=q: step(impl, q) for impl in ("merged", "fused")}
                merged, fused = (median_and_iqr(x)[0] for x in interleaved_ms(calls, 9, CPU).values())
                chosen = "fused" if fused_is_quicker(q) else "explicit"
                rows.append([str(dtype)[6:], head_dim, tokens, merged, fused, merged / fused, chosen])
    facts = machine.hardware(CPU)
    print(f"{facts['cpu']}, {facts['threads']} threads, native bf16: {facts['native_bf16']}, torch {torch.__version__}")
    headers = ["dtype", "K", "N", "explicit ms", "fused ms", "explicit / fused", "auto takes"]
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
