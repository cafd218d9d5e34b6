"""What two checkpoints disagree about beside tensors and model: tokenizer, chat template, generation settings.

Equal weights give other answers behind another chat template or end token. Only what programs read is compared, by
meaning: spelling, order and bookkeeping do not count. A file that one side lacks is named, and gives no other answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint import side_files
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

Files = Mapping[str, bytes]

_SHOWN_KEYS = 8
_SHOWN_CHARACTERS = 60
_GENERATION = "generation_config.json"
# What transformers takes from config.json where there is no such file.
_GENERATION_IN_CONFIG = (
    *("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *(
        "repetition_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "suppress_tokens",
        "forced_eos_token_id",
    ),
)
_JINJA, _TEMPLATE_JSON, _TOKENIZER_CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
# What only sampling uses (`GenerationConfig` of transformers).
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BOOKKEEPING = ("transformers_version", "_from_model_config", "_name_or_path", "_commit_hash")
# transformers sets both anew at every call, whatever the file says.
_RESET = ("truncation", "padding", "version")
# Of tokenizer_config.json what changes ids or texts.
_TOKENIZER_SETTINGS = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("added_tokens_decoder", "clean_up_tokenization_spaces", "split_special_tokens", "do_lower_case"),
)


@dataclasses.dataclass(frozen=True)
class SideFileDifference:
    """One thing beside the tensors about which two checkpoints disagree.

    Attributes:
      name: The file, or "chat template", which stands in one of several.
      changes_answer: Whether a program that reads both may answer otherwise.
      sentence: What differs, for people.
      only_in: "A" or "B", if the other has no such file.
    """

    name: str
    changes_answer: bool
    sentence: str
    only_in: str | None = None


def compare_side_files(a: Checkpoint, b: Checkpoint) -> list[SideFileDifference]:
    """Returns what two checkpoints disagree about beside tensors and configuration, and what of it is broken.

    Files of a checkpoint that has none at all, as a lone .safetensors, are not missed; of an `.apr` without them the
    vocabulary in its metadata is compared.
    """
    found = list(_broken(a, b))
    if not a.files or not b.files:
        return found + list(_vocabulary_difference(a, b))
    unread = {difference.name for difference in found}
    for name, compare in _COMPARED.items():
        if name in a.files and name in b.files:
            if name not in unread:
                found += _difference(name, compare(a.files, b.files))
        elif name in a.files or name in b.files:
            side = "A" if name in a.files else "B"
            found.append(SideFileDifference(name, False, f"{name} is only in {side}", side))
    silent = not unread & {CONFIG_NAME, _GENERATION} and not any(_GENERATION in side.files for side in (a, b))
    if silent and CONFIG_NAME in a.files and CONFIG_NAME in b.files:
        found += _difference(CONFIG_NAME, _generation_by_configuration(a.files, b.files))
    if not unread & {_JINJA, _TEMPLATE_JSON, _TOKENIZER_CONFIG}:
        found += _template_difference(a.files, b.files)
    return found


def _broken(a: Checkpoint, b: Checkpoint) -> Iterator[SideFileDifference]:
    problems = {"A": side_files.broken(a.files), "B": side_files.broken(b.files)}
    for name in sorted({*problems["A"], *problems["B"]}):
        said = {label: listed[name] for label, listed in problems.items() if name in listed}
        if len(set(said.values())) == 1 and len(said) == 2:
            sentence = f"{name} {said['A']}, in A and in B"
        else:
            sentence = "; ".join(f"{name} of {label} {problem}" for label, problem in said.items())
        yield SideFileDifference(name, True, sentence)


def _difference(name: str, listed: Iterable[str]) -> Iterator[SideFileDifference]:
    words = list(listed)
    if words:
        more = f" and {len(words) - _SHOWN_KEYS} more" if len(words) > _SHOWN_KEYS else ""
        yield SideFileDifference(name, True, f"{name}: {', '.join(words[:_SHOWN_KEYS])}{more}")


def _vocabulary_difference(a: Checkpoint, b: Checkpoint) -> Iterator[SideFileDifference]:
    """Compares the tokens that both sides have an id for: an `.apr` fills holes, and may lack what was added."""
    one, two = side_files.vocabulary(a), side_files.vocabulary(b)
    differing = sorted(number for number in one.keys() & two.keys() if one[number] != two[number])
    if differing:
        first = differing[0]
        said = f"{first} is {_short(one[first])} in A, {_short(two[first])} in B"
        more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
        yield SideFileDifference("vocabulary", True, f"the tokens of the same ids are not the same: {said}{more}")


# --- by meaning: each yields what differs, in words


def _generation(a: Files, b: Files) -> Iterator[str]:
    return _keys(*(_settings(side_files.parse(files[_GENERATION])) for files in (a, b)))


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    ignored = {*_BOOKKEEPING, *(() if given.get("do_sample") else _SAMPLING)}
    # One end token, alone or in a list.
    alone = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in given.items()}
    return {key: value for key, value in alone.items() if key not in ignored}


def _generation_by_configuration(a: Files, b: Files) -> Iterator[str]:
    """Compares what config.json says of generation, which counts where there is no generation_config.json."""
    given = [side_files.parse(files[CONFIG_NAME]) for files in (a, b)]
    return _keys(*(_settings({key: config.get(key) for key in _GENERATION_IN_CONFIG}) for config in given))


def _tokenizer(a: Files, b: Files) -> Iterator[str]:
    if a["tokenizer.json"] == b["tokenizer.json"]:
        return
    left, right = (side_files.parse(files["tokenizer.json"]) for files in (a, b))
    yield from (f"another model.{key}" for key in _differing(_model_parts(left), _model_parts(right)))
    rest = [{k: v for k, v in value.items() if k not in ("model", *_RESET)} for value in (left, right)]
    yield from (f"other {key}" if key.endswith("s") else f"another {key}" for key in _differing(*rest))


def _model_parts(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        return {"type": model}
    merges = model.get("merges")
    spelt = [" ".join(merge) if isinstance(merge, list) else merge for merge in merges] if merges else merges
    return {**model, "merges": spelt}


def _tokenizer_settings(a: Files, b: Files) -> Iterator[str]:
    left, right = (side_files.parse(files[_TOKENIZER_CONFIG]) for files in (a, b))
    return _keys(*({key: _content(value.get(key)) for key in _TOKENIZER_SETTINGS} for value in (left, right)))


def _objects(name: str) -> Callable[[Files, Files], Iterator[str]]:
    """Compares a file whose keys all count, unless tokenizer.json stands in its place on both sides."""

    def compare(a: Files, b: Files) -> Iterator[str]:
        if name != "special_tokens_map.json" and "tokenizer.json" in a and "tokenizer.json" in b:
            return iter(())
        left, right = (side_files.parse(files[name]) for files in (a, b))
        return _keys(*({key: _content(value) for key, value in side.items()} for side in (left, right)))

    return compare


def _merges(a: Files, b: Files) -> Iterator[str]:
    beside = "tokenizer.json" in a and "tokenizer.json" in b
    lines = [[line for line in files["merges.txt"].splitlines() if line.strip()] for files in (a, b)]
    if not beside and lines[0] != lines[1]:
        yield "other merges"


def _plain(name: str) -> Callable[[Files, Files], Iterator[str]]:
    def compare(a: Files, b: Files) -> Iterator[str]:
        if a[name] != b[name]:
            yield "other bytes"

    return compare


_COMPARED: dict[str, Callable[[Files, Files], Iterator[str]]] = {
    _GENERATION: _generation,
    "tokenizer.json": _tokenizer,
    _TOKENIZER_CONFIG: _tokenizer_settings,
    "special_tokens_map.json": _objects("special_tokens_map.json"),
    "added_tokens.json": _objects("added_tokens.json"),
    "vocab.json": _objects("vocab.json"),
    "merges.txt": _merges,
    "tokenizer.model": _plain("tokenizer.model"),
}


def _template_difference(a: Files, b: Files) -> Iterator[SideFileDifference]:
    left, right = _template(a), _template(b)
    if left == right:
        return
    name = "chat template"
    if left is None or right is None:
        side = "B" if left is None else "A"
        yield SideFileDifference(name, False, f"only {side} has a chat template", side)
        return
    yield SideFileDifference(name, True, "the chat templates are not the same")


def _template(files: Files) -> Any:
    """Returns the chat template as transformers finds it: the file of its own before tokenizer_config.json's."""
    if _JINJA in files:
        return files[_JINJA].decode()
    for name in (_TEMPLATE_JSON, _TOKENIZER_CONFIG):
        template = side_files.parse(files[name]).get("chat_template") if name in files else None
        if template is not None:
            return template
    return None


def _keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for key in _differing(a, b):
        yield f"{key} {_short(a.get(key))} in A, {_short(b.get(key))} in B"


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the keys with other values; null and absent are one."""
    return [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]


def _content(value: Any) -> Any:
    """Returns a token by its text, in whatever way it is spelt."""
    if isinstance(value, dict):
        content = value.get("content")
        return content if content is not None else {key: _content(inner) for key, inner in value.items()}
    return [_content(inner) for inner in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
