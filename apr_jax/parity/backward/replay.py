"""Recomputes any gradient of a backward pass in float64 from another engine's dump: right, or with mistakes made.

A gradient is computed from the gradients behind it and from the values of the forward pass, both the other side's own;
what it did not dump is computed first, so that a mistake shows across a gap. Each kind of gradient has one formula, the
vector-Jacobian product of the formula in `parity.replay`, written in steps that a fault of the table changes. The
forward values and the steps they were made in are those of a `Replay` with the mistakes that were found in the forward
pass: the right backward pass of a wrong forward pass is the one that is consistent with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.adapters import LowRank
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, Qwen2Config
from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.loss import Loss
from apr_jax.parity.faults.record import Mistake, Mistakes
from apr_jax.parity.replay import (
    NORMS,
    PRODUCTS,
    QKV,
    Replay,
    Value,
    head_name,
    join_heads,
    mean_square,
    product,
    silu,
    split_heads,
    unjoin,
)
from apr_jax.parity.rope_fit import Rotation
from apr_jax.trace.stages import GRADIENT, LOGITS, Key

Formula = Callable[["Backward", int | None], Value]
"""Computes a kind of gradient of a layer; asks for the gradients that it is made from."""


@dataclasses.dataclass(frozen=True)
class Backward:
    """Everything that a gradient can be computed from.

    Attributes:
      forward: The other side's forward values, and its formulas.
      adapter: Name of a weight -> what a low-rank adapter adds to it.
      made_before: Stage -> the mistakes of the forward pass that are made at it.
      loss: What is differentiated.
      theirs: The other side's gradients.
      made: The mistakes that are made in the backward pass.
      supposed: Those of them that are tried, and not believed yet.
      layer: The layer whose formula is at work.
      rows: The rows of the batch that gradients of parameters are summed over; None is all.
      dtype: What is computed in; narrower than float64 it shows what rounding does.
      kept: What was computed and does not depend on `supposed`.
      composed: What does.
    """

    forward: Replay
    loss: Loss
    theirs: Mapping[str, np.ndarray]
    adapter: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)
    made_before: Mapping[Key, Mistakes] = dataclasses.field(default_factory=dict)
    made: Mistakes = ()
    supposed: Mistakes = ()
    layer: int | None = None
    rows: slice | None = None
    dtype: str = "float64"
    kept: dict[Key, Value] = dataclasses.field(default_factory=dict)
    composed: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Qwen2Config:
        """The model's configuration."""
        return self.forward.config

    def compute(self, key: str) -> Value:
        """Computes one gradient from the other side's values, with the mistakes that are made."""
        return self._made(Key(key))

    def believing(self, mistakes: Mistakes) -> Backward:
        """Returns the replay in which these mistakes are made too; what they do not reach is not computed again."""
        probe = self.supposing(mistakes)
        kept = {key: value for key, value in self.kept.items() if not probe._depends(key)}
        return dataclasses.replace(probe, supposed=(), kept=kept, composed={})

    def supposing(self, mistakes: Mistakes) -> Backward:
        """Returns the replay in which these are made too, to see what becomes of it."""
        return dataclasses.replace(self, made=(*self.made, *mistakes), supposed=mistakes, composed={})

    def step(self, name: str, value: Any, layer: int | None = None, what: str = "") -> Any:
        """Returns what the mistakes that are made turn the right value of a step into."""
        for mistake in self.made:
            change = mistake.fault.changes.get(name)
            if change and (mistake.layers is None or self.layer in mistake.layers):
                value = change(value, Place(self, layer, what), **mistake.parameters)
        return value

    # --- Gradients -----------------------------------------------------------------------------------------------

    def get(self, layer: int | None, stage: str) -> Value:
        """Returns the gradient of a stage, float64: theirs, or computed where they lack it."""
        return self._get(nodes.of_stage(layer, stage))

    def of_input(self, layer: int | None) -> Value:
        """Returns the gradient of a layer's input, or (None) of what the final norm is taken of."""
        return self._get(nodes.of_input(self.config, layer))

    def _get(self, key: Key) -> Value:
        if key in self.theirs:
            return self.cast(self.theirs[key])
        # From the loss on, so that a long gap is no deep recursion.
        for other in self.gap(key):
            store: dict[Any, Any] = self.composed if self._depends(other) else self.kept
            if other not in store:
                store[other] = self._made(other)
        return store[key]

    def _depends(self, key: Key) -> bool:
        """Whether what is supposed reaches a gradient that was not dumped: itself, or by way of those before it."""
        known = ("reached", key)
        if known not in self.composed:
            self.composed[known] = any(self.makes(mistake, node) for node in self.gap(key) for mistake in self.supposed)
        return bool(self.composed[known])

    def makes(self, mistake: Mistake, key: Key) -> bool:
        """Whether a mistake changes the formula of a gradient."""
        where = mistake.layers is None or nodes.layer_of(key, self.config) in mistake.layers
        return where and nodes.kind_of(key, self.config) in mistake.stages(self)

    def _made(self, key: Key) -> Value:
        layer = nodes.layer_of(key, self.config)
        here = dataclasses.replace(self, layer=layer)
        kind = nodes.kind_of(key, self.config)
        if key.of_parameter:
            layer, name = nodes.tensor_of(key)
            return self.cast(here.step("parameter", here.over_rows(key, None), layer, name))
        return self.cast(here.step("gradient", FORMULAS[kind](here, layer), layer, kind))

    def over_rows(self, key: Key, rows: slice | None) -> Value:
        """Returns the gradient of a parameter, summed over some rows of the batch: those of a micro-batch."""
        layer, name = nodes.tensor_of(key)
        kind = nodes.kind_of(key, self.config)
        return PARAMETERS[kind](dataclasses.replace(self, rows=rows), layer, name)

    def some(self, value: Value) -> Value:
        """Returns the rows of the batch that a parameter's gradient is summed over."""
        return value if self.rows is None else value[self.rows]

    def gap(self, key: Key) -> list[Key]:
        """Returns a gradient and those that have to be computed before it because they were not dumped, in order."""
        known = ("gap", key)
        if known not in self.forward.memo:
            found: dict[Key, None] = {}

            def visit(at: Key) -> None:
                for source in nodes.sources_for(at, key, self.config):
                    if source not in found and source not in self.theirs:
                        visit(source)
                found[at] = None

            visit(key)
            self.forward.memo[known] = list(found)
        return self.forward.memo[known]

    # --- Values of the forward pass ------------------------------------------------------------------------------

    def at(self, layer: int | None, stage: str) -> Replay:
        """Returns the forward replay with the mistakes that are made at a stage."""
        made = self.made_before.get(Key.of(layer, stage), ())
        return dataclasses.replace(self.forward, made=made, making=None, at=Key.of(layer, stage), composed={})

    def value(self, layer: int | None, stage: str) -> Value:
        """Returns a stage's value as the backward pass has it, float64; what is not finite is 0."""
        return self._stored(self.step("stored", self.forward, layer, stage).get(layer, stage))

    def stream(self, layer: int | None) -> Value:
        """Returns the input of a layer, or (None) of the final norm, as the backward pass has it."""
        return self._stored(self.step("stored", self.forward, layer, "input").residual(layer))

    def normed_of(self, layer: int | None, stage: str) -> Value:
        """Returns what a norm is taken of."""
        if stage == "ffn_norm":
            return self.value(layer, "post_attn_residual")
        return self.stream(layer)

    def _stored(self, value: Value) -> Value:
        # At padding an engine may have anything; no gradient comes from there.
        return self.cast(value if np.isfinite(value).all() else np.where(np.isfinite(value), value, 0.0))

    def cast(self, value: Any) -> Value:
        """Returns a value as `dtype` holds it: float64, or float32 that is rounded to what is narrower."""
        if self.dtype in ("float64", "float32"):
            return np.asarray(value, self.dtype)
        return np.asarray(value, np.float32).astype(ml_dtypes.finfo(self.dtype).dtype).astype(np.float32)

    def visible(self, layer: int | None) -> np.ndarray:
        """Which keys each query of a layer sees, bool [B, 1, T, S]."""
        stages = (Key.of(layer, stage) for stage in ("attn_scores", "attn_softmax"))
        made = dict.fromkeys(mistake for key in stages for mistake in self.made_before.get(key, ()))
        at = Key.of(layer, "attn_scores")
        forward = dataclasses.replace(self.forward, made=tuple(made), making=None, at=at, composed={})
        return forward.visible(layer)[:, None]


