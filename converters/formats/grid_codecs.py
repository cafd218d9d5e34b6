"""GGML's block formats whose codes stand for points of a grid, for numbers of a table, or for ternary digits.

Each formula keeps the order of float32 operations of ggml-quants.c (`dequantize_row_*`), so that values agree bit for
bit. `ggml_grids` has the points.
"""

from __future__ import annotations

import numpy as np

from apr_jax.converters.formats import codebooks, ggml_grids
from apr_jax.converters.formats.codecs import Codec

_IQ4_VALUES = np.array(codebooks.IQ4_NL, np.float32)
# E2M1, doubled.
_E2M1_VALUES = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)
_DELTA = np.float32(0.125)
_HALF, _QUARTER = np.float32(0.5), np.float32(0.25)
# Seven signs and an eighth that makes the number of negative ones even.
_PARITY_SIGNS = np.array([byte | (byte.bit_count() & 1) << 7 for byte in range(128)], np.uint8)


def _signs(bytes_: np.ndarray) -> np.ndarray:
    """Returns float32 [..., 8], 1 or -1: a bit that is set makes its value negative, the lowest bit first."""
    return np.where(bytes_[..., None] >> np.arange(8, dtype=np.uint8) & 1, np.float32(-1), np.float32(1))


def _nibble_scales(packed: np.ndarray) -> np.ndarray:
    """Returns uint8 [n, 2 * bytes]: of each byte the lower half, then the upper one."""
    return np.stack((packed & 15, packed >> 4), 2).reshape(len(packed), -1)


def _halves(packed: np.ndarray, width: int) -> np.ndarray:
    """Returns uint8 [n, 2 * bytes]: of each run of `width` bytes the lower halves, then the upper ones."""
    runs = packed.reshape(len(packed), -1, width)
    return np.concatenate((runs & 15, runs >> 4), 2).reshape(len(packed), -1)


def _f32(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float32)[:, None]


def _layout(*fields: tuple[str, str, int]) -> np.dtype:
    return np.dtype([(name, kind) if count == 1 else (name, kind, (count,)) for name, kind, count in fields])


# --- tables of 16


class IQ4_NL(Codec):
    """value = d * table[q]."""

    elements = 32
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        np.multiply(_f32(blocks["d"]), _IQ4_VALUES[_halves(blocks["qs"], 16)], out=out)


class IQ4_XS(Codec):
    """8 groups of 32: value = d * (s - 32) * table[q], s of 6 bits in two places."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("scales_h", "<u2", 1), ("scales_l", "u1", 4), ("qs", "u1", 128))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        high = blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        scales = (_nibble_scales(blocks["scales_l"]) | high << 4).astype(np.float32) - np.float32(32)
        values = _IQ4_VALUES[_halves(blocks["qs"], 16)].reshape(-1, 8, 32)
        np.multiply((_f32(blocks["d"]) * scales)[..., None], values, out=out.reshape(-1, 8, 32))


class MXFP4(Codec):
    """value = 2 ** (e - 128) * table[q]; the table holds E2M1 doubled."""

    elements = 32
    layout = _layout(("e", "u1", 1), ("qs", "u1", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        e = blocks["e"].astype(np.uint32)
        # The two smallest are subnormal.
        bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (e - 1) << np.uint32(23))
        np.multiply(bits.astype(np.uint32).view(np.float32)[:, None], _E2M1_VALUES[_halves(blocks["qs"], 16)], out=out)


class NVFP4(Codec):
    """4 groups of 16: value = scale * table[q] / 2, the scale an unsigned E4M3; its NaN counts as 0."""

    elements = 64
    layout = _layout(("d", "u1", 4), ("qs", "u1", 32))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        d = blocks["d"]
        exponent, mantissa = (d >> 3 & 15).astype(np.float32), (d & 7).astype(np.float32)
        eighth = mantissa * np.float32(0.125)
        scales = np.where(exponent == 0, mantissa * np.float32(2**-9), (1 + eighth) * np.exp2(exponent - np.float32(7)))
        scales = np.where((d == 0) | (d == 0x7F), np.float32(0), scales * _HALF).astype(np.float32)
        values = _E2M1_VALUES[_halves(blocks["qs"], 8)].reshape(-1, 4, 16)
        np.multiply(scales[..., None], values, out=out.reshape(-1, 4, 16))


# --- ternary digits


class TQ1_0(Codec):
    """value = d * (digit - 1), five digits in a byte as a fraction of 256, the first one most significant."""

    elements = 256
    layout = _layout(("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2", 1))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        powers = np.array((1, 3, 9, 27, 81), np.uint8)[:, None]
        runs = (
            blocks["qs"][:, None, :32] * powers,
            blocks["qs"][:, None, 32:] * powers,
            blocks["qh"][:, None] * powers[:4],
        )
        shifted = np.concatenate([run.reshape(len(blocks), -1) for run in runs], 1).astype(np.uint16)
        np.multiply(_f32(blocks["d"]), (shifted * np.uint16(3) >> np.uint16(8)).astype(np.int8) - np.int8(1), out=out)


class TQ2_0(Codec):
    """value = d * (q - 1), q of 2 bits."""

    elements = 256
    layout = _layout(("qs", "u1", 64), ("d", "<f2", 1))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        shifts = np.array((0, 2, 4, 6), np.uint8)[:, None]
        q = (blocks["qs"].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(len(blocks), -1)
        np.multiply(_f32(blocks["d"]), q.astype(np.int8) - np.int8(1), out=out)


# --- grids


def _signed_points(name: str, codes: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Writes scale * point * sign; scales float32 [n, groups], codes [n, points], signs float32 [n, 32, 8]."""
    points = ggml_grids.points(name)[codes].reshape(len(codes), scales.shape[1], -1)
    values = scales[..., None] * points
    np.multiply(values, signs.reshape(values.shape), out=out.reshape(values.shape))


