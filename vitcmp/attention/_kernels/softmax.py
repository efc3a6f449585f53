"""Softmax attention on the CPU, compiled by numba: scores, weights and products of one head stay in a core's cache.

q, k, v and gradients are flat memory of fp32 or of bf16 (as int16); `lines` [arrays, 3] says how far apart images,
heads and tokens lie in each, and the K numbers of a token lie side by side. In bf16 the weights are rounded to it
before they meet the values. Lanes of a vector are queries, so that maxima and sums over the keys, M of them, need no
step across lanes. The kernels hold no locks and no state; threads call them on heads of their own. Where a score is
not finite, so is its row: a diverging model must show.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.attention._kernels.compiling import in_parts, inner, kernel
from vitcmp.attention._kernels.simd import (
    LANES,
    exp2,
    fma,
    larger,
    largest,
    load,
    load_part,
    multiply_add,
    read,
    splat,
    store,
    store_part,
    total_of,
    write,
)  # fmt: skip  # isort: skip
from vitcmp.attention._kernels.tiles import (
    PANEL,
    TILE,
    add_outer,
    multiply_lanes,
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

MAX_LEFT_OVER = 2
"""Queries after the last whole vector of them that are attended one at a time: a class token often makes one."""


@inner
def place_of(lines, array, heads, head):  # type: ignore[no-untyped-def]
    return (head // heads) * lines[array, 0] + (head % heads) * lines[array, 1]


@inner
def weight_of(scores, j, scale, top):  # type: ignore[no-untyped-def]
    """Weights of a key before they are made to sum to 1."""
    return exp2(fma(load(scores, j), scale, 0.0 - top))


@inner
def _num_whole(tokens):  # type: ignore[no-untyped-def]
    """Queries that come as vectors; what is left over comes one at a time where a vector would be all but empty."""
    left_over = tokens % LANES
    return tokens - left_over if left_over <= MAX_LEFT_OVER else tokens


@inner
def block_of(size, p):  # type: ignore[no-untyped-def]
    """Queries that come together: the wide tile pays in bf16, as long as their scores stay in a core's cache."""
    return PANEL if p == 2 and size <= 1024 else LANES


@inner
def _gather(scores, lane, size, rest, row):  # type: ignore[no-untyped-def]
    """One query's scores side by side, then `rest` up to whole vectors."""
    for j in range(size):
        row[j] = scores[j * LANES + lane]
    row[size:] = rest


@inner
def _mix(weights, b, there, line, n, like):  # type: ignore[no-untyped-def]
    """One query's n (pairs of) weights times LANES columns of b, [n, line], from `there` on; in fp32, as `like`."""
    s0, s1 = splat(0.0, like), splat(0.0, like)
    for t in range(0, n - 1, 2):
        s0 = multiply_add(weights, t, load(b, there + t * line), s0)
        s1 = multiply_add(weights, t + 1, load(b, there + (t + 1) * line), s1)
    if n % 2:
        s0 = multiply_add(weights, n - 1, load(b, there + (n - 1) * line), s0)
    return s0 + s1


