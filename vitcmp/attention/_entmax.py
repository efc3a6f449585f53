"""alpha-entmax attention, exact and fast: p = [(alpha - 1) s - tau]_+ ^ (1 / (alpha - 1)), tau such that sum(p) = 1.

On the CPU the rows are compiled (`_entmax_cpu`): scores come from matrix products, a block of queries at a time; the
few entries above the threshold are kept, and the output and all gradients are made from them alone. Where rows are
dense, matrix products do that too, and the backward pass computes the scores again. So memory stays far below N^2.
Elsewhere, and for second derivatives, the same in torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

MAX_SCORES = 2**17
"""Scores of a block on the CPU, so that they stay in a core's cache from one product to the next."""
MIN_SPARSE_TOKENS = 128
"""Below, the support is too large a share of a row for sparse products to pay."""
MAX_DENSITY = 1 / 8
"""Share of non-zero weights up to which sparse products are quicker than dense ones."""
MAX_SUPPORT = 256
"""Mean size of the supports that are kept at most: this bounds the memory at large N."""
MAX_TORCH_SCORES = 2**24
"""Scores of a block in torch, where the backward pass computes them again; fewer are kept as they are."""
STEPS = {(torch.float32, True): 12, (torch.float64, True): 20, (torch.float32, False): 40, (torch.float64, False): 100}
"""Steps of the search in torch by number format, and whether alpha is at most 2."""


# In torch.


def threshold(z: Tensor, r: Tensor, convex: bool) -> Tensor:
    """tau of [..., 1] with sum([z - tau]_+ ^ r) = 1, for z of [..., N] whose maximum is 0; `convex`: all r >= 1.

    Newton's method on the norm sum(...)^(1 / r) = 1 from the left: for r >= 1 that is convex and nearly linear in tau,
    so few steps do and none overshoots. For r < 1 it has infinite slopes, where Newton's steps vanish: there every
    other step halves a bracket. The steps are fixed in number, so that nothing waits for the device.
    """
    low, high = torch.full_like(z[..., :1], -1), torch.zeros_like(z[..., :1])
    tau = low
    for step in range(STEPS[z.dtype, convex]):
        distance = (z - tau).clamp(min=0)
        total = _power(distance, r).sum(dim=-1, keepdim=True)
        slope = _power(distance, r - 1).sum(dim=-1, keepdim=True)
        following = tau + (total - total ** (1 - 1 / r)) / slope
        if not convex:
            low, high = torch.where(total >= 1, tau, low), torch.where(total >= 1, high, tau)
            safe = (following > low) & (following < high) & (step % 2 == 0)
            following = torch.where(safe, following, (low + high) / 2)
        tau = following
    return tau


def _power(x: Tensor, r: Tensor) -> Tensor:
    """x ^ r for x >= 0, and 0 at 0 whatever r; its derivative stays finite there."""
    return torch.where(x > 0, x.clamp(min=torch.finfo(x.dtype).tiny) ** r, 0)


