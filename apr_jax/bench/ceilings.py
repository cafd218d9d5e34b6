"""Measures what a machine can do without any model: operations a second of a product, bytes a second of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from apr_jax.bench.cases import Ceilings

_ROUNDS = 5
_LEAST_SECONDS = 0.05


def measure(device: jax.Device, dtype: str) -> Ceilings:
    """Returns the best of some rounds, each of back-to-back calls that are waited for at the end.

    Args:
      device: Where.
      dtype: Of the product; float32 at full precision, as the model computes.
    """
    small = device.platform == "cpu"
    side, count = (2048, 1 << 26) if small else (8192, 1 << 30)
    with jax.default_device(device), jax.enable_x64(dtype == "float64"):
        keys = jax.random.split(jax.random.key(0), 3)
        a, b = (jax.random.normal(key, (side, side), jnp.float32).astype(dtype) for key in keys[:2])
        product = jax.jit(lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST))
        flops = 2 * side**3 / _seconds(lambda: product(a, b))
        x = jax.random.normal(keys[2], (count // 4,), jnp.float32)
        total = jax.jit(jnp.sum)
        moved = x.nbytes / _seconds(lambda: total(x))
        moved = max(moved, 2 * x.nbytes / _seconds(_InPlace(x)))
    return Ceilings(flops, moved)


class _InPlace:
    """Adds 1 to an array that each call gives to the next: no call waits for new memory."""

    def __init__(self, x: jax.Array):
        self._x = x
        self._step = jax.jit(lambda x: x + 1, donate_argnums=0)

    def __call__(self) -> jax.Array:
        self._x = self._step(self._x)
        return self._x


def _seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    best, calls = float("inf"), 1
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        taken = (time.perf_counter() - begun) / calls
        calls = max(1, min(200, int(_LEAST_SECONDS / taken)))
        best = min(best, taken)
    return best
