"""What is known of one mistake (`Fault`), and one made with its parameters (`Mistake`).

The formula of a stage is written once, in `replay`, as steps with right values; a fault says what it makes of some of
them. From its record follow the formulas that make it, alone or beside others, the hypotheses that are tried where a
stage is wrong, what is tried where that stage was not dumped, how sightings at several stages become one finding, and
the sentence. Adding a mistake is one record in the file of its family and one formula.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from apr_jax.trace.stages import Key

_SHOWN = 3
"""As many names are spelled out in a sentence."""

# How sightings of a mistake that differ in a parameter become one finding.
UNION = "union"
"""The values are listed."""
LEAST = "least"
"""The smallest is the one: sums no longer than a chunk do not tell how long it is."""
COMMON = "common"
"""Names that a stage cannot tell from each other, joined by OR: those that all of them have are left."""
OR = " or "
IGNORED = "ignored"
"""What a fault makes of rows that mean nothing: not said."""


def once(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """The variants of a fault without parameters."""
    del question, node
    yield {}


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a stage that a mistake is confined to.

    Attributes:
      kind: "heads", "channels", "pairs" (of a rotation, in every head) or "positions".
      indices: Which of them; of positions (row of the batch, column).
      of: How many there are.
      part: Whose they are, "q", "k" or "v", where a stage holds several projections; else "".
      start: The first channel of that projection.
    """

    kind: str
    indices: tuple[Any, ...]
    of: int
    part: str = ""
    start: int = 0

    @property
    def where(self) -> str:
        """The region in words: "heads 1-3 of 4"."""
        one = len(self.indices) == 1
        if self.kind == "positions":
            return self._positions()
        noun = self.kind.removesuffix("s") if one else self.kind
        return f"{noun} {ranges(self.indices)} of {self.of}" + (f" of {self.part}" if self.part else "")

    def _positions(self) -> str:
        rows: dict[int, list[int]] = {}
        for row, column in self.indices:
            rows.setdefault(row, []).append(column)
        said = [
            f"row {row} position{'s' if len(columns) > 1 else ''} {ranges(columns)}" for row, columns in rows.items()
        ]
        return ", ".join(said[:_SHOWN]) + (f" and {len(said) - _SHOWN} rows more" if len(said) > _SHOWN else "")

    def chosen(self, value: Any, columns: Any, head_dim: int) -> Any:
        """Returns which values of a stage are in it, bool and of the stage's shape up to broadcasting.

        Args:
          value: The stage's values, [B, T, C] or [B, N, T, S].
          columns: The columns of the batch that they stand for, int [T].
          head_dim: Width of a head.
        """
        per_pair = value.ndim == 4
        if self.kind == "positions":
            rows = np.zeros((value.shape[0], max(int(columns.max()), *(c for _, c in self.indices)) + 1), bool)
            rows[tuple(np.array(self.indices).T)] = True
            rows = rows[:, columns]
            return rows[:, None, :, None] if per_pair else rows[..., None]
        places, wanted = np.arange(value.shape[1] if per_pair else value.shape[-1]), np.array(self.indices)
        if per_pair:
            return np.isin(places, wanted)[:, None, None]
        if self.kind == "heads":
            return np.isin(places, (self.start + wanted[:, None] * head_dim + np.arange(head_dim)).ravel())
        return np.isin(places % head_dim % (head_dim // 2), wanted) if self.kind == "pairs" else np.isin(places, wanted)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in rising order as text, in ranges: "1-3, 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    said = [str(first) if first == last else f"{first}-{last}" for first, last in found]
    return ", ".join(said[: 2 * _SHOWN]) + (
        f" and {len(said) - 2 * _SHOWN} ranges more" if len(said) > 2 * _SHOWN else ""
    )


def fields(text: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def shown(value: Any) -> Any:
    """Names in a row, or how many there are; anything else as it is."""
    if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
        return value
    return ", ".join(value) if len(value) <= _SHOWN else f"{len(value)} of them ({value[0]}, ...)"


class Instead(NamedTuple):
    """What is computed in another way, where that is not a stage's own formula.

    Attributes:
      theirs: The mistaken way.
      right: The right way.
    """

    theirs: str
    right: str


class Grid(NamedTuple):
    """A number that is solved for by how well a later stage is reproduced.

    Attributes:
      parameter: Its name.
      values: Rising values; the best of them and its neighbours are where it is sought.
      near: Numbers that engines may hold near a solved one, this one last.
    """

    parameter: str
    values: tuple[float, ...]
    near: Callable[[float], list[float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Fault:
    """A mistake that can be made in a forward pass.

    Attributes:
      name: Its name, the one that users read.
      wording: What is said of it, a format string of its parameters; of several the first whose parameters are there.
      stages: The stages that it is made at, or a function of the replay and its parameters that tells them. Without
        any it is none of a stage's formula: an order of layers, a layout, or what is merely seen.
      changes: Step of a formula -> what this fault makes of its value. Called with the right value, the place (`At`)
        and the fault's parameters.
      solve: Given a `question.Question`, reads its parameters, and those of the other faults that name the same
        function, off the values of a dumped stage; yields stacks of mistakes.
      variants: Given a question and a stage, parameter sets worth trying at it: where it was dumped, unless `solve`
        finds them, and where it was not.
      grid: A parameter that `variants` leave open: behind a gap it is solved for.
      merge: Parameter -> UNION, LEAST, COMMON or IGNORED; those of others have to agree.
      slight: Whether it moves a product by a few percent at most, or by more; None where it may do either.
      in_weights: Whether a tensor is to blame.
      together: A parameter; behind a gap all variants that agree in it are also tried at once.
      ways: Further parameter sets in which engines make this variant, all under its one name.
      consists_of: Names of faults that, all made in one layer, are this one.
      hides: Names of faults that look made where this one is.
      beside_blocks: Whether engines do it on purpose where weights are quantised in blocks.
      unexplained: Whether it says what is seen, and not how it came about.
      mistake: Whether it is one; a layout is not.
      alone: Whether it is not tried beside others: there are many of its kind, and engines that make one are otherwise
        right.
      chaotic: Whether it moves values by whole steps, so that a last bit here or there is a step elsewhere: it is told
        by most values, not by all.
      near: How near, relative to themselves, these values have to be met.
      among: Given its parameters, those of several stages that it is made at; None is all of them.
      formula: The mistaken formula for people to read, of the stage; forms as of the wording, or stage -> formula.
        "{right}" is the stage's own (`formulas.RIGHT`), other braces are parameters and the configuration's numbers.
    """

    name: str
    wording: str | tuple[str, ...]
    stages: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    changes: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    solve: Callable[[Any], Iterable[Mistakes]] | None = None
    variants: Callable[[Any, Key], Iterable[Mapping[str, Any]]] = once
    grid: Grid | None = None
    merge: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slight: bool | None = None
    in_weights: bool = False
    together: str = ""
    ways: Callable[..., tuple[Mapping[str, Any], ...]] = lambda **_: ()
    consists_of: tuple[str, ...] = ()
    hides: tuple[str, ...] = ()
    beside_blocks: bool = False
    unexplained: bool = False
    mistake: bool = True
    alone: bool = False
    chaotic: bool = False
    near: float = 1e-6
    among: Callable[..., tuple[str, ...]] | None = None
    formula: str | tuple[str, ...] | Mapping[str, str] | Instead = ""

    def __repr__(self) -> str:
        return f"Fault({self.name!r})"

    def made(self, **parameters: Any) -> Mistake:
        """Returns it with parameters."""
        return Mistake(self, tuple(sorted(parameters.items())))

    def said(self, parameters: Mapping[str, Any]) -> str:
        """Returns what is wrong, in words."""
        words = {name: shown(value) for name, value in parameters.items()}
        where = words.get("where")
        words["be"] = "are" if where and where.split()[0].endswith("s") else "is"
        text = next(text for text in self.wordings if fields(text) <= words.keys())
        return text.format(**words) + (f", in {where} only" if where and "where" not in fields(text) else "")

    @property
    def wordings(self) -> tuple[str, ...]:
        """The forms of its wording."""
        return (self.wording,) if isinstance(self.wording, str) else self.wording

    @property
    def multiplies(self) -> bool:
        """Whether it is a way of multiplying: it concerns all products, and moves values by whole steps."""
        return "dot" in self.changes


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A fault with its parameters.

    Attributes:
      fault: What is made.
      pairs: Sorted (parameter, value) pairs.
      within: The part of a stage that it is confined to; None is all of it.
      stage: The only stage that it is made at; "" is all that the fault is made at.
      layers: The layers that it is made in, None standing for what is outside; None is all that the stages tell.
    """

    fault: Fault
    pairs: tuple[tuple[str, Any], ...] = ()
    within: Region | None = None
    stage: str = ""
    layers: tuple[int | None, ...] | None = None

    @property
    def name(self) -> str:
        """The fault's name."""
        return self.fault.name

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return dict(self.pairs)

    @property
    def shown(self) -> dict[str, Any]:
        """The parameters, and what it is confined to."""
        if self.within is None:
            return self.parameters
        return {**self.parameters, "where": self.within.where, self.within.kind: self.within.indices}

    @property
    def everywhere(self) -> Mistake:
        """The same, in all of the stage."""
        return dataclasses.replace(self, within=None)

    def confined(self, within: Region, stage: str) -> Mistake:
        """Returns the same in one part of a stage only."""
        return dataclasses.replace(self, within=within, stage=stage)

    def at(self, stage: str) -> Mistake:
        """Returns the same at one stage only."""
        return dataclasses.replace(self, stage=stage)

    def made_at(self, key: Key | None) -> bool:
        """Whether it is made in the formula of a stage, if at all; None is a step outside of any."""
        layer, stage = (None, "") if key is None else (key.layer, key.stage)
        return (self.layers is None or layer in self.layers) and (not self.stage or self.stage == stage)

    def in_layers(self, *layers: int | None) -> Mistake:
        """Returns the same in some layers only."""
        return dataclasses.replace(self, layers=layers)

    def having(self, **parameters: Any) -> Mistake:
        """Returns the same with other parameters."""
        return dataclasses.replace(self, pairs=tuple(sorted(parameters.items())))

    def stages(self, replay: Any) -> tuple[str, ...]:
        """Returns the stages that it is made at."""
        if self.stage:
            return (self.stage,)
        if self.fault.among is not None:
            return self.fault.among(**self.parameters)
        stages = self.fault.stages
        return stages(replay, **self.parameters) if callable(stages) else stages

    def ways(self) -> tuple[Mistake, ...]:
        """Returns it in each of the ways in which engines make it; the commonest first."""
        others = self.fault.ways(**self.parameters)
        return (self, *(self.having(**self.parameters, **more) for more in others))


Mistakes = tuple[Mistake, ...]
"""A hypothesis: all of these are made."""


def names(mistakes: Mistakes) -> str:
    """The names of some mistakes in a phrase."""
    return " and ".join(sorted({mistake.name for mistake in mistakes}))