class Place(NamedTuple):
    """Where a step is taken: the replay, the layer (None outside the layers), and the tensor, kind or part."""

    replay: Backward
    layer: int | None
    what: str


def _along_mean(x: Value) -> Value:
    return x.mean(axis=-1, keepdims=True)


# --- Gradients of stages ---------------------------------------------------------------------------------------------


def _logits(back: Backward, layer: int | None) -> Value:
    loss = back.step("loss", back.loss)
    return loss.gradient(back.value(None, LOGITS))


def _final_norm(back: Backward, layer: int | None) -> Value:
    name = head_name(back.config)
    weight = back.at(None, LOGITS).matrix(None, name)
    return _through(back, back.get(None, LOGITS), weight, None, name)


def _through(back: Backward, gradient: Value, weight: Value, layer: int | None, name: str) -> Value:
    """The gradient of what is multiplied with a weight [out, in]."""
    held = back.step("merged_back", weight, layer, name)
    return back.cast(product(gradient, back.cast(back.step("multiplied_back", held, layer, name)).T))


def norm_factor(back: Backward, layer: int | None, stage: str) -> tuple[Value, Value]:
    """Returns what a norm is taken of, and 1 / rms of each position, [B, T, 1]."""
    x = back.normed_of(layer, stage)
    eps = back.at(layer, stage).step("eps", back.config.rms_norm_eps, layer, stage)
    return x, 1 / np.sqrt(mean_square(x) + x.dtype.type(back.step("norm_eps", eps, layer, stage)))


