"""What the configurations of two checkpoints disagree about, and what they say of their heads that is not so."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD, TIED, Qwen2Config
from apr_jax.converters.checkpoint.tied_heads import same_values, stated
from apr_jax.converters.errors import AprJaxError, FindingError, RefusedError

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

# How long a sequence may be; of sequences that long no logit changes.
_NO_LOGITS = ("max_position_embeddings",)
# Of a configuration that is not computed here: who wrote it, and in what type it is kept.
_BOOKKEEPING = frozenset(
    """architectures transformers_version torch_dtype dtype _name_or_path use_cache auto_map initializer_range
    attention_dropout hidden_dropout unsloth_fixed unsloth_version _attn_implementation_autoset tokenizer_class
    bos_token_id eos_token_id pad_token_id""".split()
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """An attribute of the model about which the checkpoints' configurations disagree.

    Attributes:
      attribute: Its name; "config" where one side's cannot be had.
      a, b: What each side says.
      sentence: The same for people.
      changes_logits: Whether a program that believes B computes something else than with A.
    """

    attribute: str
    a: Any
    b: Any
    sentence: str
    changes_logits: bool = True


def compare_configurations(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """Returns what the configurations of two checkpoints disagree about, and what is untrue of their heads.

    Raises:
      StorageError: A head or an embedding cannot be read.
    """
    one, two = _configuration(a), _configuration(b)
    differences: list[Difference] = []
    if isinstance(one, Qwen2Config) and isinstance(two, Qwen2Config):
        differences += _attribute_differences(one, two)
    else:
        left, right = _raw(a), _raw(b)
        if left is not None and right is not None:
            differences += _raw_differences(left, right)
        for label, found, other in (("A", one, two), ("B", two, one)):
            # With neither there are only tensors, and nothing to disagree about. Of a broken file `side_files` tells.
            if isinstance(found, RefusedError) and isinstance(other, Qwen2Config):
                said = f"the configuration of {label} cannot be had: {found.message.replace(chr(10) + '  ', ' ')}"
                read = [isinstance(config, Qwen2Config) for config in (one, two)]
                differences.append(Difference("config", read[0], read[1], said, changes_logits=False))
    return differences + _tie_differences(a, b)


def _configuration(checkpoint: Checkpoint) -> Qwen2Config | AprJaxError:
    try:
        return checkpoint.model_config()
    except FindingError as error:
        return error


def _raw(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Returns what config.json holds, of any architecture; None if there is none that can be read."""
    try:
        return checkpoint.config if CONFIG_NAME in checkpoint.files else None
    except FindingError:
        return None


def _attribute_differences(a: Qwen2Config, b: Qwen2Config) -> Iterable[Difference]:
    for field in dataclasses.fields(Qwen2Config):
        left, right = getattr(a, field.name), getattr(b, field.name)
        # `.apr` keeps these numbers as float32; whether the head is tied, the tensors say better.
        same = struct.pack("<f", left) == struct.pack("<f", right) if isinstance(left, float) else left == right
        if not same and field.name != TIED:
            sentence = f"{field.name} is {left} in A and {right} in B"
            yield Difference(field.name, left, right, sentence, field.name not in _NO_LOGITS)


def _raw_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys((*a, *b)):
        left, right = a.get(key), b.get(key)
        if left != right and key not in _BOOKKEEPING and key != TIED:
            yield Difference(key, left, right, f"{key} is {left} in A and {right} in B", key not in _NO_LOGITS)


def _tie_differences(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """Finds out whether the files say of their heads what is true, and the same."""
    statements = [stated(checkpoint) for checkpoint in (a, b)]
    said = [None if statement is None else statement.tied for statement in statements]
    untrue: dict[str, str] = {}
    for label, declared, checkpoint in (("A", said[0], a), ("B", said[1], b)):
        if declared and _has_own_head(checkpoint):
            untrue[label] = (
                f"{label} says that its head is tied, but its {HEAD} has values of its own: programs that believe "
                "the metadata drop it"
            )
        elif declared is False and HEAD not in checkpoint.tensors:
            untrue[label] = f"{label} says that its head is not tied, and has no {HEAD}"
    # What is wrong with A alone B does better, and what is wrong with both is no difference. The metadata of an `.apr`
    # decide nothing here.
    believed = statements[1] is not None and statements[1].where.startswith(TIED)
    found = [(line, label == "B" and "A" not in untrue and believed) for label, line in untrue.items()]
    if not found and None not in said and said[0] != said[1]:
        words = ["tied" if tied else "untied" for tied in said]
        found = [(f"the head is said to be {words[0]} in A and {words[1]} in B", False)]
    return [Difference(TIED, said[0], said[1], line, changes) for line, changes in found]


def _has_own_head(checkpoint: Checkpoint) -> bool:
    tensors = checkpoint.tensors
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    return not same_values(tensors[EMBEDDING], tensors[HEAD])
