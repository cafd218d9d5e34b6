"""How a model lies on a mesh of devices: one table for its weights, and the points at which its values are placed.

Tensor parallelism as in Megatron-LM (arXiv:1909.08053), left to XLA's GSPMD: q, k, v, gate and up are cut by rows, so
that each device computes its own heads and its own part of the MLP; o and down by columns, whose products are sums over
all devices, two in a layer; embedding and head by tokens of the vocabulary. Rows of a batch lie along `data`.

A mesh has the axes `data` and `model`. What is to be cut may not divide by `model`: Qwen2.5-7B has 28 query heads and 4
key/value heads. So `model` is taken apart into three axes, `kv` x `group` x `rest`: key/value heads lie along `kv` (as
many parts as divide both), query heads along `kv` and `group`, everything else along as many of the three, from the
first on, as divide it. Along the axes that are left a weight has copies: with `model=8`, 4 parts of the key/value heads
of a 7B and two copies of each, on neighbouring devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import UsageError
from apr_jax.model import qwen2
from apr_jax.model.qwen2 import Attention, LayerCache, Ops, Tap

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)
"""The axes of a mesh; one that is missing has one device."""
_KV, _GROUP, _REST = _PARTS = ("kv", "group", "rest")

# What the axes of a weight are, by the end of its name; None is never cut, and what is not listed is a norm.
_WEIGHTS: Mapping[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": ("vocabulary", None),
    "lm_head.weight": ("vocabulary", None),
    "q_proj.weight": ("heads", None),
    "q_proj.bias": ("heads",),
    "k_proj.weight": ("kv_heads", None),
    "k_proj.bias": ("kv_heads",),
    "v_proj.weight": ("kv_heads", None),
    "v_proj.bias": ("kv_heads",),
    "o_proj.weight": (None, "heads"),
    "gate_proj.weight": ("ffn", None),
    "up_proj.weight": ("ffn", None),
    "down_proj.weight": (None, "ffn"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh.

    Attributes:
      config: The model's configuration.
      mesh: The devices, with the axes "data", "kv", "group" and "rest".
    """

    config: Qwen2Config
    mesh: Mesh

    @classmethod
    def of(cls, config: Qwen2Config, mesh: Mesh) -> Layout:
        """Lays a model out on a mesh with the axes "data" and "model", or one of them.

        Raises:
          UsageError: The mesh has other axes.
        """
        if strange := [name for name in mesh.axis_names if name not in AXES]:
            raise UsageError(
                "the mesh has an axis that a model has no use for",
                code="mesh-axis",
                found=strange,
                expected=" and ".join(AXES),
                hint=f"jax.make_mesh((1, 8), {AXES}) spreads the weights over eight devices",
            )
        order = sorted(range(mesh.devices.ndim), key=lambda axis: AXES.index(mesh.axis_names[axis]))
        data, model = (mesh.shape.get(name, 1) for name in AXES)
        kv = math.gcd(config.num_kv_heads, model)
        group = math.gcd(config.num_heads // config.num_kv_heads, model // kv)
        shape = (data, kv, group, model // kv // group)
        auto = (AxisType.Auto,) * len(shape)
        return cls(config, Mesh(mesh.devices.transpose(order).reshape(shape), (DATA, *_PARTS), axis_types=auto))

    def __repr__(self) -> str:
        """Says what is cut into how many parts: "data=1, model=8 (kv_heads 4, heads 4, ffn 8, vocabulary 8)"."""
        data, model = self.shape
        parts = ", ".join(f"{name} {parts}" for name, parts in self.parts.items())
        return f"{DATA}={data}, {MODEL}={model} ({parts})"

    @property
    def shape(self) -> tuple[int, int]:
        """How many devices lie along "data" and along "model"."""
        return self.mesh.shape[DATA], self._count(_PARTS)

    @property
    def parts(self) -> dict[str, int]:
        """Into how many parts what is to be cut is cut; where they are fewer than "model", each has copies."""
        return {name: self._count(axes) for name, axes in self._cut.items()}

    @property
    def heads_meet(self) -> bool:
        """Whether the query heads of each device are those of its own key/value heads."""
        return self.mesh.shape[_GROUP] == 1 or self.parts["kv_heads"] == self.config.num_kv_heads

    def spec(self, name: str) -> PartitionSpec:
        """Returns how the tensor of this name, as in HuggingFace's checkpoints, is cut: the table of the module."""
        axes = next((axes for end, axes in _WEIGHTS.items() if name.endswith(end)), (None,))
        return PartitionSpec(*(None if axis is None else self._cut[axis] or None for axis in axes))

    def sharding(self, name: str) -> NamedSharding:
        """Returns where the tensor of this name lies."""
        return NamedSharding(self.mesh, self.spec(name))

    def shardings(self) -> dict[str, NamedSharding]:
        """Returns where every tensor of the model lies, by name."""
        return {name: self.sharding(name) for name in self.config.tensor_shapes()}

    def of_value(self, shape: Sequence[int], *axes: str | None) -> NamedSharding:
        """Returns where a value lies; `axes` are "batch", keys of the table, or None, for its first axes.

        What does not divide is not cut: the three rows of a batch are computed by both halves of `data=2`.
        """
        parts = [None if axis is None else DATA if axis == "batch" else self._cut[axis] or None for axis in axes]
        fitting = (
            part if part is None or size % self._count((part,) if isinstance(part, str) else part) == 0 else None
            for part, size in zip(parts, shape, strict=False)
        )
        return NamedSharding(self.mesh, PartitionSpec(*fitting))

    def place(self, x: Array, *axes: str | None) -> Array:
        """Tells the compiler where a value of a program lies; arguments as `of_value`."""
        return lax.with_sharding_constraint(x, self.of_value(x.shape, *axes))

    def of_arguments(self, values: Any) -> Any:
        """Returns where what a program is given lies: arrays of the mesh where they are, all else whole everywhere."""

        def one(value: Any) -> Any:
            placed = isinstance(value, Array) and value.sharding.device_set == set(self.mesh.devices.flat)
            return value.sharding if placed else self.of_value(())

        return jax.tree.map(one, values)

    def of_results(self, values: Any) -> Any:
        """Returns where what a program hands on lies: caches cut by rows and heads, all else whole on each device."""

        def one(value: Any) -> Any:
            if isinstance(value, LayerCache):
                places: Any = (self.of_value(part.shape, *_CACHED) for part in value)
                return LayerCache(*places)
            return self.of_value(value.shape)

        return jax.tree.map(one, values, is_leaf=lambda value: isinstance(value, LayerCache))

    @functools.cached_property
    def _cut(self) -> dict[str, tuple[str, ...]]:
        """What the axes of weights are -> the axes of the mesh that they lie along."""
        return {
            "kv_heads": (_KV,),
            "heads": (_KV, _GROUP),
            "ffn": self._dividing(self.config.intermediate_size),
            "vocabulary": self._dividing(self.config.vocab_size),
        }

    def _dividing(self, size: int) -> tuple[str, ...]:
        """The most parts, from the first on, that a size divides by."""
        return next(_PARTS[:end] for end in (3, 2, 1, 0) if size % self._count(_PARTS[:end]) == 0)

    def _count(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)


_CACHED = ("batch", None, "kv_heads", None)


# --- The points at which values are placed ---------------------------------------------------------------------------


@functools.cache
def on_mesh(ops: Ops, layout: Layout) -> Ops:
    """Returns a table of operations whose results are placed on a mesh; the same object for the same arguments.

    These are the only points at which a forward pass says where its values lie; the compiler finds all others, and what
    the devices have to tell each other, from them and from where the weights lie.
    """
    points = {name: functools.partial(point, layout, getattr(ops, name)) for name, point in _POINTS.items()}
    return dataclasses.replace(ops, **points)


def _embed(layout: Layout, inner: Callable[..., Array], ids: Array, table: Array) -> Array:
    return layout.place(inner(ids, table), "batch")


def _qkv(
    layout: Layout, inner: Callable[..., Any], ops: Ops, x: Array, weights: Attention, tap: Tap
) -> tuple[Array, Array, Array]:
    if inner is qwen2.qkv and tap is qwen2.pass_on:
        # Joined for their stage, heads of q, k and v would have to be sent to where their parts of the whole lie.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        joined = (
            ops.add_bias(ops.linear(ops, x, p.weight[...], wide), p.bias[...]).reshape(
                *x.shape[:2], -1, weights.config.head_dim
            )
            for p in weights.projections()
        )
        q, k, v = joined
    else:
        q, k, v = inner(ops, x, weights, tap)
    return layout.place(q, "batch", None, "heads"), *(layout.place(part, *_CACHED) for part in (k, v))  # type: ignore[return-value]


def _attention(layout: Layout, inner: Callable[..., Array], *arguments: Any) -> Array:
    return layout.place(inner(*arguments), "batch", None, "heads")


def _glu(layout: Layout, inner: Callable[..., Array], *arguments: Any) -> Array:
    return layout.place(inner(*arguments), "batch", None, "ffn")


def _residual(layout: Layout, inner: Callable[..., Array], x: Array, update: Array) -> Array:
    return layout.place(inner(x, update), "batch")


def _head(layout: Layout, inner: Callable[..., Array], *arguments: Any) -> Array:
    return layout.place(inner(*arguments), "batch", None, "vocabulary")


def _layers(layout: Layout, inner: Callable[..., Any], *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    x, caches = inner(*arguments)
    placed = (
        None if cache is None else LayerCache(*(layout.place(part, *_CACHED) for part in cache)) for cache in caches
    )
    return x, tuple(placed)


_POINTS: Mapping[str, Callable[..., Any]] = {
    "embed": _embed,
    "qkv": _qkv,
    "attention": _attention,
    "glu": _glu,
    "residual": _residual,
    "head": _head,
    "layers": _layers,
}


def to_host(values: Any) -> np.ndarray:
    """Returns an array's values, wherever they lie; of several processes all have to call it, and each gets them."""
    if isinstance(values, Array) and not (values.is_fully_addressable or values.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(values, tiled=True))
    return np.asarray(values)
