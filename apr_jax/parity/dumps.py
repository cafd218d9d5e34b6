"""Stage dumps of other engines, whatever they come as, fitted to a model: docs/dumps.md lists the forms.

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
import math
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import DumpError, UsageError, in_file
from apr_jax.engines import arrays, bounded, jsonl, maps, module_outputs, summaries
from apr_jax.engines.found import Found, Stage, Summary
from apr_jax.parity import ranks
from apr_jax.parity.ranks import Parts
from apr_jax.trace import aprt, stages
from apr_jax.trace.inputs import Inputs, beside
from apr_jax.trace.positions import Positions, dumped_shape, find_columns
from apr_jax.trace.stages import Key

MAP = maps.MAP
_SPARE_KEYS = 4096
"""Attention stages may have columns for the slots of a cache that hold no key yet."""


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
      summaries: Trace key -> a few numbers of stages whose values were not dumped.
      ranks: Trace key -> what each tensor-parallel rank dumped of it.
      form: The name of its form, one of FORMS; "" if it was computed here.
      origin: What the file says of how it was made: witness, device, versions.
      gradients: Key of a gradient (`stages.Key`) -> float32 or float64 array, of a stage [B, T, ...] or as the
        parameter; empty unless they were asked for.
      labels: The label of each place, -100 where it does not count in the loss, int [B, T]; None: all count.
      unread: How many gradients the dump holds that were not asked for.
    """

    inputs: Inputs
    values: Mapping[str, np.ndarray]
    dtype: str | None = None
    columns: np.ndarray | None = None
    weights_sha256: str | None = None
    strangers: tuple[str, ...] = ()
    summaries: Mapping[str, Summary] = dataclasses.field(default_factory=dict)
    ranks: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
    form: str = ""
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gradients: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None
    unread: int = 0


@dataclasses.dataclass(frozen=True)
class Form:
    """A form in which engines leave dumps.

    Attributes:
      name: What to call it.
      made_by: Who writes it.
      shows: Whether a path is one.
      read: Reads it.
      looks: How it looks, for `--explain-format`.
    """

    name: str
    made_by: str
    shows: Callable[[pathlib.Path], bool]
    read: Callable[[pathlib.Path, Qwen2Config], Found]
    looks: str


def _ends(*suffixes: str) -> Callable[[pathlib.Path], bool]:
    return lambda path: path.is_file() and path.suffix in suffixes


def _holds(suffix: str) -> Callable[[pathlib.Path], bool]:
    return lambda path: path.is_dir() and bool(bounded.files(path, suffix))


FORMS = (
    Form(
        "msprobe",
        "Ascend's msprobe, level L0 or mix",
        module_outputs.shows_msprobe,
        module_outputs.msprobe,
        "a folder with dump_tensor_data/Module.model.layers.0.mlp.down_proj.Linear.forward.0.output.0.npy and so on:"
        " one step of one rank",
    ),
    Form(
        "sglang",
        "SGLang's --debug-tensor-dump-output-folder",
        module_outputs.shows_passes,
        module_outputs.sglang,
        "a folder TP0_PP0_Rank0_pid123 with Pass00000.pt and so on; needs torch",
    ),
    Form(
        "map",
        "apr_jax.capture, your own engine",
        lambda path: (path / MAP).is_file(),
        maps.read,
        "a folder with dump.json, which names the file, dtype and layout of each stage (.npy or raw values), or"
        " has numbers instead (min, max, mean, l2)",
    ),
    Form(
        "APRT",
        "apr trace --save-tensor, your own engine",
        _holds(".bin"),
        lambda path, config: Found({}),  # read by `_read_aprt`, which needs the tokens first
        "a folder with layer-0/attn_norm.bin and so on, and token_ids.json",
    ),
    Form(
        "npy",
        "llama.cpp's eval-callback, HuggingFace, your own engine",
        _holds(".npy"),
        arrays.npy_folder,
        "a folder of .npy files named as values: attn_norm-0.npy, kq_soft_max-0.npy, l_out-0.npy, result_output.npy"
        " (llama.cpp), hidden_states.0.npy, stage.0.attn_norm.npy; the token ids beside them",
    ),
    Form(
        "log",
        "llama-eval-callback",
        summaries.shows_log,
        summaries.log,
        "a .txt or .log file of the printed output: only sums are compared",
    ),
    Form(
        "npz",
        "numpy.savez of HuggingFace's hidden_states, attentions, logits",
        _ends(".npz"),
        arrays.npz,
        "one .npz file: input_ids; hidden_states.0 ... (or one array hidden_states), attentions.0 ..., logits",
    ),
    Form(
        "jsonl",
        "MaxText's golden logits",
        _ends(".jsonl"),
        jsonl.read,
        'one JSON object a line: {"tokens": [...], "logits": [[...], ...]}; pickles are never read',
    ),
    Form(
        "safetensors",
        "apr-jax golden, HuggingFace, TensorRT-Edge-LLM",
        lambda path: not path.is_dir(),
        arrays.safetensors,
        "one safetensors file: a golden file; hidden.0 ..., hidden_states.0 ..., logits, input_ids; or a request of"
        " TensorRT-Edge-LLM (round_0.logits, round_0.layer_0.kv, ..., with the prompt as --input-ids)",
    ),
)


