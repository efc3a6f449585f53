"""Rows of alpha-entmax on the CPU, compiled by numba: thresholds, sparse products, and their gradients.

Every kernel takes products `z` [G, R, N] of R queries and all keys, of a group of heads: with a row's maximum `top`,
factor = (alpha - 1) / sqrt(K) and r = 1 / (alpha - 1), weights are p = [factor (z - top) - tau]_+ ^ r. All other arrays
are whole, [heads, N, ...], and contiguous; `first` is the group's first head, `start` its first query. The kernels hold
no locks and no state; threads call them on groups of their own. NaN and infinite scores give NaN, never a plausible
answer; a NaN value reaches the rows that attend to it.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import inner, kernel
from vitcmp.kernels.numba.simd import (
    LANES,
    append,
    count,
    larger,
    largest,
    load,
    load_part,
    log2,
    places,
    power,
    splat,
    sqrt,
    store,
    store_part,
    total_of,
    where,
)  # fmt: skip

ROWS = 8
"""Rows whose thresholds are searched together."""
TOP = 4 * LANES
"""Entries of a row that bound its threshold from below."""


@inner
def _powers(d, r, zero):  # type: ignore[no-untyped-def]
    """d ^ (r - 1) and d ^ r of the positive lanes; 0 for the others."""
    d = larger(zero, d)
    if r == 2:
        return d, d * d
    if r == 1:
        return where(d > 0, zero + 1.0, zero), d
    if r == 4:
        square = d * d
        return square * d, square * square
    low = power(d, r - 1)
    return low, low * d


@inner
def _sums(x, at, n, tau, r):  # type: ignore[no-untyped-def]
    """Sum of [x - tau]_+ ^ r over n entries, and of the same to the power r - 1."""
    zero = splat(0.0, x)
    total, slope = zero, zero
    for e in range(at, at + n, LANES):
        low, high = _powers(load(x, e) - tau, r, zero)
        slope, total = slope + low, total + high
    return total_of(total), total_of(slope)


@inner
def _step(x, at, n, tau, r):  # type: ignore[no-untyped-def]
    """A step of Newton's method on the norm (sum of [x - tau]_+ ^ r) ^ (1 / r) = 1, for r >= 1.

    It is convex and nearly linear in tau, so few steps from the left do and none overshoots.
    """
    one = x.dtype.type(1)
    total, slope = _sums(x, at, n, tau, r)
    if r == 2:
        return (total - np.sqrt(total)) / slope
    if r == 1:
        return (total - one) / slope
    if r == 4:
        return (total - np.sqrt(total) * np.sqrt(np.sqrt(total))) / slope
    return (total - largest(power(splat(total, x), one - one / r))) / slope


@inner
def _bracketed(x, at, n, r, tokens):  # type: ignore[no-untyped-def]
    """The threshold for r < 1, where the norm has infinite slopes and Newton's steps vanish.

    There every other step halves the bracket between -1, where the largest entry alone weighs 1, and -tokens^(-1/r),
    where all that are as large would.
    """
    one = x.dtype.type(1)
    low, high = -one, -(x.dtype.type(tokens) ** (-one / r))
    tau = low
    for step in range(200):
        total, slope = _sums(x, at, n, tau, r)
        if total >= one:
            low = tau
        elif total < one:
            high = tau
        else:
            return total
        following = tau + (total - total ** (one - one / r)) / slope
        if step % 2 == 1 or not low < following < high:
            following = (low + high) / x.dtype.type(2)
        if high - low <= 2 * np.finfo(x.dtype).eps:
            return following
        tau = following
    return tau


@inner
def _maxima(z, at, tokens, factor, x, there):  # type: ignore[no-untyped-def]
    """The maximum of a row; x becomes the maxima of its every TOP-th entries, less that and scaled."""
    lowest = splat(-np.inf, z)
    a, b, c, d = lowest, lowest, lowest, lowest
    end = at + tokens // TOP * TOP
    for j in range(at, end, TOP):
        a, b = larger(a, load(z, j)), larger(b, load(z, j + LANES))
        c, d = larger(c, load(z, j + 2 * LANES)), larger(d, load(z, j + 3 * LANES))
    rest = at + tokens - end
    if rest:
        a = larger(a, load_part(z, end, rest, -np.inf))
        b = larger(b, load_part(z, end + LANES, rest - LANES, -np.inf))
        c = larger(c, load_part(z, end + 2 * LANES, rest - 2 * LANES, -np.inf))
        d = larger(d, load_part(z, end + 3 * LANES, rest - 3 * LANES, -np.inf))
    top = largest(larger(larger(a, b), larger(c, d)))
    store(x, there, (a - top) * factor)
    store(x, there + LANES, (b - top) * factor)
    store(x, there + 2 * LANES, (c - top) * factor)
    store(x, there + 3 * LANES, (d - top) * factor)
    return top


@inner
def _candidates(z, at, tokens, top, factor, low, x, place, there):  # type: ignore[no-untyped-def]
    """Entries of a row that are above `low` once shifted and scaled: their values, their places, their number."""
    n, whole = there, tokens // LANES * LANES
    for j in range(0, whole, LANES):
        d = (load(z, at + j) - top) * factor
        chosen = d > low
        append(x, n, d, chosen)
        append(place, n, places(j), chosen)
        n += count(chosen)
    if whole < tokens:
        d = (load_part(z, at + whole, tokens - whole, -np.inf) - top) * factor
        chosen = d > low
        append(x, n, d, chosen)
        append(place, n, places(whole), chosen)
        n += count(chosen)
    store(x, n, -2.0)
    return n - there


@inner
def _buffers(z):  # type: ignore[no-untyped-def]
    """Of a few rows: candidates, their places and their numbers, maxima, thresholds."""
    size = max(z.shape[2], TOP) + 2 * LANES
    return (
        np.empty((ROWS, size), z.dtype), np.empty((ROWS, size), np.int32), np.empty(ROWS, np.int64),
        np.empty(ROWS, z.dtype), np.empty(ROWS, z.dtype),
    )  # fmt: skip


@inner
def _solve(z, at, rows, factor, r, buffers):  # type: ignore[no-untyped-def]
    """Candidates for the supports, maxima and thresholds of a few rows; NaN where scores are not finite.

    Step by step for all of them: a step waits for the one before, so that the processor takes several rows' at once.
    """
    x, place, n, top, tau = buffers
    tokens, size, one = z.shape[2], x.shape[1], z.dtype.type(1)
    for i in range(rows):
        top[i], tau[i], n[i] = _maxima(z, at + i * tokens, tokens, factor, x, i * size), -one, TOP
    # Steps shrink quadratically, at the kinks with the power r: after one as small as this no other is needed.
    eps = np.finfo(z.dtype).eps
    tolerance = max(one / 4 * eps ** (one / min(r, one * 2)), one * 2 * eps)
    # The threshold of a few entries is below that of all. So is that of a larger power, since distances are at most 1:
    # a simple one makes the first steps cheap.
    simple = one if r <= 1 else one * 2 if r <= 2 else one * 4 if r <= 4 else r
    for stage in range(3 if r >= 1 else 0):
        if stage == 2:
            for i in range(rows):
                n[i] = _candidates(z, at + i * tokens, tokens, top[i], factor, tau[i], x, place, i * size)
        for _ in range(3 if stage == 0 else int(r != simple) if stage == 1 else 100):
            last = z.dtype.type(0)
            for i in range(rows):
                step = _step(x, i * size, n[i], tau[i], r if stage else simple)
                tau[i] += step
                last = max(last, abs(step))
            if stage == 2 and last <= tolerance:
                break
    if r < 1:
        for i in range(rows):
            n[i] = _candidates(z, at + i * tokens, tokens, top[i], factor, tau[i], x, place, i * size)
            tau[i] = _bracketed(x, i * size, n[i], r, tokens)


@inner
def _weigh(x, at, n, tau, r):  # type: ignore[no-untyped-def]
    """x becomes [x - tau]_+ ^ r, divided by its sum: what is left of the threshold's error is spread evenly."""
    zero = splat(0.0, x)
    total = zero
    for e in range(at, at + n, LANES):
        _, p = _powers(load(x, e) - tau, r, zero)
        store(x, e, p)
        total = total + p
    scale = x.dtype.type(1) / total_of(total)
    for e in range(at, at + n, LANES):
        store(x, e, load(x, e) * scale)


