"""Mistakes of RMSNorm: its eps, its weight, a mean that is subtracted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax.parity import round_numbers
from apr_jax.parity.faults.record import UNION, Fault, Grid, Mistakes
from apr_jax.parity.question import Question
from apr_jax.parity.replay import NORMS, At, Value, norm_input, norm_name
from apr_jax.trace.stages import Key

_STAGES = tuple(NORMS)
_QUIET_ROWS = 64
"""How many positions eps is solved from: those of the smallest activations feel it most."""


def _epsilons(question: Question) -> Iterator[Mistakes]:
    """Other values of eps, from the rows of the smallest activations."""
    replay, stage, layer = question.all(), question.stage, question.layer
    x = replay.step("norm_input", norm_input(replay, layer, stage), layer, stage)[question.tokens]
    quiet = np.argsort((x * x).mean(axis=-1))[:_QUIET_ROWS]
    weight = replay.step("norm_weight", replay.held(layer, NORMS[stage]), layer, stage)
    theirs = np.asarray(question.theirs, np.float64)[question.tokens]
    for eps in _solve_eps(x[quiet], weight, theirs[quiet], replay.config.rms_norm_eps, question.nothing):
        yield (EPS.made(eps=eps, norms=(norm_name(stage),)),)


def _solve_eps(x: Value, weight: Value, theirs: Value, right: float, nothing: float) -> list[float]:
    """y = r w x with r = 1 / sqrt(mean square + eps): r is fitted for each row, and eps follows from it.

    As r is known to a relative `nothing`, eps is to twice that share of mean square + eps.
    """
    with np.errstate(all="ignore"):
        base = weight * x
        power = (base * base).sum(axis=-1)
        r = (theirs * base).sum(axis=-1) / power
        square = 1 / (r * r)
        eps = square - (x * x).mean(axis=-1)
        # Rows of small activations feel eps most: its error there is that of 1 / r^2.
        weights = square**-2.0
    good = np.isfinite(eps) & np.isfinite(weights)
    if not good.any():
        return []
    solved = float(np.average(eps[good], weights=weights[good]))
    if solved > 10 or abs(solved / right - 1) < 0.005:
        return []
    # What the rows leave open: values that they do not tell from the right one are no finding.
    spread = float(np.sqrt(np.average((eps[good] - solved) ** 2, weights=weights[good]) / good.sum()))
    if abs(solved - right) <= 3 * spread:
        return []
    return round_numbers.epsilons(solved, 2 * nothing * float(np.average(square[good], weights=weights[good])))


def _norms(question: Question | None, node: Key) -> Iterator[Mapping[str, Any]]:
    """One norm; or all of a gap, which are likelier to have one eps."""
    inside = [norm_name(other.stage) for other in (question.nodes if question else ()) if other.stage in NORMS]
    every = tuple(dict.fromkeys(inside))
    if len(every) > 1:
        yield {"norms": every}
    yield {"norms": (norm_name(node.stage),)}


def _eps(right: float, at: At, eps: float, norms: Sequence[str]) -> float:
    return eps if norm_name(at.what) in norms else right


EPS = Fault(
    "rms-norm-eps",
    "rms_norm eps is {eps:.6g} in {norms}",
    _STAGES,
    {"eps": _eps},
    solve=_epsilons,
    variants=_norms,
    grid=Grid("eps", tuple(10.0**power for power in range(-12, -1)), round_numbers.epsilons),
    merge={"norms": UNION},
    formula="y = w · x / √(mean(x²) + ε), ε = {eps:.6g}",
)


def _widths(question: Question) -> Iterator[Mistakes]:
    """How many of the first columns the mean square is taken of, from the one that each position was divided by."""
    replay, stage, layer = question.all(), question.stage, question.layer
    x = replay.step("norm_input", norm_input(replay, layer, stage), layer, stage)[question.tokens]
    base = replay.step("norm_weight", replay.held(layer, NORMS[stage]), layer, stage) * x
    theirs = np.asarray(question.theirs, np.float64)[question.tokens]
    with np.errstate(all="ignore"):
        square = ((base * base).sum(-1) / (theirs * base).sum(-1)) ** 2 - replay.config.rms_norm_eps
        sums, width = np.cumsum(x * x, axis=-1), x.shape[-1]
        for divisor, means in (("those", sums / np.arange(1, width + 1)), ("all", sums / width)):
            off = (np.abs(means - square[:, None]) / np.abs(square[:, None])).mean(axis=0)
            columns = int(np.argmin(np.nan_to_num(off, nan=np.inf))) + 1
            if columns < width:
                yield (PART_OF_WIDTH.made(columns=columns, divisor=divisor),)


def _part_of_width(right: Callable[[Value], Value], at: At, columns: int, divisor: str) -> Callable[[Value], Value]:
    return lambda x: right(x[..., :columns]) * (1 if divisor == "those" else columns / x.shape[-1])


def _customary_widths(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """Behind a gap: whole blocks of threads or lanes without what is left over, and half of the width."""
    width = question.replay.config.hidden_size
    whole = (width - width % block for block in (8, 16, 32, 64, 128, 256, 512, 1024))
    for columns in dict.fromkeys((*whole, width // 2)):
        if 0 < columns < width:
            yield from ({"columns": columns, "divisor": divisor} for divisor in ("all", "those"))


PART_OF_WIDTH = Fault(
    "norm-part-of-width",
    "the mean square is taken over the first {columns} columns only, and divided by the number of {divisor}",
    _STAGES,
    {"mean_square": _part_of_width},
    solve=_widths,
    variants=_customary_widths,
    alone=True,
    formula="y = w · x / √(Σ x[:{columns}]² / n + ε), n the number of {divisor}",
)
FAULTS = (
    Fault(
        "norm-weight-missing",
        "the norm's weight is missing",
        _STAGES,
        {"norm_weight": lambda weight, at: np.ones_like(weight)},
        formula="y = x / √(mean(x²) + ε)",
    ),
    Fault(
        "norm-weight-plus-one",
        "the norm multiplies by 1 + weight",
        _STAGES,
        {"norm_weight": lambda weight, at: 1 + weight},
        formula="y = (1 + w) · x / √(mean(x²) + ε)",
    ),
    Fault(
        "norm-mean-subtracted",
        "the norm subtracts the mean (LayerNorm)",
        _STAGES,
        {"norm_input": lambda x, at: x - x.mean(axis=-1, keepdims=True)},
        formula="y = w · (x − mean(x)) / √(mean((x − mean(x))²) + ε)",
    ),
    EPS,
    PART_OF_WIDTH,
    Fault(
        "final-norm-missing",
        "the final norm is missing",
        ("final_norm",),
        {"normed": lambda y, at: norm_input(at.replay, at.layer, at.what) if at.what == "final_norm" else y},
        formula="y = x",
    ),
)
