"""Recomputes any stage of a forward pass in float64 from another engine's dump: right, or with mistakes made.

A stage is computed for some positions at a time, from the dumped values of the stages before it; where the other side
did not dump one of those, it is computed first, so that a mistake shows across a gap. Each stage has one formula, with
the order of operations of `model.qwen2.OPS` (a test holds it against a float64 trace). It is written in steps
(`Replay.step`): a fault of the table in `faults` says what it makes of some steps, so that the right formula is the one
in which no mistake is made, and mistakes stack as they would in an engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model.parameters import Parameters
from apr_jax.model.sharding import to_host
from apr_jax.parity.faults.record import Mistakes
from apr_jax.parity.rope_fit import Right, Rotation
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import last_columns, token_mask, visible
from apr_jax.trace.stages import Key

Value = np.ndarray
Formula = Callable[["Replay", int | None], Value]
"""Computes a stage of a layer; asks the replay for its inputs."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Everything that a stage can be computed from.

    Attributes:
      config: The model's configuration.
      parameters: Its parameters in float64, nested as in `LanguageModel`.
      inputs: The batch.
      theirs: The other side's values.
      made: The mistakes that are made.
      target: The stage that is being computed and so not taken from `theirs`.
      at: The stage whose formula is at work.
      making: The mistakes that are made in it; None is all of `made` that are not confined to a part of a stage.
      rows: The positions that are looked at; None is all of them. Keys and values are always there for all.
      memo: What was computed once and does not depend on `made`.
      composed: What does, within one computation.
      beyond: Where `inputs` are an excerpt, the replay of the whole sequence: keys and values are taken from it.
    """

    config: Qwen2Config
    parameters: Parameters
    inputs: Inputs
    theirs: Mapping[str, np.ndarray]
    made: Mistakes = ()
    target: Key | None = None
    at: Key | None = None
    making: Mistakes | None = None
    rows: np.ndarray | None = None
    memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    composed: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    beyond: Replay | None = None

    def compute(self, key: str) -> Value:
        """Computes one stage from the other side's values, with the mistakes that are made."""
        key = Key(key)
        return dataclasses.replace(self, target=key, composed={})._made(key)

    def _made(self, key: Key) -> Value:
        """Computes a stage with the mistakes that are made: in all of it, or in the part that each is confined to."""
        if not self.made:
            return self._by_formula(key)
        here = [mistake for mistake in self.made if mistake.within is not None and mistake.made_at(key)]
        rest = tuple(mistake for mistake in self.made if mistake.within is None)
        value = dataclasses.replace(self, at=key, making=rest)._by_formula(key)
        for mistake in here:
            assert mistake.within is not None
            other = dataclasses.replace(self, at=key, making=(*rest, mistake.everywhere))._by_formula(key)
            chosen = mistake.within.chosen(value, self.columns(), self.config.head_dim)
            value = np.where(chosen, other, value)
        return value

    def _by_formula(self, key: Key) -> Value:
        return self.step("result", FORMULAS[key.stage](self, key.layer), key.layer, key.stage)

    def under(self, mistakes: Mistakes) -> Replay:
        """Returns the replay in which these mistakes are made."""
        return dataclasses.replace(self, made=tuple(mistakes), making=None, composed={})

    def step(self, name: str, value: Any, layer: int | None = None, what: str = "") -> Any:
        """Returns what the mistakes that are made turn the right value of a step into; `what` is done in `layer`."""
        at = self.target if self.at is None else self.at
        for mistake in self.made if self.making is None else self.making:
            change = mistake.fault.changes.get(name)
            if change is not None and mistake.within is None and mistake.made_at(at):
                value = change(value, At(self, layer, what), **mistake.parameters)
        return value

    def get(self, layer: int | None, stage: str) -> Value:
        """Returns an input of the stage that is being computed, float64: theirs, or computed where they lack it."""
        key = Key.of(layer, stage)
        if self.dumped(key):
            return self.look(stage, self.theirs[key])
        if self.rows is not None and self._read_whole(key):
            return self.look(stage, self.whole.get(layer, stage))
        if (value := self._kept(key)) is not None:
            return value
        # Layer by layer, so that a long gap is no deep recursion.
        for other in self._outputs(key):
            if self._kept(other) is None:
                self._composed(other)
        return self._composed(key)

    def _outputs(self, key: Key) -> list[Key]:
        """The outputs of layers among what has to be computed before a stage, in order of execution."""
        known = ("outputs", key, self.target)
        if known not in self.memo:
            before = self.undumped(key)[:-1]
            self.memo[known] = [other for other in before if other.stage in ("embedding", "post_ffn_residual")]
        return self.memo[known]

    def _kept(self, key: Key) -> Value | None:
        """Returns an undumped stage if it was computed: for good, or for this hypothesis."""
        name = (key, self.looked_at)
        value = self.composed.get(name)
        return self.memo.get(name) if value is None and not self._depends(key) else value

    def _composed(self, key: Key) -> Value:
        """Computes an undumped stage: for good, or for this hypothesis where it depends on that."""
        store: dict[Hashable, Any] = self.composed if self._depends(key) else self.memo
        value = store[key, self.looked_at] = self._made(key)
        return value

    @property
    def looked_at(self) -> bytes | None:
        """Which positions are looked at, as a name."""
        return None if self.rows is None else self.rows.tobytes()

    def _depends(self, key: Key) -> bool:
        """Whether what is made reaches an undumped stage: itself, or by way of those before it."""
        known = ("reached", key)
        if known not in self.composed:
            here = any(key.stage in stages and key.layer in layers for stages, layers in self._touched())
            sources = (source for source in self.sources(key) if not self.dumped(source))
            self.composed[known] = here or any(self._depends(source) for source in sources)
        return self.composed[known]

    def _touched(self) -> list[tuple[tuple[str, ...], Container[int | None]]]:
        """The stages at which each mistake is made, and their layers."""
        if "touched" not in self.composed:
            everywhere = (None, *range(self.config.num_layers))
            self.composed["touched"] = [(mistake.stages(self), mistake.layers or everywhere) for mistake in self.made]
        return self.composed["touched"]

    def _read_whole(self, key: Key) -> bool:
        """Whether keys or values that the target is computed from need an undumped stage at all positions."""
        known = ("read whole", self.target)
        if known not in self.memo:
            found: set[Key] = set()
            for reader in self.undumped(self.target) if self.target is not None else ():
                name = {"attn_scores": "k_post_rope", "attention": "qkv_bias"}.get(reader.stage)
                source = None if name is None else Key.of(reader.layer, name)
                if source is not None and not self.dumped(source):
                    found.update(self.undumped(source))
            self.memo[known] = found
        return key in self.memo[known]

    def look(self, stage: str, values: np.ndarray) -> Value:
        """Returns the replay's positions of a stage's values, float64."""
        if self.rows is not None:
            values = values[:, :, self.rows] if stage in stages.PER_PAIR else values[:, self.rows]
        return np.asarray(values, np.float64)

    def remember(self, what: Hashable, compute: Callable[[], Any]) -> Any:
        """Computes something once; what it depends on besides the other side's values is in its name."""
        if what not in self.memo:
            self.memo[what] = compute()
        return self.memo[what]

    @property
    def whole(self) -> Replay:
        """The replay with all positions."""
        if self.rows is None:
            return self
        known = ("whole", self.at, self.making)
        if known not in self.composed:
            self.composed[known] = dataclasses.replace(self, rows=None)
        return self.composed[known]

    @property
    def everywhere(self) -> Replay:
        """The replay with all positions of the sequence, in which the same mistakes are made."""
        if self.beyond is None:
            return self.whole
        # Positions of an excerpt are no positions of the whole.
        made = tuple(m for m in self.made if m.within is None or m.within.kind != "positions")
        return dataclasses.replace(self.beyond, made=made, target=self.target, at=self.at, composed={})

    def dumped(self, key: Key) -> bool:
        """Whether a stage is known from the other side."""
        return key != self.target and key in self.theirs

    def undumped(self, key: Key) -> list[Key]:
        """Returns a stage and what has to be computed before it because it was not dumped, in order of execution."""
        known = ("undumped", key, self.target)
        if known in self.memo:
            return self.memo[known]
        found: dict[Key, None] = {}

        def visit(at: Key) -> None:
            for source in self.sources(at):
                if source not in found and not self.dumped(source):
                    visit(source)
            found[at] = None

        visit(key)
        self.memo[known] = list(found)
        return self.memo[known]

    def sources(self, key: Key) -> Iterator[Key]:
        """Yields the stages that a stage is computed from."""
        for name in _SOURCES[key.stage]:
            if name == "final_norm":
                yield stages.FINAL_NORM
            elif name != "residual":
                yield Key.of(key.layer, name)
            else:
                yield self.stream_before(key.layer)

    def stream_before(self, layer: int | None) -> Key:
        """The residual stream that a layer, or (None) the final norm, is given."""
        place = self.config.num_layers if layer is None else layer
        return Key.of(place - 1, "post_ffn_residual") if place > 0 else stages.EMBEDDING

    def residual(self, layer: int | None) -> Value:
        """Returns the input of a layer, or (None) of the final norm."""
        source = self.stream_before(layer)
        return self.get(source.layer, source.stage)

    def weight(self, layer: int | None, name: str) -> Value:
        """Returns a tensor by its name below the layer ("mlp.up_proj.weight"), or by its whole name for none."""
        node: Any = self.parameters if layer is None else self.parameters["model"]["layers"][layer]
        for part in name.split("."):
            node = node[part]
        return to_host(node).astype(np.float64, copy=False)

    def held(self, layer: int | None, name: str) -> Value:
        """Returns a tensor as the engine holds it."""
        layer, name = self.step("tensor", (layer, name), layer, name)
        return self.step("weight", self.weight(layer, name), layer, name)

    def matrix(self, layer: int | None, name: str) -> Value:
        """Returns a weight [out, in] as the engine multiplies with it."""
        return self.step("matrix", self.held(layer, name), layer, name)

    def bias(self, layer: int | None, name: str) -> Value:
        """Returns the bias of q_proj, k_proj or v_proj as the engine adds it, before the rotation or behind it."""
        tensor = f"self_attn.{name}.bias"
        return self.step("bias", self.held(layer, tensor), layer, tensor)

    def dot(self, x: Value, weight: Value, layer: int | None, what: str) -> Value:
        """Returns x [..., T, in] times weight [..., out, in], multiplied as the engine does; `what` is the tensor, or
        the stage where none is multiplied with."""
        return self.step("dot", product, layer, what)(*self.step("terms", (x, weight), layer, what))

    def heads(self, layer: int | None) -> tuple[Value, Value, Value]:
        """Returns q [B, T, N, H], k and v [B, T, K, H] before rotation."""
        return split_heads(self.get(layer, "qkv_bias"), self.config)

    def positions(self) -> np.ndarray:
        """Positions in the sequence, int [B, T], -1 at padding."""
        positions = self.inputs.positions()
        return positions if self.rows is None else positions[:, self.rows]

    def tokens(self) -> np.ndarray:
        """Which positions are no padding, bool [B, T]."""
        tokens = token_mask(self.inputs)
        return tokens if self.rows is None else tokens[:, self.rows]

    def columns(self) -> np.ndarray:
        """The columns of the batch that are looked at, int [T]."""
        return np.arange(self.inputs.input_ids.shape[1]) if self.rows is None else self.rows

    def places(self) -> np.ndarray:
        """The columns of the sequence that are looked at, int [T]: those of the batch unless that is an excerpt."""
        return self.inputs.places()[self.columns()]

    @property
    def length(self) -> int:
        """How many columns the sequence has."""
        return self.inputs.sequence.input_ids.shape[1]

    def kv_heads(self) -> np.ndarray:
        """Which KV head each query head reads, int [N]: h // group."""
        heads, kv = self.config.num_heads, self.config.num_kv_heads
        return self.step("kv_heads", np.arange(heads) // (heads // kv))

    def right_rotation(self) -> Right:
        """Returns what the configuration asks for, in a batch of this length."""
        return Right(self.config, int(self.inputs.sequence.positions().max()) + 1)

    def visible(self, layer: int | None) -> np.ndarray:
        """Which keys each query of a layer sees, bool [B, T, S]: by column, as engines build it."""
        tokens = self.step("real_keys", token_mask(self.inputs.sequence))
        queries = np.broadcast_to(self.places() + self.step("last_key", 0), (len(tokens), len(self.columns())))
        keys = np.where(tokens, np.arange(tokens.shape[1]), -1)
        seen = visible(queries, keys) & (keys[:, None] >= self.step("first_key", np.array(0))[..., None])
        window = self.step("window", self.config.window_of(layer), layer)
        # A mistake in the last key moves no window.
        return seen if window is None else seen & (keys[:, None] > self.places()[:, None] - window)


class At(NamedTuple):
    """Where a step is taken: the replay, the layer (None outside the layers), and the tensor, stage or part."""

    replay: Replay
    layer: int | None
    what: str


def split_heads(qkv: Value, config: Qwen2Config) -> tuple[Value, Value, Value]:
    """Cuts [B, T, (N + 2K) H] into q [B, T, N, H], k and v [B, T, K, H]."""
    heads = qkv.reshape(*qkv.shape[:2], -1, config.head_dim)
    end = config.num_heads + config.num_kv_heads
    return heads[:, :, : config.num_heads], heads[:, :, config.num_heads : end], heads[:, :, end:]


def join_heads(x: Value) -> Value:
    """[B, T, heads, H] -> [B, T, heads * H]."""
    return x.reshape(*x.shape[:2], -1)


def unjoin(x: Value, config: Qwen2Config) -> Value:
    """[B, T, heads * H] -> [B, T, heads, H]."""
    return x.reshape(*x.shape[:2], -1, config.head_dim)


def product(x: Value, weight: Value) -> Value:
    """x [..., T, in] times weight [..., out, in] -> [..., T, out]."""
    if weight.ndim > 2:
        return x @ weight.swapaxes(-1, -2)
    # As one matrix: NumPy multiplies a stack of them with a transposed one by plain loops.
    return (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))


