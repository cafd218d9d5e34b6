"""One way into every kind of checkpoint: a HuggingFace folder, one safetensors file, a sharded index, an `.apr`, a
folder that `checkpoint save` prepared.

Opening reads headers only. Tensors come as bytes in a stream, as rows, or as numpy arrays, each from the file that was
opened at the beginning; side files (config.json, tokenizer) are read when they are asked for.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint import file_names
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME, INDEX_NAME, INDEX_SUFFIX, SINGLE_NAME
from apr_jax.converters.checkpoint.qwen2 import HEAD, Qwen2Config
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
    StorageError,
    counted,
)
from apr_jax.converters.formats import apr_format, prepared_format, safetensors_format, strict_json
from apr_jax.converters.formats.dtypes import DType, Legacy, element_count
from apr_jax.converters.formats.foreign import refuse_foreign
from apr_jax.converters.formats.prepared_format import PREPARED_NAME
from apr_jax.converters.storage.source import SourceFile, is_plain_name

if TYPE_CHECKING:
    import numpy as np

# Where side files travel inside a container: a metadata key of `.apr`, and, since a lone .safetensors has no folder of
# its own, a string of its `__metadata__`. Both hold an object: name -> text, or {"base64": text} where it is not UTF-8.
SOURCE_FILES_KEY = "source_files"
SAFETENSORS_SOURCE_FILES_KEY = "apr_jax.source_files"

_MAX_SIDE_FILE_BYTES = 64 << 20
# A larger file that only its ending makes a side file is more likely data that lie in the folder.
_MAX_CONFIG_BYTES = 16 << 20
_MAX_SHARDS = 4096
_ALIGNMENT = 64
_PART_BYTES = 1 << 20
_SHARD_COUNT = re.compile(r"-(\d+)-of-(\d+)\.safetensors")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor, not read yet.

    Attributes:
      name: Its name in the checkpoint.
      dtype: Its element type.
      shape: Dimensions, outermost first; the data are in C order.
      nbytes: Bytes of its data.
      source: The file that holds them.
      offset: Where in that file they begin; need not be aligned.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    source: SourceFile
    offset: int

    def readinto(self, buffer: bytearray | memoryview) -> None:
        """Reads all bytes into a writable, C-contiguous buffer of exactly `nbytes` bytes (of an array: its u1 view).

        Raises:
          ValueError: The buffer has another size.
          StorageError: The file cannot be read.
        """
        view = memoryview(buffer)
        if view.nbytes != self.nbytes:
            raise ValueError(f"tensor {self.name!r} has {self.nbytes} bytes, the buffer {view.nbytes}")
        if self.nbytes:
            self.readinto_at(0, view)

    def readinto_at(self, begin: int, buffer: bytearray | memoryview) -> None:
        """Fills the whole buffer with the tensor's bytes from number `begin` on, as many as it has room for.

        Raises:
          StorageError: The file cannot be read.
        """
        try:
            self.source.readinto_at(self.offset + begin, buffer)
        except AprJaxError as error:
            error.tensor = self.name
            raise

    def stream(self, chunk_bytes: int = 1 << 20) -> Iterator[memoryview]:
        """Yields the bytes in order, in chunks; every chunk is overwritten by the next one.

        Raises:
          StorageError: The file cannot be read.
        """
        buffer = memoryview(bytearray(min(chunk_bytes, self.nbytes)))
        for begin in range(0, self.nbytes, chunk_bytes):
            chunk = buffer[: min(chunk_bytes, self.nbytes - begin)]
            self.readinto_at(begin, chunk)
            yield chunk

    def raw(self, rows: slice | None = None) -> bytes:
        """Returns the bytes as they stand in the file, of all or of some rows of axis 0.

        Raises:
          ValueError: The tensor is a scalar, or the slice has a step.
          RefusedError: Code "rows-not-addressable", if blocks or packed elements run across rows.
          StorageError: The file cannot be read.
        """
        begin, end = 0, self.nbytes
        if rows is not None:
            first, last = _bounds(rows, self._rows())
            width = self._row_bytes()
            begin, end = first * width, last * width
        data = bytearray(end - begin)
        self.readinto_at(begin, memoryview(data))
        return bytes(data)

    def read(self, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns the values, or a rectangular part of them, as an array with memory of its own.

        Args:
          slices: One slice per axis from the first on, without steps; missing ones mean the whole axis.

        Returns:
          An array of the type's numpy or ml_dtypes dtype (quantised: float32), in C order, aligned to 64 bytes.

        Raises:
          ValueError: More slices than axes, or a slice with a step.
          RefusedError: Code "dtype-not-decoded" for packed types, and quantised ones that nothing here decodes.
          BrokenContainerError: Code "bool-value", if a BOOL is neither 0 nor 1.
          StorageError: The file cannot be read.
        """
        dtype = self._values_dtype()
        bounds = [_bounds(part, size) for part, size in zip(slices or (), self.shape, strict=False)]
        if slices is not None and len(slices) > len(self.shape):
            raise ValueError(f"tensor {self.name!r} has {len(self.shape)} axes, {len(slices)} slices were given")
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        values = _empty(tuple(end - begin for begin, end in bounds), dtype)
        if values.size:
            self._read_part(values, bounds)
        return self._checked(values)

    def values(self, elements: int = 1 << 18) -> Iterator[np.ndarray]:
        """Yields the values in C order, as flat arrays with memory of their own.

        Args:
          elements: About how many values an array has; a padded row of a K-quant is never divided.

        Raises:
          As `read`.
        """
        count = element_count(self.shape)
        unit = self.dtype.padded_columns(self.shape, self.nbytes) or self.dtype.block_elements
        step = max(1, elements // unit) * unit
        for begin in range(0, count, step):
            yield self.read_flat(begin, min(begin + step, count))

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Returns the values number `begin` to `end` in C order, flat; of a row-padded K-quant only whole rows.

        Raises:
          As `read`.
        """
        values = _empty((end - begin,), self._values_dtype())
        if values.size:
            self._read_range(values, begin)
        return self._checked(values)

    def _values_dtype(self) -> np.dtype:
        if not self.dtype.is_block:
            return self.dtype.numpy
        import numpy as np

        _ = self.dtype.codec
        return np.dtype(np.float32)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if self.dtype.name == "bool" and (values.view("u1") > 1).any():
            raise BrokenContainerError(
                "a BOOL is neither 0 nor 1", code="bool-value", file=self.source.path, tensor=self.name
            )
        return values

    def _read_part(self, values: np.ndarray, bounds: Sequence[tuple[int, int]]) -> None:
        width = element_count(self.shape[1:])
        if list(self.shape[1:]) == [end - begin for begin, end in bounds[1:]]:
            self._read_range(values.reshape(-1), bounds[0][0] * width if bounds else 0)
            return
        # Whole rows are read and cut, some at a time: one system call for each piece of each row would cost more.
        step = max(1, _PART_BYTES // (width * values.itemsize))
        inner = tuple(slice(begin, end) for begin, end in bounds[1:])
        first, last = bounds[0]
        rows = _empty((min(step, last - first), *self.shape[1:]), values.dtype)
        for row in range(first, last, step):
            part = rows[: min(step, last - row)]
            self._read_range(part.reshape(-1), row * width)
            values[row - first : row - first + len(part)] = part[(slice(None), *inner)]

    def _read_range(self, values: np.ndarray, begin: int) -> None:
        """Reads the flat `values` from element `begin` on; of a row-padded K-quant only whole rows."""
        if not self.dtype.is_block:
            self.readinto_at(begin * values.itemsize, _bytes_of(values))
            return
        columns = self.dtype.padded_columns(self.shape, self.nbytes)
        if columns is None:
            self._decode_flat(values, begin)
        else:
            self._decode_rows(values.reshape(-1, columns), begin // columns)

    def _decode_flat(self, values: np.ndarray, begin: int) -> None:
        """Decodes blocks that run on across rows; `begin` may be amid one."""
        elements, end = self.dtype.block_elements, begin + values.size
        step = max(1, _PART_BYTES // (4 * elements)) * elements
        for low in range(begin // elements * elements, end, step):
            high = min(low + step, end)
            skipped = max(0, begin - low)
            if not skipped:
                self._decode_blocks(values[low - begin : high - begin], low // elements)
                continue
            part = _empty((high - low,), values.dtype)
            self._decode_blocks(part, low // elements)
            values[: high - begin] = part[skipped:]

    def _decode_rows(self, values: np.ndarray, first: int) -> None:
        """Decodes rows that are padded to whole blocks each."""
        elements = self.dtype.block_elements
        blocks = -(-values.shape[1] // elements)
        step = max(1, _PART_BYTES // (4 * elements * blocks))
        padded = _empty((min(step, len(values)), blocks * elements), values.dtype)
        for row in range(0, len(values), step):
            part = padded[: min(step, len(values) - row)]
            self._decode_blocks(part.reshape(-1), (first + row) * blocks)
            values[row : row + len(part)] = part[:, : values.shape[1]]

    def _decode_blocks(self, values: np.ndarray, first: int) -> None:
        """Decodes all values of blocks from number `first` on, but for the last ones of the last block."""
        codec, width = self.dtype.codec, self.dtype.block_bytes
        prefix = codec.prefix_bytes
        blocks = -(-values.size // self.dtype.block_elements)
        data = memoryview(bytearray(prefix + blocks * width))
        self.readinto_at(0, data[:prefix])
        self.readinto_at(prefix + first * width, data[prefix:])
        codec.decode(data, values)

    def _rows(self) -> int:
        if not self.shape:
            raise ValueError(f"tensor {self.name!r} is a scalar and has no rows")
        return self.shape[0]

    def _row_bytes(self) -> int:
        if 0 in self.shape:
            return 0
        sizes = self.dtype.sizes(self.shape[1:])
        for size in sizes:
            if size * self.shape[0] == self.nbytes:
                return size
        raise RefusedError(
            f"rows of {self.dtype.name} {list(self.shape)} cannot be read one by one: they share blocks",
            code="rows-not-addressable",
            file=self.source.path,
            tensor=self.name,
        )


class Checkpoint:
    """An open checkpoint; a context manager.

    Attributes:
      path: As it was given.
      kind: "apr", "safetensors" or "prepared".
      tensors: Name -> tensor, sorted by the names' UTF-8 bytes.
      placeholders: Name -> shape of heads that an `.apr` lists without data: the embedding stands for them.
      files: Side files by name, read when asked for.
      left_behind: Names of what else lies in the folder and does not go along; "NAME/" for folders.
      metadata: The metadata object of an `.apr`, in its order, or the `__metadata__` of safetensors.
      has_metadata: Whether there is any; safetensors may have an empty one, or none.
      sources: The files that hold the tensors.
      paths: Of every file that is read, index and side files included, and of the folder.
      warnings: What was let through and is worth saying.
      apr: The header of an `.apr`, with metadata and index as they stand there; None for safetensors.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        *,
        tensors: Iterable[Tensor],
        files: SideFiles,
        metadata: dict[str, Any],
        sources: Iterable[SourceFile],
        warnings: Iterable[str],
        placeholders: Mapping[str, tuple[int, ...]] | None = None,
        apr: apr_format.AprPrologue | None = None,
        has_metadata: bool = True,
    ):
        self.path = path
        self.kind = kind
        ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
        self.tensors: Mapping[str, Tensor] = MappingProxyType({tensor.name: tensor for tensor in ordered})
        self.placeholders: Mapping[str, tuple[int, ...]] = MappingProxyType(dict(placeholders or {}))
        self.files: Mapping[str, bytes] = files
        self.left_behind = files.left_behind
        self.metadata = metadata
        self.has_metadata = has_metadata
        self.sources = tuple(sources)
        self.paths = tuple(dict.fromkeys((*(source.path for source in self.sources), *files.paths, path)))
        self.warnings = list(warnings)
        self.apr = apr

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json; for an `.apr` without one, its `hf_config`, else one made from its metadata.

        Raises:
          RefusedError: Code "config-missing".
          BrokenContainerError: It is no JSON object.
        """
        return self.config_for((tensor.name, tensor.dtype) for tensor in self.tensors.values())

    def config_for(self, tensors: Iterable[tuple[str, DType]]) -> dict[str, Any]:
        """Returns `config`; one that has to be made says of these tensors (name, type) what they are.

        Raises:
          RefusedError, BrokenContainerError: As `config`.
        """
        config = self._json_file(CONFIG_NAME)
        if config is not None:
            return config
        if self.kind == "apr":
            given = self.metadata.get("hf_config")
            if isinstance(given, dict):
                return given
            if self.metadata.get("architecture") is not None:
                return _made_config(self.model_config(), self.metadata, tensors)
        raise RefusedError("there is no config.json", code="config-missing", file=self.path)

    @property
    def has_config(self) -> bool:
        """Whether it holds a configuration of HuggingFace's; in its place an `.apr` has keys of its own."""
        return CONFIG_NAME in self.files or (self.kind == "apr" and isinstance(self.metadata.get("hf_config"), dict))

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The content of generation_config.json, or None.

        Raises:
          BrokenContainerError: It is no JSON object.
        """
        return self._json_file("generation_config.json")

    def model_config(self) -> Qwen2Config:
        """Returns the configuration of the model, through its allow-list.

        Raises:
          RefusedError: There is none, or it is not supported.
        """
        if self.kind == "apr" and not self.has_config:
            return Qwen2Config.from_apr(self.metadata, tied=HEAD not in self.tensors, file=self.path)
        return Qwen2Config.from_hf(self.config, file=self.path)

    def close(self) -> None:
        """Closes the files; tensors cannot be read afterwards."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, kind={self.kind!r}, {len(self.tensors)} tensors)"

    def _json_file(self, name: str) -> dict[str, Any] | None:
        if name not in self.files:
            return None
        value = strict_json.loads(self.files[name], what=name, max_bytes=_MAX_CONFIG_BYTES, file=self.path)
        if not isinstance(value, dict):
            raise BrokenContainerError(f"{name} is no JSON object", code="config-type", file=self.path)
        return value


