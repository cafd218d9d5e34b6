"""One kernel that takes a token of each of one to eight rows through all decoder layers: bfloat16, capability 9.0.

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
_MOST_WEIGHTS = 80  # registers of a thread, for its part of the weights of one product
_MOST_REGISTERS = 112  # the same of several rows, whose activations and sums stand there as well
_MOST_ROWS = 8  # columns of the tensor cores' tile
_WEIGHTS = ("input_norm", "qkv", "qkv_bias", "o", "post_norm", "gate_up", "down")
_CACHES = ("keys", "values")


def supports(config: Qwen2Config, multiprocessors: int, rows: int) -> bool:
    """Says whether the kernel takes so many rows of models of this shape on a device with so many multiprocessors.

    It keeps a block's part of a product in registers: the 0.5B shape fits on 132 multiprocessors, larger ones do not.
    """
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    blocks = grid(config, multiprocessors)
    stage_bytes, stages, _ = _shared_memory(config, multiprocessors, rows)
    return (
        rows <= _MOST_ROWS
        and head_supported(config)
        and all(width % 8 == 0 for width in (hidden, ffn, heads))
        and 3 * config.head_dim <= 32 * _WARPS
        and config.num_heads <= blocks
        and _ceil_div(hidden, blocks) <= 8
        and _ceil_div(_qkv_width(config), blocks) <= 16
        and _fits_registers(config, blocks, rows)
        and stages > _ceil_div(hidden, blocks) // (stage_bytes // (2 * ffn + _PAD_BYTES))  # a block's rows of `down`
    )


def _fits_registers(config: Qwen2Config, blocks: int, rows: int) -> bool:
    hidden, ffn, heads = map(_steps, (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim))
    tiles = _ceil_div(config.intermediate_size, 8 * blocks)
    if rows == 1:
        return max(8 * hidden * tiles, 8 * max(hidden, heads), 4 * ffn) <= _MOST_WEIGHTS
    gate_up, qkv, others = hidden * (2 * tiles + 1) + tiles, 3 * hidden + 4, 2 * (max(ffn, heads) + 1)
    return 4 * max(gate_up, qkv, others) <= _MOST_REGISTERS


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
    """Takes one token of each row through all layers, whose weights are fused and bfloat16.

    The residual stream stays in float32 from layer to layer. What is rounded to bfloat16 are the activations that meet
    a weight, and the keys and values that are cached.

    Args:
      x: Embedded tokens, bfloat16 [B, 1, D].
      layers: All layers, of a configuration that `supports` accepts with B rows.
      step: Of these tokens, its slot an array.
      caches: One a layer; changed in place.
      multiprocessors: Of the device. Nothing else may run on it: the blocks wait for one another.
      rotation: RoPE, an expression like `SPLIT_HALVES`.

    Returns:
      The residual stream [B, 1, D] behind the last layer, and the caches with the tokens in them.
    """
    config = layers[0].self_attn.config
    shape_of = jax.ShapeDtypeStruct
    rows, slots = step.kv_positions.shape
    board = jnp.zeros(_board_words(config, multiprocessors, rows), jnp.uint32)
    arguments = [x, step.cos, step.sin, step.q_positions, step.slot, step.kv_positions]
    arguments += [board] if rows == 1 else [jnp.int32(slots), board]
    results = [shape_of(x.shape, x.dtype), shape_of(board.shape, board.dtype)]
    aliases = {len(arguments) - 1: 1}
    for layer, cache in zip(layers, caches, strict=True):
        arguments += _weights(layer)
        for array in cache:
            aliases[len(arguments)] = len(results)
            arguments.append(array)
            results.append(shape_of(array.shape, array.dtype))
    name = "decode" if rows == 1 else "decode_rows"
    text = source(("common.cu", "head.cu", "ring.cu", f"{name}.cu"), _names(config, multiprocessors, rows, rotation))
    _, _, shared_bytes = _shared_memory(config, multiprocessors, rows)
    blocks, threads = grid(config, multiprocessors), 32 * (_WARPS + 1)
    y, _, *written = launch(name, text, arguments, results, (blocks, 1), threads, shared_bytes, aliases)
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


def _names(config: Qwen2Config, multiprocessors: int, rows: int, rotation: str) -> dict[str, Any]:
    """What the kernels and the texts in front of them ask for."""
    stage_bytes, stages, shared_bytes = _shared_memory(config, multiprocessors, rows)
    layers = range(config.num_layers)
    return {
        "ROWS": rows,
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
        "PARAMETERS": ", ".join(_parameters(layers, rows)),
        "LAYER_TABLE": " ".join(
            f"s.layers[{layer}] = Layer{{{', '.join(f'{name}_{layer}' for name in _WEIGHTS + _CACHES)}}};"
            for layer in layers
        ),
    }


def _parameters(layers: range, rows: int) -> list[str]:
    """One pointer an argument, then one a result; of a cache, argument and result are the same array."""
    arguments = ["const bf16* x", "const float* cos", "const float* sin", "const int* position", "const int* slot"]
    word = "u64" if rows == 1 else "u32"
    arguments += ["const int* positions", *(["const int* slots"] if rows > 1 else []), f"{word}* board_argument"]
    for layer in layers:
        arguments += [f"const bf16* {name}_{layer}" for name in _WEIGHTS]
        arguments += [f"bf16* {name}_argument_{layer}" for name in _CACHES]
    caches = (f"bf16* {name}_{layer}" for layer in layers for name in _CACHES)
    return [*arguments, "bf16* y", f"{word}* board", *caches]


def _shared_memory(config: Qwen2Config, multiprocessors: int, rows: int) -> tuple[int, int, int]:
    """Returns the bytes of a stage of the ring, the number of stages, and the bytes in all."""
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    # Sixteen rows of the narrow matrices, and of the down projection at least one.
    stage = max(16 * (2 * max(hidden, heads) + _PAD_BYTES), 2 * ffn + _PAD_BYTES)
    blocks = grid(config, multiprocessors)
    tiles = _ceil_div(ffn, 8 * blocks)
    if rows == 1:
        sums = _WARPS * (16 * max(_steps(ffn), _steps(hidden), _steps(heads), tiles) + 1)
    else:
        sums = _WARPS * (rows * (16 * tiles + 4) + _MOST_ROWS)
    floats = sums + rows * (config.head_dim + 1 + _ceil_div(hidden, blocks))
    floats += 5 * config.head_dim + (_WARPS + 1) * (config.head_dim + 2)
    rest = 4 * floats + 72 * config.num_layers + 512  # 512: barriers and alignment
    stages = min(16, (_SHARED_BYTES - rest) // stage)
    return stage, stages, stages * stage + rest


def _board_words(config: Qwen2Config, multiprocessors: int, rows: int) -> int:
    """Words of 32 bits of the board: two for a value, rewritten by each layer; of several rows each layer's own."""
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    blocks, part = grid(config, multiprocessors), config.head_dim + 2
    if rows == 1:
        parts = (blocks * part + 1) // 2 * 2
        return 2 * (_qkv_width(config) + parts + heads + 2 * hidden + ffn // 2)
    parts = _ceil_div(blocks * part, 4) * 4 if blocks >= 2 * rows * config.num_heads else 0
    layer = rows * (2 * _qkv_width(config) + heads + 2 * hidden + ffn) // 2 + parts
    return rows * hidden // 2 + config.num_layers * layer


def _qkv_width(config: Qwen2Config) -> int:
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def _steps(width: int) -> int:
    """How many times 32 columns of a matrix of this width a warp multiplies."""
    return _ceil_div(_ceil_div(width, 32), _WARPS)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
