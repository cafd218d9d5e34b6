"""The compiled programs that generate tokens: prefill in chunks, and a decode loop that runs on the device.

What is compiled, each for one batch size:

    first prefill   for a length of the prompt's first chunk and a capacity of the cache
    later prefill   for a length of a later chunk and a capacity: only prompts of more than one chunk need it
    first token     head and sampling on the prompt's last hidden states; for a method of picking
    decode          a loop that makes up to `BLOCK` tokens a row and ends early when all rows have ended; for a capacity
                    and a method of picking

Lengths and capacities are rounded up to powers of two and to three quarters of them (`bucket`), so that there are two
for each doubling. All other numbers are arguments: steps, temperature, seed, stop tokens, positions. The first prefill
makes the cache, one pair of arrays a layer; every other program gets it donated and writes into it, so that it is never
copied.

Rows of unequal prompts are padded on the right, at position -1, which attention never sees. Decoding goes on behind the
longest prompt, in the same slot for all rows; masks come from positions.

Letters in shapes: B batch, T tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.generate.sampling import Method, Numbers, pick, row_keys
from apr_jax.model.language_model import COMPILER_OPTIONS, LanguageModel, LayerOps, model_graph
from apr_jax.model.parameters import Parameters
from apr_jax.model.qwen2 import NO_POSITION, Cache, Ops, Qwen2ForCausalLM
from apr_jax.model.sharding import Layout

BLOCK = 64
"""Most tokens that one call of the decode loop makes for each row."""

_LOOP_IN_A_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
}
"""On a GPU the whole decode loop is one graph, for drivers that know of loops in graphs, and the call returns at once.
XLA's default, which leaves out the last two, comes back to the host for every token: 0.488 ms in place of 0.441 for the
0.5B shape on an H200."""

NO_TOKEN = -1
"""What stands in a block for rows that have ended, and for steps that were not made."""


def bucket(length: int, least: int) -> int:
    """Rounds a length up to a power of two or three quarters of one, from `least`, a power of two, on."""
    power = max(least, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > least and length <= power * 3 // 4 else power


class State(NamedTuple):
    """Where the rows of a batch stand between two blocks; donated to the next.

    Attributes:
      cache: Keys and values of all tokens but the last of each row.
      token: The last token of each row, int32 [B].
      position: Its position, int32 [B].
      made: How many tokens were made for each row, int32 scalar.
      done: Rows that have ended, bool [B].
      seen: Tokens that occurred in each row, bool [B, V]; None where nothing is penalised.
    """

    cache: Cache
    token: Array
    position: Array | np.ndarray
    made: Array | np.ndarray
    done: Array
    seen: Array | None


class Choice(NamedTuple):
    """How tokens are picked and which ones end a row.

    Attributes:
      numbers: Temperature and so on.
      seed: uint32 scalar.
      stop: Tokens that end a row, int32; -1 fills it up.
    """

    numbers: Numbers
    seed: np.ndarray
    stop: np.ndarray


class Programs:
    """The programs of one model, compiled when first needed and kept.

    Attributes:
      compile_seconds: How long compiling them took, or getting them from the persistent cache.
    """

    def __init__(
        self,
        config: Qwen2Config,
        dtype: str,
        fused: bool,
        ops: Ops,
        layer_ops: LayerOps,
        device: jax.Device,
        layout: Layout | None = None,
        shardings: Any = None,
    ):
        """Takes what a `LanguageModel` has, and how it lies: on a mesh, or as the caller spread its parameters."""
        self._device, self._dtype, self._config = device, dtype, config
        self._layout, self._spread = layout, shardings is not None
        with self.scope():
            self._merge = functools.partial(nnx.merge, model_graph(config, dtype, fused))
        self._ops, self._layer_ops = ops, dict(layer_ops)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    @property
    def compiled(self) -> int:
        """How many were compiled so far."""
        return len(self._compiled)

    def peak_bytes(self) -> int:
        """Returns the most memory that a call of one of the programs needs, parameters and cache included."""
        return max((_needed_bytes(program.memory_analysis()) for program in self._compiled.values()), default=0)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """As `LanguageModel.scope`."""
        with jax.default_device(self._device), jax.enable_x64(self._dtype == "float64"):
            yield

    def first_prefill(
        self,
        parameters: Parameters,
        ids: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        tables: Any,
        capacity: int,
    ) -> tuple[Cache, Array]:
        """Makes a cache and fills it with the first chunk of the prompts.

        Args:
          parameters: Of the model.
          ids: Tokens, int32 [B, T].
          positions: Their positions, int32 [B, T]; -1 is padding.
          last: Where in the chunk each row's prompt ends, int32 [B]; rows that go on may say anything.
          tables: cos and sin for all slots of the cache.
          capacity: Number of the cache's slots.

        Returns:
          The cache, and normed hidden states at `last`, [B, D].
        """

        def program(parameters: Parameters, ids: Array, positions: Array, last: Array, tables: Any) -> Any:
            model = self._merge(parameters)
            cache = Cache.empty(self._config, ids.shape[0], capacity, jnp.dtype(self._dtype))
            return self._hidden(model, ids, positions, tables, cache, True, jnp.maximum(last, 0))

        return self._call(("first prefill", ids.shape, capacity), program, (), parameters, ids, positions, last, tables)

    def later_prefill(
        self,
        parameters: Parameters,
        ids: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        tables: Any,
        cache: Cache,
        hidden: Array,
    ) -> tuple[Cache, Array]:
        """Adds a later chunk; `last` is -1 for rows that do not end in it, and those keep their `hidden`."""

        def program(
            parameters: Parameters, ids: Array, positions: Array, last: Array, tables: Any, cache: Cache, hidden: Array
        ) -> Any:
            model = self._merge(parameters)
            cache, ended = self._hidden(model, ids, positions, tables, cache, False, jnp.maximum(last, 0))
            return cache, jnp.where(last[:, None] >= 0, ended, hidden)

        capacity = cache.positions.shape[1]
        return self._call(
            ("later prefill", ids.shape, capacity),
            program,
            (5, 6),
            parameters,
            ids,
            positions,
            last,
            tables,
            cache,
            hidden,
        )

    def first_token(
        self, parameters: Parameters, hidden: Array, seen: np.ndarray | None, choice: Choice, method: Method
    ) -> tuple[Array, Array, Array | None]:
        """Picks the first token of every row from its prompt's last hidden states [B, D]: token, done and seen."""

        def program(parameters: Parameters, hidden: Array, seen: Array | None, choice: Choice) -> Any:
            logits = self._merge(parameters).project(hidden[:, None], self._ops)[:, 0]
            token = pick(logits, row_keys(choice.seed, len(hidden)), jnp.int32(0), seen, choice.numbers, method)
            return token, _ends(token, choice.stop), _with(seen, token)

        key = ("first token", hidden.shape, len(choice.stop), method)
        return self._call(key, program, (), parameters, hidden, seen, choice)

    def decode(
        self,
        parameters: Parameters,
        state: State,
        stopped: np.ndarray,
        limit: int,
        choice: Choice,
        tables: Any,
        method: Method,
    ) -> tuple[State, Array]:
        """Makes up to `limit` tokens for every row that goes on.

        Args:
          parameters: Of the model.
          state: Where the rows stand; donated.
          stopped: Rows that have ended for a reason the device does not know of, bool [B].
          limit: At most `BLOCK`.
          choice: How tokens are picked.
          tables: cos and sin for all slots of the cache.
          method: As for `first_token`.

        Returns:
          The state, and the tokens, int32 [B, BLOCK], `NO_TOKEN` where there is none.
        """

        def program(
            parameters: Parameters, state: State, stopped: Array, limit: Array, choice: Choice, tables: Any
        ) -> Any:
            model = self._merge(parameters)
            keys = row_keys(choice.seed, len(stopped))

            def goes_on(carry: tuple[State, Array, Array]) -> Array:
                state, steps, _ = carry
                return (steps < limit) & ~jnp.all(state.done)

            def step(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
                state, steps, block = carry
                positions = jnp.where(state.done, NO_POSITION, state.position)[:, None]
                cache, hidden = self._hidden(model, state.token[:, None], positions, tables, state.cache)
                logits = model.project(hidden[:, None], self._ops)[:, 0]
                token = pick(logits, keys, state.made, state.seen, choice.numbers, method)
                shown = jnp.where(state.done, NO_TOKEN, token)
                block = lax.dynamic_update_slice_in_dim(block, shown[:, None], steps, axis=1)
                done = state.done | _ends(token, choice.stop)
                seen = _with(state.seen, token)
                return State(cache, token, state.position + 1, state.made + 1, done, seen), steps + 1, block

            block = jnp.full((len(stopped), BLOCK), NO_TOKEN, jnp.int32)
            state = state._replace(done=state.done | stopped)
            state, _, block = lax.while_loop(goes_on, step, (state, jnp.int32(0), block))
            return state, block

        key = ("decode", state.cache.positions.shape, len(choice.stop), method)
        arguments = (parameters, state, stopped, np.int32(limit), choice, tables)
        alone = self._layout is None and not self._spread
        options = _LOOP_IN_A_GRAPH if alone and self._device.platform == "gpu" else {}
        return self._call(key, program, (1,), *arguments, options=options)

    def _hidden(
        self,
        model: Qwen2ForCausalLM,
        ids: Array,
        positions: Array,
        tables: Any,
        cache: Cache,
        first: bool = False,
        last: Array | None = None,
    ) -> tuple[Cache, Array]:
        """Fills the cache; returns it with the hidden states [B, D] of `last` [B] of each row, or of the only token."""
        cos, sin = tables
        x, filled = model.hidden(ids, positions, cos, sin, cache, self._ops, self._layer_ops, first, last)
        assert filled is not None
        return filled, x[:, 0]

    def _call(
        self,
        key: Any,
        program: Callable[..., Any],
        donated: tuple[int, ...],
        *arguments: Any,
        options: Mapping[str, str] = types.MappingProxyType({}),
    ) -> Any:
        """Calls the program of this key; compiled ahead of time, so that it is known when and how long."""
        with self.scope():
            if self._spread:
                # A compiled program takes its arguments as they lay when it was compiled.
                key = (key, *(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arguments)))
            if key not in self._compiled:
                begun = time.perf_counter()
                compiler_options = {**COMPILER_OPTIONS, **options}
                places = self._places(program, donated, arguments)
                jitted = jax.jit(program, compiler_options=compiler_options, **places)
                self._compiled[key] = jitted.lower(*arguments).compile()
                self.compile_seconds += time.perf_counter() - begun
            return self._compiled[key](*arguments)

    def _places(
        self, program: Callable[..., Any], donated: tuple[int, ...], arguments: Sequence[Any]
    ) -> dict[str, Any]:
        """Where arguments and results lie, and which arguments are donated."""
        if self._spread:
            # The compiler chooses, and what is donated may lie elsewhere than what comes out.
            return {}
        if self._layout is None:
            return {"donate_argnums": donated}
        # What a program hands on has to lie as the next one takes it.
        return {
            "donate_argnums": donated,
            "in_shardings": self._layout.of_arguments(arguments),
            "out_shardings": self._layout.of_results(jax.eval_shape(program, *arguments)),
        }


def programs_of(model: LanguageModel) -> Programs:
    """Returns the programs of a model, shared by all models of its configuration, dtypes, tables and devices."""
    layer_ops = tuple(model.layer_ops.items())
    places = None
    if model.layout is None and len(model.module.model.norm.weight.get_raw_value().devices()) > 1:
        places = tuple(array.sharding for array in jax.tree.leaves(model.parameters))
    what = model.config, model.dtype, model.fused, model.ops, layer_ops, model.device, model.layout, places
    return _programs(model.storage, *what)


@functools.cache
def _programs(storage: tuple[str, ...], *arguments: Any) -> Programs:
    """The programs are compiled for types of single parameters, which `arguments` do not say."""
    del storage
    return Programs(*arguments)


def _needed_bytes(memory: Any) -> int:
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def _ends(token: Array, stop: Array | np.ndarray) -> Array:
    """Tells which tokens [B] are among `stop`, bool [B]."""
    return jnp.any(token[:, None] == stop[None, :], axis=1)


def _with(seen: Array | np.ndarray | None, token: Array) -> Array | None:
    """Adds each row's token [B] to what it has seen [B, V]."""
    return None if seen is None else jnp.asarray(seen).at[jnp.arange(len(token)), token].set(True)
