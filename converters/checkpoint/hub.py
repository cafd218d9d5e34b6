"""Repositories of the HuggingFace Hub in place of a path: `OWNER/NAME[@REVISION]` or `hf://OWNER/NAME[@REVISION][/FILE]`.

What is needed is downloaded into huggingface_hub's cache, by that package, which is an extra and imported only here;
what exists on this machine under the name is never looked for elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from apr_jax.converters.checkpoint import file_names, folders
from apr_jax.converters.checkpoint.incomplete import SHARD
from apr_jax.converters.errors import AprJaxError, MissingFileError, RefusedError, StorageError, UsageError, pip_install

SCHEME = "hf://"

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REVISION = r"refs/[^/@]+/[^/@]+|[^/@]+"
_BARE = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?")
_URL = re.compile(rf"{SCHEME}{_BARE.pattern}(?:/(?P<file>.+))?")
# What ends like a file is a file that is missing.
_FILES = (".apr", ".safetensors", ".json", ".gguf", ".bin", ".pt", ".pth")
_GGUF_PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
_MAIN = "main"
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository, or a file of one.

    Attributes:
      repository: "OWNER/NAME".
      revision: A branch, tag or commit.
      file: A file's path in it, or None for the checkpoint that it holds.
    """

    repository: str
    revision: str = _MAIN
    file: str | None = None

    @classmethod
    def parse(cls, path: str) -> HubName | None:
        """Reads what stands in place of a path; None if it is a path.

        Raises:
          UsageError: Code "hub-name": it begins with hf:// and goes on otherwise than a repository's name.
        """
        if path.startswith(SCHEME):
            found = _URL.fullmatch(path)
            if found is None or (found["file"] and ".." in found["file"].split("/")):
                raise UsageError(
                    "this is not a name on the Hub",
                    code="hub-name",
                    file=path,
                    expected="hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FILE",
                )
            return cls(found["repository"], found["revision"] or _MAIN, found["file"])
        bare = _BARE.fullmatch(path)
        if bare is None or path.lower().endswith(_FILES) or os.path.lexists(path):
            return None
        return cls(bare["repository"], bare["revision"] or _MAIN)


def located(path: str | os.PathLike[str]) -> str:
    """Returns the path on this machine of what `path` stands for: itself, or what was downloaded from the Hub.

    The folder that a repository has in the cache stands for its snapshot.

    Raises:
      UsageError: As `HubName.parse`.
      MissingFileError: Codes "hub-not-installed", "hub-repository", "hub-revision", "hub-file", "no-checkpoint",
        "no-snapshot".
      RefusedError: Code "hub-gated": its owner has to be asked.
      StorageError: Code "hub-unreachable".
    """
    path = os.fspath(path)
    name = HubName.parse(path)
    if name is None:
        return folders.snapshot(path) if os.path.isdir(path) and folders.is_cache(path) else path
    try:
        import huggingface_hub
    except ImportError:
        raise MissingFileError(
            "there is no such file or folder here, and what would download it from the Hub is not installed",
            code="hub-not-installed",
            file=path,
            hint=f"{pip_install('hub')} installs that; a path on this machine may begin with ./",
        ) from None
    try:
        with _translated(path, name):
            # Asks once: what lists files page by page tries for half a minute where there is no network.
            info = huggingface_hub.HfApi().model_info(name.repository, revision=name.revision)
            files = [sibling.rfilename for sibling in info.siblings or ()]
            wanted = needed(files, name, path)
            patterns = [glob.escape(file) for file in wanted]
            folder = huggingface_hub.snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns)
    except StorageError as error:
        return _cached(name, error)
    return _within(folder, name, wanted)


def needed(files: Sequence[str], name: HubName, path: str) -> list[str]:
    """Returns which files of a repository a checkpoint consists of, the one to open first.

    As of a folder: the one file of tensors, or the shards and their index; and what goes along beside them.

    Args:
      files: What the repository holds.
      name: What was asked for.
      path: The same as it was given, for error messages.

    Raises:
      MissingFileError: Codes "hub-file", "no-checkpoint".
    """
    if name.file is not None:
        if name.file not in files:
            raise MissingFileError(
                "the repository has no such file", code="hub-file", file=path, found=", ".join(files[:_SHOWN])
            )
        return _parts(name.file, files)
    here = [file for file in files if "/" not in file]
    beside = [file for file in files if file_names.is_side_file(file)]
    tensors = _tensors(here)
    if tensors:
        return tensors + beside
    single = [file for file in files if file.endswith((".apr", ".gguf"))]
    if single and len(_parts(single[0], files)) == len(single):
        return single
    raise MissingFileError(
        "the repository holds no checkpoint that can be recognised",
        code="no-checkpoint",
        file=path,
        found=", ".join(single[:_SHOWN] or here[:_SHOWN]) or "nothing",
        expected=f"{file_names.SINGLE_NAME} or {file_names.INDEX_NAME}",
        hint=f"Name the file: {SCHEME}{name.repository}/{single[0]}" if single else None,
    )


