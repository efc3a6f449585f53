"""Sigmoid attention on the CPU, compiled by numba: scores and weights of a head stay in a core's cache.

Memory is as in `maps`; lanes and number formats are as in `softmax`.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.maps import MAX_TOGETHER, block_of, gradients, place_of, room_for, sum_up, together_of
from vitcmp.kernels.numba.simd import LANES, exp2, fma, load, smaller
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


@inner(forceinline=True)
def _sigmoid(score):  # type: ignore[no-untyped-def]
    """Of scores as powers of 2."""
    return 1.0 / (1.0 + exp2(smaller(126.0, 0.0 - score)))


@inner
def _forward(q, k, v, out, lines, heads, tokens, size, width, bias, first, last):  # type: ignore[no-untyped-def]
    """Outputs of the heads from `first` to `last`: q and out are [B, H, N, K], k and v [B, H, M, K], flat."""
    p, most = pair_size(q), min(size, MAX_TOGETHER)
    scale, base = np.float32(width**-0.5 / math.log(2)), np.float32(bias / math.log(2))
    together = together_of(tokens, most < size, q)
    wide, rows = up(width, LANES), up(most, LANES)
    deep, block = up(width, p) // p, block_of(most, p)
    keys, y = np.zeros(rows * deep * p + LANES, q.dtype), words(np.zeros(rows * wide, q.dtype))
    scores, mixed = np.empty((rows + TILE) * block, np.float32), np.empty(wide * block, np.float32)
    queries, x = words(np.empty(block * deep * p, q.dtype)), words(narrow_room(scores, q))
    turned, ones = np.empty(LANES * LANES, np.float32), np.ones(block, np.float32)
    kept = room_for(together, wide, most < size, q)
    for head in range(first, last):
        at_q, at_k = place_of(lines, 0, heads, head), place_of(lines, 1, heads, head)
        at_v, at = place_of(lines, 2, heads, head), place_of(lines, 3, heads, head)
        for start in range(0, tokens, together):
            for part in range(0, size, most):
                num = min(most, size - part)
                n = up(num, 2)
                pack_left(k, at_k + part * lines[1, 2], lines[1, 2], num, width, keys)
                pack_along(v, at_v + part * lines[2, 2], lines[2, 2], num, width, y)
                for i in range(start, min(start + together, tokens), block):
                    few = min(block, tokens - i)
                    lanes = up(few, LANES)
                    pack_lanes(q, at_q + i * lines[0, 2], lines[0, 2], few, width, lanes, queries)
                    transposed_product(words(keys), queries, num, deep, lanes, scores)
                    for c in range(0, lanes, LANES):
                        for j in range(c, n * lanes, 2 * lanes):
                            w = _sigmoid(fma(load(scores, j), scale, base))
                            w2 = _sigmoid(fma(load(scores, j + lanes), scale, base))
                            store_joined(x, (j - c) // p + c, lanes, w, w2)
                    multiply_rows(y, 1, wide, x, lanes, n // p, mixed, width)
                    room, to, line = kept[(i - start) * wide :], at + i * lines[3, 2], lines[3, 2]
                    begins, ends = part == 0, part + num == size
                    sum_up(mixed, lanes, turned, room, ones, ones, out, to, line, few, width, begins, ends)


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