def open_checkpoint(path: str | os.PathLike[str], *, lenient: bool = False, legacy: Legacy = False) -> Checkpoint:
    """Opens a checkpoint and reads its headers.

    Args:
      path: A HuggingFace folder, a safetensors file, a `*.safetensors.index.json`, an `.apr` file, or a prepared
        checkpoint (`prepared_format`). What a file is, its content decides.
      lenient: Whether to let oddities of `.apr` files pass with a warning: no footer, unaligned or unsorted parts, the
        magic of 2025, reserved bytes, unknown flags.
      legacy: Whether to read dtype ids of an `.apr` as older and other writers meant them, where the size leaves one
        type; or {id: "type"} to say besides what an id means.

    Returns:
      The checkpoint, to be closed or used as a context manager.

    Raises:
      MissingFileError: There is no such file, or a shard is missing.
      BrokenContainerError: A file is not what it should be.
      RefusedError: It is, and cannot be handled rightly.
      StorageError: The system cannot read it.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _open_folder(path)
    if path.endswith(".json"):
        with SourceFile(path) as source:
            index = _parse_index(source)
        return _open_sharded(index, path)
    with _closing_on_error() as opened:
        source = opened.enter_context(SourceFile(path))
        first = source.read_at(0, min(source.size, apr_format.HEADER_BYTES))
        if not _looks_like_safetensors(first, source.size):
            if first[:3] == b"APR" or path.endswith(".apr"):
                return _open_apr(path, source, first, lenient, legacy)
            refuse_foreign(first, wanted="safetensors or an .apr container", file=path)
        folder = os.path.dirname(path) or os.curdir
        in_huggingface_folder = os.path.basename(path) == SINGLE_NAME and os.path.exists(
            os.path.join(folder, CONFIG_NAME)
        )
        return _open_single(path, source, _side_files(folder) if in_huggingface_folder else SideFiles({}))


class SideFiles(Mapping[str, bytes]):
    """Files by name, each read when it is asked for: a tokenizer has megabytes, and few need it.

    Attributes:
      paths: Of the files, where they are files of their own, and of the index beside them.
      left_behind: As `Checkpoint`.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], bytes]],
        *,
        paths: Iterable[str] = (),
        left_behind: Iterable[str] = (),
    ):
        self._readers = dict(sorted(readers.items()))
        self.paths = tuple(paths)
        self.left_behind = tuple(left_behind)

    def __getitem__(self, name: str) -> bytes:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@contextlib.contextmanager
