"""The RoPE rules of transformers beyond the plain one: what `rope_scaling` (4.x) or `rope_parameters` (5.x) ask for.

Source: `modeling_rope_utils.py` of HuggingFace transformers 5.24, whose defaults are filled in here, so that two
spellings of one rule are one record. What the rules compute is in `model/rotary.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

OBJECTS = ("rope_parameters", "rope_scaling")
"""Keys of config.json that hold a rule."""
OUTSIDE = "original_max_position_embeddings"
"""Stands within the rule or, with precedence, beside it."""

_RULES = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_SETTINGS = frozenset(
    """rope_theta rope_type type factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale
    mscale_all_dim truncate low_freq_factor high_freq_factor short_factor long_factor partial_rotary_factor
    finetuned""".split()
)
# What older YaRN programs read and transformers does not.
_HARMLESS = {"extrapolation_factor": 1, "attn_factor": 1}
# Qwen2-VL's: positions of text are the same in every section, so that plain RoPE is left of it; transformers writes
# "default" beside the old "mrope", and Qwen2 does not look at the sections.
_OF_TEXT, _SECTIONS = "mrope", "mrope_section"


class Problem(NamedTuple):
    """What is wrong with a configuration: the key concerned, and a sentence about it."""

    key: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A rule that changes the rotary frequencies; every default of transformers filled in, what it does not use at 0.

    Attributes:
      rule: "linear", "dynamic", "yarn", "longrope", "llama3" or "proportional".
      factor: By which contexts are extended.
      original_max_position_embeddings: Longest sequence before that (yarn, longrope, llama3).
      attention_factor: What cos and sin are multiplied with; 1 for most rules.
      beta_fast: Turns over the original length from which on yarn leaves a frequency as it is.
      beta_slow: Turns up to which it divides one.
      truncate: Whether yarn rounds its bounds to whole dimensions.
      low_freq_factor: Turns up to which llama3 divides.
      high_freq_factor: Turns from which on it leaves a frequency as it is.
      short_factor: What longrope divides by, one number a frequency, up to the original length.
      long_factor: The same beyond it.
      partial_rotary_factor: Share of the dimensions that proportional turns.
    """

    rule: str
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = False
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0

    @property
    def depends_on_length(self) -> bool:
        """Whether a call's frequencies depend on how long its longest sequence is."""
        return self.rule in ("dynamic", "longrope")

    def to_hf(self) -> dict[str, Any]:
        """Returns what `rope_scaling` says of the rule in a config.json, everything that is used spelt out."""
        always = {"factor"} | ({"attention_factor", "truncate"} if self.rule in ("yarn", "longrope") else set())
        said = {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name in always
        }
        return {"rope_type": said.pop("rule"), **said}

    def __str__(self) -> str:
        """Names the rule and what is particular about it: "yarn (factor 4, ...)"."""
        said = [
            f"{field.name} {_shown(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.name != "rule" and getattr(self, field.name) != field.default
        ]
        return f"{self.rule} ({', '.join(said)})" if said else self.rule


def read_rope(
    config: Mapping[str, Any], default_theta: float, max_positions: Any, head_dim: Any, problems: list[Problem]
) -> tuple[Any, RopeScaling | None]:
    """Returns the rotary base and the rule of a configuration; None is plain RoPE.

    Args:
      config: HuggingFace's keys, without those that are null.
      default_theta: The base where none is given.
      max_positions: `max_position_embeddings`, which several defaults are computed from.
      head_dim: Width of a head.
      problems: Added to.
    """
    found: dict[str, tuple[Any, RopeScaling | None]] = {}
    for key in OBJECTS:
        value = config.get(key)
        if not value:
            # Empty, false and the like ask for nothing.
            continue
        if not isinstance(value, Mapping):
            problems.append(Problem(key, f"{key} is {value!r}, expected an object"))
            continue
        found[key] = value.get("rope_theta"), _Reader(key, value, config, problems).rule(max_positions, head_dim)
    bases = {"rope_theta": config.get("rope_theta")} | {f"{key}.rope_theta": base for key, (base, _) in found.items()}
    given = {name: base for name, base in bases.items() if base is not None}
    if len({_number(base) if _is_number(base) else repr(base) for base in given.values()}) > 1:
        said = " and ".join(f"{name} {base!r}" for name, base in given.items())
        problems.append(Problem(next(iter(given)), f"{said} contradict each other"))
    rules = [rule for _, rule in found.values()]
    if len(set(rules)) > 1:
        said = " and ".join(f"{key} ({rule or 'plain RoPE'})" for key, rule in zip(found, rules, strict=True))
        problems.append(Problem(OBJECTS[0], f"{said} contradict each other"))
    theta = next(iter(given.values()), default_theta)
    rule = next(iter(rules), None)
    if rule is not None and rule.rule == "yarn" and _is_number(theta) and theta <= 1:
        problems.append(Problem("rope_theta", f"rope_theta is {theta!r}, expected more than 1 with yarn"))
    return _number(theta), rule


