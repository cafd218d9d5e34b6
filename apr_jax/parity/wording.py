"""Findings in words, as an engineer wants to read them: where, what, and how well that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.parity.faults.record import Fault


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


_LARGEST_HALF = 65504.0


def where_not_finite(theirs: np.ndarray, right: np.ndarray) -> str:
    bad = ~np.isfinite(theirs)
    first = tuple(int(index) for index in np.argwhere(bad)[0])
    text = f"{int(bad.sum())} of {theirs.size} values are NaN or infinite, the first at {list(first)}"
    infinite = np.isinf(theirs)
    if infinite.any() and (np.abs(right[infinite]) >= _LARGEST_HALF).all():
        text += f"; the right values there pass {_LARGEST_HALF:.0f}, the largest of float16"
    return text


def places(moved: np.ndarray, columns: np.ndarray) -> str:
    shown = [f"row {b} position {t} holds {columns[b, t]}" for b, t in np.argwhere(moved)[:3]]
    return ", ".join(shown) + (", ..." if moved.sum() > 3 else "")