def _closing_on_error() -> Iterator[contextlib.ExitStack]:
    """Closes what was entered if the opening fails; else leaves it to the checkpoint."""
    with contextlib.ExitStack() as opened:
        yield opened
        opened.pop_all()


# --- .apr


def _open_apr(path: str, source: SourceFile, first: bytearray, lenient: bool, legacy: Legacy) -> Checkpoint:
    header = apr_format.parse_header(first, source.size, file=path, lenient=lenient)
    data = source.read_at(0, header.data_offset)
    prologue = apr_format.parse_prologue(data, source.size, file=path, lenient=lenient, legacy=legacy)
    tensors = [
        Tensor(entry.name, entry.dtype, entry.shape, entry.size, source, header.data_offset + entry.offset)
        for entry in prologue.entries
        if not entry.is_placeholder
    ]
    return Checkpoint(
        path,
        "apr",
        tensors=tensors,
        placeholders={entry.name: entry.shape for entry in prologue.entries if entry.is_placeholder},
        files=_embedded_files(prologue.metadata.get(SOURCE_FILES_KEY), path),
        metadata=prologue.metadata,
        sources=(source,),
        warnings=prologue.warnings,
        apr=prologue,
    )


def _embedded_files(encoded: Any, path: str) -> SideFiles:
    """Returns the files that a container carries as text; each is checked now and decoded again when asked for."""
    if encoded is None:
        return SideFiles({})
    if not isinstance(encoded, dict):
        raise BrokenContainerError("the embedded side files are no object", code="source-files", file=path)

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: _embedded_file(name, encoded[name], path)

    for name in encoded:
        if not file_names.can_go_along(name):
            raise BrokenContainerError(
                "no embedded side file can have this name", code="source-files", file=path, found=repr(name)[:300]
            )
        _embedded_file(name, encoded[name], path)
    return SideFiles({name: reader(name) for name in encoded})