# --- The stages' formulas --------------------------------------------------------------------------------------------

QKV = ("q_proj", "k_proj", "v_proj")
EMBEDDING = "model.embed_tokens.weight"
NORMS = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
}
"""The weight of each norm, by stage."""
PRODUCTS = {
    "attn_out": ("attention", "self_attn.o_proj.weight"),
    "ffn_gate": ("ffn_norm", "mlp.gate_proj.weight"),
    "ffn_up": ("ffn_norm", "mlp.up_proj.weight"),
    "ffn_out": ("ffn_swigl", "mlp.down_proj.weight"),
}
"""Input and weight of each product, by stage."""


def head_name(config: Qwen2Config) -> str:
    """The tensor that the head multiplies with: the embedding where it is tied."""
    return EMBEDDING if config.tie_word_embeddings else "lm_head.weight"


def norm_name(stage: str) -> str:
    """The norm's name, without what stands around it."""
    return NORMS[stage].removesuffix(".weight").removeprefix("model.")


def norm_input(replay: Replay, layer: int | None, stage: str) -> Value:
    """Returns what a norm is taken of."""
    if stage == "ffn_norm":
        return replay.get(layer, "post_attn_residual")
    return replay.residual(layer)


def head_input(replay: Replay) -> Value:
    """What the head multiplies with: the last token of each row [B, 1, D] where only its logits were dumped."""
    logits, moved = replay.theirs.get(stages.LOGITS), replay.step("head_rows", None)
    one = logits is not None and logits.shape[1] == 1
    if not one and moved is None:
        return replay.get(None, "final_norm")
    x = replay.whole.get(None, "final_norm")
    columns = last_columns(replay.inputs) if one else np.tile(replay.columns(), (len(x), 1))
    return np.take_along_axis(x, (columns if moved is None else moved(columns))[..., None], axis=1)


