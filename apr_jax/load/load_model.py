"""`load_model`: a Qwen2 model on a device, from anything that holds one."""

from __future__ import annotations

import contextlib
import os

import jax

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import UsageError
from apr_jax.load.parameters import load_parameters
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import DTYPES
from apr_jax.model.qwen2 import OPS, Ops


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: str = "float32",
    device: str | jax.Device | None = None,
    ops: Ops = OPS,
    fused: bool = False,
) -> LanguageModel:
    """Loads a Qwen2 model from anything that `apr_jax.converters.open_checkpoint` opens.

    Args:
      source: An `.apr` file, a HuggingFace folder, a `.safetensors` file or a sharded index; or an open checkpoint,
        which stays open.
      dtype: "float32", "bfloat16" or "float64": of the parameters and of the computation.
      device: "cpu", "cuda", a jax.Device, or None for JAX's default device.
      ops: The table of operations.
      fused: One parameter for q, k and v of a layer and one for gate and up, for speed.

    Returns:
      The model, its parameters on the device.

    Raises:
      RefusedError: Missing, unexpected or mis-shaped tensors, all named; or an unsupported configuration.
      UsageError: Unknown dtype, or no such device.
    """
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", code="dtype", found=dtype, expected=" or ".join(DTYPES))
    target = find_device(device)
    opened = contextlib.nullcontext(source) if isinstance(source, Checkpoint) else open_checkpoint(source)
    with opened as checkpoint:
        config = checkpoint.model_config()
        parameters = load_parameters(checkpoint, config, dtype, target, fused)
    return LanguageModel(config, parameters, target, ops)


def find_device(device: str | jax.Device | None) -> jax.Device:
    """Returns the device that `device` names; raises UsageError if this machine or this JAX has none."""
    if device is None:
        return jax.devices()[0]
    if not isinstance(device, str):
        return device
    try:
        return jax.devices(device)[0]
    except RuntimeError as error:
        raise UsageError(
            f"no device '{device}'",
            code="device",
            hint="For CUDA, install the extra: pip install 'apr-jax[cuda]'" if device == "cuda" else str(error),
        ) from None
