"""`LanguageModel`: a Qwen2 model with its weights on a device, called with token ids from the host.

It computes logits of whole sequences, goes on from a cache of keys and values, and traces: records the value of every
stage of the forward pass, or goes on with another implementation's. Each kind of run is a program that is compiled once
for a configuration, a dtype and a table of operations; weights are its arguments.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model import rotary
from apr_jax.model.describing import placed, sizes
from apr_jax.model.origin import Origin
from apr_jax.model.parameters import Parameters, nested, parameter_sources
from apr_jax.model.qwen2 import (
    NO_OVERRIDES,
    OPS,
    Cache,
    DecoderLayer,
    LayerCache,
    Ops,
    Qwen2ForCausalLM,
    Step,
    make_step,
    visible,
)
from apr_jax.model.sharding import Layout, on_mesh, to_host
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs, refuse_traced

Context = Callable[[int], tuple[Any, Any]]
"""Layer -> the keys and values [B, S, K, H] of a sequence of which only some positions are run."""
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}
"""Rounding happens where the program says it does: bf16 intermediates are not silently kept in f32."""
_TRACE_OPTIONS = {**COMPILER_OPTIONS, "xla_gpu_autotune_level": 0}
"""A traced run calls each of its programs a few times: trying out on a GPU which kernels are fastest takes longer."""


class LanguageModel:
    """A Qwen2 model that is ready to run on host values: lists and NumPy arrays in, checked before anything computes.

    Inside `jax.jit`, `jax.grad` and the like use `module`, which is the same model: there is one set of arrays, and
    what an optimiser writes into the module is what this model computes with from then on.

    Attributes:
      config: Its configuration.
      module: The weights, in a Flax NNX module.
      device: Where it runs; of several devices that the parameters are spread over, the first of this process.
      layout: How it lies on a mesh of devices; None on one device, or where the caller spread the parameters.
      ops: The table of operations; `module` itself computes with the plain ones. On a mesh each places its results.
      layer_ops: Tables for single layers, by index.
      origin: What came beside the weights, for `apr_jax.save`; None for a model that was loaded from nothing.
    """

    def __init__(
        self,
        config: Qwen2Config,
        parameters: Parameters,
        device: jax.Device,
        ops: Ops = OPS,
        layer_ops: Mapping[int, Ops] = NO_OVERRIDES,
        origin: Origin | None = None,
        layout: Layout | None = None,
    ):
        self.config = config
        self.device = device
        self.layout = layout
        self._take(ops, layer_ops)
        self.origin = origin
        dtype = str(parameters["model"]["norm"]["weight"].dtype)
        fused = "qkv_proj" in parameters["model"]["layers"][0]["self_attn"]
        self._paths = tuple(parameter_sources(config, fused))
        with jax.enable_x64(dtype == "float64"):
            self.module: Qwen2ForCausalLM = nnx.merge(model_graph(config, dtype, fused), parameters)

    def __repr__(self) -> str:
        where = placed(self.module.model.norm.weight.get_raw_value())
        return f"LanguageModel({sizes(self.config)}, {where}, {self.layout or self.ops})"

    @property
    def parameters(self) -> Parameters:
        """The arrays that `module` holds now, nested as its attributes are."""
        return nested({path: variable(self.module, path).get_raw_value() for path in self._paths})

    @property
    def dtype(self) -> str:
        """Name of the dtype of the computation and, but for what `storage` says, of the parameters."""
        return str(self.module.model.norm.weight.get_raw_value().dtype)

    @property
    def storage(self) -> tuple[str, ...]:
        """Names of the dtypes of all parameters, which may be narrower than `dtype` (`load_model(as_stored=True)`)."""
        return tuple(str(variable(self.module, path).get_raw_value().dtype) for path in self._paths)

    @property
    def fused(self) -> bool:
        """Whether q, k and v of a layer are one parameter, and gate and up another."""
        return self.module.model.layers[0].self_attn.fused

    def with_ops(self, ops: Ops, layer_ops: Mapping[int, Ops] = NO_OVERRIDES) -> LanguageModel:
        """Returns the model with other tables of operations and the same module."""
        other = copy.copy(self)
        other._take(ops, layer_ops)
        return other

    def _take(self, ops: Ops, layer_ops: Mapping[int, Ops]) -> None:
        layout = self.layout
        self.ops = ops if layout is None else on_mesh(ops, layout)
        self.layer_ops = layer_ops if layout is None else {i: on_mesh(own, layout) for i, own in layer_ops.items()}

    def __call__(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Array:
        """Computes logits; arguments and errors as `Inputs.of`. Returns [B, T, V] in the model's dtype."""
        return self.logits(Inputs.of(input_ids, attention_mask, position_ids))

    def logits(self, inputs: Inputs) -> Array:
        """Computes logits [B, T, V]; those at padding mean nothing."""
        inputs.check_vocabulary(self.config.vocab_size)
        with self.scope():
            program = _forward_program(*self._key())
            return program(self.parameters, inputs.input_ids, inputs.positions(), *self.rotary_of(inputs))

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns a KV cache for `batch` rows of up to `capacity` tokens, padding included."""
        with self.scope():
            return _empty_cache(self.config, batch, capacity, self.dtype, self.layout)()

    def step(self, inputs: Inputs, cache: Cache) -> tuple[Array, Cache]:
        """Runs some tokens behind those in the cache: a whole prompt, a part of one, or one token a row.

        Args:
          inputs: The tokens [B, T]; their `position_ids` go on where the row's earlier tokens ended.
          cache: What `empty_cache` or the step before returned. It is donated: use the returned one from now on.

        Returns:
          Logits [B, T, V] and the cache with the tokens in it.

        Raises:
          ValueError: The cache has no room for T more tokens, is for another batch, or the positions do not go on
            from those in it.
        """
        refuse_traced(*jax.tree.leaves(cache))
        inputs.check_vocabulary(self.config.vocab_size)
        capacity, filled = cache.positions.shape[1], int(cache.length)
        if cache.positions.shape[0] != inputs.input_ids.shape[0]:
            raise ValueError(f"the cache is for {cache.positions.shape[0]} rows, not {inputs.input_ids.shape[0]}")
        positions = inputs.positions()
        reached = to_host(cache.positions).max(axis=1)
        begins = np.where(positions >= 0, positions, np.iinfo(np.int32).max).min(axis=1)
        if (begins <= reached).any():
            row = int(np.argmax(begins <= reached))
            raise ValueError(f"row {row} goes on at position {begins[row]}, but its cache has reached {reached[row]}")
        if filled + inputs.input_ids.shape[1] > capacity:
            raise ValueError(
                f"the cache holds {filled} of {capacity} tokens: no room for {inputs.input_ids.shape[1]} more"
            )
        with self.scope():
            # What runs first tokens alone may take the mask as causal along the row: padding has to stand behind.
            behind = bool(((positions[:, 1:] < 0) | (positions[:, :-1] >= 0)).all())
            program = _step_program(*self._key(), first=filled == 0 and behind)
            tables = self.rotary_of(inputs, at_least=capacity)
            return program(self.parameters, inputs.input_ids, inputs.positions(), *tables, cache)

    def trace(
        self,
        inputs: Inputs,
        keys: Collection[str] | None = None,
        force: Mapping[str, np.ndarray] | None = None,
        context: Context | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs layer by layer and records stages.

        Args:
          inputs: The batch.
          keys: Which to return, named as in `stages`; None means all. Traces of long sequences are large, the attention
            scores above all.
          force: Values that the computation goes on with in place of its own, under the same keys: each stage is then
            computed from the other side's inputs. What is recorded are this model's own values.
          context: Gives the keys and values [B, S, K, H] that a layer attends over, where the batch is an `Excerpt`:
            those of the first S columns of its sequence, itself among them.

        Returns:
          key -> array in the model's dtype, with a leading batch axis; `attn_scores` is 0 where the mask hides the key,
          `qkv_matmul` is at least float32.

        Raises:
          ValueError: An unknown stage, or a forced value of another shape than the stage's.
        """
        inputs.check_vocabulary(self.config.vocab_size)
        known = list(stages.trace_keys(self.config.num_layers))
        if unknown := (set(force or ()) | set(keys or ())) - set(known):
            raise ValueError(f"unknown stages: {sorted(unknown)}")
        for key, value in (force or {}).items():
            shape = self._stage_shape(key, inputs)
            if value.shape != shape:
                raise ValueError(f"{key} to force has shape {value.shape}, expected {shape}")
        wanted = set(known if keys is None else keys)
        with self.scope():
            recorded = self._run_traced(inputs, wanted, force or {}, context)
        return {key: recorded[key] for key in known if key in recorded}

    def _run_traced(
        self, inputs: Inputs, wanted: set[str], force: Mapping[str, np.ndarray], context: Context | None
    ) -> dict[str, np.ndarray]:
        config, recorded = self.config, {}

        def keep(key: str, value: Array) -> Array:
            if key in wanted:
                recorded[key] = to_host(value)
            return jnp.asarray(force[key], value.dtype) if key in force else value

        wide = jnp.promote_types(self.dtype, jnp.float32)
        outer = _outer_programs(config, self.dtype, self.fused, self.ops)
        step = outer["step"](inputs.positions(), *self.rotary_of(inputs))
        x = keep(stages.EMBEDDING, outer["embed"](self.parameters, inputs.input_ids))
        for layer in range(config.num_layers):
            names = {stage: stages.Key.of(layer, stage) for stage in stages.LAYER_STAGES}
            forced = {stage: jnp.asarray(force[key], wide) for stage, key in names.items() if key in force}
            record = frozenset(stage for stage, key in names.items() if key in wanted)
            ops, window = self.layer_ops.get(layer, self.ops), config.window_of(layer)
            program = _layer_program(config, self.dtype, self.fused, ops, record, window)
            cached = (
                None if context is None else LayerCache(*(jnp.asarray(each, self.dtype) for each in context(layer)))
            )
            here = step
            if cached is not None:
                here = step._replace(kv_positions=inputs.sequence.positions()[:, : cached.keys.shape[1]])
            x, values = program(self.parameters["model"]["layers"][layer], x, here, forced, cached)
            recorded |= {names[stage]: to_host(value) for stage, value in values.items()}
        x = keep(stages.FINAL_NORM, outer["norm"](self.parameters, x))
        if stages.LOGITS in wanted:
            keep(stages.LOGITS, outer["project"](self.parameters, x))
        return recorded

    def _key(self) -> tuple[Any, ...]:
        """What a program is compiled for, besides shapes."""
        return self.config, self.dtype, self.fused, self.ops, tuple(self.layer_ops.items())

    def _stage_shape(self, key: str, inputs: Inputs) -> tuple[int, ...]:
        batch, length = inputs.input_ids.shape
        shape = (batch, *stages.shape(self.config, stages.Key(key).stage, length))
        return (*shape[:-1], inputs.sequence.input_ids.shape[1]) if stages.Key(key).per_pair else shape

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Where programs of this model are compiled and called: its device, and 64 bits only for float64."""
        with jax.default_device(self.device), jax.enable_x64(self.dtype == "float64"):
            yield

    def rotary_tables(self, length: int, reach: int | None = None) -> tuple[Array, Array]:
        """Returns cos and sin for at least `length` positions, float32 [P, H/2], P a power of two.

        `reach` is how many positions the longest sequence of the call has, which some RoPE rules ask for; None means
        `length`.
        """
        reach = rotary.relevant_length(self.config, length if reach is None else reach)
        return _rotary_tables(self.config, _round_up(length), reach, self.layout or self.device)

    def step_tables(self, lengths: np.ndarray, capacity: int) -> tuple[Array, Array]:
        """Returns cos and sin for tokens that are made one by one behind rows of these lengths, int [B].

        As `rotary_tables(capacity)`; under a RoPE rule that depends on the length of the sequence [B, P, H/2], turned
        by what the sequence has become when the token is made, as in HuggingFace's `generate`.
        """
        rule = self.config.rope_scaling
        if rule is None or not rule.depends_on_length:
            return self.rotary_tables(capacity)
        cos, sin = rotary.step_tables(self.config, _round_up(capacity), lengths.max() - lengths)
        return _placed_tables(cos, sin, self.layout or self.device)

    def put(self, values: Any) -> Any:
        """Puts small values from the host where its programs take them from: on its device, or on each of the mesh."""
        return jax.device_put(values, self.device if self.layout is None else self.layout.of_value(()))

    def rotary_of(self, inputs: Inputs, at_least: int = 1) -> tuple[Array, Array]:
        """Returns `rotary_tables` for a batch, for `at_least` that many positions."""
        reach = int(inputs.sequence.positions().max()) + 1
        return self.rotary_tables(max(at_least, reach), reach)


@functools.lru_cache(maxsize=8)
def _rotary_tables(config: Qwen2Config, length: int, reach: int, place: jax.Device | Layout) -> tuple[Array, Array]:
    return _placed_tables(*rotary.tables(config, length, reach), place)


def _placed_tables(cos: np.ndarray, sin: np.ndarray, place: jax.Device | Layout) -> tuple[Array, Array]:
    if isinstance(place, Layout):
        tables: tuple[Array, Array] = jax.device_put((cos, sin), place.of_value(()))
        return tables
    # Not bound to the device, so that they go where the parameters are, be it several.
    with jax.default_device(place):
        return jnp.asarray(cos), jnp.asarray(sin)


def _round_up(length: int) -> int:
    """Rounds a table's length up to a power of two, so that few programs are compiled."""
    return max(64, 1 << (length - 1).bit_length())


