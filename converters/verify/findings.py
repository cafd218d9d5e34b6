"""A finding of a comparison: one cause, and the tensors that it explains."""

from __future__ import annotations

import dataclasses
from typing import Any

from apr_jax.converters.verify.wording import cause_in_words


@dataclasses.dataclass(frozen=True)
class Finding:
    """One cause, and the tensors of which it is the cause.

    Attributes:
      cause: Its name.
      tensors: Whose.
      parameters: What is needed to repeat it, JSON values.
      explained: Share of the tensors' differing elements that it explains.
      alternatives: Causes that would explain the same.
      statistics: The figures behind it, in words.
    """

    cause: str
    tensors: tuple[str, ...]
    parameters: dict[str, Any]
    explained: float
    alternatives: tuple[str, ...] = ()
    statistics: str = ""

    @property
    def sentence(self) -> str:
        """What happened to which tensors, and how sure that is, in one line."""
        which = self.tensors[0] if len(self.tensors) == 1 else f"{len(self.tensors)} tensors"
        text = f"{which}: {cause_in_words(self.cause, self.parameters)}"
        if self.statistics:
            text += f" ({self.statistics})"
        if 0 < self.explained < 0.9995:
            text += f"; this explains {100 * self.explained:.4g} % of the differing elements"
        if self.alternatives:
            text += f"; it might as well be {' or '.join(self.alternatives)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Returns the finding as the stable JSON object."""
        return {
            "cause": self.cause,
            "tensors": list(self.tensors),
            "parameters": self.parameters,
            "explained": self.explained,
            "alternatives": list(self.alternatives),
            "sentence": self.sentence,
        }