def _through_norm(back: Backward, layer: int | None, stage: str) -> Value:
    """r (w g - x r^2 mean(w g x)), r = 1 / rms."""
    forward = back.at(layer, stage)
    weight = forward.step("norm_weight", forward.held(layer, NORMS[stage]), layer, stage)
    x, r = norm_factor(back, layer, stage)
    g = back.cast(back.cast(back.step("norm_weighted", weight, layer, stage)) * back.get(layer, stage))
    projection = x * r * r * _along_mean(g * x)
    return back.cast(r * (g - back.step("norm_projection", projection, layer, stage)))


def _output(back: Backward, layer: int | None) -> Value:
    return _through_norm(back, None, "final_norm")


def _input(back: Backward, layer: int | None) -> Value:
    along = _along_residual(back, layer, "post_attn_residual", back.get(layer, "post_attn_residual"))
    branch = _through_norm(back, layer, "attn_norm")
    return along + back.step("branch", branch, layer, "attention")


def _post_attn_residual(back: Backward, layer: int | None) -> Value:
    along = _along_residual(back, layer, "post_ffn_residual", back.get(layer, "post_ffn_residual"))
    branch = _through_norm(back, layer, "ffn_norm")
    return along + back.step("branch", branch, layer, "mlp")


def _along_residual(back: Backward, layer: int | None, stage: str, gradient: Value) -> Value:
    times = back.cast(back.at(layer, stage).step("stream", np.ones(1), layer, stage))
    return back.step("along", times * gradient, layer, "attention" if stage == "post_attn_residual" else "mlp")


