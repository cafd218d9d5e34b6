"""Our own folders: arrays with a `dump.json` that says which file is which stage."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import BrokenContainerError
from apr_jax.engines import bounded, names, summaries
from apr_jax.engines.found import Found, Stage
from apr_jax.trace.inputs import from_mapping
from apr_jax.trace.positions import checked_positions

MAP = "dump.json"


def read(folder: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads a folder with a map; the stages' files are read later, when it is known how much they can hold."""
    path = folder / MAP
    content: Any = bounded.json(path, "map of a dump")
    if summaries.is_msprobe(content):
        return summaries.msprobe(content)
    entries = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("file", ""), str) for entry in entries.values()
    ):
        raise BrokenContainerError(
            "not a map of a dump",
            code="dump-map",
            file=path,
            expected='"stages": {"stage.0.attn_norm": {"file": "NAME.npy"}, ...}',
        )
    default = content.get("dtype")
    if default is not None:
        default = bounded.checked_dtype(default, path)
    inputs = from_mapping(content, path) if "input_ids" in content else None
    positions = checked_positions(content["positions"], path) if "positions" in content else None
    gradients = {
        key: _stage(folder, entry, default)
        for name, entry in entries.items()
        if "file" in entry and (key := names.gradient_of(name, config)) is not None
    }
    entries = {name: entry for name, entry in entries.items() if names.gradient_of(name, config) is None}
    keys = {name: names.key_of(name, config.num_layers) or name for name in entries}
    stages = {keys[name]: _stage(folder, entry, default) for name, entry in entries.items() if "file" in entry}
    numbers = {
        keys[name]: summaries.of_entry(entry, name, path) for name, entry in entries.items() if "file" not in entry
    }
    labels = _labels(content, path)
    return Found(stages, inputs, positions, default, summaries=numbers, gradients=gradients, labels=labels)


def _labels(content: Mapping[str, Any], path: pathlib.Path) -> np.ndarray | None:
    if "labels" not in content:
        return None
    try:
        labels = np.array(content["labels"], np.int64)
    except (TypeError, ValueError, OverflowError):
        labels = None
    if labels is None or labels.ndim != 2:
        raise BrokenContainerError(
            "labels are not a list of lists of numbers",
            code="dump-map",
            file=path,
            found=json.dumps(content["labels"])[:60],
            expected="a list of as many labels as tokens for each row",
        )
    return labels


def _stage(folder: pathlib.Path, entry: Mapping[str, Any], default: str | None) -> Stage:
    path = bounded.inside(folder, entry["file"])
    name = entry.get("dtype", default or "float32")
    bounded.checked_dtype(name, folder / MAP)
    load = functools.partial(bounded.npy, path) if path.suffix == ".npy" else functools.partial(_raw, path, name)
    return Stage(load, path, entry.get("layout"))


def _raw(path: pathlib.Path, name: str, most: int | None) -> np.ndarray:
    return bounded.raw(path, name, bounded.MAX_FILE // 8 if most is None else most)
