"""What the files of a checkpoint are called: tensors, the index of shards, and what goes along beside them."""

from __future__ import annotations

import fnmatch
import re

from apr_jax.converters.formats.prepared_format import PREPARED_FOLDER, PREPARED_NAME
from apr_jax.converters.storage.output import FolderKind
from apr_jax.converters.storage.source import is_plain_name

SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = "model" + INDEX_SUFFIX
CONFIG_NAME = "config.json"
CHAT_TEMPLATES_FOLDER = "additional_chat_templates/"
"""Where transformers keeps chat templates beside the default one, NAME.jinja each: the only folder that goes along."""

# Names by which a file is known to belong to a checkpoint, wherever it lies.
_KNOWN = (
    CONFIG_NAME,
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "quantize_config.json",
    "quant_config.json",
    "chat_template.*",
    "README*",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
)
_HIDDEN = (".gitattributes",)
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def shard_name(number: int, count: int) -> str:
    """Returns the name of shard `number`, counted from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def can_go_along(name: str) -> bool:
    """Whether a container may carry a file of this name: a plain name, visible, and no tensors' or index's."""
    if name.startswith(CHAT_TEMPLATES_FOLDER):
        name = name.removeprefix(CHAT_TEMPLATES_FOLDER)
        return is_plain_name(name) and not name.startswith(".") and name.endswith(".jinja")
    hidden = name.startswith(".") and name not in _HIDDEN
    return is_plain_name(name) and not hidden and not is_tensors(name)


def is_tensors(name: str) -> bool:
    """Whether a file or folder of this name holds tensors, or says which files do."""
    return name.lower().endswith((".safetensors", ".index.json")) or name in (PREPARED_NAME, PREPARED_FOLDER)


def is_side_file(name: str) -> bool:
    """Whether the name shows that a file belongs to a checkpoint, beside its tensors."""
    known = name.startswith(CHAT_TEMPLATES_FOLDER) or any(fnmatch.fnmatchcase(name, pattern) for pattern in _KNOWN)
    return known and can_go_along(name)


def is_checkpoint_file(name: str) -> bool:
    """Whether the name alone shows that a file belongs to a checkpoint as it is written here."""
    return name in (SINGLE_NAME, INDEX_NAME) or _SHARD.fullmatch(name) is not None or is_side_file(name)


CHECKPOINT = FolderKind(
    "checkpoint",
    holds=is_checkpoint_file,
    shows=lambda name: name == CONFIG_NAME or name.endswith(".safetensors"),
)
