"""Text from a Qwen2 model: `load_generator(path).generate("...")`, or token by token with `stream`.

The settings are those of HuggingFace's `generate`, under its names, and come from the checkpoint's
generation_config.json unless they are given. Greedy tokens are HuggingFace's; drawn ones come from the same
distribution and depend on the seed, on the row and on the number of the token alone, so that a seed gives the same text
whatever else is in the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import UsageError
from apr_jax.generate import tokenizer_files
from apr_jax.generate.config import DEFAULT_MAX_NEW_TOKENS, GenerationConfig
from apr_jax.generate.programs import BLOCK, NO_TOKEN, Choice, Programs, State, bucket, programs_of
from apr_jax.generate.sampling import Method, Numbers
from apr_jax.generate.tokenizer import Detokenizer, StopStrings, Tokenizer
from apr_jax.kernels.fastest_ops import load_fastest, prompts_keep_no_scores
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.qwen2 import NO_POSITION, Cache
from apr_jax.model.sharding import to_host
from apr_jax.trace.inputs import Inputs

_LEAST_PROMPT, _LEAST_CAPACITY, _LEAST_STOP = 16, 64, 8
_PREFILL_CHUNK = 2048
# On CPU the scores of attention, [heads, chunk, keys], stay in reach of the caches and of a laptop's memory.
_CPU_PREFILL_CHUNK = 512
# Where a prompt's first chunk keeps no scores it may be long; later ones attend to the cache and keep them.
_TOKENS_WITHOUT_SCORES = 32_768
# A longer block makes the text stutter and an interrupt wait; a shorter one pays for its dispatch more often.
_BLOCK_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated text.

    Attributes:
      prompt_ids: The prompt.
      token_ids: The tokens that were generated, with the one that ended the text.
      text: What they say, special tokens left out; "" without a tokenizer.
      finish_reason: "stop" (an end token or a stop string), "length" (no room for more), None (interrupted).
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a row gained.

    Attributes:
      index: Which row of the batch.
      token_ids: New tokens.
      text: Characters that they complete.
      finish_reason: As in `Generation`; None while the row goes on.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


@dataclasses.dataclass
class Timing:
    """What a batch took so far.

    Attributes:
      rows: Number of prompts.
      prompt_tokens: Tokens of all prompts.
      new_tokens: Tokens generated, all rows together.
      compile_seconds: Compiling, or reading from the persistent cache; not part of the other two.
      prefill_seconds: From the start to the first token of every row.
      decode_seconds: From there to the last token.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompts a second, up to the first new token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second, all rows together, after each row's first."""
        return max(0, self.new_tokens - self.rows) / self.decode_seconds if self.decode_seconds else 0.0


def load_generator(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: Any = "float32",
    device: str | jax.Device | Mesh | None = None,
    *,
    text: bool = True,
    ignore_config: Iterable[str] = (),
) -> Generator:
    """Loads a model with its tokenizer and its generation_config.json, and with the operations that run it fastest.

    On a CPU, in float32, matrices stay as they are stored, to run and not to be trained (`load_model(as_stored=True)`).
    For other operations: `Generator(load_model(...), Tokenizer.of(checkpoint), GenerationConfig.of(checkpoint))`.

    Args:
      source: As for `load_model`.
      dtype: As for `load_model`.
      device: As for `load_model`; one device or a mesh.
      text: Whether text is needed. Without it a tokenizer that cannot be used is warned of, and token ids work.
      ignore_config: As for `load_model`.

    Raises:
      RefusedError: As `load_model`; or a tokenizer that is not supported.
      UsageError: As `load_model`.
    """
    opened = contextlib.nullcontext(source) if isinstance(source, Checkpoint) else open_checkpoint(source)
    with opened as checkpoint:
        settings = GenerationConfig.of(checkpoint)
        tokenizer = Tokenizer.of(checkpoint) if text else Tokenizer.if_usable(checkpoint)
        model = load_fastest(checkpoint, dtype, device, ignore_config)
    return Generator(model, tokenizer, settings)


