"""Recognises reorderings that have a name: reversed, rotated, in blocks, heads interleaved for another RoPE.

An order says where each position of the result comes from: result[i] = original[order[i]]. Orders are functions of
positions, so that a few positions can be tried before all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from apr_jax.converters.verify.diagnosis.context import divisors

Order = Callable[[np.ndarray], np.ndarray]

_FIRST = 8
_TRIED_ROTATIONS = 16
_MOST_BLOCKS = 64  # divisors of a length that are tried as block sizes


def recognise(before: np.ndarray, after: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Names the permutation that takes one sequence of labels into another.

    Args:
      before, after: Integer labels; equal labels stand for equal content. They differ somewhere.

    Returns:
      Its name, and the order; None if the labels of one are not those of the other.
    """
    size = len(before)
    moved = np.flatnonzero(before != after)
    if not np.array_equal(np.sort(before[moved]), np.sort(after[moved])):
        return None
    everywhere = np.arange(size)
    probe = moved[:: max(1, len(moved) // 64)]
    if len(moved) != 2:
        for name, order in _named(before, after, moved):
            if np.array_equal(before[order(probe)], after[probe]):
                full = order(everywhere)
                if np.array_equal(before[full], after):
                    return name, full
    found = everywhere.copy()
    found[moved[np.argsort(after[moved], kind="stable")]] = moved[np.argsort(before[moved], kind="stable")]
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]} swapped", found
    shown = ", ".join(map(str, found[:_FIRST].tolist()))
    return f"[{shown}{', ...' if size > _FIRST else ''}]", found


def _named(before: np.ndarray, after: np.ndarray, moved: np.ndarray) -> Iterator[tuple[str, Order]]:
    size = len(before)
    yield "reversed", lambda i: size - 1 - i
    for n in _rotations(before, after, moved):
        yield f"rotated by {n}", _rotated(size, n)
    sizes = divisors(size)[:_MOST_BLOCKS]
    for n in sizes:
        if (size // n) % 2 == 0:
            yield f"blocks of {n} swapped", _blocks_swapped(n)
    for n in sizes:
        if 1 < n < size:
            yield f"blocks of {n} reversed in place", _reversed_in_place(n)
            yield f"blocks of {n} in reverse order", _blocks_reversed(size, n)
            yield f"interleaved {n} ways", _interleaved(size, n)


def _rotated(size: int, n: int) -> Order:
    return lambda i: (i - n) % size


def _blocks_swapped(n: int) -> Order:
    return lambda i: i + n - 2 * n * (i // n % 2)


def _reversed_in_place(n: int) -> Order:
    return lambda i: i + n - 1 - 2 * (i % n)


def _blocks_reversed(size: int, n: int) -> Order:
    return lambda i: (size // n - 1 - i // n) * n + i % n


def _interleaved(size: int, ways: int) -> Order:
    return lambda i: i % ways * (size // ways) + i // ways


def _rotations(before: np.ndarray, after: np.ndarray, moved: np.ndarray) -> Iterator[int]:
    """Yields the rotations that fit the label that is rarest among some that moved."""
    size = len(before)
    places = [(np.flatnonzero(before == after[i]), int(i)) for i in moved[:: max(1, len(moved) // 4)][:4]]
    found, position = min(places, key=lambda place: len(place[0]))
    shifts = sorted({(position - int(origin)) % size for origin in found[:_TRIED_ROTATIONS]} - {0})
    for shift in shifts:
        yield shift if 2 * shift <= size else shift - size


def adjacent_from_halves(dim: int) -> np.ndarray:
    """Returns the order, within a head, of rows kept in split halves when they are wanted in adjacent pairs."""
    return np.arange(dim).reshape(2, dim // 2).T.reshape(-1)


def halves_from_adjacent(dim: int) -> np.ndarray:
    """Returns the inverse, which HuggingFace's conversion of LLaMA applies to Q and K."""
    return np.arange(dim).reshape(dim // 2, 2).T.reshape(-1)


def within_blocks(order: np.ndarray) -> Order:
    """Applies an order inside each block of its length."""
    dim = len(order)
    return lambda i: i - i % dim + order[i % dim]


def labels(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns two arrays of hashes into small labels that are equal where the hashes are."""
    _, both = np.unique(np.concatenate((before, after)), return_inverse=True)
    return both[: len(before)], both[len(before) :]


def line_hashes(matrix: np.ndarray, axis: int) -> np.ndarray:
    """Returns a 64-bit hash of each row (axis 0) or column (axis 1): a sum of bits times odd random numbers."""
    if axis == 0 and matrix.flags.c_contiguous and matrix.shape[1] * matrix.itemsize % 8 == 0:
        matrix = matrix.view("<u8")
    rows, columns = matrix.shape
    random = np.random.Generator(np.random.PCG64(columns if axis == 0 else rows))
    factors = random.integers(0, 1 << 63, size=(columns if axis == 0 else rows,), dtype=np.uint64) * 2 + 1
    step = max(1, (1 << 18) // max(1, columns))
    out = np.zeros(rows if axis == 0 else columns, np.uint64)
    for begin in range(0, rows, step):
        part = matrix[begin : begin + step].astype(np.uint64)
        if axis == 0:
            out[begin : begin + step] = _mixed(part) @ factors
        else:
            out += factors[begin : begin + step] @ _mixed(part)
    return out


def _mixed(bits: np.ndarray) -> np.ndarray:
    # A plain sum of products would not notice two lines that exchange multiples of each other.
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits ^= bits >> np.uint64(29)
    return bits
