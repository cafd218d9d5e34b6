"""What can be said of a gradient that no known mistake explains."""

from __future__ import annotations

from typing import Any

import numpy as np

from apr_jax.parity import description
from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.search import Question
from apr_jax.parity.description import Description
from apr_jax.parity.faults.record import ranges
from apr_jax.parity.localise import Localisation

_FITS = 0.03
_CLOSE = 0.3


def describe(question: Question, closest: tuple[str, float] | None) -> Description:
    """Describes a wrong gradient: which parts of it are wrong, and what their values are.

    Args:
      question: The gradient.
      closest: The hypothesis that came nearest, and what share of the difference it leaves.
    """
    missing = [nodes.label_of(key, question.back.config) for key in question.gap[:-1]]
    if question.node.of_parameter:
        seen = _of_parameter(question)
        if closest is not None and closest[1] < _CLOSE:
            seen = _with(seen, f"closest is {closest[0]}, which leaves {closest[1]:.1%} of the difference")
    else:
        seen = _of_stage(question, closest)
    return _with(seen, f"not dumped before it: {', '.join(missing)}") if missing else seen


def _with(seen: Description, note: str) -> Description:
    return Description(seen.parameters, f"{seen.note}; {note}" if seen.note else note)


def _of_stage(question: Question, closest: tuple[str, float] | None) -> Description:
    judged = question.judged
    key = judged.site.key
    located = Localisation((judged.site,), {key: judged.right}, question.dtype, {key: judged.theirs}, {})
    return description.describe(question.back.config, question.back.forward.inputs, located, judged.site, closest)


def _of_parameter(question: Question) -> Description:
    theirs, right = question.judged.theirs, question.judged.right
    parameters: dict[str, Any] = {"tensor": nodes.tensor_of(question.node)[1]}
    off = float(np.linalg.norm(theirs - right))
    if not theirs.any():
        return Description(parameters, "theirs is all zero")
    power = float(np.vdot(right, right))
    gain = float(np.vdot(right, theirs)) / power if power else 0.0
    if off and np.linalg.norm(theirs - gain * right) <= _FITS * off:
        return Description(parameters, f"theirs is {gain:.6g} times the right value")
    rows = np.linalg.norm((theirs - right).reshape(len(right), -1), axis=-1)
    wrong = np.flatnonzero(rows > _row_budgets(question))
    if 0 < len(wrong) <= len(rows) // 2:
        noun = "row" if len(wrong) == 1 else "rows"
        parameters["where"] = f"{noun} {ranges(wrong.tolist())} of {len(rows)}"
        return Description(parameters | {"rows": tuple(wrong.tolist())}, _likeness(theirs[wrong], right[wrong]))
    return Description(parameters, _likeness(theirs, right))


def _row_budgets(question: Question) -> np.ndarray:
    return np.ravel(question.judged.site.row_budgets)


def _likeness(theirs: np.ndarray, right: np.ndarray) -> str:
    sizes = float(np.linalg.norm(theirs)), float(np.linalg.norm(right))
    if not all(sizes):
        return "theirs is zero there" if not sizes[0] else "the right value is zero there"
    cosine = float(np.vdot(theirs, right)) / (sizes[0] * sizes[1])
    return f"its cosine to the right value is {cosine:.4f}, its norm {sizes[0] / sizes[1]:.4g} times as large"
