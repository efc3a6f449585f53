"""alpha-entmax attention on CUDA in Triton, exact, for 1 < alpha <= 2: memory grows with N, not with N^2.

With x = q k^T and factor = (alpha - 1) / sqrt(K), a row's weights are p = d ^ r, d = [factor (x - max x) - tau]_+ and
r = 1 / (alpha - 1). A program takes a block of queries and goes over the keys several times, computing x anew each
time rather than keeping it:

1. The largest x of each class of keys, those of one place in their blocks. They hold the row's maximum, and they are a
   subset of the row: its threshold, found in registers, is never above the row's own and mostly near it.
2. Newton's method from there, a pass a step, on the norm sum(p)^(1 / r) = 1, which is convex and nearly linear in tau:
   few steps do, and from the left none overshoots. It ends once all rows of the block were so near that the step made
   from there is the last one needed.
3. The output.

Of the rows only max x and tau are kept. The backward pass, with s = d ^ (r - 1): ds = s (dp - sum(s dp) / sum(s)); one
kernel for queries, then one for keys and values.

Products of half precisions take weights of that precision, as in any fused attention; all else is in fp32.
"""

# mypy: allow-untyped-defs, disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitcmp.kernels.ops.entmax import attend_in_torch
from vitcmp.kernels.torch_operator import torch_operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256
"""Of a head: a block of queries and its result stay in registers."""
STEPS = 20
"""Of Newton's method at most: rounding may keep the sum of an adverse row farther from 1 than the tolerance."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Of a row's sum, before the last step, which about squares it."""


PRECISION = tl.constexpr("ieee")
"""Products of fp32 are of fp32: tensor cores would round to 10 bits."""


# Kernels. `at` is an address, strides are in elements and named after tensor and axis; the last axis is dense. Offsets
# from one block to another are added to addresses, which have 64 bits; those inside a block fit into 32.


