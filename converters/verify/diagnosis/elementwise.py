"""Finds causes that change each element by itself: misread, cast, swapped bytes, a factor, a constant added."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.formats import casts
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import CAUSES, Found
from apr_jax.converters.verify.diagnosis.pair import Bits, Pair, Select

_ROUNDINGS = ("nearest-even", "truncated", "half-away")
_EIGHT_BITS = ("f8_e4m3", "f8_e5m2")
_THROUGH = ("f16", "bf16", *_EIGHT_BITS, "f32")
_MISREADINGS = {1: ("i8", "u8", "f8_e4m3", "f8_e5m2"), 2: ("f16", "bf16", "i16"), 4: ("f32", "i32"), 8: ("f64", "i64")}
# Elements that narrow the range of a factor or a constant down.
_WIDE_SAMPLE = 1 << 17


def same_bytes(pair: Pair) -> Found | None:
    """A tag that changed over a payload that did not: another type, or another shape."""
    if pair.original.decoded or pair.suspect.decoded or pair.a.nbytes != pair.b.nbytes:
        return None
    if pair.a.dtype.name != pair.b.dtype.name:
        if np.array_equal(pair.original.bits.view("u1"), pair.suspect.bits.view("u1")):
            parameters = {"from": pair.a.dtype.name, "to": pair.b.dtype.name, "values_converted": False}
            return Found("relabelled-dtype", parameters, 1.0, "every byte of the payload is equal, the type differs")
        return None
    if pair.same_count and pair.a.shape != pair.b.shape and not pair.differing:
        swapped = tuple(sorted(pair.a.shape)) == tuple(sorted(pair.b.shape))
        parameters = {"data": "unchanged", "shape": "swapped" if swapped else "changed"}
        evidence = f"every byte is equal, the shape is {list(pair.b.shape)} in place of {list(pair.a.shape)}"
        return Found("transposed", parameters, 1.0, evidence)
    return None


def casts_of(pair: Pair) -> Iterator[Found]:
    """Casts, exact and rounding, in one step or through a narrower type."""
    source, target = pair.original.dtype.name, pair.type
    if not pair.differing:
        if source == target:
            return
        back = all(
            pairs.cast_bits(pair.y[part], target, source) is not None
            and _same(pairs.cast_bits(pair.y[part], target, source), pair.original.bits[part], source)
            for part in pair.chunks(pair.size, 1)
        )
        if back:
            yield Found("exact-cast", {"from": source, "to": target}, 1.0, "every value is equal")
        else:
            nearest = {"from": source, "to": target, "rounding": "nearest-even"}
            yield Found("rounded-cast", nearest, 1.0, "every element is the nearest value of the narrower type")
        return
    if source not in casts.FLOATS or not pair.suspect.dtype.is_float:
        return
    # Into 8 bits a narrow range collapses to one value, as it does when somebody resets it.
    varied = len(np.unique(pair.y[pair.sample])) > 2
    representable = functools.cache(lambda name: _representable(pair, name))
    for steps, rounding, name in _chains(source, target):
        if (name in _EIGHT_BITS and not varied) or (name and not representable(name)):
            continue
        predict = _chain(pair, steps, rounding)
        if pair.plausible(predict):
            explained = pair.explained(predict)
            if explained:
                parameters: dict[str, Any] = {"from": source, "to": target, "rounding": rounding}
                if name:
                    parameters["through"] = name
                yield Found("rounded-cast", parameters, explained, "the cast was repeated and gives these bits")
                return


def _representable(pair: Pair, name: str) -> bool:
    """Whether the suspect's values are what is left of values of a narrower type; of some of the sample."""
    some = pair.y[pair.sample[:: max(1, pair.sample.size // 16)]]
    back = pairs.cast_bits(pairs.cast_bits(some, pair.type, name), name, pair.type)
    return bool(np.count_nonzero(back == some) >= 0.8 * some.size)


def _chains(source: str, target: str) -> Iterator[tuple[tuple[str, ...], str, str | None]]:
    if source != target:
        for rounding in _ROUNDINGS[1:]:
            yield (source, target), rounding, None
    for through in _THROUGH:
        if through in (source, target):
            continue
        for rounding in _ROUNDINGS:
            yield (source, through, target), rounding, through


def _chain(pair: Pair, steps: tuple[str, ...], rounding: str) -> Callable[[Select], Bits]:
    def predict(select: Select) -> Bits:
        bits = pair.original.bits[select]
        for before, after in itertools.pairwise(steps):
            bits = pairs.cast_bits(bits, before, after, rounding)
        return bits

    return predict


def _same(left: Bits, right: Bits, name: str) -> bool:
    equal = left == right
    return bool(equal.all()) or bool((equal | (pairs.is_nan(left, name) & pairs.is_nan(right, name))).all())


def mantissas(pair: Pair) -> Iterator[Found]:
    """Low bits of the fraction cut off or rounded away, the exponent's range kept."""
    fraction = _FRACTIONS.get(pair.type)
    if fraction is None or not pair.sample.size:
        return
    # What no sampled element has: the lowest bits of their union are zero. Subnormal ones have their own lowest bit.
    some = pair.y[pair.sample]
    normal = some[
        np.abs(pairs.values_of(some, pair.type)) >= ml_dtypes.finfo(pairs.numpy_type(pair.type)).smallest_normal
    ]
    union = int(np.bitwise_or.reduce(normal)) if normal.size else 0
    kept = fraction - min(fraction, (union & -union).bit_length() - 1 if union else 0)
    if not 0 < kept < fraction:
        return
    sources = {pair.original.dtype.name: pair.original.bits, pair.type: pair.x}
    for source, bits in sources.items():
        dropped = _FRACTIONS.get(source, 0) - kept
        if dropped < 1:
            continue
        for rounding in ("truncated", "nearest-even", "half-away"):

            def predict(
                select: Select, bits: Bits = bits, source: str = source, left: tuple[int, str] = (dropped, rounding)
            ) -> Bits:
                return pairs.cast_bits(_without(bits[select], *left), source, pair.type)

            if pair.plausible(predict) and (explained := pair.explained(predict)):
                parameters = {"bits": kept, "rounding": rounding}
                yield Found(
                    "mantissa-cut", parameters, explained, f"{kept} of {fraction} bits of the fraction are left"
                )
                return


_FRACTIONS = {"bf16": 7, "f16": 10, "f32": 23}


def _without(bits: Bits, dropped: int, rounding: str) -> Bits:
    """Cuts or rounds the lowest bits away; a carry goes into the exponent, as it should."""
    unit = bits.dtype.type
    if rounding == "nearest-even":
        bits = bits + unit((1 << (dropped - 1)) - 1) + (bits >> unit(dropped) & unit(1))
    elif rounding == "half-away":
        bits = bits + unit(1 << (dropped - 1))
    return bits & unit(~((1 << dropped) - 1) & ((1 << 8 * bits.itemsize) - 1))


def byte_swapped(pair: Pair) -> Iterator[Found]:
    """The bytes of every element in the other order; perhaps cast afterwards."""
    if pair.original.decoded or pair.original.bits.itemsize == 1:
        return

    def predict(select: Select) -> Bits:
        return pairs.cast_bits(pair.original.bits[select].byteswap(), pair.original.dtype.name, pair.type)

    if pair.plausible(predict) and (explained := pair.explained(predict)):
        parameters = {"element_bytes": int(pair.original.bits.itemsize)}
        yield Found("byte-swapped", parameters, explained, "the bytes of every element are in the other order")


def misread(pair: Pair) -> Iterator[Found]:
    """Payload read as another type of the same width, the wrong values then converted to the suspect's type."""
    if pair.original.decoded or not pair.suspect.dtype.is_float:
        return
    source = pair.original.dtype.name
    for wrong in _MISREADINGS.get(int(pair.original.bits.itemsize), ()):
        for rounding in _ROUNDINGS[:2]:
            if wrong == source:
                continue

            def predict(select: Select, wrong: str = wrong, rounding: str = rounding) -> Bits:
                bits = pair.original.bits[select]
                return pairs.bits_of(pairs.values_of(bits, wrong), pair.type, rounding)

            if pair.plausible(predict) and (explained := pair.explained(predict)):
                found = _misread(source, wrong, pair.type, explained)
                # Misread values may have become too small for their type: then zeros are what there is to say.
                zeros = not pairs.values_of(pair.y[pair.sample], pair.type).any()
                yield dataclasses.replace(found, rank=CAUSES.index("zeroed") + 0.5) if zeros else found
                return


def misread_width(pair: Pair) -> Iterator[Found]:
    """As `misread`, for types of another width: the suspect has more or fewer elements than the original."""
    if pair.original.decoded or not pair.suspect.dtype.is_float or pair.a.nbytes % max(1, pair.size):
        return
    width = pair.a.nbytes // max(1, pair.size)
    source = pair.original.dtype.name
    for wrong in _MISREADINGS.get(width, ()):
        view = pair.original.bits.view(f"<u{width}")
        for rounding in _ROUNDINGS[:2]:
            hits = 0
            for part in pair.chunks(pair.size, 1):
                expected = pairs.bits_of(pairs.values_of(view[part], wrong), pair.type, rounding)
                hits += int(np.count_nonzero(pair.equal(expected, part)))
                if part.stop - hits > (1 - pairs.ACCEPTED) * pair.size:
                    break
            else:
                yield _misread(source, wrong, pair.type, hits / pair.size)
                return


def _misread(source: str, wrong: str, target: str, explained: float) -> Found:
    parameters = {"from": source, "to": wrong, "values_converted": True, "stored": target}
    evidence = f"{source} bytes read as {wrong} give these values, which were then stored as {target}"
    return Found("relabelled-dtype", parameters, explained, evidence)


# --- a factor, a constant


def scaled(pair: Pair, where: Callable[[Select], np.ndarray] | None = None) -> Iterator[Found]:
    """One factor for all elements, or for those of a part (`where`), rounded to the suspect's type."""
    yield from _fitted(pair, "scaled", "factor", _factors, np.multiply, where)


def moved(pair: Pair) -> Iterator[Found]:
    """One constant added to all elements, rounded to the suspect's type."""
    yield from _fitted(pair, "offset", "constant", _constants, np.add)


def _fitted(
    pair: Pair,
    cause: str,
    parameter: str,
    ranges: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    apply: np.ufunc,
    where: Callable[[Select], np.ndarray] | None = None,
) -> Iterator[Found]:
    if not (pair.original.dtype.is_float and pair.suspect.dtype.is_float):
        return
    # A step up in two elements of hundreds is no constant: all others would have to be too coarse to show it.
    if where is None and pair.differing < min(8, pair.size // 2):
        return
    interval = _interval(pair, pair.sample, ranges)
    if interval is None:
        return
    wide = "<f8" if "f64" in (pair.original.dtype.name, pair.type) else "<f4"
    for attempt in range(2):
        if attempt:
            # The sample left too much room: look at more elements, then at the number in the middle.
            more = _spread(pair)
            interval = _interval(pair, more if where is None else more[where(more)], ranges)
            if interval is None:
                return
        simple = _simplest(*interval)
        # As the number was written before it became a float32.
        written = float(str(np.float32(simple)))
        for number in dict.fromkeys((written, simple, (interval[0] + interval[1]) / 2)):
            for width in dict.fromkeys((wide, "<f8")):

                def predict(select: Select, number: float = number, width: str = width) -> Bits:
                    values = pairs.values_of(pair.original.bits[select], pair.original.dtype.name)
                    with np.errstate(all="ignore"):
                        done = apply(values.astype(width, copy=False), np.dtype(width).type(number))
                    bits = pairs.bits_of(done, pair.type)
                    return bits if where is None else np.where(where(select), bits, pair.x[select])

                if pair.plausible(predict) and (explained := pair.explained(predict)):
                    rank = 0.0 if cause == "offset" and number == 1 and "norm" in pair.a.name else None
                    evidence = f"{'times' if cause == 'scaled' else 'plus'} {number:.9g}, rounded, gives these bits"
                    yield Found(cause, {parameter: number}, explained, evidence, rank)
                    return


def _spread(pair: Pair) -> np.ndarray:
    step = max(1, pair.size // _WIDE_SAMPLE)
    return np.arange(0, pair.size, step)


def _interval(
    pair: Pair,
    select: np.ndarray,
    ranges: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[float, float] | None:
    """Returns the numbers that take every selected element into the rounding interval of its value in the suspect."""
    before = pairs.values_of(pair.original.bits[select], pair.original.dtype.name).astype("<f8")
    after = pairs.values_of(pair.y[select], pair.type).astype("<f8")
    usable = np.isfinite(before) & np.isfinite(after)
    before, after = before[usable], after[usable]
    if before.size < 2 or before.size < pairs.ACCEPTED * select.size:
        return None
    # A little more than half a unit: the product may have been rounded to f32 before.
    reach = pairs.half_ulp(after, pair.type) * 1.001
    low, high = ranges(before, after, reach)
    if not low.size:
        return None
    interval = float(low.max()), float(high.min())
    return interval if interval[0] <= interval[1] else None


def _factors(before: np.ndarray, after: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.any((before == 0) & (after != 0)):
        return np.empty(0), np.empty(0)
    # A value that came out as zero says little about the factor and a lot about underflow.
    kept = (before != 0) & (after != 0)
    before, after, reach = before[kept], after[kept], reach[kept]
    with np.errstate(all="ignore"):
        ends = (after - reach) / before, (after + reach) / before
    return np.minimum(*ends), np.maximum(*ends)


def _constants(before: np.ndarray, after: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return after - reach - before, after + reach - before


def _simplest(low: float, high: float) -> float:
    """Returns the number between two others that has the fewest decimal digits."""
    middle = (low + high) / 2
    # Seventeen give the number in the middle itself.
    for digits in range(1, 17):
        number = float(f"{middle:.{digits - 1}e}")
        if low <= number <= high:
            return number
    return middle
