"""`load_model`: a Qwen2 model on a device, from anything that holds one."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, Sharding

from apr_jax.converters.checkpoint.checkpoint import SAFETENSORS_SOURCE_FILES_KEY, SOURCE_FILES_KEY, Checkpoint
from apr_jax.converters.checkpoint.dense import as_dense
from apr_jax.converters.checkpoint.naming import for_model
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.convert.apr_metadata import SOURCE_METADATA
from apr_jax.converters.errors import UsageError, counted, pip_install
from apr_jax.load.parameters import computes_float16, load_parameters
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.origin import Origin
from apr_jax.model.parameters import dtype_name
from apr_jax.model.qwen2 import OPS, Ops
from apr_jax.model.sharding import AXES, Layout

Placement: TypeAlias = str | jax.Device | Sharding | Mesh | None
"""Where a model goes; `load_model` says what each means."""


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: Any = "float32",
    device: Placement = None,
    ops: Ops = OPS,
    fused: bool = False,
    adapters: Sequence[str | os.PathLike[str]] = (),
    ignore_config: Iterable[str] = (),
    as_stored: bool = False,
) -> LanguageModel:
    """Loads a Qwen2 model from anything that `apr_jax.open_checkpoint` opens.

    Args:
      source: An `.apr` file, a HuggingFace folder, a `.safetensors` file or a sharded index; or an open checkpoint,
        which stays open. Published quantised forms (`checkpoint.packed_forms`) are decoded.
      dtype: float32, bfloat16, float16 or float64, as a name ("bf16" is one) or as a type (`jnp.bfloat16`): of
        parameters and of the computation.
      device: "cpu", "cuda", "cuda:1", a jax.Device, or None for JAX's default device. Or a mesh with the axes "data"
        and "model", `jax.make_mesh((2, 4), ("data", "model"))`, over which weights and computation are spread as
        `model.sharding` says; a mesh of one device is that device. Or a Sharding that fits every parameter, such as
        one that replicates. Each by its own: `jax.device_put` on the state of `model.module`.
      ops: The table of operations.
      fused: One parameter for q, k and v of a layer and one for gate and up, for speed; not on a mesh of several
        devices, where heads of q, k and v lie on the same device.
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
      UsageError: Unknown dtype, or float16 on a processor that has none; no such device, a sharding or a mesh that does
        not fit, or `fused` on a mesh.
    """
    name = dtype_name(dtype)
    mesh = device if isinstance(device, Mesh) and device.size > 1 else None
    target = find_device(device)
    if name == "float16" and target.platform == "cpu" and not computes_float16():
        raise UsageError(
            "this processor does not compute in float16: XLA needs one with F16C for it",
            code="float16",
            expected="float32, bfloat16 or float64",
            hint="float32 holds float16's weights exactly",
        )
    opened = contextlib.nullcontext(source) if isinstance(source, Checkpoint) else open_checkpoint(source)
    with opened as given:
        given.ignored |= frozenset(ignore_config)
        with as_dense(given, adapters) as checkpoint:
            config = checkpoint.model_config()
            layout = None if mesh is None else layout_on(config, mesh, fused)
            placement = layout or (device if isinstance(device, Sharding) else target)
            parameters = load_parameters(for_model(checkpoint, config), config, name, placement, fused, as_stored)
            origin = origin_of(checkpoint)
    return LanguageModel(config, parameters, target, ops, origin=origin, layout=layout)


def layout_on(config: Qwen2Config, mesh: Mesh, fused: bool) -> Layout:
    """Returns how a model lies on a mesh.

    Raises:
      UsageError: It is fused, or the mesh has other axes than a model.
    """
    if fused:
        raise UsageError(
            "fused parameters cannot be spread over a mesh",
            code="mesh-fused",
            hint="Leave --fused out: each device has its own heads of q, k and v",
        )
    return Layout.of(config, mesh)


def find_device(device: Placement) -> jax.Device:
    """Returns the device that `device` names ("cpu", "cuda:1"); None is JAX's default device.

    Of a Sharding or a Mesh it is the first one that belongs to this process.

    Raises:
      UsageError: This machine or this JAX has no such device.
    """
    if device is None:
        return jax.local_devices()[0]
    if isinstance(device, Sharding | Mesh):
        several: Iterable[Any] = device.addressable_devices if isinstance(device, Sharding) else device.local_devices
        return min(several, key=lambda each: each.id)
    if not isinstance(device, str):
        return device
    platform, _, number = device.partition(":")
    try:
        found = jax.local_devices(backend=platform)
    except RuntimeError as error:
        raise UsageError(
            f"no device '{device}'",
            code="device",
            hint=f"{pip_install('cuda')} installs JAX for CUDA" if platform == "cuda" else str(error),
        ) from None
    if not number:
        return found[0]
    if not number.isdecimal() or int(number) >= len(found):
        raise UsageError(
            f"no device '{device}'", code="device", expected=f"{platform}:0 to {platform}:{len(found) - 1}"
        )
    return found[int(number)]


def find_mesh(shape: Mapping[str, int], device: str) -> str | Mesh:
    """Returns a mesh of these axes ({"data": 2, "model": 4}) over the devices of a kind; of one device `device` itself.

    Args:
      shape: How many devices lie along each axis of `model.sharding.AXES`; an axis that is missing has 1.
      device: "cpu" or "cuda". Several processes have to use all devices that there are.

    Raises:
      UsageError: There are no such devices, or not as many; or `device` is a single one ("cuda:1").
    """
    sizes = [shape.get(axis, 1) for axis in AXES]
    wanted, first = math.prod(sizes), find_device(device)
    found = jax.devices(first.platform)
    if ":" in device and wanted > 1:
        raise UsageError(
            "a mesh is made of all devices of a kind",
            code="mesh-device",
            found=device,
            expected=device.partition(":")[0],
            hint="CUDA_VISIBLE_DEVICES=2,3 leaves only some to see",
        )
    if wanted > len(found) or (wanted != len(found) and jax.process_count() > 1):
        simulated = f"`XLA_FLAGS=--xla_force_host_platform_device_count={wanted}` simulates {wanted}"
        raise UsageError(
            f"the mesh has {wanted} devices",
            code="mesh-devices",
            found=f"{counted(len(found), f'{device} device')}",
            expected=f"at least {wanted}" if jax.process_count() == 1 else f"{len(found)}, those of all processes",
            hint=simulated
            if first.platform == "cpu" and jax.process_count() == 1
            else "data=D times model=M is the number of devices",
        )
    if wanted == 1:
        return device
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, devices=found[:wanted], axis_types=auto)


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