@triton.jit
def _load(at, stride, first, tokens, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """[ROWS, COLS] of a matrix from row `first` on, whose address is `at`; zeros outside of [tokens, WIDTH]."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    if EVEN and WIDTH == COLS:
        block = tl.load(at + row * stride + col)
    else:
        block = tl.load(at + row * stride + col, mask=(first + row < tokens) & (col < WIDTH), other=0.0)
    return block


@triton.jit
def _store(at, stride, first, tokens, block, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    block = block.to(at.dtype.element_ty)
    tl.store(at + row * stride + col, block, mask=(first + row < tokens) & (col < WIDTH))


@triton.jit
def _product(q, k, first, tokens, COLS: tl.constexpr, EVEN: tl.constexpr):
    """x = q k^T, -inf where there is no key."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not EVEN:
        x = tl.where(first + tl.arange(0, COLS)[None, :] < tokens, x, float("-inf"))
    return x


@triton.jit
def _powers(x, top, tau, factor, r, R: tl.constexpr):
    """d ^ (r - 1) and d ^ r. R is r where r is 1 or 2, else 0. NaN stays NaN, so that a diverged model shows."""
    d = tl.maximum((x - top) * factor - tau, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if R == 1:
        s = tl.where(d > 0, 1.0, 0.0)
        p = d
    elif R == 2:
        s = d
        p = d * d
    else:
        s = tl.where(d > 0, tl.exp2((r - 1) * tl.log2(d)), 0.0)
        p = s * d
    return s, p


@triton.jit
def _newton(tau, total, slope, tokens, r, R: tl.constexpr):
    """The next tau; between -1, where the largest weighs 1, and -N^(-1 / r), where all would if as large."""
    if R == 1:
        step = (total - 1) / slope
        high = -1.0 / tl.cast(tokens, tl.float32)
    elif R == 2:
        step = (total - tl.sqrt(total)) / slope
        high = -1.0 / tl.sqrt(tl.cast(tokens, tl.float32))
    else:
        step = (total - tl.exp2((1 - 1 / r) * tl.log2(total))) / slope
        high = -tl.exp2(-tl.log2(tl.cast(tokens, tl.float32)) / r)
    return tl.minimum(tl.maximum(tau + step, -1.0), high)


@triton.jit
def _left(left, total, tolerance):
    """Steps that are left: none once all rows have arrived."""
    return (left - 1) * tl.max((tl.abs(total - 1) > tolerance).to(tl.int32), axis=0)


@triton.jit
def _forward(
    q_at, k_at, v_at, out_at, top_at, tau_at, alpha_at,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, tokens, scale, tolerance,
    STEPS: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    q_at += image * q_b + head * q_h + first.to(tl.int64) * q_n
    k_at += image * k_b + head * k_h
    v_at += image * v_b + head * v_h
    alpha = tl.load(alpha_at + head)
    factor = (alpha - 1) * scale
    r = 1 / (alpha - 1)
    q = _load(q_at, q_n, first, tokens, ROWS, WIDTH, CHANNELS, EVEN)

    largest = tl.full([ROWS, COLS], float("-inf"), tl.float32)
    at = k_at
    for start in range(0, tokens, COLS):
        k = _load(at, k_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        largest = tl.maximum(largest, _product(q, k, start, tokens, COLS, EVEN))
        at += COLS * k_n
    top = tl.max(largest, axis=1)

    tau = tl.full([ROWS], -1.0, tl.float32)
    left = tl.full([], STEPS, tl.int32)
    while left > 0:
        s, p = _powers(largest, top[:, None], tau[:, None], factor, r, R)
        total = tl.sum(p, axis=1)
        tau = _newton(tau, total, tl.sum(s, axis=1), tokens, r, R)
        left = _left(left, total, tolerance)

    # Where one block holds all keys, that was it.
    left = tl.where(tokens > COLS, STEPS, 0)
    while left > 0:
        total = tl.zeros([ROWS], tl.float32)
        slope = tl.zeros([ROWS], tl.float32)
        at = k_at
        for start in range(0, tokens, COLS):
            k = _load(at, k_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
            s, p = _powers(_product(q, k, start, tokens, COLS, EVEN), top[:, None], tau[:, None], factor, r, R)
            total += tl.sum(p, axis=1)
            slope += tl.sum(s, axis=1)
            at += COLS * k_n
        tau = _newton(tau, total, slope, tokens, r, R)
        left = _left(left, total, tolerance)

    out = tl.zeros([ROWS, CHANNELS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, tokens, COLS):
        k = _load(k_at, k_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        v = _load(v_at, v_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        s, p = _powers(_product(q, k, start, tokens, COLS, EVEN), top[:, None], tau[:, None], factor, r, R)
        total += tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        k_at += COLS * k_n
        v_at += COLS * v_n
    out_at += image * out_b + head * out_h + first.to(tl.int64) * out_n
    _store(out_at, out_n, first, tokens, out / total[:, None], ROWS, WIDTH, CHANNELS)
    row = (image * heads + head) * tokens + first + tl.arange(0, ROWS)
    inside = first + tl.arange(0, ROWS) < tokens
    tl.store(top_at + row, top, mask=inside)
    tl.store(tau_at + row, tau, mask=inside)


@triton.jit
def _backward_queries(
    dout_at, q_at, k_at, v_at, dq_at, top_at, tau_at, mean_at, alpha_at, dalpha_at,
    dout_b, dout_h, dout_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dq_b, dq_h, dq_n,
    heads, tokens, scale,
    WITH_ALPHA: tl.constexpr, R: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dq, the mean of dp weighted by s, which the other kernel reads, and each row's part of alpha's gradient."""
    blocks = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    q_at += image * q_b + head * q_h + first.to(tl.int64) * q_n
    dout_at += image * dout_b + head * dout_h + first.to(tl.int64) * dout_n
    k_at += image * k_b + head * k_h
    v_at += image * v_b + head * v_h
    alpha = tl.load(alpha_at + head)
    factor = (alpha - 1) * scale
    r = 1 / (alpha - 1)
    q = _load(q_at, q_n, first, tokens, ROWS, WIDTH, CHANNELS, EVEN)
    dout = _load(dout_at, dout_n, first, tokens, ROWS, WIDTH, CHANNELS, EVEN)
    row = (image * heads + head) * tokens + first + tl.arange(0, ROWS)
    inside = first + tl.arange(0, ROWS) < tokens
    top = tl.load(top_at + row, mask=inside, other=0.0)
    tau = tl.load(tau_at + row, mask=inside, other=-1.0)

    sum_s = tl.zeros([ROWS], tl.float32)
    sum_s_dp = tl.zeros([ROWS], tl.float32)
    sum_p = tl.zeros([ROWS], tl.float32)
    sum_p_dp = tl.zeros([ROWS], tl.float32)
    sum_h = tl.zeros([ROWS], tl.float32)
    sum_h_dp = tl.zeros([ROWS], tl.float32)
    keys_at = k_at
    values_at = v_at
    for start in range(0, tokens, COLS):
        k = _load(keys_at, k_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        v = _load(values_at, v_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        s, p = _powers(_product(q, k, start, tokens, COLS, EVEN), top[:, None], tau[:, None], factor, r, R)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        sum_s += tl.sum(s, axis=1)
        sum_s_dp += tl.sum(s * dp, axis=1)
        if WITH_ALPHA:
            h = tl.where(p > 0, -p * tl.log(p), 0.0)
            sum_p += tl.sum(p, axis=1)
            sum_p_dp += tl.sum(p * dp, axis=1)
            sum_h += tl.sum(h, axis=1)
            sum_h_dp += tl.sum(h * dp, axis=1)
        keys_at += COLS * k_n
        values_at += COLS * v_n
    mean = sum_s_dp / sum_s
    tl.store(mean_at + row, mean, mask=inside)
    if WITH_ALPHA:
        dalpha = (sum_p_dp / sum_p - mean) * r * r + (sum_h_dp - mean * sum_h) * r
        tl.store(dalpha_at + row, dalpha, mask=inside)

    dq = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, tokens, COLS):
        k = _load(k_at, k_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        v = _load(v_at, v_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        s, p = _powers(_product(q, k, start, tokens, COLS, EVEN), top[:, None], tau[:, None], factor, r, R)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = s * (dp - mean[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_at += COLS * k_n
        v_at += COLS * v_n
    dq_at += image * dq_b + head * dq_h + first.to(tl.int64) * dq_n
    _store(dq_at, dq_n, first, tokens, dq * scale, ROWS, WIDTH, CHANNELS)


@triton.jit
def _backward_keys(
    dout_at, q_at, k_at, v_at, dk_at, dv_at, top_at, tau_at, mean_at, alpha_at,
    dout_b, dout_h, dout_n, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, tokens, scale,
    R: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over all queries. Rows and columns are exchanged: here rows are keys."""
    blocks = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    k_at += image * k_b + head * k_h + first.to(tl.int64) * k_n
    v_at += image * v_b + head * v_h + first.to(tl.int64) * v_n
    q_at += image * q_b + head * q_h
    dout_at += image * dout_b + head * dout_h
    alpha = tl.load(alpha_at + head)
    factor = (alpha - 1) * scale
    r = 1 / (alpha - 1)
    k = _load(k_at, k_n, first, tokens, ROWS, WIDTH, CHANNELS, EVEN)
    v = _load(v_at, v_n, first, tokens, ROWS, WIDTH, CHANNELS, EVEN)
    row = (image * heads + head) * tokens

    dk = tl.zeros([ROWS, CHANNELS], tl.float32)
    dv = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, tokens, COLS):
        # Where there is no query, q and dout are 0, and add nothing.
        q = _load(q_at, q_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        dout = _load(dout_at, dout_n, start, tokens, COLS, WIDTH, CHANNELS, EVEN)
        col = start + tl.arange(0, COLS)
        top = tl.load(top_at + row + col, mask=col < tokens, other=0.0)
        tau = tl.load(tau_at + row + col, mask=col < tokens, other=0.0)
        mean = tl.load(mean_at + row + col, mask=col < tokens, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s, p = _powers(x, top[None, :], tau[None, :], factor, r, R)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = s * (dp - mean[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_at += COLS * q_n
        dout_at += COLS * dout_n
    dk_at += image * dk_b + head * dk_h + first.to(tl.int64) * dk_n
    dv_at += image * dv_b + head * dv_h + first.to(tl.int64) * dv_n
    _store(dk_at, dk_n, first, tokens, dk * scale, ROWS, WIDTH, CHANNELS)
    _store(dv_at, dv_n, first, tokens, dv, ROWS, WIDTH, CHANNELS)


# Around them, in torch. q, k, v are [B, H, N, K] of one type, alpha is [H] in fp32.


def _sizes(tokens: int, width: int, dtype: torch.dtype, forward: bool) -> dict[str, Any]:
    """Constants of a launch: rows and columns of a block of scores such that registers and shared memory hold it.

    The forward pass takes all keys in one block where there are few, at as many scores.
    """
    channels = max(32, triton.next_power_of_2(width))
    fits = 0 if channels <= 64 else 1 if channels == 128 else 2
    if dtype != torch.float32:
        rows, cols = ((128, 64), (64, 64), (32, 32))[fits]
    else:
        rows, cols = ((64, 64), (32, 64), (16, 32))[fits] if forward else ((32, 32), (32, 32), (16, 16))[fits]
    needed = max(32, triton.next_power_of_2(tokens))
    if forward and rows * cols >= 32 * needed:
        rows, cols = rows * cols // needed, needed
    rows, cols = min(rows, needed), min(cols, needed)
    stages = 1 if cols == needed else 3 if fits == 0 and dtype != torch.float32 else 2
    return {
        "ROWS": rows, "COLS": cols, "CHANNELS": channels, "WIDTH": width, "EVEN": tokens % max(rows, cols) == 0,
        "num_warps": 8 if rows * cols >= 2048 else 4, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _launch(kernel: Any, tensors: list[Tensor], strided: list[Tensor], *numbers: float, **constants: Any) -> None:
    """One program a head and block of rows; axes before the last are addressed by the strides of `strided`."""
    batch, heads, tokens, _ = strided[0].shape
    grid = (batch * heads * triton.cdiv(tokens, constants["ROWS"]),)
    strides = [stride for x in strided for stride in x.stride()[:3]]
    with torch.cuda.device_of(strided[0]):
        kernel[grid](*tensors, *strides, heads, tokens, *numbers, **constants)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _empty(*tensors: Tensor) -> list[Tensor]:
    """As these lie in memory: heads that lie beside each other, as projections leave them, stay there."""
    return [torch.empty_like(x) for x in _dense(*tensors)]


@torch_operator("entmax_attention_triton")
def _attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, r: int) -> list[Tensor]:
    """The output, and of each row the largest product and the threshold. `r` is 1 / (alpha - 1) if 1 or 2, else 0."""
    result = out, top, tau = _outputs(q, k, v, alpha, r)
    q, k, v = _dense(q, k, v)
    if out.numel():
        numbers = q.shape[-1] ** -0.5, TOLERANCE[q.dtype]
        sizes = _sizes(q.shape[-2], q.shape[-1], q.dtype, forward=True)
        _launch(_forward, [q, k, v, out, top, tau, alpha], [q, k, v, out], *numbers, STEPS=STEPS, R=r, **sizes)
    return result


@_attend.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, r: int) -> list[Tensor]:
    return [*_empty(q), *(q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))]


@torch_operator("entmax_attention_triton_backward")
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, top: Tensor, tau: Tensor, r: int, with_alpha: bool
) -> list[Tensor]:
    """Gradients of q, k, v and alpha, the last one empty unless wanted."""
    dout, q, k, v = _dense(dout, q, k, v)
    dq, dk, dv = _empty(q, k, v)
    mean = torch.empty_like(top)
    dalpha = torch.empty_like(top) if with_alpha else mean  # then not written
    if dq.numel():
        scale = q.shape[-1] ** -0.5
        constants = _sizes(q.shape[-2], q.shape[-1], q.dtype, forward=False) | {"R": r}
        _launch(
            _backward_queries, [dout, q, k, v, dq, top, tau, mean, alpha, dalpha], [dout, q, k, v, dq], scale,
            WITH_ALPHA=with_alpha, **constants,
        )  # fmt: skip
        _launch(
            _backward_keys, [dout, q, k, v, dk, dv, top, tau, mean, alpha], [dout, q, k, v, dk, dv], scale, **constants
        )
    return [dq, dk, dv, dalpha.sum(dim=(0, 2)) if with_alpha else top.new_empty(0)]


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, top: Tensor, tau: Tensor, r: int, with_alpha: bool
) -> list[Tensor]:
    return [*_empty(q, k, v), top.new_empty(q.shape[1] if with_alpha else 0)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.r = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, alpha, top, tau = ctx.saved_tensors
    if not torch.is_grad_enabled():
        found = _backward(gradients[0], q, k, v, alpha, top, tau, ctx.r, ctx.needs_input_grad[3])
        return (*found[:3], found[3] if ctx.needs_input_grad[3] else None, None)
    # Someone will differentiate the gradients: torch can.
    leaves = [x for x in (q, k, v, alpha) if x.requires_grad]
    again = attend_in_torch(q.float(), k.float(), v.float(), alpha.view(1, -1, 1, 1), convex=True).to(v.dtype)
    gradient = iter(torch.autograd.grad(again, leaves, gradients[0], create_graph=True))
    return (*(next(gradient) if x.requires_grad else None for x in (q, k, v, alpha)), None)


_attend.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.vitcmp.entmax_attention_triton)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Both products, once each: how often scores are computed again depends on the data."""
    batch, heads, tokens, width = q_shape
    return 4 * batch * heads * tokens**2 * width


def available(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` takes these, all [B, H, N, K]; there must be no dropout, and no alpha above 2."""
    return (
        q.is_cuda
        and q.shape == k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and q.shape[-1] <= MAX_WIDTH
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor) -> Tensor:
    """The attention of q, k, v of [B, H, N, K]; `alpha` is a number in (1, 2], or a tensor of H of them.

    The result has their type. Differentiable twice.
    """
    if isinstance(alpha, Tensor):
        return _attend(q, k, v, alpha.flatten().float(), 0)[0]
    alphas = torch.full(q.shape[1:2], alpha, dtype=torch.float32, device=q.device)
    return _attend(q, k, v, alphas, {1.5: 2, 2.0: 1}.get(alpha, 0))[0]