def variable(module: nnx.Module, path: str) -> nnx.Variable:
    """Returns the variable of a module that stands at a dotted path, "model.layers.0.mlp.up_proj.weight"."""
    node: Any = module
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


@functools.cache
def model_graph(config: Qwen2Config, dtype: str, fused: bool) -> nnx.GraphDef:
    """Returns what `nnx.merge(graph, parameters)` makes a `Qwen2ForCausalLM` from, inside a program."""
    return nnx.graphdef(nnx.eval_shape(lambda: Qwen2ForCausalLM(config, jnp.dtype(dtype), fused)))


@functools.cache
def _empty_cache(config: Qwen2Config, batch: int, capacity: int, dtype: str, layout: Layout | None) -> Any:
    """Returns what makes an empty cache: on a mesh each device its own part."""
    make = functools.partial(Cache.empty, config, batch, capacity, jnp.dtype(dtype))
    return make if layout is None else jax.jit(make, out_shardings=layout.of_results(jax.eval_shape(make)))


@functools.cache
def _layer_graph(config: Qwen2Config, dtype: str, fused: bool, window: int | None) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: DecoderLayer(config, jnp.dtype(dtype), fused, window)))


LayerOps = tuple[tuple[int, Ops], ...]


@functools.cache
def _forward_program(config: Qwen2Config, dtype: str, fused: bool, ops: Ops, layer_ops: LayerOps) -> Any:
    graph = model_graph(config, dtype, fused)

    def forward(parameters: Parameters, ids: Array, positions: Array, cos: Array, sin: Array) -> Array:
        model = nnx.merge(graph, parameters)
        return model.forward(ids, positions, cos, sin, ops=ops, layer_ops=dict(layer_ops))[0]

    return jax.jit(forward, compiler_options=COMPILER_OPTIONS)


