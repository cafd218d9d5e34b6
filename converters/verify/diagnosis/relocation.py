"""Finds content that belongs elsewhere: that of another tensor, or of another place in the file (shifts)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.decoded import DecodedTensor
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import CAUSES, Found
from apr_jax.converters.verify.diagnosis.context import Context, split_layer
from apr_jax.converters.verify.diagnosis.pair import ACCEPTED, Bits, Pair, Select

_PROBE = 12  # elements that are looked for
_COPY_RANK = CAUSES.index("qkv-order") + 0.5
_PLACES = 64  # places of the original that are tried for one probe
_SMALL = 1 << 16
# Nobody's offset is wrong by more elements than this.
_FARTHEST = 1 << 23


def swapped(pair: Pair, context: Context) -> Iterator[Found]:
    """The content of another tensor, exchanged with it or copied from it."""
    name = pair.b.name
    names = [other for other in context.same_as(pair.b, side="a") if other != name]
    if not names:
        return
    back = set(context.same_as(pair.a, side="b"))
    # An exchange is more telling than a copy; then the neighbourhood decides.
    names.sort(key=lambda other: (other not in back, _distance(name, other)))
    for other in names[:4]:
        held = pairs.load(context.a[other])
        if held.bits.size != pair.size:
            continue

        def predict(select: Select, held: pairs.Payload = held) -> Bits:
            return pairs.cast_bits(held.bits[select], held.dtype.name, pair.type)

        explained = pair.explained(predict)
        if not explained:
            continue
        mutual = other in back and context.b[other].name != name
        parameters = _exchange(name, other) if mutual else _copy(name, other)
        verb = "exchanged with" if mutual else "a copy of"
        others = [found for found in names if found != other]
        evidence = f"its elements are those of {other}: {verb} it"
        if others:
            evidence += f" (equal to {len(others)} more tensors of the original)"
        # Three that changed places are better told as q, k and v in another order.
        yield Found("swapped-tensors", parameters, explained, evidence, None if mutual else _COPY_RANK)
        return


def _distance(name: str, other: str) -> tuple[bool, int, str]:
    (layer, role), (other_layer, other_role) = split_layer(name), split_layer(other)
    return role != other_role and layer != other_layer, abs((layer or 0) - (other_layer or 0)), other


def _exchange(name: str, other: str) -> dict[str, Any]:
    (layer, role), (other_layer, other_role) = split_layer(name), split_layer(other)
    if layer is not None and layer == other_layer:
        return {"exchanged": sorted((role, other_role))}
    if role == other_role and layer is not None and other_layer is not None:
        return {"exchanged_layers": sorted((layer, other_layer))}
    return {"exchanged": sorted((name, other))}


def _copy(name: str, other: str) -> dict[str, Any]:
    (layer, role), (other_layer, other_role) = split_layer(name), split_layer(other)
    if layer is not None and layer == other_layer:
        return {"copy_of": other_role, "in_place_of": role}
    if role == other_role and layer is not None and other_layer is not None:
        return {"layer": layer, "copy_of_layer": other_layer}
    return {"copy_of": other}


# --- shifts


def shifted(pair: Pair) -> Iterator[Found]:
    """All elements moved by a number of bytes, or rows read with a stride that is not their length."""
    width = int(pair.y.itemsize)
    data = pair.x.view("u1")
    tried: set[int] = set()
    for probe in _probes(pair):
        for place in _places(pair, probe):
            # The bytes at `place` of the original are at element `probe` of the suspect.
            shift = probe * width - place
            if shift == 0 or shift in tried:
                continue
            tried.add(shift)
            found = _plain_shift(pair, data, shift) or _stride(pair, probe, place)
            if found is not None:
                yield found
                return
    yield from _padded_rows(pair)


def _probe_length(pair: Pair) -> int:
    return max(2, min(_PROBE, pair.size // 4))


def _probes(pair: Pair) -> list[int]:
    """Returns where in the suspect to take the runs that are looked for: differing ones with varied elements."""
    length = _probe_length(pair)
    if pair.size < 4:
        return []
    sample = np.minimum(pair.sample[:: max(1, pair.sample.size // 16)], pair.size - length)
    # From the middle outwards: the ends may have been filled with something else.
    order = np.argsort(np.abs(np.arange(len(sample)) - len(sample) // 2), kind="stable")
    good = [int(sample[index]) for index in order if _varied(pair.y[sample[index] : sample[index] + length])]
    return good[: 3 if pair.size < _SMALL else 1]


def _varied(run: Bits) -> bool:
    return len(set(run.tolist())) >= min(4, run.size)


def _places(pair: Pair, probe: int) -> Iterator[int]:
    """Yields the byte offsets in the original at which a run of the suspect's elements is found, at any alignment."""
    run = pair.y[probe : probe + _probe_length(pair)]
    width = int(pair.x.itemsize)
    begin = max(0, probe - _FARTHEST)
    data = pair.x[begin : probe + _FARTHEST].view("u1")
    given = 0
    for phase in range(width):
        view = data[phase : phase + (data.size - phase) // width * width].view(pair.x.dtype)
        # The nearest place first: what repeats itself is found in many.
        for part in sorted(Pair.chunks(view.size - run.size + 1, 1), key=lambda part: _away(part, probe - begin)):
            equal = view[part] == run[0]
            # The second element sorts nearly all of them out.
            equal &= view[part.start + 1 : part.stop + 1] == run[1]
            places = part.start + np.flatnonzero(equal)
            for index in range(2, run.size):
                if not places.size:
                    break
                places = places[view[places + index] == run[index]]
            for place in sorted(places.tolist(), key=lambda place: abs(place - (probe - begin))):
                yield (begin + place) * width + phase
                given += 1
                if given >= _PLACES:
                    return


def _away(part: slice, place: int) -> int:
    """How far a place is from a part, 0 inside."""
    return max(part.start - place, place - part.stop, 0)


def _plain_shift(pair: Pair, data: np.ndarray, shift: int) -> Found | None:
    """Tests suspect[i] = original[i - shift] in bytes."""
    total = data.size
    low, high = max(0, shift), min(total, total + shift)
    if high - low < total // 4:
        return None
    suspect = pair.y.view("u1")
    # From the first difference on, if the elements before it would not fit the shift.
    width = int(pair.y.itemsize)
    start = 0
    first = int(np.argmax(pair.differs)) * width
    if first > low and not np.array_equal(suspect[low:first], data[low - shift : first - shift]):
        start = first
        low = max(low, start + max(0, shift))
    # Whole elements are compared faster.
    unit = pair.y.dtype if shift % width == 0 and low % width == 0 and high % width == 0 else data.dtype
    equal = _count_equal(suspect[low:high].view(unit), data[low - shift : high - shift].view(unit))
    moved = equal * unit.itemsize
    if moved < ACCEPTED * (high - low) or high - low < total // 4 - start:
        return None
    inside = pair.differs[-(-low // width) : high // width]
    # The moved part has to differ by itself: a fill alone proves nothing.
    if np.count_nonzero(inside) < max(2, min(8, inside.size // 4)):
        return None
    fill = slice(start, low) if shift > 0 else slice(high, total)
    kind = _fill(pair, suspect, data, fill, shift)
    if kind == "wrapped" and shift % (width * pair.shape[1]) == 0:
        return None  # rows in another order, by another name
    filled = (fill.stop - fill.start) if kind != "other" else 0
    explained = (moved + filled) / max(1, total - start)
    parameters: dict[str, Any] = _amount(pair, shift) | {"fill": kind}
    if start:
        parameters["from"] = start // width
    if explained < 0.5:
        return None
    amount = f"{abs(parameters['by'])} {parameters['unit']}"
    direction = "later" if shift > 0 else "earlier"
    evidence = f"everything stands {amount} {direction} than in the original; the gap is filled with: {kind}"
    return Found("shifted", parameters, min(1.0, explained), evidence)


def _count_equal(left: np.ndarray, right: np.ndarray) -> int:
    step = 1 << 20
    return sum(
        int(np.count_nonzero(left[begin : begin + step] == right[begin : begin + step]))
        for begin in range(0, left.size, step)
    )


def _amount(pair: Pair, shift: int) -> dict[str, Any]:
    """Returns the shift in the largest unit that it is a multiple of; positive: towards the end."""
    width, columns = int(pair.y.itemsize), pair.shape[1]
    if columns > 1 and shift % (width * columns) == 0:
        return {"by": shift // (width * columns), "unit": "rows"}
    if shift % width == 0 and not pair.as_bytes:
        return {"by": shift // width, "unit": "elements"}
    return {"by": shift, "unit": "bytes"}


def _fill(pair: Pair, suspect: np.ndarray, data: np.ndarray, fill: slice, shift: int) -> str:
    """Says what stands where nothing of the tensor was moved to."""
    found = suspect[fill]
    if not found.any():
        return "zero"
    if np.array_equal(found, data[fill]):
        return "unchanged"
    around = data[-shift:] if shift > 0 else data[:-shift]
    if np.array_equal(found, around):
        return "wrapped"
    in_a_file = not pair.original.decoded and not isinstance(pair.a, DecodedTensor)
    if pair.original.dtype.name == pair.type and in_a_file:
        before = pair.a.offset - shift if shift > 0 else pair.a.offset + pair.a.nbytes
        inside = before >= 0 and before + found.size <= pair.a.source.size and fill.start in (0, data.size + shift)
        if inside and bytes(pair.a.source.read_at(before, int(found.size))) == found.tobytes():
            return "neighbour"
    edge = data[: pair.y.itemsize] if shift > 0 else data[-pair.y.itemsize :]
    if found.size % edge.size == 0 and np.array_equal(found, np.tile(edge, found.size // edge.size)):
        return "edge repeated"
    return "other"


def _stride(pair: Pair, probe: int, place: int) -> Found | None:
    """Tests rows that were read one after the other with a stride that is not their length."""
    rows, columns = pair.shape
    width = int(pair.y.itemsize)
    row, column = divmod(probe, columns)
    if rows < 3 or columns < 2 or not row or place % width:
        return None
    stride, rest = divmod(place // width - column, row)
    if rest or stride < 1 or stride == columns:
        return None
    limit = pair.x.size

    def predict(select: Select) -> Bits:
        index = np.arange(select.start, select.stop) if isinstance(select, slice) else select
        index = index // columns * stride + index % columns
        expected = pair.x[np.minimum(index, limit - 1)]
        return np.where(index < limit, expected, expected.dtype.type(0))

    inside = pair.sample[pair.sample // columns * stride + pair.sample % columns < limit]
    if np.count_nonzero(pair.equal(predict(inside), inside)) < ACCEPTED * inside.size:
        return None
    # What lies beyond the end of the tensor is the neighbour's, and no difference if it cannot be explained.
    hits = sum(
        int(np.count_nonzero(pair.equal(predict(part), part) & pair.differs[part]))
        for part in pair.chunks(pair.size, columns)
    )
    beyond = max(0, pair.size - (limit - (stride - columns) * (rows - 1))) if stride > columns else 0
    explained = hits / pair.differing
    if explained < ACCEPTED - beyond / pair.size:
        return None
    parameters = {"by": stride - columns, "unit": "elements a row"}
    evidence = f"rows of {columns} were read {stride} elements apart"
    return Found("shifted", parameters, explained, evidence)


def _padded_rows(pair: Pair) -> Iterator[Found]:
    """Rows filled up with zeros to whole blocks, as in Q4_K, and then read without leaving these zeros out."""
    rows, columns = pair.shape
    if len(pair.b.shape) != 2 or rows < 2:
        return
    for block in (256, 64, 32):
        padded = columns + -columns % block
        if padded == columns:
            continue

        def predict(select: Select, padded: int = padded) -> Bits:
            index = np.arange(select.start, select.stop) if isinstance(select, slice) else select
            row, column = index // padded, index % padded
            expected = pair.x[row * columns + np.minimum(column, columns - 1)]
            return np.where(column < columns, expected, expected.dtype.type(0))

        if pair.plausible(predict) and (explained := pair.explained(predict)):
            parameters = {"rows_filled_up_to_multiples_of": block, "padding": "read as values"}
            evidence = f"rows of {columns}, filled up with zeros to {padded}, were read as if they were not filled up"
            yield Found("shifted", parameters, explained, evidence)
            return
