"""Sigmoid attention on the CPU, compiled by numba: scores and weights of a head stay in a core's cache.

Memory is as in `maps`; lanes and number formats are as in `softmax`.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.attention._kernels.compiling import in_parts, inner, kernel
from vitcmp.attention._kernels.maps import block_of, gradients, place_of
from vitcmp.attention._kernels.simd import LANES, exp2, fma, load, smaller
from vitcmp.attention._kernels.tiles import (
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
    write_across,
)  # fmt: skip  # isort: skip


@inner(forceinline=True)
def _sigmoid(score):  # type: ignore[no-untyped-def]
    """Of scores as powers of 2."""
    return 1.0 / (1.0 + exp2(smaller(126.0, 0.0 - score)))


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
                    s, s2 = load(scores, j + c), load(scores, j + c + lanes)
                    store_joined(x, j // p + c, lanes, _sigmoid(fma(s, scale, base)), _sigmoid(fma(s2, scale, base)))
            multiply_rows(y, 1, wide, x, lanes, n // p, mixed, width)
            write_across(mixed, lanes, turned, ones, out, at + i * lines[3, 2], lines[3, 2], few, width)


@kernel
def forward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_forward, team, args)


@inner
def _facts(given, ahead, dout, lines, heads, head, tokens, start, num, width, tops, shares, means):  # type: ignore[no-untyped-def]
    """Nothing of any query: its scores have the bias added, so its negative taken off."""
    tops[:num] = -given / math.log(2)


@inner(forceinline=True)
def _weigh(score, share, product, mean):  # type: ignore[no-untyped-def]
    weight = _sigmoid(score)
    return weight, weight * (1.0 - weight) * product


_backward = gradients(_facts, _weigh)
"""Of weights W = sigmoid(scale q k^T + bias): dS = W (1 - W) dout v^T."""


@kernel
def backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_backward, team, args)
