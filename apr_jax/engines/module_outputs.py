"""Dumps of what a model's modules took and gave, by the modules' names: msprobe's folders, SGLang's `Pass*.pt`.

They are what hooks see, so they go through the same `Recorder` as a model that is watched.

    dump_tensor_data/Module.model.layers.0.mlp.down_proj.Linear.forward.0.input.0.npy        msprobe, level L0 or mix
    TP0_PP0_Rank0_pid123/Pass00000.pt: {"model.layers.0.mlp.down_proj": tensor, ...}         SGLang
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import BrokenContainerError, RefusedError, UsageError
from apr_jax.engines import bounded
from apr_jax.engines.found import Found, Load, of_array
from apr_jax.engines.recorder import Recorder, as_numpy, joined
from apr_jax.engines.roles import INNER, OUTER, Role, assign, named

_MSPROBE = re.compile(
    r"(?:Module|Cell)\.(.+)\.(\w+)\.forward\.(\d{1,6})\.(input|output|kwargs)\.(?:\w+\.)?(\d{1,3})(?:\.\d+)*"
)
_PASS = re.compile(r"Pass(\d+)\.pt")
_INDEXED = re.compile(r"(.+)\.(\d{1,2})")


@dataclasses.dataclass
class _Module:
    """What one module took and gave in one call: place -> array."""

    inputs: dict[int, Load] = dataclasses.field(default_factory=dict)
    outputs: dict[int, Load] = dataclasses.field(default_factory=dict)


def shows_msprobe(folder: pathlib.Path) -> bool:
    """Whether a folder holds msprobe's arrays."""
    return folder.is_dir() and any(_MSPROBE.fullmatch(path.stem) for path in bounded.files(folder, ".npy"))


def msprobe(folder: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads the arrays of one step and one rank that msprobe dumped at the level of modules."""
    calls: dict[int, dict[str, _Module]] = {}
    for path in bounded.files(folder, ".npy"):
        if match := _MSPROBE.fullmatch(path.stem):
            name, _, call, side, place = match.groups()
            module = calls.setdefault(int(call), {}).setdefault(name, _Module())
            held = module.outputs if side == "output" else module.inputs
            held.setdefault(int(place), functools.partial(bounded.npy, path, floats=False))
    return _replayed([calls[call] for call in sorted(calls)], folder, config)


def shows_passes(path: pathlib.Path) -> bool:
    """Whether a folder, or one below it, holds SGLang's passes."""
    return path.is_dir() and any(_PASS.fullmatch(file.name) for file in bounded.files(path, ".pt"))


def sglang(folder: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads the passes of one rank that SGLang dumped with --debug-tensor-dump-output-folder.

    The files are PyTorch's. torch reads them with `weights_only`, which makes tensors and nothing else.
    """
    files = [path for path in bounded.files(folder, ".pt") if _PASS.fullmatch(path.name)]
    if len(places := {path.parent for path in files}) > 1:
        raise UsageError(
            "dumps of several ranks or runs",
            code="dump-ranks",
            file=folder,
            found=", ".join(sorted(place.name for place in places)[:4]),
            hint="Name the folder of one of them.",
        )
    return _replayed([_pass(path) for path in files], folder, config)


def _pass(path: pathlib.Path) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for name, array in _tensors(path).items():
        plain = name.removesuffix(".next_token_logits")
        if ".forward_batch_info." in name:
            if name.endswith(".input_ids"):
                modules.setdefault("embed_tokens", _Module()).inputs[0] = _constant(array)
            continue
        match = _INDEXED.fullmatch(plain)
        indexed = match is not None and match[1].rpartition(".")[2] not in ("layers", "h", "blocks")
        plain, place = (match[1], int(match[2])) if match is not None and indexed else (plain, 0)
        modules.setdefault(plain, _Module()).outputs[place] = _constant(array)
    return modules


def _constant(array: np.ndarray) -> Load:
    return lambda most: array


def _tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UsageError(
            "SGLang's passes are PyTorch files; torch is not installed",
            code="torch",
            file=path,
            hint="pip install torch",
        ) from None
    bounded.checked(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # whatever torch makes of bytes that are no file of its own
        found = f"{type(error).__name__}: {str(error)[:200]}"
        raise BrokenContainerError("torch cannot read it", code="torch-file", file=path, found=found) from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise BrokenContainerError("not a dictionary of tensors", code="torch-file", file=path, found=found)
    return {str(name): as_numpy(value) for name, value in content.items() if hasattr(value, "detach")}


# --- Replay ----------------------------------------------------------------------------------------------------------


def _replayed(calls: Sequence[Mapping[str, _Module]], path: pathlib.Path, config: Qwen2Config) -> Found:
    """Tells a recorder of every call of every module, in the order in which a model calls them."""
    recorder = Recorder()
    for every in calls:
        # Layers share one rotation: what stands under its name is the last layer's, or a call for each.
        modules = {name: module for name, module in every.items() if not re.search("rotary|rope", name)}
        if not modules:
            continue
        roles = assign([named(name) for name in modules])
        recorder.begin()
        recorder.vocabulary = config.vocab_size
        recorder.call.ids = np.atleast_2d(_ids(modules, roles, path))
        for name in sorted((name for name in modules if name in roles), key=lambda name: _order(roles[name])):
            _observe(recorder, roles[name], modules[name], config)
    inputs, values, positions = joined(recorder.calls, None)
    return Found({key: of_array(value, path) for key, value in values.items()}, inputs, positions)


def _order(role: Role) -> tuple[int, int]:
    if role.layer is None:
        return (-1, 0) if role.part == OUTER[0] else (1 << 30, OUTER.index(role.part))
    return role.layer, INNER.index(role.part) if role.part in INNER else _LATE[role.part]


_LATE = {"attention": INNER.index("o"), "layer": len(INNER)}


def _ids(modules: Mapping[str, _Module], roles: Mapping[str, Role], path: pathlib.Path) -> np.ndarray:
    table = next((modules[name] for name in modules if roles.get(name) == Role("embedding")), None)
    loads = [*(() if table is None else table.inputs.values())]
    loads += list(modules["embed_tokens"].inputs.values()) if "embed_tokens" in modules else []
    for load in loads:
        array = load(_MOST_TOKENS)
        if array.dtype.kind in "iu" and array.ndim in (1, 2):
            return array
    raise RefusedError(
        "the dump does not say which tokens were run",
        code="token-ids-missing",
        file=path,
        expected="the embedding's input among the modules",
        hint="Dump the whole model, inputs included.",
    )


_MOST_TOKENS = 1 << 24


def _observe(recorder: Recorder, role: Role, module: _Module, config: Qwen2Config) -> None:
    batch, length = recorder.call.ids.shape if recorder.call.ids is not None else (1, 1)
    widest = max(config.vocab_size, 2 * config.intermediate_size, config.num_heads * (length + 4096))
    most = batch * length * widest
    taken = {side: [held[place](most) for place in sorted(held)] for side, held in vars(module).items()}
    if role.part == "layer":
        recorder.leave(taken["outputs"], layer=role.layer)
    elif role.part == "embedding":
        recorder.observe(role, [], taken["outputs"])
    else:
        recorder.observe(role, taken["inputs"], taken["outputs"])