def _embedded_file(name: str, content: Any, path: str) -> bytes:
    if isinstance(content, str):
        return content.encode()
    try:
        if list(content) != ["base64"]:
            raise ValueError
        return base64.b64decode(content["base64"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise BrokenContainerError(
            "an embedded side file is neither text nor base64", code="source-files", file=path, found=repr(name)[:300]
        ) from None


def _made_config(
    model: Qwen2Config, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, DType]]
) -> dict[str, Any]:
    """Returns a config.json for tensors that come from an `.apr` without one."""
    held = dict(tensors)
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": float(model.rope_theta),
        "rms_norm_eps": float(model.rms_norm_eps),
        "tie_word_embeddings": HEAD not in held,
    }
    if model.head_dim * model.num_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    for key in ("bos_token_id", "eos_token_id"):
        if type(metadata.get("tokenizer." + key)) is int:
            config[key] = metadata["tokenizer." + key]
    # Types of 8 bits hold weights, never the numbers that a model computes with.
    found = Counter(dtype.torch for dtype in held.values() if dtype.is_float and (dtype.bits or 0) >= 16)
    if found:
        config["torch_dtype"] = found.most_common(1)[0][0]
    return config


# --- safetensors


def _looks_like_safetensors(first: bytearray, size: int) -> bool:
    """Whether a length and an object stand at the beginning; then two bytes of a foreign magic are a coincidence."""
    prefix = safetensors_format.PREFIX_BYTES
    return int.from_bytes(first[:prefix], "little") <= size - prefix and first[prefix : prefix + 1] == b"{"


