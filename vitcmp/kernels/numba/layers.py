"""What follows a LayerNorm, a linear layer or an MLP, in one pass with it, compiled by numba.

What lies between is of a few rows, and stays in cache: backward computes it again. All arrays are flat: rows of `width`
numbers in fp32, and matrices [outputs, inputs] in the number format of the products, fp32 or bf16 (as int16); the
linear layer's result is in that format too. `width` and `columns`, the linear layer's outputs, are multiples of LANES,
`hidden` of PANEL. What comes out as a sum over rows is summed up in PARTS parts, however many threads there are.
"""

from __future__ import annotations

import numpy as np

from vitcmp.kernels.numba.compiling import in_parts, inner, kernel
from vitcmp.kernels.numba.rows import gelu_and_slope, gelu_of, norm_rows, norm_rows_backward
from vitcmp.kernels.numba.simd import LANES, load, read, store, write
from vitcmp.kernels.numba.tiles import (
    PANEL,
    TILE,
    multiply_onto,
    multiply_panel,
    multiply_two,
    multiply_two_onto,
    pack_along,
    pair_size,
    panels_across,
    panels_along,
    store_joined,
    up,
    words,
)  # fmt: skip  # isort: skip

PARTS = 8
"""Parts that the rows are summed up in: each holds gradients of all weights."""


def block_of(weights: int) -> int:
    """How many rows go through together: few, of a core's first cache, or many where larger matrices pass by."""
    return 32 if weights <= 2**14 else 128


