"""Mistakes of rotary position embeddings, and of the biases around them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity import rope_fit, rope_rules, round_numbers
from apr_jax.parity.faults.record import IGNORED, Fault, Grid, Mistake, Mistakes
from apr_jax.parity.question import Question
from apr_jax.parity.replay import QKV, At, before_rotation, unjoin
from apr_jax.trace.stages import Key

_STAGES = ("q_post_rope", "k_post_rope")


def _set(**fields: Any) -> dict[str, Any]:
    """The change to a rotation that sets some of its fields."""
    return {"rotation": lambda turn, at: dataclasses.replace(turn, **fields)}


def rotations(question: Question) -> Iterator[Mistakes]:
    """Rotations that may turn q or k into theirs: each pair's turn is measured, whatever it is."""
    replay, which = question.all(), _STAGES.index(question.stage)
    before, late = before_rotation(replay, question.layer, which)
    after = unjoin(np.asarray(question.theirs, np.float64), replay.config) - late
    positions = np.where(question.tokens, replay.positions(), -1)
    for turn in rope_fit.candidates(before, after, positions, replay.right_rotation()):
        yield tuple(_named(turn, QKV[which]))


def _named(turn: rope_fit.Rotation, projection: str) -> Iterator[Mistake]:
    """The mistakes that a rotation consists of."""
    if turn.none:
        yield {"q_proj": NOT_ON_Q, "k_proj": NOT_ON_K}[projection].made()
        return
    if turn.adjacent:
        yield ADJACENT_PAIRS.made()
    if turn.part < 1:
        yield (
            HALF_DIMS.made() if (turn.part, turn.cut) == _HALF else PART_DIMS.made(share=turn.part, cut=_SAID[turn.cut])
        )
    if turn.negated:
        yield SIGN.made()
    if turn.theta is not None:
        yield THETA.made(theta=turn.theta)
    if turn.shift:
        yield POSITION.made(shift=turn.shift)
    if turn.restart:
        yield POSITION.made(restart=turn.restart)
    if turn.scaling == rope_fit.UNSCALED:
        yield NOT_SCALED.made()
    elif turn.scaling is not None:
        yield _scaling(turn.scaling)
    if turn.rounded:
        yield PRECISION.made(dtype=turn.rounded[0], what=turn.rounded[1])


def _scaling(rule: rope_rules.Rule) -> Mistake:
    ramp = {"original": rule.original} if rule.original else {}
    return SCALING.made(rule=rule.name, factor=rule.factor, **ramp)


_HALF = (0.5, "own")
_SAID = {
    "own": "those of a head of that width",
    "head": "the first of the whole head's",
    "sliced": "cos and sin of the whole head, sliced",
}


def _part(turn: rope_fit.Rotation, at: At, share: float, cut: str) -> rope_fit.Rotation:
    (kind,) = (kind for kind, said in _SAID.items() if said == cut)
    return dataclasses.replace(turn, part=share, cut=kind)