def head_product(replay: Replay) -> Value:
    """The head's product, [B, T, V] or [B, 1, V]."""
    return replay.dot(head_input(replay), replay.matrix(None, head_name(replay.config)), None, "logits")


def _embedding(replay: Replay, layer: int | None) -> Value:
    table = replay.step("table", replay.held(layer, EMBEDDING))
    return table[replay.step("row", replay.inputs.input_ids[:, replay.columns()]) % len(table)]


def _norm(stage: str, replay: Replay, layer: int | None) -> Value:
    x = replay.step("norm_input", norm_input(replay, layer, stage), layer, stage)
    weight = replay.step("norm_weight", replay.held(layer, NORMS[stage]), layer, stage)
    eps, square = replay.step("eps", replay.config.rms_norm_eps, layer, stage), replay.step("mean_square", mean_square)
    return replay.step("normed", weight * (x / np.sqrt(square(x) + eps)), layer, stage)


def mean_square(x: Value) -> Value:
    """The mean of squares of each position, [B, T, 1]."""
    return np.mean(x * x, axis=-1, keepdims=True)


def _qkv_matmul(replay: Replay, layer: int | None) -> Value:
    x, names = replay.get(layer, "attn_norm"), [f"self_attn.{name}.weight" for name in QKV]
    return np.concatenate([replay.dot(x, replay.held(layer, name), layer, name) for name in names], -1)


