"""Exact sparse attention against explicit and fused softmax and the entmax package, in one run, alternating.

    python benchmarks/sparse_attention.py [--std 0.3] [--alpha 1.5 2 1.3] [--tokens 64 256 1024 4096 16384] [--memory]

Eight heads of width 64, 4,096 tokens a batch (at N = 16,384 one image), fp32, Gaussian queries and keys: scores of
standard deviation `--std`. Medians in ms, forward and forward + backward, their ratios to explicit softmax, and the
package's time over ours. A side takes part in rounds until it has used `--seconds`, in one at least. With
`--memory` instead the peak of forward + backward in MiB, above q, k, v and the output's gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import entmax
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp import machine
from vitcmp.kernels.ops.entmax import attend_on_cpu
from vitcmp.metrics.memory import measure_memory, return_freed_memory

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
MAX_EXPLICIT_TOKENS = 4096
"""Beyond, all scores at once would not fit in the memory of most machines."""


def explicit(q: Tensor, k: Tensor, v: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
    return weights(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)) @ v


def package(alpha: float) -> Callable[..., Tensor]:
    known = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}
    return partial(known.get(alpha, partial(entmax.entmax_bisect, alpha=alpha)), dim=-1)


def cores(alphas: list[float], tokens: int) -> dict[str, Core]:
    found: dict[str, Core] = {"softmax, fused": F.scaled_dot_product_attention}
    if tokens <= MAX_EXPLICIT_TOKENS:
        found["softmax, explicit"] = partial(explicit, weights=partial(torch.softmax, dim=-1))
    for alpha in alphas:
        found[f"entmax {alpha:g}"] = partial(attend_on_cpu, alpha=torch.full((1, 1, 1, 1), alpha))
        if tokens <= MAX_EXPLICIT_TOKENS:
            found[f"entmax {alpha:g}, package"] = partial(explicit, weights=package(alpha))
    return found


def print_times(found: dict[str, Core], inputs: list[Tensor], upstream: Tensor, rounds: int, seconds: float) -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    spent = dict.fromkeys(found, 0.0)
    for number in range(rounds + 1):
        for name, core in found.items():
            if number > 1 and spent[name] > seconds:
                continue
            start = time.perf_counter()
            with torch.no_grad():
                core(*inputs)
            middle = time.perf_counter()
            torch.autograd.grad(core(*inputs), inputs, upstream)
            end = time.perf_counter()
            if number:  # the first round warms up, and compiles
                spent[name] += end - start
                times[name].append(((middle - start) * 1e3, (end - middle) * 1e3))
    medians = {name: [statistics.median(side) for side in zip(*both, strict=True)] for name, both in times.items()}
    base = medians.get("softmax, explicit", [float("nan")] * 2)
    for name, own in medians.items():
        peer = medians.get(f"{name}, package")
        ahead = "".join(f"{theirs / ours:9.1f}" for theirs, ours in zip(peer, own, strict=True)) if peer else ""
        print(f"{name:22}{own[0]:10.2f}{own[1]:10.2f}{own[0] / base[0]:8.2f}{own[1] / base[1]:8.2f}{ahead}", flush=True)


def print_memory(found: dict[str, Core], inputs: list[Tensor], upstream: Tensor) -> None:
    for name, core in found.items():
        small = [x[:, :, :16].detach().requires_grad_() for x in inputs]
        torch.autograd.grad(core(*small).sum(), small)  # compiles
        used = measure_memory(
            torch.device("cpu"),
            inference=lambda core=core: core(*[x.detach() for x in inputs]),
            forward=lambda core=core: core(*inputs),
            backward=lambda out: torch.autograd.grad(out, inputs, upstream),
        )
        print(f"{name:22}{used['peak_memory_mib'] or float('nan'):10.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--std", type=float, default=1.0)
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.5, 2.0, 1.3])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        return_freed_memory()
    print(machine.hardware(torch.device("cpu")), f"torch {torch.__version__}, scores of std {options.std}")
    for tokens in options.tokens:
        batch = max(1, 4096 // tokens)
        q, k, v = (torch.randn(batch, 8, tokens, 64) for _ in range(3))
        q *= options.std
        inputs, upstream = [x.requires_grad_() for x in (q, k, v)], torch.randn_like(v)
        found = cores(options.alpha, tokens)
        if options.memory:
            print(f"\nN = {tokens}, batch {batch}: MiB of forward + backward")
            print_memory(found, inputs, upstream)
        else:
            print(f"\nN = {tokens}, batch {batch}: ms forward, with backward; over explicit softmax; package's / ours")
            print_times(found, inputs, upstream, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
