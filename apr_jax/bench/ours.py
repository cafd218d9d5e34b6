"""Our model as a contestant: the programs that generation runs, with random weights made on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.bench.cases import PREFILL, Case
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.formats import codecs
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.programs import BLOCK, Choice, Programs, State, bucket
from apr_jax.generate.sampling import Method, Numbers
from apr_jax.load import packed_rows
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import Parameters, named, nested
from apr_jax.model.qwen2 import NO_POSITION, Cache, LayerCache, Qwen2ForCausalLM
from apr_jax.model.sharding import Layout, to_host

Calls = Callable[[int], float]
"""Makes so many calls back to back, waits for the last one, and returns the seconds that they took."""

_GREEDY = Method(sampled=False, candidates=0, penalised=False)
_STANDARD_DEVIATION = 0.02


class Ours:
    """apr_jax.

    Attributes:
      name: In tables.
      model: What is measured, with its table of operations.
    """

    def __init__(self, model: LanguageModel, name: str = "apr_jax"):
        self.name = name
        self.model = model

    def prepare(self, case: Case, steps: int) -> tuple[Calls, dict[str, Any]]:
        """Compiles what the case needs.

        Args:
          case: What to measure.
          steps: Tokens that one call makes for each row, in a decode.

        Returns:
          The calls, and what is known before any: seconds of compiling, bytes of memory that the program needs.
        """
        model = self.model
        # Not the shared ones: what they have compiled already would not be compiled here.
        programs = Programs(model.config, model.dtype, model.fused, model.ops, (), model.device, model.layout)
        calls = self._prefill(programs, case) if case.kind == PREFILL else self._decode(programs, case, steps)
        calls(1)
        return calls, {"compile_seconds": programs.compile_seconds, "memory_bytes": programs.peak_bytes()}

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        """Returns logits of the last position of every row of ids [B, T], for comparison with a peer's."""
        return to_host(self.model(ids)[:, -1].astype(jnp.float32))

    def _prefill(self, programs: Programs, case: Case) -> Calls:
        parameters, tables = self.model.parameters, self.model.rotary_tables(case.length)
        shape = (case.batch, case.length)
        ids, positions, last, choice = self.model.put(
            (
                tokens(self.model.config, *shape),
                np.broadcast_to(np.arange(case.length, dtype=np.int32), shape),
                np.full(case.batch, case.length - 1, np.int32),
                _choice(),
            )
        )

        def calls(count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                _, hidden = programs.first_prefill(parameters, ids, positions, last, tables, case.length)
                token = programs.first_token(parameters, hidden, None, choice, _GREEDY)
            jax.block_until_ready(token)
            return time.perf_counter() - begun

        return calls

    def _decode(self, programs: Programs, case: Case, steps: int) -> Calls:
        capacity = bucket(case.length + steps, BLOCK)
        tables, parameters = self.model.rotary_tables(capacity), self.model.parameters
        layers = self._filled(case.batch, capacity)
        places = np.broadcast_to(np.arange(capacity, dtype=np.int32), (case.batch, capacity))
        going = np.zeros(case.batch, bool)
        small = (
            np.where(places < case.length, places, NO_POSITION).astype(np.int32),
            np.asarray(case.length, np.int32),
            tokens(self.model.config, case.batch, 1)[:, 0],
            np.full(case.batch, case.length, np.int32),
            np.asarray(1, np.int32),
            going,
        )
        choice = self.model.put(_choice())

        def calls(count: int) -> float:
            nonlocal layers
            begun = time.perf_counter()
            for _ in range(count):
                # Fresh each time: the program takes them over.
                filled, length, token, position, index, done = self.model.put(small)
                state = State(Cache(layers, filled, length), token, position, index, done, None)
                state, block = programs.decode(parameters, state, going, steps, choice, tables, _GREEDY)
                layers = state.cache.layers
            jax.block_until_ready(block)
            return time.perf_counter() - begun

        return calls

    def _filled(self, batch: int, capacity: int) -> tuple[LayerCache, ...]:
        """Makes caches with something in every slot: zeros would cost a GPU less power than numbers do."""
        config, dtype = self.model.config, jnp.dtype(self.model.dtype)
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)

        def draw(key: jax.Array, value: jax.Array) -> LayerCache:
            return LayerCache(*(jax.random.normal(each, shape, jnp.float32).astype(dtype) for each in (key, value)))

        layout = self.model.layout
        with self.model.scope():
            keys = jax.random.split(jax.random.key(1), (config.num_layers, 2))
            places = None if layout is None else layout.of_results(jax.eval_shape(draw, *keys[0]))
            drawn = jax.jit(draw, **({} if places is None else {"out_shardings": places}))
            return tuple(drawn(key, value) for key, value in keys)


