"""Folders that hold checkpoints further down: HuggingFace's cache of a repository, the runs of a trainer.

The cache, `models--OWNER--NAME`, has the files in blobs/, links to them in snapshots/COMMIT/ and the commit of each
branch in refs/ (huggingface_hub's documentation, "Understand caching").
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence

from apr_jax.converters.errors import MissingFileError
from apr_jax.converters.formats import foreign
from apr_jax.converters.storage.source import is_plain_name

_REPOSITORY = re.compile(r"models--.+")
# SHA-1 of git or SHA-256 of LFS.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TRAINED = re.compile(r"checkpoint-(\d+)")
_TENSORS = (".safetensors", ".apr")
_MAX_REVISION_BYTES = 100
_SHOWN = 5


def is_cache(path: str) -> bool:
    """Whether a folder is HuggingFace's cache of one repository."""
    return all(os.path.isdir(os.path.join(path, part)) for part in ("snapshots", "refs")) or (
        _REPOSITORY.fullmatch(os.path.basename(os.path.realpath(path))) is not None
        and os.path.isdir(os.path.join(path, "snapshots"))
    )


def snapshot(path: str, revision: str = "main") -> str:
    """Returns the folder of a revision in a cache, a commit or what refs/ has for it; or the only one for "main".

    Raises:
      MissingFileError: Code "no-snapshot": there is none.
    """
    folder = os.path.join(path, "snapshots")
    try:
        present = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    except OSError:
        present = []
    commit = revision if revision in present else ""
    if not commit and all(map(is_plain_name, revision.split("/"))):
        reference = os.path.join(path, "refs", revision)
        with contextlib.suppress(OSError, UnicodeDecodeError), open(reference, "rb") as file:
            commit = file.read(_MAX_REVISION_BYTES).decode().strip()
    if not commit and revision == "main" and len(present) == 1:
        commit = present[0]
    if commit not in present or not is_plain_name(commit):
        raise MissingFileError(
            f"this is HuggingFace's cache of a repository, without the commit that its refs name for {revision}",
            code="no-snapshot",
            file=path,
            found=", ".join(present[:_SHOWN]) or "no snapshot",
            expected=repr(commit)[:_MAX_REVISION_BYTES] if commit else f"a file refs/{revision}",
            hint=f"Give the folder of one: {os.path.join(folder, present[0])}" if present else "Download it again",
        )
    return os.path.join(folder, commit)


def is_blob(path: str) -> bool:
    """Whether a path, links resolved, is that of a file that HuggingFace's cache holds."""
    folder, name = os.path.split(path)
    blobs, repository = os.path.basename(folder), os.path.basename(os.path.dirname(folder))
    return blobs == "blobs" and _BLOB.fullmatch(name) is not None and _REPOSITORY.fullmatch(repository) is not None


def further_down(path: str) -> str | None:
    """Returns a sentence that names checkpoints in the folders of a folder; None if there are none."""
    held = [name for name in sorted(os.listdir(path)) if _holds_checkpoint(os.path.join(path, name))]
    if not held:
        return None
    trained = sorted((int(match[1]), name) for name in held if (match := _TRAINED.fullmatch(name)))
    if trained:
        newest = os.path.join(path, trained[-1][1])
        return f"It holds {len(trained)} checkpoint{'s' * (len(trained) > 1)} of a training run; the last is {newest}"
    more = f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
    return f"Below it are {', '.join(os.path.join(path, name) for name in held[:_SHOWN])}{more}: give one of them"


def _holds_checkpoint(path: str) -> bool:
    try:
        return is_cache(path) or any(name.endswith(_TENSORS) for name in os.listdir(path))
    except OSError:
        return False


# Files and folders by which a checkpoint of another program is known -> what it is, and what makes something of it that
# can be read. The first that fits counts: a trainer's folder holds pickles too.
_PROGRAMS = (
    (r".*\.(apr|gguf|safetensors)", None, "Give the path of the file itself"),
    (
        r"zero_to_fp32\.py|global_step\d+|(bf16_)?zero_pp_rank_.*|mp_rank_\d+_model_states\.pt",
        "a checkpoint of DeepSpeed",
        "The script in it makes safetensors of it: `python zero_to_fp32.py . OUT --safe_serialization`",
    ),
    (
        r"__\d+_\d+\.distcp|pytorch_model_fsdp_\d+",
        "a distributed checkpoint of PyTorch (FSDP)",
        "`accelerate merge-weights FOLDER OUT` makes safetensors of it, given the folder of the .distcp files",
    ),
    (
        r"mp_rank_\d+(_\d+)?|model_optim_rng\.pt|latest_checkpointed_iteration\.txt",
        "a checkpoint of Megatron",
        "Megatron's own tools export it to HuggingFace's format",
    ),
    (
        r".*\.(msgpack|h5)",
        "weights of Flax or TensorFlow",
        foreign.OLD_FRAMEWORKS,
    ),
    (r"weights.*\.npz", "weights of MLX", "`mlx_lm.convert --hf-path FOLDER --mlx-path OUT` writes safetensors"),
    (
        r"(?!openvino_|training_args|optimizer|scheduler|rng_state|scaler).*\.(bin|pth?|ckpt)",
        "PyTorch's pickles",
        foreign.PICKLES,
    ),
    (
        r".*\.(onnx|onnx_data)|openvino_.*|.*\.engine",
        "a model that was exported to run elsewhere",
        "Give the checkpoint that it was made from: an export is a program, not a table of weights",
    ),
)


def what_else(path: str) -> tuple[str | None, str | None]:
    """Returns what a folder without a checkpoint holds of other programs, if it is known, and what to do with it.

    Folders of trainers are looked into: accelerate and DeepSpeed keep the weights one further down.
    """
    runs = further_down(path)
    if runs:
        return None, runs
    names = os.listdir(path)
    for pattern, what, hint in _PROGRAMS:
        if any(re.fullmatch(pattern, name) for name in names):
            return what, hint
    below = [name for folder in sorted(names) for name in _names(os.path.join(path, folder))]
    for pattern, what, hint in _PROGRAMS[1:]:
        if any(re.fullmatch(pattern, name) for name in below):
            return what, hint
    return None, None


def tensor_files(names: Sequence[str]) -> list[str]:
    """Returns those of a folder's names that are files of tensors, of any program."""
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern, _, _ in _PROGRAMS)]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
