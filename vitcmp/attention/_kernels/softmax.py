"""Softmax attention on the CPU, compiled by numba: scores, weights and products of one head stay in a core's cache.

q, k, v and gradients are flat memory of fp32 or of bf16 (as int16); `lines` [arrays, 3] says how far apart images,
heads and tokens lie in each, and the K numbers of a token lie side by side. In bf16 the weights are rounded to it
before they meet the values. Forward, lanes of a vector are queries, so that maxima and sums over the keys, M of them,
need no step across lanes; backward, where these are known, lanes are keys. The kernels hold no locks and no state;
threads call them on heads of their own. Where a score is not finite, so is its row: a diverging model must show.
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
    multiply_add,
    prefetch,
    prefetch_to_write,
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
    multiply_rows,
    narrow_room,
    pack_along,
    pack_both,
    pack_lanes,
    pack_left,
    pair_size,
    store_both,
    store_joined,
    transposed_product,
    up,
    words,
    write_across,
    write_rows,
)  # fmt: skip  # isort: skip

MAX_LEFT_OVER = 2
"""Tokens after the last whole vector of them that come one at a time: a class token often makes one."""
MAX_QUERIES = 1024
"""Queries that come together backward: of more, what every block of keys reads would not stay in a core's cache."""
MAX_EXPECTED = 2**16
"""Numbers of an image and array up to which the next image is brought into cache while this one is at work."""


