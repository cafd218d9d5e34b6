"""Rows of a weight, in the form in which they are stored, times vectors of float32; numba compiles this.

Of a few vectors each row is read once and widened in registers, as fast as memory gives it. For many, some rows are
decoded into the first-level cache, a piece at a time, and multiplied with all vectors from there. Every sum is taken in
an order that depends on sizes alone, whoever computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from apr_jax.cpu import machine_code
from apr_jax.cpu.machine_code import AVX512, LANES, decode_q4_k, dot_q4_k, floats_at, multiply_tile

BFLOAT16, FLOAT16, SCALED_INT8, Q4_K = range(4)
"""Forms, as numbers that a program carries. A row of SCALED_INT8 is a float32 and then int8, each to be times it."""

COLUMNS, PANEL_ROWS = 1024, 16
"""Decoded at once for many vectors: four blocks of Q4_K, and as many rows as fit the second-level cache with them."""

_ROWS, _VECTORS = 4 if AVX512 else 2, 4
"""The tile whose sums stay in registers."""

_UNROLLED = 4
_SCALE_BYTES = 4
_Q4_K_COLUMNS, _Q4_K_BYTES = 256, 144
_SCRATCH = 4 * PANEL_ROWS * COLUMNS
_ZERO = np.float32(0)

_tile = multiply_tile(_ROWS, _VECTORS)
_tile_row = multiply_tile(1, _VECTORS)


def _dot_of(number: machine_code.Number) -> Any:
    """Returns the product of a row of such numbers with a vector."""
    together, one = multiply_tile(1, 1, _UNROLLED, number), machine_code.widen(number, 1)

    @njit
    def dot(row: int, x: int, count: int, scratch: int, sum: int) -> None:
        """Adds it to `sum`; `scratch` has room for one number."""
        whole = count // (_UNROLLED * LANES) * (_UNROLLED * LANES)
        together(row, 0, x, 0, whole, sum, 0)
        value, vector, total = floats_at(scratch), floats_at(x), floats_at(sum)
        for i in range(whole, count):
            one(row, i, scratch)
            total[0] += value[0] * vector[i]

    return dot


def _dots_of(number: machine_code.Number) -> Any:
    """As `_dot_of`, with `_VECTORS` vectors, `x_bytes` apart, to as many sums, `sums_bytes` apart."""
    together, one = multiply_tile(1, _VECTORS, 1, number), machine_code.widen(number, 1)

    @njit
    def dots(row: int, x: int, x_bytes: int, count: int, scratch: int, sums: int, sums_bytes: int) -> None:
        whole = count // LANES * LANES
        together(row, 0, x, x_bytes, whole, sums, sums_bytes)
        value = floats_at(scratch)
        for i in range(whole, count):
            one(row, i, scratch)
            for vector in range(_VECTORS):
                total = floats_at(sums + vector * sums_bytes)
                total[0] += value[0] * floats_at(x + vector * x_bytes)[i]

    return dots


def _decode_of(number: machine_code.Number) -> Any:
    """Returns the decoding of numbers that stand for themselves."""
    together, one = machine_code.widen(number), machine_code.widen(number, 1)

    @njit
    def decode(row: int, begin: int, end: int, out: int) -> None:
        whole = begin + (end - begin) // LANES * LANES
        for i in range(begin, whole, LANES):
            together(row, i, out + 4 * (i - begin))
        for i in range(whole, end):
            one(row, i, out + 4 * (i - begin))

    return decode


_dot_float32 = _dot_of(machine_code.FLOAT32)
_dot_bfloat16, _decode_bfloat16 = _dot_of(machine_code.BFLOAT16), _decode_of(machine_code.BFLOAT16)
_dots_bfloat16, _dots_float16 = _dots_of(machine_code.BFLOAT16), _dots_of(machine_code.FLOAT16)
_dot_float16, _decode_float16 = _dot_of(machine_code.FLOAT16), _decode_of(machine_code.FLOAT16)
_dot_int8, _decode_int8 = _dot_of(machine_code.INT8), _decode_of(machine_code.INT8)


@njit
def _decode(form: int, row: int, begin: int, end: int, out: int) -> None:
    """Writes float32 values of one row, from a multiple of COLUMNS on; of Q4_K whole blocks."""
    if form == BFLOAT16:
        _decode_bfloat16(row, begin, end, out)
    elif form == FLOAT16:
        _decode_float16(row, begin, end, out)
    elif form == SCALED_INT8:
        _decode_int8(row + _SCALE_BYTES, begin, end, out)
        scale, values = floats_at(row)[0], floats_at(out)
        for i in range(end - begin):
            values[i] *= scale
    else:
        first = row + begin // _Q4_K_COLUMNS * _Q4_K_BYTES
        for block in range((end - begin + _Q4_K_COLUMNS - 1) // _Q4_K_COLUMNS):
            decode_q4_k(first + block * _Q4_K_BYTES, out + 4 * _Q4_K_COLUMNS * block)


@njit
def product(
    form: int,
    weight: int,
    row_bytes: int,
    x: int,
    y: int,
    begin: int,
    end: int,
    columns: int,
    outputs: int,
    vectors: int,
) -> None:
    """Multiplies some rows of a weight with all vectors.

    Args:
      form: In which the weight is stored.
      weight: Where it lies: [outputs, columns].
      row_bytes: From one row to the next.
      x: Where the vectors lie: float32 [vectors, columns].
      y: Where products go: float32 [vectors, outputs].
      begin: First row.
      end: Behind the last one.
      columns, outputs, vectors: Sizes.
    """
    scratch = np.empty(PANEL_ROWS * COLUMNS + 1, np.float32)
    few = vectors < (2 * _VECTORS if form in (BFLOAT16, FLOAT16) else _VECTORS)
    out, panel_rows = floats_at(y), 1 if few else PANEL_ROWS
    for row in range(begin, end, panel_rows):
        rows, at, to = min(panel_rows, end - row), weight + row * row_bytes, y + 4 * row
        for vector in range(vectors):
            for i in range(row, row + rows):
                out[vector * outputs + i] = _ZERO
        if few:
            first = vectors // _VECTORS * _VECTORS
            if first and form == BFLOAT16:
                _dots_bfloat16(at, x, 4 * columns, columns, scratch.ctypes.data, to, 4 * outputs)
            elif first:
                _dots_float16(at, x, 4 * columns, columns, scratch.ctypes.data, to, 4 * outputs)
            for vector in range(first, vectors):
                _add_dot(form, at, x + 4 * columns * vector, columns, scratch.ctypes.data, to + 4 * outputs * vector)
        else:
            _add_panel(form, at, row_bytes, rows, x, columns, vectors, scratch.ctypes.data, to, 4 * outputs)


@njit
def _add_dot(form: int, row: int, x: int, count: int, scratch: int, sum: int) -> None:
    """Adds the product of a whole row with a vector to `sum`, which is 0."""
    if form == BFLOAT16:
        _dot_bfloat16(row, x, count, scratch, sum)
    elif form == FLOAT16:
        _dot_float16(row, x, count, scratch, sum)
    elif form == SCALED_INT8:
        _dot_int8(row + _SCALE_BYTES, x, count, scratch, sum)
        floats_at(sum)[0] *= floats_at(row)[0]
    else:
        whole = count // _Q4_K_COLUMNS
        dot_q4_k(row, x, whole, sum)
        if count > whole * _Q4_K_COLUMNS:
            decode_q4_k(row + whole * _Q4_K_BYTES, scratch)
            rest = count - whole * _Q4_K_COLUMNS
            _dot_float32(scratch, x + 4 * whole * _Q4_K_COLUMNS, rest, scratch + 4 * COLUMNS, sum)


@njit
def _add_panel(
    form: int,
    weight: int,
    row_bytes: int,
    rows: int,
    x: int,
    columns: int,
    vectors: int,
    scratch: int,
    sums: int,
    sums_bytes: int,
) -> None:
    """Adds the products of some rows with all vectors, whose sums are `sums_bytes` apart."""
    stride, x_bytes, tiled = 4 * COLUMNS, 4 * columns, vectors // _VECTORS * _VECTORS
    for begin in range(0, columns, COLUMNS):
        count = min(COLUMNS, columns - begin)
        for i in range(rows):
            _decode(form, weight + i * row_bytes, begin, begin + count, scratch + i * stride)
        for vector in range(0, tiled, _VECTORS):
            at, to = x + 4 * begin + vector * x_bytes, sums + vector * sums_bytes
            _add_tiles(scratch, rows, at, x_bytes, count, to, sums_bytes)
        for vector in range(tiled, vectors):
            at, to = x + 4 * begin + vector * x_bytes, sums + vector * sums_bytes
            for i in range(rows):
                _dot_float32(scratch + i * stride, at, count, scratch + _SCRATCH, to + 4 * i)


@njit
def _add_tiles(values: int, rows: int, x: int, x_bytes: int, count: int, sums: int, sums_bytes: int) -> None:
    stride, whole, tiled = 4 * COLUMNS, count // LANES * LANES, rows // _ROWS * _ROWS
    for i in range(0, tiled, _ROWS):
        _tile(values + i * stride, stride, x, x_bytes, whole, sums + 4 * i, sums_bytes)
    for i in range(tiled, rows):
        _tile_row(values + i * stride, stride, x, x_bytes, whole, sums + 4 * i, sums_bytes)
    for vector in range(_VECTORS if whole < count else 0):
        for i in range(rows):
            a, b = floats_at(values + i * stride), floats_at(x + vector * x_bytes)
            total = floats_at(sums + 4 * i + vector * sums_bytes)
            for column in range(whole, count):
                total[0] += a[column] * b[column]
