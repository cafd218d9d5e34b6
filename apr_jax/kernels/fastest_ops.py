"""Which operations run a model fastest on which device; a model takes them as a table, `qwen2.Ops`.

On CUDA, bfloat16 with fused leaves: cuDNN's flash attention for prompts, and CUDA kernels (`apr_jax.cuda`) for residual
with norm and for SwiGLU there, for the attention of decode steps, and, to batch 8, for all layers of a token at once.
Measured on one H200: tests/bench/decode_profile.md. CPUs take `cpu_ops.CPU_OPS`; everything else (float32, float64,
other devices and shapes) takes `OPS`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.cpu import products
from apr_jax.cuda import decode_layers, kernels, nvrtc
from apr_jax.cuda.custom_call import SPLIT_HALVES, head_supported
from apr_jax.kernels.cpu_ops import CPU_OPS
from apr_jax.load.load_model import Placement, find_device, load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import dtype_name
from apr_jax.model.qwen2 import (
    MLP,
    OPS,
    Attention,
    DecoderLayer,
    LayerCache,
    Ops,
    Step,
    Tap,
    attention,
    attention_block,
    decoder_layers,
    glu,
    linear,
    pass_on,
)
from apr_jax.model.sharding import Layout

COMPUTE_CAPABILITY = 9.0
"""Of the devices that the kernels are written for: bulk copies, 227 KiB of shared memory a block."""

_MOST_SLOTS = 1024  # beyond, one block a head does not keep up unless the batch fills the device
_PROMPT_ROWS = 256  # below, XLA's own fusions of residual, norm and activation are as fast
_LEAST_CUDNN_HEAD = 16  # the smallest head size that cuDNN was seen working with here
_LONG_ROWS = 8192  # of a matrix that is multiplied with one vector
_MOST_ROWS = 4 * 65_535  # of the SwiGLU kernel: four a block, and the blocks of a grid's second dimension


def load_fastest(
    source: str | os.PathLike[str] | Checkpoint,
    dtype: Any = "float32",
    device: Placement = None,
    ignore_config: Iterable[str] = (),
) -> LanguageModel:
    """Loads a model with the leaves and the operations that run it fastest; arguments and errors as `load_model`.

    On a CPU, in float32, matrices stay as they are stored where there are kernels for that.
    """
    fused, as_stored = fuses(dtype, device), products.available()
    model = load_model(source, dtype, device, fused=fused, as_stored=as_stored, ignore_config=ignore_config)
    return model.with_ops(ops_for(model.config, model.dtype, model.device, model.fused, model.layout))


def fuses(dtype: Any, device: Placement) -> bool:
    """Whether a model is to be loaded with fused leaves: the kernels for CUDA read those, and are made for bfloat16.

    On a mesh of several devices they give way to XLA's own operations, which it can spread.
    """
    if isinstance(device, Mesh) and device.size > 1:
        return False
    return find_device(device).platform == "gpu" and dtype_name(dtype) == "bfloat16"


def ops_for(config: Qwen2Config, dtype: str, device: jax.Device, fused: bool, layout: Layout | None = None) -> Ops:
    """Returns the fastest table of operations for a model.

    Args:
      config: Its configuration.
      dtype: Of its parameters and of the computation.
      device: That it is on.
      fused: Whether it was loaded with fused leaves.
      layout: How it lies on a mesh, if it does.

    Returns:
      `CPU_OPS` on a CPU. Elsewhere `OPS`, unless the model is bfloat16, on an NVIDIA device of compute capability 9.0,
      and of a head size that the kernels and cuDNN take: `mesh_ops` on a mesh, `cuda_ops` on one device, for a model
      that is fused and with NVRTC installed.
    """
    if device.platform == "cpu":
        return CPU_OPS
    if device.platform != "gpu" or dtype != "bfloat16":
        return OPS
    if float(getattr(device, "compute_capability", 0)) != COMPUTE_CAPABILITY:
        return OPS
    if not head_supported(config) or config.head_dim > 128 or config.hidden_size % 8:
        return OPS
    if layout is not None:
        plain = config.sliding_window is None and config.head_dim >= _LEAST_CUDNN_HEAD
        return mesh_ops(layout) if plain and layout.heads_meet else OPS
    return cuda_ops(device.core_count) if fused and nvrtc.library() is not None else OPS


@functools.cache
def cuda_ops(multiprocessors: int, rotation: str = SPLIT_HALVES) -> Ops:
    """Returns the table of CUDA kernels; the same object for the same arguments, so that programs are shared.

    Args:
      multiprocessors: Of the device.
      rotation: RoPE in the kernels that rotate, an expression like `launch.SPLIT_HALVES`.
    """
    return dataclasses.replace(OPS, layers=functools.partial(cuda_layers, multiprocessors, rotation))


@functools.cache
def mesh_ops(layout: Layout) -> Ops:
    """Returns the table for a mesh of GPUs: XLA's own operations, and flash attention for what fills an empty cache."""
    return dataclasses.replace(OPS, layers=functools.partial(mesh_layers, layout))


