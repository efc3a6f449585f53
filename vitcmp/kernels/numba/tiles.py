"""Tiles of matrix products, small enough for a processor's registers, and their operands' layouts.

Products of fp32 are summed in fp32; those of bf16 too, two numbers of the inner axis at a time: an operand's layout
keeps such pairs together, and the products read them as int32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from vitcmp.kernels.numba._numba import cgutils, ir
from vitcmp.kernels.numba.compiling import inner
from vitcmp.kernels.numba.simd import (
    INLINED,
    LANES,
    add_product,
    fma,
    load,
    load_part,
    pair,
    read,
    spread,
    store,
    store_transposed,
    to_bf16,
    vector_at,
    write,
)  # fmt: skip  # isort: skip

TILE = 8
"""Rows of a product that are summed together."""
HALF = TILE // 2
"""The same where no more are left: enough to hide how long a sum takes."""


def pair_size(x):  # type: ignore[no-untyped-def]
    """Numbers of the inner axis that lie side by side in a product's operands."""
    raise NotImplementedError


def words(x):  # type: ignore[no-untyped-def]
    """Memory as the products read it: fp32, or pairs of bf16 as int32."""
    raise NotImplementedError


def narrow_room(x, like):  # type: ignore[no-untyped-def]
    """Room for the numbers of x in the format of `like`: where that is fp32, x itself."""
    raise NotImplementedError


def rounded(x, out):  # type: ignore[no-untyped-def]
    """A vector of fp32 in the number format of `out`."""
    raise NotImplementedError


def joined(first, second, out):  # type: ignore[no-untyped-def]
    """Two vectors in pairs, where `out` has pairs; else the first one."""
    raise NotImplementedError


def store_joined(out, place, line, first, second):  # type: ignore[no-untyped-def]
    """Two vectors of fp32 as two rows of `out`, or as one row of pairs."""
    raise NotImplementedError


def store_both(out, pairs, row, lane, line, first, second):  # type: ignore[no-untyped-def]
    """Two vectors of fp32 as two rows of `out`, `line` long, and of `pairs`, which in fp32 is the same memory."""
    raise NotImplementedError


@overload(pair_size, jit_options=INLINED)
def _pair_size(x):  # type: ignore[no-untyped-def]
    return (lambda x: 1) if x.dtype == types.float32 else (lambda x: 2)


@overload(words, jit_options=INLINED)
def _words(x):  # type: ignore[no-untyped-def]
    return (lambda x: x) if x.dtype == types.float32 else (lambda x: x.view(np.int32))


@overload(rounded, jit_options=INLINED)
def _rounded(x, out):  # type: ignore[no-untyped-def]
    return (lambda x, out: x) if out.dtype == types.float32 else (lambda x, out: to_bf16(x))


@overload(narrow_room, jit_options=INLINED)
def _narrow_room(x, like):  # type: ignore[no-untyped-def]
    if like.dtype == types.float32:
        return lambda x, like: x
    return lambda x, like: np.empty(x.size, like.dtype)


@overload(joined, jit_options=INLINED)
def _joined(first, second, out):  # type: ignore[no-untyped-def]
    if out.dtype == types.float32:
        return lambda first, second, out: first
    return lambda first, second, out: pair(first, second)


@overload(store_joined, jit_options=INLINED)
def _store_joined(out, place, line, first, second):  # type: ignore[no-untyped-def]
    def in_fp32(out, place, line, first, second):  # type: ignore[no-untyped-def]
        store(out, place, first)
        store(out, place + line, second)

    def in_bf16(out, place, line, first, second):  # type: ignore[no-untyped-def]
        store(out, place, pair(first, second))

    return in_fp32 if out.dtype == types.float32 else in_bf16


