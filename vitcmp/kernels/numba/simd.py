"""Vectors of numbers in functions that numba compiles, cut by hand where the compiler alone does not find them.

A `Vector` has LANES lanes and lives in registers, one of 512 bits or as many narrower ones as the processor needs.
Vectors and numbers mix under + - * / > <, a number counting for all lanes. Arrays are addressed by their flat place,
without bounds checks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from numba import config, types
from numba.extending import intrinsic, lower_builtin, models, overload, register_model

from vitcmp.kernels.numba._numba import AbstractTemplate, get_host_cpu_features, infer_global, ir, signature

LANES = 16
COMPRESSES = not config.CPU_NAME and bool(get_host_cpu_features().get("avx512f"))  # type: ignore[attr-defined]
"""Whether the processor packs the chosen lanes of a vector of 32-bit numbers with one instruction."""
MULTIPLIES_PAIRS = not config.CPU_NAME and all(get_host_cpu_features().get(x) for x in ("avx512f", "avx512bf16"))  # type: ignore[attr-defined]
"""Whether it multiplies pairs of bf16 numbers and adds up in fp32 with one instruction."""
INLINED: Any = {"forceinline": True}
"""Of functions too short to be called."""
INT16, INT32, LANE_BITS = ir.IntType(16), ir.IntType(32), ir.IntType(LANES)


class Vector(types.Type):
    """LANES numbers, or truth values."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


class _BFloat(ir.Type):
    """LLVM's bfloat. To numba bf16 is int16, and a pair of them int32, the first one in the lower half."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(manager[vector.dtype].get_value_type(), LANES))


def _spread(context: Any, builder: Any, x: Any, kind: Any, vector: Vector) -> Any:
    """A number as a vector; a vector stays."""
    return x if isinstance(kind, Vector) else spread(builder, context.cast(builder, x, kind, vector.dtype))


def spread(builder: Any, x: Any) -> Any:
    """A vector of x alone, in LLVM's terms."""
    none = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    one = builder.insert_element(none, x, INT32(0))
    return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def _places(context: Any, builder: Any, first: Any) -> Any:
    """first, first + 1, ... of type int32."""
    first = _spread(context, builder, first, types.intp, Vector(types.int32))
    return builder.add(first, ir.Constant(first.type, list(range(LANES))))


def vector_at(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    data = context.make_array(kind)(context, builder, value=array).data
    item = ir.VectorType(context.get_value_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [place]), item.as_pointer())