def prompts_keep_no_scores(config: Qwen2Config, ops: Ops) -> bool:
    """Whether the first chunk of a prompt goes through flash attention, which has no scores [N, T, S] in memory.

    Layers with a window do not: their mask is more than causal.
    """
    plain = config.sliding_window is None and config.head_dim >= _LEAST_CUDNN_HEAD
    return plain and getattr(ops.layers, "func", None) is cuda_layers


def cuda_layers(
    multiprocessors: int,
    rotation: str,
    ops: Ops,
    x: Array,
    layers: Sequence[DecoderLayer],
    step: Step,
    caches: Sequence[LayerCache | None],
    layer_ops: Mapping[int, Ops],
) -> tuple[Array, tuple[LayerCache | None, ...]]:
    """`qwen2.decoder_layers` in CUDA kernels; layers with tables of their own go to that function."""
    if layer_ops:
        return decoder_layers(ops, x, layers, step, caches, layer_ops)
    config = layers[0].self_attn.config
    one_token = x.shape[1] == 1 and step.slot is not None and not isinstance(step.slot, int)
    held = [cache for cache in caches if cache is not None]
    windowed = any(window_bites(layer.self_attn.window, step) for layer in layers)
    if one_token and not windowed and decode_layers.supports(config, multiprocessors, x.shape[0]):
        return decode_layers.decode(x, layers, step, held, multiprocessors, rotation)
    table = dataclasses.replace(
        ops,
        attention_block=functools.partial(token_attention, multiprocessors, rotation) if one_token else attention_block,
        linear=matvec_linear if one_token and x.shape[0] == 1 else linear,
    )
    if one_token or x.shape[0] * x.shape[1] < _PROMPT_ROWS:
        return decoder_layers(table, x, layers, step, caches, layer_ops)
    return _prompt_layers(dataclasses.replace(ops, qkv=qkv, glu=fused_glu), x, layers, step, caches)


def mesh_layers(
    layout: Layout,
    ops: Ops,
    x: Array,
    layers: Sequence[DecoderLayer],
    step: Step,
    caches: Sequence[LayerCache | None],
    layer_ops: Mapping[int, Ops],
) -> tuple[Array, tuple[LayerCache | None, ...]]:
    """`qwen2.decoder_layers`, a prompt's first tokens through flash attention: each device its own rows and heads."""
    if isinstance(step.slot, int) and not layer_ops:
        ops = dataclasses.replace(ops, attention=functools.partial(spread_attention, layout))
    return decoder_layers(ops, x, layers, step, caches, layer_ops)


def spread_attention(
    layout: Layout,
    ops: Ops,
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    kv_positions: Array,
    tap: Tap,
    window: int | None = None,
) -> Array:
    """`causal_attention` on a mesh: no device needs the heads of another one."""
    if q.shape[1] != k.shape[1] or window is not None:
        return attention(ops, q, k, v, q_positions, kv_positions, tap, window)
    places = [layout.of_value(q.shape, "batch", None, "heads").spec]
    places += [layout.of_value(part.shape, "batch", None, "kv_heads").spec for part in (k, v)]
    positions = [layout.of_value(each.shape, "batch").spec for each in (q_positions, kv_positions)]

    def own(q: Array, k: Array, v: Array, q_positions: Array, kv_positions: Array) -> Array:
        return causal_attention(ops, q, k, v, q_positions, kv_positions, pass_on)

    spread: Array = jax.shard_map(
        own,
        mesh=layout.mesh,
        in_specs=(*places, *positions),
        out_specs=places[0],
        check_vma=False,
    )(q, k, v, q_positions, kv_positions)
    return spread


def window_bites(window: int | None, step: Step) -> bool:
    """Whether there may be keys behind a layer's window: the kernels know none and see all."""
    return window is not None and step.kv_positions.shape[1] > window