def _header(source: SourceFile) -> safetensors_format.SafetensorsHeader:
    prefix = safetensors_format.PREFIX_BYTES
    first = source.read_at(0, min(source.size, apr_format.HEADER_BYTES))
    if not _looks_like_safetensors(first, source.size):
        refuse_foreign(first, wanted="safetensors", file=source.path)
    length = safetensors_format.parse_header_length(first, source.size, file=source.path)
    return safetensors_format.parse_header(source.read_at(prefix, length), source.size, file=source.path)


def _tensors(source: SourceFile, header: safetensors_format.SafetensorsHeader) -> Iterator[Tensor]:
    for entry in header.entries:
        yield Tensor(
            entry.name, entry.dtype, entry.shape, entry.end - entry.begin, source, header.data_start + entry.begin
        )


def _open_single(path: str, source: SourceFile, side_files: SideFiles, warnings: Iterable[str] = ()) -> Checkpoint:
    header = _header(source)
    metadata = header.metadata or {}
    # What the file itself carries was written with it; what lies beside it may have come there otherwise.
    embedded = metadata.get(SAFETENSORS_SOURCE_FILES_KEY)
    if embedded is not None:
        limit = safetensors_format.MAX_HEADER_BYTES
        decoded = strict_json.loads(embedded.encode(), what="the list of side files", max_bytes=limit, file=path)
        side_files = _embedded_files(decoded, path)
    return Checkpoint(
        path,
        "safetensors",
        tensors=_tensors(source, header),
        files=side_files,
        metadata=dict(metadata),
        sources=(source,),
        warnings=[*warnings, *header.warnings],
        has_metadata=header.metadata is not None,
    )


