"""Which elements of a tensor share one scale: the whole tensor, blocks, rows, columns, groups of so many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from apr_jax.converters.verify.diagnosis.context import divisors

_FP8_BLOCK = 128
_FLAT = tuple(1 << power for power in range(12, 3, -1))
_SMALLEST = 16


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Blocks of a matrix, each of which has one scale.

    Attributes:
      label: "tensor", "128x128", "row", "column", or the number of neighbours in a group.
      shape: The matrix, which may run over the tensor's elements with rows of its own.
      block: Rows and columns of one block.
      per_row: Blocks that lie side by side; what is left of a row belongs to none.
    """

    label: str | int
    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def size(self) -> int:
        """Elements of one group."""
        return self.block[0] * self.block[1]

    @property
    def per_row(self) -> int:
        return self.shape[1] // self.block[1]

    @property
    def count(self) -> int:
        return self.shape[0] // self.block[0] * self.per_row

    def spread(self, most: int) -> np.ndarray:
        """Returns the numbers of some groups from everywhere in the tensor."""
        if self.count <= most:
            return np.arange(self.count)
        # Not the same column again and again.
        numbers = (np.arange(most) * self.count / most + np.arange(most) % 7 * self.count / most / 7).astype(np.int64)
        return np.unique(np.minimum(numbers, self.count - 1))

    def indices(self, groups: np.ndarray, most: int | None = None) -> np.ndarray:
        """Returns [groups, elements], flat indices; of large groups some elements if so many are enough."""
        row, column = np.divmod(groups, self.per_row)
        first = row * self.block[0] * self.shape[1] + column * self.block[1]
        inside = np.arange(self.size)
        if most is not None and self.size > most:
            inside = np.sort(np.random.default_rng(self.size).choice(self.size, most, replace=False))
        down, across = np.divmod(inside, self.block[1])
        return first[:, None] + (down * self.shape[1] + across)[None, :]


def groupings(shape: tuple[int, int]) -> list[Grouping]:
    """Returns the groupings that a matrix may have, those with fewer scales first; equal ones under each name."""
    rows, columns = shape
    found = [Grouping("tensor", shape, shape)] if rows > 1 else []
    if rows > 1 and columns > 1:
        found.append(Grouping(f"{_FP8_BLOCK}x{_FP8_BLOCK}", shape, (min(_FP8_BLOCK, rows), min(_FP8_BLOCK, columns))))
    found.append(Grouping("row", shape, (1, columns)))
    if rows >= _SMALLEST and columns > 1:
        found.append(Grouping("column", shape, (rows, 1)))
    found = [grouping for grouping in (*found, *_numbered(rows, columns)) if grouping.count]
    return sorted(found, key=lambda grouping: -grouping.size)


def _numbered(rows: int, columns: int) -> Iterator[Grouping]:
    """Groups of neighbours: along rows, on across rows, down columns (HQQ's axis 0 takes every n-th row)."""
    size = rows * columns
    for group in divisors(columns):
        if group >= _SMALLEST and group % 4 == 0:
            yield Grouping(group, (rows, columns), (1, group))
    for group in _FLAT:
        if columns % group:
            if group <= size:
                yield Grouping(group, (size // group, group), (1, group))
            if group < columns:
                yield Grouping(group, (rows, columns), (1, group))
        if rows > 1 and group < size:
            if group < rows and rows % group == 0:
                yield Grouping(f"{group} down columns", (rows, columns), (group, 1))
            if size % group == 0 and group < rows:
                yield Grouping(f"{group} down columns, spread", (group, size // group), (group, 1))


def same_groups(one: Grouping, other: Grouping) -> bool:
    """Whether two groupings of one tensor have the same groups."""
    if one.size != other.size or one.count != other.count:
        return False
    some = one.spread(4)
    return bool(np.array_equal(np.sort(one.indices(some, 1 << 12)), np.sort(other.indices(some, 1 << 12))))
