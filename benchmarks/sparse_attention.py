"""Exact sparse attention against explicit and fused softmax and the entmax package, in one run, alternating.

    python benchmarks/sparse_attention.py [--std 0.3] [--rounds 9]

Eight heads of width 64, fp32, Gaussian queries and keys: scores of standard deviation `--std`. Medians in ms, forward
and forward + backward, and the ratio to explicit softmax.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import entmax
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp import machine
from vitcmp.attention._entmax import attend_on_cpu

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)


def cores() -> dict[str, Core]:
    return {
        "softmax, explicit": lambda q, k, v: scores(q, k).softmax(dim=-1) @ v,
        "softmax, fused": F.scaled_dot_product_attention,
        "entmax 1.5": lambda q, k, v: attend_on_cpu(q, k, v, torch.full((1, 1, 1, 1), 1.5)),
        "entmax 1.5, package": lambda q, k, v: entmax.entmax15(scores(q, k), dim=-1) @ v,
        "sparsemax": lambda q, k, v: attend_on_cpu(q, k, v, torch.full((1, 1, 1, 1), 2.0)),
        "sparsemax, package": lambda q, k, v: entmax.sparsemax(scores(q, k), dim=-1) @ v,
        "entmax 1.3": lambda q, k, v: attend_on_cpu(q, k, v, torch.full((1, 1, 1, 1), 1.3)),
        "entmax 1.3, package": lambda q, k, v: entmax.entmax_bisect(scores(q, k), alpha=1.3, dim=-1) @ v,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--std", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    options = parser.parse_args()
    print(machine.hardware(torch.device("cpu")), f"torch {torch.__version__}, scores of std {options.std}")
    for tokens in options.tokens:
        batch = max(1, min(64, 4096 // tokens))
        q, k, v = (torch.randn(batch, 8, tokens, 64) for _ in range(3))
        q *= options.std
        inputs = [x.requires_grad_() for x in (q, k, v)]
        upstream = torch.randn_like(v)
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in cores()}
        for number in range(options.rounds + 1):
            for name, core in cores().items():
                start = time.perf_counter()
                with torch.no_grad():
                    core(*inputs)
                middle = time.perf_counter()
                torch.autograd.grad(core(*inputs), inputs, upstream)
                end = time.perf_counter()
                if number:  # the first round warms up, and compiles
                    times[name][0].append((middle - start) * 1e3)
                    times[name][1].append((end - middle) * 1e3)
        print(f"\nN = {tokens}, batch {batch}: ms forward, forward + backward; times explicit softmax")
        base = [statistics.median(t) for t in times["softmax, explicit"]]
        for name, both in times.items():
            forward, whole = (statistics.median(t) for t in both)
            print(f"{name:22}{forward:9.1f}{whole:9.1f}{forward / base[0]:8.2f}{whole / base[1]:8.2f}")


if __name__ == "__main__":
    main()