@inner
def _combine(out, at, width, v, head, index, weight, shift, begin, end):  # type: ignore[no-untyped-def]
    """Writes the weighted sum of rows of v; entry e weighs weight[e - shift], its row is at `head` + index[e] width."""
    c = 0
    while c + TOP <= width:
        zero = splat(0.0, out)
        s0, s1, s2, s3 = zero, zero, zero, zero
        for e in range(begin, end):
            w, source = weight[e - shift], head + index[e] * width + c
            s0, s1 = s0 + load(v, source) * w, s1 + load(v, source + LANES) * w
            s2, s3 = s2 + load(v, source + 2 * LANES) * w, s3 + load(v, source + 3 * LANES) * w
        store(out, at + c, s0)
        store(out, at + c + LANES, s1)
        store(out, at + c + 2 * LANES, s2)
        store(out, at + c + 3 * LANES, s3)
        c += TOP
    while c < width:
        total = splat(0.0, out)
        for e in range(begin, end):
            total = total + load_part(v, head + index[e] * width + c, width - c, 0.0) * weight[e - shift]
        store_part(out, at + c, width - c, total)
        c += LANES


@kernel
def forward_sparse(z, first, start, factor, r, v, out, top, tau, index, weight, ends, number, used, share):  # type: ignore[no-untyped-def]
    """Thresholds and outputs; the support is appended to row `number` of `index` and `weight` after `used` entries.

    Returns the entries used after it, or -1 as soon as there is no room or a row has more than `share` on average.
    """
    heads, rows, tokens = z.shape
    width, buffers = v.shape[2], _buffers(z)
    x, place, n, tops, lows = buffers
    size, indices, weights = x.shape[1], index[number], weight[number]
    before, limit = used, len(indices) - tokens - LANES
    for g in range(heads):
        head = first + g
        for i in range(0, rows, ROWS):
            few = min(ROWS, rows - i)
            _solve(z, (g * rows + i) * tokens, few, factor[head], r[head], buffers)
            for j in range(few):
                _weigh(x, j * size, n[j], lows[j], r[head])
            # One loop each, so that no row's last step delays the next row's first.
            begin = used
            for j in range(few):
                query = start + i + j
                top[head, query], tau[head, query] = tops[j], lows[j]
                if np.isfinite(lows[j]):
                    for e in range(j * size, j * size + n[j], LANES):
                        p = load(x, e)
                        chosen = p > 0
                        append(weights, used, p, chosen)
                        append(indices, used, load(place, e), chosen)
                        used += count(chosen)
                ends[head, query] = used
                if used > limit:
                    return -1
            if used - before > share * (g * rows + i + few + ROWS):
                return -1
            for j in range(few):
                query = start + i + j
                end, at = ends[head, query], (head * tokens + query) * width
                _combine(out, at, width, v, head * tokens * width, indices, weights, 0, begin, end)
                if begin == end:
                    out[head, query] = np.nan
                begin = end
    return used