def _open_folder(path: str) -> Checkpoint:
    present = _listed(path)
    if PREPARED_NAME in present:
        return _open_prepared(path)
    shards = [name for name in present if name.endswith(".safetensors")]
    indices = [name for name in present if name.endswith(INDEX_SUFFIX)]
    if SINGLE_NAME in shards or (len(shards) == 1 and not indices):
        # With both present transformers takes the single file.
        name = SINGLE_NAME if SINGLE_NAME in shards else shards[0]
        left = [other for other in (*shards, *indices) if other != name]
        warnings = (
            [f"{name} is read; {', '.join(left)} beside it {'is' if len(left) == 1 else 'are'} not"] if left else []
        )
        with _closing_on_error() as opened:
            source = opened.enter_context(_inside(path, name, warnings))
            return _open_single(path, source, _side_files(path), warnings)
    if len(indices) == 1 or INDEX_NAME in indices:
        name = INDEX_NAME if INDEX_NAME in indices else indices[0]
        with _inside(path, name, []) as source:
            index = _parse_index(source)
        return _open_sharded(index, path)
    prepared_format.refuse_orbax(path, present)
    others = [name for name in present if name.endswith((".apr", ".bin", ".gguf", ".pth", ".pt", ".safetensors"))]
    raise MissingFileError(
        "the folder holds no checkpoint that can be told apart",
        code="no-checkpoint",
        file=path,
        found=", ".join((*indices, *others))[:300] or None,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint="Give the path of the file itself" if others else None,
    )


def _open_prepared(path: str) -> Checkpoint:
    description = prepared_format.read(path)
    tensors = []
    with _closing_on_error() as opened:
        for parameter in description.parameters:
            source = opened.enter_context(prepared_format.open_parameter(path, description, parameter))
            begin = 0
            for name, shape in parameter.tensors.items():
                nbytes = description.stored.nbytes(shape)
                tensors.append(Tensor(name, description.stored, shape, nbytes, source, begin))
                begin += nbytes
        return Checkpoint(
            path,
            "prepared",
            tensors=tensors,
            files=_side_files(path),
            metadata=dict(description.metadata or {}),
            sources=dict.fromkeys(tensor.source for tensor in tensors),
            warnings=(),
            has_metadata=description.metadata is not None,
        )


# --- shards


