"""Prepared checkpoints: the parameters of a model, cast and fused, saved by Orbax and ready to be read as they are.

What stands in such a folder, `converters.formats.prepared_format` says; `open_checkpoint`, and so everything that
opens a model, reads it like any other checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from apr_jax.converters.checkpoint import file_names
from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.naming import for_model
from apr_jax.converters.convert import apr_metadata, apr_tokenizer
from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError, UsageError
from apr_jax.converters.formats import prepared_format
from apr_jax.converters.formats.prepared_format import PREPARED_FOLDER, PREPARED_NAME, Description, Parameter
from apr_jax.converters.storage.output import FolderKind, Notice, OutputFolder, atomic_folder
from apr_jax.converters.storage.workers import Workers
from apr_jax.load.load_model import find_device, load_model
from apr_jax.load.parameters import load_parameters
from apr_jax.model.parameters import Parameters, dtype_name, named, parameter_sources
from apr_jax.trace import golden

# The number of a system's error in TensorStore's messages.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

PREPARED = FolderKind(
    "prepared checkpoint",
    holds=lambda name: name == PREPARED_NAME or name.startswith(f"{PREPARED_FOLDER}/") or file_names.is_side_file(name),
    shows=lambda name: name == PREPARED_NAME,
)


def save(
    checkpoint: Checkpoint,
    folder: str,
    *,
    dtype: str = "float32",
    fused: bool = False,
    force: bool = False,
    notice: Notice | None = None,
) -> Description:
    """Writes a prepared checkpoint: whole, or not at all. The parameters are in memory meanwhile.

    Args:
      checkpoint: The model.
      folder: Where to write; must not exist.
      dtype: "float32", "bfloat16", "float16" or "float64"; a narrowing cast rounds to nearest even.
      fused: One parameter for q, k and v of a layer and one for gate and up.
      force: Whether a prepared checkpoint that is there may be replaced.
      notice: Told about what earlier, killed runs left and this one removed.

    Returns:
      What was written.

    Raises:
      UsageError: Unknown dtype; or the folder exists.
      RefusedError: As `load_parameters`, or there is no configuration.
      StorageError: The disk.
    """
    dtype = dtype_name(dtype)
    files = _side_files(checkpoint)
    config = checkpoint.model_config()
    checkpoint = for_model(checkpoint, config)
    sources = parameter_sources(config, fused)
    elements = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    size = elements * jax.numpy.dtype(dtype).itemsize + sum(map(len, files.values()))
    with atomic_folder(folder, size, kind=PREPARED, force=force, sources=checkpoint.paths, notice=notice) as output:
        parameters = load_parameters(checkpoint, config, dtype, find_device("cpu"), fused)
        description = Description(
            dtype,
            fused,
            devices=1,
            source=_source(checkpoint),
            versions=_versions(),
            metadata=_strings(checkpoint),
            parameters=tuple(_described(checkpoint, sources, named(parameters))),
        )
        with output.written_by_others() as place:
            _write_parameters(parameters, os.path.join(place, PREPARED_FOLDER))
        for name, content in {**files, PREPARED_NAME: _spelt(description)}.items():
            _write(output, name, content)
    return description


def check(folder: str, device: str | jax.Device | None = None, ignore_config: Iterable[str] = ()) -> Description:
    """Restores a prepared checkpoint on a device and compares every parameter there with what was saved.

    Args:
      folder: Its folder.
      device: As for `load_model`.
      ignore_config: As for `load_model`.

    Returns:
      What is in it.

    Raises:
      BrokenContainerError: Code "prepared-hash": parameters have other bytes, all named; or as `open_checkpoint`.
      RefusedError: As `load_model`.
      MissingFileError: There is no such folder.
      UsageError: It holds no prepared checkpoint.
    """
    if not os.path.isdir(folder):
        raise MissingFileError("no such folder", code="file-missing", file=folder)
    if not os.path.exists(os.path.join(folder, PREPARED_NAME)):
        raise UsageError(
            f"this is not a prepared checkpoint: it holds no {PREPARED_NAME}",
            code="not-prepared",
            file=folder,
            hint="`checkpoint save` writes one",
        )
    description = prepared_format.read(folder)
    model = load_model(folder, description.dtype, device, fused=description.fused, ignore_config=ignore_config)
    found = hashes(named(model.parameters))
    differing = [
        parameter.name for parameter in description.parameters if found.get(parameter.name) != parameter.sha256
    ]
    if differing:
        raise BrokenContainerError(
            f"{len(differing)} of {len(found)} parameters are not what was saved: {', '.join(differing[:20])}",
            code="prepared-hash",
            file=folder,
            tensor=differing[0] if len(differing) == 1 else None,
            hint="Prepare it again from its source",
        )
    return description


def hashes(parameters: Mapping[str, jax.Array]) -> dict[str, str]:
    """Returns the SHA-256 of each parameter's bytes in C order."""

    def digest(array: jax.Array) -> str:
        return hashlib.sha256(np.asarray(array).reshape(-1).view("u1").data).hexdigest()

    with Workers(min(8, os.cpu_count() or 1)) as workers:
        return dict(zip(parameters, workers.map(digest, parameters.values()), strict=True))