def _qkv_bias(replay: Replay, layer: int | None) -> Value:
    early = [replay.step("early_bias", replay.bias(layer, name), layer, name) for name in QKV]
    return replay.get(layer, "qkv_matmul") + np.concatenate(early)


def before_rotation(replay: Replay, layer: int | None, which: int) -> tuple[Value, Value | float]:
    """Returns q (0) or k (1) [B, T, heads, H] as it is rotated, and what is added to it behind the rotation."""
    x, late = replay.heads(layer)[which], replay.step("late_bias", None, layer, QKV[which])
    if late is None:
        return x, 0.0
    late = late.reshape(-1, replay.config.head_dim)
    return (x - late if _bias_was_added(replay, layer, which) else x), late


def _bias_was_added(replay: Replay, layer: int | None, which: int) -> bool:
    """Whether dumped inputs of the rotation hold the bias, though the rotated values may have got it later."""
    if not replay.dumped(Key.of(layer, "qkv_bias")):
        return False
    shown, plain = (split_heads(replay.get(layer, stage), replay.config)[which] for stage in ("qkv_bias", "qkv_matmul"))
    bias = replay.weight(layer, f"self_attn.{QKV[which]}.bias").reshape(-1, replay.config.head_dim)
    return bool(np.linalg.norm(shown - plain - bias) < np.linalg.norm(shown - plain))