def _prompt_layers(
    ops: Ops, x: Array, layers: Sequence[DecoderLayer], step: Step, caches: Sequence[LayerCache | None]
) -> tuple[Array, tuple[LayerCache | None, ...]]:
    """All layers over many rows: each residual is added in the kernel that norms the sum."""
    if isinstance(step.slot, int) and prompts_keep_no_scores(layers[0].self_attn.config, ops):
        ops = dataclasses.replace(ops, attention=causal_attention)
    after: list[LayerCache | None] = []
    normed = layers[0].input_layernorm(x, ops)
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        here = step if index + 1 == len(layers) else step._replace(kept=None)
        norm = layer.post_attention_layernorm
        update, cache = layer.self_attn(normed, here, cache, ops, pass_on)
        x, normed = kernels.add_norm(here.keep(x), update, norm.weight[...], norm.eps)
        update = layer.mlp(normed, ops, pass_on)
        after.append(cache)
        if index + 1 < len(layers):
            norm = layers[index + 1].input_layernorm
            x, normed = kernels.add_norm(x, update, norm.weight[...], norm.eps)
    return ops.residual(x, update), tuple(after)


def token_attention(
    multiprocessors: int,
    rotation: str,
    ops: Ops,
    x: Array,
    layer: DecoderLayer,
    step: Step,
    cache: LayerCache,
    tap: Tap,
) -> tuple[Array, LayerCache | None]:
    """`qwen2.attention_block` for one token a row, with one kernel between the two products."""
    config, batch, projection = layer.self_attn.config, x.shape[0], layer.self_attn.qkv_proj
    few = cache.keys.shape[1] > _MOST_SLOTS and batch * config.num_heads < multiprocessors
    if few or window_bites(layer.self_attn.window, step):
        return attention_block(ops, x, layer, step, cache, tap)
    product = ops.linear(ops, layer.input_layernorm(x, ops), projection.weight[...], jnp.float32)
    values, cache = kernels.attend(config, ops.add_bias(product, projection.bias[...]), step, cache, rotation)
    return ops.residual(x, ops.linear(ops, values, layer.self_attn.o_proj.weight[...])), cache


def matvec_linear(ops: Ops, x: Array, weight: Array, dtype: object = None) -> Array:
    """`qwen2.linear`, of one token: long rows go to a kernel of their own."""
    if weight.shape[1] < _LONG_ROWS or weight.shape[1] % 8 or dtype is not None:
        return linear(ops, x, weight, dtype)
    return kernels.matvec(weight, x)


def fused_glu(ops: Ops, x: Array, weights: MLP, tap: Tap) -> Array:
    """`qwen2.glu`, the activation and the product in one kernel."""
    gate_up = ops.linear(ops, x, weights.gate_up_proj.weight[...])
    if gate_up.shape[2] % 16 or x.shape[0] * x.shape[1] > _MOST_ROWS:
        return glu(ops, x, weights, tap)
    return kernels.swiglu(gate_up)


def qkv(ops: Ops, x: Array, weights: Attention, tap: Tap) -> tuple[Array, Array, Array]:
    """`qwen2.qkv` in one GEMM with the bias in its epilogue: there too it is added before the sum is rounded."""
    del tap
    config, (batch, length) = weights.config, x.shape[:2]
    (projection,) = weights.projections()
    biased = ops.linear(ops, x, projection.weight[...]) + projection.bias[...]
    q_end, k_end = config.num_heads, config.num_heads + config.num_kv_heads
    heads = biased.reshape(batch, length, -1, config.head_dim)
    return heads[:, :, :q_end], heads[:, :, q_end:k_end], heads[:, :, k_end:]


def causal_attention(
    ops: Ops,
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    kv_positions: Array,
    tap: Tap,
    window: int | None = None,
) -> Array:
    """cuDNN's flash attention of the first tokens of a cache over themselves: q [B, T, N, H], k, v [B, T, K, H].

    Padding stands behind a row's tokens, so that a causal mask alone hides it from them. Where one query of each row is
    kept it is not the first token, which cuDNN would take it for: `qwen2.attention` has positions.
    """
    if q.shape[1] != k.shape[1] or window is not None:
        return attention(ops, q, k, v, q_positions, kv_positions, tap, window)
    values = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return values.reshape(*values.shape[:2], -1)
