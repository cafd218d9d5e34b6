"""What a family of causes hands over: a cause that was verified over all elements."""

from __future__ import annotations

import dataclasses
from typing import Any


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
