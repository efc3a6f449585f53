"""alpha-entmax attention, exact and fast: p = [(alpha - 1) s - tau]_+ ^ (1 / (alpha - 1)), tau such that sum(p) = 1.

On the CPU a kernel works on the rows (`numba.entmax`): scores come from matrix products, a block of queries at a time;
the entries above the threshold are kept, and the output and all gradients are made from them alone. Where rows are
dense, matrix products do that too, and the backward pass computes the scores again. So memory stays far below N^2.
Elsewhere, and for second derivatives, the same in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.ops.softmax import SQUARES, example, sizes_of
from vitcmp.kernels.tensors import wide
from vitcmp.kernels.threads import run_beside
from vitcmp.kernels.torch_operator import differentiable, torch_operator

MAX_SCORES = 2**17
"""Scores of a block on the CPU, so that they stay in a core's cache from one product to the next."""
MAX_DENSITY = 0.6
"""Share of non-zero weights up to which sparse products are quicker than dense ones."""
MAX_SUPPORT = 512
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
    rows = max(16, MAX_TORCH_SCORES // max(1, q.shape[0] * q.shape[1] * q.shape[2]))

    def attend(block: Tensor) -> Tensor:
        scores = block * block.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        return F.dropout(_Entmax.apply(scores, alpha, convex), dropout) @ v

    if rows >= q.shape[2]:
        return attend(q)
    return torch.cat([checkpoint(attend, block, use_reentrant=False) for block in q.split(rows, dim=2)], dim=2)


# On the CPU, compiled. Heads of all images form one axis, in groups that a block of scores holds.


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, convex: bool = True) -> Tensor:
    """The attention of q, k, v of [B, H, N, K] in fp32 or fp64, alpha > 1 of [1, H, 1, 1]."""
    batch, heads = q.shape[:2]
    flat = [x.flatten(0, 1).contiguous() for x in (q, k, v)]  # [B H, N, K]
    alphas = alpha.to(q.dtype).expand(batch, heads, 1, 1).flatten()
    return _attend(*flat, alphas)[0].unflatten(0, (batch, heads))


def _groups(heads: int, tokens: int) -> tuple[int, int]:
    """Heads of a group, and queries of a block."""
    if tokens**2 <= MAX_SCORES:
        return max(1, min(heads, MAX_SCORES // tokens**2)), tokens
    return 1, max(32, MAX_SCORES // tokens)


def _capacity(heads: int, tokens: int) -> int:
    """Entries of supports that a group keeps, with room for a row and a vector more."""
    group, _ = _groups(heads, tokens)
    return int(group * tokens * min(tokens * MAX_DENSITY, MAX_SUPPORT)) + tokens + 16


@torch_operator("entmax_attention")
def _attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> list[Tensor]:
    """The output, and what the backward pass needs: maxima, thresholds, supports, and which groups are dense."""
    from vitcmp.kernels.numba import entmax as cpu

    result = all_out, *_, all_dense = _outputs(q, k, v, alpha)
    heads, tokens, width = q.shape
    group, rows = _groups(heads, tokens)
    factor, r = ((alpha - 1) * width**-0.5).numpy(), (1 / (alpha - 1)).numpy()
    values, out, top, tau, index, weight, ends = (x.numpy() for x in (v, *result[:-1]))
    share = MAX_DENSITY * tokens

    def run(number: int, part: slice, scratch: Tensor) -> None:
        keys, is_dense, used, first = k[part].transpose(-2, -1), False, 0, part.start
        for block in _blocks(tokens, rows):
            z = _product(q[part, block], keys, scratch)
            if not is_dense:
                used = cpu.forward_sparse(
                    z.numpy(), first, block.start, factor, r, values, out, top, tau, index, weight, ends, number, used,
                    share,
                )  # fmt: skip
                is_dense = used < 0
            if is_dense:
                cpu.forward_dense(z.numpy(), first, block.start, factor, r, top, tau)
                all_out[part, block] = z @ v[part]
        all_dense[number] = is_dense

    _run(run, q, group, rows)
    if not v.sum().isfinite():
        all_out += (v * 0).sum(dim=1, keepdim=True)  # the products leave out weights of 0, but 0 times NaN is NaN
    return list(result)


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


@torch_operator("entmax_attention_backward")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, saved: list[Tensor], with_alpha: bool
) -> list[Tensor]:
    """Gradients of q, k, v and alpha."""
    from vitcmp.kernels.numba import entmax as cpu

    if not (v.sum() + dout.sum()).isfinite():  # as above, of all products
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v, alpha)]
            return list(torch.autograd.grad(_of_heads(*leaves), leaves, dout))

    heads, tokens, width = q.shape
    group, rows = _groups(heads, tokens)
    scale = width**-0.5
    factor, r = ((alpha - 1) * scale).numpy(), (1 / (alpha - 1)).numpy()
    gradients = [torch.empty_like(q), *(torch.zeros_like(x) for x in (k, v, alpha))]
    inputs, results = [x.numpy() for x in (q, k, v, dout)], [x.numpy() for x in gradients]
    top, tau, index, weight, ends, dense = (x.numpy() for x in saved)

    def run(number: int, part: slice, scratch: Tensor) -> None:
        first, last = part.start, min(part.stop, heads)
        if not dense[number]:
            cpu.backward_sparse(*inputs, first, last, r, scale, index, weight, ends, number, *results, with_alpha)
            return
        dq, dk, dv, _ = (x[part] for x in gradients)
        keys, values = k[part].transpose(-2, -1), v[part].transpose(-2, -1)
        for block in _blocks(tokens, rows):
            queries, upstream = q[part, block], dout[part, block]
            p = _product(queries, keys, scratch)
            cpu.weights(p.numpy(), first, block.start, factor, r, top, tau)
            dv += p.transpose(-2, -1) @ upstream
            dz = upstream @ values
            cpu.backward_dense(p.numpy(), dz.numpy(), first, r, scale, results[-1], with_alpha)
            dq[:, block] = dz @ k[part]
            dk += dz.transpose(-2, -1) @ queries

    _run(run, q, group, rows)
    return gradients


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, saved: list[Tensor], with_alpha: bool
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, alpha)]