class _Reader:
    """Reads one rule and notes what is wrong with it."""

    def __init__(self, key: str, value: Mapping[str, Any], config: Mapping[str, Any], problems: list[Problem]):
        self._key, self._value, self._config, self._problems = key, value, config, problems

    def rule(self, max_positions: Any, head_dim: Any) -> RopeScaling | None:
        """Returns the rule; None for plain RoPE, and where something is wrong."""
        before = len(self._problems)
        kind = self._kind()
        self._check_keys(kind)
        self._whole(kind)
        if kind == "default" or len(self._problems) > before:
            return None
        made = {name: value for name, value in self._fields(kind, max_positions, head_dim) if value is not None}
        if len(self._problems) > before or (kind == "linear" and made["factor"] == 1):
            return None
        return RopeScaling(kind, **made)

    def _kind(self) -> str:
        kinds = [self._value[name] for name in ("rope_type", "type") if self._value.get(name) is not None]
        if kinds == ["default", _OF_TEXT]:
            kinds.pop()
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            self._wrong("type", f"is {kinds[1]!r} and rope_type is {kinds[0]!r}: they contradict each other")
        kind = kinds[0] if kinds else "default"
        if kind not in ("default", *_RULES):
            spelling = "type" if self._value.get("rope_type") is None else "rope_type"
            self._wrong(spelling, f"is {kind!r}: not a rule that is known here ({', '.join(_RULES)})")
        return kind if isinstance(kind, str) else "default"

    def _check_keys(self, kind: str) -> None:
        for name, value in self._value.items():
            if value is None or name in _SETTINGS or (name in _HARMLESS and value == _HARMLESS[name]):
                continue
            if name == _SECTIONS and kind == "default":
                continue
            sentence = f"{self._key}.{name} is not known to leave the forward pass unchanged"
            self._problems.append(Problem(f"{self._key}.{name}", sentence))

    def _whole(self, kind: str) -> None:
        """Only "proportional" may turn a part of the dimensions: the other rules fail there in transformers."""
        share = self._value.get("partial_rotary_factor")
        if share is not None and share != 1 and kind != "proportional":
            self._wrong("partial_rotary_factor", f"is {share!r}: expected 1 with {kind}")

    def _fields(self, kind: str, max_positions: Any, head_dim: Any) -> Iterator[tuple[str, Any]]:
        original = None
        if kind in ("yarn", "longrope", "llama3"):
            original = self._positive(OUTSIDE, max_positions, self._config.get(OUTSIDE))
            yield OUTSIDE, original
        if kind in ("yarn", "longrope"):
            ratio = max_positions / original if _is_number(max_positions) and original else 1.0
            factor = self._positive("factor", float(ratio))
        else:
            factor = self._positive("factor", 1.0 if kind == "proportional" else None)
        yield "factor", factor
        if kind == "yarn":
            yield from self._yarn(factor)
        elif kind == "longrope":
            yield from self._longrope(factor, original, head_dim)
        elif kind == "llama3":
            low, high = (self._positive(f"{name}_freq_factor", None) for name in ("low", "high"))
            yield from (("low_freq_factor", low), ("high_freq_factor", high))
            if low and high and high <= low:
                self._wrong("high_freq_factor", f"is {high!r}, expected more than low_freq_factor {low!r}")
        elif kind == "proportional":
            yield "partial_rotary_factor", self._positive("partial_rotary_factor", 1.0)
        elif kind == "dynamic" and head_dim == 2:
            self._wrong("rope_type", "is 'dynamic', which needs a head_dim above 2")

    def _yarn(self, factor: float | None) -> Iterator[tuple[str, Any]]:
        # Both count, or neither; 0 is as good as absent, here and below.
        names = ("mscale", "mscale_all_dim")
        both = all(self._value.get(name) for name in names)
        top, bottom = (self._positive(name, 1.0) for name in names) if both else (1.0, 0.0)

        def scale(times: float) -> float:
            return 1.0 if factor is None or factor <= 1 else 0.1 * times * math.log(factor) + 1.0

        default = scale(top or 1.0) / scale(bottom or 0.0)
        yield "attention_factor", self._positive("attention_factor", default)
        yield "beta_fast", self._positive("beta_fast", 32.0, self._value.get("beta_fast") or 32.0)
        yield "beta_slow", self._positive("beta_slow", 1.0, self._value.get("beta_slow") or 1.0)
        yield "truncate", bool(self._value.get("truncate", True))

    def _longrope(self, factor: float | None, original: Any, head_dim: Any) -> Iterator[tuple[str, Any]]:
        for name in ("short_factor", "long_factor"):
            value, count = self._value.get(name), head_dim // 2 if type(head_dim) is int else 0
            if not isinstance(value, list) or len(value) != count or not all(map(_is_positive, value)):
                said = "missing" if value is None else f"{str(value)[:60]}"
                self._wrong(name, f"is {said}, expected a positive number for each of {count} frequencies")
            else:
                yield name, tuple(map(float, value))
        default = 1.0
        if factor is not None and factor > 1 and original:
            if original <= 1:
                self._wrong(OUTSIDE, f"is {original}, expected more than 1 with longrope")
            else:
                default = math.sqrt(1 + math.log(factor) / math.log(original))
        yield "attention_factor", self._positive("attention_factor", default)

    def _positive(self, name: str, default: Any, value: Any = None) -> Any:
        """Returns a setting, or the default where it is null or absent; a positive number, else that is wrong."""
        value = self._value.get(name) if value is None else value
        value = default if value is None else value
        if value is None:
            self._wrong(name, "is missing")
        elif not _is_positive(value):
            self._wrong(name, f"is {value!r}, expected a positive number")
            return None
        return value if name == OUTSIDE else _number(value)

    def _wrong(self, name: str, said: str) -> None:
        # Without the setting the rule is no better: what can be left out is the rule.
        self._problems.append(Problem(self._key, f"{self._key}.{name} {said}"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that float32 can hold."""
    return _is_number(value) and 0 < value < 2.0**127


def _number(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"of {len(value)} numbers"
    return f"{value:g}" if isinstance(value, float) else str(value)
