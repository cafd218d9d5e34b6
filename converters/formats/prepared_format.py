"""Prepared checkpoints: parameters as a model holds them, in Orbax's format, beside a description of what they are.

    DIR/prepared.json                        what is in it and where it came from
    DIR/parameters/                          an Orbax checkpoint, as `orbax.checkpoint.PyTreeCheckpointer` restores it
    DIR/parameters/NAME/.zarray              of one parameter: shape and type (Zarr 2)
    DIR/parameters/NAME/0.0                  its values, not compressed: one chunk, or 0.0, 1.0, 0.1 and so on, one for
                                             each part that devices held
    DIR/config.json, tokenizer files, ...    verbatim

An uncompressed chunk is the array itself, or a part of it, so that it is read as fast as any tensor, without Orbax.
Several tensors of HuggingFace's may lie in one parameter, rows behind rows (q, k and v of a fused model): each is a
range of its bytes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError, UsageError, in_file
from apr_jax.converters.formats import dtypes, strict_json
from apr_jax.converters.formats.chunked import ChunkedFile
from apr_jax.converters.formats.dtypes import DType
from apr_jax.converters.storage.crc import Bytes, crc32
from apr_jax.converters.storage.source import SourceFile, exists, is_folder, is_plain_name

FORMAT = "apr_jax.prepared/2"
# What describes such a checkpoint, and the folder of its parameters.
PREPARED_NAME = "prepared.json"
PREPARED_FOLDER = "parameters"

_TYPES = {
    "float32": ("f32", "<f4"),
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("f16", "<f2"),
    "float64": ("f64", "<f8"),
}
"""JAX's name of the dtype -> its name in the registry, and in `.zarray`."""
_MAX_DESCRIPTION_BYTES = 64 << 20
# More devices than any mesh has that shares one parameter.
_MAX_CHUNKS = 1 << 16
_NOT_WHOLE = "The checkpoint is not whole: prepare it anew from its source"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a prepared checkpoint.

    Attributes:
      name: Its path in the model, with dots.
      shape: Its dimensions.
      crc32: Of its bytes in C order, 8 hexadecimal digits.
      tensors: HuggingFace's names and shapes of what lies in it, in the order of the rows.
    """

    name: str
    shape: tuple[int, ...]
    crc32: str
    tensors: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of prepared.json.

    Attributes:
      dtype: "float32", "bfloat16", "float16" or "float64": of all parameters.
      fused: Whether q, k and v of a layer are one parameter, and gate and up another.
      devices: How many devices the parameters were saved from.
      types: Tensor -> name of its element type in the source; what an older version wrote has none.
      source: Where they came from: "path", "kind", "files" (name -> bytes) and "weights_sha256".
      versions: Of the packages that wrote them.
      metadata: `__metadata__` of the source, or None.
      parameters: All of them.
    """

    dtype: str
    fused: bool
    devices: int
    source: Mapping[str, Any]
    versions: Mapping[str, str]
    metadata: Mapping[str, str] | None
    parameters: tuple[Parameter, ...]
    types: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def stored(self) -> DType:
        """The parameters' type in the registry."""
        return dtypes.by_name(_TYPES[self.dtype][0])

    def to_json(self) -> dict[str, Any]:
        """Returns the content of prepared.json."""
        parameters = {
            parameter.name: {
                "shape": list(parameter.shape),
                "crc32": parameter.crc32,
                "tensors": {name: list(shape) for name, shape in parameter.tensors.items()},
            }
            for parameter in self.parameters
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, **fields, "parameters": parameters}