@functools.cache
def _step_program(config: Qwen2Config, dtype: str, fused: bool, ops: Ops, layer_ops: LayerOps, first: bool) -> Any:
    graph = model_graph(config, dtype, fused)

    def step(
        parameters: Parameters, ids: Array, positions: Array, cos: Array, sin: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        model = nnx.merge(graph, parameters)
        return model.forward(ids, positions, cos, sin, cache, ops, dict(layer_ops), first)

    return jax.jit(step, compiler_options=COMPILER_OPTIONS, donate_argnames="cache")


@functools.cache
def _outer_programs(config: Qwen2Config, dtype: str, fused: bool, ops: Ops) -> dict[str, Any]:
    """What stands around the layers of a traced run: rotary gather, embedding, final norm and head."""
    graph = model_graph(config, dtype, fused)
    programs: dict[str, Callable[..., Any]] = {
        "step": lambda positions, cos, sin: make_step(positions, cos, sin)[0],
        "embed": lambda parameters, ids: nnx.merge(graph, parameters).embed(ids, ops),
        "norm": lambda parameters, x: nnx.merge(graph, parameters).norm(x, ops),
        "project": lambda parameters, x: nnx.merge(graph, parameters).project(x, ops),
    }
    return {name: jax.jit(function, compiler_options=_TRACE_OPTIONS) for name, function in programs.items()}


@functools.cache
def _layer_program(
    config: Qwen2Config, dtype: str, fused: bool, ops: Ops, record: frozenset[str], window: int | None
) -> Any:
    """One layer that records and forces: compiled once, called for every layer of its window.

    Each stage is fenced off from the next, so that its rounding depends neither on what is recorded nor on what is
    forced: without the fence XLA fuses across stages and contracts products into sums.
    """
    graph = _layer_graph(config, dtype, fused, window)

    def layer(
        parameters: Parameters, x: Array, step: Step, forced: Mapping[str, Array], cached: LayerCache | None
    ) -> tuple[Array, dict[str, Array]]:
        recorded: dict[str, Array] = {}

        def over_cached(table: Ops, q: Array, k: Array, v: Array, *others: Any) -> Array:
            return ops.attention(table, q, *((k, v) if cached is None else cached), *others)

        def tap(stage: str, value: Array) -> Array:
            value = jax.lax.optimization_barrier(value)
            recorded[stage] = value
            if stage not in forced:
                return value
            return jax.lax.optimization_barrier(forced[stage].astype(value.dtype).reshape(value.shape))

        x, _ = nnx.merge(graph, parameters)(x, step, ops=dataclasses.replace(ops, attention=over_cached), tap=tap)
        if "attn_scores" in recorded:
            seen = visible(step.q_positions, step.kv_positions, window)[:, None]
            recorded["attn_scores"] = jnp.where(seen, recorded["attn_scores"], jnp.zeros((), x.dtype))
        return x, {stage: value for stage, value in recorded.items() if stage in record}

    return jax.jit(layer, compiler_options=_TRACE_OPTIONS)