def _rope(which: int, replay: Replay, layer: int | None) -> Value:
    x, late = before_rotation(replay, layer, which)
    turn = replay.step("rotation", Rotation(), layer, QKV[which])
    return join_heads((x if turn.none else turn.turned(x, _turns(replay, turn))) + late)


def _turns(replay: Replay, turn: Rotation) -> Value:
    """The turns of a rotation, which all layers share."""
    store = replay.memo if turn == Rotation() else replay.composed
    name = (turn, replay.looked_at)
    if name not in store:
        store[name] = turn.turns(replay.positions(), replay.config.head_dim, replay.right_rotation())
    return store[name]


def turn_sizes(replay: Replay, key: Key, least: float) -> tuple[Value, Value]:
    """Returns the sizes of what a rotation adds up, and of what angles that are off by themselves move, [B, T, C].

    What is below `least`, the smallest normal number of the dtype, is rounded as that is.
    """
    which = 0 if key.stage == "q_post_rope" else 1
    everywhere = tuple(mistake for mistake in replay.made if mistake.within is None)
    x, late = before_rotation(dataclasses.replace(replay, target=key), key.layer, which)
    made = {everywhere, tuple(mistake.everywhere for mistake in replay.made)}  # some heads, or all of them
    sizes = []
    for mistakes in made:
        working = dataclasses.replace(replay.under(mistakes), at=key)
        turn = working.step("rotation", Rotation(), key.layer, QKV[which])
        sizes.append(turn.sizes(x, replay.positions(), replay.right_rotation(), least))
    terms, moved = (np.maximum.reduce(each) for each in zip(*sizes, strict=True))
    return join_heads(terms + np.abs(late)), join_heads(moved)


def _scores(replay: Replay, layer: int | None) -> Value:
    q = unjoin(replay.get(layer, "q_post_rope"), replay.config).swapaxes(1, 2)
    keys = replay.step("cached", replay.everywhere.get(layer, "k_post_rope"), layer, "k")
    k = unjoin(keys, replay.config)[:, :, replay.kv_heads()].swapaxes(1, 2)
    scale = replay.step("scale", replay.config.head_dim**-0.5)
    raw = replay.step("scores", replay.step("raw_scores", replay.dot(q, k, layer, "attn_scores")) * scale)
    tokens = replay.step("tokens_read", None)
    if tokens is not None:
        raw = np.where(tokens >= 0, np.take_along_axis(raw, np.maximum(tokens, 0)[None, None], axis=-1), 0.0)
    # An engine that masks scores shows nothing where its own mask hides.
    return np.where(replay.visible(layer)[:, None], raw, 0.0)


