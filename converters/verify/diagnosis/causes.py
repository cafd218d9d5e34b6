"""The ways in which a tensor can come to differ from its original (causes), and what the search for them answers."""

from __future__ import annotations

import dataclasses
from typing import Any

# Every cause, the more telling one first: where several explain the same elements, the first is the answer and the
# others are its alternatives.
CAUSES = (
    "exact-cast",
    "relabelled-dtype",
    "byte-swapped",
    "swapped-tensors",
    "head-permuted",
    "qkv-order",
    "transposed",
    "rows-permuted",
    "columns-permuted",
    "rounded-cast",
    "scaled",
    "offset",
    "zeroed",
    "truncated",
    "zeroed-rows",
    "shifted",
    "quantised",
    "non-finite",
    "bit-flips",
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
    """

    cause: str
    parameters: dict[str, Any]
    explained: float
    alternatives: tuple[str, ...] = ()
    evidence: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """A cause that explains at least `pair.ACCEPTED` of the differing elements.

    Attributes:
      cause: Its name.
      parameters: As in `Cause`.
      explained: Measured share of the differing elements.
      evidence: In words.
      rank: Among several, the lowest is the answer; None: the cause's place in the list of causes.
    """

    cause: str
    parameters: dict[str, Any]
    explained: float
    evidence: str = ""
    rank: float | None = None
