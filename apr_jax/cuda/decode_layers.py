"""One kernel that takes a token through all decoder layers (`decode.cu`): batch 1, bfloat16, compute capability 9.0.

With XLA's own kernels a token of the 0.5B shape takes 15 launches a layer, and 1.45 us of every launch pass before its
weights stream; here the weights of the next products are on their way while the blocks exchange activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.cuda.custom_call import SPLIT_HALVES, head_names, head_supported, launch, source
from apr_jax.model.qwen2 import DecoderLayer, LayerCache, Step

_WARPS = 14  # that compute; with one that streams, 128 registers are left for a thread
_SHARED_BYTES = 227 * 1024
_PAD_BYTES = 64
_MOST_REGISTERS = 80  # of a thread, for its part of the weights of one product
_WEIGHTS = ("input_norm", "qkv", "qkv_bias", "o", "post_norm", "gate_up", "down")
_CACHES = ("keys", "values")


def supports(config: Qwen2Config, multiprocessors: int) -> bool:
    """Says whether the kernel takes models of this shape on a device with this many multiprocessors.

    It keeps a block's part of a product in registers: the 0.5B shape fits on 132 multiprocessors, larger ones do not.
    """
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    blocks = grid(config, multiprocessors)
    stage_bytes, stages, _ = _shared_memory(config, multiprocessors)
    return (
        head_supported(config)
        and all(width % 8 == 0 for width in (hidden, ffn, heads))
        and 3 * config.head_dim <= 32 * _WARPS
        and config.num_heads <= blocks
        and _ceil_div(hidden, blocks) <= 8
        and _ceil_div(_qkv_width(config), blocks) <= 16
        and 8 * _steps(hidden) * _ceil_div(ffn, 8 * blocks) <= _MOST_REGISTERS
        and 8 * _steps(max(hidden, heads)) <= _MOST_REGISTERS
        and 4 * _steps(ffn) <= _MOST_REGISTERS
        and stages > _ceil_div(hidden, blocks) // (stage_bytes // (2 * ffn + _PAD_BYTES))  # a block's rows of `down`
    )


def grid(config: Qwen2Config, multiprocessors: int) -> int:
    """Blocks of the kernel: one a multiprocessor, as long as each has rows of every matrix."""
    return min(multiprocessors, config.hidden_size, config.intermediate_size, _qkv_width(config))


def decode(
    x: Array,
    layers: Sequence[DecoderLayer],
    step: Step,
    caches: Sequence[LayerCache],
    multiprocessors: int,
    rotation: str = SPLIT_HALVES,
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Takes one token through all layers, whose weights are fused and bfloat16.

    The residual stream stays in float32 from layer to layer. What is rounded to bfloat16 are the activations that meet
    a weight, and the keys and values that are cached.

    Args:
      x: Embedded token, bfloat16 [1, 1, D].
      layers: All layers, of a configuration that `supports` accepts.
      step: Of this token, its slot an array.
      caches: One a layer; changed in place.
      multiprocessors: Of the device. Nothing else may run on it: the blocks wait for one another.
      rotation: RoPE, an expression like `SPLIT_HALVES`.

    Returns:
      The residual stream [1, 1, D] behind the last layer, and the caches with the token in them.
    """
    config = layers[0].self_attn.config
    shape_of = jax.ShapeDtypeStruct
    board = jnp.zeros((_board_words(config, multiprocessors), 2), jnp.uint32)
    arguments = [x, step.cos, step.sin, step.q_positions, step.slot, step.kv_positions, board]
    results = [shape_of(x.shape, x.dtype), shape_of(board.shape, board.dtype)]
    aliases = {len(arguments) - 1: 1}
    for layer, cache in zip(layers, caches, strict=True):
        arguments += _weights(layer)
        for array in cache:
            aliases[len(arguments)] = len(results)
            arguments.append(array)
            results.append(shape_of(array.shape, array.dtype))
    text = source(("common.cu", "head.cu", "decode.cu"), _names(config, multiprocessors, rotation))
    _, _, shared_bytes = _shared_memory(config, multiprocessors)
    blocks, threads = grid(config, multiprocessors), 32 * (_WARPS + 1)
    y, _, *written = launch("decode", text, arguments, results, (blocks, 1), threads, shared_bytes, aliases)
    return y, tuple(LayerCache(*pair) for pair in zip(written[::2], written[1::2], strict=True))