@inner
def place_of(lines, array, heads, head):  # type: ignore[no-untyped-def]
    return (head // heads) * lines[array, 0] + (head % heads) * lines[array, 1]


@inner
def weight_of(scores, j, scale, top):  # type: ignore[no-untyped-def]
    """Weights of a key before they are made to sum to 1."""
    return exp2(fma(load(scores, j), scale, 0.0 - top))


@inner
def _num_whole(tokens):  # type: ignore[no-untyped-def]
    """Tokens that come as vectors; what is left over comes one at a time where a vector would be all but empty."""
    left_over = tokens % LANES
    return tokens - left_over if left_over <= MAX_LEFT_OVER else tokens


@inner
def block_of(size, p):  # type: ignore[no-untyped-def]
    """Tokens that come together: the wide tile pays in bf16, as long as their scores stay in a core's cache."""
    return PANEL if p == 2 and size <= 1024 else LANES


@inner
def _expect(x, array, lines, heads, head, rows, width, writes):  # type: ignore[no-untyped-def]
    """The same head of the next image is brought into cache: from one image to the next, its rows lie far apart."""
    at = place_of(lines, array, heads, head + heads)
    for i in range(rows):
        for c in range(0, width, LANES):
            if writes:
                prefetch_to_write(x, at + i * lines[array, 2] + c)
            else:
                prefetch(x, at + i * lines[array, 2] + c)


@inner
def _gather(scores, lane, size, row):  # type: ignore[no-untyped-def]
    """One query's scores side by side, then -inf up to whole vectors."""
    for j in range(size):
        row[j] = scores[j * LANES + lane]
    row[size:] = -np.inf


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
def _forward(q, k, v, out, stats, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`, and facts of their queries in `stats`, [2, heads N]:

    the largest scaled score, as a power of 2, and the factor that makes the weights sum to 1.
    """
    p, every = pair_size(q), len(stats) // 2
    scale = np.float32(width**-0.5 / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    deep, block = up(width, p) // p, block_of(size, p)
    keys, values = np.zeros(rows * deep * p + LANES, q.dtype), np.zeros(rows * wide, q.dtype)
    queries = np.empty(block * deep * p, q.dtype)
    scores, mixed = np.empty((rows + TILE) * block, np.float32), np.empty(wide * block, np.float32)
    a, b, y, x = words(keys), words(queries), words(values), words(narrow_room(scores, q))
    shares, row, one = np.empty(block, np.float32), np.empty(rows, np.float32), np.empty(rows, q.dtype)
    turned, whole = np.empty(LANES * LANES, np.float32), _num_whole(tokens)
    expects = heads * max(tokens, size) * width <= MAX_EXPECTED
    for head in range(first, last):
        at_q, at = place_of(lines, 0, heads, head), place_of(lines, 3, heads, head)
        if expects and head + heads < last:
            _expect(q, 0, lines, heads, head, tokens, width, False)
            _expect(k, 1, lines, heads, head, size, width, False)
            _expect(v, 2, lines, heads, head, size, width, False)
            _expect(out, 3, lines, heads, head, tokens, width, True)
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
                share, query = 1.0 / (total + total2), head * tokens + i + c
                store(shares, c, share)
                store_part(stats, query, few - c, m)
                store_part(stats, every + query, few - c, share)
            multiply_rows(y, 1, wide, x, lanes, n // p, mixed, width)
            write_across(mixed, lanes, turned, shares, out, at + i * lines[3, 2], lines[3, 2], few, width)
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
                write(out, place, width - c, _mix(words(one), y, c, wide, n // p, scores) * share1)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _nothing(size, wide, wanted):  # type: ignore[no-untyped-def]
    """Room for blocks of a head's keys, if wanted."""
    return np.zeros(up(size, PANEL) * wide if wanted else 0, np.float32)


@inner
def _carry(mixed, kept, at, n):  # type: ignore[no-untyped-def]
    """Adds what was kept from `at` on to n numbers, and keeps the sums."""
    for c in range(0, n, LANES):
        total = load(mixed, c) + load(kept, at + c)
        store(mixed, c, total)
        store(kept, at + c, total)


@inner
def _backward(q, k, v, out, dout, stats, dq, dk, dv, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
    """Gradients of q, k and v for the heads from `first` to `last`: with the weights P = softmax(scale q k^T),

    dv = P^T dout,  dS = P (dout v^T - sum(dout out)),  dq = scale dS k,  dk = scale dS^T q.

    With keys as lanes, a block of dk and dv is whole after all queries, and only dq is summed up in memory. Where
    queries come in parts, so are dk and dv.
    """
    p, every = pair_size(q), len(stats) // 2
    factor = np.float32(width**-0.5)
    scale = np.float32(width**-0.5 / math.log(2))
    most = min(tokens, MAX_QUERIES)
    wide, rows, deep, block = up(width, LANES), up(most, LANES), up(width, p) // p, block_of(most, p)
    queries, upstream = np.zeros(rows * deep * p + LANES, q.dtype), np.zeros(rows * deep * p + LANES, q.dtype)
    q_left, dout_left = words(queries), words(upstream)
    q_along, dout_along = words(np.zeros(rows * wide, q.dtype)), words(np.zeros(rows * wide, q.dtype))
    k_across, v_across = words(np.empty(block * deep * p, q.dtype)), words(np.empty(block * deep * p, q.dtype))
    k_along = words(np.empty(block * wide, q.dtype))
    # Of a part of the queries and a block of keys: the weights with queries in pairs, the scores' gradient with both.
    scores, products = np.empty((rows + TILE) * block, np.float32), np.empty((rows + TILE) * block, np.float32)
    weights, ds = words(narrow_room(scores, q)), narrow_room(products, q)
    ds_left, ds_pairs = words(ds), words(narrow_room(ds, q))
    dqueries, tops = np.empty(rows * wide, np.float32), np.zeros(rows, np.float32)
    shares, means = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    mixed, turned = np.empty(wide * block, np.float32), np.empty(LANES * LANES, np.float32)
    factors, ones, whole = np.full(block, factor), np.ones(block, np.float32), _num_whole(size)
    # Of one key alone: itself and its value, and of all queries its weights and the gradients of its scores.
    key, value = np.empty(deep * p + LANES, q.dtype), np.empty(deep * p + LANES, q.dtype)
    weight, dscore, drow = np.empty(rows, q.dtype), np.empty(rows, q.dtype), np.empty(rows, np.float32)
    one_key, one_value, one_weight, one_dscore = words(key), words(value), words(weight), words(dscore)
    # Of all keys, what the parts before this one gave.
    parted = most < tokens
    kept_k, kept_v = _nothing(size, wide, parted), _nothing(size, wide, parted)
    expects = heads * max(tokens, size) * width <= MAX_EXPECTED
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at_out = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        at_dout, at_dq = place_of(lines, 4, heads, head), place_of(lines, 5, heads, head)
        at_dk, at_dv = place_of(lines, 6, heads, head), place_of(lines, 7, heads, head)
        if expects and head + heads < last:
            _expect(q, 0, lines, heads, head, tokens, width, False)
            _expect(k, 1, lines, heads, head, size, width, False)
            _expect(v, 2, lines, heads, head, size, width, False)
            _expect(out, 3, lines, heads, head, tokens, width, False)
            _expect(dout, 4, lines, heads, head, tokens, width, False)
            _expect(dq, 5, lines, heads, head, tokens, width, True)
            _expect(dk, 6, lines, heads, head, size, width, True)
            _expect(dv, 7, lines, heads, head, size, width, True)
        kept_k[:], kept_v[:] = 0, 0
        for start in range(0, tokens, most):
            num, query = min(most, tokens - start), head * tokens + start
            n = up(num, 2)
            pack_left(q, at_q, lines[0, 2], num, width, queries)
            pack_left(dout, at_dout, lines[4, 2], num, width, upstream)
            pack_along(q, at_q, lines[0, 2], num, width, q_along)
            pack_along(dout, at_dout, lines[4, 2], num, width, dout_along)
            # A query that is not there has no weights.
            tops[num:], shares[num:], means[num:] = np.inf, 0, 0
            for j in range(num):
                tops[j], shares[j] = stats[query + j], stats[every + query + j]
                total = splat(0.0, scores)
                for c in range(0, width, LANES):
                    here = read(out, at_out + j * lines[3, 2] + c, width - c)
                    total = total + here * read(dout, at_dout + j * lines[4, 2] + c, width - c)
                means[j] = total_of(total)
            dqueries[:] = 0
            for i in range(0, whole, block):
                few = min(block, whole - i)
                lanes = up(few, LANES)
                pack_both(k, at_k + i * lines[1, 2], lines[1, 2], few, width, lanes, k_across, k_along)
                pack_lanes(v, at_v + i * lines[2, 2], lines[2, 2], few, width, lanes, v_across)
                transposed_product(q_left, k_across, num, deep, lanes, scores)
                transposed_product(dout_left, v_across, num, deep, lanes, products)
                if num % 2:
                    products[num * lanes : (num + 1) * lanes] = 0
                for j in range(0, n, 2):
                    for c in range(0, lanes, LANES):
                        at = j * lanes + c
                        e = weight_of(scores, at, scale, tops[j]) * shares[j]
                        e2 = weight_of(scores, at + lanes, scale, tops[j + 1]) * shares[j + 1]
                        store_joined(weights, j * lanes // p + c, lanes, e, e2)
                        e, e2 = e * (load(products, at) - means[j]), e2 * (load(products, at + lanes) - means[j + 1])
                        store_both(ds, ds_pairs, j * lanes, c, lanes, e, e2)
                multiply_rows(q_along, 1, wide, ds_pairs, lanes, n // p, mixed, width)
                if parted:
                    _carry(mixed, kept_k, i * wide, wide * lanes)
                write_across(mixed, lanes, turned, factors, dk, at_dk + i * lines[6, 2], lines[6, 2], few, width)
                multiply_rows(dout_along, 1, wide, weights, lanes, n // p, mixed, width)
                if parted:
                    _carry(mixed, kept_v, i * wide, wide * lanes)
                write_across(mixed, lanes, turned, ones, dv, at_dv + i * lines[7, 2], lines[7, 2], few, width)
                add_outer(ds_left, lanes // p, k_along, wide, num, dqueries)
            for i in range(whole, size):
                x, y = at_k + i * lines[1, 2], at_v + i * lines[2, 2]
                pack_left(k, x, 0, 1, width, key)
                pack_left(v, y, 0, 1, width, value)
                for j in range(0, num, LANES):
                    pack_lanes(q, at_q + j * lines[0, 2], lines[0, 2], num - j, width, LANES, k_across)
                    pack_lanes(dout, at_dout + j * lines[4, 2], lines[4, 2], num - j, width, LANES, v_across)
                    score, product = splat(0.0, scores), splat(0.0, scores)
                    for t in range(deep):
                        score = multiply_add(one_key, t, load(k_across, t * LANES), score)
                        product = multiply_add(one_value, t, load(v_across, t * LANES), product)
                    e = exp2(fma(score, scale, 0.0 - load(tops, j))) * load(shares, j)
                    write(weight, j, LANES, e)
                    # The only key's weight is 1 whatever its score: rounding must not make a gradient of that.
                    e = e * (product - (load(means, j) if size > 1 else product))
                    write(dscore, j, LANES, e)
                    store(drow, j, e)
                for c in range(0, wide, LANES):
                    store(mixed, 0, _mix(one_dscore, q_along, c, wide, n // p, scores))
                    store(mixed, LANES, _mix(one_weight, dout_along, c, wide, n // p, scores))
                    if parted:
                        _carry(mixed, kept_k, i * wide + c, LANES)
                        _carry(mixed[LANES:], kept_v, i * wide + c, LANES)
                    write(dk, at_dk + i * lines[6, 2] + c, width - c, load(mixed, 0) * factor)
                    write(dv, at_dv + i * lines[7, 2] + c, width - c, load(mixed, LANES))
                    here = read(k, x + c, width - c)
                    for j in range(num):
                        store(dqueries, j * wide + c, fma(here, drow[j], load(dqueries, j * wide + c)))
            write_rows(dqueries, factor, dq, at_dq, lines[5, 2], num, width)
            at_q, at_out = at_q + num * lines[0, 2], at_out + num * lines[3, 2]
            at_dout, at_dq = at_dout + num * lines[4, 2], at_dq + num * lines[5, 2]


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
