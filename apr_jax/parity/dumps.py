"""Stage dumps of other engines, whatever they come as: a golden file, a folder of APRT files, or arrays with a map.

A map is a file `dump.json` in the folder:

    {"input_ids": [[...]], "attention_mask": [[...]], "dtype": "float32", "positions": [64, 65, 66],
     "stages": {"stage.0.q_post_rope": {"file": "q0.npy", "layout": "bhtd"},
                "stage.0.ffn_out": {"file": "ffn0.raw", "dtype": "bfloat16", "layout": "btd"}}}

`file` is .npy, or raw little-endian values of `dtype` in C order. `layout` names the axes of the file: b batch, t
positions, h heads, d the rest, s keys (attention stages); the default is "btd", "bhts" for attention stages.
`positions` is there if the files hold some positions only, of a decoding engine's steps for example; `input_ids` are
all tokens nevertheless. Where the map has no `input_ids`, they lie beside it (`inputs.beside`).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError, UsageError
from apr_jax.converters.formats import strict_json
from apr_jax.trace import aprt, golden, stages
from apr_jax.trace.inputs import Inputs, beside, from_mapping
from apr_jax.trace.positions import Positions, checked_positions, dumped_shape, find_columns

MAP = "dump.json"
_MAX_BYTES = 256 << 20
_DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Dump:
    """What another engine computed.

    Attributes:
      inputs: The batch.
      values: Trace key -> float32 or float64 array [B, T, ...], or [B, R, ...] at `columns`.
      dtype: What the engine says it computes in; None if it does not say.
      columns: The columns of the batch that a dump of some positions holds, [B, R].
      weights_sha256: Of which weights it was made, as `golden.weights_sha256`; None if it does not say.
      strangers: Files of the dump that are no stage of this model.
    """

    inputs: Inputs
    values: Mapping[str, np.ndarray]
    dtype: str | None = None
    columns: np.ndarray | None = None
    weights_sha256: str | None = None
    strangers: tuple[str, ...] = ()


def read(
    path: str | os.PathLike[str],
    config: Qwen2Config,
    inputs: Inputs | None = None,
    positions: Positions | None = None,
) -> Dump:
    """Reads a dump.

    Args:
      path: A golden file, or a folder of APRT files or with a map.
      config: The model's configuration.
      inputs: The batch that was run, where the dump does not say it.
      positions: The positions that the dump's rows stand for, where it holds some only and does not say which.

    Raises:
      AprJaxError: Missing, broken or foreign files; sizes that do not fit the model; nothing to compare.
    """
    if not os.path.isdir(path):
        return _read_golden(path, config, inputs, positions)
    folder = pathlib.Path(path)
    if (folder / MAP).is_file():
        return _read_map(folder, config, inputs, positions)
    if not any(folder.rglob("*.bin")):
        raise RefusedError(
            "no dump is in this folder",
            code="dump-empty",
            file=folder,
            expected=f"{MAP}, or APRT files such as layer-0/attn_norm.bin",
            hint="docs/dumps.md describes both.",
        )
    inputs = inputs or beside(folder)
    columns = None if positions is None else find_columns(positions, inputs)
    longer = dataclasses.replace(config, num_layers=config.num_layers + 1)  # an engine may run a layer twice
    _, values = aprt.read(folder, longer, inputs, columns)
    return Dump(inputs, values, columns=columns, strangers=tuple(aprt.unknown_files(folder, longer)))


def _read_golden(
    path: str | os.PathLike[str], config: Qwen2Config, inputs: Inputs | None, positions: Positions | None
) -> Dump:
    made = golden.read(path)
    if inputs is not None and not _same_tokens(inputs, made.inputs):
        raise UsageError(
            "the golden file was made from other tokens",
            code="input-ids",
            file=path,
            hint="It brings its own: leave --input-ids out.",
        )
    if positions is None:
        positions = made.positions
    columns = None if positions is None else find_columns(positions, made.inputs)
    values = {key: value for key, value in made.values.items() if not key.startswith("hidden.")}
    for key, source in stages.hidden_sources(config.num_layers).items():
        if key in made.values:
            values.setdefault(source, made.values[key])
    _check_keys(values, config, path)
    for key, value in values.items():
        shape = dumped_shape(config, key, value.size, made.inputs, columns, path)
        if shape != value.shape:
            raise RefusedError(
                "a tensor has another shape than this model's",
                code="dump-shape",
                file=path,
                tensor=key,
                found=list(value.shape),
                expected=list(shape),
            )
    return Dump(made.inputs, values, made.metadata.get("dtype"), columns, made.metadata.get("weights_sha256"))


def _same_tokens(one: Inputs, other: Inputs) -> bool:
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.positions(), other.positions())


def _check_keys(keys: Iterable[str], config: Qwen2Config, path: str | os.PathLike[str]) -> None:
    # One layer more than the model has: an engine may run one twice.
    if unknown := sorted(set(keys) - set(stages.trace_keys(config.num_layers + 1))):
        raise RefusedError(
            "the dump names stages that this model lacks",
            code="dump-stage",
            file=path,
            found=", ".join(unknown[:5]),
            hint="Is it another model's, or are the names misspelt?",
        )


def _read_map(folder: pathlib.Path, config: Qwen2Config, inputs: Inputs | None, positions: Positions | None) -> Dump:
    path = folder / MAP
    content = strict_json.loads(path.read_bytes(), what="map of a dump", max_bytes=_MAX_BYTES, file=os.fspath(path))
    entries = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) for entry in entries.values()
    ):
        raise BrokenContainerError(
            "not a map of a dump",
            code="dump-map",
            file=path,
            expected='"stages": {"stage.0.attn_norm": {"file": "NAME.npy"}, ...}',
        )
    if not entries:
        raise RefusedError("the map names no stage", code="nothing-compared", file=path)
    _check_keys(entries, config, path)
    if inputs is None:
        inputs = from_mapping(content, path) if "input_ids" in content else beside(folder)
    if positions is None and "positions" in content:
        positions = checked_positions(content["positions"], path)
    columns = None if positions is None else find_columns(positions, inputs)
    default = content.get("dtype")
    if default is not None and default not in _DTYPES:
        raise UsageError("unknown dtype", code="dtype", file=path, found=default, expected=" or ".join(_DTYPES))
    values = {key: _load(folder, key, entry, default, config, inputs, columns) for key, entry in entries.items()}
    return Dump(inputs, values, default, columns)


def _load(
    folder: pathlib.Path,
    key: str,
    entry: Mapping[str, Any],
    default: str | None,
    config: Qwen2Config,
    inputs: Inputs,
    columns: np.ndarray | None,
) -> np.ndarray:
    path = folder / entry["file"]
    if not path.is_file():
        raise MissingFileError("the map names a file that is not there", code="file-missing", file=path)
    flat = _npy(path) if path.suffix == ".npy" else _raw(path, entry.get("dtype", default or "float32"))
    flat = flat.astype(np.float64 if flat.dtype == np.float64 else np.float32)
    shape = dumped_shape(config, key, flat.size, inputs, columns, path)
    return _in_order(flat, key, entry.get("layout"), shape, config, path)


def _npy(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:  # np.load would open archives and pickles as well
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise BrokenContainerError(f"not a .npy array: {error}", code="npy", file=path) from None
    if array.dtype.kind != "f":
        raise RefusedError(
            "no array of floats", code="dump-dtype", file=path, found=str(array.dtype), expected="float32"
        )
    return array


def _raw(path: pathlib.Path, name: str) -> np.ndarray:
    if name not in _DTYPES:
        raise UsageError("unknown dtype", code="dtype", file=path, found=name, expected=" or ".join(_DTYPES))
    dtype, data = np.dtype(_DTYPES[name]), path.read_bytes()
    if len(data) % dtype.itemsize:
        raise BrokenContainerError(
            "the size is no whole number of elements",
            code="dump-size",
            file=path,
            found=f"{len(data)} bytes",
            expected=f"a multiple of {dtype.itemsize} for {name}",
        )
    return np.frombuffer(data, dtype)


def _in_order(
    flat: np.ndarray, key: str, layout: str | None, shape: tuple[int, ...], config: Qwen2Config, path: pathlib.Path
) -> np.ndarray:
    attention = len(shape) == 4
    if layout is not None and not isinstance(layout, str):
        raise UsageError('a layout is a text such as "btd"', code="dump-layout", file=path, found=layout)
    wanted = "bhts" if attention else "btd"
    layout = layout or wanted
    sizes = {"b": shape[0], "t": shape[2] if attention else shape[1]}
    if attention:
        sizes |= {"h": shape[1], "s": shape[3]}
    elif "h" in layout:
        sizes |= {"h": shape[2] // config.head_dim, "d": config.head_dim}
        wanted = "bthd"
    else:
        sizes["d"] = shape[2]
    missing = set(wanted) - set(layout)
    if set(layout) - set(sizes) or len(set(layout)) != len(layout) or any(sizes[axis] != 1 for axis in missing):
        raise UsageError(
            "unknown layout", code="dump-layout", file=path, found=layout, expected=f"an order of {wanted}"
        )
    array = flat.reshape([sizes[axis] for axis in layout])
    for axis in sorted(missing):
        array, layout = array[None], axis + layout
    return array.transpose([layout.index(axis) for axis in wanted]).reshape(shape)