def _described(
    checkpoint: Checkpoint, sources: Mapping[str, tuple[str, ...]], parameters: Mapping[str, jax.Array]
) -> Iterator[Parameter]:
    for name, digest in hashes(parameters).items():
        tensors = {tensor: checkpoint.tensors[tensor].shape for tensor in sources[name]}
        yield Parameter(name, parameters[name].shape, digest, tensors)


def _write_parameters(parameters: Parameters, folder: str) -> None:
    """Lets Orbax write the tree: one chunk for each parameter, not compressed, so that a file is the array itself."""
    import orbax.checkpoint

    writer = orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=False, use_compression=False)
    # Arrays of the host's, so that the checkpoint names no device that another machine may not have.
    arrays = jax.tree.map(np.asarray, parameters)
    # Orbax writes in threads that an interrupt does not reach: they have to be done before anything can be removed.
    with _quiet(), Workers(1) as waited_for:
        try:
            waited_for.start(writer.save, os.path.abspath(folder), arrays).result()
            writer.close()
        except ValueError as error:
            # That is how TensorStore says what the system has said.
            if code := _OS_ERROR.search(str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from warning of what was not asked for, and from printing the tracebacks of errors that it raises."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def filtered(found: sys.UnraisableHookArgs) -> None:
        # Of writes that TensorStore had begun when another one failed: nobody waits for them any more.
        if str(found.exc_value) != "Event loop is closed":
            hook(found)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = filtered
    try:
        yield
        # Behind an error they go on for a while.
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)


def _write(output: OutputFolder, name: str, content: bytes) -> None:
    with output.create(name, len(content)) as file:
        file.write_at(content, 0)


def _spelt(description: Description) -> bytes:
    return (json.dumps(description.to_json(), indent=1, ensure_ascii=True) + "\n").encode()


def _side_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Returns the files that come along; config.json and the tokenizer are made where the source has none."""
    files = dict(checkpoint.files)
    if checkpoint.kind == "apr" and not files.keys() & {"tokenizer.json", "vocab.json"}:
        with contextlib.suppress(RefusedError):
            files |= apr_tokenizer.files_of(checkpoint.metadata, [])
    if CONFIG_NAME not in files:
        files[CONFIG_NAME] = apr_metadata.config_json(checkpoint.config)
    return files


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    return {
        "path": os.path.abspath(path),
        "kind": checkpoint.kind,
        "files": {os.path.relpath(source.path, folder or os.curdir): source.size for source in checkpoint.sources},
        "weights_sha256": golden.weights_sha256(checkpoint),
    }


def _strings(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Returns the source's `__metadata__`; what an `.apr` says has become config.json."""
    if checkpoint.kind == "apr" or not checkpoint.has_metadata:
        return None
    return {key: str(value) for key, value in checkpoint.metadata.items()}


def _versions() -> dict[str, str]:
    packages = ("apr-jax", "jax", "jaxlib", "ml-dtypes", "numpy", "orbax-checkpoint")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | {"python": platform.python_version()}
