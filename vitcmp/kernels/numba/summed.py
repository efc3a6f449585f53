"""Attention whose tokens are summed once, on the CPU, compiled by numba: efficient and linear attention.

    out_i = phi(q_i) C / (phi(q_i) . z + eps),   C = sum_j psi(k_j) v_j^T,   with

efficient: phi(q) = exp(q - max over features),  psi(k) = exp(k - max over tokens) / its sum over tokens,  z = 1
linear:    phi = psi = elu + 1,                                                  z = sum_j psi(k_j)

A head's keys and values are read once for their context C, its queries and outputs once more. Memory is as in `maps`,
in fp32. Blocks are transposed: lanes of a vector are tokens, rows are features.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.maps import place_of
from vitcmp.kernels.numba.simd import LANES, exp2, fma, larger, largest, load, smaller, splat, store, total_of
from vitcmp.kernels.numba.tiles import (
    PANEL,
    add_outer,
    multiply_rows,
    pack_along,
    pack_both,
    pack_lanes,
    up,
    write_across,
)  # fmt: skip  # isort: skip

BLOCK = 16 * LANES
"""Keys that meet their values together."""
TO_POWERS_OF_2 = np.float32(1 / math.log(2))


@inner(forceinline=True)
def _feature(x, top, softmax):  # type: ignore[no-untyped-def]
    """phi, or psi without its factor; `top` is the largest x, as a power of 2."""
    if softmax:
        return exp2(fma(x, TO_POWERS_OF_2, 0.0 - top))
    return larger(0.0, x) + exp2(smaller(0.0, x) * TO_POWERS_OF_2)


@inner(forceinline=True)
def _slope(feature, softmax):  # type: ignore[no-untyped-def]
    """The derivative of a feature."""
    return feature if softmax else smaller(1.0, feature)


@inner
def _weigh_queries(x, lanes, width, z, eps, shares, softmax):  # type: ignore[no-untyped-def]
    """phi in place, and the factor that each query's row is to be multiplied by."""
    for c in range(0, lanes, LANES):
        top, total = splat(-np.inf, x), splat(eps, x)
        if softmax:
            for j in range(c, width * lanes, lanes):
                top = larger(top, load(x, j))
        top = top * TO_POWERS_OF_2
        for f in range(width):
            a = _feature(load(x, f * lanes + c), top, softmax)
            total = total + (a if softmax else a * z[f])
            store(x, f * lanes + c, a)
        store(shares, c, 1.0 / total)


@inner
def _raise(top, f, tops, totals, context, wide):  # type: ignore[no-untyped-def]
    """A feature's largest key has grown: what the keys before it gave is less."""
    shrink = exp2(splat(tops[f] - top, context))
    store(totals, f * LANES, load(totals, f * LANES) * shrink)
    for c in range(f * wide, (f + 1) * wide, LANES):
        store(context, c, load(context, c) * shrink)
    tops[f] = top


@inner
def _parts_of(contexts, head, wide):  # type: ignore[no-untyped-def]
    """Of a head: C, [W, W]; the largest keys, as powers of 2; and psi's factors, or z."""
    one = contexts[head * (wide + 2) * wide : (head + 1) * (wide + 2) * wide]
    return one[: wide * wide], one[wide * wide : (wide + 1) * wide], one[(wide + 1) * wide :]