@kernel
def forward_dense(z, first, start, factor, r, top, tau):  # type: ignore[no-untyped-def]
    """Maxima and thresholds; the scores become weights."""
    heads, rows, tokens = z.shape
    buffers = _buffers(z)
    for g in range(heads):
        for i in range(0, rows, ROWS):
            few, at = min(ROWS, rows - i), start + i
            _solve(z, (g * rows + i) * tokens, few, factor[first + g], r[first + g], buffers)
            for j in range(few):
                top[first + g, at + j], tau[first + g, at + j] = buffers[3][j], buffers[4][j]
    weights(z, first, start, factor, r, top, tau)


@kernel
def weights(z, first, start, factor, r, top, tau):  # type: ignore[no-untyped-def]
    """The scores become weights, with thresholds found before."""
    heads, rows, tokens = z.shape
    x = np.empty(tokens + LANES, z.dtype)
    for g in range(heads):
        head = first + g
        for i in range(rows):
            at, highest, low = (g * rows + i) * tokens, top[head, start + i], tau[head, start + i]
            if not np.isfinite(low):
                z[g, i] = np.nan
                continue
            for j in range(0, tokens, LANES):
                store(x, j, (load_part(z, at + j, tokens - j, -np.inf) - highest) * factor[head])
            _weigh(x, 0, tokens, low, r[head])
            for j in range(0, tokens, LANES):
                store_part(z, at + j, tokens - j, load(x, j))


@inner
def _gradient(p, at, dp, there, n, r, scale, shares, with_alpha):  # type: ignore[no-untyped-def]
    """dp, the gradient of the weights p of one row, becomes that of its scores times `scale`; returns that of alpha.

    With s = p^(2 - alpha) on the support and p' = s / sum(s): dz = s (dp - sum(p' dp)); with h = -p ln p, dalpha is
    the sum of dp ((p - p') / (alpha - 1)^2 + (h - p' sum(h)) / (alpha - 1))  (Correia et al., 2019, section 3.1).
    """
    zero, exponent = splat(0.0, p), p.dtype.type(1) - p.dtype.type(1) / r
    total, mean, plain, entropy, weighed = zero, zero, zero, zero, zero
    for e in range(0, n, LANES):
        w, d = load_part(p, at + e, n - e, 0.0), load_part(dp, there + e, n - e, 0.0)
        s = sqrt(w) if r == 2 else where(w > 0, zero + 1.0, zero) if r == 1 else power(w, exponent)
        store(shares, e, s)
        total, mean = total + s, mean + s * d
        if with_alpha:
            h = where(w > 0, log2(w) * w * -math.log(2), 0.0)
            plain, entropy, weighed = plain + w * d, entropy + h, weighed + h * d
    balance = total_of(mean) / total_of(total)
    for e in range(0, n, LANES):
        d = load_part(dp, there + e, n - e, 0.0) - balance
        store_part(dp, there + e, n - e, load(shares, e) * d * scale)
    return (total_of(plain) - balance) * r * r + (total_of(weighed) - balance * total_of(entropy)) * r


