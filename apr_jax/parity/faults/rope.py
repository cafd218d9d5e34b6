"""Mistakes of rotary position embeddings, and of the biases around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.parity import rope_fit, round_numbers
from apr_jax.parity.faults.record import Fault, Grid, Mistake, Mistakes
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
    for turn in rope_fit.candidates(before, after, positions, replay.config.rope_theta):
        yield tuple(_named(turn, QKV[which]))


def _named(turn: rope_fit.Rotation, projection: str) -> Iterator[Mistake]:
    """The mistakes that a rotation consists of."""
    if turn.none:
        yield {"q_proj": NOT_ON_Q, "k_proj": NOT_ON_K}[projection].made()
        return
    if turn.adjacent:
        yield ADJACENT_PAIRS.made()
    if turn.half:
        yield HALF_DIMS.made()
    if turn.negated:
        yield SIGN.made()
    if turn.theta is not None:
        yield THETA.made(theta=turn.theta)
    if turn.shift:
        yield POSITION.made(shift=turn.shift)
    if turn.restart:
        yield POSITION.made(restart=turn.restart)


def _halved(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    if question.replay.config.head_dim % 4 == 0:
        yield {}


def _restarts(question: Question, node: Key) -> Iterator[Mapping[str, Any]]:
    """Behind a gap only powers of two are tried; a constant shift of q and k alike shows nowhere behind them."""
    last = int(question.replay.inputs.positions().max())
    yield from ({"restart": 1 << power} for power in range(2, last.bit_length()))


def _moved(turn: rope_fit.Rotation, at: At, shift: int = 0, restart: int = 0) -> rope_fit.Rotation:
    return dataclasses.replace(turn, shift=shift, restart=restart)


_BASES = (1e3, 3e3, 1e4, 2e4, 3e4, 5e4, 1e5, 1.5e5, 2e5, 3e5, 5e5, 7e5, 1e6, 1.5e6, 2e6, 3e6, 5e6, 8e6, 1e7, 3e7, 1e8)

ADJACENT_PAIRS = Fault(
    "rope-adjacent-pairs",
    "yours equals adjacent-pair RoPE (2i, 2i+1); the checkpoint needs split halves (i, i + d/2)",
    _STAGES,
    _set(adjacent=True),
    solve=rotations,
)
HALF_DIMS = Fault(
    "rope-half-dims",
    "only the first half of each head is rotated, as if head_dim were half",
    _STAGES,
    _set(half=True),
    solve=rotations,
    variants=_halved,
)
SIGN = Fault("rope-sign", "the RoPE angles are negated", _STAGES, _set(negated=True), solve=rotations)
THETA = Fault(
    "rope-theta",
    "the RoPE base is {theta:.6g}",
    _STAGES,
    {"rotation": lambda turn, at, theta: dataclasses.replace(turn, theta=theta)},
    solve=rotations,
    grid=Grid("theta", _BASES, round_numbers.near),
)
POSITION = Fault(
    "rope-position",
    ("positions are shifted by {shift:+d}", "positions restart every {restart}"),
    _STAGES,
    {"rotation": _moved},
    solve=rotations,
    variants=_restarts,
)
NOT_ON_Q = Fault(
    "rope-not-on-q",
    "q is not rotated",
    ("q_post_rope",),
    {"rotation": lambda turn, at: dataclasses.replace(turn, none=turn.none or at.what == "q_proj")},
    solve=rotations,
)
NOT_ON_K = Fault(
    "rope-not-on-k",
    "k is not rotated",
    ("k_post_rope",),
    {"rotation": lambda turn, at: dataclasses.replace(turn, none=turn.none or at.what == "k_proj")},
    solve=rotations,
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
)
FAULTS = (ADJACENT_PAIRS, HALF_DIMS, SIGN, THETA, POSITION, NOT_ON_Q, NOT_ON_K, BIAS_AFTER_ROPE)
