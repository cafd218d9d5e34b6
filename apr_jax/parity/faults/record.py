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

from apr_jax.trace.stages import Key

_SHOWN = 3
"""As many names are spelled out in a sentence."""

# How sightings of a mistake that differ in a parameter become one finding.
UNION = "union"
"""The values are listed."""
LEAST = "least"
"""The smallest is the one: sums no longer than a chunk do not tell how long it is."""
IGNORED = "ignored"
"""What a fault makes of rows that mean nothing: not said."""


def once(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """The variants of a fault without parameters."""
    del question, node
    yield {}


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def _shown(value: Any) -> Any:
    """Names in a row, or how many there are."""
    if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
        return value
    return ", ".join(value) if len(value) <= _SHOWN else f"{len(value)} of them ({value[0]}, ...)"


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
      merge: Parameter -> UNION, LEAST or IGNORED; those of others have to agree.
      slight: Whether it moves a product by a few percent at most, or by more; None where it may do either.
      in_weights: Whether a tensor is to blame.
      together: A parameter; behind a gap all variants that agree in it are also tried at once.
      ways: Further parameter sets in which engines make this variant, all under its one name.
      consists_of: Names of faults that, all made in one layer, are this one.
      hides: Names of faults that look made where this one is.
      beside_blocks: Whether engines do it on purpose where weights are quantised in blocks.
      unexplained: Whether it says what is seen, and not how it came about.
      mistake: Whether it is one; a layout is not.
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

    def __repr__(self) -> str:
        return f"Fault({self.name!r})"

    def made(self, **parameters: Any) -> Mistake:
        """Returns it with parameters."""
        return Mistake(self, tuple(sorted(parameters.items())))

    def said(self, parameters: Mapping[str, Any]) -> str:
        """Returns what is wrong, in words."""
        shown = {name: _shown(value) for name, value in parameters.items()}
        return next(text for text in self.wordings if _fields(text) <= shown.keys()).format(**shown)

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
    """

    fault: Fault
    pairs: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The fault's name."""
        return self.fault.name

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return dict(self.pairs)

    def stages(self, replay: Any) -> tuple[str, ...]:
        """Returns the stages that it is made at."""
        stages = self.fault.stages
        return stages(replay, **self.parameters) if callable(stages) else stages

    def ways(self) -> tuple[Mistake, ...]:
        """Returns it in each of the ways in which engines make it; the commonest first."""
        others = self.fault.ways(**self.parameters)
        return (self, *(self.fault.made(**self.parameters, **more) for more in others))


Mistakes = tuple[Mistake, ...]
"""A hypothesis: all of these are made."""


def names(mistakes: Mistakes) -> str:
    """The names of some mistakes in a phrase."""
    return " and ".join(sorted({mistake.name for mistake in mistakes}))
