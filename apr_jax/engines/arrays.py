"""Dumps that are arrays by name: a safetensors or `.npz` file, or a folder of `.npy` files."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import DumpError, RefusedError
from apr_jax.engines import bounded, names
from apr_jax.engines.found import Found, Load, Stage
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import checked_positions
from apr_jax.trace.stages import Key

_MOST_TOKENS = 1 << 24
_IGNORED = ("loss_nats",)
_ORIGIN = ("witness", "device", "precision", "versions", "weights_sha256")
_STACKED = re.compile(r"hidden_states|attentions")
_ROUND = re.compile(r"round_(\d{1,6})\.(logits|context_lengths|generated_token_ids|layer_(\d{1,6})\.kv)")


def safetensors(path: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads a golden file, hidden states, or the one file that TensorRT-Edge-LLM writes for a request."""
    with open_checkpoint(path) as checkpoint:
        sizes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        metadata = {key: str(value) for key, value in checkpoint.metadata.items()}
    loads: dict[str, Load] = {name: functools.partial(_tensor, path, name) for name in sizes}
    if rounds := {name: match for name in sizes if (match := _ROUND.fullmatch(name))}:
        return _rounds(path, loads, rounds, config)
    dtype = metadata.get("dtype")
    found = _by_name(path, loads, config, dtype if dtype in bounded.DTYPES else None, shaped=True)
    origin = {name: text for name, text in metadata.items() if name in _ORIGIN}
    return dataclasses.replace(found, weights_sha256=metadata.get("weights_sha256"), origin=origin)


def _tensor(path: pathlib.Path, name: str, most: int | None) -> np.ndarray:
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors[name]
        count = int(np.prod(tensor.shape, dtype=object))
        if most is not None and count > most:
            raise RefusedError(
                "the number of elements does not fit this model and these tokens",
                code="dump-size",
                file=path,
                tensor=name,
                found=f"{count}, that is {list(tensor.shape)}",
                expected=f"at most {most}",
                hint="Is it another model's?",
            )
        return tensor.read()