def random_parameters(
    config: Qwen2Config, dtype: str, fused: bool, place: jax.Device | Layout, matrices: str | None = None
) -> Parameters:
    """Draws parameters on a device or a mesh: norms 1, everything else normal with deviation 0.02.

    Matrices may have a dtype of their own: the same numbers, but for the rounding.
    """

    def dtype_of(leaf: jax.ShapeDtypeStruct) -> str:
        return matrices if matrices and leaf.ndim == 2 else dtype

    device = place if isinstance(place, jax.Device) else None
    with jax.default_device(device), jax.enable_x64(dtype == "float64"):
        shapes = nnx.state(nnx.eval_shape(lambda: Qwen2ForCausalLM(config, jnp.dtype(dtype), fused)))
        leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(shapes))
        draw = jax.jit(_draw, static_argnums=(1, 2, 3, 4))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        values = []
        for key, (path, leaf) in zip(keys, leaves, strict=True):
            name = ".".join(str(part.key) for part in path)
            sharding = place.sharding(name) if isinstance(place, Layout) else None
            values.append(draw(key, leaf.shape, dtype_of(leaf), "norm" in name, sharding))
        return jax.tree_util.tree_unflatten(tree, values)


def widened(model: LanguageModel) -> LanguageModel:
    """Returns the model with all parameters in the dtype of its computation; those that have it are shared."""
    shapes = model.config.tensor_shapes()

    def wide(name: str, leaf: jax.Array) -> jax.Array:
        values = packed_rows.decode(leaf)[:, : shapes[name][1]] if packed_rows.are_packed(leaf) else leaf
        return values.astype(model.dtype)

    return _with(model, {name: wide(name, leaf) for name, leaf in named(model.parameters).items()})


def quantised(model: LanguageModel) -> LanguageModel:
    """Returns the model with its matrices as `apr` quantises them to Q4_K, computed from their blocks."""
    codec = codecs.Q4_K()

    def packed(leaf: jax.Array) -> jax.Array:
        values = np.asarray(leaf.astype(jnp.float32)).reshape(-1)
        blocks = codec.encode(codecs.pad_rows(values, leaf.shape[1], codec.elements))
        return jnp.asarray(np.frombuffer(blocks, np.uint8).reshape(len(leaf), -1))

    leaves = named(model.parameters).items()
    return _with(model, {name: packed(leaf) if leaf.ndim == 2 else leaf for name, leaf in leaves})


def _with(model: LanguageModel, leaves: Mapping[str, jax.Array]) -> LanguageModel:
    return LanguageModel(model.config, nested(leaves), model.device, model.ops)


def _draw(
    key: jax.Array, shape: tuple[int, ...], dtype: str, norm: bool, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    values = 1.0 if norm else _STANDARD_DEVIATION * jax.random.normal(key, shape, jnp.float32)
    drawn = jnp.broadcast_to(values, shape).astype(dtype)
    return drawn if sharding is None else jax.lax.with_sharding_constraint(drawn, sharding)


def tokens(config: Qwen2Config, batch: int, length: int) -> np.ndarray:
    """Returns random token ids, int32 [batch, length]."""
    return np.random.default_rng(0).integers(config.vocab_size, size=(batch, length), dtype=np.int32)


def _choice() -> Choice:
    greedy = Numbers.of(GenerationConfig(), _GREEDY)
    return Choice(greedy, np.asarray(0, np.uint32), np.full(8, -1, np.int32))
