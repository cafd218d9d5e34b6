"""The kernels as a custom call of XLA's: its C interface as numba sees it, and one call's rows on several threads.

The structures are those of `xla/ffi/api/c_api.h`, in words of 8 bytes; what is read here has been the same from version
0.1 of that interface (2024) to 0.5 (jaxlib 0.12). XLA asks a handler for its version when it is registered, and refuses
one that it no longer serves.

A call's rows are dealt in pieces to whoever asks for the next one: the calling thread, and helpers that XLA's own pool
runs, as many as it has threads. None is waited for until it has taken a piece: a pool that is busy only makes a call
slower. Whoever leaves last frees the call's state.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from typing import Any

import jax
import llvmlite.binding
from numba import cfunc, njit, types

from apr_jax.cpu import machine_code, rows
from apr_jax.cpu.machine_code import address_of, call, fetch_add, words_at

TARGET = "apr_jax.narrow_product"
"""What programs call the kernels by; they stay in JAX's compilation cache under this name."""

_HELPER = "apr_jax_help"

# XLA_FFI_CallFrame, XLA_FFI_Args and so on: which word has what.
_EXTENSION, _API, _CONTEXT, _OPERANDS, _RESULTS, _ATTRIBUTES = 1, 2, 3, 9, 14, 20
_BUFFER_DATA, _BUFFER_DIMENSIONS = 3, 5
_SCALAR_VALUE = 1
# XLA_FFI_Metadata_Extension and XLA_FFI_Metadata: the version, two int32 in one word, the minor one above.
_METADATA, _VERSION, _VERSION_0_1 = 3, 3, 1 << 32
# XLA_FFI_Api: the functions.
_ERROR_DESTROY, _SCHEDULE, _THREADS = 8, 17, 18

# The state of a call.
_STAYING, _NEXT, _DONE, _PIECES, _PIECE_ROWS, _FORM, _WEIGHT, _ROW_BYTES, _X, _Y, _OUTPUTS, _COLUMNS, _VECTORS = range(
    13
)
_STATE_BYTES = 8 * 13
_MOST_BYTES = 1 << 18  # of a piece: it stays in the second-level cache for all vectors
_PIECES_A_THREAD = 8


@njit
def _work(state: int) -> None:
    """Takes pieces until there are no more."""
    s = words_at(state)
    while True:
        piece = fetch_add(state + 8 * _NEXT, 1)
        if piece >= s[_PIECES]:
            return
        begin = piece * s[_PIECE_ROWS]
        end = min(begin + s[_PIECE_ROWS], s[_OUTPUTS])
        rows.product(
            s[_FORM], s[_WEIGHT], s[_ROW_BYTES], s[_X], s[_Y], begin, end, s[_COLUMNS], s[_OUTPUTS], s[_VECTORS]
        )
        fetch_add(state + 8 * _DONE, 1)


@njit
def _leave(state: int) -> None:
    if fetch_add(state + 8 * _STAYING, -1) == 1:
        call(address_of("free"), state)


@njit
def _succeeds(api: int, function: int, arguments: int) -> bool:
    """Calls a function of XLA's and forgets its error, if there is one."""
    error = call(words_at(api)[function], arguments)
    if error:
        a = words_at(arguments)
        a[0], a[1], a[2] = 24, 0, error
        call(words_at(api)[_ERROR_DESTROY], arguments)
    return error == 0


@njit
def _threads(api: int, context: int) -> int:
    """How many threads XLA's pool has; 1 if there is no pool."""
    arguments = call(address_of("malloc"), 40)
    a = words_at(arguments)
    a[0], a[1], a[2], a[3], a[4] = 32, 0, context, arguments + 32, 1
    found = a[4] if _succeeds(api, _THREADS, arguments) else 1
    call(address_of("free"), arguments)
    return max(found, 1)


