"""The smaller CUDA kernels as JAX functions: attention of one new token, residual sum with norm, SwiGLU, matvec.

Each stands for several kernels that XLA leaves apart, or for one of XLA's that reads memory slowly.
"""

from __future__ import annotations

import jax
from jax import Array

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.cuda.custom_call import SPLIT_HALVES, head_names, launch, source
from apr_jax.model.qwen2 import LayerCache, Step

_WARPS = 8


def attend(
    config: Qwen2Config, qkv: Array, step: Step, cache: LayerCache, rotation: str = SPLIT_HALVES
) -> tuple[Array, LayerCache]:
    """Rotary positions, cache update and attention of one new token a row: 14 us of XLA's kernels a layer in one.

    Args:
      config: A configuration that `launch.head_supported` accepts.
      qkv: q, k and v with their biases, bfloat16 [B, 1, N * H + 2 K * H].
      step: Of one token a row, its slot an array.
      cache: bfloat16; changed in place.
      rotation: RoPE, an expression like `SPLIT_HALVES`.

    Returns:
      The attended values, bfloat16 [B, 1, N * H], and the cache with the token in it.
    """
    batch, slots = cache.keys.shape[:2]
    names = {"WARPS": _WARPS, "SLOTS": slots, **head_names(config, rotation)}
    arguments = [qkv, step.cos, step.sin, step.q_positions, step.kv_positions, step.slot, *cache]
    shapes = [(batch, 1, config.num_heads * config.head_dim), cache.keys.shape, cache.values.shape]
    values, keys, cached_values = launch(
        "attention",
        source(("common.cu", "head.cu", "attention.cu"), names),
        arguments,
        [jax.ShapeDtypeStruct(shape, qkv.dtype) for shape in shapes],
        grid=(config.num_heads, batch),
        threads=32 * _WARPS,
        aliases={6: 1, 7: 2},
    )
    return values, LayerCache(keys, cached_values)


def add_norm(x: Array, update: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """x + update and its RMSNorm in one pass over memory, rounded where the separate operations round.

    Args:
      x: Residual stream, bfloat16 [B, T, D], D a multiple of 8.
      update: The same.
      weight: [D].
      eps: Of the norm.

    Returns:
      The sum and the normed sum, [B, T, D] each.
    """
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    split = next(warps for warps in (1, 2, 4, _WARPS) if 1024 * warps >= width or warps == _WARPS)  # of a row
    names = {"WARPS": _WARPS, "D": width, "ROWS": rows, "EPS": f"{eps!r}f", "SPLIT": split}
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = launch(
        "add_norm",
        source(("common.cu", "add_norm.cu"), names),
        [x, update, weight],
        [shape, shape],
        grid=(-(-rows * split // _WARPS), 1),
        threads=32 * _WARPS,
    )
    return total, normed


def swiglu(gate_up: Array) -> Array:
    """silu(gate) * up, rounded where the separate operations round; XLA's kernel reaches 3.8 TB/s of 4.2.

    Args:
      gate_up: bfloat16 [B, T, 2 F], F a multiple of 8, B * T at most 262,140.

    Returns:
      [B, T, F].
    """
    rows, width = gate_up.shape[0] * gate_up.shape[1], gate_up.shape[2] // 2
    names = {"WARPS": _WARPS, "F": width, "ROWS": rows}
    shape = jax.ShapeDtypeStruct((*gate_up.shape[:2], width), gate_up.dtype)
    grid = (-(-width // (8 * 32 * _WARPS)), -(-rows // 4))
    text = source(("common.cu", "swiglu.cu"), names)
    (gated,) = launch("swiglu", text, [gate_up], [shape], grid, threads=32 * _WARPS)
    return gated


def matvec(weight: Array, x: Array) -> Array:
    """One token's x [1, 1, in] times weight [out, in], bfloat16; of long rows XLA's kernel reads 2.4 TB/s of 4.2.

    Args:
      weight: in is a multiple of 8.
      x: The vector.

    Returns:
      [1, 1, out].
    """
    rows, width = weight.shape
    names = {"WARPS": _WARPS, "ROWS": rows, "WIDTH": width}
    shape = jax.ShapeDtypeStruct((1, 1, rows), x.dtype)
    text = source(("common.cu", "matvec.cu"), names)
    (product,) = launch("matvec", text, [weight, x], [shape], (-(-rows // _WARPS), 1), threads=32 * _WARPS)
    return product
