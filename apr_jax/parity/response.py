"""What a small change of any stage does to a dumped stage behind it, predicted for thousands of changes at a time.

Behind a gap every mistake of the table can be made, everywhere or in one layer or in one part of a stage, and to
compute the dumped stage with each takes a whole pass through the gap. Which of them are worth that is told by a pass
back: the gradient g of <difference, dumped stage> with respect to every stage of the gap says what a change Δ of that
stage contributes to the difference, <g, Δ>. The same with random directions in place of the difference tells how large
the change of the dumped stage is, so that the angle between the two follows. A large change bends what is behind it:
predictions say what is tried first, and never what is true.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model import rotary
from apr_jax.model.language_model import COMPILER_OPTIONS
from apr_jax.model.qwen2 import DecoderLayer, make_step, rms_norm
from apr_jax.parity.faults.record import Mistake
from apr_jax.parity.replay import Replay, Value, head_name
from apr_jax.trace import stages
from apr_jax.trace.stages import Key

_DIRECTIONS = 48
"""As many random directions tell the size of a change to about a tenth."""
_LAYER_ORDER = {stage: place for place, stage in enumerate(stages.LAYER_STAGES)}
_MOST_BYTES = 1 << 30
"""Gradients that would take more are not made."""


class Predicted(NamedTuple):
    """What changes are expected to do to the dumped stage, one value for each of them.

    Attributes:
      part: <what it changes, the difference> over the square of the difference: 1 if it is the whole of it.
      size: |what it changes| over |difference|.
    """

    part: Value
    size: Value

    @property
    def cosine(self) -> Value:
        """Of the angle between what is changed and the difference; 0 where nothing is changed."""
        with np.errstate(all="ignore"):
            return np.nan_to_num(self.part / self.size, nan=0.0, posinf=0.0, neginf=0.0)

    @property
    def left(self) -> Value:
        """What share of the difference each leaves."""
        return np.sqrt(np.maximum(1 - 2 * self.part + self.size**2, 0.0))

    @property
    def factor(self) -> Value:
        """By what each change would have to be multiplied to leave least."""
        with np.errstate(all="ignore"):
            return np.nan_to_num(self.part / self.size**2, nan=0.0, posinf=0.0, neginf=0.0)


def is_small(nodes: Iterable[Key], right: Mapping[str, Value]) -> bool:
    """Whether the gradients of these stages are small enough to be made."""
    return 4 * (1 + _DIRECTIONS) * sum(right[node].size for node in nodes) <= _MOST_BYTES


class Response:
    """The stages of a gap, linearised around the right pass.

    Attributes:
      values: The right values of each stage of the gap, from the other side's inputs.
      gradients: Of the stages of the gap, [1 + directions, ...] float32: of the difference first.
      right: A replay in which every stage is known, and right.
    """

    def __init__(self, replay: Replay, key: Key, right: Mapping[str, Value], off: Value):
        """Linearises.

        Args:
          replay: The replay with all positions.
          key: The dumped stage.
          right: What every stage should be, from the other side's own inputs, float64.
          off: Their values less the right ones; 0 where nothing is compared.
        """
        nodes = dataclasses.replace(replay, target=key).undumped(key)
        self.values = {node: right[node] for node in nodes}
        self._power = float(np.vdot(off, off))
        counted = (off != 0).any(axis=-1, keepdims=True)
        random = np.random.default_rng(0).standard_normal((_DIRECTIONS, *off.shape)) * counted
        self.gradients: dict[Key, np.ndarray] = {}
        self._pull_back(replay, key, set(nodes), np.concatenate([off[None], random]))
        known = {other: np.asarray(value) for other, value in replay.theirs.items()}
        self.right = dataclasses.replace(replay, theirs=known | self.values, rows=None, memo={}, made=())
        self._of: dict[Mistake, dict[int | None, Value]] = {}

    def _pull_back(self, replay: Replay, key: Key, nodes: set[Key], cotangents: Value) -> None:
        with jax.enable_x64(True):
            pulled = jnp.asarray(cotangents)
            if key.layer is None:
                pulled = self._through_the_head(replay, key, nodes, pulled)
            last = replay.config.num_layers - 1 if key.layer is None else key.layer
            target = key.stage if key.layer is not None else "post_ffn_residual"
            for layer in range(last, -1, -1):
                if not any(node.layer == layer for node in nodes):
                    break
                pulled = self._through_a_layer(replay, layer, target, nodes, pulled)
                target = "post_ffn_residual"
            if stages.EMBEDDING in nodes:
                self.gradients[stages.EMBEDDING] = np.asarray(pulled, np.float32)

    def _through_the_head(self, replay: Replay, key: Key, nodes: set[Key], pulled: Any) -> Any:
        """Back through the head, or the final norm alone, to the last layer's output."""
        self.gradients[key] = np.asarray(pulled, np.float32)
        if key.stage == "logits":
            pulled = pulled @ jnp.asarray(replay.weight(None, head_name(replay.config)))
            if stages.FINAL_NORM in nodes:
                self.gradients[stages.FINAL_NORM] = np.asarray(pulled, np.float32)
        weight = jnp.asarray(replay.weight(None, "model.norm.weight"))
        x = jnp.asarray(self._input(replay, None))
        _, back = jax.vjp(lambda y: rms_norm(y, weight, replay.config.rms_norm_eps), x)
        return jax.vmap(back)(pulled)[0]

    def _through_a_layer(self, replay: Replay, layer: int, target: str, nodes: set[Key], pulled: Any) -> Any:
        config = replay.config
        inside = tuple(stage for stage in stages.LAYER_STAGES if Key.of(layer, stage) in nodes)
        forced = {
            stage: jnp.asarray(replay.theirs[key], jnp.float64)
            for stage in stages.LAYER_STAGES
            if replay.dumped(key := Key.of(layer, stage)) and _LAYER_ORDER[stage] < _LAYER_ORDER[target]
        }
        length = int(replay.inputs.positions().max()) + 1
        cos, sin = map(jnp.asarray, rotary.tables(config, length))
        step = make_step(jnp.asarray(replay.inputs.positions()), cos, sin)[0]
        program = _layer_program(config, config.window_of(layer), target, inside)
        x = jnp.asarray(self._input(replay, layer))
        parameters = jax.tree.map(
            lambda each: jnp.asarray(each, jnp.float64), replay.parameters["model"]["layers"][layer]
        )
        pulled, gradients = program(parameters, x, step, forced, pulled)
        for stage, gradient in gradients.items():
            self.gradients[Key.of(layer, stage)] = np.asarray(gradient, np.float32)
        return pulled

    def _input(self, replay: Replay, layer: int | None) -> Value:
        """The residual stream that a layer, or (None) the final norm, is given; zeros where dumped stages stand between
        it and the gap."""
        source = replay.stream_before(layer)
        if source in self.values:
            return self.values[source]
        if source in replay.theirs:
            return np.asarray(replay.theirs[source], np.float64)
        return np.zeros((*replay.inputs.input_ids.shape, replay.config.hidden_size))

    def moved(self, key: Key, change: Value) -> Value:
        """Returns what a change of one stage contributes along the difference and each direction, [1 + directions]."""
        gradients = self.gradients[key]
        return gradients.reshape(len(gradients), -1) @ change.ravel().astype(np.float32)

    def predicted(self, moved: Value) -> Predicted:
        """Returns what changes do that contribute this in all, [1 + directions, ...]."""
        return Predicted(moved[0] / self._power, np.sqrt(np.mean(np.square(moved[1:]), axis=0) / self._power))

    def of(self, mistake: Mistake) -> dict[int | None, Value]:
        """Returns what a mistake contributes in each layer, and under None outside the layers, [1 + directions]."""
        if mistake not in self._of:
            found: dict[int | None, Value] = {}
            stages_of, made = mistake.stages(self.right), self.right.under((mistake,))
            for key in self.values:
                if key.stage in stages_of and mistake.made_at(key):
                    with np.errstate(all="ignore"):
                        change = np.nan_to_num(made.compute(key) - self.values[key], posinf=0.0, neginf=0.0)
                    found[key.layer] = found.get(key.layer, 0.0) + self.moved(key, change)
            self._of[mistake] = found
        return self._of[mistake]

    def likeness(self, *mistakes: Mistake) -> float:
        """Returns the cosine between what mistakes are expected to change together and the difference."""
        contributed = [moved for mistake in mistakes for moved in self.of(mistake).values()]
        return float(self.predicted(np.sum(contributed, axis=0)).cosine) if contributed else 0.0


@functools.cache
def _layer_program(config: Qwen2Config, window: int | None, target: str, inside: tuple[str, ...]) -> Any:
    """Gradients of a layer's stage `target` with respect to its input and to the stages `inside`."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: DecoderLayer(config, jnp.float64, False, window)))

    def shown(parameters: Any, step: Any, forced: Mapping[str, Any], x: Any, added: Mapping[str, Any]) -> Any:
        seen: dict[str, Any] = {}

        def tap(stage: str, value: Any) -> Any:
            seen[stage] = value = value + added[stage] if stage in added else value
            return forced[stage].reshape(value.shape) if stage in forced else value

        nnx.merge(graph, parameters)(x, step, tap=tap)
        return seen[target]

    def pull(parameters: Any, x: Any, step: Any, forced: Mapping[str, Any], cotangents: Any) -> Any:
        whole = functools.partial(shown, parameters, step, forced)
        batch, length = x.shape[:2]
        added = {stage: jnp.zeros((batch, *stages.shape(config, stage, length))) for stage in inside}
        _, back = jax.vjp(whole, x, added)
        return jax.vmap(back)(cotangents)

    return jax.jit(pull, compiler_options=COMPILER_OPTIONS)