def _shares(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """Behind a gap customary shares are tried."""
    for share, cut in itertools.product(rope_fit.SHARES, rope_fit.CUTS):
        if (share, cut) != _HALF and question.replay.config.head_dim * share % 2 == 0:
            yield {"share": share, "cut": _SAID[cut]}


def _halved(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    if question.replay.config.head_dim % 4 == 0:
        yield {}


def _restarts(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """Behind a gap only powers of two are tried; a constant shift of q and k alike shows nowhere behind them."""
    last = int(question.replay.inputs.positions().max())
    yield from ({"restart": 1 << power} for power in range(2, last.bit_length()))


def _moved(turn: rope_fit.Rotation, at: At, shift: int = 0, restart: int = 0) -> rope_fit.Rotation:
    return dataclasses.replace(turn, shift=shift, restart=restart)


def _stretched(turn: rope_fit.Rotation, at: At, rule: str, factor: float, original: int = 0) -> rope_fit.Rotation:
    return dataclasses.replace(turn, scaling=rope_rules.Rule(rule, factor, original))


def _rules(question: Question | None, node: Key) -> Iterator[Mapping[str, Any]]:
    """Behind a gap the customary factors are tried, and that of "linear" is solved for."""
    if question is None:
        return
    factors = rope_rules.FACTORS if question.response is not None else rope_rules.FACTORS[:3]
    rules = [rope_rules.Rule(rule, factor) for rule in ("linear", "ntk") for factor in factors]
    yield from (_scaling(rule).parameters for rule in [*rules, *rope_rules.customary(question.replay.config, factors)])
    yield {"rule": "linear"}


_WITH = {
    "tables": ((),),
    "inv_freq": ((), ("tables",)),
    "angles": ((), ("tables",), ("inv_freq",), ("inv_freq", "positions"), ("inv_freq", "positions", "tables")),
}
"""What engines round besides, where they round one thing."""


def _rounded(
    turn: rope_fit.Rotation, at: At, what: str, dtype: str, besides: tuple[str, ...] = ()
) -> rope_fit.Rotation:
    return dataclasses.replace(turn, rounded=(dtype, what, *besides))


def _precisions(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    yield from ({"what": what, "dtype": dtype} for what in _WITH for dtype in ("bfloat16", "float16"))


ADJACENT_PAIRS = Fault(
    "rope-adjacent-pairs",
    "yours equals adjacent-pair RoPE (2i, 2i+1); the checkpoint needs split halves (i, i + d/2)",
    _STAGES,
    _set(adjacent=True),
    solve=rotations,
    formula="(y[2i], y[2i + 1]) = R(t · θ^(−2i/d)) (x[2i], x[2i + 1])",
)
HALF_DIMS = Fault(
    "rope-half-dims",
    "only the first half of each head is rotated, as if head_dim were half",
    _STAGES,
    _set(part=0.5),
    solve=rotations,
    variants=_halved,
    formula="(y[i], y[i + d/4]) = R(t · θ^(−4i/d)) (x[i], x[i + d/4]) for i < d/4; y[d/2:] = x[d/2:]",
)
SIGN = Fault(
    "rope-sign",
    "the RoPE angles are negated",
    _STAGES,
    _set(negated=True),
    solve=rotations,
    formula="(y[i], y[i + d/2]) = R(−t · θ^(−2i/d)) (x[i], x[i + d/2])",
)
PART_DIMS = Fault(
    "rope-part-dims",
    "only the first {share:.4g} of each head's dimensions are rotated, by frequencies that are {cut}",
    _STAGES,
    {"rotation": _part},
    solve=rotations,
    variants=_shares,
    alone=True,
    formula="{right} for i < {share:.4g} d/2 only, frequencies {cut}; the rest of y is x",
)
THETA = Fault(
    "rope-theta",
    "the RoPE base is {theta:.6g}",
    _STAGES,
    {"rotation": lambda turn, at, theta: dataclasses.replace(turn, theta=theta)},
    solve=rotations,
    grid=Grid("theta", rope_fit.BASES, round_numbers.near),
    formula="(y[i], y[i + d/2]) = R(t · θ^(−2i/d)) (x[i], x[i + d/2]), θ = {theta:.6g}",
)
POSITION = Fault(
    "rope-position",
    ("positions are shifted by {shift:+d}", "positions restart every {restart}"),
    _STAGES,
    {"rotation": _moved},
    solve=rotations,
    variants=_restarts,
    formula=(
        "(y[i], y[i + d/2]) = R((t {shift:+d}) · θ^(−2i/d)) (x[i], x[i + d/2])",
        "(y[i], y[i + d/2]) = R((t mod {restart}) · θ^(−2i/d)) (x[i], x[i + d/2])",
    ),
)
NOT_ON_Q = Fault(
    "rope-not-on-q",
    ("{where} {be} not rotated", "q is not rotated"),
    ("q_post_rope",),
    {"rotation": lambda turn, at: dataclasses.replace(turn, none=turn.none or at.what == "q_proj")},
    solve=rotations,
    formula="y = x",
)
NOT_ON_K = Fault(
    "rope-not-on-k",
    ("{where} {be} not rotated", "k is not rotated"),
    ("k_post_rope",),
    {"rotation": lambda turn, at: dataclasses.replace(turn, none=turn.none or at.what == "k_proj")},
    solve=rotations,
    formula="y = x",
)
SCALING = Fault(
    "rope-scaling",
    (
        "RoPE is scaled ({rule}, factor {factor:.6g}, from {original} positions); the checkpoint does not ask for that",
        "RoPE is scaled ({rule}, factor {factor:.6g}); the checkpoint does not ask for that",
    ),
    _STAGES,
    {"rotation": _stretched},
    solve=rotations,
    variants=_rules,
    grid=Grid("factor", (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0), round_numbers.near),
    merge={"original": IGNORED},
    alone=True,
    formula="{right}, angles by {rule} with factor {factor:.6g}",
)
NOT_SCALED = Fault(
    "rope-unscaled",
    "RoPE is plain; the configuration asks for a rule that scales it",
    _STAGES,
    _set(scaling=rope_fit.UNSCALED),
    solve=rotations,
    variants=lambda question, node: [{}] if question.replay.config.rope_scaling is not None else [],
    alone=True,
    formula="(y[i], y[i + d/2]) = R(t · θ^(−2i/d)) (x[i], x[i + d/2]), as if there were no rule",
)
PRECISION = Fault(
    "rope-precision",
    "RoPE is less precise than float32: {what} in {dtype}",
    _STAGES,
    {"rotation": _rounded},
    solve=rotations,
    variants=_precisions,
    alone=True,
    ways=lambda what, dtype: tuple({"besides": besides} for besides in _WITH[what][1:]),
    formula="{right}, {what} rounded to {dtype}",
)
BIAS_AFTER_ROPE = Fault(
    "bias-after-rope",
    "the q and k biases are added after RoPE",
    ("qkv_bias", *_STAGES),
    {
        "early_bias": lambda bias, at: bias if at.what == "v_proj" else np.zeros_like(bias),
        "late_bias": lambda late, at: at.replay.bias(at.layer, at.what),
    },
    variants=lambda question, node: [{}] if node.stage in _STAGES else [],
    hides=("q-bias-missing", "k-bias-missing"),
    formula="y = R(x Wᵀ) + b",
)
FAULTS = (
    ADJACENT_PAIRS,
    HALF_DIMS,
    PART_DIMS,
    SIGN,
    THETA,
    POSITION,
    NOT_ON_Q,
    NOT_ON_K,
    SCALING,
    NOT_SCALED,
    PRECISION,
    BIAS_AFTER_ROPE,
)
