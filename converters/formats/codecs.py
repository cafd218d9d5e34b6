"""Codecs of quantised blocks: bytes of a file to float32 values, and back as aprender's `apr` quantises.

One class per block format. The registry (`dtypes.DType.codec`) says which class belongs to a type; a class says how
its bytes are laid out, in one structured numpy type, and what a value is. Every formula keeps the order of float32
operations of the program that it comes from, so that values and payloads agree bit for bit.

Sources: apr-v2-format section 2.4 (AprQ4, AprQ8, Q4_K, Q6_K; their quantisers); ggml-quants.c (`dequantize_row_*`).
Half-precision scales are IEEE, subnormal, infinite and NaN ones included. aprender's own reader alone takes an AprQ4
scale below 6.1e-5, or one that is not finite, for 0 (GH-186); the engine that runs the files does not, and neither does
this module.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np

# What upstream leaves in float32 (apr-v2-format 4.2).
_FLOAT_NAMES = ("bias", "layernorm", "layer_norm", "norm.weight")
_FLOAT_ELEMENTS = 1024

# Below this `apr` takes no scale in Q4_K: nearly, but not quite, the smallest normal half.
_SMALLEST_SCALE = np.float32(6.1e-5)
_ZERO = np.float32(0)
_BELOW_HALF = np.nextafter(np.float32(0.5), _ZERO)


def stays_float(name: str, elements: int) -> bool:
    """Whether `apr import --quantize` leaves a tensor in float32: biases, norms and what is small."""
    return elements < _FLOAT_ELEMENTS or any(part in name for part in _FLOAT_NAMES)


def pad_rows(flat: np.ndarray, columns: int | None, elements: int) -> np.ndarray:
    """Returns rows of `columns` values, each filled up with zeros to whole blocks; None: they need no filling."""
    if columns is None:
        return flat
    rows = flat.reshape(-1, columns)
    return np.pad(rows, ((0, 0), (0, -columns % elements))).reshape(-1)


class Codec(abc.ABC):
    """Decodes one block format.

    Attributes:
      elements: Values of one block.
      layout: The bytes of one block.
      prefix_bytes: Bytes at the very beginning of a tensor that every part of it needs.
    """

    elements: ClassVar[int]
    layout: ClassVar[np.dtype]
    prefix_bytes: ClassVar[int] = 0

    def decode(self, data: bytes | bytearray | memoryview, out: np.ndarray) -> None:
        """Decodes whole blocks.

        Args:
          data: The tensor's prefix, then blocks that follow each other.
          out: float32 [values], contiguous; the values of all blocks, or all but the last ones of the last block.
        """
        blocks = np.frombuffer(data, self.layout)
        whole = out.size // self.elements
        with np.errstate(all="ignore"):
            self._decode(blocks[:whole], out[: whole * self.elements].reshape(whole, self.elements))
            if whole < len(blocks):
                last = np.empty((1, self.elements), np.float32)
                self._decode(blocks[whole : whole + 1], last)
                out[whole * self.elements :] = last[0, : out.size - whole * self.elements]

    @abc.abstractmethod
    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        """Writes the values of blocks [n] into `out`, float32 [n, elements]."""


class Encoder(Codec):
    """A codec that also quantises, as `apr` does it."""

    def prefix(self, largest: np.float32) -> bytes:
        """Returns the bytes at the beginning of a tensor whose largest magnitude is given."""
        return b""

    @abc.abstractmethod
    def encode(self, values: np.ndarray, prefix: bytes = b"") -> bytes:
        """Returns the blocks of float32 [values], without the prefix; a last partial block is filled up."""

    def _blocks(self, values: np.ndarray) -> np.ndarray:
        """Returns the values as [n, elements], zeros behind the last one."""
        return np.pad(values, (0, -values.size % self.elements)).reshape(-1, self.elements)


def _layout(*fields: tuple[str, str, int]) -> np.dtype:
    # A field of one element is a plain column, any other a matrix.
    return np.dtype([(name, kind) if count == 1 else (name, kind, (count,)) for name, kind, count in fields])


def _round(values: np.ndarray) -> np.ndarray:
    """Rounds half away from zero, as Rust's f32::round; numpy's rint rounds half to even.

    Adding the float just below a half cannot lift a smaller fraction over the edge: exact for magnitudes below 2^23.
    """
    return np.trunc(values + np.copysign(_BELOW_HALF, values))


def _divide(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns values / scale; 0 for 0 / 0, as Rust's cast of a NaN to an integer gives."""
    ratio = values / scale
    return ratio if np.all(scale) else np.nan_to_num(ratio)