@overload(store_both, jit_options=INLINED)
def _store_both(out, pairs, row, lane, line, first, second):  # type: ignore[no-untyped-def]
    def in_fp32(out, pairs, row, lane, line, first, second):  # type: ignore[no-untyped-def]
        store(out, row + lane, first)
        store(out, row + lane + line, second)

    def in_bf16(out, pairs, row, lane, line, first, second):  # type: ignore[no-untyped-def]
        store(out, row + lane, to_bf16(first))
        store(out, row + lane + line, to_bf16(second))
        store(pairs, row // 2 + lane, pair(first, second))

    return in_fp32 if out.dtype == types.float32 else in_bf16


@inner(forceinline=True)
def up(n, multiple):  # type: ignore[no-untyped-def]
    return (n + multiple - 1) // multiple * multiple


@inner(forceinline=True)
def store_two(out, place, place2, first, second):  # type: ignore[no-untyped-def]
    """Two vectors of fp32 in the number format of `out`."""
    store(out, place, rounded(first, out))
    store(out, place2, rounded(second, out))


def _tile(vectors: int, adds: bool, rows: int = TILE) -> Any:
    @intrinsic
    def multiply(typing, a, at, row, step, b, there, line, n, out, place, width):  # type: ignore[no-untyped-def]
        def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
            a_array, at, row, step, b_array, there, line, n, out_array, place, width = args
            tile = [(i, v) for i in range(rows) for v in range(vectors)]

            def target(i: int, v: int) -> Any:
                there = builder.add(place, builder.mul(width, width.type(i)))
                return vector_at(context, builder, out, out_array, builder.add(there, place.type(v * LANES)))

            zero = ir.Constant(ir.VectorType(context.get_value_type(out.dtype), LANES), None)
            sums = [cgutils.alloca_once(builder, zero.type) for _ in tile]
            for place_of, total in zip(tile, sums, strict=True):
                builder.store(builder.load(target(*place_of), align=4) if adds else zero, total)
            data = context.make_array(a)(context, builder, value=a_array).data
            with cgutils.for_range(builder, n) as loop:
                x = builder.add(at, builder.mul(loop.index, step))
                y = builder.add(there, builder.mul(loop.index, line))
                columns = [
                    builder.load(vector_at(context, builder, b, b_array, builder.add(y, y.type(v * LANES))), align=4)
                    for v in range(vectors)
                ]
                for i in range(rows):
                    value = builder.load(builder.gep(data, [builder.add(x, builder.mul(row, row.type(i)))]))
                    value = spread(builder, value)
                    for v in range(vectors):
                        total = sums[i * vectors + v]
                        added = add_product(builder, a.dtype, value, columns[v], builder.load(total))
                        builder.store(added, total)
            for place_of, total in zip(tile, sums, strict=True):
                builder.store(builder.load(total), target(*place_of), align=4)
            return context.get_dummy_value()

        place = types.intp
        return types.none(a, place, place, place, b, place, place, place, out, place, place), build

    return multiply


multiply = _tile(1, adds=False)
"""A tile of out = a b: TILE rows, LANES columns, n (pairs of) inner numbers, of fp32 (or pairs of bf16 as int32).

`multiply(a, at, row, step, b, there, line, n, out, place, width)`: entry (i, t) of a is at `at` + i row + t step, row t
of b at `there` + t line, row i of the tile at `place` + i width.
"""
multiply_onto = _tile(1, adds=True)
"""The same, added to what is there."""
multiply_two = _tile(2, adds=False)
"""The same for twice as many columns: in bf16 a third quicker."""
multiply_two_onto = _tile(2, adds=True)
_multiply_half, _multiply_half_onto = _tile(1, adds=False, rows=HALF), _tile(1, adds=True, rows=HALF)
_multiply_two_half = _tile(2, adds=False, rows=HALF)


@inner
def pack_lanes(x, at, line, few, width, lanes, out):  # type: ignore[no-untyped-def]
    """At most `lanes` rows of it transposed, as memory that the products read: (pairs of) columns side by side.

    Lanes without a row repeat the last one.
    """
    p = pair_size(x)
    for i in range(0, lanes, LANES):
        for c in range(0, width, LANES * p):
            store_transposed(out, c // p * lanes + i, lanes, x, at + i * line + c, line, few - i, width - c)


@inner(forceinline=True)
def pack_along(x, at, line, tokens, width, out):  # type: ignore[no-untyped-def]
    """Rows as memory that the products read, with (pairs of) tokens side by side."""
    p, wide = pair_size(x), up(width, LANES)
    for i in range(0, tokens, p):
        for c in range(0, width, LANES):
            first = load_part(x, at + i * line + c, width - c, 0)
            # Zero padding: this token does not exist.
            second = load_part(x, at + (i + 1) * line + c, width - c if i + 1 < tokens else 0, 0)
            store(out, i // p * wide + c, joined(first, second, out))


PANEL = 2 * LANES
"""Columns that lie side by side in a right operand that is cut into panels."""


@inner
def panels_across(x, rows, width):  # type: ignore[no-untyped-def]
    """The transpose of a matrix, [rows, width], as a right operand in panels; sizes are multiples of LANES.

    The panel of column c begins at c times the operand's rows. If it is the last one it may have LANES columns only.
    """
    p = pair_size(x)
    out = words(np.empty(rows * width, x.dtype))
    for c in range(0, rows, LANES):
        first = c // PANEL * PANEL
        columns = min(PANEL, rows - first)
        for t in range(0, width, LANES * p):
            place = first * (width // p) + t // p * columns + c - first
            store_transposed(out, place, columns, x, c * width + t, width, LANES, width - t)
    return out


@inner
def panels_along(x, rows, width):  # type: ignore[no-untyped-def]
    """A matrix, [rows, width], as a right operand in panels."""
    out = words(np.empty(rows * width, x.dtype))
    for c in range(0, width, PANEL):
        pack_along(x, c, width, rows, min(PANEL, width - c), out[c * (rows // pair_size(x)) :])
    return out


@inner(forceinline=True)
def multiply_panel(a, at, row, panels, c, columns, n, out, place, width):  # type: ignore[no-untyped-def]
    """As `multiply` for the columns from c on, a panel or what is left of it, with a's inner numbers side by side."""
    if columns - c >= PANEL:
        multiply_two(a, at, row, 1, panels, c * n, PANEL, n, out, place, width)
    else:
        multiply(a, at, row, 1, panels, c * n, LANES, n, out, place, width)


@inner
def pack_left(x, at, line, tokens, width, out):  # type: ignore[no-untyped-def]
    """A head's [N, K] as a product's left operand: rows side by side. What follows the last row is overwritten."""
    deep = up(width, pair_size(x))
    for i in range(tokens):
        for c in range(0, width, LANES):
            store(out, i * deep + c, load_part(x, at + i * line + c, width - c, 0))


@inner(forceinline=True)
def multiply_lanes(a, at, row, step, b, lanes, n, out, place):  # type: ignore[no-untyped-def]
    """TILE rows of a times b, [n, lanes], with LANES or PANEL lanes."""
    if lanes == PANEL:
        multiply_two(a, at, row, step, b, 0, PANEL, n, out, place, PANEL)
    else:
        multiply(a, at, row, step, b, 0, LANES, n, out, place, LANES)


@inner(forceinline=True)
def multiply_rows(a, row, step, b, lanes, n, out, rows):  # type: ignore[no-untyped-def]
    """out [rows, lanes] = a b, and anything in rows that make up a tile."""
    whole = whole_tiles(rows)
    for j in range(0, whole, TILE):
        multiply_lanes(a, j * row, row, step, b, lanes, n, out, j * lanes)
    if whole < rows and lanes == PANEL:
        _multiply_two_half(a, whole * row, row, step, b, 0, PANEL, n, out, whole * PANEL, PANEL)
    elif whole < rows:
        _multiply_half(a, whole * row, row, step, b, 0, LANES, n, out, whole * LANES, LANES)


@inner(forceinline=True)
def whole_tiles(rows):  # type: ignore[no-untyped-def]
    """Rows that come in whole tiles; what is left takes half a tile, if any."""
    return (rows + HALF - 1) // TILE * TILE


@inner
def transposed_product(a, b, size, deep, lanes, out):  # type: ignore[no-untyped-def]
    """out [size, lanes] = rows of a times columns of b; -inf in the row that makes an odd size even."""
    multiply_rows(a, deep, 1, b, lanes, deep, out, size)
    if size % 2:
        out[size * lanes : (size + 1) * lanes] = -np.inf


@inner
def write_across(mixed, lanes, turned, factors, out, at, line, few, width):  # type: ignore[no-untyped-def]
    """Rows of `out` from columns of `mixed`, [K, lanes], times each one's factor; `turned` is room for LANES rows."""
    for v in range(0, few, LANES):
        for c in range(0, width, LANES):
            store_transposed(turned, 0, LANES, mixed, c * lanes + v, lanes, LANES, LANES)
            for u in range(min(LANES, few - v)):
                write(out, at + (v + u) * line + c, width - c, load(turned, u * LANES) * factors[v + u])


@inner
def add_across(mixed, lanes, turned, shrinks, factors, out, at, line, few, width):  # type: ignore[no-untyped-def]
    """The same with what is there, times each row's `shrinks`, added before the factor."""
    for v in range(0, few, LANES):
        for c in range(0, width, LANES):
            store_transposed(turned, 0, LANES, mixed, c * lanes + v, lanes, LANES, LANES)
            for u in range(min(LANES, few - v)):
                place = at + (v + u) * line + c
                total = fma(read(out, place, width - c), shrinks[v + u], load(turned, u * LANES))
                write(out, place, width - c, total * factors[v + u])


@inner
def pack_both(x, at, line, few, width, lanes, across, along):  # type: ignore[no-untyped-def]
    """Rows of a head as `pack_lanes` has them and as `pack_along` has: there, lanes without a row hold no numbers."""
    pack_lanes(x, at, line, few, width, lanes, across)
    if few < lanes:
        along[:] = 0
    pack_along(x, at, line, few, width, along)


@inner
def add_outer(left, line, along, wide, size, out):  # type: ignore[no-untyped-def]
    """out [size, wide] += rows of left, [size, line], times those of `along`."""
    whole = whole_tiles(size)
    for c in range(0, wide, LANES):
        for j in range(0, whole, TILE):
            multiply_onto(left, j * line, line, 1, along, c, wide, line, out, j * wide + c, wide)
        if whole < size:
            _multiply_half_onto(left, whole * line, line, 1, along, c, wide, line, out, whole * wide + c, wide)


@inner
def write_rows(x, factor, out, at, line, rows, width):  # type: ignore[no-untyped-def]
    """Rows of a head from x, [rows, width up to whole vectors], times a factor."""
    wide = up(width, LANES)
    for j in range(rows):
        for c in range(0, wide, LANES):
            write(out, at + j * line + c, width - c, load(x, j * wide + c) * factor)
