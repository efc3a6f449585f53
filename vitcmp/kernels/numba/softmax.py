"""Softmax attention on the CPU, compiled by numba: scores, weights and products of one head stay in a core's cache.

Memory is as in `maps`. In bf16 the weights are rounded to it before they meet the values. Forward, lanes of a vector
are queries, so that maxima and sums over the keys, M of them, need no step across lanes; of many keys, queries meet a
part at a time, and what the parts before gave shrinks wherever the maximum grows (Milakov & Gimelshein, 2018,
algorithm 3). Backward, where maxima and sums are known, lanes are keys. The kernels hold no locks and no state; threads
call them on heads of their own. Where a score is not finite, so is its row: a diverging model must show.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.maps import (
    MAX_EXPECTED,
    MAX_TOGETHER,
    block_of,
    expect,
    gradients,
    mix,
    num_whole,
    place_of,
    room_for,
    sum_up,
    together_of,
)  # fmt: skip  # isort: skip
from vitcmp.kernels.numba.simd import (
    LANES,
    exp2,
    fma,
    larger,
    largest,
    load,
    load_part,
    read,
    splat,
    store,
    store_part,
    total_of,
    write,
)  # fmt: skip  # isort: skip
from vitcmp.kernels.numba.tiles import (
    TILE,
    multiply_rows,
    narrow_room,
    pack_along,
    pack_lanes,
    pack_left,
    pair_size,
    store_joined,
    transposed_product,
    up,
    words,
)  # fmt: skip  # isort: skip


@inner
def weight_of(scores, j, scale, top):  # type: ignore[no-untyped-def]
    """Weights of a key before they are made to sum to 1."""
    return exp2(fma(load(scores, j), scale, 0.0 - top))


@inner
def _gather(scores, lane, size, row):  # type: ignore[no-untyped-def]
    """One query's scores side by side, then -inf up to whole vectors."""
    for j in range(size):
        row[j] = scores[j * LANES + lane]
    row[size:] = -np.inf