def explain(program: str) -> str:
    """Returns what can be read, as text."""
    texts = [f"{program} MODEL --right DUMP reads"]
    texts += [f"- {form.name}: {form.looks}. Written by {form.made_by}." for form in FORMS]
    texts += [
        "Tensor-parallel ranks: a folder with rank0, rank1, ..., each a dump; column and head splits are put together.",
        "The format is recognised from the files. Token ids are in the dump, beside it (token_ids.json, or what"
        " golden --export-inputs writes), or named by --input-ids. Stages may be missing.",
        f"Keys: stage.embedding; stage.N.STAGE with STAGE one of {', '.join(stages.LAYER_STAGES)}; stage.final_norm;"
        " logits; hidden.N (the input of layer N), hidden.final_norm.",
        "In Python: apr_jax.capture.torch(model, DIR), capture.flax(model, DIR), capture.arrays(DIR, ids, values)."
        " docs/dumps.md has all of it, with examples.",
    ]
    return "\n\n".join(
        textwrap.fill(text, 100, subsequent_indent="  " if text.startswith("-") else "", break_on_hyphens=False)
        for text in texts
    )


def read(
    path: str | os.PathLike[str],
    config: Qwen2Config,
    inputs: Inputs | None = None,
    positions: Positions | None = None,
    backward: bool = False,
) -> Dump:
    """Reads a dump.

    Args:
      path: A file or folder of one of FORMS.
      config: The model's configuration.
      inputs: The batch that was run, where the dump does not say it.
      positions: The positions that the dump's rows stand for, where it holds some only and does not say which.
      backward: Whether its gradients are wanted too.

    Raises:
      AprJaxError: Missing, broken or foreign files; sizes that do not fit the model; nothing to compare.
    """
    with in_file(path):
        return _read(pathlib.Path(path), config, inputs, positions, backward)


def _read(
    place: pathlib.Path, config: Qwen2Config, inputs: Inputs | None, positions: Positions | None, backward: bool
) -> Dump:
    if places := ranks.folders(place):
        dump = _read_ranks(places, config, inputs, positions)
        return dataclasses.replace(dump, form=f"{len(places)} tensor-parallel ranks")
    form = next((form for form in FORMS if form.shows(place)), None)
    if form is None:
        raise DumpError(
            "no dump is in this folder",
            code="dump-empty",
            file=place,
            expected=f"{MAP}, .npy files, or APRT files such as layer-0/attn_norm.bin",
        )
    if form.name == "APRT":
        dump = _read_aprt(place, config, inputs, positions)
    else:
        dump = _fitted(form.read(place, config), place, config, inputs, positions, backward)
    if backward and not dump.gradients:
        raise DumpError(
            "the dump holds no gradient",
            code="nothing-compared",
            file=place,
            expected="grad.stage.0.attn_norm, grad.model.norm.weight or such",
            hint="docs/dumps.md says how to dump gradients.",
        )
    return dataclasses.replace(dump, form=form.name)


def _read_aprt(folder: pathlib.Path, config: Qwen2Config, inputs: Inputs | None, positions: Positions | None) -> Dump:
    inputs = inputs or beside(folder)
    columns = None if positions is None else find_columns(positions, inputs)
    longer = dataclasses.replace(config, num_layers=config.num_layers + 1)  # an engine may run a layer twice
    _, values = aprt.read(folder, longer, inputs, columns)
    return Dump(inputs, values, columns=columns, strangers=tuple(aprt.unknown_files(folder, longer)))


