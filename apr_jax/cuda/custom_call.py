"""Puts a CUDA C++ kernel into a JAX program, as XLA's custom call for PTX.

`jax.ffi.ffi_call` writes the call, and it goes into CUDA graphs like any other kernel. The call's target is XLA's own
and not documented: seen working with jaxlib 0.11.2; 0.10.2 has it too.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.cuda import nvrtc

TARGET = "__gpu$xla.gpu.ptx"

SPLIT_HALVES = (
    "x[d] * cos[d % (HEAD_DIM / 2)] + (d < HEAD_DIM / 2 ? -x[d + HEAD_DIM / 2] : x[d - HEAD_DIM / 2])"
    " * sin[d % (HEAD_DIM / 2)]"
)
"""RoPE in CUDA C++: dimension d of the head x; cos and sin of the HEAD_DIM / 2 angles."""


def source(files: Sequence[str], names: Mapping[str, Any]) -> str:
    """Returns the `files` of this folder, one after the other, behind a definition of each of the `names`."""
    folder = importlib.resources.files("apr_jax.cuda")
    definitions = [f"#define {name} {value}\n" for name, value in names.items()]
    return "".join([*definitions, *(folder.joinpath(file).read_text(encoding="utf-8") for file in files)])


def head_names(config: Qwen2Config, rotation: str) -> dict[str, Any]:
    """What `head.cu` asks for."""
    return {
        "HEADS": config.num_heads,
        "KV_HEADS": config.num_kv_heads,
        "HEAD_DIM": config.head_dim,
        "ROTATE": rotation,
    }


def head_supported(config: Qwen2Config) -> bool:
    """Says whether `head.cu` takes heads of this size: 8, 16, 32, 64, 128 or 256."""
    eights = config.head_dim // 8
    return config.head_dim % 8 == 0 and eights & (eights - 1) == 0 and eights <= 32


def launch(
    name: str,
    text: str,
    arguments: Sequence[Any],
    results: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int = 0,
    aliases: Mapping[int, int] | None = None,
) -> Sequence[Array]:
    """Calls kernel `name` of the CUDA C++ `text`, with a pointer for every argument and then for every result.

    Args:
      name: Of the `extern "C"` function.
      text: CUDA C++.
      arguments: Arrays; the kernel sees them in row-major order.
      results: Shapes and dtypes.
      grid: Blocks in x and y.
      threads: Of a block.
      shared_bytes: Dynamic shared memory of a block.
      aliases: Argument -> result that is the same array, changed in place.

    Raises:
      nvrtc.CompileError: NVRTC is not installed or does not take the text.
    """
    call = jax.ffi.ffi_call(TARGET, list(results), input_output_aliases=dict(aliases or {}), custom_call_api_version=4)
    integers = {"grid_x": grid[0], "grid_y": grid[1], "grid_z": 1, "block_x": threads, "block_y": 1, "block_z": 1}
    integers["shared_mem_bytes"] = shared_bytes
    ptx = nvrtc.ptx(text)
    return call(
        *arguments, name=name, kernel_type="ptx", kernel_data=ptx, **{k: np.int32(v) for k, v in integers.items()}
    )