def _same(stage: str, back: Backward, layer: int | None) -> Value:
    return back.get(layer, stage)


def _before_product(stage: str, back: Backward, layer: int | None) -> Value:
    """The gradient of what one product reads: attention, ffn_swigl."""
    name = PRODUCTS[stage][1]
    return _through(back, back.get(layer, stage), back.at(layer, stage).matrix(layer, name), layer, name)


def _gating(back: Backward, layer: int | None) -> tuple[str, str]:
    """What the activation is taken of, and what it is multiplied with."""
    source, other = back.at(layer, "ffn_silu").step("gating", ("ffn_gate", "ffn_up"))
    return source, other


def _silu(back: Backward, layer: int | None) -> Value:
    other = back.value(layer, _gating(back, layer)[1])
    return back.get(layer, "ffn_swigl") * back.step("silu_factor", other, layer)


def _gate_or_up(stage: str, back: Backward, layer: int | None) -> Value:
    """Through the activation for the one that it is taken of, and beside it for the other."""
    stage = back.step("gate_or_up", stage, layer)
    source, _ = _gating(back, layer)
    if stage != source:
        return back.get(layer, "ffn_swigl") * back.step("up_factor", back.value(layer, "ffn_silu"), layer)
    function = back.at(layer, "ffn_silu").step("activation", silu)
    derivative = back.step("derivative", silu_derivative if function is silu else partial(_slope, function), layer)
    return back.get(layer, "ffn_silu") * back.cast(derivative(back.value(layer, source)))