def _read_ranks(
    places: list[pathlib.Path], config: Qwen2Config, inputs: Inputs | None, positions: Positions | None
) -> Dump:
    """Reads the dumps of all ranks, each of any form but APRT, and puts their stages together in the ranks' order."""
    all_found = []
    for place in places:
        form = next((form for form in FORMS if form.shows(place)), None)
        if form is None or form.name == "APRT":
            raise DumpError("no dump of a rank is in this folder", code="dump-ranks", file=place, expected=MAP)
        all_found.append(form.read(place, config))
    first, keys = all_found[0], set.intersection(*(set(found.stages) for found in all_found))
    if not keys:
        raise DumpError("the ranks have no stage in common", code="nothing-compared", file=places[0].parent)
    _check_keys(keys, config, places[0])
    batch = _tokens(first, places[0], inputs)
    positions = first.positions if positions is None else positions
    columns = None if positions is None else find_columns(positions, batch)
    parts: dict[str, Parts] = {}
    for key in (key for key in stages.trace_keys(config.num_layers + 1) if key in keys):
        flat = [_values(key, found.stages[key], config, batch).ravel() for found in all_found]
        parts[key] = ranks.sort_out(key, flat, config, batch, columns, places[0])
    values: dict[str, np.ndarray] = {key: ranks.merged(key, each, config) for key, each in parts.items()}
    return Dump(batch, values, first.dtype, columns, first.weights_sha256, first.strangers, ranks=parts)


def _fitted(
    found: Found,
    path: pathlib.Path,
    config: Qwen2Config,
    inputs: Inputs | None,
    positions: Positions | None,
    backward: bool,
) -> Dump:
    """Fits what was found to the model: tokens, positions and the shape of every stage."""
    if found.gradients and not backward and not found.stages:
        raise DumpError(
            "the dump holds gradients only",
            code="nothing-compared",
            file=path,
            hint="--backward examines them.",
        )
    if not found.stages and not found.summaries and not found.gradients:
        raise DumpError(
            "the dump holds no stage of this model",
            code="nothing-compared",
            file=path,
            found=", ".join(found.strangers[:8]) or "no names at all",
            expected="names such as stage.0.attn_norm, hidden.0, logits",
        )
    _check_keys([*found.stages, *found.summaries], config, path)
    batch = _tokens(found, path, inputs)
    positions = found.positions if positions is None else positions
    if found.finish is not None:
        batch, positions = found.finish(batch)
    columns = None if positions is None else find_columns(positions, batch)
    values = {key: _load(key, stage, config, batch, columns) for key, stage in found.stages.items()}
    gradients = _Gradients(found.gradients if backward else {}, config, batch)
    labels = None if found.labels is None else _checked_labels(found.labels, batch, path)
    return Dump(
        batch,
        values,
        found.dtype,
        columns,
        found.weights_sha256,
        found.strangers,
        found.summaries,
        origin=found.origin,
        gradients=gradients,
        labels=labels,
        unread=0 if backward else len(found.gradients),
    )


class _Gradients(Mapping[str, np.ndarray]):
    """Gradients of a dump: those of stages in memory, those of parameters read anew each time, as large as a model."""

    def __init__(self, found: Mapping[str, Stage], config: Qwen2Config, inputs: Inputs):
        self._found, self._config, self._inputs = found, config, inputs
        self._held: dict[str, np.ndarray] = {}
        # All are read once, so that what is not as it should be is told before anything is computed.
        for key in found:
            value = self[key]
            if not Key(key).of_parameter:
                self._held[key] = value

    def __getitem__(self, key: str) -> np.ndarray:
        held = self._held.get(key)
        return _gradient(key, self._found[key], self._config, self._inputs) if held is None else held

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _gradient(key: str, stage: Stage, config: Qwen2Config, inputs: Inputs) -> np.ndarray:
    """Reads a gradient: of a stage at all positions, or in the shape of its parameter."""
    if not Key(key).of_parameter:
        return _load(key, stage, config, inputs, None)
    name, _, side = key.removeprefix(stages.GRADIENT).partition(".lora_")
    shape = config.tensor_shapes()[name.removesuffix(".as_embedding").removesuffix(".as_head")]
    array = stage.load(math.prod(shape))
    if side:
        # Whether the rank is the adapter's is seen where both are known.
        rank = max(1, array.size // (shape[1] if side == "A" else shape[0]))
        shape = (rank, shape[1]) if side == "A" else (shape[0], rank)
    if array.ndim == 1 and array.size == math.prod(shape):
        array = array.reshape(shape)  # of a raw file
    if array.shape != shape or array.dtype.kind in "iub":
        raise DumpError(
            "the shape of a gradient is not its parameter's",
            code="dump-shape",
            file=stage.file,
            tensor=key,
            found=f"{array.dtype} {list(array.shape)}",
            expected=f"floats {list(shape)}",
        )
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32)


