"""What numba's Python lacks, each a few LLVM instructions: memory by address, atomic numbers, calls, vectors.

Addresses are int64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I16, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FUSED = ("contract",)


def _has_avx512() -> bool:
    chosen = numba.config.CPU_FEATURES
    return "+avx512f" in (llvmlite.binding.get_host_cpu_features().flatten() if chosen is None else chosen).split(",")


AVX512 = _has_avx512()
LANES = 16 if AVX512 else 8
"""Numbers of a vector; where registers are shorter, LLVM takes several."""


def _at(builder: Any, address: Any, element: ir.Type) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _vector(element: ir.Type, lanes: int = LANES) -> ir.Type:
    return ir.VectorType(element, lanes)


def _numbers_at(kind: types.Type, element: ir.Type) -> Any:
    def numbers(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _at(builder, arguments[0], element)

        return types.CPointer(kind)(types.int64), generate

    return intrinsic(numbers)


floats_at = _numbers_at(types.float32, _FLOAT)
words_at = _numbers_at(types.int64, _I64)


@intrinsic
def fetch_add(typing_context: Any, address: Any, number: Any) -> Any:
    """Adds to a word that other threads add to as well; returns what it was before. All threads see one order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, arguments[0], _I64), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def call(typing_context: Any, function: Any, argument: Any) -> Any:
    """Calls a C function of one pointer by its address; returns the pointer that it returns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(_at(builder, arguments[0], ir.FunctionType(_I64, [_I64])), [arguments[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def address_of(typing_context: Any, symbol: Any) -> Any:
    """The address of a C function that the process or `llvmlite.binding.add_symbol` knows.

    It is looked up when code is linked, so that what numba keeps on disk holds no address of an earlier process.
    """
    name = getattr(symbol, "literal_value", "")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        known = builder.module.globals.get(name)
        return builder.ptrtoint(known or ir.Function(builder.module, ir.FunctionType(_I64, [_I64]), name), _I64)

    return types.int64(symbol), generate


class Number:
    """How a number is stored.

    Attributes:
      nbytes: Its size.
    """

    def __init__(self, element: ir.Type, nbytes: int, to_float32: Callable[[Any, Any, int], Any]):
        self.nbytes = nbytes
        self._element, self._to_float32 = element, to_float32

    def load(self, builder: Any, start: Any, index: Any, lanes: int) -> Any:
        """Some numbers of the row at `start`, from one on, as float32 of the same values."""
        address = builder.add(start, builder.mul(index, ir.Constant(_I64, self.nbytes)))
        stored = builder.load(_at(builder, address, _vector(self._element, lanes)), align=self.nbytes)
        return self._to_float32(builder, stored, lanes)


def _from_bfloat16(builder: Any, bits: Any, lanes: int) -> Any:
    """A bfloat16 is the upper half of the float32 of the same value."""
    wide = builder.zext(bits, _vector(_I32, lanes))
    return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, [16] * lanes)), _vector(_FLOAT, lanes))


def _from_float16(builder: Any, bits: Any, lanes: int) -> Any:
    return builder.fpext(builder.bitcast(bits, _vector(ir.HalfType(), lanes)), _vector(_FLOAT, lanes))


FLOAT32 = Number(_FLOAT, 4, lambda builder, values, lanes: values)
BFLOAT16 = Number(_I16, 2, _from_bfloat16)
FLOAT16 = Number(_I16, 2, _from_float16)
INT8 = Number(_I8, 1, lambda builder, integers, lanes: builder.sitofp(integers, _vector(_FLOAT, lanes)))


def widen(number: Number, lanes: int = LANES) -> Any:
    """Returns `widen(row, index, out)`: writes some numbers of a row, from `index` on, to an address as float32."""

    def widen(typing_context: Any, row: Any, index: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, index, out = arguments
            values = number.load(builder, row, index, lanes)
            builder.store(values, _at(builder, out, values.type), align=4)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 3), generate

    return intrinsic(widen)


def _q4_k_values(builder: Any, block: Any) -> Iterator[Any]:
    """The 256 values of a block of Q4_K, 144 bytes, in vectors of 32: d * scale * q - dmin * min (`codecs.Q4_K`)."""

    def stored(offset: int, kind: ir.Type) -> Any:
        return builder.load(_at(builder, builder.add(block, ir.Constant(_I64, offset)), kind), align=1)

    def bits(word: Any, shift: int, mask: int) -> Any:
        return builder.and_(builder.lshr(word, ir.Constant(_I32, shift)), ir.Constant(_I32, mask * 0x01010101))

    def codes(first: Any, second: Any) -> Any:
        """Two words of 4 codes -> 8 float32."""
        pair = ir.Constant(_vector(_I32, 2), ir.Undefined)
        for place, word in enumerate((first, second)):
            pair = builder.insert_element(pair, word, ir.Constant(_I32, place))
        return builder.uitofp(builder.bitcast(pair, _vector(_I8, 8)), _vector(_FLOAT, 8))

    def times(half_at: int, codes: Any) -> Any:
        factor = builder.fpext(stored(half_at, ir.HalfType()), _FLOAT)
        one = builder.insert_element(ir.Constant(codes.type, ir.Undefined), factor, ir.Constant(_I32, 0))
        return builder.fmul(_lane(builder, one, 0, 8), codes)

    # 6 bits a code: of the first four groups in the lower bits of a word, of the others in a third word and above.
    low_scales, low_mins, rest = (stored(offset, _I32) for offset in (4, 8, 12))
    above = [builder.shl(bits(word, 6, 3), ir.Constant(_I32, 4)) for word in (low_scales, low_mins)]
    steps = times(0, codes(bits(low_scales, 0, 63), builder.or_(bits(rest, 0, 15), above[0])))
    shifts = times(2, codes(bits(low_mins, 0, 63), builder.or_(bits(rest, 4, 15), above[1])))
    for group in range(8):
        packed = stored(16 + group // 2 * 32, _vector(_I8, 32))
        if group % 2:
            quants = builder.lshr(packed, ir.Constant(packed.type, [4] * 32))
        else:
            quants = builder.and_(packed, ir.Constant(packed.type, [15] * 32))
        step, shift = (_lane(builder, each, group, 32) for each in (steps, shifts))
        values = builder.fmul(builder.uitofp(quants, step.type), step, flags=_FUSED)
        yield builder.fsub(values, shift, flags=_FUSED)


@intrinsic
def decode_q4_k(typing_context: Any, block: Any, out: Any) -> Any:
    """Writes the 256 float32 values of a block."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block, out = arguments
        for group, values in enumerate(_q4_k_values(builder, block)):
            place = builder.add(out, ir.Constant(_I64, 128 * group))
            builder.store(values, _at(builder, place, values.type), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def dot_q4_k(typing_context: Any, row: Any, x: Any, blocks: Any, sum: Any) -> Any:
    """Adds the product of whole blocks of a row with float32 at x to the float32 at `sum`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, x, blocks, sum = arguments

        def body(index: Any, totals: list[Any]) -> list[Any]:
            block = builder.add(row, builder.mul(index, ir.Constant(_I64, 144)))
            start = builder.add(x, builder.mul(index, ir.Constant(_I64, 1024)))
            for group, values in enumerate(_q4_k_values(builder, block)):
                place = builder.add(start, ir.Constant(_I64, 128 * group))
                others = builder.load(_at(builder, place, values.type), align=4)
                product = builder.fmul(values, others, flags=_FUSED)
                totals[group % 2] = builder.fadd(totals[group % 2], product, flags=_FUSED)
            return totals

        totals = _summed(builder, blocks, 1, [ir.Constant(_vector(_FLOAT, 32), [0.0] * 32)] * 2, body)
        _add_to(builder, sum, totals)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


def _lane(builder: Any, vector: Any, lane: int, lanes: int) -> Any:
    """A vector of one lane of another."""
    return builder.shuffle_vector(vector, vector, ir.Constant(_vector(_I32, lanes), [lane] * lanes))


def multiply_tile(rows: int, vectors: int, unrolled: int = 1, number: Number = FLOAT32) -> Any:
    """Returns `tile(a, a_bytes, x, x_bytes, count, sums, sums_bytes)`: adds products of rows with vectors.

    The rows are stored as `number` says, all else is float32; `a_bytes` and `x_bytes` from one row or vector to the
    next; `count` numbers of each, a multiple of LANES * unrolled; sums [vectors, rows], `sums_bytes` from one vector's
    to the next. They stay in registers, rows * vectors * unrolled of them, so that no addition waits for the last.
    """

    def tile(
        typing_context: Any, a: Any, a_bytes: Any, x: Any, x_bytes: Any, count: Any, sums: Any, sums_bytes: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_bytes, x, x_bytes, count, sums, sums_bytes = arguments
            rows_at = [_nth(builder, a, a_bytes, row) for row in range(rows)]
            vectors_at = [_nth(builder, x, x_bytes, vector) for vector in range(vectors)]

            def body(index: Any, totals: list[Any]) -> list[Any]:
                products = []
                for part in range(unrolled):
                    column = builder.add(index, ir.Constant(_I64, part * LANES))
                    left = [number.load(builder, start, column, LANES) for start in rows_at]
                    right = [FLOAT32.load(builder, start, column, LANES) for start in vectors_at]
                    products += [builder.fmul(u, v, flags=_FUSED) for v in right for u in left]
                return [builder.fadd(t, p, flags=_FUSED) for t, p in zip(totals, products, strict=True)]

            zeros = [ir.Constant(_vector(_FLOAT), [0.0] * LANES)] * (rows * vectors * unrolled)
            totals = _summed(builder, count, LANES * unrolled, zeros, body)
            for pair in range(rows * vectors):
                place = builder.add(_nth(builder, sums, sums_bytes, pair // rows), ir.Constant(_I64, 4 * (pair % rows)))
                _add_to(builder, place, totals[pair :: rows * vectors])
            return context.get_dummy_value()

        return types.none(*[types.int64] * 7), generate

    return intrinsic(tile)


def _nth(builder: Any, base: Any, stride: Any, number: int) -> Any:
    return builder.add(base, builder.mul(stride, ir.Constant(_I64, number)))


def _summed(builder: Any, count: Any, step: int, zeros: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> Any:
    """Totals of a loop over 0, step, 2 * step ... below count; `body` is given them and returns the next ones."""
    before = builder.block
    check, inside, after = (builder.append_basic_block(name) for name in ("check", "inside", "after"))
    builder.branch(check)
    builder.position_at_end(check)
    index, totals = builder.phi(_I64), [builder.phi(zero.type) for zero in zeros]
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    following = body(index, list(totals))
    index.add_incoming(ir.Constant(_I64, 0), before)
    index.add_incoming(builder.add(index, ir.Constant(_I64, step)), inside)
    for total, zero, value in zip(totals, zeros, following, strict=True):
        total.add_incoming(zero, before)
        total.add_incoming(value, inside)
    builder.branch(check)
    builder.position_at_end(after)
    return totals


def _add_to(builder: Any, address: Any, totals: list[Any]) -> None:
    """Adds all lanes of some vectors to the float32 at an address."""
    total = functools.reduce(builder.fadd, totals)
    name = f"llvm.vector.reduce.fadd.v{total.type.count}f32"
    kind = ir.FunctionType(_FLOAT, [_FLOAT, total.type])
    reduce = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    lanes = builder.call(reduce, [ir.Constant(_FLOAT, 0.0), total], fastmath=("reassoc",))
    place = _at(builder, address, _FLOAT)
    builder.store(builder.fadd(builder.load(place), lanes), place)
