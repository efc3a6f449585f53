"""Efficient attention on the CPU, compiled by numba: a head's keys and values are read once for their context, the
product of both, and its queries and outputs once more.

Memory is as in `maps`, in fp32. Blocks are transposed, so that lanes of a vector are tokens and rows are features.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.attention._kernels.compiling import in_parts, inner, kernel
from vitcmp.attention._kernels.maps import place_of
from vitcmp.attention._kernels.simd import LANES, exp2, fma, larger, largest, load, splat, store, total_of
from vitcmp.attention._kernels.tiles import (
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


@inner
def _weigh_queries(x, lanes, width, shares):  # type: ignore[no-untyped-def]
    """Softmax over the features, in place, but for the factors that make each query's weights sum to 1."""
    for c in range(0, lanes, LANES):
        top = splat(-np.inf, x)
        for f in range(width):
            top = larger(top, load(x, f * lanes + c))
        top, total = top * TO_POWERS_OF_2, splat(0.0, x)
        for f in range(width):
            e = exp2(fma(load(x, f * lanes + c), TO_POWERS_OF_2, 0.0 - top))
            total = total + e
            store(x, f * lanes + c, e)
        store(shares, c, 1.0 / total)


@inner
def _forward(q, k, v, out, contexts, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`, and for backward `contexts`, [heads, W + 2, W] (W: K up to vectors):

    each head's rho_k(k)^T v, and of its features the largest key and the factor that makes weights sum to 1.
    """
    wide, most = up(width, LANES), max(PANEL, min(BLOCK, up(size, LANES)))
    x, values = np.zeros(wide * most, np.float32), np.zeros(wide * most, np.float32)
    mixed, turned = np.empty(wide * PANEL, np.float32), np.empty(LANES * LANES, np.float32)
    totals, shares = np.empty(wide * LANES, np.float32), np.empty(PANEL, np.float32)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        context = contexts[head * (wide + 2) * wide : (head + 1) * (wide + 2) * wide]
        context[:], totals[:] = 0, 0
        tops, factors = context[wide * wide : (wide + 1) * wide], context[(wide + 1) * wide :]
        tops[:] = -np.inf
        for i in range(0, size, BLOCK):
            few = min(BLOCK, size - i)
            lanes = up(few, LANES)
            pack_lanes(k, at_k + i * lines[1, 2], lines[1, 2], few, width, lanes, x)
            if few < lanes:
                values[:] = 0
            pack_along(v, at_v + i * lines[2, 2], lines[2, 2], few, width, values)
            for f in range(width):
                row, end = f * lanes, (f + 1) * lanes
                top = splat(-np.inf, x)
                for j in range(row, end, LANES):
                    top = larger(top, load(x, j))
                found = largest(top) * TO_POWERS_OF_2
                if found > tops[f]:
                    # What the keys before these gave is less.
                    shrink = exp2(splat(tops[f] - found, x))
                    store(totals, f * LANES, load(totals, f * LANES) * shrink)
                    for c in range(f * wide, (f + 1) * wide, LANES):
                        store(context, c, load(context, c) * shrink)
                    tops[f] = found
                x[row + few : end] = -np.inf
                total = load(totals, f * LANES)
                for j in range(row, end, LANES):
                    e = exp2(fma(load(x, j), TO_POWERS_OF_2, 0.0 - tops[f]))
                    total = total + e
                    store(x, j, e)
                store(totals, f * LANES, total)
            add_outer(x, lanes, values, wide, width, context)
        for f in range(width):
            factors[f] = 1 / total_of(load(totals, f * LANES))
            for c in range(f * wide, (f + 1) * wide, LANES):
                store(context, c, load(context, c) * factors[f])
        for i in range(0, tokens, PANEL):
            few = min(PANEL, tokens - i)
            lanes = up(few, LANES)
            pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, x)
            _weigh_queries(x, lanes, width, shares)
            multiply_rows(context, 1, wide, x, lanes, width, mixed, width)
            write_across(mixed, lanes, turned, shares, out, at + i * lines[3, 2], lines[3, 2], few, width)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _backward(q, k, v, dout, dq, dk, dv, contexts, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Gradients of q, k and v for the heads from `first` to `last`: with weights Q and P of the queries and the keys,

    dC = Q^T dout of the context C,  dQ = dout C^T,  dq = Q (dQ - sum(Q dQ)),  dv = P dC,  dP = v dC^T, and
    dk = P (dP - sum(P dP)), where the sum over the tokens is that of C dC over a feature's row.
    """
    wide = up(width, LANES)
    x, y, values = (
        np.zeros(wide * PANEL, np.float32),
        np.zeros(wide * PANEL, np.float32),
        np.zeros(wide * PANEL, np.float32),
    )
    mixed, turned = np.empty(wide * PANEL, np.float32), np.empty(LANES * LANES, np.float32)
    shares, ones, dcontext = np.empty(PANEL, np.float32), np.ones(PANEL, np.float32), np.empty(wide * wide, np.float32)
    means = np.empty(wide, np.float32)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at_dout = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        at_dq, at_dk = place_of(lines, 4, heads, head), place_of(lines, 5, heads, head)
        at_dv = place_of(lines, 6, heads, head)
        context = contexts[head * (wide + 2) * wide : (head + 1) * (wide + 2) * wide]
        tops, factors = context[wide * wide : (wide + 1) * wide], context[(wide + 1) * wide :]
        dcontext[:] = 0
        for i in range(0, tokens, PANEL):
            few = min(PANEL, tokens - i)
            lanes = up(few, LANES)
            pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, x)
            pack_both(dout, at_dout + i * lines[3, 2], lines[3, 2], few, width, lanes, y, values)
            _weigh_queries(x, lanes, width, shares)
            multiply_rows(context, wide, 1, y, lanes, width, mixed, width)
            for c in range(0, lanes, LANES):
                share, mean = load(shares, c), splat(0.0, x)
                for j in range(c, width * lanes, lanes):
                    weight = load(x, j) * share
                    mean = fma(weight, load(mixed, j), mean)
                    store(x, j, weight)
                for j in range(c, width * lanes, lanes):
                    store(mixed, j, load(x, j) * (load(mixed, j) - mean))
            write_across(mixed, lanes, turned, ones, dq, at_dq + i * lines[4, 2], lines[4, 2], few, width)
            add_outer(x, lanes, values, wide, width, dcontext)
        for f in range(width):
            total = splat(0.0, x)
            for c in range(f * wide, (f + 1) * wide, LANES):
                total = fma(load(context, c), load(dcontext, c), total)
            means[f] = total_of(total)
        for i in range(0, size, PANEL):
            few = min(PANEL, size - i)
            lanes = up(few, LANES)
            pack_lanes(k, at_k + i * lines[1, 2], lines[1, 2], few, width, lanes, x)
            pack_lanes(v, at_v + i * lines[2, 2], lines[2, 2], few, width, lanes, y)
            for f in range(width):
                for j in range(f * lanes, (f + 1) * lanes, LANES):
                    store(x, j, exp2(fma(load(x, j), TO_POWERS_OF_2, 0.0 - tops[f])) * factors[f])
            multiply_rows(dcontext, 1, wide, x, lanes, width, mixed, width)
            write_across(mixed, lanes, turned, ones, dv, at_dv + i * lines[6, 2], lines[6, 2], few, width)
            multiply_rows(dcontext, wide, 1, y, lanes, width, mixed, width)
            for f in range(width):
                for j in range(f * lanes, (f + 1) * lanes, LANES):
                    store(mixed, j, load(x, j) * (load(mixed, j) - means[f]))
            write_across(mixed, lanes, turned, ones, dk, at_dk + i * lines[5, 2], lines[5, 2], few, width)


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
