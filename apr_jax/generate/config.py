"""How text is generated: HuggingFace's generation_config.json under HuggingFace's names, with its defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apr_jax.converters.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

DEFAULT_MAX_NEW_TOKENS = 256

# What else in a generation_config.json changes which tokens `generate` returns, and the values that change nothing.
# Attributes that are in neither list do nothing there, so they do nothing here.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "diversity_penalty": (0.0,),
    "typical_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1, 1.0),
    "renormalize_logits": (False, True),
    "remove_invalid_values": (False,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "sequence_bias": ({}, []),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "token_healing": (False,),
    "max_time": (),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What to generate, under the names of HuggingFace's `GenerationConfig`.

    Attributes:
      max_new_tokens: Most tokens to generate for each prompt; None leaves it to `max_length`, then to 256.
      max_length: Most tokens of the longest prompt and the new ones together; `max_new_tokens` goes before it.
      do_sample: Drawn, or the likeliest (greedy).
      temperature: What logits are divided by before a token is drawn.
      top_k: Tokens less likely than the k-th are not drawn; 0 means no limit.
      top_p: Only the likeliest tokens that together reach this probability are drawn; 1 means all.
      repetition_penalty: Divides (or multiplies, where negative) the logits of tokens that occurred, greedy or drawn.
      eos_token_id: Tokens that end a text.
      stop_strings: Strings that end a text.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "stop_strings"):
            object.__setattr__(self, name, _several(getattr(self, name)))
        for name, (right, expected) in _RULES.items():
            value = getattr(self, name)
            if not right(value):
                raise UsageError(f"{name} is out of range", code="generation-config", found=value, expected=expected)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> GenerationConfig:
        """Reads generation_config.json.

        Without one only the end tokens are known: of config.json, as for HuggingFace, or of the `.apr` file's metadata.

        Raises:
          RefusedError: It asks for what is not supported (beams, n-gram blocking, ...), or holds impossible values.
        """
        given = checkpoint.generation_config
        if given is None:
            end = checkpoint.config.get("eos_token_id")
            given = {"eos_token_id": checkpoint.metadata.get("tokenizer.eos_token_id") if end is None else end}
        asked = {
            name: given[name]
            for name, harmless in _WITHOUT_EFFECT.items()
            if given.get(name) is not None and given[name] not in harmless
        }
        if asked:
            raise RefusedError(
                "generation_config.json asks for what is not supported",
                code="generation-config",
                file=checkpoint.path,
                found=", ".join(f"{name} = {value}" for name, value in asked.items()),
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: given[name] for name in known if given.get(name) is not None})
        except UsageError as error:
            raise RefusedError(
                f"generation_config.json: {error.message}",
                code=error.code,
                file=checkpoint.path,
                found=error.found,
                expected=error.expected,
            ) from None

    def but(self, **changes: Any) -> GenerationConfig:
        """Returns the same with other values; None changes nothing. Temperature 0 means greedy.

        Raises:
          UsageError: A name that is none of the attributes', or an impossible value.
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := changes.keys() - known:
            raise UsageError(
                "no such setting", code="generation-config", found=sorted(unknown), expected=", ".join(sorted(known))
            )
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("temperature") == 0:
            given |= {"temperature": 1.0, "do_sample": False}
        return dataclasses.replace(self, **given)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_RULES = {
    "max_new_tokens": (lambda value: value is None or _is_count(value, 1), "an integer of at least 1"),
    "max_length": (lambda value: value is None or _is_count(value, 1), "an integer of at least 1"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "top_k": (lambda value: _is_count(value, 0), "an integer of at least 0"),
    "top_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "eos_token_id": (lambda values: all(_is_count(value, 0) for value in values), "token ids"),
    "stop_strings": (lambda values: all(isinstance(v, str) and v for v in values), "strings that are not empty"),
}