def _parity_signs(words: np.ndarray) -> np.ndarray:
    """Returns the signs of 32 values each, float32 [n, words, 4, 8], from uint32 [n, words]."""
    return _signs(_PARITY_SIGNS[words[..., None] >> np.array((0, 7, 14, 21), np.uint32) & np.uint32(127)])


class IQ2_XXS(Codec):
    """8 groups of 32: four points of 8, their signs, and a scale of 4 bits."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("qs", "<u4", 16))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        pairs = np.ascontiguousarray(blocks["qs"]).reshape(-1, 8, 2)
        codes = np.ascontiguousarray(pairs[..., 0]).view(np.uint8).reshape(len(blocks), -1)
        scales = _f32(blocks["d"]) * (_HALF + (pairs[..., 1] >> np.uint32(28)).astype(np.float32)) * _QUARTER
        _signed_points("iq2_xxs", codes, _parity_signs(pairs[..., 1]), scales, out)


class IQ2_XS(Codec):
    """16 groups of 16: two points of 8 with their signs; scales of 4 bits."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("qs", "<u2", 32), ("scales", "u1", 8))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        scales = _f32(blocks["d"]) * (_HALF + _nibble_scales(blocks["scales"])) * _QUARTER
        signs = _signs(_PARITY_SIGNS[blocks["qs"] >> np.uint16(9)])
        _signed_points("iq2_xs", blocks["qs"] & np.uint16(511), signs, scales, out)


class IQ2_S(Codec):
    """16 groups of 16: two points of 8; a byte of signs for each, codes of 10 bits in two places."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        scales = _f32(blocks["d"]) * (_HALF + _nibble_scales(blocks["scales"])) * _QUARTER
        high = (blocks["qh"][..., None] >> np.array((0, 2, 4, 6), np.uint8) & 3).reshape(len(blocks), -1)
        codes = blocks["qs"] | high.astype(np.uint16) << np.uint16(8)
        _signed_points("iq2_s", codes, _signs(blocks["signs"]), scales, out)


class IQ3_XXS(Codec):
    """8 groups of 32: eight points of 4, their signs, and a scale of 4 bits."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 64), ("scales", "<u4", 8))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        words = np.ascontiguousarray(blocks["scales"])
        scales = _f32(blocks["d"]) * (_HALF + (words >> np.uint32(28)).astype(np.float32)) * _HALF
        _signed_points("iq3_xxs", blocks["qs"], _parity_signs(words), scales, out)


class IQ3_S(Codec):
    """8 groups of 32: eight points of 4, codes of 9 bits in two places; value = d * (1 + 2 s) * point * sign."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        scales = _f32(blocks["d"]) * (1 + 2 * _nibble_scales(blocks["scales"])).astype(np.float32)
        high = (blocks["qh"][..., None] >> np.arange(8, dtype=np.uint8) & 1).reshape(len(blocks), -1)
        codes = blocks["qs"] | high.astype(np.uint16) << np.uint16(8)
        _signed_points("iq3_s", codes, _signs(blocks["signs"]), scales, out)


class IQ1_S(Codec):
    """8 groups of 32: four points of 8; value = d * (2 s + 1) * (point + or - 1/8)."""

    elements = 256
    layout = _layout(("d", "<f2", 1), ("qs", "u1", 32), ("qh", "<u2", 8))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        qh = blocks["qh"]
        scales = _f32(blocks["d"]) * (2 * (qh >> np.uint16(12) & 7) + 1).astype(np.float32)
        delta = np.where(qh & np.uint16(0x8000), -_DELTA, _DELTA)
        high = (qh[..., None] >> np.array((0, 3, 6, 9), np.uint16) & 7).reshape(len(blocks), -1)
        points = ggml_grids.points("iq1_s")[blocks["qs"] | high << np.uint16(8)].reshape(-1, 8, 32)
        np.multiply(scales[..., None], points + delta[..., None], out=out.reshape(-1, 8, 32))


class IQ1_M(Codec):
    """16 groups of 16: two points of 8, each with its own shift by 1/8; the half scale stands in four places."""

    elements = 256
    layout = _layout(("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4))

    def _decode(self, blocks: np.ndarray, out: np.ndarray) -> None:
        words = blocks["scales"]
        parts = (words & np.uint16(0xF000)) >> np.array((12, 8, 4, 0), np.uint16)
        d = np.bitwise_or.reduce(parts, axis=1).astype(np.uint16).view(np.float16)
        scales = (words[..., None] >> np.array((0, 3, 6, 9), np.uint16) & 7).reshape(len(blocks), -1)
        scales = _f32(d) * (2 * scales + 1).astype(np.float32)
        nibbles = _nibble_scales(blocks["qh"])
        delta = np.where(nibbles & 8, -_DELTA, _DELTA).reshape(-1, 16, 2, 1)
        codes = blocks["qs"] | (nibbles & 7).astype(np.uint16) << np.uint16(8)
        points = ggml_grids.points("iq1_s")[codes].reshape(-1, 16, 2, 8)
        np.multiply(scales[..., None, None], points + delta, out=out.reshape(-1, 16, 2, 8))