def read(folder: str) -> Description:
    """Reads prepared.json.

    Raises:
      BrokenContainerError: It is not what it should be.
      RefusedError: Code "prepared-format": of another version.
    """
    path = os.path.join(folder, PREPARED_NAME)
    with SourceFile(path) as source:
        if source.size > _MAX_DESCRIPTION_BYTES:
            raise BrokenContainerError(
                "the description is too large",
                code="prepared-size",
                file=path,
                found=f"{source.size} bytes",
                expected=f"at most {_MAX_DESCRIPTION_BYTES}",
            )
        text = bytes(source.read_at(0, source.size))
    content = strict_json.loads(text, what=PREPARED_NAME, max_bytes=_MAX_DESCRIPTION_BYTES, file=path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        raise BrokenContainerError(
            "this does not describe a prepared checkpoint",
            code="prepared-content",
            file=path,
            expected=f'an object with "format": "{FORMAT}"',
        )
    if content["format"] != FORMAT:
        raise RefusedError(
            "a prepared checkpoint of an unsupported version",
            code="prepared-format",
            file=path,
            found=content["format"][:100],
            expected=FORMAT,
            hint="Prepare it again from its source",
        )
    try:
        with in_file(path):
            description = _parsed(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BrokenContainerError(
            "the description lacks something, or has it in another form",
            code="prepared-content",
            file=path,
            found=f"{type(error).__name__}: {error}"[:200],
        ) from None
    return description


def describe(folder: str) -> Description:
    """Returns what is in a prepared checkpoint.

    Raises:
      MissingFileError: There is no such folder.
      UsageError: It holds no prepared checkpoint.
      BrokenContainerError, RefusedError: As `read`.
    """
    if not is_folder(folder):
        raise MissingFileError("no such folder", code="file-missing", file=folder)
    if not exists(os.path.join(folder, PREPARED_NAME)):
        raise UsageError(
            "this is not a prepared checkpoint",
            code="not-prepared",
            file=folder,
            expected=f"a folder with {PREPARED_NAME}",
            hint="`checkpoint save` writes one",
        )
    return read(folder)


def checksum(pieces: Iterable[Bytes]) -> str:
    """Returns the CRC-32 of a parameter's bytes in C order, given in pieces, as prepared.json spells it."""
    value = 0
    for piece in pieces:
        value = crc32(piece, value)
    return f"{value:08x}"


def check_sums(folder: str, description: Description, found: Mapping[str, str]) -> None:
    """Compares the checksums of parameters, by name, with those that were saved.

    Raises:
      BrokenContainerError: Code "prepared-hash": they have other bytes, all named.
    """
    differing = [parameter.name for parameter in description.parameters if found.get(parameter.name) != parameter.crc32]
    if differing:
        raise BrokenContainerError(
            f"{len(differing)} of {len(found)} parameters are not what was saved: {', '.join(differing[:20])}",
            code="prepared-hash",
            file=folder,
            tensor=differing[0] if len(differing) == 1 else None,
            hint="Prepare it again from its source",
        )


def open_parameter(folder: str, description: Description, parameter: Parameter) -> SourceFile:
    """Opens the values of a parameter.

    Raises:
      MissingFileError: They are not there: the checkpoint is not whole.
      BrokenContainerError: They have another size, and perhaps another shape or type, than the description says.
      RefusedError: Code "prepared-chunks": they are compressed, or cut into unequal parts.
    """
    place = os.path.join(folder, PREPARED_FOLDER, parameter.name)
    nbytes = description.stored.nbytes(parameter.shape)
    chunks = _checked_layout(place, description, parameter)
    try:
        if chunks != parameter.shape:
            return ChunkedFile(place, parameter.shape, chunks, description.stored.nbytes((1,)))
        source = SourceFile(os.path.join(place, ".".join("0" for _ in parameter.shape)))
    except MissingFileError as error:
        error.hint = _NOT_WHOLE
        raise
    if source.size != nbytes:
        source.close()
        raise BrokenContainerError(
            "the parameter's file has another size",
            code="prepared-size",
            file=source.path,
            tensor=parameter.name,
            found=f"{source.size} bytes",
            expected=f"{nbytes} bytes",
        )
    return source


def _checked_layout(place: str, description: Description, parameter: Parameter) -> tuple[int, ...]:
    """Checks what Orbax says about a parameter against the description; returns the shape of its chunks."""
    layout = _layout(os.path.join(place, ".zarray"))
    expected = {"shape": list(parameter.shape), "dtype": _TYPES[description.dtype][1]}
    found = {key: layout.get(key) for key in expected}
    if found != expected:
        raise BrokenContainerError(
            "the parameter is not the one that was saved",
            code="prepared-parameter",
            file=place,
            tensor=parameter.name,
            found=found,
            expected=expected,
        )
    plain = {"compressor": None, "filters": None, "order": "C", "zarr_format": 2}
    chunks = _grid(layout.get("chunks"), parameter.shape)
    if chunks is None or any(layout.get(key) != value for key, value in plain.items()):
        raise RefusedError(
            "the parameter is compressed, or not cut into equal parts",
            code="prepared-chunks",
            file=place,
            tensor=parameter.name,
            hint="orbax.checkpoint restores such a checkpoint; here, prepare it again from its source",
        )
    return chunks


def _grid(chunks: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of chunks if they are equal parts of an array, cut along its first two axes at most."""
    if not isinstance(chunks, list) or len(chunks) != len(shape) or not all(type(part) is int for part in chunks):
        return None
    if not all(part > 0 and whole % part == 0 for part, whole in zip(chunks, shape, strict=True)):
        return None
    few = math.prod(shape) // math.prod(chunks) <= _MAX_CHUNKS
    return tuple(chunks) if few and tuple(chunks[2:]) == shape[2:] else None


def refuse_orbax(folder: str, listed: list[str]) -> None:
    """Raises RefusedError, code "foreign-orbax", if this is an Orbax checkpoint that was not prepared here."""
    within = os.path.join(folder, PREPARED_FOLDER)
    names = {*listed, *(os.listdir(within) if is_folder(within) else ())}
    if not names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
        return
    raise RefusedError(
        f"this is an Orbax checkpoint without {PREPARED_NAME}: nothing says which model its arrays are",
        code="foreign-orbax",
        file=folder,
        expected=PREPARED_NAME,
        hint="Give the folder above it, if `checkpoint save` wrote it; else convert it to safetensors",
    )


def _layout(path: str) -> Mapping[str, Any]:
    try:
        with SourceFile(path) as source:
            text = bytes(source.read_at(0, min(source.size, 1 << 16)))
    except MissingFileError as error:
        error.hint = _NOT_WHOLE
        raise
    layout = strict_json.loads(text, what=".zarray", max_bytes=1 << 16, file=path)
    if not isinstance(layout, dict):
        raise BrokenContainerError(
            "this does not describe a Zarr array", code="prepared-parameter", file=path, found=type(layout).__name__
        )
    return layout


def _parsed(content: Mapping[str, Any]) -> Description:
    if content["dtype"] not in _TYPES or type(content["fused"]) is not bool or type(content["devices"]) is not int:
        raise ValueError("dtype, fused or devices")
    metadata = content["metadata"]
    if metadata is not None and not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata")
    if content["devices"] < 1:
        raise ValueError("devices")
    types = dict(content.get("types", {}))
    if not all(isinstance(name, str) for name in types.values()):
        raise ValueError("types")
    parameters = tuple(_parameters(content["parameters"]))
    names = [name for parameter in parameters for name in parameter.tensors]
    if len(set(names)) != len(names):
        raise ValueError("a tensor in two parameters")
    return Description(
        content["dtype"],
        content["fused"],
        content["devices"],
        dict(content["source"]),
        dict(content["versions"]),
        metadata,
        parameters,
        types,
    )


def _parameters(content: Mapping[str, Any]) -> Iterator[Parameter]:
    for name, fields in content.items():
        shape = tuple(fields["shape"])
        tensors = {tensor: tuple(part) for tensor, part in fields["tensors"].items()}
        dtypes.element_count(shape)
        rows = sum(part[0] for part in tensors.values())
        alike = all(part[1:] == shape[1:] for part in tensors.values())
        if not is_plain_name(name) or (rows, *shape[1:]) != shape or not math.prod(shape) or not alike:
            raise ValueError(f"parameter {name!r}")
        yield Parameter(name, shape, str(fields["crc32"]), tensors)
