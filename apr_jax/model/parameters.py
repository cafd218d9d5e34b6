"""What the weights of a model are called: their dtypes, their nesting, and the tensors that each one is made of.

A parameter stands under the name that its tensor has in HuggingFace's checkpoints, split at the dots. In a fused model
one parameter holds the rows of several tensors, one behind the other: fewer and larger products, the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16", "float64")
_SHORT = {
    "f32": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "f64": "float64",
    "fp64": "float64",
}

Parameters = dict[Any, Any]
"""Arrays in nested dicts, keyed as the attributes of `Qwen2ForCausalLM`: HuggingFace's names, split at the dots."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The modules of a layer that a fused model holds as one, in the order of their rows."""


def dtype_name(dtype: Any) -> str:
    """Returns which of `DTYPES` is meant by `jnp.bfloat16`, a NumPy dtype, "bfloat16" or "bf16".

    Raises:
      UsageError: None of them.
    """
    name = _SHORT.get(dtype, dtype) if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise UsageError("unknown dtype", code="dtype", found=name, expected=" or ".join(DTYPES))
    return name


def parameter_sources(config: Qwen2Config, fused: bool) -> dict[str, tuple[str, ...]]:
    """Returns for each parameter, by its dotted path, the tensors whose rows it holds, one behind the other."""
    module_of = {part: module for module, parts in FUSED.items() for part in parts} if fused else {}
    sources = {}
    for name in config.tensor_shapes():
        *parents, part, leaf = name.split(".")
        module = module_of.get(part, part)
        names = (".".join((*parents, each, leaf)) for each in FUSED.get(module, (part,)))
        sources[".".join((*parents, module, leaf))] = tuple(names)
    return sources


def nested(arrays: Mapping[str, jax.Array]) -> Parameters:
    """Returns arrays by dotted path as `Parameters`; the numbers of layers become integers."""
    parameters: Parameters = {}
    for path, array in arrays.items():
        *parents, leaf = (int(part) if part.isdigit() else part for part in path.split("."))
        node = parameters
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return parameters


def named(parameters: Parameters, prefix: str = "") -> dict[str, jax.Array]:
    """Returns the parameters by dotted path: the inverse of `nested`."""
    flat: dict[str, jax.Array] = {}
    for key, value in parameters.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        flat |= named(value, path) if isinstance(value, dict) else {path: value}
    return flat
