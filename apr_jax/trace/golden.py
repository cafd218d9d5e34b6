"""Golden files, in which reference logits and intermediate values of one batch are kept: safetensors, with provenance.

Content (B rows, T positions): `input_ids`, `attention_mask`, `position_ids` int32 [B, T]; `logits` float32 [B, T, V]
(float64 where computed so); `loss_nats` float64 [1]; `hidden.{layer}` and `hidden.final_norm` [B, T, D] on request;
`stage.*` on request, in the shapes of `stages.shape` behind a batch axis; `grad.*` on request, the gradients of the
loss (`stages.Key`); and `labels` int32 [B, T] where some tokens do not count in the loss (-100). Values computed in
bfloat16 are stored as float32, which holds them exactly. At padding the values mean nothing. A file with `positions`
int32 [R] or [B, R] holds the values of those positions only, [B, R, ...]: such are made by engines that decode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import RefusedError, in_file
from apr_jax.converters.formats import dtypes, safetensors_format
from apr_jax.converters.storage.output import atomic_file
from apr_jax.converters.storage.temporaries import Notice
from apr_jax.trace import stages
from apr_jax.trace.compare import loss_nats
from apr_jax.trace.inputs import Inputs, beside, from_json
from apr_jax.trace.positions import Positions, checked_positions, next_token_pairs, predicted_pairs

_INPUTS = ("input_ids", "attention_mask", "position_ids")
_LOSS = "loss_nats"
_POSITIONS = "positions"
_LABELS = "labels"
IGNORED = -100
"""The label of a token that does not count (`ignore_index` of `torch.nn.CrossEntropyLoss`)."""
FORMAT = "apr_jax golden 1"


@dataclasses.dataclass(frozen=True)
class Golden:
    """A batch and what a witness computed from it.

    Attributes:
      inputs: The batch.
      values: Trace key -> float32 or float64 array.
      metadata: Provenance: witness, dtype, versions, device, precision, weights' hash, configuration.
      positions: The positions that the values stand for, [R] or [B, R]; None is all of them.
      labels: The token of each place, or -100 where it does not count in the loss, int32 [B, T]; None: all count.
    """

    inputs: Inputs
    values: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    positions: Positions | None = None
    labels: np.ndarray | None = None

    @property
    def counted(self) -> np.ndarray | None:
        """Which tokens the loss is over, bool [B, T]; None is all."""
        return None if self.labels is None else self.labels != IGNORED


def with_hidden_states(trace: Mapping[str, np.ndarray], num_layers: int) -> dict[str, np.ndarray]:
    """Returns the trace with its hidden states under their own keys as well, where their stages are there."""
    hidden = {key: trace[source] for key, source in stages.hidden_sources(num_layers).items() if source in trace}
    return {**trace, **hidden}


def stored(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the values in the dtypes of a golden file: float64 stays, all else becomes float32."""
    return {
        key: np.ascontiguousarray(value, np.float64 if value.dtype == np.float64 else np.float32)
        for key, value in values.items()
    }


def provenance(
    checkpoint: Checkpoint, config: Qwen2Config, witness: str, dtype: str, device: str, precision: str
) -> dict[str, str]:
    """Returns the metadata of a golden file.

    Args:
      checkpoint: Where the weights come from; its payload is read once for the hash.
      config: The model's configuration.
      witness: "jax" or "huggingface".
      dtype: Dtype of the computation.
      device: What it ran on.
      precision: How dot products were computed, and other settings that move the last digits.
    """
    packages = ("jax", "jaxlib", "flax", "numpy") if witness == "jax" else ("torch", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    return {
        "format": FORMAT,
        "witness": witness,
        "dtype": dtype,
        "device": device,
        "precision": precision,
        "versions": json.dumps(versions),
        "config": json.dumps(_stated(config)),
        "weights_sha256": weights_sha256(checkpoint),
    }


def _stated(config: Qwen2Config) -> dict[str, Any]:
    """Returns the numbers of a configuration, without rules and windows that it does not have."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value not in (None, ())}


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Returns the SHA-256 over name, dtype, shape and bytes of every tensor in name order, whatever the container."""
    digest = hashlib.sha256()
    for name, tensor in checkpoint.tensors.items():
        digest.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        for chunk in tensor.stream():
            digest.update(chunk)
    return digest.hexdigest()


def write(
    path: str | os.PathLike[str],
    golden: Golden,
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
) -> None:
    """Writes a golden file, atomically; `loss_nats` is computed from the logits where a token has a next one.

    Args:
      path: Where to.
      golden: What to write.
      force: Whether an existing file may be replaced.
      sources: Files that it was made from; none of them is replaced.
      notice: Told about leftovers of earlier runs, and what this one has to leave.

    Raises:
      UsageError: The file exists and `force` is not given, or is one of the sources.
      StorageError: The disk.
    """
    arrays = {name: getattr(golden.inputs, name) for name in _INPUTS} | dict(golden.values)
    if golden.labels is not None:
        arrays[_LABELS] = golden.labels
    if predicted_pairs(golden.inputs, golden.counted).any():
        loss = loss_nats(golden.values[stages.LOGITS], golden.inputs, golden.counted)
        arrays[_LOSS] = np.array([loss], np.float64)
    write_arrays(path, arrays, golden.metadata, force, sources, notice)


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
) -> None:
    """Writes float32, float64 and int32 arrays as a safetensors file, atomically; arguments and errors as `write`."""
    names = sorted(arrays)
    types = {name: _type_of(arrays[name]) for name in names}
    order = safetensors_format.data_order((name, types[name]) for name in names)
    header = safetensors_format.serialise_header(
        ((name, types[name], arrays[name].shape) for name in order), dict(metadata)
    )
    size = len(header) + sum(arrays[name].nbytes for name in order)
    with atomic_file(os.fspath(path), size, force=force, sources=sources, notice=notice) as output:
        output.write_at(header, 0)
        position = len(header)
        for name in order:
            output.write_at(np.ascontiguousarray(arrays[name]).tobytes(), position)
            position += arrays[name].nbytes