@dataclasses.dataclass(frozen=True)
class _ShardIndex:
    path: str
    weight_map: dict[str, str]
    total_size: Any

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path) or os.curdir

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def _open_sharded(index: _ShardIndex, path: str) -> Checkpoint:
    """Opens the shards that an index names; `path` is what the user gave."""
    warnings = _shard_warnings(index)
    with _closing_on_error() as opened:
        sources = []
        held: dict[str, list[Tensor]] = {}
        metadata: dict[str, str] = {}
        has_metadata = False
        for name in _present_shards(index):
            source = opened.enter_context(_inside(index.folder, name, warnings))
            header = _header(source)
            sources.append(source)
            warnings += header.warnings
            has_metadata = has_metadata or header.metadata is not None
            for key, value in (header.metadata or {}).items():
                if metadata.setdefault(key, value) != value:
                    warnings.append(f"the shards disagree about {key!r} in {safetensors_format.METADATA_KEY}")
            for tensor in _tensors(source, header):
                held.setdefault(tensor.name, []).append(tensor)
        _check_weight_map(index, held)
        tensors = [tensor for (tensor,) in held.values()]
        total = sum(tensor.nbytes for tensor in tensors)
        if type(index.total_size) is not int or index.total_size != total:
            warnings.append(f"the index says total_size {index.total_size!r}; the tensors have {total} bytes")
        return Checkpoint(
            path,
            "safetensors",
            tensors=tensors,
            files=_side_files(index.folder, index.path),
            metadata=dict(metadata),
            sources=sources,
            warnings=warnings,
            has_metadata=has_metadata,
        )


def _parse_index(source: SourceFile) -> _ShardIndex:
    path, limit = source.path, safetensors_format.MAX_HEADER_BYTES
    if source.size > limit:
        raise BrokenContainerError("the index is too large", code="index-size", file=path, found=source.size)
    text = source.read_at(0, source.size)
    refuse_foreign(text, wanted="the index of a sharded checkpoint", file=path)
    value = strict_json.loads(text, what="the index", max_bytes=limit, max_depth=8, file=path)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenContainerError(
            "the index has no weight_map from tensor names to file names",
            code="index-weight-map",
            file=path,
            hint="Give the folder, or the path of an index of shards",
        )
    metadata = value.get("metadata")
    index = _ShardIndex(path, weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None)
    _check_shard_names(index)
    return index


def _check_shard_names(index: _ShardIndex) -> None:
    shards = index.shards
    for name in shards:
        if not is_plain_name(name):
            raise RefusedError(
                "the index names a shard that is no plain file name in its folder",
                code="path-escapes",
                file=index.path,
                found=repr(name)[:300],
            )
        if not name.endswith(".safetensors"):
            raise RefusedError(
                "the index names a shard that is no safetensors file",
                code="shard-extension",
                file=index.path,
                found=repr(name)[:300],
            )
    if len({name.casefold() for name in shards}) != len(shards):
        raise RefusedError(
            "the index names shards that differ in upper and lower case only", code="shard-case", file=index.path
        )
    if len(shards) > _MAX_SHARDS:
        raise RefusedError(
            "too many shards", code="shard-count", file=index.path, found=len(shards), expected=f"at most {_MAX_SHARDS}"
        )


def _present_shards(index: _ShardIndex) -> list[str]:
    """Returns the names of the shards, if there is a file for each."""
    missing = [name for name in index.shards if not os.path.exists(os.path.join(index.folder, name))]
    if missing:
        raise MissingFileError(
            f"of {counted(len(index.shards), 'shard')} these are missing: {', '.join(missing[:20])}",
            code="shard-missing",
            file=os.path.join(index.folder, missing[0]),
        )
    return index.shards


def _shard_warnings(index: _ShardIndex) -> list[str]:
    warnings = []
    present = [name for name in _listed(index.folder) if name.endswith(".safetensors")]
    extra = sorted(set(present) - set(index.shards))
    if extra:
        warnings.append(f"not in the index and not read: {', '.join(extra)}")
    counts = {int(match[2]) for name in index.shards if (match := _SHARD_COUNT.search(name))}
    if counts and counts != {len(index.shards)}:
        warnings.append(f"the index names {counted(len(index.shards), 'shard')}, the names say {sorted(counts)}")
    return warnings