def npz(path: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads an `.npz` file: hidden states, or stages by name."""
    return _by_name(path, bounded.npz(path), config)


def npy_folder(folder: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads a folder of `.npy` files that are named as values: llama.cpp's, HuggingFace's or our names."""
    loads: dict[str, Load] = {}
    for file in bounded.files(folder, ".npy"):
        loads[file.stem] = functools.partial(bounded.npy, file, floats=False)
    return _by_name(folder, loads, config)


def _by_name(
    path: pathlib.Path, loads: Mapping[str, Load], config: Qwen2Config, dtype: str | None = None, shaped: bool = False
) -> Found:
    merged = any(name.startswith("kqv_merged") for name in loads)
    stages: dict[str, Stage] = {}
    gradients: dict[str, Stage] = {}
    strangers: list[str] = []
    for name, load in loads.items():
        if name in (*names.INPUTS, *_IGNORED, "positions", "labels"):
            continue
        if _STACKED.fullmatch(name):
            stages |= _stacked(path, name, load, config)
            continue
        where = path / f"{name}.npy" if path.is_dir() else path
        if (gradient := names.gradient_of(name, config)) is not None:
            gradients[gradient] = Stage(load, where, None, shaped)
            continue
        cached = names.cached_keys(name)
        key = cached or names.key_of(name, config.num_layers, merged)
        if key is None:
            strangers.append(name)
            continue
        unscaled = Key(key).stage == names.UNSCALED
        if unscaled:
            key = Key.of(Key(key).layer, "attn_scores")
        # A stage under its own key goes before one under a name that stands for it.
        if key not in stages or key == name:
            layout = None if cached is None else "bhtd"
            stages[key] = Stage(
                load, where, layout, shaped and cached is None, config.head_dim**-0.5 if unscaled else 1.0
            )
    given: dict[str, Any] = {name: loads[name](_MOST_TOKENS) for name in names.INPUTS if name in loads}
    inputs = Inputs.of(*(_batch(given.get(name)) for name in names.INPUTS)) if "input_ids" in given else None
    positions = None
    if "positions" in loads:
        positions = checked_positions(loads["positions"](_MOST_TOKENS).tolist(), path)
    labels = _batch(loads["labels"](_MOST_TOKENS)) if "labels" in loads else None
    strange = tuple(sorted(strangers))
    return Found(stages, inputs, positions, dtype, strangers=strange, gradients=gradients, labels=labels)


def _batch(array: np.ndarray | None) -> np.ndarray | None:
    return array[None] if array is not None and array.ndim == 1 else array


def _stacked(path: pathlib.Path, name: str, load: Load, config: Qwen2Config) -> dict[str, Stage]:
    """HuggingFace's tuple as one array: [layers + 1, B, T, D], or [layers, B, N, T, T]."""
    single = name.removesuffix("s") if name == "attentions" else name
    count = config.num_layers + (name == "hidden_states")

    def one(index: int, most: int | None) -> np.ndarray:
        array = load(None if most is None else most * count)
        if not array.ndim or len(array) != count:
            raise DumpError(
                "the number of entries is not this model's",
                code="dump-shape",
                file=path,
                tensor=name,
                found=list(array.shape),
                expected=f"[{count}, ...]",
            )
        return array[index]

    keys = {index: names.key_of(f"{single}.{index}", config.num_layers) for index in range(count)}
    return {key: Stage(functools.partial(one, index), path) for index, key in keys.items() if key is not None}


# --- TensorRT-Edge-LLM -----------------------------------------------------------------------------------------------


def _rounds(
    path: pathlib.Path, loads: Mapping[str, Load], rounds: Mapping[str, re.Match[str]], config: Qwen2Config
) -> Found:
    """One request of TensorRT-Edge-LLM: last logits, generated tokens and the cache of keys and values of each round.

    Round 0 is the prompt, whose tokens are not in the file; round r the step that reads what round r - 1 generated.
    The last cache has the keys of all tokens, which are `k_post_rope`.
    """
    count = 1 + max(int(match[1]) for match in rounds.values())
    lengths = [f"round_{index}.context_lengths" for index in range(count)]
    made = [f"round_{index}.generated_token_ids" for index in range(count)]
    if missing := [name for name in (*lengths, *made[:-1]) if name not in loads]:
        raise DumpError("a round is not whole", code="dump-rounds", file=path, found=f"no {missing[0]}")
    prompt, last = (np.ravel(loads[name](_MOST_TOKENS)).astype(int) for name in (lengths[0], lengths[-1]))
    if len(set(prompt.tolist())) != 1 or len(set(last.tolist())) != 1:
        raise RefusedError(
            "sequences of unequal length in one request",
            code="dump-rounds",
            file=path,
            found=prompt.tolist(),
            hint="Dump them one by one.",
        )
    total = int(last[0])

    def finish(inputs: Inputs) -> tuple[Inputs, Any]:
        ids = inputs.input_ids
        if ids.shape[1] == prompt[0] and count > 1:
            steps = [np.ravel(loads[name](_MOST_TOKENS)).astype(np.int64)[:, None] for name in made[:-1]]
            ids = np.concatenate([ids, *steps], axis=1)
        return Inputs.of(ids), list(range(ids.shape[1] - count, ids.shape[1]))

    def logits(most: int | None) -> np.ndarray:
        return np.stack([loads[f"round_{index}.logits"](most) for index in range(count)], axis=1)

    def keys(name: str, most: int | None) -> np.ndarray:
        # [B, 2, K, slots, H]; slots may be more than there are tokens
        cache = loads[name](None)
        del most
        if cache.ndim != 5 or cache.shape[1] != 2 or cache.shape[3] < total:
            raise DumpError(
                "not a cache of keys and values",
                code="dump-shape",
                file=path,
                tensor=name,
                found=list(cache.shape),
                expected=f"[B, 2, {config.num_kv_heads}, {total} or more, {config.head_dim}]",
            )
        taken: np.ndarray = cache[:, 0, :, :total].swapaxes(1, 2)
        return taken

    stages: dict[str, Stage] = {}
    if all(f"round_{index}.logits" in loads for index in range(count)):
        stages["logits"] = Stage(logits, path)
    for name, match in rounds.items():
        if match[3] is not None and int(match[1]) == count - 1:
            stages[Key.of(int(match[3]), "k_post_rope")] = Stage(functools.partial(keys, name), path)
    return Found(stages, finish=finish)


Reader = Callable[[pathlib.Path, Qwen2Config], Found]