def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def silu_derivative(x: Value) -> Value:
    """The derivative of x sigmoid(x)."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def _slope(function: Callable[[Value], Value], x: Value) -> Value:
    """A derivative that is written nowhere: that of an activation that the forward pass has by mistake."""
    h = 1e-5 * np.maximum(1.0, np.abs(x))
    return (function(x + h) - function(x - h)) / (2 * h)


def _ffn_norm(back: Backward, layer: int | None) -> Value:
    parts = []
    for stage in ("ffn_gate", "ffn_up"):
        name = PRODUCTS[stage][1]
        weight = back.at(layer, stage).matrix(layer, name)
        part = _through(back, back.get(layer, stage), weight, layer, name)
        parts.append(back.step("fan_in", part, layer, name))
    return parts[0] + parts[1]


def _attn_norm(back: Backward, layer: int | None) -> Value:
    whole: Value | float = 0.0
    for name, gradient in zip(QKV, _projections(back, layer, "qkv_matmul"), strict=True):
        name = f"self_attn.{name}.weight"
        part = _through(back, gradient, back.at(layer, "qkv_matmul").held(layer, name), layer, name)
        whole = whole + back.step("fan_in", part, layer, name)
    return np.asarray(whole)


def _projections(back: Backward, layer: int | None, stage: str) -> list[Value]:
    """The gradients of q, k and v [B, T, C], of the stage that holds all three."""
    return [join_heads(part) for part in split_heads(back.get(layer, stage), back.config)]


def _weights(back: Backward, layer: int | None, what: str) -> Value:
    """The attention weights that the backward pass has, for the gradient of `what`: scores or v."""
    return back.step("weights", back.value(layer, "attn_softmax"), layer, what)


def _softmax(back: Backward, layer: int | None) -> Value:
    forward = back.at(layer, "attention")
    gradient = unjoin(back.get(layer, "attention"), back.config).swapaxes(1, 2)
    v = forward.step("v_heads", split_heads(back.value(layer, "qkv_bias"), back.config)[2])
    return gradient @ v[:, :, forward.kv_heads()].transpose(0, 2, 3, 1)


def _scores(back: Backward, layer: int | None) -> Value:
    """p (g - sum(p g)) over the keys that a query sees."""
    shares, gradient = _weights(back, layer, "scores"), back.get(layer, "attn_softmax")
    unseen = ~np.broadcast_to(back.visible(layer), shares.shape)
    # What is not seen has no gradient: an engine may show anything there.
    gradient = np.where(unseen, _softmax(back, layer) if shares[unseen].any() else 0.0, gradient)
    seen = np.asarray(back.at(layer, "attn_softmax").step("summed", back.visible(layer)))
    total = (back.value(layer, "attn_softmax") * gradient).sum(-1, keepdims=True)
    # What is not seen has shares by mistake only, and is then treated as what is.
    return shares * (gradient - back.step("row_sum", (seen | unseen) * total, layer))


def _rotated(which: int, back: Backward, layer: int | None) -> Value:
    """The gradient of rotated queries (0) or keys (1)."""
    forward = back.at(layer, "attn_scores")
    scale = float(back.step("scale_back", forward.step("scale", _scale(back)), layer, "qk"[which]))
    gradient = back.cast(back.get(layer, "attn_scores") * scale)
    group = forward.kv_heads()
    if which == 0:
        k = unjoin(back.value(layer, "k_post_rope"), back.config)[:, :, group].swapaxes(1, 2)
        return join_heads((gradient @ k).swapaxes(1, 2))
    q = unjoin(back.value(layer, "q_post_rope"), back.config).swapaxes(1, 2)
    return _grouped(back, layer, gradient.swapaxes(2, 3) @ q, group, "k")


def _scale(back: Backward) -> float:
    return float(back.config.head_dim**-0.5)


def _grouped(back: Backward, layer: int | None, per_head: Value, group: np.ndarray, what: str) -> Value:
    """Sums what the query heads [B, N, S, H] of each KV head have, [B, S, K H]."""
    heads = per_head.swapaxes(1, 2)
    gather = back.step("group", np.sum, layer, what)
    heads = back.cast(heads)
    parts = [gather(heads[:, :, group == kv], axis=2) for kv in range(back.config.num_kv_heads)]
    return np.concatenate(parts, axis=-1)


def _qkv(back: Backward, layer: int | None) -> Value:
    config = back.config
    turned = [_unturned(back, layer, which) for which in (0, 1)]
    forward = back.at(layer, "attention")
    gradient = unjoin(back.get(layer, "attention"), config).swapaxes(1, 2)
    values = _weights(back, layer, "v").swapaxes(2, 3) @ gradient
    v = _grouped(back, layer, values, forward.kv_heads(), "v")
    if forward.step("v_heads", np.arange(config.num_kv_heads)[None, None])[0, 0, 0] != 0:
        v = join_heads(unjoin(v, config)[:, :, ::-1])
    return np.concatenate([*turned, v], axis=-1)


def _unturned(back: Backward, layer: int | None, which: int) -> Value:
    """The gradient of queries or keys before their rotation: rotated backwards."""
    stage = ("q_post_rope", "k_post_rope")[which]
    forward, name = back.at(layer, stage), QKV[which]
    turn = back.step("turn", forward.step("rotation", Rotation(), layer, name), layer, name)
    gradient = unjoin(back.get(layer, stage), back.config)
    if turn.none:
        return join_heads(gradient)
    turns = turn.turns(forward.positions(), back.config.head_dim, forward.right_rotation())
    (cos, sin) = turns
    backwards = np.stack([cos, -sin[::-1]])
    # As engines do it: each product is rounded, and so is their sum.
    return join_heads(_turned(back, turn, gradient, back.cast(back.step("turns", backwards, layer, name))))


def _turned(back: Backward, turn: Rotation, gradient: Value, turns: Value) -> Value:
    if back.dtype == "float64":
        return turn.turned(gradient, turns)
    (cos, sin), nothing = turns, np.zeros_like(turns[0])
    parts = (back.cast(turn.turned(gradient, np.stack(pair))) for pair in ((cos, nothing), (nothing, sin)))
    return np.asarray(sum(parts))


FORMULAS: Mapping[str, Formula] = {
    "grad.logits": _logits,
    "grad.final_norm": _final_norm,
    nodes.OUTPUT: _output,
    nodes.INPUT: _input,
    "grad.ffn_out": partial(_same, "post_ffn_residual"),
    "grad.ffn_swigl": partial(_before_product, "ffn_out"),
    "grad.ffn_silu": _silu,
    "grad.ffn_up": partial(_gate_or_up, "ffn_up"),
    "grad.ffn_gate": partial(_gate_or_up, "ffn_gate"),
    "grad.ffn_norm": _ffn_norm,
    "grad.post_attn_residual": _post_attn_residual,
    "grad.attn_out": partial(_same, "post_attn_residual"),
    "grad.attention": partial(_before_product, "attn_out"),
    "grad.attn_softmax": _softmax,
    "grad.attn_scores": _scores,
    "grad.q_post_rope": partial(_rotated, 0),
    "grad.k_post_rope": partial(_rotated, 1),
    "grad.qkv_bias": _qkv,
    "grad.qkv_matmul": partial(_same, "qkv_bias"),
    "grad.attn_norm": _attn_norm,
}
"""Kind of a stage's gradient -> its formula."""


