"""Stage dumps of other engines, whatever they come as: a golden file, a folder of APRT files, or arrays with a map.

A map is a file `dump.json` in the folder:

    {"input_ids": [[...]], "attention_mask": [[...]], "dtype": "float32",
     "stages": {"stage.0.q_post_rope": {"file": "q0.npy", "layout": "bhtd"},
                "stage.0.ffn_out": {"file": "ffn0.raw", "dtype": "bfloat16", "layout": "btd"}}}

`file` is .npy, or raw little-endian values of `dtype` in C order. `layout` names the axes of the file: b batch, t
positions, h heads, d the rest, s keys (attention stages); the default is "btd", "bhts" for attention stages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax import aprt, golden, stages
from apr_jax.inputs import Inputs
from converters.errors import BrokenContainerError, MissingFileError, RefusedError, UsageError
from converters.qwen2 import Qwen2Config

MAP = "dump.json"
_DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Dump:
    """What another engine computed.

    Attributes:
      inputs: The batch.
      values: Trace key -> float32 or float64 array [B, T, ...].
      dtype: What the engine says it computes in; None if it does not say.
    """

    inputs: Inputs
    values: Mapping[str, np.ndarray]
    dtype: str | None = None


def read(path: str | os.PathLike[str], config: Qwen2Config, inputs: Inputs | None = None) -> Dump:
    """Reads a dump.

    Args:
      path: A golden file, or a folder of APRT files or with a map.
      config: The model's configuration.
      inputs: The batch that was run, where the dump does not say it.

    Raises:
      AprJaxError: Missing, broken or foreign files; sizes that do not fit the model; nothing to compare.
    """
    if not os.path.isdir(path):
        made = golden.read(path)
        values = {key: value for key, value in made.values.items() if not key.startswith("hidden.")}
        for key, source in stages.hidden_sources(config.num_layers).items():
            if key in made.values:
                values.setdefault(source, made.values[key])
        return Dump(made.inputs, values, made.metadata.get("dtype"))
    if os.path.isfile(os.path.join(path, MAP)):
        return _read_map(pathlib.Path(path), config, inputs)
    inputs, values = aprt.read(path, config, inputs)
    return Dump(inputs, values)


def _read_map(folder: pathlib.Path, config: Qwen2Config, inputs: Inputs | None) -> Dump:
    path = folder / MAP
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["stages"]
        if inputs is None:
            inputs = Inputs.of(content["input_ids"], content.get("attention_mask"), content.get("position_ids"))
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenContainerError(
            f"not a map of a dump: {error!r}", code="dump-map", file=path, expected='"stages" and "input_ids"'
        ) from None
    known = set(stages.trace_keys(config.num_layers))
    if unknown := sorted(set(entries) - known):
        raise RefusedError(
            "the map names stages that this model lacks", code="dump-stage", file=path, found=unknown[:5]
        )
    if not entries:
        raise RefusedError("the map names no stage", code="nothing-compared", file=path)
    default = content.get("dtype")
    values = {key: _load(folder / entry["file"], key, entry, default, config, inputs) for key, entry in entries.items()}
    return Dump(inputs, values, default)


def _load(
    path: pathlib.Path, key: str, entry: Mapping[str, Any], default: str | None, config: Qwen2Config, inputs: Inputs
) -> np.ndarray:
    if not path.is_file():
        raise MissingFileError("the map names a file that is not there", code="file-missing", file=path)
    if path.suffix == ".npy":
        flat = np.load(path, allow_pickle=False)
    else:
        name = entry.get("dtype", default or "float32")
        if name not in _DTYPES:
            raise UsageError("unknown dtype", code="dtype", file=path, found=name, expected=" or ".join(_DTYPES))
        flat = np.frombuffer(path.read_bytes(), _DTYPES[name])
    flat = flat.astype(np.float64 if flat.dtype == np.float64 else np.float32)
    batch, length = inputs.input_ids.shape
    shape = (batch, *stages.shape(config, stages.stage_of(key), length))
    if key == stages.LOGITS and flat.size == batch * config.vocab_size:
        shape = (batch, 1, config.vocab_size)
    if flat.size != math.prod(shape):
        raise RefusedError(
            "the number of elements does not fit this model and these tokens",
            code="dump-size",
            file=path,
            found=flat.size,
            expected=f"{math.prod(shape)}, that is {list(shape)}",
        )
    return _in_order(flat, key, entry.get("layout"), shape, config, path)


def _in_order(
    flat: np.ndarray, key: str, layout: str | None, shape: tuple[int, ...], config: Qwen2Config, path: pathlib.Path
) -> np.ndarray:
    attention = len(shape) == 4
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
