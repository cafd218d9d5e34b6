"""Finds values that went through a quantised type: by quantising the original again, or by the grids that they lie on.

Quantising again (`replays`) tells the types that a program with one way to round makes. What else there is, is told by
the grid: which levels, and which elements share a scale. A codec is one record of `_CODECS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.formats import casts
from apr_jax.converters.verify.diagnosis import grids, replays
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.column_groups import column_groups
from apr_jax.converters.verify.diagnosis.context import Context
from apr_jax.converters.verify.diagnosis.grids import Floats, Grid, Solved, integers
from apr_jax.converters.verify.diagnosis.groupings import Grouping, groupings, same_groups
from apr_jax.converters.verify.diagnosis.pair import ACCEPTED, Pair

# Elements of a run that lies within one group of whatever size, runs, and the share of them that must fit.
_RUN, _RUNS, _PROBED_SHARE, _INHERITED_SHARE = 16, 12, 0.5, 0.85
# Groups and elements of each that are tried first, and elements of all groups at the end.
_TRIED, _TRIED_ELEMENTS, _MEASURED, _GROUPS = 6, 1 << 11, 1 << 17, 1 << 10
_SOLVED_AT_ONCE = 1 << 16
# Logarithms: no chance finds a grid of one tensor in e^20; tried ones need not be quite as unlikely.
_CHANCE, _TRIED_CHANCE = -20.0, -8.0
_SURE = -9.0
# Superblocks whose scales must lie on a grid of their own.
_HELD = 0.8
_USUAL_GROUPS = (16, 32, 64, 128, 256)
# The part of a group's columns that must have been found, where they are in any order, and that is looked at; and with
# how many strangers.
_MOST_OF, _FEW_MORE = 0.85, 1.05
# An element is near its original within so many steps of the grid; clipped outliers and GPTQ's corrections are not.
_NEAR_STEPS, _NEAR_SHARE = 2.0, 0.75
# Groups that are looked at where the original lies on such a grid, too; how far their scales must be apart, in what is
# not known of them; and in what share of the groups: in the others the same elements may have made the same scale.
_AGAIN, _OTHER_SCALE, _AGAIN_SHARE = 64, 4.0, 0.3
# Cosine of original and suspect; two bits leave more.
_ALIKE = 0.4


@dataclasses.dataclass(frozen=True)
class Scales:
    """How a format stores its scales: what tells its values from those of any scale.

    Attributes:
      grid: The levels of a scale; None: powers of two.
      shared: Neighbouring groups that have one scale of scales; None: all of the tensor.
      minima: Levels of the minima, if they are stored in the same way.
      varied: A scale's highest level, so that groups of one and the same scale are no proof.
    """

    grid: Grid | None
    shared: int | None = None
    minima: Grid | None = None
    varied: int = 0


@dataclasses.dataclass(frozen=True)
class Codec:
    """One quantised type.

    Attributes:
      type: Its name.
      grid: The values of a group.
      scheme: "symmetric" or "asymmetric" for whole numbers.
      group: The only size of its groups, where there is one.
      scales: How its scales are stored, where that tells it from others.
      rows: Whether whole rows share a scale as a rule, and not groups: the name for groups that are rows.
      halves: GGML types of groups of 32 with this grid and half-precision scales.
    """

    type: str
    grid: Grid
    scheme: str | None = None
    group: int | None = None
    scales: Scales | None = None
    rows: bool = False
    halves: str | None = None

    def parameters(self, label: str | int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": self.type}
        if self.scheme:
            found["scheme"] = self.scheme
        if self.group is None:
            found["group"] = label
        return found


def _whole(bits: int, *, rows: bool = False, halves: Sequence[str | None] = (None, None)) -> tuple[Codec, ...]:
    """Integers of so many bits: around zero, with a whole zero point, with any minimum."""
    half = 1 << (bits - 1)
    most = 2 * half - 1
    return (
        Codec(f"int{bits}", integers(-half, half - 1), "symmetric", rows=rows, halves=halves[0]),
        Codec(f"int{bits}", integers(-most, most, span=most), "asymmetric", rows=rows),
        Codec(f"int{bits}", integers(0, most, affine=True), "asymmetric", rows=rows, halves=halves[1]),
    )


# Formats that are told by their scales (ggml-quants.c; OCP MX; NVFP4), before all others.
_NESTED = (
    Codec("q2_k", integers(0, 3, affine=True), None, 16, Scales(integers(0, 15), 16, integers(0, 15), 4)),
    Codec("q3_k", integers(-4, 4, span=7), None, 16, Scales(integers(-32, 32, span=63), 16, None, 8)),
    Codec("mxfp4", grids.E2M1, None, 32, Scales(None)),
    Codec("nvfp4", grids.E2M1, None, 16, Scales(grids.FP8_E4M3)),
    Codec("iq4_xs", grids.IQ4_NL, None, 32, Scales(integers(-32, 32, span=63), 8, None, 8)),
    Codec("q4_k", integers(0, 15, affine=True), None, 32, Scales(integers(0, 63), 8, integers(0, 63), 8)),
    Codec("q5_k", integers(0, 31, affine=True), None, 32, Scales(integers(0, 63), 8, integers(0, 63), 8)),
    Codec("q6_k", integers(-32, 32, span=63), None, 16, Scales(integers(-128, 128, span=255), 16, None, 16)),
)
# The simpler first: what lies on a coarse grid lies on finer ones too.
_CODECS = (
    *_whole(2),
    *_whole(3),
    Codec("fp4_e2m1", grids.E2M1),
    Codec("fp4", grids.FP4),
    Codec("nf4", grids.NF4),
    Codec("iq4_nl", grids.IQ4_NL),
    *_whole(4, halves=("q4_0", "q4_1")),
    *_whole(5, halves=("q5_0", "q5_1")),
    Codec("fp8_e5m2", grids.FP8_E5M2, rows=True),
    Codec("fp8_e4m3", grids.FP8_E4M3, rows=True),
    *_whole(6),
    *_whole(8, rows=True, halves=("q8_0", None)),
)
# A run that lies on none of these lies on no grid of the table: each with those that lie on it.
_COVERS: tuple[Grid, ...] = (integers(0, 255, affine=True), grids.FP8_E4M3, grids.FP8_E5M2, grids.NF4, grids.IQ4_NL)


def quantised(pair: Pair, context: Context) -> Iterator[Found]:
    """Values that went through a quantised type, or are stored in one."""
    if pair.original.dtype.name not in casts.FLOATS or not pair.suspect.dtype.is_float or pair.size < 8:
        return
    # Values that were quantised before come out of quantising them again as they are.
    if pair.a.dtype.is_block and pair.b.dtype in (pair.a.dtype, pair.suspect.dtype):
        return
    # Hardly an element stays what it was.
    if pair.differing < pair.size // 4:
        return
    found = replays.replayed(pair)
    if pair.b.dtype.is_block:
        found = found or replays.stored(pair)
    elif (found is None or found.explained < 1) and len(pair.b.shape) > 1:
        # A codec that leaves elements over is another one, if that leaves fewer.
        other = _on_grid(pair, context)
        if found is None or (other is not None and other.explained > found.explained):
            found = other
    if found is not None:
        yield found


# --- on a grid


@dataclasses.dataclass(frozen=True)
class _Values:
    """A pair's values, as they are looked at."""

    pair: Pair
    shape: tuple[int, int]
    rounded_to: str

    @classmethod
    def of(cls, pair: Pair) -> _Values:
        columns = pair.b.shape[-1] if pair.b.shape else 1
        rows, columns = (pair.size // columns, columns) if columns else (1, pair.size)
        return cls(pair, (rows, columns), _narrowest(pair))

    def after(self, index: np.ndarray) -> Floats:
        return pairs.values_of(self.pair.y[index], self.pair.type).astype("<f8")

    def before(self, index: np.ndarray) -> Floats:
        bits = self.pair.original.bits[index]
        return pairs.values_of(bits, self.pair.original.dtype.name).astype("<f8")

    def solved(self, index: np.ndarray, grid: Grid) -> Solved:
        """Holds groups of the suspect, flat indices [groups, elements], against a grid."""
        return _solved(self.after(index), self.rounded_to, grid)


def _solved(values: Floats, name: str, grid: Grid) -> Solved:
    at_once = max(1, _SOLVED_AT_ONCE // len(grid.levels))
    parts = []
    for begin in range(0, len(values), at_once):
        part = values[begin : begin + at_once]
        parts.append(grids.solve(part, grids.rounding_error(part, name, affine=grid.affine), grid))
    if len(parts) == 1:
        return parts[0]
    fields = (field.name for field in dataclasses.fields(Solved))
    return Solved(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _narrowest(pair: Pair) -> str:
    """Returns the narrowest type that holds the suspect's values: they may have been rounded to it before."""
    some = pair.y[:: max(1, pair.size // 4096)]
    for name in ("bf16", "f16", "f32"):
        if name == pair.type:
            break
        there = pairs.cast_bits(some, pair.type, name)
        if np.array_equal(pairs.cast_bits(there, name, pair.type), some):
            return name
    return pair.type


def _on_grid(pair: Pair, context: Context) -> Found | None:
    values = _Values.of(pair)
    before, after = values.before(pair.sample), values.after(pair.sample)
    # Quantised weights still are what they were, more or less.
    if not np.isfinite(after).all() or np.sum(before * after) < _ALIKE * np.sqrt(np.sum(before**2) * np.sum(after**2)):
        return None
    for down in (False, True):
        covers = _covers(values, down)
        if not covers:
            continue
        found = _named(values, context, covers, down)
        if found is not None:
            return found
    return _in_any_order(values) or _few_values(values)


def _covers(values: _Values, down: bool) -> list[Grid]:
    """Returns which of the widest grids hold most of some short runs, along rows or down columns."""
    rows, columns = values.shape
    length, stride = (rows, columns) if down else (columns, 1)
    if length < _RUN and (down or rows > 1):
        return []
    # From everywhere, and where the largest of some values are: elsewhere nearly all may be zero.
    sample = values.pair.sample
    largest = sample[np.argsort(-np.abs(values.after(sample)), kind="stable")[:_RUNS]]
    places = np.concatenate((sample[:: max(1, len(sample) // _RUNS)], largest))
    row, column = np.divmod(places, columns)
    first = row // _RUN * _RUN * columns + column if down else row * columns + column // _RUN * _RUN
    index = np.unique(first)[:, None] + np.arange(min(_RUN, length)) * stride
    last = index[:, -1]
    inside = (last < values.pair.size) & (down | (last // columns == index[:, 0] // columns))
    index = index[inside]
    after = values.after(index)
    told = np.argsort(-np.count_nonzero(after, 1), kind="stable")[:_RUNS]
    after = after[np.sort(told)]
    before = values.before(index[np.sort(told)])
    found = [grid for grid in _COVERS if _held(grid, after[::4], values.rounded_to) >= _PROBED_SHARE]
    shares = {grid: _held(grid, after, values.rounded_to) for grid in found}
    # What lay on a grid and was trained on still lies there in part.
    name = values.pair.original.dtype.name
    return [
        grid
        for grid, share in shares.items()
        if share >= _INHERITED_SHARE or (share >= _PROBED_SHARE and _held(grid, before, name) < _PROBED_SHARE)
    ]


def _held(grid: Grid, runs: Floats, name: str) -> float:
    """Returns the share of some runs that lie on a grid."""
    solved = _solved(runs, name, grid)
    told = int(np.count_nonzero(solved.told))
    return int(np.count_nonzero(solved.fits & solved.told)) / told if told else 0.0


def _covered(codec: Codec, covers: Sequence[Grid]) -> bool:
    if codec.scheme or codec.type.startswith("q"):
        return _COVERS[0] in covers
    if codec.grid in (grids.NF4, grids.IQ4_NL, grids.FP8_E5M2):
        return codec.grid in covers
    return grids.FP8_E4M3 in covers


def _named(values: _Values, context: Context, covers: Sequence[Grid], down: bool) -> Found | None:
    table = [grouping for grouping in groupings(values.shape) if down == ("column" in str(grouping.label))]
    nested, plain = ([codec for codec in codecs if _covered(codec, covers)] for codecs in (_NESTED, _CODECS))
    match = _as_before(values, context, table, (*nested, *plain)) or _searched(values, table, nested, plain)
    if match is None:
        return None
    context.codec_found(match.codec, match.grouping.label)
    return _told(values, match, table)


def _as_before(values: _Values, context: Context, table: Sequence[Grouping], codecs: Sequence[Codec]) -> _Match | None:
    """Tries what the model's other tensors were quantised to, before a long search."""
    for codec, label in context.codecs_found():
        for grouping in table:
            if codec not in codecs or grouping.label != label:
                continue
            match = _match(values, codec, grouping)
            if match is None:
                continue
            wider = [other for other in table if other.size > grouping.size] if codec.scales is None else []
            if match.share == 1 and not any(_match(values, codec, other) for other in wider):
                return match
    return None


def _searched(
    values: _Values, table: Sequence[Grouping], nested: Sequence[Codec], plain: Sequence[Codec]
) -> _Match | None:
    """Finds the fewest scales with which some codec gives the values, and the simplest of these codecs."""
    found = None
    for grouping in table:
        codecs = [codec for codec in plain if found is None or codec.grid.values < found.codec.grid.values]
        match = next((match for codec in codecs if (match := _match(values, codec, grouping)) is not None), None)
        if match is None or (found is not None and not match.sure):
            continue
        # Zero points that are nearly all alike are no symmetry yet.
        others = [codec for codec in plain if codec.type == match.codec.type] if match.share < 1 else []
        again = [other for codec in others if (other := _match(values, codec, grouping)) is not None]
        found = max((match, *again), key=lambda match: match.share)
        if found.sure:
            break
    for codec in nested:
        if found is not None and _simpler(found, codec):
            continue
        for grouping in table:
            if (
                grouping.label == codec.group
                and grouping.shape == values.shape
                and values.shape[1] % grouping.size == 0
            ):
                match = _match(values, codec, grouping)
                if match is not None:
                    return match
    return found


def _simpler(match: _Match, nested: Codec) -> bool:
    """Whether what fits has no more levels than a nested format, and fewer scales or no minima beside it."""
    size = match.grouping.size
    fewer = size > (nested.group or 0) or (size == nested.group and nested.grid.affine and not match.codec.grid.affine)
    return fewer and match.codec.grid.values <= nested.grid.values


@dataclasses.dataclass(frozen=True)
class _Match:
    """A codec and a grouping that fit; the share of the groups that do."""

    codec: Codec
    grouping: Grouping
    index: np.ndarray
    solved: Solved
    share: float

    @property
    def sure(self) -> bool:
        """Whether each group by itself says something; many that hardly do may be those of another codec."""
        fits = self.solved.fits & self.solved.told
        return float(self.solved.chance[fits].mean()) < _SURE


def _match(values: _Values, codec: Codec, grouping: Grouping) -> _Match | None:
    """Holds a few groups, then those of a large part of the tensor against a codec."""
    index = grouping.indices(grouping.spread(_TRIED), _TRIED_ELEMENTS)
    if _share(values.solved(index, codec.grid), _TRIED_CHANCE) is None:
        return None
    if grouping.label == "tensor":
        _, first = np.unique(values.pair.y, return_index=True)
        index = first[None, :]
    else:
        index = grouping.indices(grouping.spread(min(_GROUPS, max(2, _MEASURED // grouping.size))), _MEASURED)
    solved = values.solved(index, codec.grid)
    share = _share(solved, _CHANCE)
    if share is None or not _near(values, index, solved, codec.grid):
        return None
    if codec.scales is not None and not _scales_stored(codec.scales, grouping, values, codec):
        return None
    return _Match(codec, grouping, index, solved, share)


def _share(solved: Solved, chance: float) -> float | None:
    """Returns the share of the groups that fit; None if too few do, or others would have as well."""
    told = int(np.count_nonzero(solved.told))
    fits = solved.fits & solved.told
    if not told or np.count_nonzero(fits) < ACCEPTED * told or solved.chance[fits].sum() > chance:
        return None
    return float(np.count_nonzero(fits)) / told


def _near(values: _Values, index: np.ndarray, solved: Solved, grid: Grid) -> bool:
    """Whether the values are near the original, and the original does not lie on the same grid already."""
    before, after = values.before(index), values.after(index)
    fits = np.flatnonzero(solved.fits & solved.told)
    near = np.abs(before - after) <= _NEAR_STEPS * solved.steps(after, grid)
    if np.count_nonzero(near[fits]) < _NEAR_SHARE * near[fits].size:
        return False
    name = values.pair.original.dtype.name
    some = fits[:: max(1, len(fits) // _TRIED)]
    there = _solved(before[some, :_TRIED_ELEMENTS], name, grid)
    if np.count_nonzero(there.fits & there.told) < 0.5 * max(1, int(np.count_nonzero(there.told))):
        return True
    return _quantised_again(
        _solved(before[fits[:_AGAIN], :_TRIED_ELEMENTS], name, grid),
        values.solved(index[fits[:_AGAIN], :_TRIED_ELEMENTS], grid),
    )


def _quantised_again(before: Solved, after: Solved) -> bool:
    """Whether groups that lay on a grid already now lie on another one, and were not just moved a little along it."""
    both = before.fits & before.told & after.fits & after.told
    reach = before.reach + after.reach + np.abs(before.scale) * 2.0**-20
    other = np.abs(np.abs(before.scale) - np.abs(after.scale)) > _OTHER_SCALE * reach
    return bool(np.count_nonzero(other & both) >= _AGAIN_SHARE * max(1, int(np.count_nonzero(both))))


def _told(values: _Values, match: _Match, table: Sequence[Grouping]) -> Found:
    codec, grouping, solved = match.codec, match.grouping, match.solved
    differs = values.pair.differs[match.index]
    explained = int(np.count_nonzero(differs & solved.fits[:, None])) / max(1, int(np.count_nonzero(differs)))
    labels = _labels(grouping, table, rows=codec.rows)
    readings = [codec.parameters(label) for label in labels]
    alternatives: tuple[str, ...] = ()
    if codec.halves and 32 in labels and values.shape[1] % 32 == 0:
        halves = _are_halves(solved.scale[solved.told], solved.reach[solved.told])
        if halves:
            readings = [{"type": codec.halves}]
        elif halves is None:
            alternatives = (codec.halves,)
    evidence = f"one scale gives every value of a group of {grouping.size}, rounded to {values.rounded_to}"
    return Found("quantised", readings[0], float(explained), evidence, None, alternatives, tuple(readings))


def _labels(grouping: Grouping, table: Sequence[Grouping], *, rows: bool = False) -> list[str | int]:
    """Returns what a grouping may be called in this tensor, the likelier first: of a usual size, or else rows."""
    labels = [other.label for other in table if same_groups(other, grouping)]
    numbered = not rows and any(label in _USUAL_GROUPS for label in labels)
    preferred = [label for label in labels if isinstance(label, int) == numbered]
    return list(dict.fromkeys((*preferred, *labels)))


# --- columns in an order of their own


def _in_any_order(values: _Values) -> Found | None:
    """Whole numbers with a scale for each group of columns, which are no neighbours (GPTQ's act-order)."""
    rows, columns = values.shape

    def read(lines: np.ndarray, where: np.ndarray) -> tuple[Floats, Floats]:
        after = values.after(lines[:, None] * columns + where)
        return after, grids.rounding_error(after, values.rounded_to, affine=False)

    groups = column_groups(values.shape, read)
    if not groups:
        return None
    # Columns that are zero everywhere belong to any group, and are missing; a stranger may be there.
    groups = sorted(groups, key=len)[-2:]
    least, most = len(groups[0]), len(groups[-1])
    group = next((usual for usual in _USUAL_GROUPS if _MOST_OF * usual <= most <= _FEW_MORE * usual), None)
    if len(groups) < 2 or group is None or least < _MOST_OF * most:
        return None
    lines = np.unique(np.linspace(0, rows - 1, min(rows, max(2, _MEASURED // (2 * least)))).astype(int))
    index = np.concatenate([lines[:, None] * columns + surest[: int(_MOST_OF * least)] for surest in groups])
    for codec in _CODECS:
        if codec.scheme is None or codec.grid.affine:
            continue
        solved = values.solved(index, codec.grid)
        if _share(solved, _CHANCE) is not None and _near(values, index, solved, codec.grid):
            differs = values.pair.differs[index]
            explained = int(np.count_nonzero(differs & solved.fits[:, None])) / max(1, int(np.count_nonzero(differs)))
            evidence = f"in every row, one scale gives the values of {most} columns that are no neighbours"
            return Found("quantised", codec.parameters(group) | {"order": "act-order"}, float(explained), evidence)
    return None


# --- what scales tell


def _scales_stored(scales: Scales, grouping: Grouping, values: _Values, codec: Codec) -> bool:
    """Whether the scales of the groups (and their minima) lie on the grid of their format."""
    # What the whole tensor shares, some of its groups show.
    shared = scales.shared or min(256, grouping.count)
    if grouping.count < shared:
        return False
    most = max(2, _MEASURED // (shared * grouping.size))
    count = grouping.count // shared
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    index = grouping.indices((chosen[:, None] * shared + np.arange(shared)).reshape(-1))
    all_solved = values.solved(index, codec.grid)
    told = all_solved.fits & all_solved.told
    if scales.grid is None:
        power = np.exp2(np.rint(np.log2(np.abs(all_solved.scale[told]))))
        near = np.abs(all_solved.scale[told] - power) <= all_solved.reach[told] + 1e-6 * power
        return bool(np.count_nonzero(near) >= ACCEPTED * near.size)
    # Of a group that does not use all levels, the minimum may be that of another level, and the scale a multiple.
    top = codec.grid.book[-1]
    told &= all_solved.highest == top if codec.grid.affine else all_solved.highest > top / 2
    told = told.reshape(-1, shared)
    held = np.count_nonzero(told, 1) >= min(shared // 2, 4)
    if np.count_nonzero(held) < _HELD * held.size:
        return False
    # In place of what is not told stands what is: it proves nothing twice.
    order = np.argsort(~told[held], 1, kind="stable")
    order = np.where(np.take_along_axis(told[held], order, 1), order, order[:, :1])

    def on(numbers: Floats, reach: Floats, grid: Grid) -> Solved:
        numbers, reach = (np.take_along_axis(part.reshape(-1, shared)[held], order, 1) for part in (numbers, reach))
        return grids.solve(numbers, reach, grid)

    slack = np.abs(all_solved.scale) * 2.0**-20
    of_scales = on(all_solved.scale, all_solved.reach + slack, scales.grid)
    if of_scales.fits.mean() < _HELD or of_scales.chance.sum() > _TRIED_CHANCE:
        return False
    if np.median(of_scales.highest) < scales.varied:
        return False
    if scales.minima is None:
        return True
    reach = all_solved.reach * all_solved.highest + np.abs(all_solved.minimum) * 2.0**-20
    return bool(on(-all_solved.minimum, reach, scales.minima).fits.mean() >= _HELD)


def _are_halves(scale: Floats, reach: Floats) -> bool | None:
    """Whether scales are half-precision numbers; None where what is known of them cannot tell."""
    near = scale.astype("<f2").astype("<f8")
    room = pairs.half_ulp(np.abs(near), "f16")
    if np.median(reach / np.maximum(room, 1e-300)) > 0.25:
        return None
    return bool(np.mean(np.abs(scale - near) <= reach + np.abs(scale) * 2.0**-20) >= ACCEPTED)


# --- few values, on no known grid


def _few_values(values: _Values) -> Found | None:
    """Groups that hold few different values, and in the original many: quantised, nobody knows how."""
    table = [grouping for grouping in groupings(values.shape) if "column" not in str(grouping.label)]
    counts = {}
    for grouping in table:
        index = grouping.indices(grouping.spread(_TRIED), 1 << 12)
        found = _most_distinct(values.after(index))
        if found <= min(256, grouping.size // 3):
            counts[grouping] = found
    # The fewest values, and the fewest scales for them.
    for most in (4, 8, 16, 32, 64, 256):
        for grouping, found in counts.items():
            if found > most or grouping.size < 3 * most:
                continue
            index = grouping.indices(grouping.spread(max(2, _MEASURED // grouping.size)), 1 << 16)
            found = _most_distinct(values.after(index))
            before = _most_distinct(values.before(index[:: max(1, len(index) // 64)]))
            if found > most or before < 1.5 * found or found < 2:
                continue
            labels = _labels(grouping, table)
            readings = [{"type": "unknown grid", "values": most, "group": label} for label in labels]
            evidence = f"at most {found} different values in each group, and up to {before} in the original"
            return Found("quantised", readings[0], 1.0, evidence, readings=tuple(readings))
    return None


def _most_distinct(groups: np.ndarray) -> int:
    ordered = np.sort(groups, 1)
    return int(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).max(initial=0))
