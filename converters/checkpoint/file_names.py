"""What the files of a checkpoint are called: tensors, the index of shards, and what goes along beside them."""

from __future__ import annotations

import fnmatch
import re

SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = "model" + INDEX_SUFFIX
CONFIG_NAME = "config.json"
# A prepared checkpoint (`prepared_format`): what describes it, and the folder of its parameters.
PREPARED_NAME = "prepared.json"
PREPARED_FOLDER = "parameters"

# Names by which a file is known to belong to a checkpoint, wherever it lies.
_KNOWN = (
    CONFIG_NAME,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "README*",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
)
_HIDDEN = (".gitattributes",)
# A plain file name: no folder, no drive, nothing that another system would read differently.
_PLAIN = re.compile(r"[^/\\:\x00-\x1f\x7f\ud800-\udfff]*[^/\\:\x00-\x1f\x7f\ud800-\udfff. ]")
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def shard_name(number: int, count: int) -> str:
    """Returns the name of shard `number`, counted from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def is_plain(name: str) -> bool:
    """Whether a file of this name lies in the folder that it is written to, on every system."""
    return _PLAIN.fullmatch(name) is not None


def can_go_along(name: str) -> bool:
    """Whether a container may carry a file of this name: a plain name, visible, and no tensors' or index's."""
    hidden = name.startswith(".") and name not in _HIDDEN
    return is_plain(name) and not hidden and not is_tensors(name)


def is_tensors(name: str) -> bool:
    """Whether a file or folder of this name holds tensors, or says which files do."""
    return name.lower().endswith((".safetensors", ".index.json")) or name in (PREPARED_NAME, PREPARED_FOLDER)


def is_side_file(name: str) -> bool:
    """Whether the name shows that a file belongs to a checkpoint, beside its tensors."""
    return can_go_along(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in _KNOWN)


def is_checkpoint_file(name: str) -> bool:
    """Whether the name alone shows that a file belongs to a checkpoint as it is written here."""
    return name in (SINGLE_NAME, INDEX_NAME) or _SHARD.fullmatch(name) is not None or is_side_file(name)