def _summed(softmax):  # type: ignore[no-untyped-def]
    """Forward and backward of efficient attention, or of linear attention."""

    @inner
    def forward(eps, q, k, v, out, contexts, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
        """Outputs of the heads from `first` to `last`: q and out are [B, H, N, K], k and v [B, H, M, K], flat.

        `contexts`, [B H, W + 2, W], gets each one's `_parts_of`, for backward.
        """
        wide, most = up(width, LANES), max(PANEL, min(BLOCK, up(size, LANES)))
        x, values = np.zeros(wide * most, np.float32), np.zeros(wide * most, np.float32)
        mixed, turned = np.empty(wide * PANEL, np.float32), np.empty(LANES * LANES, np.float32)
        totals, shares = np.empty(wide * LANES, np.float32), np.empty(PANEL, np.float32)
        for head in range(first, last):
            at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
            at_v, at = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
            context, tops, sums = _parts_of(contexts, head, wide)
            context[:], totals[:], tops[:] = 0, 0, -np.inf
            for i in range(0, size, BLOCK):
                few = min(BLOCK, size - i)
                lanes = up(few, LANES)
                pack_lanes(k, at_k + i * lines[1, 2], lines[1, 2], few, width, lanes, x)
                if few < lanes:
                    values[:] = 0
                pack_along(v, at_v + i * lines[2, 2], lines[2, 2], few, width, values)
                for f in range(width):
                    row, end = f * lanes, (f + 1) * lanes
                    if softmax:
                        top = splat(-np.inf, x)
                        for j in range(row, end, LANES):
                            top = larger(top, load(x, j))
                        found = largest(top) * TO_POWERS_OF_2
                        if found > tops[f]:
                            _raise(found, f, tops, totals, context, wide)
                    # Zero padding: these keys do not exist, so their features are nearly 0.
                    x[row + few : end] = -np.inf
                    total = load(totals, f * LANES)
                    for j in range(row, end, LANES):
                        b = _feature(load(x, j), tops[f], softmax)
                        total = total + b
                        store(x, j, b)
                    store(totals, f * LANES, total)
                add_outer(x, lanes, values, wide, width, context)
            for f in range(width):
                sums[f] = total_of(load(totals, f * LANES))
                if softmax:
                    sums[f] = 1 / sums[f]
                    for c in range(f * wide, (f + 1) * wide, LANES):
                        store(context, c, load(context, c) * sums[f])
            for i in range(0, tokens, PANEL):
                few = min(PANEL, tokens - i)
                lanes = up(few, LANES)
                pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, x)
                _weigh_queries(x, lanes, width, sums, eps, shares, softmax)
                multiply_rows(context, 1, wide, x, lanes, width, mixed, width)
                write_across(mixed, lanes, turned, shares, out, at + i * lines[3, 2], lines[3, 2], few, width)

    @inner
    def backward(eps, q, k, v, dout, dq, dk, dv, contexts, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
        """Gradients of q, k and v for the heads from `first` to `last`: with r = 1 / (phi(q) . z + eps), A = r phi(q),

        B = psi(k):  dA = dout C^T,  m = sum_f(A dA),  dq = r phi'(q) (dA - m z),  dC = A^T dout,  dz = -A^T m,
        dv = B dC,  dk = psi'(k) (v dC^T + dz), where efficient attention has the sum of C dC over a feature's row in
        the place of -dz: it comes of psi's sum over the tokens.
        """
        wide, room = up(width, LANES), up(width, LANES) * PANEL
        x, y, values = np.zeros(room, np.float32), np.zeros(room, np.float32), np.zeros(room, np.float32)
        mixed, turned = np.empty(room, np.float32), np.empty(LANES * LANES, np.float32)
        shares, ones = np.empty(PANEL, np.float32), np.ones(PANEL, np.float32)
        dcontext, dsums = np.empty(wide * wide, np.float32), np.empty(wide, np.float32)
        totals = np.empty(wide * LANES, np.float32)
        for head in range(first, last):
            at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
            at_v, at_dout = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
            at_dq, at_dk = place_of(lines, 4, heads, head), place_of(lines, 5, heads, head)
            at_dv = place_of(lines, 6, heads, head)
            context, tops, sums = _parts_of(contexts, head, wide)
            dcontext[:], totals[:] = 0, 0
            for i in range(0, tokens, PANEL):
                few = min(PANEL, tokens - i)
                lanes = up(few, LANES)
                pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, x)
                pack_both(dout, at_dout + i * lines[3, 2], lines[3, 2], few, width, lanes, y, values)
                # Zero padding: these queries do not exist, so they have no gradient.
                for j in range(few, width * lanes if few < lanes else 0, lanes):
                    y[j : j + lanes - few] = 0
                _weigh_queries(x, lanes, width, sums, eps, shares, softmax)
                multiply_rows(context, wide, 1, y, lanes, width, mixed, width)
                for c in range(0, lanes, LANES):
                    share, mean = load(shares, c), splat(0.0, x)
                    for j in range(c, width * lanes, lanes):
                        mean = fma(load(x, j), load(mixed, j), mean)
                    mean = mean * share
                    for f in range(width):
                        j = f * lanes + c
                        a = load(x, j)
                        d = load(mixed, j) - (mean if softmax else mean * sums[f])
                        store(mixed, j, _slope(a, softmax) * share * d)
                        store(x, j, a * share)
                        if not softmax:
                            store(totals, f * LANES, load(totals, f * LANES) - a * share * mean)
                write_across(mixed, lanes, turned, ones, dq, at_dq + i * lines[4, 2], lines[4, 2], few, width)
                add_outer(x, lanes, values, wide, width, dcontext)
            for f in range(width):
                total = load(totals, f * LANES)
                if softmax:
                    for c in range(f * wide, (f + 1) * wide, LANES):
                        total = total - load(context, c) * load(dcontext, c)
                dsums[f] = total_of(total)
            for i in range(0, size, PANEL):
                few = min(PANEL, size - i)
                lanes = up(few, LANES)
                pack_lanes(k, at_k + i * lines[1, 2], lines[1, 2], few, width, lanes, x)
                pack_lanes(v, at_v + i * lines[2, 2], lines[2, 2], few, width, lanes, y)
                for f in range(width):
                    for j in range(f * lanes, (f + 1) * lanes, LANES):
                        b = _feature(load(x, j), tops[f], softmax)
                        store(x, j, b * sums[f] if softmax else b)
                multiply_rows(dcontext, 1, wide, x, lanes, width, mixed, width)
                write_across(mixed, lanes, turned, ones, dv, at_dv + i * lines[6, 2], lines[6, 2], few, width)
                multiply_rows(dcontext, wide, 1, y, lanes, width, mixed, width)
                for f in range(width):
                    for j in range(f * lanes, (f + 1) * lanes, LANES):
                        store(mixed, j, _slope(load(x, j), softmax) * (load(mixed, j) + dsums[f]))
                write_across(mixed, lanes, turned, ones, dk, at_dk + i * lines[5, 2], lines[5, 2], few, width)

    return forward, backward


_efficient, _efficient_backward = _summed(softmax=True)
_linear, _linear_backward = _summed(softmax=False)


@kernel
def efficient(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_efficient, team, args)


@kernel
def efficient_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_efficient_backward, team, args)


@kernel
def linear(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_linear, team, args)


@kernel
def linear_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_linear_backward, team, args)
