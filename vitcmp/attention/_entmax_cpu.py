"""Rows of alpha-entmax on the CPU, compiled by numba: thresholds, sparse products, and their gradients.

Every kernel takes a group of heads g with scores `z` [G, R, N]: rows of queries, scaled by alpha - 1, so that
p = [z - tau]_+ ^ r with r = 1 / (alpha - 1). The kernels hold no locks and no state; threads call them on groups of
their own. NaN and infinite scores give NaN, never a plausible answer; a NaN value reaches the rows that attend to it.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, njit, types
from numba.extending import intrinsic, overload

# Sums may be reordered, so that they vectorise. Not `nnan`, `ninf`: a diverging model must show.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})


@intrinsic
def _as_int(typing, x):  # type: ignore[no-untyped-def]  # noqa: ANN
    """The bits of an fp32 number as an integer."""
    return int32(float32), lambda context, builder, _, args: builder.bitcast(args[0], context.get_value_type(int32))


@intrinsic
def _as_float(typing, x):  # type: ignore[no-untyped-def]  # noqa: ANN
    """The fp32 number with these bits."""
    return float32(int32), lambda context, builder, _, args: builder.bitcast(args[0], context.get_value_type(float32))


def power(x, r):  # type: ignore[no-untyped-def]
    """x ^ r for x >= 0 (0 at 0); for fp32 in a form that vectorises, to 1e-7 times r."""
    raise NotImplementedError


@overload(power, inline="never")
def _power(x, r):  # type: ignore[no-untyped-def]
    if x != types.float32:
        return lambda x, r: x**r if x > 0 else x * 0

    def fast(x, r):  # type: ignore[no-untyped-def]
        # log2: x = 2^e m with m in [0.71, 1.42), log2(m) by the series of atanh((m - 1) / (m + 1)).
        bits = _as_int(float32(x))
        e = (bits - int32(0x3F3504F3)) >> int32(23)
        t = _as_float(bits - (e << int32(23)))
        t = (t - float32(1)) / (t + float32(1))
        s = t * t
        series = float32(1) + s * (float32(1 / 3) + s * (float32(1 / 5) + s * (float32(1 / 7) + s * float32(1 / 9))))
        y = float32(r) * (float32(e) + float32(2.8853900817779268) * t * series)
        # exp2: y = n + f with f in [-0.5, 0.5], 2^f by its Taylor series.
        y = min(max(y, float32(-126)), float32(126))
        n = int32(y + float32(256.5)) - int32(256)
        f = (y - float32(n)) * float32(0.6931471805599453)
        tail = float32(1 / 24) + f * (float32(1 / 120) + f * float32(1 / 720))
        two_f = float32(1) + f * (float32(1) + f * (float32(1 / 2) + f * (float32(1 / 6) + f * tail)))
        result = two_f * _as_float((n + int32(127)) << int32(23))
        return result if x > float32(0) else float32(0)

    return fast


@compiled
def _sums(z, tau, r):  # type: ignore[no-untyped-def]
    """Sum of [z - tau]_+ ^ r, and of the same to the power r - 1."""
    zero = z.dtype.type(0)
    total, slope = zero, zero
    if r == 2:
        for j in range(len(z)):
            d = max(z[j] - tau, zero)
            total += d * d
            slope += d
    elif r == 1:
        for j in range(len(z)):
            d = max(z[j] - tau, zero)
            total += d
            slope += z.dtype.type(1) if d > 0 else zero
    else:
        for j in range(len(z)):
            d = max(z[j] - tau, zero)
            low = power(d, r - z.dtype.type(1))
            slope += low
            total += low * d
    return total, slope


@compiled
def _threshold(z, r, tokens):  # type: ignore[no-untyped-def]
    """tau of one row, given its entries above -1 with the maximum at 0.

    Newton's method on the norm (sum of [z - tau]_+ ^ r) ^ (1 / r) = 1, from the left: for r >= 1 the norm is convex and
    nearly linear in tau, so few steps do and none overshoots. For r < 1 it has infinite slopes, where Newton's steps
    vanish: there every other step halves the bracket between -1, where the largest entry alone weighs 1, and
    -tokens^(-1/r), where all that are as large would.
    """
    one = z.dtype.type(1)
    low, high = -one, z.dtype.type(-(tokens ** (-1.0 / r)))
    tolerance = 2 * np.finfo(z.dtype).eps
    tau = low
    for step in range(200):
        total, slope = _sums(z, tau, r)
        if total >= one:
            low = tau
        else:
            high = tau
        following = tau + (total - total ** (one - one / r)) / slope
        if r < one and (step % 2 == 1 or not low < following < high):
            following = (low + high) / 2
        if high - low <= tolerance or (r >= one and abs(following - tau) <= tolerance):
            return following
        tau = following
    return tau


@compiled
def _candidates(row, top, value, where):  # type: ignore[no-untyped-def]
    """Entries that may be in the support, shifted by the row's maximum: their values, their places, their number."""
    n = 0
    for j in range(len(row)):
        x = row[j] - top
        value[n] = x
        where[n] = j
        n += x > -1
    return n


