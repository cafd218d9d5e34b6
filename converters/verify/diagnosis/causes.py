"""The ways in which a tensor can come to differ from its original (causes), and what the search for them answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Every cause, the more telling one first: where several explain the same elements, the first is the answer and the
# others are its alternatives.
CAUSES = (
    "exact-cast",
    "merged-adapter",
    "relabelled-dtype",
    "byte-swapped",
    "swapped-tensors",
    "head-permuted",
    "qkv-order",
    "transposed",
    "rows-permuted",
    "columns-permuted",
    "rows-added",
    "rows-removed",
    "columns-added",
    "columns-removed",
    "heads-repeated",
    "rounded-cast",
    "mantissa-cut",
    "scaled",
    "offset",
    "zero-signs",
    "zeroed",
    "truncated",
    "zeroed-rows",
    "scaled-rows",
    "rescaled-channels",
    "shifted",
    "quantised",
    "non-finite",
    "bit-flips",
    "low-rank",
    "changed-rows",
    "different-weights",
)


@dataclasses.dataclass(frozen=True)
class Cause:
    """How a tensor came to differ from its original.

    Attributes:
      cause: One of `CAUSES`.
      parameters: JSON values that say which: which shift, permutation, type, bit. Tensors that met the same fate have
        equal parameters.
      explained: Measured share, 0 to 1, of the differing elements that have exactly the value that the cause gives
        them. 1.0 for an exact cast, 0.0 for `different-weights`, which explains nothing.
      alternatives: Other causes that explain these elements as well and cannot be told apart from this one.
      evidence: The same in words and figures, for this tensor.
      readings: Parameters that describe this tensor as well.
      factors: Of `rescaled-channels`, by axis the factor of each row (0) or column (1).
    """

    cause: str
    parameters: dict[str, Any]
    explained: float
    alternatives: tuple[str, ...] = ()
    evidence: str = ""
    readings: tuple[dict[str, Any], ...] = ()
    factors: Mapping[int, np.ndarray] | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Found:
    """A cause that explains at least `pair.ACCEPTED` of the differing elements.

    Attributes:
      cause: Its name.
      parameters: As in `Cause`.
      explained: Measured share of the differing elements.
      evidence: In words.
      rank: Among several, the lowest is the answer; None: the cause's place in the list of causes.
      alternatives: What else it might be called.
      readings: Parameters that describe this tensor as well; which ones are the model's, its other tensors say.
      factors: Of `rescaled-channels`, by axis the factor of each row (0) or column (1).
    """

    cause: str
    parameters: dict[str, Any]
    explained: float
    evidence: str = ""
    rank: float | None = None
    alternatives: tuple[str, ...] = ()
    readings: tuple[dict[str, Any], ...] = ()
    factors: Mapping[int, np.ndarray] | None = dataclasses.field(default=None, compare=False, repr=False)
