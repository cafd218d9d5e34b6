"""Reads a checkpoint's tensors into arrays on a device: strict, every tensor accounted for, in little more memory
than the arrays need.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.part import part_of
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD, Qwen2Config, check_tensors
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.checkpoint.tied_heads import same_values
from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.converters.formats import casts
from apr_jax.converters.storage.workers import Workers
from apr_jax.load import packed_rows, upload
from apr_jax.model.parameters import Parameters, nested, parameter_sources
from apr_jax.model.sharding import Layout

_CHUNK_BYTES = 8 << 20
_THREADS = min(4, os.cpu_count() or 1)
# XLA:CPU takes over a host array without copying it if it is aligned so.
_ALIGNMENT = 64


def load_parameters(
    checkpoint: Checkpoint,
    config: Qwen2Config,
    dtype: str,
    device: jax.Device | Sharding | Layout,
    fused: bool = False,
    as_stored: bool = False,
) -> Parameters:
    """Reads every tensor of a checkpoint, casts it to `dtype` and puts it on `device`.

    Args:
      checkpoint: Holds exactly the tensors of `config`; a head beside a tied configuration must equal the embedding.
      config: The model's configuration.
      dtype: "float32", "bfloat16", "float16" or "float64".
      device: Where the arrays go: one device, a sharding that fits all of them, or a layout on a mesh, of which this
        process reads what its own devices hold, each part once.
      as_stored: Whether, on a CPU, matrices of bfloat16, float16, AprQ8 and Q4_K (`packed_rows`) stay what they are
        where `dtype` is float32.
      fused: Whether q, k and v of a layer become one parameter `qkv_proj`, and gate and up one, `gate_up_proj`; not on
        a mesh.

    Returns:
      The nested parameters. Peak host memory is that of the parameters, the largest one and some chunks; for another
      device than the CPU what `upload.upload` says.

    Raises:
      RefusedError: Tensors that are missing, unexpected or mis-shaped, all named; a tied head that is another matrix;
        a dtype that cannot be decoded.
      UsageError: The sharding does not fit a parameter.
    """
    check_tensors(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}, checkpoint.path)
    strange = {
        name: tensor.dtype.name
        for name, tensor in checkpoint.tensors.items()
        if not tensor.dtype.is_float and not tensor.dtype.is_block
    }
    if strange:
        raise RefusedError(
            "parameters are not floating point",
            code="parameter-dtype",
            file=checkpoint.path,
            found=strange,
            hint="If they are packed, config.json needs the quantization_config that says how; or save them dense",
        )
    if config.tie_word_embeddings and HEAD in checkpoint.tensors:
        _check_tied_head(checkpoint)
    sources = {
        path: [checkpoint.tensors[name] for name in names] for path, names in parameter_sources(config, fused).items()
    }
    on_cpu = not isinstance(device, Layout) and (isinstance(device, Sharding) or device.platform == "cpu")
    narrow = as_stored and on_cpu and dtype == "float32"
    x64: contextlib.AbstractContextManager[Any] = jax.enable_x64(dtype == "float64")
    with x64:
        if isinstance(device, Layout):
            return nested(_spread({path: tensor for path, (tensor,) in sources.items()}, dtype, device))
        return nested(_load(sources, dtype, device, narrow))


def _spread(tensors: Mapping[str, Tensor], dtype: str, layout: Layout) -> dict[str, jax.Array]:
    """Each part is read for one device, the first of this process that holds it; the others get it from there."""
    shardings = {name: layout.sharding(name) for name in tensors}
    parts: dict[jax.Device, dict[str, Sequence[Tensor]]] = {}
    held: dict[str, list[tuple[jax.Device, jax.Device]]] = {name: [] for name in tensors}
    for name, tensor in tensors.items():
        readers: dict[tuple[Any, ...], jax.Device] = {}
        for device, slices in shardings[name].addressable_devices_indices_map(tensor.shape).items():
            assert slices is not None
            bounds = tuple(part.indices(size) for part, size in zip(slices, tensor.shape, strict=True))
            reader = readers.setdefault(bounds, device)
            held[name].append((device, reader))
            if device is reader:
                parts.setdefault(device, {})[name] = [part_of(tensor, slices)]
    read = {device: _load(sources, dtype, device, narrow=False) for device, sources in parts.items()}

    def of(name: str) -> jax.Array:
        arrays = [read[reader][name] for _, reader in held[name]]
        here = [array if d is r else jax.device_put(array, d) for array, (d, r) in zip(arrays, held[name], strict=True)]
        return jax.make_array_from_single_device_arrays(tensors[name].shape, shardings[name], here)

    return {name: of(name) for name in tensors}


@functools.cache
def computes_float16() -> bool:
    """Whether XLA computes with float16 on this machine's CPU: on x86 it needs F16C and has nothing in its place."""
    try:
        with jax.default_device(jax.devices("cpu")[0]), jax.ensure_compile_time_eval():
            return bool(jax.jit(lambda x: x.astype(jax.numpy.float16))(jax.numpy.ones(3))[0] == 1)
    except jax.errors.JaxRuntimeError:
        return False


