"""Kernels of `_fused`. Arrays are flat memory of rows of `width` numbers, of fp32 or of bf16 (as int16).

What comes out as one sum over all rows is summed up in parts of CHUNK rows, however many threads there are.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.simd import (
    LANES,
    exp2,
    fma,
    larger,
    places,
    polynomial,
    read,
    smaller,
    splat,
    to_float,
    total_of,
    where,
    write,
)  # fmt: skip  # isort: skip

CHUNK = 128


def chunks(rows: int) -> int:
    """Into how many parts rows are divided."""
    return -(-rows // CHUNK)


# With P the normal distribution function, P(x) - 1/2 = x p(2 x^2 / 5.2^2 - 1) to 7e-8 for |x| < 5.2: a fit of least
# maximal error.
_half_erf = polynomial(
    -0.000481271971, 0.00126850896, -0.00122150944, 0.00180012834, -0.00478902055, 0.00855996198, -0.0125051313,
    0.0179547896, -0.0247236268, 0.0319899587, -0.0399298199, 0.0500245214, -0.0677436675, 0.135949993,
)  # fmt: skip


@inner(forceinline=True)
def _distribution(y):  # type: ignore[no-untyped-def]
    """The normal distribution function of a vector."""
    square = smaller(np.float32(5.2**2), y * y)
    p = y * _half_erf(fma(square, np.float32(2 / 5.2**2), -1.0))
    return smaller(0.5, larger(-0.5, p)) + 0.5


@inner(forceinline=True)
def gelu_of(y):  # type: ignore[no-untyped-def]
    """GELU of a vector."""
    return y * _distribution(y)


@inner(forceinline=True)
def gelu_and_slope(y):  # type: ignore[no-untyped-def]
    """GELU of a vector, and its derivative: with the density p, P(y) + y p(y)."""
    below = _distribution(y)
    density = exp2(y * y * np.float32(-0.5 / math.log(2))) * np.float32(1 / math.sqrt(2 * math.pi))
    return y * below, fma(y, density, below)


@inner
def _gelu(x, bias, out, width, rows, first, last):  # type: ignore[no-untyped-def]
    for i in range(first * CHUNK, min(last * CHUNK, rows)):
        for c in range(0, width, LANES):
            at, n = i * width + c, width - c
            write(out, at, n, gelu_of(read(x, at, n) + read(bias, c, n)))


@kernel
def gelu(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_gelu, team, args)


@inner
def _gelu_backward(x, bias, dout, dx, dbias, width, rows, first, last):  # type: ignore[no-untyped-def]
    """`dbias` is [chunks, width]."""
    for chunk in range(first, last):
        dbias[chunk * width : (chunk + 1) * width] = 0
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, rows)):
            for c in range(0, width, LANES):
                at, n, there = i * width + c, width - c, chunk * width + c
                _, slope = gelu_and_slope(read(x, at, n) + read(bias, c, n))
                g = read(dout, at, n) * slope
                write(dx, at, n, g)
                write(dbias, there, n, read(dbias, there, n) + g)


@kernel
def gelu_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_gelu_backward, team, args)


@inner
def norm_rows(x, first, n, weight, bias, eps, width, out, place, stats, at):  # type: ignore[no-untyped-def]
    """LayerNorm of n rows of x from row `first` on, to `out` from `place` on.

    Each row's mean and 1 / standard deviation go to `stats` from `at` on.
    """
    for row in range(first * width, (first + n) * width, width):
        total = splat(0.0, weight)
        for c in range(0, width, LANES):
            total = total + read(x, row + c, width - c)
        mean, total = total_of(total) / np.float32(width), splat(0.0, weight)
        for c in range(0, width, LANES):
            d = read(x, row + c, width - c) - mean
            d = d if width - c >= LANES else where(to_float(places(c)) < width, d, 0.0)
            total = fma(d, d, total)
        scale = np.float32(1) / math.sqrt(total_of(total) / np.float32(width) + np.float32(eps))
        stats[at], stats[at + 1] = mean, scale
        for c in range(0, width, LANES):
            left = width - c
            normal = (read(x, row + c, left) - mean) * scale
            write(out, place + c, left, fma(normal, read(weight, c, left), read(bias, c, left)))
        place += width
        at += 2


@inner
def norm_rows_backward(x, first, n, weight, width, dout, place, dx, stats, at, sums, dweight, dbias):  # type: ignore[no-untyped-def]
    """Their gradients, of those in `dout` from `place` on, to the same rows of `dx`.

    Those of weight and bias are added to `sums`, from these places on.
    """
    for row in range(first * width, (first + n) * width, width):
        mean, scale = stats[at], stats[at + 1]
        total, along = splat(0.0, weight), splat(0.0, weight)
        for c in range(0, width, LANES):
            left = width - c
            g, normal = read(dout, place + c, left), (read(x, row + c, left) - mean) * scale
            write(sums, dweight + c, left, fma(g, normal, read(sums, dweight + c, left)))
            write(sums, dbias + c, left, g + read(sums, dbias + c, left))
            g = g * read(weight, c, left)
            total, along = total + g, fma(g, normal, along)
        of_mean, of_scale = total_of(total) / np.float32(width), total_of(along) / np.float32(width)
        for c in range(0, width, LANES):
            left = width - c
            normal = (read(x, row + c, left) - mean) * scale
            g = read(dout, place + c, left) * read(weight, c, left)
            write(dx, row + c, left, (g - of_mean - normal * of_scale) * scale)
        place += width
        at += 2


@inner
def _norm(x, weight, bias, out, stats, eps, width, rows, first, last):  # type: ignore[no-untyped-def]
    """`stats` gets each row's mean and 1 / standard deviation."""
    first, last = first * CHUNK, min(last * CHUNK, rows)
    norm_rows(x, first, last - first, weight, bias, eps, width, out, first * width, stats, 2 * first)


@kernel
def norm(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_norm, team, args)


@inner
def _norm_backward(x, weight, stats, dout, dx, dparameters, width, rows, first, last):  # type: ignore[no-untyped-def]
    """`dparameters` is [chunks, 2, width]: of the weight and the bias."""
    for chunk in range(first, last):
        dweight = chunk * 2 * width
        dbias = dweight + width
        dparameters[dweight : dweight + 2 * width] = 0
        i = chunk * CHUNK
        n = min(CHUNK, rows - i)
        norm_rows_backward(x, i, n, weight, width, dout, i * width, dx, stats, 2 * i, dparameters, dweight, dbias)


@kernel
def norm_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_norm_backward, team, args)
