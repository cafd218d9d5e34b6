"""What an `.apr` says about its model, made from a HuggingFace checkpoint's config, tokenizer and side files, and back.

Key order and spelling are those of aprender's command `apr` (apr-v2-format sections 3.1 to 3.3). HuggingFace's
spellings never stand at top level: the engine reads some of them as aliases and drops all metadata when it meets two
names of one thing (3.4).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from apr_jax.converters.checkpoint.checkpoint import SOURCE_FILES_KEY, SOURCE_ORDER_KEY
from apr_jax.converters.checkpoint.qwen2 import TIED, Qwen2Config
from apr_jax.converters.errors import AprJaxError, BrokenContainerError
from apr_jax.converters.formats import strict_json

SOURCE_METADATA = "source_metadata"
# Under this key of safetensors' `__metadata__` travels the metadata of an `.apr` that another writer made.
FOREIGN_METADATA = "apr_metadata"

_MAX_SIDE_FILE_BYTES = 64 << 20
_ROPE_SPLIT_HALVES = 2
# Key of `.apr` -> HuggingFace's.
_HF_INTEGERS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "head_dim": "head_dim",
}
_HOLE = "<unk>"
# A vocabulary may be larger than the embedding, and have holes, but not any number of them.
_LARGEST_SHARE = 2


def from_huggingface(
    config: Mapping[str, Any] | None,
    model: Qwen2Config | None,
    files: Mapping[str, bytes],
    source_metadata: Mapping[str, str] | None,
    *,
    order: Sequence[str] | None = None,
    name: str,
    param_count: int,
    total_size: int,
    warnings: list[str],
) -> dict[str, Any]:
    """Returns the metadata of an `.apr` file for a HuggingFace checkpoint.

    Args:
      config: The content of config.json, or None if there is none (the file then holds no architecture).
      model: The same, checked; None for what is not computed here: then the numbers are config.json's own.
      files: Side files, name -> content.
      source_metadata: The strings of safetensors' `__metadata__`; None if there is none.
      order: Names of the tensors in the order of their data in the source, where it is not the usual one.
      name: The model's name.
      param_count: Elements of all tensors written.
      total_size: Bytes of all tensors written.
      warnings: Added to.
    """
    typed: dict[str, Any] = {
        "model_type": "" if model is None else "Qwen2",
        "name": name,
        "license": None,
        "data_source": None,
        "data_license": None,
        "original_format": "safetensors",
        "total_size": total_size,
        "param_count": param_count,
    }
    if config is not None:
        typed |= _unknown_architecture(config) if model is None else _architecture(config, model)
    custom: dict[str, Any] = {}
    if source_metadata is not None:
        custom[SOURCE_METADATA] = dict(source_metadata)
    if config is not None:
        if config.get(TIED) is True:
            custom["tied_embeddings"] = True
        vocab_size = typed.get("vocab_size") if model is None else model.vocab_size
        custom |= _tokenizer(files, config, vocab_size or 0, warnings)
    if order is not None:
        custom[SOURCE_ORDER_KEY] = list(order)
    # Always there, empty or not: it marks the file as one that can be taken back exactly.
    custom[SOURCE_FILES_KEY] = encode_files(files)
    return typed | custom


def malformed(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong about the typed fields of an `.apr`: a number that is text, negative, or not finite."""
    for key in _HF_INTEGERS:
        value = metadata.get(key)
        if value is not None and not (type(value) is int and 0 <= value < 2**31):
            yield f"{key} is {str(value)[:40]!r}, expected a positive integer"
    for key in ("rope_theta", "rms_norm_eps"):
        value = metadata.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf):
            yield f"{key} is {str(value)[:40]!r}, expected a positive number"


def _architecture(config: Mapping[str, Any], model: Qwen2Config) -> dict[str, Any]:
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    return {
        "architecture": "qwen2",
        "hf_architecture": architectures[0] if named and architectures else "Qwen2ForCausalLM",
        "hf_model_type": "qwen2",
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": strict_json.f32(model.rope_theta),
        "rope_type": _ROPE_SPLIT_HALVES,
        "rms_norm_eps": strict_json.f32(model.rms_norm_eps),
    } | ({"head_dim": model.head_dim} if config.get("head_dim") is not None else {})


def _unknown_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what config.json says under the names that most architectures have for it, unchecked.

    How RoPE pairs is not said: `apr` has its own table for that.
    """
    architectures, kind = config.get("architectures"), config.get("model_type")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    found = {"architecture": kind, "hf_architecture": named, "hf_model_type": kind}
    known: dict[str, Any] = {key: text for key, text in found.items() if isinstance(text, str)}
    for key, name in _HF_INTEGERS.items():
        if type(config.get(name)) is int and 0 < config[name] < 2**31:
            known[key] = config[name]
    for key in ("rope_theta", "rms_norm_eps"):
        if type(config.get(key)) in (int, float, strict_json.SpeltFloat) and 0 < config[key] < 1e30:
            known[key] = strict_json.f32(config[key])
    return known


def encode_files(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns name -> text, or {"base64": ...} where the content is not UTF-8, in name order."""
    encoded: dict[str, Any] = {}
    for name in sorted(files):
        content = files[name]
        try:
            encoded[name] = str(content, "utf-8")
        except UnicodeDecodeError:
            encoded[name] = {"base64": base64.b64encode(content).decode("ascii")}
    return encoded


# --- the tokenizer, as `apr run` reads it