def sizes(back: Backward, key: Key) -> Value | None:
    """Returns the sizes of what a stage's gradient adds up, where that may cancel; None where it does not."""
    layer, kind = nodes.layer_of(key, back.config), nodes.kind_of(key, back.config)
    if kind == "grad.attn_scores":
        shares, gradient = back.value(layer, "attn_softmax"), np.abs(back.get(layer, "attn_softmax"))
        return shares * (gradient + (shares * gradient).sum(-1, keepdims=True))
    around = {nodes.INPUT: ("post_attn_residual", "attn_norm"), nodes.OUTPUT: (None, "final_norm")}
    around["grad.post_attn_residual"] = ("post_ffn_residual", "ffn_norm")
    if kind not in around:
        return None
    along, norm = around[kind]
    x, r = norm_factor(back, layer, norm)
    g = np.abs(back.at(layer, norm).held(layer, NORMS[norm]) * back.get(layer, norm))
    through = r * (g + np.abs(x) * r * r * _along_mean(g * np.abs(x)))
    return through if along is None else through + np.abs(back.get(layer, along))


# --- Gradients of parameters -----------------------------------------------------------------------------------------


def terms(back: Backward, layer: int | None, name: str) -> tuple[Value, Value]:
    """Returns the gradient of what a linear layer computes, and what it read, [B, T, C] each."""
    stage = next((stage for stage, (_, weight) in PRODUCTS.items() if weight == name), None)
    if stage is not None:
        return back.some(back.get(layer, stage)), back.some(back.value(layer, PRODUCTS[stage][0]))
    which = QKV.index(name.split(".")[1])
    gradient = _projections(back, layer, "qkv_bias" if name.endswith(".bias") else "qkv_matmul")[which]
    return back.some(gradient), back.some(back.value(layer, "attn_norm"))


def factors(back: Backward, key: Key) -> list[tuple[Value, Value | None, np.ndarray | None]]:
    """Returns what a parameter's gradient is a sum of products of.

    Returns:
      Gradients [B, T, C]; what was read [B, T, D], or None; the row that each product is added to, [B, T], or None
      where all are added up.
    """
    (layer, name), kind = nodes.tensor_of(key), nodes.kind_of(key, back.config)
    if kind == nodes.NORM_WEIGHT:
        stage = next(stage for stage, weight in NORMS.items() if weight == name)
        x, r = norm_factor(back, layer, stage)
        return [(back.get(layer, stage) * x * r, None, None)]
    if kind == nodes.BIAS:
        return [(terms(back, layer, name)[0], None, None)]
    if kind == nodes.WEIGHT:
        return [(*terms(back, layer, name), None)]
    if kind == nodes.LOW_RANK:
        return []
    found: list[tuple[Value, Value | None, np.ndarray | None]] = []
    if kind in (nodes.HEAD_WEIGHT, nodes.TIED_WEIGHT):
        found.append((back.get(None, LOGITS), back.value(None, "final_norm"), None))
    if kind in (nodes.EMBEDDING_WEIGHT, nodes.TIED_WEIGHT):
        found.append((back.get(None, "embedding"), None, back.forward.inputs.input_ids))
    return found