def _of_heads(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """In torch, for q, k, v of [G, N, K] and alpha of [G]."""
    return attend_in_torch(q[None], k[None], v[None], alpha.view(1, -1, 1, 1), convex=bool((alpha <= 2).all()))[0]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)  # else zeros for the supports, as large as their room


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    q, k, v, alpha, *saved = ctx.saved_tensors
    if gradients[0] is None:
        return (None,) * 4
    if torch.is_grad_enabled():
        return differentiable(_of_heads, (q, k, v, alpha), gradients[0])
    return tuple(_backward(gradients[0].contiguous(), q, k, v, alpha, saved, ctx.needs_input_grad[3]))


_attend.register_autograd(_differentiate, setup_context=_setup_context)


# Both products in full: the share of the second that sparsity saves depends on the data.
_attend.register_flops(lambda q, *rest: 4 * math.prod(q) * q[1])
_backward.register_flops(lambda dout, q, *rest: 10 * math.prod(q) * q[1])


def _blocks(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _product(queries: Tensor, keys: Tensor, scratch: Tensor) -> Tensor:
    """queries @ keys, in memory that is at hand: fresh memory would cost as much as the product."""
    shape = *queries.shape[:2], keys.shape[2]
    return torch.bmm(queries, keys, out=scratch[: math.prod(shape)].view(shape))


def _run(task: Callable[[int, slice, Tensor], None], q: Tensor, group: int, rows: int) -> None:
    """`task(number, heads, scratch)` for every group, on as many threads as torch uses; the result depends on neither.

    Each thread has a scratch for a block of scores.
    """
    heads, tokens, _ = q.shape
    parts = [slice(start, start + group) for start in range(0, heads, group)]
    queue, threads = iter(enumerate(parts)), min(torch.get_num_threads(), len(parts))

    # The modes are a thread's own.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    @mode()
    def work() -> None:
        scratch = q.new_empty(group * rows * tokens)
        for number, part in queue:
            task(number, part, scratch)

    run_beside(work, threads)


def _accepts(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, convex: bool) -> bool:
    has_format = q.dtype in (torch.float32, torch.float64) and q.dtype == k.dtype == v.dtype
    return has_format and q.shape == k.shape == v.shape and alpha.numel() in (1, q.shape[1])


def _reference(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, convex: bool) -> Tensor:
    if k.shape[2] == 0:
        return q @ (k.mT @ v)  # zeros, as of softmax
    return attend_in_torch(wide(q), wide(k), wide(v), alpha, convex).to(v.dtype)


entmax_attention = Operator(
    "entmax_attention", "BHNK BHMK BHMC -> BHNC", {"torch": _reference, "numba": attend_on_cpu},
    accepts=_accepts, sizes=sizes_of, unmeasured=lambda dtype, trains: ("numba", "torch"),
    example=lambda dtype, sizes: (*example(dtype, sizes), torch.full((1, 1, 1, 1), 1.5), True),
    grid=SQUARES,
    tolerance={torch.float64: 1e-7},  # a step of Newton's method is the last one where it is as small as this
)  # fmt: skip