def _softmax(replay: Replay, layer: int | None) -> Value:
    """Over the keys seen; what a query gets that sees none depends on how an engine masks, uniform here."""
    raw, seen = replay.step("softmax_input", replay.get(layer, "attn_scores")), replay.visible(layer)[:, None]
    summed = replay.step("summed", seen)
    top = np.where(summed, raw, -np.inf).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        powers = np.where(seen, np.exp(raw - top), 0.0)
        shares = powers / np.where(summed, powers, 0.0).sum(axis=-1, keepdims=True)
    shares = replay.step("shares", shares)
    empty = replay.step("empty_row", np.array(1 / raw.shape[-1]))
    return np.where(seen.any(axis=-1, keepdims=True), shares, empty)


def _attention(replay: Replay, layer: int | None) -> Value:
    shares, v = replay.get(layer, "attn_softmax"), replay.step("v_heads", replay.everywhere.heads(layer)[2])
    v = unjoin(replay.step("cached", join_heads(v), layer, "v"), replay.config)
    tokens = replay.step("tokens_read", None)
    shares = shares if tokens is None else _by_token(shares, tokens)
    values = v[:, :, replay.kv_heads()].transpose(0, 2, 3, 1)
    return join_heads(replay.dot(shares, values, layer, "attention").swapaxes(1, 2))


def _by_token(shares: Value, tokens: np.ndarray) -> Value:
    """Turns shares of columns [B, N, T, S] into shares of the tokens [T, S] that are found there."""
    length = shares.shape[-1]
    result = np.zeros((*shares.shape[:3], length + 1))
    for query, found in enumerate(tokens):
        result[:, :, query, found] = shares[:, :, query]  # no token is found at two columns
    return result[..., :length]


def _product(stage: str, replay: Replay, layer: int | None) -> Value:
    source, tensor = PRODUCTS[stage]
    return replay.dot(replay.get(layer, source), replay.matrix(layer, tensor), layer, tensor)


def _sum(stage: str, update: str, replay: Replay, layer: int | None) -> Value:
    stream = replay.residual(layer) if stage == "post_attn_residual" else replay.get(layer, "post_attn_residual")
    return replay.step("stream", stream, layer, stage) + replay.get(layer, update)


def silu(x: Value) -> Value:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def _activated(replay: Replay, layer: int | None) -> Value:
    source, _ = replay.step("gating", ("ffn_gate", "ffn_up"))
    return replay.step("activation", silu)(replay.get(layer, source))


def _gated(replay: Replay, layer: int | None) -> Value:
    _, other = replay.step("gating", ("ffn_gate", "ffn_up"))
    return replay.get(layer, "ffn_silu") * replay.get(layer, other)


FORMULAS: Mapping[str, Formula] = {
    "embedding": _embedding,
    **{stage: partial(_norm, stage) for stage in NORMS},
    "qkv_matmul": _qkv_matmul,
    "qkv_bias": _qkv_bias,
    "q_post_rope": partial(_rope, 0),
    "k_post_rope": partial(_rope, 1),
    "attn_scores": _scores,
    "attn_softmax": _softmax,
    "attention": _attention,
    **{stage: partial(_product, stage) for stage in PRODUCTS},
    "post_attn_residual": partial(_sum, "post_attn_residual", "attn_out"),
    "ffn_silu": _activated,
    "ffn_swigl": _gated,
    "post_ffn_residual": partial(_sum, "post_ffn_residual", "ffn_out"),
    "logits": lambda replay, layer: replay.step("logits", head_product(replay)),
}

_SOURCES: dict[str, tuple[str, ...]] = {
    "embedding": (),
    "attn_norm": ("residual",),
    "qkv_matmul": ("attn_norm",),
    "qkv_bias": ("qkv_matmul",),
    "q_post_rope": ("qkv_bias",),
    "k_post_rope": ("qkv_bias",),
    "attn_scores": ("q_post_rope", "k_post_rope"),
    "attn_softmax": ("attn_scores",),
    "attention": ("attn_softmax", "qkv_bias"),
    "attn_out": ("attention",),
    "post_attn_residual": ("residual", "attn_out"),
    "ffn_norm": ("post_attn_residual",),
    "ffn_gate": ("ffn_norm",),
    "ffn_up": ("ffn_norm",),
    "ffn_silu": ("ffn_gate",),
    "ffn_swigl": ("ffn_silu", "ffn_up"),
    "ffn_out": ("ffn_swigl",),
    "post_ffn_residual": ("post_attn_residual", "ffn_out"),
    "final_norm": ("residual",),
    "logits": ("final_norm",),
}