@njit
def _ask_for_help(api: int, context: int, state: int, helpers: int) -> None:
    arguments = call(address_of("malloc"), 40)
    a = words_at(arguments)
    for _ in range(helpers):
        a[0], a[1], a[2], a[3], a[4] = 40, 0, context, address_of(_HELPER), state
        if not _succeeds(api, _SCHEDULE, arguments):
            _leave(state)
    call(address_of("free"), arguments)


@njit
def _fill(state: int, frame: int, threads: int) -> None:
    f, s = words_at(frame), words_at(state)
    weight, x, y = _operand(f, 0), _operand(f, 1), words_at(words_at(f[_RESULTS])[0])
    weight_shape, x_shape = words_at(weight[_BUFFER_DIMENSIONS]), words_at(x[_BUFFER_DIMENSIONS])
    s[_FORM] = words_at(words_at(words_at(f[_ATTRIBUTES])[0])[_SCALAR_VALUE])[0]
    s[_WEIGHT], s[_X], s[_Y] = weight[_BUFFER_DATA], x[_BUFFER_DATA], y[_BUFFER_DATA]
    s[_OUTPUTS], s[_VECTORS], s[_COLUMNS] = weight_shape[0], x_shape[0], x_shape[1]
    s[_ROW_BYTES] = weight_shape[1] * (2 if s[_FORM] == rows.BFLOAT16 or s[_FORM] == rows.FLOAT16 else 1)
    even = s[_OUTPUTS] // (threads * _PIECES_A_THREAD)
    rows_of_piece = min(even, _MOST_BYTES // max(1, s[_ROW_BYTES]))
    s[_PIECE_ROWS] = max(1, rows_of_piece // rows.PANEL_ROWS) * rows.PANEL_ROWS
    s[_PIECES] = (s[_OUTPUTS] + s[_PIECE_ROWS] - 1) // s[_PIECE_ROWS]
    s[_NEXT], s[_DONE] = 0, 0
    s[_STAYING] = max(1, min(threads, s[_PIECES]))


@njit
def _operand(frame: Any, number: int) -> Any:
    return words_at(words_at(frame[_OPERANDS])[number])


@njit
def _help(state: int) -> int:
    """XLA_FFI_Task."""
    _work(state)
    _leave(state)
    return 0


@njit
def _handle(frame: int) -> int:
    """XLA_FFI_Handler: (weight [outputs, ...], x [vectors, columns]) -> [vectors, outputs]."""
    f = words_at(frame)
    if f[_EXTENSION]:
        words_at(words_at(f[_EXTENSION])[_METADATA])[_VERSION] = _VERSION_0_1
        return 0
    state = call(address_of("malloc"), _STATE_BYTES)
    _fill(state, frame, _threads(f[_API], f[_CONTEXT]))
    s = words_at(state)
    _ask_for_help(f[_API], f[_CONTEXT], state, s[_STAYING] - 1)
    _work(state)
    while fetch_add(state + 8 * _DONE, 0) < s[_PIECES]:
        call(address_of("sched_yield"), 0)  # where others use the machine, a helper may be waiting for this processor
    _leave(state)
    return 0


@functools.cache
def register() -> tuple[Any, Any]:
    """Compiles the kernels for this processor, or takes what numba keeps on disk, and tells XLA of them.

    Returns:
      The compiled functions, which live as long as somebody holds them.
    """
    # numba would take what it keeps for right while this file is the same: the others count as well.
    sources = "".join(inspect.getsource(module) for module in (machine_code, rows))
    stamp = zlib.crc32(sources.encode())

    def help(state: int) -> int:
        return _help(state) if stamp else 0

    def handle(frame: int) -> int:
        return _handle(frame) if stamp else 0

    compiled = cfunc(types.int64(types.int64), cache=True)
    helper = compiled(help)
    llvmlite.binding.add_symbol(_HELPER, helper.address)  # before the handler is linked, which asks for it
    handler = compiled(handle)
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler.ctypes), platform="cpu")
    return helper, handler