class _Entmax(torch.autograd.Function):
    """Weights of [B, H, N, N] from scores; alpha is [1, H, 1, 1]. The backward pass is in closed form.

    With s = p^(2 - alpha) on the support and p' = s / sum(s): dz = s (dp - sum(p' dp)); with h = -p ln p, dalpha is
    the sum of dp ((p - p') / (alpha - 1)^2 + (h - p' sum(h)) / (alpha - 1))  (Correia et al., 2019, section 3.1).
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor, convex: bool) -> Tensor:
        r = 1 / (alpha - 1)
        z = (alpha - 1) * (scores - scores.amax(dim=-1, keepdim=True))
        p = _power((z - threshold(z, r, convex)).clamp(min=0), r)
        p = p / p.sum(dim=-1, keepdim=True)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dp,), (p, alpha) = gradients, ctx.saved_tensors
        s = _power(p, 2 - alpha)
        share = s / s.sum(dim=-1, keepdim=True)
        dz = s * (dp - (share * dp).sum(dim=-1, keepdim=True))
        if not ctx.needs_input_grad[1]:
            return dz, None, None
        h = torch.special.entr(p.clamp(min=torch.finfo(p.dtype).tiny)) * (p > 0)
        dalpha = (p - share) / (alpha - 1) ** 2 + (h - share * h.sum(dim=-1, keepdim=True)) / (alpha - 1)
        return dz, (dp * dalpha).sum_to_size(alpha.shape), None


def attend_in_torch(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, convex: bool, dropout: float = 0.0) -> Tensor:
    """The attention of q, k, v of [B, H, N, K], alpha > 1 of [1, H, 1, 1], `convex` where it is at most 2.

    Large ones go in blocks of queries, each computed again in the backward pass. Differentiable twice.
    """
    rows = max(16, MAX_TORCH_SCORES // (q.shape[0] * q.shape[1] * q.shape[2]))

    def attend(block: Tensor) -> Tensor:
        scores = block * block.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        return F.dropout(_Entmax.apply(scores, alpha, convex), dropout) @ v

    if rows >= q.shape[2]:
        return attend(q)
    return torch.cat([checkpoint(attend, block, use_reentrant=False) for block in q.split(rows, dim=2)], dim=2)


# On the CPU, compiled. Heads of all images form one axis, in groups that a block of scores holds.


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """The attention of q, k, v of [B, H, N, K] in fp32 or fp64, alpha > 1 of [1, H, 1, 1]."""
    batch, heads = q.shape[:2]
    flat = [x.flatten(0, 1).contiguous() for x in (q, k, v)]  # [B H, N, K]
    alphas = alpha.to(q.dtype).expand(batch, heads, 1, 1).flatten()
    return _attend(*flat, alphas)[0].unflatten(0, (batch, heads))


def _groups(heads: int, tokens: int) -> tuple[int, int]:
    """Heads of a group, and queries of a block."""
    if tokens**2 <= MAX_SCORES:
        return min(heads, MAX_SCORES // tokens**2), tokens
    return 1, max(32, MAX_SCORES // tokens)


def _capacity(heads: int, tokens: int) -> int:
    """Entries of supports that a group keeps."""
    if tokens < MIN_SPARSE_TOKENS:
        return 0
    group, _ = _groups(heads, tokens)
    return int(group * tokens * min(tokens * MAX_DENSITY, MAX_SUPPORT)) + tokens


@torch.library.custom_op("vitcmp::entmax_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> list[Tensor]:
    """The output, and what the backward pass needs: maxima, thresholds, supports, and which groups are dense."""
    from vitcmp.attention import _entmax_cpu as cpu

    result = all_out, all_top, all_tau, all_index, all_weight, all_ends, all_dense = _outputs(q, k, v, alpha)
    heads, tokens, _ = q.shape
    group, rows = _groups(heads, tokens)
    factor = (alpha - 1) * q.shape[-1] ** -0.5
    r = (1 / (alpha - 1)).numpy()

    def run(number: int, part: slice) -> None:
        out, top, tau, ends = (x[part] for x in (all_out, all_top, all_tau, all_ends))
        index, weight = all_index[number], all_weight[number]
        scaled, keys, values = q[part] * factor[part, None, None], k[part].transpose(-2, -1), v[part]
        is_dense, used = not index.numel(), 0
        for block in _blocks(tokens, rows):
            z = scaled[:, block] @ keys
            top[:, block] = z.amax(dim=-1)
            views = z.numpy(), top[:, block].numpy(), r[part]
            if not is_dense:
                limit = min(len(index) - tokens, used + int(MAX_DENSITY * z.numel()))
                used = cpu.forward_sparse(
                    *views, values.numpy(), out[:, block].numpy(), tau[:, block].numpy(), index.numpy(),
                    weight.numpy(), ends[:, block].numpy(), used, limit,
                )  # fmt: skip
                is_dense = used < 0
            if is_dense:
                cpu.forward_dense(*views, tau[:, block].numpy())
                out[:, block] = z @ values
        all_dense[number] = is_dense

    _run(run, heads, group)
    return result


@_attend.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> list[Tensor]:
    heads, tokens, _ = q.shape
    groups, capacity = -(-heads // _groups(heads, tokens)[0]), _capacity(heads, tokens)
    return [
        torch.empty_like(v),
        q.new_empty(heads, tokens),
        q.new_empty(heads, tokens),
        q.new_empty(groups, capacity, dtype=torch.int32),
        q.new_empty(groups, capacity),
        q.new_empty(heads, tokens, dtype=torch.int64),
        q.new_empty(groups, dtype=torch.bool),
    ]


@torch.library.custom_op("vitcmp::entmax_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, saved: list[Tensor], with_alpha: bool
) -> list[Tensor]:
    """Gradients of q, k, v and alpha."""
    from vitcmp.attention import _entmax_cpu as cpu

    heads, tokens, width = q.shape
    group, rows = _groups(heads, tokens)
    scale = width**-0.5
    factor = (alpha - 1) * scale
    r = (1 / (alpha - 1)).numpy()
    all_top, all_tau, all_index, all_weight, all_ends, all_dense = saved
    gradients = [torch.zeros_like(x) for x in (q, k, v, alpha)]

    def run(number: int, part: slice) -> None:
        dq, dk, dv, dalpha = (x[part] for x in gradients)
        if not all_dense[number]:
            scaled, keys = q[part] * scale, k[part] * scale
            inputs = [x.numpy() for x in (scaled, keys, v[part], dout[part])]
            cpu.backward_sparse(  # type: ignore[call-arg]
                *inputs, r[part], all_index[number].numpy(), all_weight[number].numpy(), all_ends[part].numpy(),
                dq.numpy(), dk.numpy(), dv.numpy(), dalpha.numpy(), with_alpha,
            )  # fmt: skip
            return
        scaled, keys, values = q[part] * factor[part, None, None], k[part].transpose(-2, -1), v[part].transpose(-2, -1)
        for block in _blocks(tokens, rows):
            p, upstream = scaled[:, block] @ keys, dout[part, block]
            cpu.weights(p.numpy(), all_top[part, block].numpy(), all_tau[part, block].numpy(), r[part])
            dv += p.transpose(-2, -1) @ upstream
            dz = upstream @ values
            cpu.backward_dense(p.numpy(), dz.numpy(), r[part], dalpha.numpy(), with_alpha)
            dz *= scale
            dq[:, block] = dz @ k[part]
            dk += dz.transpose(-2, -1) @ q[part, block]

    _run(run, heads, group)
    return gradients


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, saved: list[Tensor], with_alpha: bool
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, alpha)]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, alpha, *saved = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return tuple(_backward(gradients[0].contiguous(), q, k, v, alpha, saved, ctx.needs_input_grad[3]))
    # Someone will differentiate the gradients: torch can.
    of_one = attend_in_torch(q[None], k[None], v[None], alpha.view(1, -1, 1, 1), convex=bool((alpha <= 2).all()))
    leaves = [x for x in (q, k, v, alpha) if x.requires_grad]
    found = iter(torch.autograd.grad(of_one[0], leaves, gradients[0], create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in (q, k, v, alpha))


_attend.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.vitcmp.entmax_attention)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Both products in full: the share of the second that sparsity saves depends on the data."""
    heads, tokens, width = q_shape
    return 4 * heads * tokens**2 * width


def _blocks(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _run(task: Callable[[int, slice], None], heads: int, group: int) -> None:
    """`task(number, heads)` for every group, on as many threads as torch uses; the result depends on neither."""
    parts = [slice(start, start + group) for start in range(0, heads, group)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1:
        for number, part in enumerate(parts):
            task(number, part)
        return
    # The modes are a thread's own.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    list(_pool(threads, os.getpid()).map(mode()(task), range(len(parts)), parts))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose own matrix products are of one thread each; a forked child gets its own."""
    total = torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # else torch would take the others' number at this thread's first operation
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="entmax", initializer=begin)
    started = Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(total)
    return pool