def _call(builder: Any, name: str, dtype: Any, result: Any, *args: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Calls LLVM's intrinsic of this name for vectors of this type."""
    name = name.format(f"v{LANES}{'f' if isinstance(dtype, types.Float) else 'i'}{dtype.bitwidth}")
    kind = ir.FunctionType(result, [x.type for x in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args, fastmath=fastmath)


def _operation(function: Callable[..., Any], floating: Any, integer: Any = None, truth: bool = False) -> None:
    """Makes `function` work for a vector with a vector or a number."""

    @infer_global(function)
    class Operation(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            found = [x for x in args if isinstance(x, Vector)]
            if not found or not all(isinstance(x, types.Number | Vector) for x in args):
                return None
            return signature(Vector(types.boolean) if truth else found[0], *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = next(x for x in sig.args if isinstance(x, Vector))
        a, b = (_spread(context, builder, x, kind, vector) for x, kind in zip(args, sig.args, strict=True))
        return (floating if isinstance(vector.dtype, types.Float) else integer)(builder, a, b)

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, *kinds)(lower)


def larger(a, b):  # type: ignore[no-untyped-def]
    """The larger one of each lane; b where either is NaN."""
    raise NotImplementedError


def smaller(a, b):  # type: ignore[no-untyped-def]
    """The smaller one of each lane; b where either is NaN."""
    raise NotImplementedError


_operation(operator.add, ir.IRBuilder.fadd, ir.IRBuilder.add)
_operation(operator.sub, ir.IRBuilder.fsub, ir.IRBuilder.sub)
_operation(operator.mul, ir.IRBuilder.fmul, ir.IRBuilder.mul)
_operation(operator.truediv, ir.IRBuilder.fdiv)
_operation(operator.lshift, None, ir.IRBuilder.shl)
_operation(operator.rshift, None, ir.IRBuilder.ashr)
# True where either is NaN, so that a NaN is never dropped.
_operation(operator.gt, lambda builder, a, b: builder.fcmp_unordered(">", a, b), truth=True)
_operation(operator.lt, lambda builder, a, b: builder.fcmp_unordered("<", a, b), truth=True)
_operation(larger, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
_operation(smaller, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))


@intrinsic
def splat(typing, x, array):  # type: ignore[no-untyped-def]
    """A vector of x, in the array's number format."""
    vector = Vector(array.dtype)
    return vector(x, array), lambda context, builder, sig, args: _spread(context, builder, args[0], x, vector)


@intrinsic
def load(typing, array, place):  # type: ignore[no-untyped-def]
    """The array's elements from `place` on."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.load(vector_at(context, builder, array, *args), align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), build


@intrinsic
def load_part(typing, array, place, n, fill):  # type: ignore[no-untyped-def]
    """As `load`, but reads the first n elements only; the other lanes are `fill`."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = vector_at(context, builder, array, *args[:2])
        rest = _spread(context, builder, args[3], fill, Vector(array.dtype))
        mask = builder.icmp_signed(">", _spread(context, builder, args[2], types.intp, Vector(types.int32)),
                                   ir.Constant(ir.VectorType(INT32, LANES), list(range(LANES))))  # fmt: skip
        align = INT32(array.dtype.bitwidth // 8)
        return _call(builder, "llvm.masked.load.{}.p0", array.dtype, rest.type, pointer, align, mask, rest)

    return Vector(array.dtype)(array, types.intp, types.intp, fill), build


@intrinsic
def store(typing, array, place, x):  # type: ignore[no-untyped-def]
    """Writes x from `place` on."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = _spread(context, builder, args[2], x, Vector(array.dtype))
        builder.store(value, vector_at(context, builder, array, *args[:2]), align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, x), build


@intrinsic
def store_part(typing, array, place, n, x):  # type: ignore[no-untyped-def]
    """As `store`, but writes the first n lanes only."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = _spread(context, builder, args[3], x, Vector(array.dtype))
        mask = builder.icmp_signed(">", _spread(context, builder, args[2], types.intp, Vector(types.int32)),
                                   ir.Constant(ir.VectorType(INT32, LANES), list(range(LANES))))  # fmt: skip
        align = INT32(array.dtype.bitwidth // 8)
        pointer = vector_at(context, builder, array, *args[:2])
        _call(builder, "llvm.masked.store.{}.p0", array.dtype, ir.VoidType(), value, pointer, align, mask)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, x), build


def _prefetch(writes: bool) -> Any:
    @intrinsic
    def prefetch(typing, array, place):  # type: ignore[no-untyped-def]
        def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
            pointer = builder.gep(context.make_array(array)(context, builder, value=args[0]).data, [args[1]])
            pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
            kind, name = ir.FunctionType(ir.VoidType(), [pointer.type] + 3 * [INT32]), "llvm.prefetch.p0"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            # Into the second cache: the first one is full of what is at work.
            builder.call(function, [pointer, INT32(int(writes)), INT32(2), INT32(1)])
            return context.get_dummy_value()

        return types.none(array, types.intp), build

    return prefetch


prefetch = _prefetch(writes=False)
"""The processor begins to bring what is at this place into its cache; a place outside of the array does no harm."""
prefetch_to_write = _prefetch(writes=True)
"""The same for what will be written."""


@intrinsic
def append(typing, array, place, x, mask):  # type: ignore[no-untyped-def]
    """Writes the lanes of x where `mask` is true one after the other from `place` on, then anything up to LANES."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        target, place, value, chosen = args
        if COMPRESSES and x.dtype.bitwidth == 32:
            rest = ir.Constant(value.type, ir.Undefined)
            value = _call(builder, "llvm.experimental.vector.compress.{}", x.dtype, value.type, value, chosen, rest)
            builder.store(value, vector_at(context, builder, array, target, place), align=4)
            return context.get_dummy_value()
        data = context.make_array(array)(context, builder, value=target).data
        for lane in range(LANES):
            builder.store(builder.extract_element(value, INT32(lane)), builder.gep(data, [place]))
            place = builder.add(place, builder.zext(builder.extract_element(chosen, INT32(lane)), place.type))
        return context.get_dummy_value()

    return types.none(array, types.intp, x, mask), build


@intrinsic
def store_transposed(typing, out, place, apart, array, at, line, few, n):  # type: ignore[no-untyped-def]
    """Transposes LANES rows of 32-bit words, `line` elements apart in `array` from `at` on, to `out` from `place` on.

    The rows after the first `few` repeat the last of these. Of each row n elements are read, at most LANES words; as
    many lines of LANES are written, `apart` elements apart, as there are words.
    """
    share = 32 // array.dtype.bitwidth

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        target, place, apart, source, at, line, few, n = args
        items = ir.VectorType(context.get_value_type(array.dtype), LANES * share)
        numbers = ir.VectorType(INT32, LANES * share)
        spread = builder.insert_element(ir.Constant(numbers, ir.Undefined), builder.trunc(n, INT32), INT32(0))
        spread = builder.shuffle_vector(spread, spread, ir.Constant(numbers, [0] * LANES * share))
        mask = builder.icmp_signed(">", spread, ir.Constant(numbers, list(range(LANES * share))))
        data = context.make_array(array)(context, builder, value=source).data
        name = f"llvm.masked.load.v{LANES * share}{'f' if share == 1 else 'i'}{array.dtype.bitwidth}.p0"
        kind = ir.FunctionType(items, [items.as_pointer(), INT32, mask.type, items])
        load_masked = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        vectors = []
        for number in range(LANES):
            if number:
                at = builder.add(
                    at, builder.select(builder.icmp_signed(">", few, few.type(number)), line, line.type(0))
                )
            pointer = builder.bitcast(builder.gep(data, [at]), items.as_pointer())
            row = builder.call(load_masked, [pointer, INT32(array.dtype.bitwidth // 8), mask, ir.Constant(items, None)])
            vectors.append(builder.bitcast(row, ir.VectorType(context.get_value_type(out.dtype), LANES)))
        for half in (1, 2, 4, 8):
            # Of blocks of 2 half x 2 half, the two off the diagonal change places.
            upper = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
            lower = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & half):
                pair = vectors[i], vectors[i + half]
                vectors[i], vectors[i + half] = (
                    builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(INT32, LANES), order))
                    for order in (upper, lower)
                )
        for number, vector in enumerate(vectors):
            with builder.if_then(builder.icmp_signed("<", n.type(number * share), n)):
                builder.store(vector, vector_at(context, builder, out, target, place), align=4)
            place = builder.add(place, apart)
        return context.get_dummy_value()

    place = types.intp
    return types.none(out, place, place, array, place, place, place, place), build


@intrinsic
def places(typing, first):  # type: ignore[no-untyped-def]
    """first, first + 1, ... as int32."""
    return Vector(types.int32)(types.intp), lambda context, builder, sig, args: _places(context, builder, args[0])


@intrinsic
def count(typing, mask):  # type: ignore[no-untyped-def]
    """The number of true lanes."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.zext(builder.ctpop(builder.bitcast(args[0], LANE_BITS)), ir.IntType(64))

    return types.int64(mask), build


@intrinsic
def where(typing, mask, a, b):  # type: ignore[no-untyped-def]
    """a where `mask` is true, b elsewhere; one of them may be a number."""
    vector = a if isinstance(a, Vector) else b

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.select(args[0], *(_spread(context, builder, x, kind, vector)
                                         for x, kind in zip(args[1:], (a, b), strict=True)))  # fmt: skip

    return vector(mask, a, b), build


@intrinsic
def total_of(typing, x):  # type: ignore[no-untyped-def]
    """The sum of the lanes."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        item = context.get_value_type(x.dtype)
        return _call(builder, "llvm.vector.reduce.fadd.{}", x.dtype, item, item(-0.0), *args, fastmath=("reassoc",))

    return x.dtype(x), build


@intrinsic
def largest(typing, x):  # type: ignore[no-untyped-def]
    """The largest lane; with a NaN among them, that or the largest other one."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        (y,) = args
        for half in (8, 4, 2, 1):
            other = [(lane + half) % LANES for lane in range(LANES)]
            z = builder.shuffle_vector(y, y, ir.Constant(ir.VectorType(INT32, LANES), other))
            y = builder.select(builder.fcmp_ordered(">", y, z), y, z)
        return builder.extract_element(y, INT32(0))

    return x.dtype(x), build


@intrinsic
def fma(typing, a, b, c):  # type: ignore[no-untyped-def]
    """a b + c, rounded once; a is a vector."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        values = [_spread(context, builder, x, kind, a) for x, kind in zip(args, (a, b, c), strict=True)]
        return _call(builder, "llvm.fma.{}", a.dtype, values[0].type, *values)

    return a(a, b, c), build


@intrinsic
def multiply_add(typing, array, place, x, total):  # type: ignore[no-untyped-def]
    """total + array[place] x, where numbers of int32 are pairs of bf16: then both products are added, in fp32."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        source, at, x, total = args
        data = context.make_array(array)(context, builder, value=source).data
        return add_product(builder, array.dtype, spread(builder, builder.load(builder.gep(data, [at]))), x, total)

    return total(array, types.intp, x, total), build


def add_product(builder: Any, dtype: Any, a: Any, x: Any, total: Any) -> Any:
    """total + a x of vectors of this type, as `multiply_add`."""
    if dtype == types.float32:
        return _call(builder, "llvm.fma.{}", dtype, total.type, a, x, total)
    if MULTIPLIES_PAIRS:
        pairs = ir.VectorType(_BFloat(), 2 * LANES)
        kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [total, builder.bitcast(a, pairs), builder.bitcast(x, pairs)])
    for half in (_second, _first):
        parts = [half(builder, y, total.type) for y in (a, x)]
        total = _call(builder, "llvm.fma.{}", types.float32, total.type, *parts, total)
    return total


def _first(builder: Any, x: Any, kind: Any) -> Any:
    """The first numbers of pairs of bf16, in fp32."""
    return builder.bitcast(builder.shl(x, ir.Constant(x.type, [16] * LANES)), kind)


def _second(builder: Any, x: Any, kind: Any) -> Any:
    return builder.bitcast(builder.and_(x, ir.Constant(x.type, [-65536] * LANES)), kind)


def _narrow(builder: Any, x: Any, kind: Any) -> Any:
    """Rounded to bf16, to even; without the instruction, LLVM would call a function that numba does not link."""
    if MULTIPLIES_PAIRS:
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(_BFloat(), LANES)), kind)
    integers = ir.VectorType(INT32, LANES)
    sixteen, one, half, nan = (ir.Constant(integers, [n] * LANES) for n in (16, 1, 0x7FFF, 0x7FC0))
    y = builder.bitcast(x, integers)
    rounding = builder.add(half, builder.and_(builder.lshr(y, sixteen), one))
    y = builder.select(builder.fcmp_unordered("uno", x, x), nan, builder.lshr(builder.add(y, rounding), sixteen))
    return builder.trunc(y, ir.VectorType(INT16, LANES))


def _widen(builder: Any, x: Any, kind: Any) -> Any:
    integers = ir.VectorType(INT32, LANES)
    return builder.bitcast(builder.shl(builder.zext(x, integers), ir.Constant(integers, [16] * LANES)), kind)


@intrinsic
def pair(typing, a, b):  # type: ignore[no-untyped-def]
    """Vectors of bf16, or of fp32 rounded to it, those of a and b in pairs."""

    def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = context.get_value_type(sig.return_type)
        halves = args if a.dtype == types.int16 else [_narrow(builder, x, ir.VectorType(INT16, LANES)) for x in args]
        x, y = (builder.zext(x, kind) for x in halves)
        return builder.or_(x, builder.shl(y, ir.Constant(kind, [16] * LANES)))

    return Vector(types.int32)(a, b), build


def _unary(name: str, *dtypes: Any, emit: Any = None) -> Any:
    @intrinsic
    def function(typing, x):  # type: ignore[no-untyped-def]
        result = Vector(dtypes[0]) if dtypes else x

        def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
            kind = context.get_value_type(result)
            return emit(builder, args[0], kind) if emit else _call(builder, name, x.dtype, kind, *args)

        return result(x), build

    return function


sqrt = _unary("llvm.sqrt.{}")
log = _unary("llvm.log.{}")
exp = _unary("llvm.exp.{}")
nearest = _unary("llvm.rint.{}")
bits = _unary("", types.int32, emit=ir.IRBuilder.bitcast)
from_bits = _unary("", types.float32, emit=ir.IRBuilder.bitcast)
to_int = _unary("", types.int32, emit=ir.IRBuilder.fptosi)
to_float = _unary("", types.float32, emit=ir.IRBuilder.sitofp)
to_bf16 = _unary("", types.int16, emit=_narrow)
from_bf16 = _unary("", types.float32, emit=_widen)


def polynomial(*coefficients: float) -> Any:
    """The function of a vector with these coefficients, the highest power's first."""

    @intrinsic
    def function(typing, x):  # type: ignore[no-untyped-def]
        def build(context, builder, sig, args):  # type: ignore[no-untyped-def]
            kind = args[0].type
            total, *rest = (ir.Constant(kind, [c] * LANES) for c in coefficients)
            for c in rest:
                total = _call(builder, "llvm.fma.{}", x.dtype, kind, total, *args, c)
            return total

        return x(x), build

    return function


def read(x, place, n):  # type: ignore[no-untyped-def]
    """Up to n numbers of fp32 or bf16, in fp32; the other lanes are 0."""
    raise NotImplementedError


def write(out, place, n, x):  # type: ignore[no-untyped-def]
    """Writes the first n lanes, in the number format of `out`."""
    raise NotImplementedError


@overload(read, jit_options=INLINED)
def _read(x, place, n):  # type: ignore[no-untyped-def]
    if x.dtype == types.float32:
        return lambda x, place, n: load(x, place) if n >= LANES else load_part(x, place, n, 0.0)
    return lambda x, place, n: from_bf16(load(x, place) if n >= LANES else load_part(x, place, n, 0))


@overload(write, jit_options=INLINED)
def _write(out, place, n, x):  # type: ignore[no-untyped-def]
    def in_fp32(out, place, n, x):  # type: ignore[no-untyped-def]
        if n >= LANES:
            store(out, place, x)
        else:
            store_part(out, place, n, x)

    def in_bf16(out, place, n, x):  # type: ignore[no-untyped-def]
        if n >= LANES:
            store(out, place, to_bf16(x))
        else:
            store_part(out, place, n, to_bf16(x))

    return in_fp32 if out.dtype == types.float32 else in_bf16


def exp2(x):  # type: ignore[no-untyped-def]
    """2 to the power of each lane, fp32, x <= 127; to 3e-7, and below 1e-37 for x < -126."""
    raise NotImplementedError


def log2(x):  # type: ignore[no-untyped-def]
    """The logarithm of each lane of x > 0."""
    raise NotImplementedError


def power(x, r):  # type: ignore[no-untyped-def]
    """x ^ r for x >= 0 (0 at 0); in fp32 to 1e-7 times r."""
    raise NotImplementedError


@overload(exp2, jit_options=INLINED)
def _exp2(x):  # type: ignore[no-untyped-def]
    def fast(x):  # type: ignore[no-untyped-def]
        # x = n + f with f in [-0.5, 0.5]; 2^f by its minimax polynomial.
        x = larger(-126.0, x)
        n = nearest(x)
        f = x - n
        two_f = fma(fma(f, 0.00132764715, 0.00967554133), f, 0.0555071327)
        two_f = fma(fma(fma(two_f, f, 0.240221197), f, 0.693146967), f, 1.00000007)
        return from_bits(bits(two_f) + (to_int(n) << 23))

    return fast


@overload(log2)
def _log2(x):  # type: ignore[no-untyped-def]
    if x.dtype != types.float32:
        return lambda x: log(x) * (1 / math.log(2))

    def fast(x):  # type: ignore[no-untyped-def]
        # x = 2^e m with m in [0.71, 1.42), log2(m) by the series of atanh((m - 1) / (m + 1)).
        e = (bits(x) - 0x3F3504F3) >> 23
        m = from_bits(bits(x) - (e << 23))
        t = (m - 1.0) / (m + 1.0)
        s = t * t
        return to_float(e) + t * (2 / math.log(2)) * ((((s / 9 + 1 / 7) * s + 1 / 5) * s + 1 / 3) * s + 1.0)

    return fast


@overload(power)
def _power(x, r):  # type: ignore[no-untyped-def]
    if x.dtype != types.float32:
        return lambda x, r: where(x > 0, exp(log(x) * r), 0.0)

    def fast(x, r):  # type: ignore[no-untyped-def]
        y = larger(log2(x) * r, -126.0)
        # 2^y: y = n + f with f in [-0.5, 0.5], 2^f by its Taylor series.
        n = to_int(y + 256.5) - 256
        f = (y - to_float(n)) * math.log(2)
        tail = (f * (1 / 720) + 1 / 120) * f + 1 / 24
        two_f = (((tail * f + 1 / 6) * f + 1 / 2) * f + 1.0) * f + 1.0
        # A NaN is below 0, as vectors compare; its bits have been taken for a number.
        return where(x < 0, x, where(x > 0, two_f * from_bits((n + 127) << 23), 0.0))

    return fast
