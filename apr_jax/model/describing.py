"""What the `repr` of models, caches and tables of operations says: sizes, dtype, device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config


def sizes(config: Qwen2Config) -> str:
    """Returns "24 layers, hidden size 896, vocabulary 151936, 494,032,768 parameters"."""
    count = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    return (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{count:,} parameters"
    )


def placed(value: Any) -> str:
    """Returns an array's dtype and, where it has values and not only a shape, its devices: "float32 on cpu:0"."""
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return str(value.dtype)
    devices = sorted(value.devices(), key=lambda device: device.id)
    return f"{value.dtype} on {', '.join(f'{device.platform}:{device.id}' for device in devices)}"


def function_name(function: Callable[..., Any]) -> str:
    """Returns a function's name; of a `functools.partial` that of the function in it."""
    if isinstance(function, functools.partial):
        return f"partial({function_name(function.func)})"
    return getattr(function, "__qualname__", None) or type(function).__qualname__