@compiled
def _weigh(z, shift, r):  # type: ignore[no-untyped-def]
    """z becomes [z - shift]_+ ^ r, divided by its sum: what is left of the threshold's error is spread evenly."""
    zero = z.dtype.type(0)
    total = zero
    if r == 2:
        for j in range(len(z)):
            d = max(z[j] - shift, zero)
            z[j] = d * d
            total += z[j]
    elif r == 1:
        for j in range(len(z)):
            z[j] = max(z[j] - shift, zero)
            total += z[j]
    else:
        for j in range(len(z)):
            z[j] = power(max(z[j] - shift, zero), r)
            total += z[j]
    scale = z.dtype.type(1) / total
    for j in range(len(z)):
        z[j] *= scale


@compiled
def forward_sparse(z, top, r, v, out, tau, index, weight, ends, used, limit):  # type: ignore[no-untyped-def]
    """Thresholds and outputs; the support is appended to `index` and `weight` after the first `used` entries.

    Returns the entries used after it, or -1 as soon as they pass `limit`: rows are too dense for this.
    """
    heads, rows, tokens = z.shape
    value, where = np.empty(tokens, z.dtype), np.empty(tokens, np.int32)
    for g in range(heads):
        for i in range(rows):
            start = used
            out[g, i] = 0
            if not np.isfinite(top[g, i]):
                out[g, i], tau[g, i], ends[g, i] = np.nan, np.nan, used
                continue
            n = _candidates(z[g, i], top[g, i], value, where)
            tau[g, i] = _threshold(value[:n], r[g], tokens)
            _weigh(value[:n], tau[g, i], r[g])
            for j in range(n):
                index[used] = where[j]
                weight[used] = value[j]
                used += value[j] > 0
            ends[g, i] = used
            if used > limit:
                return -1
            for e in range(start, used):
                w, source = weight[e], v[g, index[e]]
                for c in range(len(source)):
                    out[g, i, c] += w * source[c]
    return used


@compiled
def forward_dense(z, top, r, tau):  # type: ignore[no-untyped-def]
    """Thresholds; the scores become weights."""
    heads, rows, tokens = z.shape
    value, where = np.empty(tokens, z.dtype), np.empty(tokens, np.int32)
    for g in range(heads):
        for i in range(rows):
            tau[g, i] = np.nan
            if np.isfinite(top[g, i]):
                n = _candidates(z[g, i], top[g, i], value, where)
                tau[g, i] = _threshold(value[:n], r[g], tokens)
    weights(z, top, tau, r)


