"""Finds values that went through a quantised type: by quantising the original again, or by their lattice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from apr_jax.converters.formats import casts, codecs, dtypes
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.pair import ACCEPTED, Bits, Pair

# float32 [blocks, 32] -> the values that are left of them.
BlockRound = Callable[[np.ndarray], np.ndarray]

_GROUP = 256
_PROBED_GROUPS = 12
# Values whose lattice is measured in a large tensor.
_MEASURED = 1 << 20
_BLOCKS_AT_ONCE = 256
# Elements that are quantised again in a large tensor, and at once.
_REPLAYED = 1 << 17
_UNITS_ELEMENTS = 1 << 14


def quantised(pair: Pair) -> Iterator[Found]:
    """Values that went through a quantised type, or are stored in one."""
    if pair.original.dtype.name not in casts.FLOATS or not pair.suspect.dtype.is_float or pair.size < 8:
        return
    # Values that were quantised before come out of quantising them again as they are.
    if pair.a.dtype.is_block and pair.b.dtype in (pair.a.dtype, pair.suspect.dtype):
        return
    # Hardly an element stays what it was.
    if pair.differing < pair.size // 4:
        return
    found = next(_replayed(pair), None)
    if found is None and pair.b.dtype.is_block:
        found = _stored(pair)
    if found is None and not pair.b.dtype.is_block:
        found = _on_lattice(pair)
    if found is not None:
        yield found


# --- quantising again


@dataclasses.dataclass(frozen=True)
class _Replay:
    """One way to quantise: which type, how blocks lie, and what the values become.

    Attributes:
      columns: Length of the rows that are filled up to whole blocks; None where blocks run on across rows.
      padding_kept: Whether the values that fill rows up were taken for values of the tensor.
    """

    name: str
    rounded: Callable[[np.ndarray], np.ndarray]
    columns: int | None = None
    padding_kept: bool = False

    def values(self, pair: Pair, part: slice) -> np.ndarray:
        """Returns the float32 values at a slice; it starts at a row or at a multiple of 256."""
        if self.columns is None:
            return self.rounded(_original(pair, part))
        padded = self.columns + -self.columns % _GROUP
        width = padded if self.padding_kept else self.columns
        rows = slice(part.start // width * self.columns, -(-part.stop // width) * self.columns)
        blocks = codecs.pad_rows(_original(pair, rows), self.columns, _GROUP)
        values = self.rounded(blocks).reshape(-1, padded)[:, :width].reshape(-1)
        begin = part.start - part.start // width * width
        return values[begin : begin + part.stop - part.start]

    @property
    def unit(self) -> int:
        return _GROUP if self.columns is None or self.padding_kept else self.columns


def _original(pair: Pair, part: slice) -> np.ndarray:
    return pairs.values_of(pair.original.bits[part], pair.original.dtype.name).astype("<f4", copy=False)


def _replayed(pair: Pair) -> Iterator[Found]:
    wanted = pair.b.dtype.name if pair.b.dtype.is_block else None
    for replay in _replays(pair):
        if wanted not in (None, replay.name):
            continue
        for rounding in ("nearest-even", "truncated"):
            share = _probed(pair, replay, rounding)
            # If only the last rounding were another one, half of the values would be right.
            if share < 0.25 or (pair.type == "f32" and share < ACCEPTED):
                break
            if share < ACCEPTED:
                continue
            explained, measured = _explained(pair, replay, rounding)
            if explained:
                parameters: dict[str, Any] = {"type": replay.name}
                if replay.padding_kept:
                    parameters["padding"] = "read as values"
                if rounding != "nearest-even" and pair.type != "f32":
                    parameters["rounding"] = rounding
                evidence = f"quantising the original to {replay.name} gives these values"
                if measured < 1:
                    evidence += f" (tried on {measured:.0%} of the elements)"
                yield Found("quantised", parameters, explained, evidence)
                return


def _replays(pair: Pair) -> Iterator[_Replay]:
    columns = pair.b.shape[-1] if len(pair.b.shape) > 1 else pair.size
    levels = _levels(pair)
    for name in ("apr_q4", "q4_k") if levels <= 16 else ():
        codec = dtypes.TYPES[name].codec
        assert isinstance(codec, codecs.Encoder)
        by_row = columns if name == "q4_k" and columns % _GROUP else None
        yield _Replay(name, _through(codec, b""), by_row)
        if by_row is not None and pair.shape[0] > 1:
            yield _Replay(name, _through(codec, b""), by_row, padding_kept=True)
    for name, rounded in _REFERENCE.items():
        if levels <= 16 or "4" not in name:
            yield _Replay(name, _in_blocks(rounded))
    if _few_magnitudes(pair):
        codec = dtypes.TYPES["apr_q8"].codec
        assert isinstance(codec, codecs.Encoder)
        yield _Replay("apr_q8", _through(codec, codec.prefix(_largest(pair))))


def _levels(pair: Pair) -> int:
    """Returns the fewest values in some blocks of 32; 0 where blocks may run on across rows."""
    columns = pair.b.shape[-1] if pair.b.shape else 1
    if columns % 32:
        return 0
    blocks = [slice(row.start, row.start + 32) for row in _spread(pair, columns, _PROBED_GROUPS)]
    return min(len(set(pair.y[block].tolist())) for block in blocks)


def _through(codec: codecs.Encoder, prefix: bytes) -> Callable[[np.ndarray], np.ndarray]:
    def rounded(values: np.ndarray) -> np.ndarray:
        out = np.empty(values.size, np.float32)
        codec.decode(prefix + codec.encode(values, prefix), out)
        return out

    return rounded


def _few_magnitudes(pair: Pair) -> bool:
    """Whether the suspect has so few magnitudes that one scale for the whole tensor is possible."""
    values = np.abs(pairs.values_of(pair.y[pair.sample], pair.type))
    return len(np.unique(values)) <= 128


def _largest(pair: Pair) -> np.float32:
    return np.float32(max(float(np.abs(_original(pair, part)).max()) for part in pair.chunks(pair.size, 1)))


def _expected(pair: Pair, replay: _Replay, rounding: str, part: slice) -> Bits:
    with np.errstate(all="ignore"):
        return pairs.bits_of(replay.values(pair, part), pair.type, rounding)


def _probed(pair: Pair, replay: _Replay, rounding: str) -> float:
    """Returns the share of elements that are as expected in the first of some probed groups where they are too few."""
    unit = replay.unit
    step = max(1, pair.sample.size // _PROBED_GROUPS)
    share = 1.0
    for group in dict.fromkeys((pair.sample[::step] // unit).tolist()):
        part = slice(group * unit, min(pair.size, (group + 1) * unit))
        equal = pair.equal(_expected(pair, replay, rounding, part), part)
        share = min(share, np.count_nonzero(equal) / equal.size)
        if share < ACCEPTED:
            break
    return share


def _explained(pair: Pair, replay: _Replay, rounding: str) -> tuple[float, float]:
    """Returns the share of the differing elements that are as expected, and of how many elements it was measured.

    Quantising costs ten times as much as comparing: of large tensors a part has to do, spread evenly.
    """
    unit = replay.unit * max(1, _UNITS_ELEMENTS // replay.unit)
    parts = _spread(pair, unit, max(1, _REPLAYED // unit))
    hits = total = equals = 0
    for part in parts:
        equal = pair.equal(_expected(pair, replay, rounding, part), part)
        differs = pair.differs[part]
        equals += int(np.count_nonzero(equal))
        hits += int(np.count_nonzero(equal & differs))
        total += int(np.count_nonzero(differs))
    size = sum(part.stop - part.start for part in parts)
    return (hits / total if total and equals >= ACCEPTED * size else 0.0), size / pair.size


# GGML's own quantisers of 32 values (ggml-quants.c, quantize_row_*_ref): plain float32 formulas without a search.


def _in_blocks(rounded: BlockRound) -> Callable[[np.ndarray], np.ndarray]:
    def flat(values: np.ndarray) -> np.ndarray:
        blocks = np.pad(values, (0, -values.size % 32)).reshape(-1, 32)
        with np.errstate(all="ignore"):
            return rounded(blocks).reshape(-1)[: values.size]

    return flat


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2").astype("<f4")


def _inverse(step: np.ndarray) -> np.ndarray:
    return np.where(step != 0, np.float32(1) / step, np.float32(0))


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(step)
    return np.trunc(scaled + np.copysign(np.float32(0.5), scaled)) * _half(step)


def _symmetric(half: int) -> BlockRound:
    def rounded(blocks: np.ndarray) -> np.ndarray:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
        step = largest / np.float32(-half)
        q = np.minimum(2 * half - 1, np.trunc(blocks * _inverse(step) + np.float32(half + 0.5)))
        return ((q - half) * _half(step)).astype("<f4")

    return rounded


def _affine(levels: int) -> BlockRound:
    def rounded(blocks: np.ndarray) -> np.ndarray:
        low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
        step = (high - low) / np.float32(levels)
        q = np.minimum(levels, np.trunc((blocks - low) * _inverse(step) + np.float32(0.5)))
        return (q * _half(step) + _half(low)).astype("<f4")

    return rounded


_REFERENCE: dict[str, BlockRound] = {
    "q8_0": _q8_0,
    "q4_0": _symmetric(8),
    "q4_1": _affine(15),
    "q5_0": _symmetric(16),
    "q5_1": _affine(31),
}


# --- stored in a quantised type by somebody else's quantiser

# Steps from zero to the largest magnitude, or half of those from the smallest to the largest value.
_STEPS = {"8": 127, "6": 31, "5": 15, "4": 7, "3": 3, "2": 1}


def _stored(pair: Pair) -> Found | None:
    """Decoded values that stay as near as the steps of the type allow."""
    digits = [character for character in pair.b.dtype.name if character in _STEPS]
    if not digits:
        return None
    near = total = 0
    for part in _spread(pair, _GROUP):
        before, after = _original(pair, part), pairs.values_of(pair.y[part], pair.type)
        largest = np.abs(before).max()
        near += int(np.count_nonzero(np.abs(before - after) <= 1.1 * largest / _STEPS[digits[0]]))
        total += before.size
    if near < ACCEPTED * total:
        return None
    evidence = f"the values lie within the steps of {pair.b.dtype.name}, by another quantiser than those tried"
    return Found("quantised", {"type": pair.b.dtype.name}, near / total, evidence)


# --- lattices


@dataclasses.dataclass(frozen=True)
class _Lattice:
    """Values that a block of a type can have: multiples of a step, from zero or from the smallest value."""

    name: str
    size: int
    steps: int
    affine: bool


# The narrower first: what lies on it lies on the wider ones too.
_LATTICES = (
    _Lattice("q2_k", 16, 3, True),
    _Lattice("q3_k", 16, 4, False),
    _Lattice("q4_0", 32, 8, False),
    _Lattice("q4_k", 32, 15, True),
    _Lattice("q5_0", 32, 16, False),
    _Lattice("q5_k", 32, 31, True),
    _Lattice("q6_k", 16, 32, False),
)


def _on_lattice(pair: Pair) -> Found | None:
    columns = pair.b.shape[-1] if pair.b.shape else 1
    levels = _levels(pair)
    for lattice in _LATTICES:
        if columns < lattice.size or (lattice.steps <= 15 and lattice.size == 32 and levels > 16):
            continue
        # A block or two from the beginning of a few rows.
        parts = [slice(row.start, min(row.stop, row.start + 32)) for row in _spread(pair, columns, _PROBED_GROUPS)]
        if _fitting(pair, lattice, parts) < ACCEPTED:
            continue
        explained = _fitting(pair, lattice, _spread(pair, columns))
        if explained >= ACCEPTED:
            evidence = (
                f"in each block of {lattice.size} the values are at most {lattice.steps} equal steps "
                f"from {'the smallest' if lattice.affine else 'zero'}, near the original, as {lattice.name} leaves them"
            )
            return Found("quantised", {"type": lattice.name}, explained, evidence)
    return None


def _spread(pair: Pair, unit: int, most: int | None = None) -> list[slice]:
    """Returns slices of one unit (a row), spread over the tensor, up to a number of them or of elements."""
    count = -(-pair.size // unit)
    wanted = min(count, most or max(1, _MEASURED // unit))
    starts = np.unique(np.linspace(0, count - 1, wanted).astype(np.int64)) * unit
    return [slice(int(start), min(pair.size, int(start) + unit)) for start in starts]


def _fitting(pair: Pair, lattice: _Lattice, parts: list[slice]) -> float:
    """Returns the share of the differing elements that lie on the lattice, within a step of the original."""
    hits = total = 0
    for first in range(0, len(parts), 64):
        before, after = (
            _blocks(bits, name, lattice.size, parts[first : first + 64])
            for bits, name in ((pair.original.bits, pair.original.dtype.name), (pair.y, pair.type))
        )
        steps = _steps(after, lattice, pair.type)
        # A block of one magnitude lies on any lattice and says nothing.
        told = (before != after) & (np.abs(after).min(1) != np.abs(after).max(1))[:, None]
        # With steps as large as the values anything would be near.
        sound = (steps > 0) & (steps <= np.abs(before).max(1))
        near = sound[:, None] & (np.abs(before - after) <= 1.05 * steps[:, None])
        hits += int(np.count_nonzero(near & told))
        total += int(np.count_nonzero(told))
    return hits / total if total >= 2 * lattice.size else 0.0


def _blocks(bits: Bits, name: str, size: int, parts: list[slice]) -> np.ndarray:
    rows = []
    for part in parts:
        whole = (part.stop - part.start) // size * size
        rows.append(bits[part.start : part.start + whole])
    return pairs.values_of(np.concatenate(rows), name).astype("<f8").reshape(-1, size)


def _steps(blocks: np.ndarray, lattice: _Lattice, name: str) -> np.ndarray:
    """Returns the step of each block's lattice, 0 where there is none."""
    start = blocks.min(1, keepdims=True) if lattice.affine else np.zeros((len(blocks), 1))
    spans = blocks.max(1) - start[:, 0] if lattice.affine else np.abs(blocks).max(1)
    # Each value was rounded to the type, and so was the one that the step is taken from.
    error = 2 * pairs.half_ulp(np.abs(blocks).max(1), name) + spans * 1e-6
    found = np.zeros(len(blocks))
    counts = np.arange(1, lattice.steps + 1)
    for begin in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(begin, begin + _BLOCKS_AT_ONCE)
        steps = spans[part, None] / counts  # [blocks, numbers of steps]
        # Where rounding is nearly as coarse as the step, anything would fit.
        slack = error[part, None] / steps
        q = (blocks[part] - start[part])[:, None] / steps[..., None]
        fits = (np.abs(q - np.rint(q)) <= slack[..., None]).all(2) & (slack < 0.2)
        first = fits.argmax(1)[:, None]
        chosen = np.take_along_axis(np.where(fits, steps, 0), first, 1)[:, 0]
        found[part] = np.where(spans[part] > 0, chosen, 0)
    return found
