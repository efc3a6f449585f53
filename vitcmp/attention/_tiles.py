"""Tiles of matrix products, small enough for a processor's registers."""

from __future__ import annotations

from vitcmp.attention._kernels import inner
from vitcmp.attention._simd import load, multiply_add, splat, store

TILE = 8
"""Rows of a product that are summed together."""


@inner
def up(n, multiple):  # type: ignore[no-untyped-def]
    return (n + multiple - 1) // multiple * multiple


@inner(forceinline=True)
def multiply(a, at, row, step, b, there, line, n, out, place, width, add):  # type: ignore[no-untyped-def]
    """A tile of out = a b, or += : TILE rows, LANES columns, n (pairs of) inner numbers.

    Entry (i, t) of a is at `at` + i row + t step, row t of b at `there` + t line, row i of the tile at
    `place` + i width.
    """
    zero = splat(0.0, out)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    if add:
        s0, s1, s2, s3 = (
            load(out, place), load(out, place + width), load(out, place + 2 * width), load(out, place + 3 * width)
        )  # fmt: skip
        s4, s5, s6, s7 = (
            load(out, place + 4 * width), load(out, place + 5 * width), load(out, place + 6 * width),
            load(out, place + 7 * width),
        )  # fmt: skip
    for t in range(n):
        y, x = load(b, there + t * line), at + t * step
        s0, s1 = multiply_add(a, x, y, s0), multiply_add(a, x + row, y, s1)
        s2, s3 = multiply_add(a, x + 2 * row, y, s2), multiply_add(a, x + 3 * row, y, s3)
        s4, s5 = multiply_add(a, x + 4 * row, y, s4), multiply_add(a, x + 5 * row, y, s5)
        s6, s7 = multiply_add(a, x + 6 * row, y, s6), multiply_add(a, x + 7 * row, y, s7)
    store(out, place, s0)
    store(out, place + width, s1)
    store(out, place + 2 * width, s2)
    store(out, place + 3 * width, s3)
    store(out, place + 4 * width, s4)
    store(out, place + 5 * width, s5)
    store(out, place + 6 * width, s6)
    store(out, place + 7 * width, s7)
