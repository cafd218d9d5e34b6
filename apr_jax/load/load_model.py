"""`load_model`: a Qwen2 model on a device, from anything that holds one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from apr_jax.converters.checkpoint.checkpoint import SAFETENSORS_SOURCE_FILES_KEY, SOURCE_FILES_KEY, Checkpoint
from apr_jax.converters.checkpoint.dense import as_dense
from apr_jax.converters.checkpoint.naming import for_model
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.apr_metadata import SOURCE_METADATA
from apr_jax.converters.errors import UsageError
from apr_jax.load.parameters import load_parameters
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.origin import Origin
from apr_jax.model.parameters import dtype_name
from apr_jax.model.qwen2 import OPS, Ops


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: Any = "float32",
    device: str | jax.Device | Sharding | None = None,
    ops: Ops = OPS,
    fused: bool = False,
    as_stored: bool = False,
    adapters: Sequence[str | os.PathLike[str]] = (),
    ignore_config: Iterable[str] = (),
) -> LanguageModel:
    """Loads a Qwen2 model from anything that `apr_jax.open_checkpoint` opens.

    Args:
      source: An `.apr` file, a HuggingFace folder, a `.safetensors` file or a sharded index; or an open checkpoint,
        which stays open. Published quantised forms (`checkpoint.packed_forms`) are decoded.
      dtype: float32, bfloat16, float16 or float64, as a name ("bf16" is one) or as a type (`jnp.bfloat16`): of
        parameters and of the computation.
      device: "cpu", "cuda", "cuda:1", a jax.Device, or None for JAX's default device; or a Sharding that fits every
        parameter, such as one that replicates. Each by its own: `jax.device_put` on the state of `model.module`.
      ops: The table of operations.
      fused: One parameter for q, k and v of a layer and one for gate and up, for speed.
      as_stored: On a CPU and in float32, matrices that the checkpoint has in bfloat16, float16, AprQ8 or Q4_K stay
        what they are: half the memory, or less. They are widened where they are multiplied, which is exact, by kernels
        (`apr_jax.cpu`) in the table of operations that `fastest_ops.ops_for` returns. For inference: with the plain
        table XLA widens 16 bits anew at each call, and a gradient has 16 bits as well; quantised rows
        (`packed_rows`) it cannot read.
      adapters: Folders of PEFT adapters (LoRA, DoRA) to add to the weights, one after the other.
      ignore_config: Keys of the configuration that change nothing, to go on as if they were not there where it is
        refused for them: ["some_key", "rope_scaling.some_key"].

    Returns:
      The model, its parameters on the device.

    Raises:
      RefusedError: Missing, unexpected or mis-shaped tensors, all named; or an unsupported configuration.
      UsageError: Unknown dtype, no such device, or a sharding that does not fit.
    """
    name = dtype_name(dtype)
    target = find_device(device)
    placement = device if isinstance(device, Sharding) else target
    opened = contextlib.nullcontext(source) if isinstance(source, Checkpoint) else open_checkpoint(source)
    with opened as given:
        given.ignored |= frozenset(ignore_config)
        with as_dense(given, adapters) as checkpoint:
            config = checkpoint.model_config()
            parameters = load_parameters(for_model(checkpoint, config), config, name, placement, fused, as_stored)
            origin = origin_of(checkpoint)
    return LanguageModel(config, parameters, target, ops, origin=origin)


def find_device(device: str | jax.Device | Sharding | None) -> jax.Device:
    """Returns the device that `device` names ("cpu", "cuda:1"), of a Sharding the first; None is JAX's default device.

    Raises:
      UsageError: This machine or this JAX has no such device.
    """
    if device is None:
        return jax.devices()[0]
    if isinstance(device, Sharding):
        devices: Iterable[Any] = device.device_set
        return min(devices, key=lambda each: each.id)
    if not isinstance(device, str):
        return device
    platform, _, number = device.partition(":")
    try:
        found = jax.devices(platform)
    except RuntimeError as error:
        raise UsageError(
            f"no device '{device}'",
            code="device",
            hint="For CUDA, install the extra: pip install 'apr-jax[cuda]'" if platform == "cuda" else str(error),
        ) from None
    if not number:
        return found[0]
    if not number.isdecimal() or int(number) >= len(found):
        raise UsageError(
            f"no device '{device}'", code="device", expected=f"{platform}:0 to {platform}:{len(found) - 1}"
        )
    return found[int(number)]


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Returns what a checkpoint holds beside its tensors, and nothing that reads it later: the model may outlive it."""
    # Those of a GGUF file are made from its header: a tokenizer takes as long as a tensor, and most never ask for it.
    files = checkpoint.files if checkpoint.kind == "gguf" else dict(checkpoint.files)
    if checkpoint.kind != "apr":
        strings = {key: text for key, text in checkpoint.metadata.items() if key != SAFETENSORS_SOURCE_FILES_KEY}
        return Origin(checkpoint.path, "safetensors", files, strings if checkpoint.has_metadata else None)
    if SOURCE_FILES_KEY not in checkpoint.metadata:
        return Origin(checkpoint.path, "apr", files, checkpoint.metadata)
    # One of ours: what it was made from, the metadata besides can be made again.
    return Origin(checkpoint.path, "safetensors", files, checkpoint.metadata.get(SOURCE_METADATA))
