"""Differential attention on the CPU, compiled by numba: both maps of a head are mixed in a core's cache.

Memory is as in `maps`, number formats are as in `softmax`, and lanes are queries; a head's q and k hold two maps of
`half` numbers a token side by side. The maps meet the values once, as one.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.maps import block_of, place_of
from vitcmp.kernels.numba.simd import LANES, fma, larger, load, load_part, splat, store, store_part
from vitcmp.kernels.numba.softmax import weight_of
from vitcmp.kernels.numba.tiles import (
    TILE,
    add_outer,
    multiply_rows,
    narrow_room,
    pack_along,
    pack_both,
    pack_lanes,
    pack_left,
    pair_size,
    store_both,
    store_joined,
    store_two,
    transposed_product,
    up,
    words,
    write_across,
    write_rows,
)  # fmt: skip  # isort: skip


@inner
def _forward(q, k, v, share, out, tops, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`: q and out are [B, H, N, K], k and v [B, H, M, K], flat.

    `tops`, [2, B H, N], gets the maxima of both maps' scaled scores.
    """
    p, half = pair_size(q), width // 2
    scale = np.float32(half**-0.5 / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    deep, block = up(half, p) // p, block_of(size, p)
    keys, y = np.zeros((2, rows * deep * p + LANES), q.dtype), words(np.zeros(rows * wide, q.dtype))
    queries, x = words(np.empty(block * deep * p, q.dtype)), words(np.empty(n * block, q.dtype))
    scores, mixed = np.empty((2, (rows + TILE) * block), np.float32), np.empty(wide * block, np.float32)
    s1, s2, every = scores[0], scores[1], len(tops) // 2
    turned, ones = np.empty(LANES * LANES, np.float32), np.ones(block, np.float32)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        for m in range(2):
            pack_left(k, at_k + m * half, lines[1, 2], size, half, keys[m])
        pack_along(v, at_v, lines[2, 2], size, width, y)
        for i in range(0, tokens, block):
            few = min(block, tokens - i)
            lanes = up(few, LANES)
            for m in range(2):
                pack_lanes(q, at_q + i * lines[0, 2] + m * half, lines[0, 2], few, half, lanes, queries)
                transposed_product(words(keys[m]), queries, size, deep, lanes, scores[m])
            for c in range(0, lanes, LANES):
                top1, top2 = splat(-np.inf, s1), splat(-np.inf, s1)
                for j in range(c, size * lanes, lanes):
                    top1, top2 = larger(top1, load(s1, j)), larger(top2, load(s2, j))
                top1, top2, total1, total2 = top1 * scale, top2 * scale, splat(0.0, s1), splat(0.0, s1)
                for j in range(c, n * lanes, lanes):
                    e1, e2 = weight_of(s1, j, scale, top1), weight_of(s2, j, scale, top2)
                    total1, total2 = total1 + e1, total2 + e2
                    store(s1, j, e1)
                    store(s2, j, e2)
                share1, share2 = 1.0 / total1, share[0] / total2
                for j in range(0, n * lanes, 2 * lanes):
                    e = load(s1, j + c) * share1 - load(s2, j + c) * share2
                    e2 = load(s1, j + c + lanes) * share1 - load(s2, j + c + lanes) * share2
                    store_joined(x, j // p + c, lanes, e, e2)
                store_part(tops, head * tokens + i + c, few - c, top1)
                store_part(tops, every + head * tokens + i + c, few - c, top2)
            multiply_rows(y, 1, wide, x, lanes, n // p, mixed, width)
            write_across(mixed, lanes, turned, ones, out, at + i * lines[3, 2], lines[3, 2], few, width)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _backward(q, k, v, share, dout, tops, dq, dk, dv, dshare, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Gradients of q, k and v for the heads from `first` to `last`: with the maps P_1 and P_2 and dP = dout v^T,

    dv = (P_1 - share P_2)^T dout,  dS_m = P_m (dP - sum(P_m dP)), of which the second counts -share times,
    dq_m = scale dS_m k_m,  dk_m = scale dS_m^T q_m,  and dshare = -sum(P_2 dP) of each query, [heads N].
    """
    p, half = pair_size(q), width // 2
    factor, scale = np.float32(half**-0.5), np.float32(half**-0.5 / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    narrow, block = up(half, LANES), block_of(size, p)
    deep, whole = up(half, p) // p, up(width, p) // p
    keys, k_along = np.zeros((2, rows * deep * p + LANES), q.dtype), np.zeros((2, rows * narrow), q.dtype)
    values = np.zeros(rows * whole * p + LANES, q.dtype)
    queries, q_along = words(np.empty(block * deep * p, q.dtype)), np.empty((2, block * narrow), q.dtype)
    upstream, dout_along = words(np.empty(block * whole * p, q.dtype)), words(np.empty(block * wide, q.dtype))
    # Of all keys and a block of queries: the weights and the gradients of both maps' scores, these also with keys in
    # pairs.
    scores, products = np.empty((2, (rows + TILE) * block), np.float32), np.empty((rows + TILE) * block, np.float32)
    s1, s2, every = scores[0], scores[1], len(tops) // 2
    weights, ds = narrow_room(products, q), (narrow_room(s1, q), narrow_room(s2, q))
    ds_pairs = words(narrow_room(ds[0], q)), words(narrow_room(ds[1], q))
    dkeys, dvalues = np.empty((2, rows * narrow), np.float32), np.empty(rows * wide, np.float32)
    mixed, turned = np.empty(narrow * block, np.float32), np.empty(LANES * LANES, np.float32)
    factors = np.full(block, factor)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at_out = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        at_dq, at_dk, at_dv = (
            place_of(lines, 4, heads, head), place_of(lines, 5, heads, head), place_of(lines, 6, heads, head)
        )  # fmt: skip
        for m in range(2):
            pack_left(k, at_k + m * half, lines[1, 2], size, half, keys[m])
            pack_along(k, at_k + m * half, lines[1, 2], size, half, words(k_along[m]))
        pack_left(v, at_v, lines[2, 2], size, width, values)
        dkeys[:] = 0
        dvalues[:] = 0
        for i in range(0, tokens, block):
            few = min(block, tokens - i)
            lanes = up(few, LANES)
            for m in range(2):
                at = at_q + i * lines[0, 2] + m * half
                pack_both(q, at, lines[0, 2], few, half, lanes, queries, words(q_along[m]))
                transposed_product(words(keys[m]), queries, size, deep, lanes, scores[m])
            pack_both(dout, at_out + i * lines[3, 2], lines[3, 2], few, width, lanes, upstream, dout_along)
            transposed_product(words(values), upstream, size, whole, lanes, products)
            if size % 2:
                products[size * lanes : (size + 1) * lanes] = 0
            for c in range(0, lanes, LANES):
                # Padded queries: their weights must be finite, so that zeros make them zero.
                query, there = head * tokens + i + c, few - c
                top1, top2 = load_part(tops, query, there, np.inf), load_part(tops, every + query, there, np.inf)
                zero = splat(0.0, s1)
                total1, total2, mean1, mean2 = zero, zero, zero, zero
                for j in range(c, n * lanes, lanes):
                    e1, e2, d = weight_of(s1, j, scale, top1), weight_of(s2, j, scale, top2), load(products, j)
                    store(s1, j, e1)
                    store(s2, j, e2)
                    total1, total2 = total1 + e1, total2 + e2
                    mean1, mean2 = fma(e1, d, mean1), fma(e2, d, mean2)
                part1, part2 = 1.0 / total1, 1.0 / total2
                mean1, mean2 = mean1 * part1, mean2 * part2
                store_part(dshare, query, there, 0.0 - mean2)
                part2 = part2 * share[0]
                for row in range(0, n * lanes, 2 * lanes):
                    j, j2 = row + c, row + c + lanes
                    d, d2 = load(products, j), load(products, j2)
                    e, e2 = load(s1, j) * part1, load(s1, j2) * part1
                    f, f2 = load(s2, j) * part2, load(s2, j2) * part2
                    store_two(weights, j, j2, e - f, e2 - f2)
                    e, e2 = e * (d - mean1), e2 * (d2 - mean1)
                    store_both(ds[0], ds_pairs[0], row, c, lanes, e, e2)
                    f, f2 = f * (mean2 - d), f2 * (mean2 - d2)
                    store_both(ds[1], ds_pairs[1], row, c, lanes, f, f2)
            for m in range(2):
                multiply_rows(words(k_along[m]), 1, narrow, ds_pairs[m], lanes, n // p, mixed, half)
                at = at_dq + i * lines[4, 2] + m * half
                write_across(mixed, lanes, turned, factors, dq, at, lines[4, 2], few, half)
                add_outer(words(ds[m]), lanes // p, words(q_along[m]), narrow, size, dkeys[m])
            add_outer(words(weights), lanes // p, dout_along, wide, size, dvalues)
        for m in range(2):
            write_rows(dkeys[m], factor, dk, at_dk + m * half, lines[5, 2], size, half)
        write_rows(dvalues, np.float32(1), dv, at_dv, lines[6, 2], size, width)


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
