"""What the configurations of two checkpoints disagree about, and what they say of their heads that is not so."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD, Qwen2Config
from apr_jax.converters.checkpoint.tied_heads import TIED, same_values, stated
from apr_jax.converters.errors import AprJaxError

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Difference:
    """An attribute of the model about which the checkpoints' configurations disagree."""

    attribute: str
    a: Any
    b: Any
    sentence: str


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
        for label, found, other in (("A", one, two), ("B", two, one)):
            # With neither there are only tensors, and nothing to disagree about.
            if isinstance(found, AprJaxError) and isinstance(other, Qwen2Config):
                said = f"the configuration of {label} cannot be had: {found.message.splitlines()[0]}"
                read = [isinstance(config, Qwen2Config) for config in (one, two)]
                differences.append(Difference("config", read[0], read[1], said))
    return differences + _tie_differences(a, b)


def _configuration(checkpoint: Checkpoint) -> Qwen2Config | AprJaxError:
    try:
        return checkpoint.model_config()
    except AprJaxError as error:
        return error


def _attribute_differences(a: Qwen2Config, b: Qwen2Config) -> Iterable[Difference]:
    for field in dataclasses.fields(Qwen2Config):
        left, right = getattr(a, field.name), getattr(b, field.name)
        # `.apr` keeps these numbers as float32; whether the head is tied, the tensors say better.
        same = struct.pack("<f", left) == struct.pack("<f", right) if isinstance(left, float) else left == right
        if not same and field.name != TIED:
            yield Difference(field.name, left, right, f"{field.name} is {left} in A and {right} in B")


def _tie_differences(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """Finds out whether the files say of their heads what is true, and the same."""
    statements = [stated(checkpoint) for checkpoint in (a, b)]
    said = [None if statement is None else statement.tied for statement in statements]
    found = []
    for label, declared, checkpoint in (("A", said[0], a), ("B", said[1], b)):
        if declared and _has_own_head(checkpoint):
            found.append(
                f"{label} says that its head is tied, but its {HEAD} has values of its own: programs that believe "
                "the metadata drop it"
            )
        elif declared is False and HEAD not in checkpoint.tensors:
            found.append(f"{label} says that its head is not tied, and has no {HEAD}")
    if not found and None not in said and said[0] != said[1]:
        words = ["tied" if tied else "untied" for tied in said]
        found = [f"the head is said to be {words[0]} in A and {words[1]} in B"]
    return [Difference(TIED, said[0], said[1], line) for line in found]


def _has_own_head(checkpoint: Checkpoint) -> bool:
    tensors = checkpoint.tensors
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    return not same_values(tensors[EMBEDDING], tensors[HEAD])