def _weights(layer: DecoderLayer) -> list[Array]:
    """The weights that the kernel takes, in the order of `_WEIGHTS`."""
    attention, mlp = layer.self_attn, layer.mlp
    parameters = (
        layer.input_layernorm.weight,
        attention.qkv_proj.weight,
        attention.qkv_proj.bias,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_up_proj.weight,
        mlp.down_proj.weight,
    )
    return [parameter[...] for parameter in parameters]


def _names(config: Qwen2Config, multiprocessors: int, rotation: str) -> dict[str, Any]:
    """What `decode.cu` and the texts in front of it ask for."""
    stage_bytes, stages, shared_bytes = _shared_memory(config, multiprocessors)
    layers = range(config.num_layers)
    return {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "LAYERS": config.num_layers,
        "EPS": f"{config.rms_norm_eps!r}f",
        "GRID": grid(config, multiprocessors),
        "WARPS": _WARPS,
        "STAGES": stages,
        "STAGE_BYTES": stage_bytes,
        "SHARED_BYTES": shared_bytes,
        "PAD_BYTES": _PAD_BYTES,
        **head_names(config, rotation),
        "PARAMETERS": ", ".join(_parameters(layers)),
        "LAYER_TABLE": " ".join(
            f"s.layers[{layer}] = Layer{{{', '.join(f'{name}_{layer}' for name in _WEIGHTS + _CACHES)}}};"
            for layer in layers
        ),
    }


def _parameters(layers: range) -> list[str]:
    """One pointer an argument, then one a result; of a cache, argument and result are the same array."""
    arguments = ["const bf16* x", "const float* cos", "const float* sin", "const int* position", "const int* slot"]
    arguments += ["const int* positions", "u64* board_argument"]
    for layer in layers:
        arguments += [f"const bf16* {name}_{layer}" for name in _WEIGHTS]
        arguments += [f"bf16* {name}_argument_{layer}" for name in _CACHES]
    return [*arguments, "bf16* y", "u64* board", *(f"bf16* {name}_{layer}" for layer in layers for name in _CACHES)]


def _shared_memory(config: Qwen2Config, multiprocessors: int) -> tuple[int, int, int]:
    """Returns the bytes of a stage of the ring, the number of stages, and the bytes in all."""
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    # Sixteen rows of the narrow matrices, and of the down projection at least one.
    stage = max(16 * (2 * max(hidden, heads) + _PAD_BYTES), 2 * ffn + _PAD_BYTES)
    blocks = grid(config, multiprocessors)
    slices = _WARPS * 16 * max(_steps(ffn), _steps(hidden), _steps(heads), _ceil_div(ffn, 8 * blocks))
    floats = slices + _WARPS + 2 * config.head_dim + _ceil_div(hidden, blocks)
    floats += 5 * config.head_dim + (_WARPS + 1) * (config.head_dim + 2)
    rest = 4 * floats + 72 * config.num_layers + 512  # 512: barriers and alignment
    stages = min(16, (_SHARED_BYTES - rest) // stage)
    return stage, stages, stages * stage + rest


def _board_words(config: Qwen2Config, multiprocessors: int) -> int:
    parts = (grid(config, multiprocessors) * (config.head_dim + 2) + 1) // 2 * 2
    heads = config.num_heads * config.head_dim
    return _qkv_width(config) + parts + heads + 2 * config.hidden_size + config.intermediate_size // 2


def _qkv_width(config: Qwen2Config) -> int:
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def _steps(width: int) -> int:
    """How many times 32 columns of a matrix of this width a warp multiplies."""
    return _ceil_div(_ceil_div(width, 32), _WARPS)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
