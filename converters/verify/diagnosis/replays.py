"""Quantises the original again, as programs with one way to do it would, and looks whether that is the suspect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from apr_jax.converters.formats import codecs, dtypes
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.pair import ACCEPTED, Bits, Pair

# float32 [blocks, 32] -> the values that are left of them.
BlockRound = Callable[[np.ndarray], np.ndarray]

_GROUP = 256
_PROBED_GROUPS = 12
# Values that are looked at in a large tensor.
_MEASURED = 1 << 20
# Elements that are quantised again in a large tensor, and at once.
_REPLAYED = 1 << 17
_UNITS_ELEMENTS = 1 << 14


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


def replayed(pair: Pair) -> Found | None:
    """Returns the type that quantising the original gives these values with."""
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
                return Found("quantised", parameters, explained, evidence)
    return None


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


def _equal(pair: Pair, expected: Bits, part: slice) -> np.ndarray:
    """Returns where the suspect is as expected; a zero has no sign in a code."""
    sign = expected.dtype.type(1 << (8 * expected.itemsize - 1))
    return pair.equal(expected, part) | (((expected | pair.y[part]) & ~sign) == 0)


def _probed(pair: Pair, replay: _Replay, rounding: str) -> float:
    """Returns the share of elements that are as expected in the first of some probed groups where they are too few."""
    unit = replay.unit
    step = max(1, pair.sample.size // _PROBED_GROUPS)
    share = 1.0
    for group in dict.fromkeys((pair.sample[::step] // unit).tolist()):
        part = slice(group * unit, min(pair.size, (group + 1) * unit))
        equal = _equal(pair, _expected(pair, replay, rounding, part), part)
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
        equal = _equal(pair, _expected(pair, replay, rounding, part), part)
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


def stored(pair: Pair) -> Found | None:
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


def _spread(pair: Pair, unit: int, most: int | None = None) -> list[slice]:
    """Returns slices of one unit (a row), spread over the tensor, up to a number of them or of elements."""
    count = -(-pair.size // unit)
    wanted = min(count, most or max(1, _MEASURED // unit))
    starts = np.unique(np.linspace(0, count - 1, wanted).astype(np.int64)) * unit
    return [slice(int(start), min(pair.size, int(start) + unit)) for start in starts]
