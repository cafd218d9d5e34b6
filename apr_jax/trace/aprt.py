"""APRT stage dumps: the files in which `apr trace --save-tensor` and other engines exchange intermediate values.

One file a stage: magic `APRT`, u32 layer (0xFFFFFFFF: the whole model), u32 element count, then float32, little-endian,
in C order. The file says neither shape nor token ids: the shape follows from the stage and the configuration, and the
ids lie beside the dump as `token_ids.json` (a JSON list), or as `golden --export-inputs` writes them. Paths:
`layer-N/STAGE.bin`, `layer-0/embedding.bin`, `final_norm.bin` and `lm_head.bin`. `lm_head.bin` holds the last position
only, as `apr` writes it; a dump with all positions is read as well. What is written is one sequence without padding;
read are batches too, one row behind the other.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import BrokenContainerError, DumpError, UsageError
from apr_jax.converters.storage.output import FolderKind, atomic_folder
from apr_jax.converters.storage.source import SourceFile
from apr_jax.converters.storage.temporaries import Notice
from apr_jax.trace import stages
from apr_jax.trace.inputs import TOKEN_IDS, Inputs, beside
from apr_jax.trace.positions import dumped_shape
from apr_jax.trace.stages import Key

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
_HEADER_BYTES = 12
_OUTER_PATHS = {
    stages.EMBEDDING: "layer-0/embedding.bin",
    stages.FINAL_NORM: "final_norm.bin",
    stages.LOGITS: "lm_head.bin",
}
DUMP = FolderKind(
    "dump",
    holds=lambda name: name == TOKEN_IDS or re.fullmatch(r"(layer-\d+/)?\w+\.bin", name) is not None,
    shows=lambda name: name.endswith(".bin"),
)
_ALIASES = {"layer_output": "post_ffn_residual"}


def path_of(key: str) -> str:
    """Returns where a trace key lies in a dump: `stage.1.ffn_up` -> `layer-1/ffn_up.bin`.

    Raises:
      ValueError: A dump has no place for it: a hidden state, which lies there as the stage that it equals.
    """
    name = Key(key)
    if name in _OUTER_PATHS:
        return _OUTER_PATHS[name]
    if name.is_hidden or name.layer is None:
        raise ValueError(f"{key} is not a stage of an APRT dump")
    return f"layer-{name.layer}/{name.stage}.bin"


def encode(layer: int, values: np.ndarray) -> bytes:
    """Returns one APRT file: header and `values` as float32."""
    body = np.ascontiguousarray(values, dtype="<f4")
    return MAGIC + layer.to_bytes(4, "little") + body.size.to_bytes(4, "little") + body.tobytes()


def decode(data: bytes, file: str) -> tuple[int, np.ndarray]:
    """Reads one APRT file.

    Returns:
      The layer (WHOLE_MODEL outside the layers) and the values, float32 [count].

    Raises:
      BrokenContainerError: Wrong magic, or a length that is not what the header says.
    """
    layer, _ = _parse_header(data, len(data), file)
    return layer, np.frombuffer(data, "<f4", offset=_HEADER_BYTES)


def _parse_header(data: bytes | bytearray, size: int, file: str) -> tuple[int, int]:
    """Returns layer and count of a file of `size` bytes."""
    if data[:4] != MAGIC:
        raise BrokenContainerError(
            "not an APRT dump", code="aprt-magic", file=file, offset=0, found=bytes(data[:4]), expected=MAGIC
        )
    layer, count = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8))
    if size != _HEADER_BYTES + 4 * count:
        raise BrokenContainerError(
            "the length is not what the header says",
            code="aprt-length",
            file=file,
            offset=8,
            found=f"{size} bytes",
            expected=f"{_HEADER_BYTES + 4 * count} bytes for {count} elements",
        )
    return layer, count


def write(
    folder: str | os.PathLike[str],
    inputs: Inputs,
    trace: Mapping[str, np.ndarray],
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
) -> None:
    """Writes a trace of one sequence as a folder of APRT files, atomically.

    Args:
      folder: Where to; made, or replaced with `force`.
      inputs: The sequence, one row without padding.
      trace: Keys and arrays as `LanguageModel.trace` returns them.
      force: Whether an existing dump may be replaced.
      sources: Files and folders that it was made from; none of them is replaced.
      notice: Told about leftovers of earlier runs, and what this one has to leave.

    Raises:
      UsageError: More than one row, or padding: the format cannot hold them. Or the folder exists.
    """
    if inputs.input_ids.shape[0] != 1 or inputs.tokens != inputs.input_ids.size:
        raise UsageError(
            "an APRT dump holds one sequence without padding",
            code="aprt-batch",
            found=f"{inputs.input_ids.shape[0]} rows, {inputs.input_ids.size - inputs.tokens} padded positions",
            hint="Give one row, or write a golden file (-o NAME.safetensors).",
        )
    files = {TOKEN_IDS: json.dumps(inputs.input_ids[0].tolist()).encode()}
    for key, values in trace.items():
        row = values[0, -1] if key == stages.LOGITS else values[0]
        files[path_of(key)] = encode(_layer_of(key), row)
    size = sum(map(len, files.values()))
    with atomic_folder(os.fspath(folder), size, kind=DUMP, force=force, sources=sources, notice=notice) as output:
        for name, data in files.items():
            with output.create(name, len(data)) as file:
                file.write_at(data, 0)


def read(
    folder: str | os.PathLike[str],
    config: Qwen2Config,
    inputs: Inputs | None = None,
    columns: np.ndarray | None = None,
) -> tuple[Inputs, dict[str, np.ndarray]]:
    """Reads a folder of APRT files.

    Args:
      folder: The dump.
      config: The model's configuration, which gives the shapes.
      inputs: The batch that was run; None takes what lies beside the dump (`inputs.beside`).
      columns: The columns [B, R] of the batch that a dump of some positions stands for.

    Returns:
      The batch, and key -> float32 array [B, T, ...], or [B, R, ...] at `columns`; logits may hold the last position
      only.

    Raises:
      MissingFileError: No such folder, or no inputs.
      BrokenContainerError: A file that is no APRT dump.
      RefusedError: A size or a layer that does not fit the model and the tokens; or nothing that could be compared.
    """
    root = pathlib.Path(folder)
    if inputs is None:
        inputs = beside(root)
    trace: dict[str, np.ndarray] = {}
    for key in stages.trace_keys(config.num_layers):
        path = root / path_of(key)
        aliases = [path.with_name(f"{alias}.bin") for alias, stage in _ALIASES.items() if stage == path.stem]
        for candidate in (path, *aliases):
            if candidate.is_file():
                trace[key] = _load(candidate, config, key, inputs, columns)
                break
    if not trace:
        raise DumpError(
            "no stage of this model was found",
            code="aprt-empty",
            file=root,
            expected="files such as layer-0/attn_norm.bin",
        )
    return inputs, trace


def _layer_of(key: str) -> int:
    """Returns the layer in the header of a key's file; the embedding counts to layer 0."""
    layer = 0 if key == stages.EMBEDDING else Key(key).layer
    return WHOLE_MODEL if layer is None else layer


def unknown_files(folder: str | os.PathLike[str], config: Qwen2Config) -> list[str]:
    """Returns the names of `.bin` files in a dump that are no stage of this model: misspelt, or of a larger one."""
    root = pathlib.Path(folder)
    known = {root / path_of(key) for key in stages.trace_keys(config.num_layers)}
    known |= {
        path.with_name(f"{alias}.bin") for path in known for alias, stage in _ALIASES.items() if stage == path.stem
    }
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*.bin") if path not in known or not path.is_file()
    )


def _load(path: pathlib.Path, config: Qwen2Config, key: str, inputs: Inputs, columns: np.ndarray | None) -> np.ndarray:
    with SourceFile(path) as source:
        # The header says how much there is, and the model how much there can be.
        layer, count = _parse_header(source.read_at(0, min(source.size, _HEADER_BYTES)), source.size, str(path))
        shape = dumped_shape(config, key, count, inputs, columns, path)
        values = np.frombuffer(source.read_at(_HEADER_BYTES, 4 * count), "<f4")
    if layer != _layer_of(key):
        raise DumpError(
            "the header names another layer",
            code="aprt-layer",
            file=path,
            offset=4,
            found=layer,
            expected=_layer_of(key),
        )
    return values.reshape(shape)
