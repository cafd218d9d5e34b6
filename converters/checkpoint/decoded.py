"""A tensor that no file holds as such: its values are computed from other tensors, in pieces, when they are read."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.formats.dtypes import DType

if TYPE_CHECKING:
    import numpy as np

    from apr_jax.converters.formats.packed_codecs import Decoder

# A decoder holds what its tensor is made of: as many are kept as threads may be reading.
_KEPT = 8
_PIECE_ELEMENTS = 1 << 18
ADAPTER = "adapter"
"""The form of a tensor to which an adapter was added; the first of its parts is what it was added to."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a tensor is packed.

    Attributes:
      name: What the form is called: "gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "torchao",
        "adapter".
      details: What is to be known of it besides, such as {"type": "int4", "group": 128}.
    """

    name: str
    details: tuple[tuple[str, str | int], ...] = ()

    def __str__(self) -> str:
        parts = [str(value) if key == "type" else f"{key} {value}" for key, value in self.details]
        return f"{self.name} {', '.join(parts)}".rstrip()


class DecoderCache:
    """The decoders of the tensors that were read last; made once also where several threads ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        self._kept: collections.OrderedDict[str, Decoder] = collections.OrderedDict()

    def get(self, name: str, make: Callable[[], Decoder]) -> Decoder:
        with self._lock:
            making = self._making[name]
        with making:
            with self._lock:
                if name in self._kept:
                    self._kept.move_to_end(name)
                    return self._kept[name]
            decoder = make()
            with self._lock:
                self._kept[name] = decoder
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return decoder


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedTensor(Tensor):
    """A tensor in the dense shape and type that it stands for; whatever is read of it is decoded.

    `source` and `offset` are those of its largest part, for messages alone.

    Attributes:
      form: How it is packed.
      parts: The tensors that it is made of.
      make: Reads them, and returns what decodes them.
      cache: Where its decoder is kept for a while.
      written_type: The type in which it is written, where that is another one than that of its values.
    """

    form: Form
    parts: tuple[Tensor, ...]
    make: Callable[[], Decoder]
    cache: DecoderCache
    written_type: DType | None = None

    @property
    def written_as(self) -> DType:
        return self.written_type or self.dtype

    @classmethod
    def of(
        cls,
        name: str,
        dtype: DType,
        shape: Sequence[int],
        form: Form,
        parts: Sequence[Tensor],
        make: Callable[[], Decoder],
        cache: DecoderCache,
    ) -> DecodedTensor:
        """Makes one; its bytes follow from type and shape. What a thread will need to decode it is imported here."""
        from apr_jax.converters.formats import packed_codecs  # noqa: F401

        for each in (dtype, *(part.dtype for part in parts)):
            _ = each.codec if each.is_block else each.numpy
        largest = max(parts, key=lambda part: part.nbytes)
        nbytes = dtype.nbytes(tuple(shape))
        return cls(name, dtype, tuple(shape), nbytes, largest.source, largest.offset, form, tuple(parts), make, cache)

    def readinto_at(self, begin: int, buffer: bytearray | memoryview) -> None:
        import numpy as np

        data = np.frombuffer(buffer, np.uint8)
        if not data.size:
            return
        decoder = self.cache.get(self.name, self.make)
        item, width = self.dtype.block_bytes, decoder.width
        first, last = begin // item, -(-(begin + data.size) // item)
        if self.dtype.name == "f32" and not first % width and (last - first) % width == 0 and _is_aligned(data, begin):
            decoder.decode(first // width, last // width, data.view("<f4").reshape(-1, width))
            return
        step = max(1, _PIECE_ELEMENTS // width)
        for row in range(first // width, -(-last // width), step):
            end = min(row + step, -(-last // width))
            values = np.empty((end - row, width), np.float32)
            decoder.decode(row, end, values)
            # NaN payloads aside, this rounds to nearest even, as the libraries do.
            piece = values.reshape(-1).astype(self.dtype.numpy, copy=False).view(np.uint8)
            low, high = max(begin, row * width * item), min(begin + data.size, end * width * item)
            data[low - begin : high - begin] = piece[low - row * width * item : high - row * width * item]


def _is_aligned(data: np.ndarray, begin: int) -> bool:
    return not data.ctypes.data % 4 and not begin % 4 and not data.size % 4
