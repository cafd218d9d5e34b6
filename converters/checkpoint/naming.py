"""Names that wrappers and other programs give to tensors: a prefix in front of all, parts within, `model.` missing.

torch.compile, DataParallel, FSDP, PEFT and multimodal models put parts of their own before or into the names of a
model's tensors; a model that was saved without its head lacks `model.`. Held against the names that are expected, such
names follow a few rules, each a beginning that stands in place of another. transformers knows two of them: it adds
`model.`, and takes it away (`base_model_prefix` in `modeling_utils.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.incomplete import TRAINING
from apr_jax.converters.checkpoint.qwen2 import HEAD, RECOMPUTED, Qwen2Config, check_tensors
from apr_jax.converters.errors import RefusedError, UsageError, printable

# Beginnings that transformers exchanges for each other.
_BASE_PREFIXES = ("", "model.")
# A layer's tensors have two parts of their own at least ("q_proj.weight"); one alone ("weight") says nothing.
_COMMON_PARTS = 2
_MOST_RULES = 8
# How often rules that meet are told apart by one more part of the name.
_MOST_EXTENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Rename:
    """A rule for names: what begins with `before` begins with `after` instead; FROM=TO on a command line.

    Attributes:
      before: The beginning; "*" stands for anything between two dots. "" is the beginning of every name.
      after: What takes its place; each "*" stands for what that of `before` stood for.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str) -> Rename:
        """Reads "FROM=TO"; either may be empty.

        Raises:
          UsageError: Code "rename".
        """
        before, equals, after = text.partition("=")
        if not equals or after.count("*") > before.count("*"):
            raise UsageError(
                f"'{text}' is not a renaming",
                code="rename",
                expected="FROM=TO, two beginnings of names, as _orig_mod.= or model.language_model.=model.; TO may "
                "hold as many * as FROM",
            )
        return cls(before, after)

    def __str__(self) -> str:
        return f"{self.before}={self.after}"

    def apply(self, name: str) -> str | None:
        """Returns the new name, or None if the name does not begin so."""
        found = self._pattern.match(name)
        if found is None:
            return None
        parts = self.after.split("*")
        stars = (*found.groups()[: len(parts) - 1], "")
        return "".join(part + star for part, star in zip(parts, stars, strict=True)) + name[found.end() :]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(r"([^.]+)".join(map(re.escape, self.before.split("*"))))


def renamed(names: Iterable[str], rules: Sequence[Rename]) -> dict[str, str]:
    """Returns name -> new name. Of several rules that fit a name the one with the longest beginning counts, once.

    Raises:
      UsageError: Code "rename-matches-nothing": no name begins so. Code "rename-collides": two tensors would have one
        name.
    """
    ordered = sorted(rules, key=_by_length)
    unused = set(rules)
    found: dict[str, str] = {}
    for name in names:
        rule = _fitting(name, ordered)
        new = None if rule is None else rule.apply(name)
        found[name] = name if new is None else new
        if rule is not None:
            unused.discard(rule)
    if unused:
        raise UsageError(
            f"no tensor's name begins with {', '.join(repr(rule.before) for rule in rules if rule in unused)}",
            code="rename-matches-nothing",
            found=f"{min(found)!r}" if found else "no tensors",
            hint="`show MODEL` lists the names",
        )
    twice = [new for new, count in Counter(found.values()).items() if count > 1 or not new]
    if twice:
        raise UsageError(
            f"several tensors would be called {twice[0]!r}" if twice[0] else "a tensor would have no name",
            code="rename-collides",
            found=sorted(name for name, new in found.items() if new == twice[0])[:5],
            hint="Give longer prefixes, so that the rest of the names differs",
        )
    return found


