"""Tensors from files to an accelerator: read by several threads into memory that is used again and again, sent from
there while the next ones are read, and cast, decoded and joined on the device.

A processor touches a value once: the kernel copies it from the page cache into page-locked memory, from which the
device fetches it at the full rate of the bus. From other memory XLA copies it into page-locked memory of its own first,
and reading into fresh memory costs more than all the rest, since the system has to find and clear its pages. So little
memory is used, and large parameters go through it in pieces. Others do the same with CUDA in their hands: run:ai's
model streamer, fastsafetensors.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.formats import dtypes
from apr_jax.converters.storage.workers import Task, Workers
from apr_jax.load import block_decoding

_STAGING_BYTES = 64 << 20
# What is larger goes in pieces: a program more to compile for each shape.
_WHOLE_BYTES = 32 << 20
_PIECE_BYTES = 16 << 20
_READ_BYTES = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)
_ALIGNMENT = 256
# A program for each shape costs more than it saves where few values are to be cast.
_SMALLEST_DEVICE_CAST = 1 << 15
# From float64 to bfloat16 the host rounds once, which XLA does not promise; narrower types are rare.
_CAST_ON_DEVICE = ("f16", "bf16", "f32")


def can_upload(tensors: Sequence[Tensor], dtype: str) -> bool:
    """Whether the device itself can make one parameter of these tensors, with the host's values bit for bit."""
    if all(not tensor.dtype.is_block and tensor.dtype.numpy == jnp.dtype(dtype) for tensor in tensors):
        return True
    return all(block_decoding.can_decode(tensor) or tensor.dtype.name in _CAST_ON_DEVICE for tensor in tensors) and (
        sum(dtypes.element_count(tensor.shape) for tensor in tensors) >= _SMALLEST_DEVICE_CAST
    )


def upload(parameters: Mapping[str, Sequence[Tensor]], dtype: str, device: jax.Device) -> dict[str, Array]:
    """Reads tensors and puts them on a device.

    Args:
      parameters: For each name the tensors whose rows it holds, one behind the other, all of which pass `can_upload`.
      dtype: "float32", "bfloat16", "float16" or "float64".
      device: Where the arrays go; not the CPU, which would take the staging memory itself for theirs.

    Returns:
      Name -> array of this dtype on the device. Memory besides: 64 MiB, or the largest quantised parameter, on the
      host, and as much on the device for what is cast or decoded there.

    Raises:
      StorageError: A file cannot be read.
    """
    parts = list(_plan(parameters))
    if not parts:
        return {}
    largest, total = max(part.room for part in parts), sum(part.room for part in parts)
    arrays: dict[str, Array] = {}
    reading: collections.deque[_Reading] = collections.deque()
    moving: collections.deque[list[Array]] = collections.deque()
    with Workers(_THREADS) as readers, Workers(_THREADS) as compilers:
        recipes = {_Recipe.of(part, dtype) for part in parts}
        programs = {recipe: compilers.start(_compiled, recipe, device) for recipe in recipes if not recipe.is_nothing}
        there = SingleDeviceSharding(device)
        ring = _Ring(_staging(max(largest, min(total, _STAGING_BYTES)), device))

        def send() -> None:
            """Sends the oldest part, and what else is read: one call costs half of what as many calls do."""
            ready = [reading.popleft()]
            while reading and reading[0].is_done():
                ready.append(reading.popleft())
            raws = jax.device_put([each.finished() for each in ready], there)
            moving.extend(raws)
            for each, arrived in zip(ready, raws, strict=True):
                name = each.part.name
                arrays[name] = _finished(each.part, arrived, arrays.get(name), programs, _Recipe.of(each.part, dtype))

        def free() -> None:
            jax.block_until_ready(moving.popleft())
            ring.give_back()

        for part in parts:
            while (memory := ring.take(part.room)) is None:
                # What is read goes on its way before anything is waited for.
                send() if reading and (reading[0].is_done() or not moving) else free()
            reading.append(_Reading.start(part, memory, readers))
        while reading:
            send()
        # The staging memory must outlive the transfers from it.
        jax.block_until_ready((list(moving), arrays))
    return arrays


