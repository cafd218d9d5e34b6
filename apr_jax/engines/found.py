"""What a reader finds in a dump, before it is fitted to a model: arrays by our keys, read once a bound is known."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping

import numpy as np

from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import Positions

Load = Callable[[int | None], np.ndarray]
"""Reads an array of at most so many elements; what is larger is refused before it is read."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One array of a dump.

    Attributes:
      load: Reads it.
      file: Where it lies, for messages.
      layout: The order of its axes, as docs/dumps.md names them; None is the stage's own.
      shaped: Whether its shape has to be the stage's own too, not only its number of elements.
      factor: What it is to be multiplied by.
    """

    load: Load
    file: str | os.PathLike[str]
    layout: str | None = None
    shaped: bool = False
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """A few numbers of a stage, where its values were not dumped.

    Attributes:
      numbers: "min", "max", "mean", "l2" or "sum" -> the number.
      elements: Of how many elements; None if that is not said.
    """

    numbers: Mapping[str, float]
    elements: int | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """A dump as it lies there.

    Attributes:
      stages: Trace key -> array.
      inputs: The batch, where the dump says it.
      positions: The positions of its rows, where it holds some only.
      dtype: What the engine says it computes in.
      weights_sha256: Of which weights it was made, as `golden.weights_sha256`.
      strangers: Names in the dump that are no stage.
      summaries: Trace key -> numbers of stages whose values are not there.
      origin: What it says of how it was made, as text.
      gradients: Key of a gradient (`stages.Key`) -> array.
      labels: The label of each place, as the loss is given them; None where the dump does not say.
      finish: What the tokens become once they are known from elsewhere: a dump may hold those that were generated.
    """

    stages: Mapping[str, Stage]
    inputs: Inputs | None = None
    positions: Positions | None = None
    dtype: str | None = None
    weights_sha256: str | None = None
    strangers: tuple[str, ...] = ()
    finish: Callable[[Inputs], tuple[Inputs, Positions | None]] | None = None
    summaries: Mapping[str, Summary] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gradients: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None


def of_array(array: np.ndarray, file: str | os.PathLike[str], layout: str | None = None, shaped: bool = False) -> Stage:
    """Returns a stage whose values are there already."""
    return Stage(lambda most: array, file, layout, shaped)