def read(path: str | os.PathLike[str]) -> Golden:
    """Reads a golden file.

    Raises:
      AprJaxError: As `open_checkpoint`.
      RefusedError: The file holds no input ids, or nothing to compare.
    """
    with open_checkpoint(path) as checkpoint:
        arrays = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
        metadata = {key: str(value) for key, value in checkpoint.metadata.items()}
    if "input_ids" not in arrays:
        raise RefusedError(
            "this is not a golden file: it holds no input_ids",
            code="golden-inputs",
            file=path,
            found=sorted(arrays)[:5],
            hint="`golden MODEL -o FILE` writes one; hidden states of other programs are for `parity`.",
        )
    with in_file(path):
        inputs = Inputs.of(*(arrays.get(name) for name in _INPUTS))
    positions = None
    if _POSITIONS in arrays:
        positions = checked_positions(arrays[_POSITIONS].tolist(), path)
    labels = None if _LABELS not in arrays else _checked_labels(arrays[_LABELS], inputs, path)
    values = {name: array for name, array in arrays.items() if name not in (*_INPUTS, _LOSS, _POSITIONS, _LABELS)}
    if not values:
        raise RefusedError(
            "the golden file holds no values",
            code="nothing-compared",
            file=path,
            hint="`golden MODEL -o FILE` writes one with logits",
        )
    return Golden(inputs, values, metadata, positions, labels)


def _checked_labels(labels: np.ndarray, inputs: Inputs, path: str | os.PathLike[str]) -> np.ndarray:
    ids = inputs.input_ids
    if labels.shape != ids.shape or not ((labels == ids) | (labels == IGNORED)).all():
        raise RefusedError(
            "labels are not the tokens themselves; a model shifts them by one",
            code="golden-labels",
            file=path,
            tensor=_LABELS,
            expected=f"input_ids, or {IGNORED} where a token does not count, {list(ids.shape)}",
            hint="Give the labels as they go into the model, not as they go into the loss",
        )
    return labels.astype(np.int32)


def read_inputs(path: str | os.PathLike[str]) -> Inputs:
    """Reads the batch that `--input-ids` names: a golden file's, a folder's (`inputs.beside`), or a JSON list of lists.

    Raises:
      AprJaxError: As these do.
    """
    if os.path.isdir(path):
        return beside(path)
    return read(path).inputs if os.fspath(path).endswith(".safetensors") else from_json(path)


def summary(logits: np.ndarray | None, inputs: Inputs, config: Qwen2Config) -> dict[str, Any] | None:
    """Returns the loss in nats and bits beside that of the uniform distribution.

    None where logits are not there for all positions, or where no token has a next one.
    """
    if logits is None or logits.shape[1] != inputs.input_ids.shape[1] or not next_token_pairs(inputs).any():
        return None
    loss, uniform = loss_nats(logits, inputs), float(np.log(config.vocab_size))
    return {
        "loss_nats": loss,
        "loss_bits": loss / np.log(2),
        "uniform_nats": uniform,
        "uniform_bits": uniform / np.log(2),
        "tokens": inputs.tokens,
    }


def _type_of(array: np.ndarray) -> dtypes.DType:
    return dtypes.by_name({"float32": "f32", "float64": "f64", "int32": "i32"}[str(array.dtype)])