@inner
def _forward(q, k, v, out, stats, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`: q and out are [B, H, N, K], k and v [B, H, M, K], flat.

    `stats`, [2, B H, N], gets of each query:

    the largest scaled score, as a power of 2, and the factor that makes the weights sum to 1.
    """
    p, every, most = pair_size(q), len(stats) // 2, min(size, MAX_TOGETHER)
    scale, parted = np.float32(width**-0.5 / math.log(2)), most < size
    whole, together = tokens if parted else num_whole(tokens), together_of(tokens, parted, q)
    wide, rows = up(width, LANES), up(most, LANES)
    deep, block = up(width, p) // p, block_of(most, p)
    keys, values = np.zeros(rows * deep * p + LANES, q.dtype), np.zeros(rows * wide, q.dtype)
    queries = np.empty(block * deep * p, q.dtype)
    scores, mixed = np.empty((rows + TILE) * block, np.float32), np.empty(wide * block, np.float32)
    a, b, y, x = words(keys), words(queries), words(values), words(narrow_room(scores, q))
    shares, row, one = np.empty(block, np.float32), np.empty(rows, np.float32), np.empty(rows, q.dtype)
    turned, ones = np.empty(LANES * LANES, np.float32), np.ones(block, np.float32)
    kept, shrinks = room_for(together, wide, parted, q), np.empty(block, np.float32)
    expects = heads * max(tokens, size) * width <= MAX_EXPECTED
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        if expects and head + heads < last:
            expect(q, 0, lines, heads, head, tokens, width, False)
            expect(k, 1, lines, heads, head, size, width, False)
            expect(v, 2, lines, heads, head, size, width, False)
            expect(out, 3, lines, heads, head, tokens, width, True)
        for start in range(0, tokens, together):
            for part in range(0, size, most):
                num = min(most, size - part)
                n, begins, ends = up(num, 2), part == 0, part + num == size
                pack_left(k, at_k + part * lines[1, 2], lines[1, 2], num, width, keys)
                pack_along(v, at_v + part * lines[2, 2], lines[2, 2], num, width, y)
                for i in range(start, min(start + together, whole), block):
                    few = min(block, whole - i)
                    lanes = up(few, LANES)
                    pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, b)
                    transposed_product(a, b, num, deep, lanes, scores)
                    for c in range(0, lanes, LANES):
                        query, there = head * tokens + i + c, few - c
                        top, top2 = splat(-np.inf, scores), splat(-np.inf, scores)
                        for j in range(c, n * lanes, 2 * lanes):
                            top, top2 = larger(top, load(scores, j)), larger(top2, load(scores, j + lanes))
                        m, total, total2 = larger(top, top2) * scale, splat(0.0, scores), splat(0.0, scores)
                        if not begins:
                            before = load_part(stats, query, there, 0)
                            m = larger(before, m)
                            shrink = exp2(before - m)
                            total = load_part(stats, every + query, there, 0) * shrink
                            store(shrinks, c, shrink)
                        for j in range(0, n * lanes, 2 * lanes):
                            e, e2 = weight_of(scores, j + c, scale, m), weight_of(scores, j + c + lanes, scale, m)
                            total, total2 = total + e, total2 + e2
                            store_joined(x, j // p + c, lanes, e, e2)
                        total = total + total2
                        store_part(stats, query, there, m)
                        if ends:
                            total = 1.0 / total
                            store(shares, c, total)
                        store_part(stats, every + query, there, total)
                    multiply_rows(y, 1, wide, x, lanes, n // p, mixed, width)
                    room, factors = kept[(i - start) * wide :], shares if ends else ones
                    to, line = at + i * lines[3, 2], lines[3, 2]
                    sum_up(mixed, lanes, turned, room, shrinks, factors, out, to, line, few, width, begins, ends)
        if whole < tokens:
            pack_lanes(q, at_q + whole * lines[0, 2], lines[0, 2], tokens - whole, width, LANES, b)
            transposed_product(a, b, size, deep, LANES, scores)
        for i in range(whole, tokens):
            _gather(scores, i - whole, size, row)
            top, total = splat(-np.inf, scores), splat(0.0, scores)
            for j in range(0, size, LANES):
                top = larger(top, load(row, j))
            m1 = largest(top) * scale
            for j in range(0, size, LANES):
                e = weight_of(row, j, scale, m1)
                total = total + e
                write(one, j, LANES, e)
            share1, query = np.float32(1) / total_of(total), head * tokens + i
            stats[query], stats[every + query] = m1, share1
            for c in range(0, wide, LANES):
                place = at + i * lines[3, 2] + c
                write(out, place, width - c, mix(words(one), y, c, wide, up(size, 2) // p, scores) * share1)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _facts(given, ahead, dout, lines, heads, head, tokens, start, num, width, tops, shares, means):  # type: ignore[no-untyped-def]
    """Of each query the largest score, the weights' factor, and sum(dout out), the mean of dout v^T."""
    stats, out = given
    if ahead and not start:
        expect(out, 7, lines, heads, head, tokens, width, False)
    every, query = len(stats) // 2, head * tokens + start
    at_out = place_of(lines, 7, heads, head) + start * lines[7, 2]
    at_dout = place_of(lines, 3, heads, head) + start * lines[3, 2]
    for j in range(num):
        tops[j], shares[j] = stats[query + j], stats[every + query + j]
        total = splat(0.0, stats)
        for c in range(0, width, LANES):
            here = read(out, at_out + j * lines[7, 2] + c, width - c)
            total = total + here * read(dout, at_dout + j * lines[3, 2] + c, width - c)
        means[j] = total_of(total)


@inner(forceinline=True)
def _weigh(score, share, product, mean):  # type: ignore[no-untyped-def]
    weight = exp2(score) * share
    return weight, weight * (product - mean)


_backward = gradients(_facts, _weigh)
"""Of weights P = softmax(scale q k^T): dS = P (dout v^T - sum(dout out))."""


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