# --- what is read, and as what it arrives


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a run of bytes is: a type of the registry, the shape of its values, and how many bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def is_block(self) -> bool:
        return dtypes.by_name(self.dtype).is_block

    @property
    def type(self) -> np.dtype:
        """Of the array that arrives: quantised tensors come as bytes."""
        return np.dtype(np.uint8) if self.is_block else dtypes.by_name(self.dtype).numpy


@dataclasses.dataclass(frozen=True)
class _Run:
    """Bytes that go to the device as one array: a quantised tensor, or rows of tensors of one plain type."""

    kind: _Kind
    extents: tuple[tuple[Tensor, int, int], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Run:
        first = tensors[0]
        shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
        kind = _Kind(first.dtype.name, shape, sum(tensor.nbytes for tensor in tensors))
        return cls(kind, tuple((tensor, 0, tensor.nbytes) for tensor in tensors))

    def rows(self, first: int, last: int) -> _Run:
        """Returns some rows of a run of a plain type."""
        width = self.kind.nbytes // self.kind.shape[0]
        extents, at = [], 0
        for tensor, _, end in self.extents:
            low, high = max(first * width - at, 0), min(last * width - at, end)
            if low < high:
                extents.append((tensor, low, high))
            at += end
        kind = _Kind(self.kind.dtype, (last - first, *self.kind.shape[1:]), (last - first) * width)
        return _Run(kind, tuple(extents))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter, or some rows of one: those from `row` on, where it goes in pieces."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[_Run, ...]
    row: int | None = None

    @property
    def room(self) -> int:
        """Staging bytes: each run begins at an aligned place."""
        return sum(_aligned(run.kind.nbytes) for run in self.runs)


def _plan(parameters: Mapping[str, Sequence[Tensor]]) -> Iterator[_Part]:
    """Yields the parts; pieces last, so that there is time to compile what joins them."""
    in_pieces = []
    for name, tensors in parameters.items():
        runs = tuple(_Run.of(group) for group in _groups(tensors))
        shape = (sum(run.kind.shape[0] for run in runs), *runs[0].kind.shape[1:])
        whole = _Part(name, shape, runs)
        if len(runs) == 1 and not runs[0].kind.is_block and whole.room > _WHOLE_BYTES:
            in_pieces.append(whole)
        else:
            yield whole
    for whole in in_pieces:
        (run,), rows = whole.runs, whole.shape[0]
        step = max(1, _PIECE_BYTES * rows // run.kind.nbytes)
        for row in range(0, rows, step):
            # All pieces have one shape, and so one program: the last one begins with some of the last but one's rows.
            row = min(row, rows - step)
            yield dataclasses.replace(whole, runs=(run.rows(row, row + step),), row=row)


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields neighbours of one plain type together, and quantised tensors one by one."""
    numbered = itertools.groupby(enumerate(tensors), lambda at: (at[1].dtype.name, at[1].dtype.is_block and at[0]))
    for _, group in numbered:
        yield [tensor for _, tensor in group]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A part on its way into staging memory: views of it, and the reads that fill them."""

    part: _Part
    views: list[np.ndarray]
    reads: list[Task[None]]

    @classmethod
    def start(cls, part: _Part, memory: np.ndarray, readers: Workers) -> _Reading:
        reading, begin = cls(part, [], []), 0
        for run in part.runs:
            room = memory[begin : begin + run.kind.nbytes]
            begin += _aligned(run.kind.nbytes)
            reading.views.append(room if run.kind.is_block else room.view(run.kind.type).reshape(run.kind.shape))
            for tensor, low, high in run.extents:
                # Whole rows: what has to be decoded is written where it belongs, and not copied there.
                row = max(1, tensor.nbytes // max(1, tensor.shape[0]))
                step = max(1, _READ_BYTES // row) * row
                for at in range(low, high, step):
                    piece, room = room[: min(step, high - at)], room[min(step, high - at) :]
                    reading.reads.append(readers.start(tensor.readinto_at, at, piece.data))
        return reading

    def is_done(self) -> bool:
        return all(read.is_done() for read in self.reads)

    def finished(self) -> list[np.ndarray]:
        for read in self.reads:
            read.result()
        return self.views


# --- what the device does with it


def _finished(
    part: _Part, raws: Sequence[Array], so_far: Array | None, programs: Mapping[_Recipe, Task[Any]], recipe: _Recipe
) -> Array:
    """Returns the parameter, as far as it is there, from the arrays of a part and what came before it."""
    if recipe.is_nothing:
        return raws[0]
    program = programs[recipe].result()
    return program(so_far, raws[0], np.int32(part.row)) if part.row else program(*raws)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What is to be done with what is uploaded of a parameter.

    Attributes:
      kinds: What arrives.
      shape: The whole parameter's.
      piece: 0: it arrives whole; 1: some rows, the first ones; 2: further rows, to go beside what is there.
      dtype: The parameter's.
    """

    kinds: tuple[_Kind, ...]
    shape: tuple[int, ...]
    piece: int
    dtype: str

    @classmethod
    def of(cls, part: _Part, dtype: str) -> _Recipe:
        piece = 0 if part.row is None else 2 if part.row else 1
        return cls(tuple(run.kind for run in part.runs), part.shape, piece, dtype)

    @property
    def is_nothing(self) -> bool:
        """Whether what arrives is the parameter."""
        only = self.kinds[0]
        return not self.piece and len(self.kinds) == 1 and not only.is_block and only.type == jnp.dtype(self.dtype)


@functools.lru_cache(maxsize=256)
def _compiled(recipe: _Recipe, device: jax.Device) -> Any:
    """Returns the program: (what arrives ...) -> parameter; for further rows (parameter, rows, row) -> parameter."""

    def whole(*raws: Array) -> Array:
        parts = [
            block_decoding.decode(raw, kind.dtype, kind.shape) if kind.is_block else raw
            for raw, kind in zip(raws, recipe.kinds, strict=True)
        ]
        return jnp.concatenate([block_decoding.cast(part, recipe.dtype) for part in parts])

    def first(rows: Array) -> Array:
        behind = [(0, all_ - here, 0) for all_, here in zip(recipe.shape, rows.shape, strict=True)]
        return jax.lax.pad(block_decoding.cast(rows, recipe.dtype), jnp.zeros((), recipe.dtype), behind)

    def further(so_far: Array, rows: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(so_far, block_decoding.cast(rows, recipe.dtype), row, 0)

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    # The scope of x64 is the thread's.
    with jax.enable_x64(recipe.dtype == "float64"):
        arguments = [abstract((kind.nbytes,) if kind.is_block else kind.shape, kind.type) for kind in recipe.kinds]
        if recipe.piece == 2:
            arguments = [abstract(recipe.shape, jnp.dtype(recipe.dtype)), *arguments, abstract((), jnp.int32)]
        program = jax.jit(
            (whole, first, further)[recipe.piece],
            donate_argnums=0 if recipe.piece == 2 else None,
            compiler_options={"xla_allow_excess_precision": False},
        )
        return program.lower(*arguments).compile()


# --- staging memory


def _staging(nbytes: int, device: jax.Device) -> np.ndarray:
    """Returns uint8 [nbytes] of host memory, page-locked where the device is a GPU."""
    memory = np.empty(nbytes, np.uint8)
    if device.platform != "gpu":
        return memory
    # The array is never used as such: it is how JAX hands out page-locked memory. It lives as long as views of it.
    held = jax.block_until_ready(jax.device_put(memory, SingleDeviceSharding(device, memory_kind="pinned_host")))
    place: Any = (ctypes.c_uint8 * nbytes).from_address(held.unsafe_buffer_pointer())
    place.held = held
    return np.frombuffer(place, np.uint8)


class _Ring:
    """Memory that is given back in the order in which it was taken."""

    def __init__(self, memory: np.ndarray):
        self._memory = memory
        self._taken: collections.deque[tuple[int, int]] = collections.deque()

    def take(self, nbytes: int) -> np.ndarray | None:
        """Returns `nbytes` bytes that lie together, or None if so many are not free."""
        begin = self._place(nbytes)
        if begin is None:
            return None
        self._taken.append((begin, begin + nbytes))
        return self._memory[begin : begin + nbytes]

    def give_back(self) -> None:
        """Frees what was taken first."""
        self._taken.popleft()

    def _place(self, nbytes: int) -> int | None:
        if not self._taken:
            return 0
        oldest, newest = self._taken[0][0], self._taken[-1][1]
        if self._taken[-1][0] < oldest:  # wrapped around
            return newest if newest + nbytes <= oldest else None
        if newest + nbytes <= self._memory.nbytes:
            return newest
        return 0 if nbytes <= oldest else None