@dataclasses.dataclass(frozen=True)
class Naming:
    """How the names of tensors differ from those that are expected.

    Attributes:
      rules: What turns the ones into the others.
      names: Name -> expected name, of every tensor; what no rule is for has its own.
    """

    rules: tuple[Rename, ...]
    names: Mapping[str, str]

    @property
    def sentence(self) -> str:
        """The rules in words, in one line."""
        changing = [rule for rule in self.rules if rule.before != rule.after]
        changed = sum(name != new for name, new in self.names.items())
        which = (
            "every tensor's name" if changed == len(self.names) else f"{changed} of {len(self.names)} tensors' names"
        )
        rule = changing[0]
        if len(changing) == 1 and not rule.after:
            text = f"{which} {'has' if which.startswith('every') else 'have'} '{rule.before}' in front"
        elif len(changing) == 1 and not rule.before:
            text = f"{which} {'lacks' if which.startswith('every') else 'lack'} '{rule.after}' in front"
        else:
            listed = (f"'{rule.before}' in place of '{rule.after}'" for rule in changing)
            text = f"{which} begin{'s' if which.startswith('every') else ''} with {', and '.join(listed)}"
        return printable(text)

    @property
    def options(self) -> str:
        """What `convert` has to be told to give the tensors the names that are expected."""
        return " ".join(f"--rename {shlex.quote(str(rule))}" for rule in self.rules)

    @property
    def known_to_transformers(self) -> bool:
        """Whether transformers loads a checkpoint with such names as if it had the others."""
        return all(rule.before == rule.after or {rule.before, rule.after} == set(_BASE_PREFIXES) for rule in self.rules)

    @property
    def hides(self) -> bool:
        """Whether programs that read tensors by the names that are expected do not find them."""
        return any(
            rule.before != rule.after
            and rule.before not in _BASE_PREFIXES
            and rule.before.count(".") >= rule.after.count(".")
            for rule in self.rules
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the rules as plain JSON values."""
        rules = [{"before": rule.before, "after": rule.after} for rule in self.rules]
        return {"rules": rules, "hides_tensors": self.hides, "sentence": self.sentence}


def recognise(found: Collection[str], expected: Collection[str]) -> Naming | None:
    """Returns the rules by which names differ from what is expected; None if they do not, or follow none.

    A name belongs to the expected one with which it shares most parts at its end, two at least, and all numbers
    (layers). What it has before that stands in place of what the other has.
    """
    held, wanted = set(found), set(expected)
    strange, missing = sorted(held - wanted), wanted - held
    if not strange or not missing:
        return None
    pairs = list(_pairs(strange, missing))
    # A model may be a part of what is there (of a multimodal one, say), or the other way round.
    if 2 * len(pairs) < min(len(strange), len(missing)):
        return None
    rules = _rules(pairs)
    # A name that is right already is not to be caught by a rule that is for others.
    right = {name.partition(".")[0] + "." for name in held & wanted if any(rule.apply(name) for rule in rules)}
    rules += [Rename(beginning, beginning) for beginning in sorted(right)]
    if len(rules) > _MOST_RULES:
        return None
    try:
        names = renamed(sorted(held), rules)
    except UsageError:
        return None
    if any(names[name] != other for name, other in pairs) or any(names[name] != name for name in held & wanted):
        return None
    return Naming(tuple(rules), names)


def expected_names(config: Qwen2Config) -> set[str]:
    """Returns the names that HuggingFace gives to a model's tensors; a tied head may be there or not."""
    return {*config.tensor_shapes(), HEAD}


def check_names(path: str, config: Qwen2Config, shapes: Mapping[str, tuple[int, ...]]) -> Naming | None:
    """Checks that tensors are exactly those of a configuration, under names that transformers finds them by.

    Args:
      path: The checkpoint's, for error messages.
      config: The configuration.
      shapes: Name -> shape of every tensor; those that are no weights may be among them.

    Returns:
      How the names differ from the configuration's; None if they do not.

    Raises:
      RefusedError: Code "names-prefixed": every name is known, behind something that transformers does not know. Code
        "adapter-unmerged": PEFT wrapped some of the modules. Code "tensors-mismatch": see `qwen2.check_tensors`.
    """
    shapes = {name: shape for name, shape in shapes.items() if not is_no_weight(name)}
    wrapped = [name for name in shapes if ".base_layer." in name]
    if wrapped:
        raise RefusedError(
            "the adapter in this model is not merged: PEFT's parts stand beside the weights",
            code="adapter-unmerged",
            file=path,
            tensor=wrapped[0],
            hint="PEFT's merge_and_unload makes a plain checkpoint of it",
        )
    naming = recognise(shapes, expected_names(config))
    if naming is not None and not naming.known_to_transformers:
        raise RefusedError(
            f"the tensors are those of the model under other names: {naming.sentence}",
            code="names-prefixed",
            file=path,
            hint=f"`convert {naming.options}` gives them the model's names",
        )
    names: Mapping[str, str] = {} if naming is None else naming.names
    found = {names.get(name, name): shape for name, shape in shapes.items()}
    check_tensors(config, found, path)
    return naming


def is_no_weight(name: str) -> bool:
    """Whether a tensor of this name is none that a model computes with: an optimizer's state, or a table of RoPE's.

    Old versions of transformers saved the frequencies; it makes them anew from the configuration, and so do we.
    """
    return name.startswith(TRAINING) or name.endswith(RECOMPUTED)


def for_model(checkpoint: Checkpoint, config: Qwen2Config) -> Checkpoint:
    """Returns a checkpoint as transformers loads it: with or without `model.` in front, it is the same model.

    Tensors that are no weights (`is_no_weight`) are not in it.

    Raises:
      RefusedError: As `check_names`.
    """
    checkpoint = checkpoint.without(filter(is_no_weight, checkpoint.tensors))
    naming = check_names(checkpoint.path, config, {name: t.shape for name, t in checkpoint.tensors.items()})
    return checkpoint if naming is None else checkpoint.renamed(naming.names)


def _pairs(strange: Iterable[str], missing: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields each name with the expected one that it has to be, where there is just one."""
    table: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for name in missing:
        table.setdefault((_numbers(name), _ending(name)), []).append(name)
    # A wrapper may have a number of its own in front ("0.auto_model."), of either.
    shorter: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for numbers, ending in table:
        for first in range(1, len(numbers) + 1):
            shorter.setdefault((numbers[first:], ending), []).extend(table[numbers, ending])
    for name in strange:
        numbers, ending = _numbers(name), _ending(name)
        found = [table.get((numbers[first:], ending), []) for first in range(len(numbers) + 1)]
        others = chain(*found, shorter.get((numbers, ending), []))
        candidates = {other: _common(name, other) for other in others}
        most = max(candidates.values(), default=0)
        best = [other for other, common in candidates.items() if common == most]
        if len(best) == 1:
            yield name, best[0]


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())


def _ending(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-_COMMON_PARTS:])


def _common(a: str, b: str) -> int:
    """Returns how many parts two names share at their end."""
    parts = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return next(
        (count for count, (left, right) in enumerate(parts) if left != right), min(a.count("."), b.count(".")) + 1
    )


def _rules(pairs: Sequence[tuple[str, str]]) -> list[Rename]:
    """Returns the rules for pairs of names, one for each beginning; of two that meet the rarer is longer."""
    extended = dict.fromkeys(pairs, 0)
    rules: list[Rename] = []
    for _ in range(_MOST_EXTENSIONS):
        own = {pair: _rule(*pair, extended[pair]) for pair in pairs}
        usual: dict[str, Rename] = {}
        for rule, _ in Counter(own.values()).most_common():
            usual.setdefault(rule.before, rule)
        if len(usual) > 2 * _MOST_RULES:
            return []
        rules = sorted(usual.values(), key=_by_length)
        longer = set()
        for pair in pairs:
            applied = _fitting(pair[0], rules)
            if applied is not None and applied.apply(pair[0]) != pair[1]:
                # The exception to a usual rule, or all that belong to a rule that catches what is not its own.
                longer |= {pair} if applied.before == own[pair].before else {p for p in pairs if own[p] == applied}
        if not longer:
            break
        for pair in longer:
            extended[pair] += 1
    return rules


def _by_length(rule: Rename) -> int:
    return -len(rule.before)


def _fitting(name: str, ordered: Iterable[Rename]) -> Rename | None:
    return next((rule for rule in ordered if rule.apply(name) is not None), None)


def _rule(name: str, other: str, extended: int) -> Rename:
    """Returns the rule of one pair; `extended` more parts than needed tell it from others."""
    common = max(0, _common(name, other) - extended)
    before, after = name.split(".")[: -common or None], other.split(".")[: -common or None]
    if common == 0:
        return Rename(name, other)
    if _numbers(".".join(before)) == _numbers(".".join(after)):
        before, after = (["*" if part.isdecimal() else part for part in parts] for parts in (before, after))
    return Rename("".join(f"{part}." for part in before), "".join(f"{part}." for part in after))
