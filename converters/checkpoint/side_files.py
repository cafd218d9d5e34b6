"""Whether what lies beside the tensors can be read, and whether the tokenizer fits the embedding.

A file that is there and broken is another thing than one that is not there: programs stop at it, or take defaults.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from apr_jax.converters.errors import AprJaxError, FindingError
from apr_jax.converters.formats import strict_json
from apr_jax.converters.formats.foreign import foreign_format

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

_MAX_BYTES = 64 << 20
_TEXTS = ("merges.txt", "vocab.txt", "*.jinja")
# Nothing reads these by machine.
_FOR_PEOPLE = ("README*", "LICENSE*", "NOTICE*", ".gitattributes")


# A tokenizer has megabytes, and is looked at more than once: of two checkpoints, mostly the same one.
@functools.lru_cache(maxsize=4)
def parse(content: bytes) -> dict[str, Any]:
    """Returns the object that a side file's JSON text holds; not to be changed.

    Raises:
      ValueError: It holds none; the message says what is there, as "is empty".
    """
    problem = _foreign(content)
    if problem is not None:
        raise ValueError(problem)
    try:
        value = strict_json.loads(content, what="", max_bytes=_MAX_BYTES, budget=strict_json.TOKENIZER, wide=True)
    except AprJaxError as error:
        raise ValueError(_words(error, content)) from None
    if not isinstance(value, dict):
        kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        raise ValueError(f"holds {kinds.get(type(value), 'a number')} in place of an object")
    return value


def broken(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns name -> what is wrong, of every side file that programs could not read."""
    problems = {name: _problem(name, files) for name in files if not _matches(name, _FOR_PEOPLE)}
    return {name: problem for name, problem in problems.items() if problem is not None}


def vocabulary(checkpoint: Checkpoint) -> dict[int, str]:
    """Returns id -> token; empty where there is no tokenizer, or none that can be read.

    Of an `.apr` without side files, the list in its metadata.
    """
    tokens = dict(_tokens(checkpoint.files))
    if not tokens and not checkpoint.files:
        listed = checkpoint.metadata.get("tokenizer.vocabulary")
        tokens = {number: str(token) for number, token in enumerate(listed)} if isinstance(listed, list) else {}
    return tokens


def _problem(name: str, files: Mapping[str, bytes]) -> str | None:
    try:
        content = files[name]
    except FindingError as error:
        return f"cannot be read: {error.message}"
    if not name.endswith(".json"):
        problem = _foreign(content)
        return _text_problem(content) if problem is None and _matches(name, _TEXTS) else problem
    try:
        parse(content)
    except ValueError as error:
        return str(error)
    return None


def _foreign(content: bytes) -> str | None:
    if not content.strip():
        return "is empty" if not content else "holds nothing but blanks"
    name = foreign_format(content)
    if name is None:
        return None
    return f"is {name}" + ("; `git lfs pull` fetches that" if "Git-LFS" in name else "")


def _text_problem(content: bytes) -> str | None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8, at byte {error.start}"
    return "holds NUL characters" if b"\0" in content else None


def _words(error: AprJaxError, content: bytes) -> str:
    text = error.message.strip()
    if content[:3] == b"\xef\xbb\xbf":
        return text + ", with which transformers does not read it; save it as UTF-8 without one"
    if error.code == "json-number":
        return f"{text} ({error.found}); Python reads it, other programs do not"
    if error.code == "json-syntax":
        return f"{text}, at byte {error.offset} of {len(content)}"
    return text


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# --- the vocabulary


def _tokens(files: Mapping[str, bytes]) -> Iterator[tuple[int, str]]:
    """Yields id and token of every place that may name a token."""
    parsed: dict[str, Any] = {}
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json"):
        if name in files and not (name == "vocab.json" and "tokenizer.json" in parsed):
            try:
                parsed[name] = parse(files[name])
            except (ValueError, AprJaxError):
                continue
    tokenizer = parsed.get("tokenizer.json", {})
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        # Unigram: pairs of token and score, in order.
        yield from ((number, str(pair[0])) for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair)
    for table in (vocabulary, parsed.get("vocab.json"), parsed.get("added_tokens.json")):
        if isinstance(table, dict):
            yield from ((number, token) for token, number in table.items() if type(number) is int)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield token["id"], str(token.get("content"))
    decoder = parsed.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if number.isdecimal() and isinstance(token, dict):
            yield int(number), str(token.get("content"))
