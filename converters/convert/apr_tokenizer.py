"""The tokenizer that an `.apr` holds in its metadata, as HuggingFace's files.

`apr import` keeps a list of tokens and one of merges and drops the rest of tokenizer.json. Which tokens were added to
the vocabulary can be told without it: byte-level BPE makes every token of its own from single bytes by merges, so that
what is no byte and what no merge makes was added. What it does with a text before merging is Qwen2's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.converters.checkpoint.qwen2_tokenizer import added_token, tokenizer_json
from apr_jax.converters.errors import RefusedError, counted

VOCABULARY = "tokenizer.vocabulary"
_MERGES, _TYPES, _TEMPLATE = "tokenizer.merges", "tokenizer.token_type", "tokenizer.chat_template"
_END_IDS = {"bos_token": "tokenizer.bos_token_id", "eos_token": "tokenizer.eos_token_id"}
_HOLE = "<unk>"
WITHOUT_TOKENIZER = "Token ids work without a tokenizer: --input-ids FILE, or lists of ids in Python"
# GGML's types of tokens, which imports of GGUF keep.
_CONTROL, _USER_DEFINED = 3, 4
# Spelt as special tokens are, but shown in texts by Qwen2.5 and Qwen3.
_SHOWN = frozenset(
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
)


def files_of(metadata: Mapping[str, Any], warnings: list[str]) -> dict[str, bytes]:
    """Returns tokenizer.json and tokenizer_config.json for the tokenizer of an `.apr`; nothing if it holds none.

    Args:
      metadata: The metadata of the `.apr`.
      warnings: Added to: what the metadata lack, or say and cannot mean.

    Raises:
      RefusedError: Code "tokenizer-broken": vocabulary or merges are not what they are called.
    """
    if VOCABULARY not in metadata:
        return {}
    given = metadata.get(_MERGES)
    merges: Sequence[list[str]] = pairs([] if given is None else given, _MERGES)
    vocabulary = _ids(metadata[VOCABULARY], merges)
    merges = _known_merges(merges, vocabulary, warnings)
    roles = _roles(metadata, warnings)
    special = {token for token in vocabulary if _is_special(token)} | set(roles.values())
    added = _added(metadata, vocabulary, merges, special)
    if missing := [letter for letter in byte_letters() if letter not in vocabulary]:
        warnings.append(f"the tokenizer has no token for {counted(len(missing), 'byte')}: text with them loses them")
    listed = {vocabulary[token]: added_token(token, special=token in special) for token in added}
    whole = tokenizer_json(vocabulary, [" ".join(pair) for pair in merges], listed)
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(number): token for number, token in listed.items()},
        "bos_token": roles.get("bos_token"),
        "eos_token": roles.get("eos_token"),
        "pad_token": roles.get("eos_token"),
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if isinstance(template := metadata.get(_TEMPLATE), str):
        config["chat_template"] = template
    return {"tokenizer.json": _json(whole), "tokenizer_config.json": _json(config)}


def byte_letters() -> list[str]:
    """Returns GPT-2's letter for each byte: printable ones stand for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _ids(tokens: Any, merges: Sequence[Sequence[str]]) -> dict[str, int]:
    """Returns token -> id without the holes: `<unk>` at the end, or more than once and made by no merge.

    Qwen2's vocabulary has a token of that spelling; it stands before all holes.
    """
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise RefusedError(f"{VOCABULARY} is not a list of strings", code="tokenizer-broken", hint=WITHOUT_TOKENIZER)
    ids: dict[str, int] = {}
    for number, token in enumerate(tokens):
        ids.setdefault(token, number)
    is_hole = tokens.count(_HOLE) > 1 or tokens[-1:] == [_HOLE]
    if is_hole and not any("".join(pair) == _HOLE for pair in merges):
        del ids[_HOLE]
    return ids


def _known_merges(
    merges: Sequence[list[str]], vocabulary: Mapping[str, int], warnings: list[str]
) -> Sequence[list[str]]:
    known = [pair for pair in merges if pair[0] in vocabulary and pair[1] in vocabulary and "".join(pair) in vocabulary]
    if len(known) < len(merges):
        warnings.append(
            f"{counted(len(merges) - len(known), 'merge')} of the tokenizer make no token of its vocabulary: left out"
        )
    if not known:
        warnings.append("the tokenizer has no merges: text becomes a token for each byte, as the model never saw it")
    return known


def pairs(merges: Any, what: str) -> list[list[str]]:
    """Returns merges as pairs of tokens, whether they are pairs or "left right".

    Raises:
      RefusedError: Code "tokenizer-broken": one is neither.
    """
    if not isinstance(merges, list | tuple):
        raise RefusedError(
            f"{what}: not a list of merges",
            code="tokenizer-broken",
            found=type(merges).__name__,
            hint=WITHOUT_TOKENIZER,
        )
    found = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(found):
        if not _is_pair(pair):
            raise RefusedError(
                f"{what}: this is not a merge",
                code="tokenizer-broken",
                found=f"number {number}: {merges[number]!r}"[:200],
                expected='"left right" or ["left", "right"]',
                hint=WITHOUT_TOKENIZER,
            )
    return found


def _is_pair(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    left, right = pair
    # GPT-2's letter for a space is another character.
    return isinstance(left, str) and isinstance(right, str) and left != "" != right and " " not in left + right


def _roles(metadata: Mapping[str, Any], warnings: list[str]) -> dict[str, str]:
    tokens = metadata[VOCABULARY]
    roles = {}
    for role, key in _END_IDS.items():
        number = metadata.get(key)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            warnings.append(f"{key} is {number!r}, which none of the {len(tokens)} tokens has: not used")
        elif tokens[number] != _HOLE:
            roles[role] = tokens[number]
    return roles


def _is_special(token: str) -> bool:
    return len(token) > 4 and token.startswith("<|") and token.endswith("|>") and token not in _SHOWN


def _added(
    metadata: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], special: set[str]
) -> list[str]:
    """Returns the tokens that were added to the vocabulary, in the order of their ids."""
    types = metadata.get(_TYPES)
    if isinstance(types, list) and len(types) == len(metadata[VOCABULARY]):
        return [token for token, number in vocabulary.items() if types[number] in (_CONTROL, _USER_DEFINED)]
    if not merges:
        # Nothing tells added tokens from those whose merges are lost but their spelling.
        return [token for token in vocabulary if token in special or token in _SHOWN]
    made = {"".join(pair) for pair in merges} | set(byte_letters())
    return [token for token in vocabulary if token not in made]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