@compiled
def weights(z, top, tau, r):  # type: ignore[no-untyped-def]
    """The scores become weights, with thresholds found before."""
    for g in range(z.shape[0]):
        for i in range(z.shape[1]):
            if np.isfinite(tau[g, i]):
                # Two differences, as in the search: top + tau would round large scores.
                for j in range(z.shape[2]):
                    z[g, i, j] -= top[g, i]
                _weigh(z[g, i], tau[g, i], r[g])
            else:
                z[g, i] = np.nan


@compiled
def _gradient(p, dp, r):  # type: ignore[no-untyped-def]
    """dp, the gradient of one row's weights, becomes that of its scores; returns sum(p dp) and sum(p' dp).

    With s = p^(2 - alpha) on the support and p' = s / sum(s): dz = s (dp - sum(p' dp)).
    """
    zero, one = p.dtype.type(0), p.dtype.type(1)
    exponent = one - one / r
    total, mean = zero, zero
    for j in range(len(p)):
        s = np.sqrt(p[j]) if r == 2 else (one if p[j] > 0 else zero) if r == 1 else power(p[j], exponent)
        total += s
        mean += s * dp[j]
    mean /= total
    plain = zero
    for j in range(len(p)):
        s = np.sqrt(p[j]) if r == 2 else (one if p[j] > 0 else zero) if r == 1 else power(p[j], exponent)
        plain += p[j] * dp[j]
        dp[j] = s * (dp[j] - mean)
    return plain, mean


@compiled
def _entropy(p, dp):  # type: ignore[no-untyped-def]
    """Sums of h and of h dp, with h = -p ln p."""
    total, weighed = p.dtype.type(0), p.dtype.type(0)
    for j in range(len(p)):
        if p[j] > 0:
            h = -p[j] * np.log(p[j])
            total += h
            weighed += h * dp[j]
    return total, weighed


@compiled
def _row_gradient(p, dp, r, with_alpha):  # type: ignore[no-untyped-def]
    """As `_gradient`, but returns the gradient of alpha (Correia et al., 2019, section 3.1).

    The sum of dp ((p - p') / (alpha - 1)^2 + (h - p' sum(h)) / (alpha - 1)), with h = -p ln p.
    """
    entropy, weighed = _entropy(p, dp) if with_alpha else (p.dtype.type(0), p.dtype.type(0))
    plain, mean = _gradient(p, dp, r)
    return (plain - mean) * r * r + (weighed - mean * entropy) * r


@compiled
def backward_dense(p, dp, r, dalpha, with_alpha):  # type: ignore[no-untyped-def]
    """dp becomes the gradient of the scores; that of each head's alpha is added to `dalpha`."""
    for g in range(p.shape[0]):
        for i in range(p.shape[1]):
            dalpha[g] += _row_gradient(p[g, i], dp[g, i], r[g], with_alpha)


@compiled
def backward_sparse(q, k, v, dout, r, index, weight, ends, dq, dk, dv, dalpha, with_alpha):  # type: ignore[no-untyped-def]
    """Adds all gradients, from the support alone; q is scaled like the scores that gave the weights."""
    begin, width = 0, q.shape[2]
    dp = np.empty(k.shape[1], q.dtype)
    for g in range(q.shape[0]):
        for i in range(q.shape[1]):
            n = ends[g, i] - begin
            p, row = weight[begin : begin + n], dp[:n]
            for e in range(n):
                total, source = q.dtype.type(0), v[g, index[begin + e]]
                for c in range(width):
                    total += dout[g, i, c] * source[c]
                row[e] = total
            if n == 0:  # the scores were not finite
                dq[g, i], dk[g], dv[g], dalpha[g] = np.nan, np.nan, np.nan, np.nan
                continue
            dalpha[g] += _row_gradient(p, row, r[g], with_alpha)
            for e in range(n):
                j, w, ds = index[begin + e], p[e], row[e]
                for c in range(width):
                    dq[g, i, c] += ds * k[g, j, c]
                    dk[g, j, c] += ds * q[g, i, c]
                    dv[g, j, c] += w * dout[g, i, c]
            begin = ends[g, i]