@inner
def _forward(q, k, v, out, tops, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`, and the maxima of their scaled scores, [heads N]."""
    p = pair_size(q)
    scale = np.float32(width**-0.5 / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    deep, block = up(width, p) // p, block_of(size, p)
    keys, values = np.zeros(rows * deep * p + LANES, q.dtype), np.zeros(rows * wide, q.dtype)
    queries = np.empty(block * deep * p, q.dtype)
    scores, mixed = np.empty((rows + TILE) * block, np.float32), np.empty(wide * block, np.float32)
    a, b, y, x = words(keys), words(queries), words(values), words(narrow_room(scores, q))
    shares, row, one = np.empty(block, np.float32), np.empty(rows, np.float32), np.empty(rows, q.dtype)
    turned, whole = np.empty(LANES * LANES, np.float32), _num_whole(tokens)
    for head in range(first, last):
        at_q, at = place_of(lines, 0, heads, head), place_of(lines, 3, heads, head)
        pack_left(k, place_of(lines, 1, heads, head), lines[1, 2], size, width, keys)
        pack_along(v, place_of(lines, 2, heads, head), lines[2, 2], size, width, y)
        for i in range(0, whole, block):
            few = min(block, whole - i)
            lanes = up(few, LANES)
            pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, b)
            transposed_product(a, b, size, deep, lanes, scores)
            for c in range(0, lanes, LANES):
                top, top2 = splat(-np.inf, scores), splat(-np.inf, scores)
                for j in range(c, n * lanes, 2 * lanes):
                    top, top2 = larger(top, load(scores, j)), larger(top2, load(scores, j + lanes))
                m, total, total2 = larger(top, top2) * scale, splat(0.0, scores), splat(0.0, scores)
                for j in range(0, n * lanes, 2 * lanes):
                    e, e2 = weight_of(scores, j + c, scale, m), weight_of(scores, j + c + lanes, scale, m)
                    total, total2 = total + e, total2 + e2
                    store_joined(x, j // p + c, lanes, e, e2)
                store(shares, c, 1.0 / (total + total2))
                store_part(tops, head * tokens + i + c, few - c, m)
            for r in range(0, width, TILE):
                multiply_lanes(y, r, 1, wide, x, lanes, n // p, mixed, r * lanes)
            write_across(mixed, lanes, turned, shares, out, at + i * lines[3, 2], lines[3, 2], few, width)
        if whole < tokens:
            pack_lanes(q, at_q + whole * lines[0, 2], lines[0, 2], tokens - whole, width, LANES, b)
            transposed_product(a, b, size, deep, LANES, scores)
        for i in range(whole, tokens):
            _gather(scores, i - whole, size, -np.inf, row)
            top, total = splat(-np.inf, scores), splat(0.0, scores)
            for j in range(0, size, LANES):
                top = larger(top, load(row, j))
            m1 = largest(top) * scale
            for j in range(0, size, LANES):
                e = weight_of(row, j, scale, m1)
                total = total + e
                write(one, j, LANES, e)
            tops[head * tokens + i] = m1
            share = np.float32(1) / total_of(total)
            for c in range(0, wide, LANES):
                place = at + i * lines[3, 2] + c
                write(out, place, width - c, _mix(words(one), y, c, wide, n // p, scores) * share)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _backward(q, k, v, dout, tops, dq, dk, dv, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Gradients of q, k and v for the heads from `first` to `last`: with the weights P = softmax(scale q k^T),

    dv = P^T dout,  dS = P (dP - sum(P dP)) with dP = dout v^T,  dq = scale dS k,  dk = scale dS^T q.
    """
    p = pair_size(q)
    factor = np.float32(width**-0.5)
    scale = np.float32(width**-0.5 / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    deep, block = up(width, p) // p, block_of(size, p)
    left = np.zeros((2, rows * deep * p + LANES), q.dtype)
    across, along = np.empty((2, block * deep * p), q.dtype), np.empty((2, block * wide), q.dtype)
    k_left, v_left, k_along = words(left[0]), words(left[1]), words(np.zeros(rows * wide, q.dtype))
    q_across, dout_across, q_along, dout_along = words(across[0]), words(across[1]), words(along[0]), words(along[1])
    # Of all keys and a block of queries: the weights and the gradient of the scores, this also with keys in pairs.
    scores, products = np.empty((rows + TILE) * block, np.float32), np.empty((rows + TILE) * block, np.float32)
    weights, ds = narrow_room(scores, q), narrow_room(products, q)
    weights_left, ds_left, ds_pairs = words(weights), words(ds), words(narrow_room(ds, q))
    dkeys, dvalues = np.empty(rows * wide, np.float32), np.empty(rows * wide, np.float32)
    mixed, turned = np.empty(wide * block, np.float32), np.empty(LANES * LANES, np.float32)
    row, drow, one = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, q.dtype)
    factors, whole = np.full(block, factor), _num_whole(tokens)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at_out = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        pack_left(k, at_k, lines[1, 2], size, width, left[0])
        pack_left(v, at_v, lines[2, 2], size, width, left[1])
        pack_along(k, at_k, lines[1, 2], size, width, k_along)
        at_dq, at_dk, at_dv = (
            place_of(lines, 4, heads, head), place_of(lines, 5, heads, head), place_of(lines, 6, heads, head)
        )  # fmt: skip
        dkeys[:] = 0
        dvalues[:] = 0
        for i in range(0, whole, block):
            few = min(block, whole - i)
            lanes = up(few, LANES)
            x, upstream = at_q + i * lines[0, 2], at_out + i * lines[3, 2]
            pack_both(q, x, lines[0, 2], few, width, lanes, q_across, q_along)
            pack_both(dout, upstream, lines[3, 2], few, width, lanes, dout_across, dout_along)
            transposed_product(k_left, q_across, size, deep, lanes, scores)
            transposed_product(v_left, dout_across, size, deep, lanes, products)
            if size % 2:
                products[size * lanes : (size + 1) * lanes] = 0
            for c in range(0, lanes, LANES):
                # Weights of queries that are not there must be finite, to come to nothing.
                m, zero = load_part(tops, head * tokens + i + c, few - c, np.inf), splat(0.0, scores)
                total, total2, mean, mean2 = zero, zero, zero, zero
                for j in range(c, n * lanes, 2 * lanes):
                    e, e2 = weight_of(scores, j, scale, m), weight_of(scores, j + lanes, scale, m)
                    store(scores, j, e)
                    store(scores, j + lanes, e2)
                    total, total2 = total + e, total2 + e2
                    mean, mean2 = fma(e, load(products, j), mean), fma(e2, load(products, j + lanes), mean2)
                share = 1.0 / (total + total2)
                mean = (mean + mean2) * share
                for row_of_pair in range(0, n * lanes, 2 * lanes):
                    j = row_of_pair + c
                    e, e2 = load(scores, j) * share, load(scores, j + lanes) * share
                    store_two(weights, j, j + lanes, e, e2)
                    e, e2 = e * (load(products, j) - mean), e2 * (load(products, j + lanes) - mean)
                    store_both(ds, ds_pairs, row_of_pair, c, lanes, e, e2)
            for r in range(0, width, TILE):
                multiply_lanes(k_along, r, 1, wide, ds_pairs, lanes, n // p, mixed, r * lanes)
            write_across(mixed, lanes, turned, factors, dq, at_dq + i * lines[4, 2], lines[4, 2], few, width)
            add_outer(weights_left, lanes // p, dout_along, wide, size, dvalues)
            add_outer(ds_left, lanes // p, q_along, wide, size, dkeys)
        if whole < tokens:
            x, upstream, few = at_q + whole * lines[0, 2], at_out + whole * lines[3, 2], tokens - whole
            pack_lanes(q, x, lines[0, 2], few, width, LANES, q_across)
            pack_lanes(dout, upstream, lines[3, 2], few, width, LANES, dout_across)
            transposed_product(k_left, q_across, size, deep, LANES, scores)
            transposed_product(v_left, dout_across, size, deep, LANES, products)
        for i in range(whole, tokens):
            _gather(scores, i - whole, size, -np.inf, row)
            _gather(products, i - whole, size, 0.0, drow)
            m1, total, mean = tops[head * tokens + i], splat(0.0, scores), splat(0.0, scores)
            for j in range(0, size, LANES):
                e = weight_of(row, j, scale, m1)
                store(row, j, e)
                total, mean = total + e, fma(e, load(drow, j), mean)
            share1 = np.float32(1) / total_of(total)
            mean1 = total_of(mean) * share1
            for j in range(0, size, LANES):
                e = load(row, j) * share1
                store(row, j, e)
                e = e * (load(drow, j) - mean1)
                store(drow, j, e)
                write(one, j, LANES, e)
            for c in range(0, wide, LANES):
                place = at_dq + i * lines[4, 2] + c
                write(dq, place, width - c, _mix(words(one), k_along, c, wide, n // p, scores) * factor)
                query = read(q, at_q + i * lines[0, 2] + c, width - c)
                gradient = read(dout, at_out + i * lines[3, 2] + c, width - c)
                for j in range(size):
                    at = j * wide + c
                    store(dkeys, at, fma(query, drow[j], load(dkeys, at)))
                    store(dvalues, at, fma(gradient, row[j], load(dvalues, at)))
        write_rows(dkeys, factor, dk, at_dk, lines[5, 2], size, width)
        write_rows(dvalues, np.float32(1), dv, at_dv, lines[6, 2], size, width)


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
