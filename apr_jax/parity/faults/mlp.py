"""Mistakes of the MLP and of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy.special import erf

from apr_jax.parity.faults.record import Fault
from apr_jax.parity.question import Question
from apr_jax.parity.replay import NORMS, At, Replay, Value
from apr_jax.trace.stages import Key


def _gelu(x: Value) -> Value:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def _gelu_tanh(x: Value) -> Value:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _activation(name: str, wording: str, function: Callable[[Value], Value], formula: str) -> Fault:
    return Fault(name, wording, ("ffn_silu",), {"activation": lambda right, at: function}, formula=formula)


def _residual(name: str, stage: str, what: str) -> Fault:
    stream = {"stream": lambda x, at: np.zeros_like(x) if at.what == stage else x}
    update = "attn_out" if stage == "post_attn_residual" else "ffn_out"
    return Fault(name, f"the residual around {what} is missing", (stage,), stream, formula=f"y = {update}")


_READ = {"post_attn_residual": "attn_norm", "post_ffn_residual": "ffn_norm"}
"""The norm that a block reads, by the stage that adds its result."""


def _normed(x: Value, at: At) -> Value:
    return at.replay.get(at.layer, _READ[at.what])


def _updates(x: Value, at: At) -> Value:
    """What a block adds to the residual stream, without the stream."""
    if at.what == "ffn_norm":
        return at.replay.get(at.layer, "attn_out")
    before = at.replay.config.num_layers if at.layer is None else at.layer
    return _mlp_update(at.replay, before - 1) if before else x


def _mlp_update(replay: Replay, layer: int) -> Value:
    """What a layer's MLP adds, theirs or computed: as the mistakes have it unless their stream says that this layer was
    right. Its keys are no source of the stage that is computed, so that they are asked for at all positions."""
    update, stream = Key.of(layer, "ffn_out"), Key.of(layer, "post_ffn_residual")
    if replay.dumped(update) or not replay.dumped(stream):
        return replay.get(layer, "ffn_out")

    def right() -> Value | None:
        alone = replay.whole.under(())
        made = alone.get(layer, "ffn_out")
        theirs, tokens = alone.look("post_ffn_residual", replay.theirs[stream]), alone.tokens()
        off = np.linalg.norm((theirs - alone.get(layer, "post_attn_residual") - made)[tokens])
        return made if off <= _OFF * np.linalg.norm(made[tokens]) else None

    made = replay.remember(("right update", layer), right)
    return replay.look("ffn_out", replay.whole.get(layer, "ffn_out") if made is None else made)


_OFF = 0.01
"""Relative to the values: a stream that is off by less is not the cause of a norm that is wrong."""


def _of_the_norm_alone(question: Question, node: Key) -> Iterable[Mapping[str, Any]]:
    """Not where the stream itself has to be wrong: it was not dumped, and what else reads it is off as well."""
    if node == Key.of(0, "attn_norm"):
        return []
    probe, reader = question.probe, {norm: stage for stage, norm in _READ.items()}.get(node.stage)
    if reader is None or all(map(probe.dumped, probe.sources(node))):
        return [{}]
    key = Key.of(node.layer, reader)
    if key == question.key or not probe.dumped(key):
        return [{}]
    theirs, tokens = probe.look(reader, probe.theirs[key]), question.their_tokens()
    off = np.linalg.norm((theirs - probe.compute(key))[tokens])
    return [{}] if off <= _OFF * np.linalg.norm(theirs[tokens]) else []


FAULTS = (
    _activation("activation-gelu", "the activation is GELU (erf), not SiLU", _gelu, "y = gate · Φ(gate)"),
    _activation(
        "activation-gelu-tanh",
        "the activation is GELU (tanh), not SiLU",
        _gelu_tanh,
        "y = gate · (1 + tanh(√(2/π) (gate + 0.044715 gate³))) / 2",
    ),
    _activation(
        "activation-relu", "the activation is ReLU, not SiLU", lambda x: np.maximum(x, 0.0), "y = max(gate, 0)"
    ),
    Fault(
        "activation-on-up",
        "the activation is applied to up, not to gate",
        ("ffn_silu", "ffn_swigl"),
        {"gating": lambda pair, at: pair[::-1]},
        formula={"ffn_silu": "y = SiLU(up)", "ffn_swigl": "y = SiLU(up) · gate"},
    ),
    _residual("attention-residual-missing", "post_attn_residual", "attention"),
    _residual("mlp-residual-missing", "post_ffn_residual", "the MLP"),
    Fault(
        "residual-twice",
        "the residual is added twice",
        tuple(_READ),
        {"stream": lambda x, at: 2 * x},
        formula={"post_attn_residual": "y = 2 x + attn_out", "post_ffn_residual": "y = 2 x + ffn_out"},
    ),
    Fault(
        "residual-behind-norm",
        "the residual is taken behind the norm, not before it",
        tuple(_READ),
        {"stream": _normed},
        formula={
            "post_attn_residual": "y = RMSNorm(x) + attn_out",
            "post_ffn_residual": "y = RMSNorm(x) + ffn_out",
        },
    ),
    Fault(
        "norm-before-residual",
        "the norm is taken of what the block before it gives, before the residual is added",
        tuple(NORMS),
        {"norm_input": _updates},
        variants=_of_the_norm_alone,
        formula="{right}, of x before its residual was added",
    ),
)
