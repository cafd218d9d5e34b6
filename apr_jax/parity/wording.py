"""Findings in words, as an engineer wants to read them: where, what, and how well that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.parity.faults.record import Fault
from apr_jax.trace.inputs import Inputs


def sentence(
    fault: Fault,
    layers: tuple[int, ...] | str,
    stage: str,
    parameters: Mapping[str, Any],
    before: float | None,
    after: float | None,
    note: str = "",
) -> str:
    """Says where, what, and how well that fits."""
    text = fault.said(parameters)
    if layers == "all":
        text = f"all layers, {stage}: {text}"
    elif layers:
        plural = "layer" if len(layers) == 1 else "layers"
        text = f"{plural} {', '.join(map(str, layers))}, {stage}: {text}"
    elif stage:
        text = f"{stage}: {text}"
    if note:
        text += f": {note}"
    if before is not None and after is not None:
        text += f" (off by {before:.1e} from the right values, by {after:.0e} from these)"
    elif before is not None:
        text += f" (off by {before:.1e})"
    return text


# --- What can be said where nothing fits -----------------------------------------------------------------------------


LARGEST_HALF = 65504.0
_ROUNDED_UP = 65520.0 * 1.005
"""What is larger is no float16, whatever sums that were rounded on the way came to."""


def overflows(theirs: np.ndarray, right: np.ndarray, multiplied: float = 1.0) -> bool:
    """Whether values are not finite where the right ones, times what an engine divides by later, pass float16.

    Args:
      theirs: The values of a stage.
      right: The right ones, 0 where nothing is compared.
      multiplied: The square root of a head's width for scores, whose products overflow before they are scaled.
    """
    bad, size = ~np.isfinite(theirs) & (right != 0), np.abs(right) * multiplied
    return bool(bad.any() and (size[bad] >= LARGEST_HALF / 1.005).all() and bad[size >= _ROUNDED_UP].all())


def where_not_finite(theirs: np.ndarray, right: np.ndarray) -> str:
    bad = ~np.isfinite(theirs)
    first = tuple(int(index) for index in np.argwhere(bad)[0])
    text = f"{int(bad.sum())} of {theirs.size} values are NaN or infinite, the first at {list(first)}"
    infinite = np.isinf(theirs)
    if infinite.any() and (np.abs(right[infinite]) >= LARGEST_HALF).all():
        text += f"; the right values there pass {LARGEST_HALF:.0f}, the largest of float16"
    return text


def places(inputs: Inputs, moved: np.ndarray, columns: np.ndarray) -> str:
    of = inputs.places()
    shown = [f"row {b} position {of[t]} holds {of[columns[b, t]]}" for b, t in np.argwhere(moved)[:3]]
    return ", ".join(shown) + (", ..." if moved.sum() > 3 else "")
