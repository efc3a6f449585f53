"""What the kernels of attention maps share: where heads lie in memory, blocks of tokens, and a map's gradients.

Memory is that of fp32 or of bf16 (as int16); `lines` [arrays, 3] says how far apart images, heads and tokens lie in
each array, and the K numbers of a token lie side by side.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import inner
from vitcmp.kernels.numba.simd import (
    LANES,
    fma,
    load,
    multiply_add,
    prefetch,
    prefetch_to_write,
    read,
    splat,
    store,
    write,
)  # fmt: skip  # isort: skip
from vitcmp.kernels.numba.tiles import (
    PANEL,
    TILE,
    add_across,
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
MAX_TOGETHER = 1024 + LANES
"""Tokens that come together where a head has more (1,024 and a class token do): of more, what every block of the others
reads would not stay in a core's cache."""
MAX_EXPECTED = 2**16
"""Numbers of an image and array up to which the next image is brought into cache while this one is at work."""


@inner
def place_of(lines, array, heads, head):  # type: ignore[no-untyped-def]
    return (head // heads) * lines[array, 0] + (head % heads) * lines[array, 1]


@inner
def num_whole(tokens):  # type: ignore[no-untyped-def]
    """Tokens that come as vectors; the rest come one at a time where a vector would be nearly empty."""
    left_over = tokens % LANES
    return tokens - left_over if left_over <= MAX_LEFT_OVER else tokens


@inner
def block_of(size, p):  # type: ignore[no-untyped-def]
    """Tokens that come as one block: the wide tile pays in bf16, as long as their scores stay in a core's cache."""
    return PANEL if p == 2 and size <= MAX_TOGETHER else LANES


@inner
def expect(x, array, lines, heads, head, rows, width, writes):  # type: ignore[no-untyped-def]
    """The same head of the next image is brought into cache: from one image to the next, its rows lie far apart."""
    at = place_of(lines, array, heads, head + heads)
    for i in range(rows):
        for c in range(0, width, LANES):
            if writes:
                prefetch_to_write(x, at + i * lines[array, 2] + c)
            else:
                prefetch(x, at + i * lines[array, 2] + c)


@inner
def mix(weights, b, there, line, n, like):  # type: ignore[no-untyped-def]
    """One query's n (pairs of) weights times LANES columns of b, [n, line], from `there` on; in fp32, as `like`."""
    s0, s1 = splat(0.0, like), splat(0.0, like)
    for t in range(0, n - 1, 2):
        s0 = multiply_add(weights, t, load(b, there + t * line), s0)
        s1 = multiply_add(weights, t + 1, load(b, there + (t + 1) * line), s1)
    if n % 2:
        s0 = multiply_add(weights, n - 1, load(b, there + (n - 1) * line), s0)
    return s0 + s1


@inner
def room_for(size, wide, parted, x):  # type: ignore[no-untyped-def]
    """Room for what blocks of tokens come to part by part; none in fp32, where it grows in the result."""
    return np.empty(up(size, PANEL) * wide if parted and pair_size(x) == 2 else 0, np.float32)


@inner
def together_of(tokens, parted, x):  # type: ignore[no-untyped-def]
    """Tokens of which sums are taken part by part before the next ones' are: all, where these need no room."""
    return min(tokens, MAX_TOGETHER) if parted and pair_size(x) == 2 else tokens


@inner
def sum_up(mixed, lanes, turned, kept, shrinks, factors, out, at, line, few, width, begins, ends):  # type: ignore[no-untyped-def]
    """Rows of `out` from columns of `mixed`, as `write_across`, where these are sums that come part by part:

    what the parts before this one came to, times `shrinks`, is added, and the last one's sums are what is multiplied
    by the factors, which are 1 until then. `kept` is this block's of `room_for`.
    """
    if len(kept):
        for j in range(0, width * lanes, lanes):
            for c in range(0, lanes, LANES):
                total = load(mixed, j + c)
                if not begins:
                    total = fma(load(kept, j + c), load(shrinks, c), total)
                store(mixed, j + c, total)
                store(kept, j + c, total)
    if not begins and not len(kept):
        add_across(mixed, lanes, turned, shrinks, factors, out, at, line, few, width)
    elif ends or not len(kept):
        write_across(mixed, lanes, turned, factors, out, at, line, few, width)


def gradients(facts, weigh):  # type: ignore[no-untyped-def]
    """The function that computes the gradients of q, k and v for the heads from `first` to `last`: with weights P,

    dv = P^T dout,  dS from P and dout v^T,  dq = factor dS k,  dk = factor dS^T q.

    A mechanism says what its P and dS are. `weigh(score, share, product, mean)` gives both, of a vector of keys and one
    query (or of one key and a vector of queries, so that `share` and `mean` are vectors too): `score` is log2(e) times
    the scaled score, less the query's `tops`; `product` is dout v^T. At a score of -inf, both must be nearly 0.
    `facts(given, ahead, dout, lines, heads, head, tokens, start, num, width, tops, shares, means)` fills in what it
    needs of num queries from `start` on, of `given`; `ahead`, it brings what it will read of the next image into cache.
    `lines` are those of q, k, v, dout, dq, dk and dv, and then of what is given.

    With keys as lanes, a block of dk and dv is whole after all queries, and only dq is summed up in memory. Where
    queries come in parts, so are dk and dv.
    """

    @inner
    def backward(given, q, k, v, dout, dq, dk, dv, lines, heads, tokens, size, width, first, last):  # type: ignore[no-untyped-def]
        p = pair_size(q)
        factor = np.float32(width**-0.5)
        scale = np.float32(width**-0.5 / math.log(2))
        # Keys so few that each comes alone have no parts: nothing of them leaves a core's cache.
        most = min(tokens, MAX_TOGETHER) if size > MAX_LEFT_OVER else tokens
        wide, rows, deep, block = up(width, LANES), up(most, LANES), up(width, p) // p, block_of(most, p)
        queries, upstream = np.zeros(rows * deep * p + LANES, q.dtype), np.zeros(rows * deep * p + LANES, q.dtype)
        q_left, dout_left = words(queries), words(upstream)
        q_along, dout_along = words(np.zeros(rows * wide, q.dtype)), words(np.zeros(rows * wide, q.dtype))
        k_across, v_across = words(np.empty(block * deep * p, q.dtype)), words(np.empty(block * deep * p, q.dtype))
        k_along = words(np.empty(block * wide, q.dtype))
        # Of a part of the queries and a block of keys: weights with queries in pairs, the scores' gradient with both.
        scores, products = np.empty((rows + TILE) * block, np.float32), np.empty((rows + TILE) * block, np.float32)
        weights, ds = words(narrow_room(scores, q)), narrow_room(products, q)
        ds_left, ds_pairs = words(ds), words(narrow_room(ds, q))
        dqueries, tops = np.empty(rows * wide, np.float32), np.zeros(rows, np.float32)
        shares, means = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        mixed, turned = np.empty(wide * block, np.float32), np.empty(LANES * LANES, np.float32)
        scaled, ones = np.full(block, factor), np.ones(block, np.float32)
        # Of one key alone: itself and its value, and of all queries its weights and the gradients of its scores.
        key, value = np.empty(deep * p + LANES, q.dtype), np.empty(deep * p + LANES, q.dtype)
        weight, dscore, drow = np.empty(rows, q.dtype), np.empty(rows, q.dtype), np.empty(rows, np.float32)
        one_key, one_value, one_weight, one_dscore = words(key), words(value), words(weight), words(dscore)
        parted = most < tokens
        whole = size if parted else num_whole(size)
        kept_k, kept_v = room_for(size, wide, parted, q), room_for(size, wide, parted, q)
        expects = heads * max(tokens, size) * width <= MAX_EXPECTED
        for head in range(first, last):
            at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
            at_v, at_dout = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
            at_dq, at_dk = place_of(lines, 4, heads, head), place_of(lines, 5, heads, head)
            at_dv = place_of(lines, 6, heads, head)
            ahead = expects and head + heads < last
            if ahead:
                expect(q, 0, lines, heads, head, tokens, width, False)
                expect(k, 1, lines, heads, head, size, width, False)
                expect(v, 2, lines, heads, head, size, width, False)
                expect(dout, 3, lines, heads, head, tokens, width, False)
                expect(dq, 4, lines, heads, head, tokens, width, True)
                expect(dk, 5, lines, heads, head, size, width, True)
                expect(dv, 6, lines, heads, head, size, width, True)
            for start in range(0, tokens, most):
                num = min(most, tokens - start)
                n, begins, ends = up(num, 2), start == 0, start + num == tokens
                pack_left(q, at_q, lines[0, 2], num, width, queries)
                pack_left(dout, at_dout, lines[3, 2], num, width, upstream)
                pack_along(q, at_q, lines[0, 2], num, width, q_along)
                pack_along(dout, at_dout, lines[3, 2], num, width, dout_along)
                # Padding: these queries do not exist, so their scores are -inf.
                tops[num:], shares[num:], means[num:] = np.inf, 0, 0
                facts(given, ahead, dout, lines, heads, head, tokens, start, num, width, tops, shares, means)
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
                            s, s2 = load(scores, at), load(scores, at + lanes)
                            s, s2 = fma(s, scale, 0.0 - tops[j]), fma(s2, scale, 0.0 - tops[j + 1])
                            w, d = weigh(s, shares[j], load(products, at), means[j])
                            w2, d2 = weigh(s2, shares[j + 1], load(products, at + lanes), means[j + 1])
                            store_joined(weights, j * lanes // p + c, lanes, w, w2)
                            store_both(ds, ds_pairs, j * lanes, c, lanes, d, d2)
                    multiply_rows(q_along, 1, wide, ds_pairs, lanes, n // p, mixed, width)
                    at, line = at_dk + i * lines[5, 2], lines[5, 2]
                    room, factors = kept_k[i * wide :], scaled if ends else ones
                    sum_up(mixed, lanes, turned, room, ones, factors, dk, at, line, few, width, begins, ends)
                    multiply_rows(dout_along, 1, wide, weights, lanes, n // p, mixed, width)
                    at, line = at_dv + i * lines[6, 2], lines[6, 2]
                    room = kept_v[i * wide :]
                    sum_up(mixed, lanes, turned, room, ones, ones, dv, at, line, few, width, begins, ends)
                    add_outer(ds_left, lanes // p, k_along, wide, num, dqueries)
                for i in range(whole, size):
                    x, y = at_k + i * lines[1, 2], at_v + i * lines[2, 2]
                    pack_left(k, x, 0, 1, width, key)
                    pack_left(v, y, 0, 1, width, value)
                    for j in range(0, num, LANES):
                        pack_lanes(q, at_q + j * lines[0, 2], lines[0, 2], num - j, width, LANES, k_across)
                        pack_lanes(dout, at_dout + j * lines[3, 2], lines[3, 2], num - j, width, LANES, v_across)
                        score, product = splat(0.0, scores), splat(0.0, scores)
                        for t in range(deep):
                            score = multiply_add(one_key, t, load(k_across, t * LANES), score)
                            product = multiply_add(one_value, t, load(v_across, t * LANES), product)
                        # The only key's product is softmax's mean: rounding must not make a gradient of both.
                        mean = load(means, j) if size > 1 else product
                        w, d = weigh(fma(score, scale, 0.0 - load(tops, j)), load(shares, j), product, mean)
                        write(weight, j, LANES, w)
                        write(dscore, j, LANES, d)
                        store(drow, j, d)
                    for c in range(0, wide, LANES):
                        of_k = mix(one_dscore, q_along, c, wide, n // p, scores)
                        write(dk, at_dk + i * lines[5, 2] + c, width - c, of_k * factor)
                        of_v = mix(one_weight, dout_along, c, wide, n // p, scores)
                        write(dv, at_dv + i * lines[6, 2] + c, width - c, of_v)
                        here = read(k, x + c, width - c)
                        for j in range(num):
                            store(dqueries, j * wide + c, fma(here, drow[j], load(dqueries, j * wide + c)))
                write_rows(dqueries, factor, dq, at_dq, lines[4, 2], num, width)
                at_q, at_dout = at_q + num * lines[0, 2], at_dout + num * lines[3, 2]
                at_dq = at_dq + num * lines[4, 2]

    return backward
