"""The pseudo-inverse of many small matrices, compiled by numba: all that a matrix needs stays in a core's cache."""

from __future__ import annotations

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.simd import LANES, larger, largest, load, splat, store
from vitcmp.kernels.numba.tiles import TILE, multiply, up


@inner
def _product(a, b, scale, other, share, m, out):  # type: ignore[no-untyped-def]
    """out = scale a b + share other; all [m, m] in rows of whole vectors, of which `out` is none of the factors."""
    wide = up(m, LANES)
    for i in range(0, m, TILE):
        for c in range(0, wide, LANES):
            multiply(a, i * wide, wide, 1, b, c, wide, m, out, i * wide + c, wide)
    for at in range(0, m * wide, LANES):
        store(out, at, load(out, at) * scale + load(other, at) * share)


@inner
def _pseudo_inverse(a, out, m, iterations, first, last):  # type: ignore[no-untyped-def]
    """`a` and `out` are [matrices, m, m], flat."""
    wide = up(m, LANES)
    size = up(m, TILE) * wide
    x, z, xz, inside, p = (
        np.zeros(size, a.dtype), np.zeros(size, a.dtype), np.zeros(size, a.dtype), np.zeros(size, a.dtype),
        np.zeros(size, a.dtype),
    )  # fmt: skip
    for matrix in range(first, last):
        top = splat(0.0, a)
        for i in range(m):
            for j in range(m):
                x[i * wide + j] = z[j * wide + i] = a[(matrix * m + i) * m + j]
        for c in range(0, wide, LANES):
            total = splat(0.0, a)
            for i in range(m):
                total = total + load(x, i * wide + c)
            top = larger(top, total)
        # With |A|_inf = 1: the division is by the largest sum of a column.
        scale = np.float32(1) / largest(top)
        for at in range(0, m * wide, LANES):
            store(z, at, load(z, at) * scale)
        for _ in range(iterations):
            _product(x, z, 1.0, x, 0.0, m, xz)
            _product(xz, xz, 1.0, xz, -7.0, m, inside)
            _product(xz, inside, 1.0, xz, 15.0, m, p)
            _product(z, p, -0.25, z, 3.25, m, inside)
            z, inside = inside, z
        for i in range(m):
            for j in range(m):
                out[(matrix * m + i) * m + j] = z[i * wide + j]


@kernel
def pseudo_inverse(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_pseudo_inverse, team, args)