def _flat(x: Value) -> Value:
    return x.reshape(-1, x.shape[-1])


def _weight(back: Backward, layer: int | None, name: str) -> Value:
    gradient, x = terms(back, layer, name)
    return back.step("outer", _outer, layer, name)(gradient, x)


def _outer(gradient: Value, x: Value) -> Value:
    """[out, in], summed over rows and positions."""
    return _flat(gradient).T @ _flat(x)


def _over_positions(gradient: Value) -> Value:
    return gradient.sum(axis=(0, 1))


def _bias(back: Backward, layer: int | None, name: str) -> Value:
    gradient = terms(back, layer, name)[0]
    return back.step("bias_sum", _over_positions, layer, name)(gradient)


def _norm_weight(back: Backward, layer: int | None, name: str) -> Value:
    stage = next(stage for stage, weight in NORMS.items() if weight == name)
    x, r = norm_factor(back, layer, stage)
    normed = back.cast(back.step("norm_read", x * r, layer, stage))
    return back.some(back.cast(back.get(layer, stage) * normed)).sum(axis=(0, 1))


def _head(back: Backward, layer: int | None, name: str) -> Value:
    gradient, x = back.some(back.get(None, LOGITS)), back.some(back.value(None, "final_norm"))
    return back.step("outer", _outer, layer, name)(gradient, x)


def _embedding(back: Backward, layer: int | None, name: str) -> Value:
    rows = back.at(None, "embedding").step("row", back.forward.inputs.input_ids)
    gather = back.step("scatter", add_rows, None, name)
    return gather(back.some(back.get(None, "embedding")), back.some(rows), back.config.vocab_size)


def add_rows(gradient: Value, rows: np.ndarray, vocabulary: int) -> Value:
    """Adds the gradients [B, T, D] of each token to its row, [V, D]."""
    result = np.zeros((vocabulary, gradient.shape[-1]), gradient.dtype)
    np.add.at(result, rows % vocabulary, gradient)
    return result


def _tied(back: Backward, layer: int | None, name: str) -> Value:
    parts = tuple(map(back.cast, (_embedding(back, None, EMBEDDING), _head(back, None, EMBEDDING))))
    first, second = back.step("tied", parts, None, name)
    # In place: at 0.5B each takes a gigabyte.
    return np.add(first, second, out=first)


def _low_rank(back: Backward, layer: int | None, name: str) -> Value:
    """scale B^T dW for A, scale dW A^T for B."""
    weight = nodes.weight_of(nodes.of_tensor(layer, name))
    part = back.adapter[weight.removeprefix(GRADIENT)]
    whole = _weight(back, *nodes.tensor_of(weight))
    made = part.b.T @ whole if name.endswith(nodes.LORA_A) else whole @ part.a.T
    return np.asarray(back.step("lora_scale", part.scale, layer, name) * made)


PARAMETERS: Mapping[str, Callable[[Backward, int | None, str], Value]] = {
    nodes.WEIGHT: _weight,
    nodes.LOW_RANK: _low_rank,
    nodes.BIAS: _bias,
    nodes.NORM_WEIGHT: _norm_weight,
    nodes.HEAD_WEIGHT: _head,
    nodes.EMBEDDING_WEIGHT: _embedding,
    nodes.TIED_WEIGHT: _tied,
}
"""Kind of a parameter's gradient -> its formula."""