def _parts(file: str, files: Sequence[str]) -> list[str]:
    """Returns a file, and the others of a split GGUF file behind it."""
    part = _GGUF_PART.fullmatch(file)
    if part is None:
        return [file]
    others = (other for other in files if (match := _GGUF_PART.fullmatch(other)) and match[1] == part[1])
    return [file, *(other for other in others if other != file)]


def _tensors(here: Sequence[str]) -> list[str]:
    """Returns the files of tensors that a folder's checkpoint consists of, as `open_checkpoint` chooses them."""
    held = [file for file in here if file.endswith(".safetensors")]
    indices = [file for file in here if file.endswith(file_names.INDEX_SUFFIX)]
    if file_names.SINGLE_NAME in held:
        return [file_names.SINGLE_NAME]
    if len(indices) == 1 or file_names.INDEX_NAME in indices:
        index = file_names.INDEX_NAME if file_names.INDEX_NAME in indices else indices[0]
        series = index.removesuffix(file_names.INDEX_SUFFIX)
        return [index, *(file for file in held if (match := SHARD.fullmatch(file)) and match[1] == series)]
    shards = [file for file in held if SHARD.fullmatch(file)]
    return held if len(held) == 1 or len(shards) == len(held) else []


def _within(folder: str, name: HubName, wanted: Sequence[str]) -> str:
    alone = name.file is not None or wanted[0].endswith((".apr", ".gguf"))
    return os.path.join(folder, wanted[0]) if alone else folder


def _cached(name: HubName, error: StorageError) -> str:
    """Returns what an earlier download left in the cache, for the Hub cannot be asked; else raises `error`."""
    from huggingface_hub import constants

    repository = os.path.join(constants.HF_HUB_CACHE, f"models--{name.repository.replace('/', '--')}")
    try:
        folder = folders.snapshot(repository, name.revision)
        every = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
        held = [os.path.relpath(file, folder) for file in every]
        return _within(folder, name, needed(held, name, error.file or ""))
    except AprJaxError:
        raise error from None


@contextlib.contextmanager
def _translated(path: str, name: HubName) -> Iterator[None]:
    """Turns what huggingface_hub raises into errors that say what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{name.repository}"
    try:
        yield
    except AprJaxError:
        raise
    except errors.GatedRepoError:
        raise RefusedError(
            "the repository is open only to those who have accepted its conditions",
            code="hub-gated",
            file=path,
            hint=f"Accept them on {page}, and log in: `hf auth login`, or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise MissingFileError(
            "there is no such file or folder here, and the Hub has no such repository, or a private one",
            code="hub-repository",
            file=path,
            hint="If it is private, log in: `hf auth login`, or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise MissingFileError(
            f"the repository has no revision '{name.revision}'", code="hub-revision", file=path, hint=f"See {page}"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(
            f"this is not a name on the Hub: {error}",
            code="hub-name",
            file=path,
            hint="hf://OWNER/NAME[@REVISION] is one; a path on this machine may begin with ./",
        ) from None
    # Whatever its HTTP library raises: of which there have been three.
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise RefusedError(
                f"the Hub does not let you read this: {_first_line(error)}",
                code="hub-refused",
                file=path,
                hint=f"Log in again: `hf auth login`, or set HF_TOKEN; {page} says who may read it",
            ) from None
        here = "" if path.startswith(SCHEME) else "there is no such file or folder here, and "
        raise StorageError(
            f"{here}the Hub cannot be reached, and its cache has no such checkpoint: {_first_line(error)}",
            code="hub-unreachable",
            file=path,
            hint="HF_HUB_OFFLINE=1 forbids asking; HF_ENDPOINT names another server",
        ) from None


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
