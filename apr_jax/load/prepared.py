"""Prepared checkpoints: the parameters of a model, cast and fused, saved by Orbax and ready to be read as they are.

What stands in such a folder, `converters.formats.prepared_format` says; `open_checkpoint`, and so everything that
opens a model, reads it like any other checkpoint. Of a model that lies on a mesh each device's part is a file of its
own; read, it goes onto any other mesh, since a device reads its part of the whole from whichever files have it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import operator
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.converters.checkpoint import file_names
from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.naming import for_model
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.convert import apr_metadata, apr_tokenizer
from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.converters.formats import prepared_format
from apr_jax.converters.formats.prepared_format import PREPARED_FOLDER, PREPARED_NAME, Description, Parameter
from apr_jax.converters.storage.output import FolderKind, atomic_folder, check_target
from apr_jax.converters.storage.temporaries import Notice
from apr_jax.converters.storage.workers import Task, Workers
from apr_jax.load.load_model import find_device, layout_on, load_model
from apr_jax.load.parameters import load_parameters
from apr_jax.load.save import as_checkpoint
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import Parameters, dtype_name, named, parameter_sources
from apr_jax.trace import golden

# The number of a system's error in TensorStore's messages.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

# Of rows that are put together from the parts of several devices: they stay in a processor's cache.
_BLOCK_BYTES = 1 << 18

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
    device: str | Mesh = "cpu",
    force: bool = False,
    notice: Notice | None = None,
) -> Description:
    """Writes a prepared checkpoint: whole, or not at all. The parameters are in memory meanwhile.

    The source is hashed while it is loaded; of the parameters a CRC-32 is taken while Orbax writes them.

    Args:
      checkpoint: The model.
      folder: Where to write; must not exist.
      dtype: "float32", "bfloat16", "float16" or "float64"; a narrowing cast rounds to nearest even.
      fused: One parameter for q, k and v of a layer and one for gate and up; not on a mesh.
      device: Where the parameters are loaded; on a mesh (`load_model.find_mesh`) each device writes its own parts.
      force: Whether a prepared checkpoint that is there may be replaced.
      notice: Told about what earlier, killed runs left and this one removed.

    Returns:
      What was written.

    Raises:
      UsageError: Unknown dtype or device; `fused` on a mesh; the folder exists; or there are several processes.
      RefusedError: As `load_parameters`, or there is no configuration.
      StorageError: The disk.
    """
    _refuse_processes(folder)
    dtype = dtype_name(dtype)
    config = checkpoint.model_config()
    mesh = device if isinstance(device, Mesh) and device.size > 1 else None
    place = find_device(device) if mesh is None else layout_on(config, mesh, fused)
    renamed = for_model(checkpoint, config)

    def load() -> Parameters:
        return load_parameters(renamed, config, dtype, place, fused)

    return _write(renamed, config, load, folder, dtype=dtype, fused=fused, force=force, notice=notice)


class Saving:
    """A model that is being saved, by threads beside the caller's.

    Attributes:
      folder: Where to.
    """

    def __init__(self, folder: str, task: Task[Description]):
        """Takes what is going on; `begin` makes it."""
        self.folder = folder
        self._task = task

    def is_done(self) -> bool:
        """Whether it is saved; one that has failed never is, `wait` says why."""
        return self._task.is_done()

    def wait(self) -> Description:
        """Waits until it is saved and returns what was written.

        Raises:
          RefusedError, StorageError, UsageError: As `save`; there is then what was there before.
        """
        return self._task.result()


def begin(model: LanguageModel, folder: str, *, force: bool = False, notice: Notice | None = None) -> Saving:
    """Begins to save the parameters that a model has now, and goes on in threads: training need not wait for the disk.

    Returns when the parameters are copied to the memory of the host, so that they may be changed or donated. On a mesh
    they are written as they are spread. A process that ends before `wait` has returned leaves what was there before.

    Args:
      model: Of one process; its parameters are copied, which takes the host's memory once, and for a moment twice where
        they lie on several devices.
      folder, force, notice: As `save`.

    Raises:
      UsageError: The folder exists, or there are several processes.
    """
    _refuse_processes(folder)
    check_target(folder, folder=PREPARED, force=force)
    with model.scope():
        host = jax.tree.map(_on_host, model.parameters)
        frozen = LanguageModel(model.config, jax.block_until_ready(host), model.device, origin=model.origin)

    def write() -> Description:
        with frozen.scope():
            options: Any = {"dtype": frozen.dtype, "fused": frozen.fused, "force": force, "notice": notice}
            return _write(as_checkpoint(frozen), model.config, lambda: host, folder, **options)

    return Saving(folder, Workers(1).start(write))


def _refuse_processes(folder: str) -> None:
    if jax.process_count() > 1:
        raise UsageError(
            "several processes do not save a checkpoint together",
            code="save-processes",
            file=folder,
            found=f"{jax.process_count()} processes",
            expected="one that sees all devices",
            hint="Save the model in a run of one process; it is then restored on any mesh",
        )


def _on_host(array: jax.Array) -> jax.Array:
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"), may_alias=False)


def _write(
    checkpoint: Checkpoint,
    config: Qwen2Config,
    load: Callable[[], Parameters],
    folder: str,
    *,
    dtype: str,
    fused: bool,
    force: bool,
    notice: Notice | None,
) -> Description:
    files, sources = _side_files(checkpoint), parameter_sources(config, fused)
    elements = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    size = elements * jax.numpy.dtype(dtype).itemsize + sum(map(len, files.values()))
    with (
        atomic_folder(folder, size, kind=PREPARED, force=force, sources=checkpoint.paths, notice=notice) as output,
        Workers(1) as beside,
    ):
        source = beside.start(_source, checkpoint)
        parameters = load()
        with (
            output.written_by_others() as place,
            _being_written(parameters, os.path.join(place, PREPARED_FOLDER)),
        ):
            description = Description(
                dtype,
                fused,
                devices=max(len(array.devices()) for array in jax.tree.leaves(parameters)),
                parameters=tuple(_described(checkpoint, sources, named(parameters))),
                source=source.result(),
                versions=_versions(),
                metadata=_strings(checkpoint),
                types={name: checkpoint.tensors[name].written_as.name for names in sources.values() for name in names},
            )
        for name, content in {**files, PREPARED_NAME: _spelt(description)}.items():
            with output.create(name, len(content)) as file:
                file.write_at(content, 0)
    return description


def check(folder: str, device: str | jax.Device | Mesh | None = None, ignore_config: Iterable[str] = ()) -> Description:
    """Restores a prepared checkpoint on a device or a mesh and compares every parameter there with what was saved.

    Args:
      folder: Its folder.
      device: As for `load_model`; a mesh need not be the one that it was saved from.
      ignore_config: As for `load_model`.

    Returns:
      What is in it.

    Raises:
      BrokenContainerError: Code "prepared-hash": parameters have other bytes, all named; or as `open_checkpoint`.
      RefusedError: As `load_model`.
      MissingFileError: There is no such folder.
      UsageError: It holds no prepared checkpoint.
    """
    description = prepared_format.describe(folder)
    model = load_model(folder, description.dtype, device, fused=description.fused, ignore_config=ignore_config)
    prepared_format.check_sums(folder, description, _checksums(named(model.parameters)))
    return description


def _checksums(parameters: Mapping[str, jax.Array]) -> dict[str, str]:
    """Returns the checksum of each parameter, as `prepared_format.checksum`."""

    def of(array: jax.Array) -> str:
        return prepared_format.checksum(_in_c_order(array))

    with Workers(min(8, os.cpu_count() or 1)) as workers:
        return dict(zip(parameters, workers.map(of, parameters.values()), strict=True))


def _in_c_order(array: jax.Array) -> Iterator[memoryview]:
    """Yields an array's bytes in C order; what several devices have parts of is put together few rows at a time."""
    # First row -> the parts that begin there, from the first column on.
    bands: dict[int, list[tuple[int, np.ndarray]]] = {}
    for shard in array.addressable_shards:
        if not shard.replica_id:
            first_row, *columns = (cut.start or 0 for cut in shard.index)
            bands.setdefault(first_row, []).append((columns[0] if columns else 0, np.asarray(shard.data)))
    for _, band in sorted(bands.items()):
        parts = [part for _, part in sorted(band, key=operator.itemgetter(0))]
        rows = len(parts[0]) if len(parts) == 1 else max(1, _BLOCK_BYTES // sum(part[0].nbytes for part in parts))
        for begin in range(0, len(parts[0]), rows):
            block = [part[begin : begin + rows] for part in parts]
            yield (block[0] if len(block) == 1 else np.concatenate(block, 1)).reshape(-1).view("u1").data


def _described(
    checkpoint: Checkpoint, sources: Mapping[str, tuple[str, ...]], parameters: Mapping[str, jax.Array]
) -> Iterator[Parameter]:
    for name, checksum in _checksums(parameters).items():
        tensors = {tensor: checkpoint.tensors[tensor].shape for tensor in sources[name]}
        yield Parameter(name, parameters[name].shape, checksum, tensors)


@contextlib.contextmanager
def _being_written(parameters: Parameters, folder: str) -> Iterator[None]:
    """Lets Orbax write the tree while the block runs: of each parameter one chunk, or one of each part of a mesh's."""
    writer = _writer()
    # Where one device has them all, as arrays of the host's: the checkpoint names no device that others may not have.
    arrays = jax.tree.map(
        lambda array: array if len(array.devices()) > 1 else np.asarray(array).view(_Unchanging), parameters
    )
    # Orbax writes in threads that an interrupt does not reach: they have to be done before anything can be removed.
    with _quiet(), Workers(1) as waited_for:
        try:
            written = waited_for.start(writer.save, os.path.abspath(folder), arrays)
            yield
            written.result()
            writer.close()
        except ValueError as error:
            # That is how TensorStore says what the system has said.
            if code := _OS_ERROR.search(str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise


def _writer() -> Any:
    """Returns Orbax's writer. It does not compress, so that a file is the array itself, or a part of it."""
    import orbax.checkpoint as ocp

    # Devices that hold the same would each be made to cut off a share of it: more files, and a copy of everything.
    whole = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, whole)
    )
    plain = {"use_ocdbt": False, "use_zarr3": False, "use_compression": False}
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **plain))


class _Unchanging(np.ndarray):
    """Values that nobody changes: Orbax, which copies arrays of the host's before it writes them, need not."""

    def __deepcopy__(self, memo: object) -> _Unchanging:
        return self


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
        # What a model in memory came from is not what it is now.
        "files": {os.path.relpath(source.path, folder or os.curdir): source.size for source in checkpoint.sources}
        if checkpoint.paths
        else {},
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