class Generator:
    """A model that is ready to write.

    Attributes:
      model: The model.
      tokenizer: Its tokenizer; None leaves token ids.
      generation_config: The settings that calls start from.
      programs: What was compiled for it.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        generation_config: GenerationConfig | None = None,
        prefill_chunk: int | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config or GenerationConfig()
        self.programs = programs_of(model)
        self._prefill_chunk = prefill_chunk

    def __repr__(self) -> str:
        return f"Generator({self.model}, {self.tokenizer or 'no tokenizer'})"

    def prefill_chunk(self, rows: int) -> int:
        """Returns how many tokens of each of `rows` prompts go through the model at once, at most: a power of two."""
        if self._prefill_chunk:
            return self._prefill_chunk
        if self.model.device.platform == "cpu":
            return _CPU_PREFILL_CHUNK
        if self.model.layer_ops or not prompts_keep_no_scores(self.model.config, self.model.ops):
            return _PREFILL_CHUNK
        fitting = max(_PREFILL_CHUNK, _TOKENS_WITHOUT_SCORES // rows)
        return int(1 << fitting.bit_length() - 1)

    def generate(
        self, prompts: str | Sequence[int] | Sequence[str | Sequence[int]], seed: int = 0, **settings: Any
    ) -> list[Generation]:
        """Generates a text for every prompt.

        Args:
          prompts: One prompt or a batch of them: each a text, or token ids (of a chat: `chat_prompt`).
          seed: Of the random draws, 0 to 2^32 - 1.
          **settings: What is to differ from `generation_config`: max_new_tokens, do_sample, temperature (0 is greedy),
            top_k, top_p, repetition_penalty, eos_token_id, stop_strings.

        Raises:
          UsageError: An empty prompt, a token that is not in the vocabulary, a prompt that the model has no positions
            for, or impossible settings.
          RefusedError: Text or stop strings without a tokenizer, or settings of generation_config.json that are used
            and not supported.
        """
        stream = self.stream(prompts, seed, **settings)
        for _ in stream:
            pass
        return stream.results()

    def stream(
        self, prompts: str | Sequence[int] | Sequence[str | Sequence[int]], seed: int = 0, **settings: Any
    ) -> Stream:
        """As `generate`, but returns at once; iterating over it generates and yields what the rows gain."""
        config = self.generation_config.but(**settings).checked()
        if not 0 <= seed < 2**32:
            raise UsageError("the seed is out of range", code="seed", found=seed, expected="0 to 4294967295")
        ids = [self._encode(prompt) for prompt in _batch(prompts)]
        inputs = Inputs.of(ids)
        inputs.check_vocabulary(self.model.config.vocab_size)
        if config.stop_strings:
            self._needed_tokenizer()
        return Stream(self, ids, inputs, config, seed)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **arguments: Any,
    ) -> list[int]:
        """Returns the prompt for a conversation, {"role": ..., "content": ...} each, by the checkpoint's template.

        These are token ids: a rendered conversation holds all that the model shall see, so that it gets none of what
        the tokenizer puts around a text.

        Args:
          messages: The conversation.
          tools: JSON schemas of functions that the model may call.
          chat_template: The name of one of the checkpoint's templates, or the text of another one.
          **arguments: Variables of the template, such as enable_thinking=False; what it does not ask for is warned of.

        Raises:
          RefusedError: No tokenizer, no template, or one that does not work.
          UsageError: The template refuses the messages, or jinja2 is missing.
        """
        return self._needed_tokenizer().encode_chat(messages, tools=tools, chat_template=chat_template, **arguments)

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise tokenizer_files.missing()
        return self.tokenizer

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if not (ids := self._needed_tokenizer().encode(prompt)):
            raise UsageError("the prompt is empty", code="prompt", hint="A model needs at least one token to continue.")
        return ids


class Stream:
    """A batch in the making: iterate over it once; `results` and `timing` say what there is so far.

    Attributes:
      settings: What is generated.
      timing: What it took so far.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        inputs: Inputs,
        config: GenerationConfig,
        seed: int,
    ):
        self._model = generator.model
        # One text comes from one set of parameters, whatever a training loop does meanwhile.
        self._parameters = self._model.parameters
        self._programs = generator.programs
        self._chunk = generator.prefill_chunk(len(prompts))
        self._inputs = inputs
        self.settings = config
        self._new_tokens = _room(config, inputs.input_ids.shape[1], self._model.config.context_length)
        self._method = Method.of(config, self._model.config.vocab_size)
        stop = np.full(bucket(max(1, len(config.eos_token_id)), _LEAST_STOP), -1, np.int32)
        stop[: len(config.eos_token_id)] = config.eos_token_id
        self._choice = Choice(Numbers.of(config, self._method), np.asarray(seed, np.uint32), stop)
        self._rows = [_Row(generator.tokenizer, prompt, config, self._new_tokens) for prompt in prompts]
        self.timing = Timing(len(prompts), inputs.tokens)
        self._deltas = self._generate()

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def results(self) -> list[Generation]:
        """Returns what was generated so far, a text for each prompt."""
        return [row.result() for row in self._rows]

    def _generate(self) -> Iterator[Delta]:
        clock = _Clock(self._programs, self.timing)
        for block in self._blocks():
            clock.block_arrived()
            for index, (row, tokens) in enumerate(zip(self._rows, block.tolist(), strict=True)):
                if row.finish_reason is None and (delta := row.take(index, tokens)):
                    self.timing.new_tokens += len(delta.token_ids)
                    yield delta
            if all(row.finish_reason for row in self._rows):
                return

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yields new tokens, int32 [B, n]; while a block is looked at, the device makes the next one."""
        state = self._prefilled()
        tables = self._model.step_tables(to_host(state.position), state.cache.positions.shape[1])
        waiting: list[tuple[jax.Array, int]] = []
        try:
            yield to_host(state.token)[:, None]
            left, steps = self._new_tokens - 1, 1
            arrived = time.perf_counter()
            while left or waiting:
                if left:
                    limit = min(left, steps)
                    stopped = np.asarray([row.finish_reason is not None for row in self._rows])
                    state, block = self._programs.decode(
                        self._parameters, state, stopped, limit, self._choice, tables, self._method
                    )
                    waiting.append((block, limit))
                    left -= limit
                    if len(waiting) == 1:
                        continue
                block, limit = waiting.pop(0)
                tokens = to_host(block)[:, :limit]
                now = time.perf_counter()
                # Several processes have to agree, and their clocks do not.
                steps = (
                    BLOCK
                    if jax.process_count() > 1
                    else min(BLOCK, max(1, int(limit * _BLOCK_SECONDS / (now - arrived))))
                )
                arrived = now
                yield tokens
        finally:
            # An interpreter that ends while a program still holds its arguments is aborted.
            jax.block_until_ready(state.done)

    def _prefilled(self) -> State:
        """Takes the prompts through the model, chunk by chunk, and picks the first tokens."""
        ids, positions = self._inputs.input_ids, self._inputs.positions()
        lengths = self._inputs.attention_mask.sum(axis=1, dtype=np.int32)
        length = ids.shape[1]
        padded, capacity = rounded(length, self._new_tokens, self._chunk)
        ids = np.pad(ids, ((0, 0), (0, padded - length)))
        positions = np.pad(positions, ((0, 0), (0, padded - length)), constant_values=NO_POSITION)
        parameters, tables = self._parameters, self._model.rotary_tables(capacity, reach=length)
        cache: Cache | None = None
        for begin in range(0, length, self._chunk):
            part = slice(begin, min(begin + self._chunk, padded))
            last = lengths - 1 - begin
            last = np.where((last >= 0) & (last < self._chunk), last, -1).astype(np.int32)
            chunk = (parameters, ids[:, part], positions[:, part], last, tables)
            if cache is None:
                cache, hidden = self._programs.first_prefill(*chunk, capacity)
            else:
                cache, hidden = self._programs.later_prefill(*chunk, cache, hidden)
        assert cache is not None
        # What is beyond the longest prompt is padding, and decoding writes over it.
        with self._model.scope():
            cache = cache._replace(length=jnp.asarray(length, jnp.int32))
        told = self._seen() if self._method.penalised else None
        token, done, seen = self._programs.first_token(parameters, hidden, told, self._choice, self._method)
        return State(cache, token, lengths, np.asarray(1, np.int32), done, seen)

    def _seen(self) -> np.ndarray:
        """Returns which tokens the prompts hold, bool [B, V]."""
        seen = np.zeros((len(self._rows), self._model.config.vocab_size), bool)
        for row, prompt in zip(seen, self._rows, strict=True):
            row[list(prompt.prompt)] = True
        return seen


class _Clock:
    """Tells compiling from computing."""

    def __init__(self, programs: Programs, timing: Timing):
        self._programs, self._timing = programs, timing
        self._begun, self._compiled = time.perf_counter(), programs.compile_seconds
        self._first: float | None = None

    def block_arrived(self) -> None:
        """Brings the timing up to date."""
        timing = self._timing
        timing.compile_seconds = self._programs.compile_seconds - self._compiled
        computed = time.perf_counter() - self._begun - timing.compile_seconds
        if self._first is None:
            self._first = timing.prefill_seconds = computed
        timing.decode_seconds = computed - self._first


class _Row:
    """One text in the making."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], config: GenerationConfig, new_tokens: int):
        self.prompt = tuple(prompt)
        self.finish_reason: str | None = None
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._most = new_tokens
        self._ends = frozenset(config.eos_token_id)
        self._characters = None if tokenizer is None else Detokenizer(tokenizer)
        stops = config.stop_strings
        self._stops = StopStrings(tokenizer, stops, prompt) if tokenizer is not None and stops else None

    def take(self, index: int, tokens: Sequence[int]) -> Delta | None:
        """Adds tokens of a block as far as the row goes; returns what it gained, None if nothing."""
        new = self._until_the_end([token for token in tokens if token != NO_TOKEN])
        if not new:
            return None
        self._tokens += new
        text = ""
        if self._characters is not None:
            text = self._characters.add(new) + (self._characters.finish() if self.finish_reason else "")
            self._text.append(text)
        return Delta(index, tuple(new), text, self.finish_reason)

    def result(self) -> Generation:
        """Returns what there is so far."""
        return Generation(self.prompt, tuple(self._tokens), "".join(self._text), self.finish_reason)

    def _until_the_end(self, new: list[int]) -> list[int]:
        count = next((count for count, token in enumerate(new, start=1) if token in self._ends), None)
        if self._stops is not None:
            count = self._stops.first_end(new[:count]) or count
        if count is not None:
            self.finish_reason = "stop"
            return new[:count]
        if len(self._tokens) + len(new) >= self._most:
            self.finish_reason = "length"
        return new


