"""How text is generated: HuggingFace's generation_config.json under HuggingFace's names, with its defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from apr_jax.converters.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

DEFAULT_MAX_NEW_TOKENS = 256

_Asks = Callable[[Any], bool]


def _is_not(*harmless: Any) -> _Asks:
    return lambda value: value not in harmless


def _above(least: float) -> _Asks:
    return lambda value: not _is_number(value) or value > least


def _within(least: float, most: float) -> _Asks:
    return lambda value: not _is_number(value) or least < value < most


# What else in a generation_config.json changes which tokens transformers 5 returns, and which of its values do.
# What is in neither list does nothing there (num_beam_groups, say), so it does nothing here.
_UNSUPPORTED: Mapping[str, _Asks] = {
    "num_beams": _is_not(1),
    "num_return_sequences": _is_not(1),
    "min_length": _above(0),
    "min_new_tokens": _above(0),
    "no_repeat_ngram_size": _above(0),
    "encoder_repetition_penalty": _is_not(1),
    "encoder_no_repeat_ngram_size": _above(0),
    "penalty_alpha": _above(0),
    "guidance_scale": _is_not(1),
    "bad_words_ids": bool,
    "force_words_ids": bool,
    "sequence_bias": bool,
    "constraints": bool,
    "suppress_tokens": bool,
    "begin_suppress_tokens": bool,
    "forced_bos_token_id": _is_not(),
    "forced_eos_token_id": _is_not(),
    "exponential_decay_length_penalty": _is_not(),
    "watermarking_config": _is_not(),
    "dola_layers": _is_not(),
    "token_healing": bool,
    "max_time": _is_not(),
}
# The same of those that only sampling uses.
_UNSUPPORTED_IN_DRAWS: Mapping[str, _Asks] = {
    "typical_p": _within(-math.inf, 1),
    "min_p": _above(0),
    "top_h": _is_not(),
    "epsilon_cutoff": _within(0, 1),
    "eta_cutoff": _within(0, 1),
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
      others: What else was asked for, under HuggingFace's names.

    Values are judged where they are used (`checked`): what only sampling would use does not matter to the likeliest
    token, and what is replaced matters to nothing.
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
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("eos_token_id", "stop_strings"):
            object.__setattr__(self, name, _several(getattr(self, name)))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> GenerationConfig:
        """Reads generation_config.json.

        Without one only the end tokens are known: of config.json, as for HuggingFace, or of the `.apr` file's metadata.
        """
        given = checkpoint.generation_config
        if given is None:
            end = checkpoint.config.get("eos_token_id")
            given = {"eos_token_id": checkpoint.metadata.get("tokenizer.eos_token_id") if end is None else end}
        given = {name: value for name, value in given.items() if value is not None}
        others = {name: given[name] for name, asks in _OTHERS.items() if name in given and asks(given[name])}
        return cls(**{name: given[name] for name in _names() if name in given}, others=others)

    def but(self, **changes: Any) -> GenerationConfig:
        """Returns the same with other values; None changes nothing. Temperature 0 means greedy.

        Beside the attributes, names of what is not supported may be given with a value that asks for nothing
        (num_beams=1), where generation_config.json asks for more.

        Raises:
          UsageError: A name that is none of these, or an impossible value.
        """
        _check_names(changes)
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("temperature") == 0:
            given |= {"temperature": 1.0, "do_sample": False}
        replaced = {name: given.pop(name) for name in given.keys() & _OTHERS.keys()}
        for name, value in replaced.items():
            if _OTHERS[name](value):
                raise UsageError(f"{name} is not supported", code="generation-config", found=value, hint="Leave it out")
        others = {name: value for name, value in self.others.items() if name not in replaced}
        changed = dataclasses.replace(self, **given, others=others)
        for name in given:
            if problem := changed._problem(name):
                raise UsageError(**problem)
        return changed

    def without(self, names: Iterable[str]) -> GenerationConfig:
        """Returns the same as if generation_config.json did not have `names`.

        Raises:
          UsageError: A name that no setting has.
        """
        names = set(names)
        _check_names(names)
        defaults = {name: getattr(GenerationConfig(), name) for name in _names() if name in names}
        others = {name: value for name, value in self.others.items() if name not in names}
        return dataclasses.replace(self, **defaults, others=others)

    def checked(self) -> GenerationConfig:
        """Returns the settings if all that they use can be done.

        Raises:
          RefusedError: They ask for what is not supported (beams, n-gram blocking, ...), or a value is impossible.
        """
        for name in _RULES:
            if self._uses(name) and (problem := self._problem(name)):
                raise RefusedError(**problem)
        asked = [name for name in self.others if self._uses(name)]
        if asked:
            only_draws = set(asked) <= _UNSUPPORTED_IN_DRAWS.keys()
            raise RefusedError(
                "generation_config.json asks for what is not supported",
                code="generation-config",
                found=", ".join(f"{name} = {self.others[name]}" for name in asked),
                hint="".join(f"--ignore-generation-config {name} " for name in asked)
                + ("leaves it out" if len(asked) == 1 else "leave them out")
                + (", --greedy does not use it" if only_draws else "")
                + " (in Python: generator.generation_config = generator.generation_config.without([...]))",
            )
        return self

    def _uses(self, name: str) -> bool:
        """Whether transformers looks at a setting, beside the others."""
        if name in _ONLY_DRAWS or name in _UNSUPPORTED_IN_DRAWS:
            return self.do_sample
        if name == "max_length":
            return self.max_new_tokens is None
        if name == "penalty_alpha":
            # It makes a contrastive search of a greedy one over several candidates.
            return not self.do_sample and _is_count(self.top_k, 2)
        if name in ("min_length", "min_new_tokens"):
            return bool(self.eos_token_id)
        return True

    def _problem(self, name: str) -> dict[str, Any] | None:
        """Returns the arguments of an error if the value of a setting is impossible."""
        if name not in _RULES or _RULES[name].is_right(value := getattr(self, name)):
            return None
        return {
            "message": f"{name} is out of range",
            "code": "generation-config",
            "found": value,
            "expected": _RULES[name].expected,
            "hint": f"{_RULES[name].option} goes before generation_config.json",
        }


def _check_names(names: Iterable[str]) -> None:
    known = {*_names(), *_OTHERS}
    if unknown := set(names) - known:
        raise UsageError(
            "no such setting", code="generation-config", found=sorted(unknown), expected=", ".join(sorted(known))
        )


def _names() -> tuple[str, ...]:
    """Returns the names of the settings that are supported."""
    return tuple(field.name for field in dataclasses.fields(GenerationConfig) if field.name != "others")


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a value has to be, in code and in words, and the option that replaces it."""

    is_right: Callable[[Any], bool]
    expected: str
    option: str


