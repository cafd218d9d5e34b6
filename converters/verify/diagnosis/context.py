"""What the search for a tensor's cause may look at beside it: the other tensors of both sides, the attention heads."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import FindingError
from apr_jax.converters.formats import dtypes
from apr_jax.converters.verify.diagnosis import pair

# A fingerprint: this many short runs, evenly spread from the first element to the last.
_RUNS, _RUN = 12, 8
# q, k and v, weights and biases, of the layers that some threads are at.
_KEPT = 24

_LAYER = re.compile(r"^(.*?layers\.)(\d+)\.(.+)$")
FUSED = ("qkv_proj", "query_key_value", "attn_qkv", "c_attn", "Wqkv")


class Context:
    """Both checkpoints, and what was found out about them once for all tensors.

    Attributes:
      a, b: Name -> tensor of the original and of the suspect.
      config: The model's numbers: the original's, else the suspect's, else None.
      scratch: Memory for the pair that each thread is at.
    """

    def __init__(self, a: Checkpoint, b: Checkpoint):
        self.a, self.b = a.tensors, b.tensors
        self.config = _config(a) or _config(b)
        self.scratch = pair.Scratch()
        # Several threads may diagnose at once.
        self._lock = threading.Lock()
        self._loaded: dict[Tensor, pair.Payload] = {}
        self._codecs: list[tuple[Any, str | int]] = []

    def heads(self, name: str) -> tuple[int, int] | None:
        """Returns (heads, head_dim) along the rows of a Q, K or V projection, or along the columns of O."""
        role = projection(name)
        if role is None or self.config is None or role == "qkv":
            return None
        count = self.config.num_heads if role in ("q", "o") else self.config.num_kv_heads
        return count, self.config.head_dim

    def head_sizes(self, name: str, rows: int) -> list[tuple[int, int]]:
        """Returns the (heads, head_dim) to try: the configured one, then every other even division of the rows."""
        known = self.heads(name)
        sizes = [known] if known and known[0] * known[1] == rows else []
        for dim in sorted(divisors(rows), reverse=True):
            if dim % 2 == 0 and (rows // dim, dim) not in sizes and dim <= 512:
                sizes.append((rows // dim, dim))
        return sizes

    def siblings(self, name: str, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the q, k and v that a q, k or v goes with, weights or biases, as far as they are there."""
        role = projection(name)
        names = {other: name.replace(f"{role}_proj", f"{other}_proj") for other in ("q", "k", "v")}
        return {other: side[found] for other, found in names.items() if found in side}

    def load(self, tensor: Tensor) -> pair.Payload:
        """Reads a tensor, or returns it again: q, k and v of a layer are asked for in turn."""
        with self._lock:
            if tensor not in self._loaded:
                if len(self._loaded) >= _KEPT:
                    del self._loaded[next(iter(self._loaded))]
                self._loaded[tensor] = pair.load(tensor)
            return self._loaded[tensor]

    def codecs_found(self) -> list[tuple[Any, str | int]]:
        """Returns the codecs, and the labels of their groupings, that explain tensors looked at so far."""
        with self._lock:
            return list(self._codecs)

    def codec_found(self, codec: Any, label: str | int) -> None:
        with self._lock:
            if (codec, label) not in self._codecs:
                self._codecs.append((codec, label))

    def same_as(self, tensor: Tensor, *, side: str) -> list[str]:
        """Returns the names of the tensors on one side ("a" or "b") whose elements look like those of `tensor`.

        A fingerprint is compared, rounded to the coarser of the two types; to be verified.
        """
        # Made once, also where several threads ask.
        with self._lock:
            table = self._fingerprints_a if side == "a" else self._fingerprints_b
        return table.like(tensor)

    @functools.cached_property
    def _fingerprints_a(self) -> _Fingerprints:
        return _Fingerprints(self.a)

    @functools.cached_property
    def _fingerprints_b(self) -> _Fingerprints:
        return _Fingerprints(self.b)


def _config(checkpoint: Checkpoint) -> Qwen2Config | None:
    try:
        return checkpoint.model_config()
    except FindingError:
        return None


def projection(name: str) -> str | None:
    """Returns "q", "k", "v", "o" or "qkv" for a weight or bias of the attention's projections, else None."""
    for role in "qkvo":
        if f"{role}_proj" in name:
            return "qkv" if "qkv_proj" in name else role
    return "qkv" if any(part in name for part in FUSED) else None


def split_layer(name: str) -> tuple[int | None, str]:
    """Returns the layer's number and the rest of the name, e.g. (3, "mlp.up_proj.weight"); (None, name) outside."""
    match = _LAYER.match(name)
    return (int(match[2]), match[3]) if match else (None, name)


@functools.lru_cache
def divisors(number: int) -> tuple[int, ...]:
    """Returns the divisors of a positive number, ascending."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return tuple(sorted({*small, *(number // k for k in small)}))


class _Fingerprints:
    """Finds tensors by some of their values."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._numbers = {name: number for number, name in enumerate(tensors)}
        self._by_type: dict[str, list[tuple[str, int, np.ndarray]]] = {}
        for name, tensor in tensors.items():
            if tensor.nbytes:
                entry = name, dtypes.element_count(tensor.shape), _fingerprint(tensor)
                self._by_type.setdefault(tensor.dtype.name, []).append(entry)
        # (type of the tensors, type to which they are rounded) -> count and rounded values -> names.
        self._tables: dict[tuple[str, str], dict[tuple[int, bytes], list[str]]] = {}

    def like(self, tensor: Tensor) -> list[str]:
        """Returns the names of tensors that have as many elements, and these values in one of the two types."""
        count, wanted = dtypes.element_count(tensor.shape), _fingerprint(tensor)
        found: set[str] = set()
        for kind in self._by_type:
            for rounded in dict.fromkeys((kind, tensor.dtype.name)):
                found.update(self._table(kind, rounded).get((count, _rounded(wanted, rounded)), ()))
        return sorted(found, key=self._numbers.__getitem__)

    def _table(self, kind: str, rounded: str) -> dict[tuple[int, bytes], list[str]]:
        if (kind, rounded) not in self._tables:
            table: dict[tuple[int, bytes], list[str]] = {}
            for name, count, values in self._by_type[kind]:
                table.setdefault((count, _rounded(values, rounded)), []).append(name)
            self._tables[kind, rounded] = table
        return self._tables[kind, rounded]


def _rounded(fingerprint: np.ndarray, name: str) -> bytes:
    """Returns a fingerprint as it would be in another type; as it is, where one of the two is not plain."""
    if fingerprint.dtype.kind != "f" or pair.element_bytes(dtypes.by_name(name)) is None:
        return fingerprint.tobytes()
    # A zero has no sign here.
    return pair.bits_of(fingerprint + 0.0, name).tobytes()


def _fingerprint(tensor: Tensor) -> np.ndarray:
    """Returns some values (or the bytes of types that are not plain), from the same places for equal counts."""
    width = pair.element_bytes(tensor.dtype)
    count, width = (tensor.nbytes, 1) if width is None else (tensor.nbytes // width, width)
    run = min(_RUN, count)
    starts = np.unique(np.linspace(0, count - run, _RUNS if count > _RUN else 1).astype(int))
    data = bytearray(len(starts) * run * width)
    for at, start in enumerate(starts):
        tensor.readinto_at(int(start) * width, memoryview(data)[at * run * width : (at + 1) * run * width])
    if pair.element_bytes(tensor.dtype) is None:
        return np.frombuffer(data, "u1")
    return pair.values_of(np.frombuffer(data, f"<u{width}"), tensor.dtype.name)