def _tokenizer(
    files: Mapping[str, bytes], config: Mapping[str, Any], vocab_size: int, warnings: list[str]
) -> dict[str, Any]:
    try:
        found = _read_tokenizer(files)
    except (AprJaxError, _NotUnderstood) as error:
        message = error.message if isinstance(error, AprJaxError) else str(error)
        warnings.append(f"the tokenizer is not understood, so `apr` cannot take text with this file: {message}")
        return {}
    if found is None:
        warnings.append("there is no tokenizer, so `apr` cannot take text with this file")
        return {}
    ids, merges = found
    ids |= _configured(files, ids)
    length = max(vocab_size, max(ids.values(), default=-1) + 1)
    if length > _LARGEST_SHARE * max(vocab_size, len(ids)):
        # Most of the list would be holes, for rows that the embedding does not have.
        warnings.append(
            f"the tokenizer is not understood, so `apr` cannot take text with this file: it has {len(ids)} tokens, and "
            f"an id of {length - 1} beyond the {vocab_size} of the configuration"
        )
        return {}
    vocabulary = [_HOLE] * length
    for token, position in ids.items():
        vocabulary[position] = token
    keys: dict[str, Any] = {
        "tokenizer.vocabulary": vocabulary,
        "tokenizer.vocab_size": length,
        "tokenizer.merges": merges,
        "tokenizer.model_type": "BPE",
    }
    for key in ("bos_token_id", "eos_token_id"):
        # An array (several ends of text) has no place in the format; its first is the one that chat turns end with.
        given = config.get(key)
        number = given[0] if isinstance(given, list) and given else given
        if type(number) is int and 0 <= number < length:
            keys[f"tokenizer.{key}"] = number
    return keys


class _NotUnderstood(Exception):
    pass


def _read_tokenizer(files: Mapping[str, bytes]) -> tuple[dict[str, int], list[str]] | None:
    """Returns token -> id with added tokens, and merges as "left right"; None if there is no tokenizer."""
    if "tokenizer.json" in files:
        parsed = _parse(files, "tokenizer.json")
        model = parsed.get("model") if isinstance(parsed, dict) else None
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise _NotUnderstood("tokenizer.json is no byte-level BPE tokenizer")
        tokens = _ids(model["vocab"].items()) | _ids(_added(_list(parsed, "added_tokens")))
        return tokens, [_merge(merge) for merge in _list(model, "merges")]
    if "vocab.json" not in files or "merges.txt" not in files:
        return None
    tokens = _ids(_object(files, "vocab.json").items())
    if "added_tokens.json" in files:
        tokens |= _ids(_object(files, "added_tokens.json").items())
    try:
        lines = files["merges.txt"].decode("utf-8", "strict").split("\n")
    except UnicodeDecodeError:
        raise _NotUnderstood("merges.txt is not UTF-8") from None
    return tokens, [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]


def _configured(files: Mapping[str, bytes], known: Mapping[str, int]) -> dict[str, int]:
    """Returns the added tokens that tokenizer_config.json alone names, where their ids are free."""
    try:
        config = _object(files, "tokenizer_config.json") if "tokenizer_config.json" in files else {}
        added = {str(token["content"]): int(number) for number, token in config["added_tokens_decoder"].items()}
    except (AprJaxError, _NotUnderstood, LookupError, TypeError, ValueError, AttributeError):
        return {}
    taken = set(known.values())
    return {
        token: number for token, number in added.items() if token not in known and number >= 0 and number not in taken
    }


def _parse(files: Mapping[str, bytes], name: str) -> Any:
    return strict_json.loads(
        files[name], what=name, max_bytes=_MAX_SIDE_FILE_BYTES, budget=strict_json.TOKENIZER, wide=True, file=name
    )


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = _parse(files, name)
    if not isinstance(value, dict):
        raise _NotUnderstood(f"{name} is not an object")
    return value


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    found = values.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise _NotUnderstood(f"its {key} are no list")
    return found


def _added(added: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    for token in added:
        if not isinstance(token, dict):
            raise _NotUnderstood("an added token is no object")
        yield token.get("content"), token.get("id")


def _ids(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    tokens = {}
    for token, number in pairs:
        if not isinstance(token, str) or type(number) is not int or number < 0:
            raise _NotUnderstood(f"token {token!r} has the id {number!r}")
        tokens[token] = number
    return tokens


def _merge(merge: Any) -> str:
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
        return " ".join(merge)
    if not isinstance(merge, str):
        raise _NotUnderstood(f"a merge is {merge!r}")
    return merge


# --- back to HuggingFace


def config_json(config: Mapping[str, Any]) -> bytes:
    """Returns the text of a config.json, laid out as transformers lays it out."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def foreign_to_safetensors(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the `__metadata__` for the content of an `.apr` that another writer made.

    What the `.apr` itself had kept of it, "format": "pt" where it had kept nothing (old transformers want it), and all
    of the `.apr`'s metadata as one string that `foreign_from_safetensors` inverts.
    """
    kept = metadata.get(SOURCE_METADATA)
    strings = {key: value for key, value in kept.items() if isinstance(value, str)} if isinstance(kept, Mapping) else {}
    return (strings or {"format": "pt"}) | {FOREIGN_METADATA: strict_json.dumps(dict(metadata)).decode()}


def foreign_from_safetensors(source_metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Inverts `foreign_to_safetensors`; None if there is nothing to invert.

    Raises:
      BrokenContainerError: The string is not a JSON object.
    """
    text = source_metadata.get(FOREIGN_METADATA)
    if text is None:
        return None
    parsed = strict_json.loads(
        text.encode(), what=FOREIGN_METADATA, max_bytes=_MAX_SIDE_FILE_BYTES, budget=strict_json.METADATA, wide=True
    )
    if not isinstance(parsed, dict):
        raise BrokenContainerError(f"{FOREIGN_METADATA} is not an object", code="metadata-type")
    return parsed
