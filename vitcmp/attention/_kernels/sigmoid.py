"""Sigmoid attention on the CPU, compiled by numba: scores and weights of a head stay in a core's cache.

Memory, lanes and number formats are as in `softmax`.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.attention._kernels.compiling import in_parts, inner, kernel
from vitcmp.attention._kernels.simd import LANES, exp2, fma, load, smaller
from vitcmp.attention._kernels.softmax import block_of, place_of
from vitcmp.attention._kernels.tiles import (
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


@inner(forceinline=True)
def _weight(scores, j, scale, bias):  # type: ignore[no-untyped-def]
    """The weights of a key; scale and bias are those of powers of 2."""
    return 1.0 / (1.0 + exp2(smaller(126.0, 0.0 - fma(load(scores, j), scale, bias))))


@inner
def _forward(q, k, v, out, lines, heads, tokens, size, width, bias, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`."""
    p = pair_size(q)
    scale, base = np.float32(width**-0.5 / math.log(2)), np.float32(bias / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    deep, block = up(width, p) // p, block_of(size, p)
    keys, y = np.zeros(rows * deep * p + LANES, q.dtype), words(np.zeros(rows * wide, q.dtype))
    scores, mixed = np.empty((rows + TILE) * block, np.float32), np.empty(wide * block, np.float32)
    queries, x = words(np.empty(block * deep * p, q.dtype)), words(narrow_room(scores, q))
    turned, ones = np.empty(LANES * LANES, np.float32), np.ones(block, np.float32)
    for head in range(first, last):
        at_q, at = place_of(lines, 0, heads, head), place_of(lines, 3, heads, head)
        pack_left(k, place_of(lines, 1, heads, head), lines[1, 2], size, width, keys)
        pack_along(v, place_of(lines, 2, heads, head), lines[2, 2], size, width, y)
        for i in range(0, tokens, block):
            few = min(block, tokens - i)
            lanes = up(few, LANES)
            pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, queries)
            transposed_product(words(keys), queries, size, deep, lanes, scores)
            for c in range(0, lanes, LANES):
                for j in range(0, n * lanes, 2 * lanes):
                    w, w2 = _weight(scores, j + c, scale, base), _weight(scores, j + c + lanes, scale, base)
                    store_joined(x, j // p + c, lanes, w, w2)
            multiply_rows(y, 1, wide, x, lanes, n // p, mixed, width)
            write_across(mixed, lanes, turned, ones, out, at + i * lines[3, 2], lines[3, 2], few, width)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _backward(q, k, v, dout, dq, dk, dv, lines, heads, tokens, size, width, bias, first, last):  # type: ignore[no-untyped-def]
    """Gradients of q, k and v for the heads from `first` to `last`: with the weights W,

    dv = W^T dout,  dS = W (1 - W) dout v^T,  dq = scale dS k,  dk = scale dS^T q.
    """
    p, factor = pair_size(q), np.float32(width**-0.5)
    scale, base = np.float32(width**-0.5 / math.log(2)), np.float32(bias / math.log(2))
    wide, rows, n = up(width, LANES), up(size, LANES), up(size, 2)
    deep, block = up(width, p) // p, block_of(size, p)
    keys, values = np.zeros(rows * deep * p + LANES, q.dtype), np.zeros(rows * deep * p + LANES, q.dtype)
    queries, upstream = words(np.empty(block * deep * p, q.dtype)), words(np.empty(block * deep * p, q.dtype))
    q_along, dout_along = words(np.empty(block * wide, q.dtype)), words(np.empty(block * wide, q.dtype))
    k_along = words(np.zeros(rows * wide, q.dtype))
    # Of all keys and a block of queries: the weights and the gradient of the scores, this also with keys in pairs.
    scores, products = np.empty((rows + TILE) * block, np.float32), np.empty((rows + TILE) * block, np.float32)
    weights, ds = narrow_room(scores, q), narrow_room(products, q)
    ds_pairs = words(narrow_room(ds, q))
    dkeys, dvalues = np.empty(rows * wide, np.float32), np.empty(rows * wide, np.float32)
    mixed, turned = np.empty(wide * block, np.float32), np.empty(LANES * LANES, np.float32)
    factors = np.full(block, factor)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at_out = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        at_dq, at_dk, at_dv = (
            place_of(lines, 4, heads, head), place_of(lines, 5, heads, head), place_of(lines, 6, heads, head)
        )  # fmt: skip
        pack_left(k, at_k, lines[1, 2], size, width, keys)
        pack_left(v, at_v, lines[2, 2], size, width, values)
        pack_along(k, at_k, lines[1, 2], size, width, k_along)
        dkeys[:] = 0
        dvalues[:] = 0
        for i in range(0, tokens, block):
            few = min(block, tokens - i)
            lanes = up(few, LANES)
            pack_both(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, queries, q_along)
            pack_both(dout, at_out + i * lines[3, 2], lines[3, 2], few, width, lanes, upstream, dout_along)
            transposed_product(words(keys), queries, size, deep, lanes, scores)
            transposed_product(words(values), upstream, size, deep, lanes, products)
            if size % 2:
                products[size * lanes : (size + 1) * lanes] = 0
            for c in range(0, lanes, LANES):
                for row in range(0, n * lanes, 2 * lanes):
                    j, j2 = row + c, row + c + lanes
                    w, w2 = _weight(scores, j, scale, base), _weight(scores, j2, scale, base)
                    store_two(weights, j, j2, w, w2)
                    w, w2 = w * (1.0 - w) * load(products, j), w2 * (1.0 - w2) * load(products, j2)
                    store_both(ds, ds_pairs, row, c, lanes, w, w2)
            multiply_rows(k_along, 1, wide, ds_pairs, lanes, n // p, mixed, width)
            write_across(mixed, lanes, turned, factors, dq, at_dq + i * lines[4, 2], lines[4, 2], few, width)
            add_outer(words(weights), lanes // p, dout_along, wide, size, dvalues)
            add_outer(words(ds), lanes // p, q_along, wide, size, dkeys)
        write_rows(dkeys, factor, dk, at_dk, lines[5, 2], size, width)
        write_rows(dvalues, np.float32(1), dv, at_dv, lines[6, 2], size, width)


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