def blocks(rows: int, block: int) -> int:
    """Into how many blocks rows are divided."""
    return -(-rows // block)


@inner(forceinline=True)
def _begin(part, rows, block):  # type: ignore[no-untyped-def]
    """The first row of a part."""
    return min(part * ((rows + block - 1) // block) // PARTS * block, rows)


@inner
def _take(dout, first, n, width, out, sums, place):  # type: ignore[no-untyped-def]
    """n rows of dout from row `first` on, in the format of `out`, and added to `sums` from `place` on."""
    for r in range(n):
        for c in range(0, width, LANES):
            g = read(dout, (first + r) * width + c, LANES)
            store(sums, place + c, load(sums, place + c) + g)
            write(out, r * width + c, LANES, g)


@inner
def _add_outer(x_along, width, y, columns, rows, y_along, sums, place):  # type: ignore[no-untyped-def]
    """x^T y, [width, columns], is added to `sums` from `place` on; `y_along` is room for a panel of y."""
    n = rows // pair_size(y)
    for c in range(0, columns, PANEL):
        here = min(PANEL, columns - c)
        pack_along(y, c, columns, rows, here, y_along)
        for r in range(0, width, TILE):
            at = place + r * columns + c
            if here == PANEL:
                multiply_two_onto(x_along, r, 1, width, y_along, 0, PANEL, n, sums, at, columns)
            else:
                multiply_onto(x_along, r, 1, width, y_along, 0, LANES, n, sums, at, columns)


@inner
def _linear(x, weight, bias, eps, w, b, out, width, columns, rows, block, first, last):  # type: ignore[no-untyped-def]
    """Blocks of rows from `first` to `last`."""
    wide = width // pair_size(w)
    across, normal = panels_across(w, columns, width), np.zeros(block * width, w.dtype)
    left, mixed = words(normal), np.empty(TILE * PANEL, np.float32)
    stats = np.empty(2 * block, np.float32)
    for i in range(first * block, min(last * block, rows), block):
        few = min(block, rows - i)
        norm_rows(x, i, few, weight, bias, eps, width, normal, 0, stats, 0)
        for c in range(0, columns, PANEL):
            for r in range(0, few, TILE):
                multiply_panel(left, r * wide, wide, across, c, columns, wide, mixed, 0, PANEL)
                for u in range(min(TILE, few - r)):
                    for v in range(0, min(PANEL, columns - c), LANES):
                        y = load(mixed, u * PANEL + v) + load(b, c + v)
                        write(out, (i + r + u) * columns + c + v, LANES, y)


@kernel
def linear(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_linear, team, args)


@inner
def _linear_backward(dout, x, weight, bias, eps, w, dx, sums, width, columns, rows, block, first, last):  # type: ignore[no-untyped-def]
    """Parts of the rows from `first` to `last`.

    `sums` gets the gradients of each part: of w, transposed, b, the norm's weight and bias.
    """
    p, size = pair_size(w), width * columns
    deep, w_along = columns // p, panels_along(w, columns, width)
    normal, normal_along = np.empty(block * width, w.dtype), words(np.empty(block * width, w.dtype))
    upstream = np.empty(block * columns, w.dtype)
    left, along = words(upstream), words(np.empty(block * PANEL, w.dtype))
    dnormal, stats = np.empty(block * width, np.float32), np.empty(2 * block, np.float32)
    for part in range(first, last):
        dw = part * (size + columns + 2 * width)
        db, dweight = dw + size, dw + size + columns
        dbias = dweight + width
        sums[dw : dbias + width] = 0
        for i in range(_begin(part, rows, block), _begin(part + 1, rows, block), block):
            few = min(block, rows - i)
            whole = up(few, TILE)
            norm_rows(x, i, few, weight, bias, eps, width, normal, 0, stats, 0)
            _take(dout, i, few, columns, upstream, sums, db)
            # Zero padding: these rows do not exist.
            normal[few * width : whole * width] = 0
            upstream[few * columns : whole * columns] = 0
            pack_along(normal, 0, width, whole, width, normal_along)
            _add_outer(normal_along, width, upstream, columns, whole, along, sums, dw)
            for c in range(0, width, PANEL):
                for r in range(0, whole, TILE):
                    multiply_panel(left, r * deep, deep, w_along, c, width, deep, dnormal, r * width + c, width)
            norm_rows_backward(x, i, few, weight, width, dnormal, 0, dx, stats, 0, sums, dweight, dbias)


@kernel
def linear_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_linear_backward, team, args)


@inner
def _add_linear(x, y, w, b, out, width, columns, rows, block, first, last):  # type: ignore[no-untyped-def]
    """Blocks of rows from `first` to `last`; x and out have `columns` numbers a row, y `width` in the format of w."""
    wide = width // pair_size(w)
    across, left = panels_across(w, columns, width), words(y)
    mixed = np.empty(TILE * PANEL, np.float32)
    rest = np.zeros(TILE * width, w.dtype)
    whole = rows // TILE * TILE
    rest[: (rows - whole) * width] = y[whole * width :]
    rest_left = words(rest)
    for i in range(first * block, min(last * block, rows), TILE):
        for c in range(0, columns, PANEL):
            if i < whole:
                multiply_panel(left, i * wide, wide, across, c, columns, wide, mixed, 0, PANEL)
            else:
                multiply_panel(rest_left, 0, wide, across, c, columns, wide, mixed, 0, PANEL)
            for u in range(min(TILE, rows - i)):
                for v in range(0, min(PANEL, columns - c), LANES):
                    at = (i + u) * columns + c + v
                    store(out, at, load(mixed, u * PANEL + v) + load(b, c + v) + load(x, at))


@kernel
def add_linear(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_add_linear, team, args)


@inner
def _add_linear_backward(dout, y, w, dy, sums, width, columns, rows, block, first, last):  # type: ignore[no-untyped-def]
    """Parts of the rows from `first` to `last`. `sums` gets the gradients of each part: of w, transposed, and b."""
    p, size = pair_size(w), width * columns
    deep, w_along = columns // p, panels_along(w, columns, width)
    upstream = np.empty(block * columns, w.dtype)
    left, along = words(upstream), words(np.empty(block * PANEL, w.dtype))
    y_along, mixed = words(np.empty(block * width, w.dtype)), np.empty(TILE * PANEL, np.float32)
    for part in range(first, last):
        dw = part * (size + columns)
        db = dw + size
        sums[dw : db + columns] = 0
        for i in range(_begin(part, rows, block), _begin(part + 1, rows, block), block):
            few = min(block, rows - i)
            whole = up(few, TILE)
            _take(dout, i, few, columns, upstream, sums, db)
            # Zero padding: these rows do not exist.
            upstream[few * columns : whole * columns] = 0
            y_along[up(few, p) // p * width : whole // p * width] = 0
            pack_along(y, i * width, width, few, width, y_along)
            _add_outer(y_along, width, upstream, columns, whole, along, sums, dw)
            for c in range(0, width, PANEL):
                for r in range(0, whole, TILE):
                    multiply_panel(left, r * deep, deep, w_along, c, width, deep, mixed, 0, PANEL)
                    for u in range(min(TILE, few - r)):
                        for v in range(0, min(PANEL, width - c), LANES):
                            write(dy, (i + r + u) * width + c + v, LANES, load(mixed, u * PANEL + v))


@kernel
def add_linear_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_add_linear_backward, team, args)


@inner
def _mlp(x, weight, bias, eps, w1, b1, w2, b2, out, width, hidden, rows, block, first, last):  # type: ignore[no-untyped-def]
    """Blocks of rows from `first` to `last`."""
    p = pair_size(w1)
    wide, deep = width // p, hidden // p
    w1_across, w2_across = panels_across(w1, hidden, width), panels_across(w2, width, hidden)
    normal, inside = np.zeros(block * width, w1.dtype), np.empty(block * hidden, w1.dtype)
    normal_left, inside_left = words(normal), words(inside)
    mixed, stats = np.empty(TILE * PANEL, np.float32), np.empty(2 * block, np.float32)
    for i in range(first * block, min(last * block, rows), block):
        few = min(block, rows - i)
        norm_rows(x, i, few, weight, bias, eps, width, normal, 0, stats, 0)
        for c in range(0, hidden, PANEL):
            for r in range(0, few, TILE):
                multiply_two(normal_left, r * wide, wide, 1, w1_across, c * wide, PANEL, wide, mixed, 0, PANEL)
                for u in range(TILE):
                    for v in range(0, PANEL, LANES):
                        y = load(mixed, u * PANEL + v) + load(b1, c + v)
                        write(inside, (r + u) * hidden + c + v, LANES, gelu_of(y))
        for c in range(0, width, PANEL):
            for r in range(0, few, TILE):
                multiply_panel(inside_left, r * deep, deep, w2_across, c, width, deep, mixed, 0, PANEL)
                for u in range(min(TILE, few - r)):
                    for v in range(0, min(PANEL, width - c), LANES):
                        at = (i + r + u) * width + c + v
                        store(out, at, load(mixed, u * PANEL + v) + load(b2, c + v) + load(x, at))


@kernel
def mlp(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_mlp, team, args)


@inner
def _mlp_backward(dout, x, weight, bias, eps, w1, b1, w2, dx, sums, width, hidden, rows, block, first, last):  # type: ignore[no-untyped-def]
    """Parts of the rows from `first` to `last`: with n = LayerNorm(x), h = W1 n + b1 and g = GELU(h) of a row,

    dg = W2^T dout,  dh = dg GELU'(h),  dW1 = dh n^T,  dW2 = dout g^T,  dn = W1^T dh.
    `sums` gets the gradients of each part: of w1, transposed, w2, b1, b2, the norm's weight and bias.
    """
    p, size = pair_size(w1), width * hidden
    wide, deep = width // p, hidden // p
    w1_across, w1_along = panels_across(w1, hidden, width), panels_along(w1, hidden, width)
    w2_along = panels_along(w2, width, hidden)
    normal, upstream = np.empty(block * width, w1.dtype), np.empty(block * width, w1.dtype)
    normal_left, upstream_left = words(normal), words(upstream)
    normal_along, upstream_along = words(np.empty(block * width, w1.dtype)), words(np.empty(block * width, w1.dtype))
    inside_along, dinside_along = words(np.empty(block * PANEL, w1.dtype)), words(np.empty(block * PANEL, w1.dtype))
    dinside, dnormal = np.empty(block * hidden, w1.dtype), np.empty(block * width, np.float32)
    dinside_left, stats = words(dinside), np.empty(2 * block, np.float32)
    mixed, dmixed = np.empty(TILE * PANEL, np.float32), np.empty(TILE * PANEL, np.float32)
    for part in range(first, last):
        dw1 = part * (2 * size + hidden + 3 * width)
        dw2, db1 = dw1 + size, dw1 + 2 * size
        db2, dweight, dbias = db1 + hidden, db1 + hidden + width, db1 + hidden + 2 * width
        sums[dw1 : dbias + width] = 0
        for i in range(_begin(part, rows, block), _begin(part + 1, rows, block), block):
            few = min(block, rows - i)
            whole = up(few, TILE)
            norm_rows(x, i, few, weight, bias, eps, width, normal, 0, stats, 0)
            _take(dout, i, few, width, upstream, sums, db2)
            # Zero padding: these rows do not exist.
            normal[few * width : whole * width] = 0
            upstream[few * width : whole * width] = 0
            pack_along(normal, 0, width, whole, width, normal_along)
            pack_along(upstream, 0, width, whole, width, upstream_along)
            for c in range(0, hidden, PANEL):
                for r in range(0, whole, TILE):
                    multiply_two(normal_left, r * wide, wide, 1, w1_across, c * wide, PANEL, wide, mixed, 0, PANEL)
                    multiply_two(upstream_left, r * wide, wide, 1, w2_along, c * wide, PANEL, wide, dmixed, 0, PANEL)
                    for v in range(0, PANEL, LANES):
                        of_bias = load(sums, db1 + c + v)
                        for u in range(0, TILE, 2):
                            at, at2 = u * PANEL + v, (u + 1) * PANEL + v
                            y, y2 = load(mixed, at) + load(b1, c + v), load(mixed, at2) + load(b1, c + v)
                            (g, slope), (g2, slope2) = gelu_and_slope(y), gelu_and_slope(y2)
                            d, d2 = load(dmixed, at) * slope, load(dmixed, at2) * slope2
                            of_bias = of_bias + d + d2
                            at = (r + u) // p * PANEL + v
                            store_joined(inside_along, at, PANEL, g, g2)
                            store_joined(dinside_along, at, PANEL, d, d2)
                            at = (r + u) * hidden + c + v
                            write(dinside, at, LANES, d)
                            write(dinside, at + hidden, LANES, d2)
                        store(sums, db1 + c + v, of_bias)
                n = whole // p
                for r in range(0, width, TILE):
                    at = r * hidden + c
                    multiply_two_onto(normal_along, r, 1, width, dinside_along, 0, PANEL, n, sums, dw1 + at, hidden)
                    multiply_two_onto(upstream_along, r, 1, width, inside_along, 0, PANEL, n, sums, dw2 + at, hidden)
            for c in range(0, width, PANEL):
                for r in range(0, whole, TILE):
                    at = r * width + c
                    multiply_panel(dinside_left, r * deep, deep, w1_along, c, width, deep, dnormal, at, width)
            norm_rows_backward(x, i, few, weight, width, dnormal, 0, dx, stats, 0, sums, dweight, dbias)
            for at in range(i * width, (i + few) * width, LANES):
                store(dx, at, load(dx, at) + load(dout, at))


@kernel
def mlp_backward(team, *args):  # type: ignore[no-untyped-def]
    in_parts(_mlp_backward, team, args)