def _check_weight_map(index: _ShardIndex, held: Mapping[str, Sequence[Tensor]]) -> None:
    """Checks that every tensor is in exactly the shard in which the index says that it is."""
    twice, elsewhere, unlisted = [], [], []
    for name, tensors in held.items():
        shards = [os.path.basename(tensor.source.path) for tensor in tensors]
        if len(shards) > 1:
            twice.append(f"{name}: in {' and in '.join(shards)}")
        elif name not in index.weight_map:
            unlisted.append(f"{name}: in {shards[0]}, but not in the index")
        elif shards != [index.weight_map[name]]:
            elsewhere.append(f"{name}: in {shards[0]}, the index says {index.weight_map[name]}")
    lacking = [f"{name}: not in {shard}" for name, shard in index.weight_map.items() if name not in held]
    kinds = (
        ("tensor-in-two-shards", twice),
        ("tensor-not-in-shard", lacking + elsewhere),
        ("tensor-not-in-index", unlisted),
    )
    problems = [problem for _, listed in kinds for problem in listed]
    if problems:
        raise BrokenContainerError(
            f"index and shards contradict each other, {counted(len(problems), 'tensor')}:\n  "
            + "\n  ".join(problems[:100]),
            code=next(code for code, listed in kinds if listed),
            file=index.path,
            tensor=problems[0].partition(": ")[0] if len(problems) == 1 else None,
        )


# --- folders


def _side_files(folder: str, index: str | None = None) -> SideFiles:
    """Returns the files that belong to a checkpoint beside its tensors, by their well-known names.

    Anything else is left behind, and said to be: an unknown text may be a note, a result or somebody's credentials.
    """
    listed = _listed(folder)

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: _read_side_file(folder, name)

    def belongs(name: str) -> bool:
        return file_names.is_side_file(name) and not os.path.isdir(os.path.join(folder, name))

    names = [name for name in listed if belongs(name)]
    others = (name for name in listed if not file_names.is_tensors(name) and name not in set(names))
    return SideFiles(
        {name: reader(name) for name in names},
        paths=[*(os.path.join(folder, name) for name in names), folder, *([index] if index else [])],
        left_behind=[f"{name}/" if os.path.isdir(os.path.join(folder, name)) else name for name in others],
    )


def _read_side_file(folder: str, name: str) -> bytes:
    with _inside(folder, name, []) as source:
        if source.size > _MAX_SIDE_FILE_BYTES:
            raise RefusedError(
                "the file is too large for what stands beside a checkpoint",
                code="side-file-size",
                file=source.path,
                found=f"{source.size} bytes",
                expected=f"at most {_MAX_SIDE_FILE_BYTES}",
            )
        return bytes(source.read_at(0, source.size))


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise StorageError(error.strerror or str(error), code="open-failed", file=folder) from error


def _inside(folder: str, name: str, warnings: list[str]) -> SourceFile:
    """Opens a file of a folder, unless it is a link that leads out of it.

    HuggingFace's cache is made of such links, of one shape: models--X/snapshots/REVISION/FILE -> ../../blobs/HASH.

    Raises:
      RefusedError: Code "path-escapes".
    """
    path = os.path.join(folder, name)
    if not _stays_inside(folder, path):
        raise RefusedError(
            "this is a link that leads out of its folder",
            code="path-escapes",
            file=path,
            found=os.path.realpath(path),
            hint="Give the path of the file itself, or copy it here",
        )
    source = SourceFile(path)
    if source.links > 1 and name.endswith(".safetensors"):
        warnings.append(f"{name} is one of {source.links} hard links to its content")
    return source


def _stays_inside(folder: str, path: str) -> bool:
    root = os.path.realpath(folder)
    snapshots = os.path.dirname(root)
    allowed = [root]
    if os.path.basename(snapshots) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    return os.path.dirname(os.path.realpath(path)) in allowed


# --- arrays


def _bounds(part: slice, size: int) -> tuple[int, int]:
    begin, end, step = part.indices(size)
    if step != 1:
        raise ValueError(f"slices have to be without steps, got {part}")
    return begin, max(begin, end)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array aligned to 64 bytes, as JAX needs it to take it over without a copy."""
    import numpy as np

    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _bytes_of(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view("u1").data