_OTHERS: Mapping[str, _Asks] = {**_UNSUPPORTED, **_UNSUPPORTED_IN_DRAWS}
_ONLY_DRAWS = ("temperature", "top_k", "top_p")
_RULES = {
    "do_sample": _Rule(lambda value: value in (False, True), "true or false", "--greedy (or --temperature T)"),
    "max_new_tokens": _Rule(
        lambda value: value is None or _is_count(value, 1), "an integer of at least 1", "--max-new-tokens N"
    ),
    "max_length": _Rule(
        lambda value: value is None or _is_count(value, 1), "an integer of at least 1", "--max-new-tokens N"
    ),
    "temperature": _Rule(
        lambda value: _is_number(value) and value > 0, "a number above 0", "--temperature T (or --greedy)"
    ),
    "top_k": _Rule(
        lambda value: _is_count(value, 0), "an integer of at least 0; 0: no limit", "--top-k K (or --greedy)"
    ),
    "top_p": _Rule(
        lambda value: _is_number(value) and value >= 0, "a number of at least 0; 1: no limit", "--top-p P (or --greedy)"
    ),
    "repetition_penalty": _Rule(
        lambda value: _is_number(value) and value > 0, "a number above 0", "--repetition-penalty R"
    ),
    "eos_token_id": _Rule(
        lambda values: all(_is_count(value, -(2**31)) for value in values),
        "token ids",
        "--ignore-generation-config eos_token_id",
    ),
    "stop_strings": _Rule(
        lambda values: all(isinstance(v, str) and v for v in values),
        "strings that are not empty",
        "--ignore-generation-config stop_strings",
    ),
}