def _stored(tensors: Sequence[Tensor]) -> str | None:
    """Returns the 16-bit dtype in which all these matrices are stored and can be used; None where there is none."""
    found = {str(tensor.dtype.numpy) for tensor in tensors if len(tensor.shape) == 2 and not tensor.dtype.is_block}
    if found == {"bfloat16"} or (found == {"float16"} and computes_float16()):
        return found.pop()
    return None


def _load(
    sources: Mapping[str, Sequence[Tensor]], dtype: str, device: jax.Device | Sharding, narrow: bool
) -> dict[str, jax.Array]:
    def read(path: str) -> np.ndarray:
        if narrow and all(map(packed_rows.can_pack, sources[path])):
            return packed_rows.pack(sources[path], _aligned_empty)
        return read_as(sources[path], (_stored(sources[path]) if narrow else None) or dtype)

    if isinstance(device, Sharding) or device.platform == "cpu":
        # The system clears the pages of a new array when they are first written to: that is what several threads share.
        with Workers(_THREADS) as workers:
            return {path: _put(array, device) for path, array in zip(sources, workers.map(read, sources), strict=True)}
    there = {path: tensors for path, tensors in sources.items() if upload.can_upload(tensors, dtype)}
    return {path: _put(read(path), device) for path in sources if path not in there} | upload.upload(
        there, dtype, device
    )


def read_as(tensors: Sequence[Tensor], dtype: str) -> np.ndarray:
    """Reads tensors as `dtype` into one array, rows behind rows, by chunks; a narrowing cast rounds to nearest even."""
    target = jnp.dtype(dtype)
    out = _aligned_empty((sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]), target)
    start = 0
    for tensor in tensors:
        _read_into(out[start : start + tensor.shape[0]], tensor)
        start += tensor.shape[0]
    return out


def _read_into(out: np.ndarray, tensor: Tensor) -> None:
    if not tensor.dtype.is_block and tensor.dtype.numpy == out.dtype:
        tensor.readinto(out.reshape(-1).view("u1").data)
        return
    if tensor.dtype.is_block and out.dtype == np.float32:
        tensor.decode_into(out)
        return
    # Quantised tensors are read as float32: their values need more room than their bytes.
    nbytes = max(tensor.nbytes, 4 * out.size)
    rows = max(1, _CHUNK_BYTES // max(1, nbytes // max(1, tensor.shape[0]))) if tensor.shape else 1
    for start in range(0, tensor.shape[0], rows):
        out[start : start + rows] = _rounded(tensor.read((slice(start, start + rows),)), out.dtype)


def _rounded(values: np.ndarray, target: np.dtype) -> np.ndarray:
    if values.dtype != np.float64 or target != jnp.bfloat16:
        return values
    # ml_dtypes goes from f64 to bf16 by way of f32, which rounds twice.
    data, _ = casts.cast(values.tobytes(), "f64", "bf16")
    return np.frombuffer(data, target).reshape(values.shape)


def _put(array: np.ndarray, device: jax.Device | Sharding) -> jax.Array:
    try:
        # Nobody else holds `array`, so that the CPU backend may keep it as it is.
        return jax.device_put(array, device, may_alias=True)
    except ValueError as error:
        raise UsageError(
            f"the sharding does not fit a parameter of shape {list(array.shape)}: {error}",
            code="sharding",
            hint="Load the model on one device and put the state of `model.module` where it belongs",
        ) from None


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """A tied checkpoint may carry its head as a copy of the embedding, in any dtype that holds the same values."""
    if not same_values(checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]):
        raise RefusedError(
            "the configuration ties the head to the embedding, but the checkpoint holds another head",
            code="tied-head-differs",
            file=checkpoint.path,
            tensor=HEAD,
            hint="Set tie_word_embeddings to false in config.json if you mean to use this head.",
        )