def _f32(halves: np.ndarray) -> np.ndarray:
    """Returns half-precision scales [n] as float32 [n, 1]."""
    return halves.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 2, bytes]: all low nibbles, then all high ones (GGML's order)."""
    return np.stack((packed & 15, packed >> 4), 1)


def _halves(packed: np.ndarray) -> np.ndarray:
    """Returns int8 [n, 2 * bytes]: as `_nibbles`, for the few bytes of small blocks.

    NumPy's loops are as long as a row here, and all but free over a whole array: bytes are moved a row at a time.
    """
    row = np.dtype((np.void, packed.shape[1]))
    whole = np.ascontiguousarray(packed.view(row)).view(np.uint8)
    both = np.empty((len(packed), 2), row)
    both[:, :1] = (whole & 15).view(row)
    both[:, 1:] = (whole >> 4).view(row)
    return both.view(np.int8)


def _bits(packed: np.ndarray, count: int) -> np.ndarray:
    """Returns uint8 [n, count, bytes]: each byte shifted right by 0, 1, ... count - 1 bits, only bit 0 kept."""
    return packed[:, None] >> np.arange(count, dtype=np.uint8)[:, None] & 1


def _pairs(packed: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 4, bytes]: the bits 0-1 of each byte, then 2-3, 4-5, 6-7."""
    return packed[..., None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


# --- aprender's own


class AprQ8(Encoder):
    """One float32 scale for the tensor, then an int8 for each value; value = q * scale."""

    elements = 1
    layout = np.dtype("i1")
    prefix_bytes = 4

    def decode(self, data: bytes | bytearray | memoryview, out: np.ndarray) -> None:
        (scale,) = np.frombuffer(data, "<f4", 1)
        with np.errstate(all="ignore"):
            np.multiply(np.frombuffer(data, "i1", out.size, self.prefix_bytes), scale, out=out)

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        raise NotImplementedError("AprQ8 has no blocks")

    def prefix(self, largest: np.float32) -> bytes:
        scale = np.float32(largest) / np.float32(127) if largest > 0 else np.float32(1)
        return scale.astype("<f4").tobytes()

    def encode(self, values: np.ndarray, prefix: bytes = b"") -> bytes:
        (scale,) = np.frombuffer(prefix, "<f4")
        with np.errstate(all="ignore"):
            return np.clip(_round(_divide(values, scale)), -127, 127).astype("i1").tobytes()


class AprQ4(Encoder):
    """32 values: a half scale, then nibbles in pairs; values 2i and 2i + 1 share byte i; value = (q - 8) * scale."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        scale = _f32(blocks["d"])
        for odd, nibbles in enumerate((blocks["qs"] & 15, blocks["qs"] >> 4)):
            np.multiply(nibbles.astype("i1") - np.int8(8), scale, out=out[:, odd::2])

    def encode(self, values: np.ndarray, prefix: bytes = b"") -> bytes:
        rows = self._blocks(values)
        largest = np.abs(rows).max(1, keepdims=True)
        scale = np.where(largest > 0, largest / np.float32(7), np.float32(1))
        with np.errstate(all="ignore"):
            q = np.clip(_round(_divide(rows, scale)), -8, 7).astype("i1") + np.int8(8)
            blocks = np.empty(len(rows), self.layout)
            blocks["d"] = scale[:, 0]
        # Behind the last value there are zero bytes, not zero values.
        q.reshape(-1)[values.size :] = 0
        blocks["qs"] = (q[:, ::2] | q[:, 1::2] << 4).view("u1")
        return blocks.tobytes()


# --- GGML, 32 values


class Q4_0(Codec):
    """value = d * (q - 8)."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        q = _halves(blocks["qs"])
        q -= np.int8(8)
        out[:] = q
        out *= _f32(blocks["d"])


class Q4_1(Codec):
    """value = d * q + m."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("m", "<f2", 1), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:] = _halves(blocks["qs"])
        out *= _f32(blocks["d"])
        out += _f32(blocks["m"])


def _fifth_bits(blocks: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 32], 0 or 16: bit i of `qh` belongs to value i."""
    return np.unpackbits(blocks["qh"], axis=1, bitorder="little") << 4


class Q5_0(Codec):
    """value = d * (q - 16)."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("qh", "u1", 4), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        q = _nibbles(blocks["qs"]).reshape(len(blocks), 32) | _fifth_bits(blocks)
        np.multiply(_f32(blocks["d"]), q.view("i1") - np.int8(16), out=out)


class Q5_1(Codec):
    """value = d * q + m."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("m", "<f2", 1), ("qh", "u1", 4), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        q = _nibbles(blocks["qs"]).reshape(len(blocks), 32) | _fifth_bits(blocks)
        np.multiply(_f32(blocks["d"]), q, out=out)
        out += _f32(blocks["m"])


class Q8_0(Codec):
    """value = d * q."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("qs", "i1", 32))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        out[:] = blocks["qs"]
        out *= _f32(blocks["d"])


class Q8_1(Codec):
    """value = d * q; `s`, d times the sum of all q, only speeds up products."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("s", "<f2", 1), ("qs", "i1", 32))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(_f32(blocks["d"]), blocks["qs"], out=out)


# --- GGML, 256 values


class Q2_K(Codec):
    """16 groups of 16: value = d * (s & 15) * q - dmin * (s >> 4)."""

    elements = 256
    layout = _layout(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2", 1), ("dmin", "<f2", 1))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        groups = out.reshape(-1, 16, 16)
        q = _pairs(blocks["qs"].reshape(-1, 2, 32)).reshape(-1, 16, 16)
        np.multiply((_f32(blocks["d"]) * (blocks["scales"] & 15))[..., None], q, out=groups)
        groups -= (_f32(blocks["dmin"]) * (blocks["scales"] >> 4))[..., None]


class Q3_K(Codec):
    """16 groups of 16: value = d * (s - 32) * q, q = 2 bits - (4 where the bit in `hmask` is not set)."""

    elements = 256
    layout = _layout(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2", 1))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        low = _nibbles(blocks["scales"][:, :8]).reshape(-1, 16)
        high = _pairs(blocks["scales"][:, 8:]).reshape(-1, 16)
        scales = (low | high << 4).view("i1") - np.int8(32)
        q = _pairs(blocks["qs"].reshape(-1, 2, 32)).reshape(-1, 16, 16).view("i1")
        q = q - ((_bits(blocks["hmask"], 8) ^ 1) << 2).reshape(-1, 16, 16).view("i1")
        np.multiply((_f32(blocks["d"]) * scales)[..., None], q, out=out.reshape(-1, 16, 16))


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 6-bit scales and mins of 8 sub-blocks, uint8 [n, 8] each, from uint8 [n, 12]."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (rest & 15) | first >> 6 << 4), 1)
    mins = np.concatenate((second & 63, (rest >> 4) | second >> 6 << 4), 1)
    return scales, mins


def _decode_sub_blocks(blocks: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
    """8 sub-blocks of 32: value = d * scale * q - dmin * min; q is uint8 [n, 8, 32]."""
    scales, mins = _scales_and_mins(blocks["scales"])
    groups = out.reshape(-1, 8, 32)
    np.multiply((_f32(blocks["d"]) * scales)[..., None], q, out=groups)
    groups -= (_f32(blocks["dmin"]) * mins)[..., None]


class Q4_K(Encoder):
    """8 sub-blocks of 32: value = d * scale * q - dmin * min, q of 4 bits."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qs", "u1", 128))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        q = _nibbles(blocks["qs"].reshape(-1, 32)).reshape(-1, 8, 32)
        _decode_sub_blocks(blocks, q, out)

    def encode(self, values: np.ndarray, prefix: bytes = b"") -> bytes:
        groups = self._blocks(values).reshape(-1, 8, 32)
        with np.errstate(all="ignore"):
            lowest, highest = groups.min(2), groups.max(2)
            spread = highest - lowest
            wanted = np.where(spread > _SMALLEST_SCALE, spread / np.float32(15), _SMALLEST_SCALE)
            d, scales = self._six_bits(wanted)
            dmin, mins = self._six_bits(np.maximum(_ZERO, -lowest))
            step, shift = (d * scales)[..., None], (dmin * mins)[..., None]
            q = np.clip(_round((groups + shift) / step), 0, 15)
            q = np.where(step > 0, q, _ZERO).astype("u1")
            blocks = np.empty(len(groups), self.layout)
            blocks["d"], blocks["dmin"] = d[:, 0], dmin[:, 0]
        s, m = scales.astype("u1"), mins.astype("u1")
        packed = (s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4)
        blocks["scales"] = np.concatenate(packed, 1)
        blocks["qs"] = (q[:, ::2] | q[:, 1::2] << 4).reshape(-1, 128)
        return blocks.tobytes()

    @staticmethod
    def _six_bits(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the unrounded step, float32 [n, 1], and the codes 0..63 of `wanted` [n, 8], as float32."""
        largest = wanted.max(1, keepdims=True)
        step = np.where(largest > _SMALLEST_SCALE, largest / np.float32(63), _SMALLEST_SCALE)
        return step, np.clip(_round(wanted / step), 0, 63)


class Q5_K(Codec):
    """8 sub-blocks of 32: value = d * scale * q - dmin * min, q of 5 bits."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        q = _nibbles(blocks["qs"].reshape(-1, 32)).reshape(-1, 8, 32)
        _decode_sub_blocks(blocks, q | _bits(blocks["qh"], 8) << 4, out)


class Q6_K(Codec):
    """16 groups of 16: value = d * scale * (q - 32), q of 6 bits."""

    elements = 256
    layout = _layout(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        low = _nibbles(blocks["ql"].reshape(-1, 64)).reshape(-1, 2, 4, 32)
        high = _pairs(blocks["qh"].reshape(-1, 2, 32))
        q = (low | high << 4).view("i1").reshape(-1, 16, 16) - np.int8(32)
        scales = _f32(blocks["d"]) * blocks["scales"]
        np.multiply(scales[..., None], q, out=out.reshape(-1, 16, 16))