@kernel
def backward_dense(p, dp, first, r, scale, dalpha, with_alpha):  # type: ignore[no-untyped-def]
    """dp becomes the gradient of the scores; that of each head's alpha is added to `dalpha`."""
    heads, rows, tokens = p.shape
    shares = np.empty(tokens + LANES, p.dtype)
    for g in range(heads):
        for i in range(rows):
            at = (g * rows + i) * tokens
            dalpha[first + g] += _gradient(p, at, dp, at, tokens, r[first + g], p.dtype.type(scale), shares, with_alpha)


@inner
def _products(dp, n, dout, at, v, head, index, begin, width):  # type: ignore[no-untyped-def]
    """dp becomes the products of a row of dout with n rows of v."""
    dp[:n] = 0
    c = 0
    while c + TOP <= width:
        a, b = load(dout, at + c), load(dout, at + c + LANES)
        d, f = load(dout, at + c + 2 * LANES), load(dout, at + c + 3 * LANES)
        for e in range(n):
            source = head + index[begin + e] * width + c
            near, far = load(v, source) * a + load(v, source + LANES) * b, load(v, source + 2 * LANES) * d
            dp[e] += total_of(near + far + load(v, source + 3 * LANES) * f)
        c += TOP
    while c < width:
        a = load_part(dout, at + c, width - c, 0.0)
        for e in range(n):
            dp[e] += total_of(a * load_part(v, head + index[begin + e] * width + c, width - c, 0.0))
        c += LANES


@inner
def _scatter(total, x, at, width, head, index, weight, shift, begin, end):  # type: ignore[no-untyped-def]
    """Adds a row of x, weighted, to rows of `total`: what `_combine` does, transposed."""
    c = 0
    while c + TOP <= width:
        a, b = load(x, at + c), load(x, at + c + LANES)
        d, f = load(x, at + c + 2 * LANES), load(x, at + c + 3 * LANES)
        for e in range(begin, end):
            w, there = weight[e - shift], head + index[e] * width + c
            store(total, there, load(total, there) + a * w)
            store(total, there + LANES, load(total, there + LANES) + b * w)
            store(total, there + 2 * LANES, load(total, there + 2 * LANES) + d * w)
            store(total, there + 3 * LANES, load(total, there + 3 * LANES) + f * w)
        c += TOP
    while c < width:
        a = load_part(x, at + c, width - c, 0.0)
        for e in range(begin, end):
            there = head + index[e] * width + c
            store_part(total, there, width - c, load_part(total, there, width - c, 0.0) + a * weight[e - shift])
        c += LANES


@kernel
def backward_sparse(q, k, v, dout, first, last, r, scale, index, weight, ends, number, dq, dk, dv, dalpha, with_alpha):  # type: ignore[no-untyped-def]
    """The gradient of q, and what is added to the others', from the support alone."""
    _, tokens, width = q.shape
    dp, shares = np.empty(tokens + LANES, q.dtype), np.empty(tokens + LANES, q.dtype)
    indices, weights = index[number], weight[number]
    begin = 0
    for h in range(first, last):
        head = h * tokens * width
        for i in range(tokens):
            at, end = head + i * width, ends[h, i]
            n = end - begin
            if n == 0:  # the scores were not finite
                dq[h, i], dk[h], dv[h], dalpha[h] = np.nan, np.nan, np.nan, np.nan
                continue
            _products(dp, n, dout, at, v, head, indices, begin, width)
            dalpha[h] += _gradient(weights, begin, dp, 0, n, r[h], q.dtype.type(scale), shares, with_alpha)
            _combine(dq, at, width, k, head, indices, dp, begin, begin, end)
            _scatter(dk, q, at, width, head, indices, dp, begin, begin, end)
            _scatter(dv, dout, at, width, head, indices, weights, 0, begin, end)
            begin = end
