"""Kernels of `_fused`. Arrays are flat memory of rows of `width` numbers, of fp32 or of bf16 (as int16).

What comes out as one sum over all rows is summed up in parts of CHUNK rows, however many threads there are.
"""

from __future__ import annotations

import math

import numpy as np

from vitcmp.attention._kernels import in_parts, inner, kernel
from vitcmp.attention._simd import (
    LANES,
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


# With P the normal distribution function, P(x) - 1/2 = x p(2 x^2 / 5.2^2 - 1) to 7e-8 for |x| < 5.2, and
# d/dx x P(x) - 1/2 = x p(2 x^2 / 5.6^2 - 1) to 6e-8 for |x| < 5.6: fits of least maximal error.
_half_erf = polynomial(
    -0.000481271971, 0.00126850896, -0.00122150944, 0.00180012834, -0.00478902055, 0.00855996198, -0.0125051313,
    0.0179547896, -0.0247236268, 0.0319899587, -0.0399298199, 0.0500245214, -0.0677436675, 0.135949993,
)  # fmt: skip
_slope = polynomial(
    0.00316708037, -0.00800062105, 0.00418476035, -0.00259537025, 0.0204229004, -0.0381616859, 0.0426605145,
    -0.0516533269, 0.0666106413, -0.0737511552, 0.0716296043, -0.0648823058, 0.0566848761, -0.0509724247, 0.0518079605,
    -0.0642823051, 0.126416642,
)  # fmt: skip


@inner
def _gelu(x, bias, out, width, rows, first, last):  # type: ignore[no-untyped-def]
    for i in range(first * CHUNK, min(last * CHUNK, rows)):
        for c in range(0, width, LANES):
            at, n = i * width + c, width - c
            y = read(x, at, n) + read(bias, c, n)
            square = smaller(np.float32(5.2**2), y * y)
            p = y * _half_erf(fma(square, np.float32(2 / 5.2**2), -1.0))
            write(out, at, n, y * (smaller(0.5, larger(-0.5, p)) + 0.5))


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
                y = read(x, at, n) + read(bias, c, n)
                y = smaller(np.float32(5.6), larger(np.float32(-5.6), y))
                slope = fma(y, _slope(fma(y * y, np.float32(2 / 5.6**2), -1.0)), 0.5)
                g = read(dout, at, n) * slope
                write(dx, at, n, g)
                write(dbias, there, n, read(dbias, there, n) + g)


@kernel
def gelu_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_gelu_backward, team, args)


@inner
def _norm(x, weight, bias, out, stats, eps, width, rows, first, last):  # type: ignore[no-untyped-def]
    """`stats` gets each row's mean and 1 / standard deviation."""
    for i in range(first * CHUNK, min(last * CHUNK, rows)):
        row, total = i * width, splat(0.0, weight)
        for c in range(0, width, LANES):
            total = total + read(x, row + c, width - c)
        mean, total = np.float32(total_of(total) / width), splat(0.0, weight)
        for c in range(0, width, LANES):
            d = read(x, row + c, width - c) - mean
            d = d if width - c >= LANES else where(to_float(places(c)) < width, d, 0.0)
            total = fma(d, d, total)
        scale = np.float32(1 / math.sqrt(total_of(total) / width + eps))
        stats[2 * i], stats[2 * i + 1] = mean, scale
        for c in range(0, width, LANES):
            n = width - c
            normal = (read(x, row + c, n) - mean) * scale
            write(out, row + c, n, fma(normal, read(weight, c, n), read(bias, c, n)))


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
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, rows)):
            row, mean, scale = i * width, stats[2 * i], stats[2 * i + 1]
            total, along = splat(0.0, weight), splat(0.0, weight)
            for c in range(0, width, LANES):
                n = width - c
                g, normal = read(dout, row + c, n), (read(x, row + c, n) - mean) * scale
                write(dparameters, dweight + c, n, fma(g, normal, read(dparameters, dweight + c, n)))
                write(dparameters, dbias + c, n, g + read(dparameters, dbias + c, n))
                g = g * read(weight, c, n)
                total, along = total + g, fma(g, normal, along)
            of_mean, of_scale = np.float32(total_of(total) / width), np.float32(total_of(along) / width)
            for c in range(0, width, LANES):
                n = width - c
                normal = (read(x, row + c, n) - mean) * scale
                g = read(dout, row + c, n) * read(weight, c, n)
                write(dx, row + c, n, (g - of_mean - normal * of_scale) * scale)


@kernel
def norm_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_norm_backward, team, args)