def _checked_labels(labels: np.ndarray, inputs: Inputs, path: pathlib.Path) -> np.ndarray:
    ids = inputs.input_ids
    if labels.shape != ids.shape or not ((labels == ids) | (labels < 0)).all():
        raise DumpError(
            "labels are not the tokens themselves; a model shifts them by one",
            code="dump-labels",
            file=path,
            found=list(labels.shape),
            expected=f"input_ids, or -100 where a token does not count, {list(ids.shape)}",
            hint="Give the labels as they go into the model, not as they go into the loss.",
        )
    return labels


def _tokens(found: Found, path: pathlib.Path, inputs: Inputs | None) -> Inputs:
    if found.inputs is None:
        return inputs or beside(path if path.is_dir() else path.parent)
    if inputs is not None and not path.is_dir() and not _same_tokens(inputs, found.inputs):
        raise UsageError(
            "the golden file was made from different tokens",
            code="input-ids",
            file=path,
            found=f"{found.inputs.input_ids[0, :8].tolist()}...",
            expected=f"{inputs.input_ids[0, :8].tolist()}...",
            hint="It brings its own: leave --input-ids out.",
        )
    return found.inputs if inputs is None else inputs


def _same_tokens(one: Inputs, other: Inputs) -> bool:
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.positions(), other.positions())


def _check_keys(keys: Iterable[str], config: Qwen2Config, path: str | os.PathLike[str]) -> None:
    # One layer more than the model has: an engine may run one twice.
    if unknown := sorted(set(keys) - set(stages.trace_keys(config.num_layers + 1))):
        raise DumpError(
            "the dump names stages that this model lacks",
            code="dump-stage",
            file=path,
            found=", ".join(unknown[:5]),
            hint="Is it another model's, or are the names misspelt?",
        )


def _values(key: str, stage: Stage, config: Qwen2Config, inputs: Inputs) -> np.ndarray:
    """Reads a stage of whatever shape, as float32 or float64."""
    batch, length = inputs.input_ids.shape
    pair = Key(key).per_pair
    whole = math.prod((batch, *stages.shape(config, Key(key).stage, length)))
    array = stage.load(whole // length * (length + _SPARE_KEYS) if pair else whole)
    if array.dtype.kind in "iub":
        raise DumpError(
            "not an array of floats", code="dump-dtype", file=stage.file, tensor=key, found=str(array.dtype)
        )
    if pair and array.ndim >= 3 and array.shape[-1] > length and stage.layout is None:
        array = array[..., :length]
    # float32 and float64 as they are, whatever their byte order; narrower types are widened.
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32)


def _load(key: str, stage: Stage, config: Qwen2Config, inputs: Inputs, columns: np.ndarray | None) -> np.ndarray:
    wide = _values(key, stage, config, inputs)
    shape = dumped_shape(config, key, wide.size, inputs, columns, stage.file)
    if stage.shaped and wide.ndim == len(shape) and wide.shape != shape:
        raise DumpError(
            "the shape of a tensor is not this model's",
            code="dump-shape",
            file=stage.file,
            tensor=key,
            found=list(wide.shape),
            expected=list(shape),
        )
    ordered = _in_order(wide.ravel(), stage.layout, shape, config, stage.file)
    return ordered if stage.factor == 1.0 else ordered * np.asarray(stage.factor, ordered.dtype)


def _in_order(
    flat: np.ndarray, layout: str | None, shape: tuple[int, ...], config: Qwen2Config, path: str | os.PathLike[str]
) -> np.ndarray:
    attention = len(shape) == 4
    if layout is not None and not isinstance(layout, str):
        raise UsageError(
            "a layout is not a string", code="dump-layout", file=path, found=layout, expected='such as "btd"'
        )
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
    if (
        set(layout) - set(sizes)
        or len(set(layout)) != len(layout)
        or math.prod(sizes[axis] for axis in layout) != flat.size
    ):
        raise UsageError(
            "unknown layout", code="dump-layout", file=path, found=layout, expected=f"an order of {wanted}"
        )
    array = flat.reshape([sizes[axis] for axis in layout])
    for axis in sorted(missing):
        array, layout = array[None], axis + layout
    return array.transpose([layout.index(axis) for axis in wanted]).reshape(shape)