def _batch(prompts: Any) -> Sequence[Any]:
    """Returns a list of prompts, of one where there is one: a text, or integers."""
    if isinstance(prompts, str):
        return [prompts]
    return [prompts] if len(prompts) and isinstance(prompts[0], numbers.Integral) else prompts


def rounded(length: int, new_tokens: int, chunk: int) -> tuple[int, int]:
    """Returns how many tokens a prompt is padded to, its last chunk rounded up, and how many slots the cache has.

    Args:
      length: Of the longest prompt.
      new_tokens: To generate; the last one is never put into the cache.
      chunk: Most tokens of a prompt that go through the model at once.
    """
    whole = (length - 1) // chunk * chunk
    padded = whole + bucket(length - whole, _LEAST_PROMPT)
    return padded, bucket(max(padded, length + new_tokens - 1), _LEAST_CAPACITY)


def _room(config: GenerationConfig, longest: int, positions: int) -> int:
    """Returns how many tokens each row may get: as many as asked for, as far as the model has positions.

    The last token needs none, as nothing is computed from it.
    """
    if longest > positions:
        raise UsageError(
            "the prompt is longer than the model was made for",
            code="prompt-length",
            found=f"{longest} tokens",
            expected=f"at most {positions} (max_position_embeddings, extended by the RoPE rule if there is one)",
        )
    wanted = config.max_new_tokens
    if wanted is None:
        wanted = DEFAULT_MAX_NEW_TOKENS if config.max_length is None else config.max_length - longest
    if wanted < 1:
        raise UsageError(
            "the prompt leaves no room for new tokens",
            code="prompt-length",
            found=f"{longest} tokens",
            expected=f"fewer than max_length = {config.max_length}",
            hint="Give max_new_tokens.",
        )
    return min(wanted, positions - longest + 1)
