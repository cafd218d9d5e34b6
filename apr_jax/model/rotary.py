"""Rotary tables, made once on the host and passed to every program as arrays.

RoPE decides the last digits of a Qwen2 forward pass: one unit in the last place of every inverse frequency moves the
logits by 1.2e-5 (relative L2) at 97 positions and by 1.3e-4 at 1024. So the inverse frequencies here are bit for bit
those that torch computes, the angles are float32 products as in `Qwen2RotaryEmbedding`, and cos and sin are the
correctly rounded float32 values of those angles, the same on every backend and in every dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# torch's CPU kernels take 2 x 16 float32 at a time (AVX-512) through SLEEF and the rest through the C library.
_TORCH_BLOCK = 32


def inverse_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Returns `1 / theta ** (arange(0, head_dim, 2) / head_dim)` as torch computes it in float32.

    Args:
      theta: The rotary base.
      head_dim: Width of a head, even.

    Returns:
      float32 [head_dim / 2], bit-equal to torch on x86-64 with AVX-512 (and with AVX2 where head_dim is a multiple of
      64, as in every published Qwen2). In the remainder of a block, for other head_dims, torch takes the C library's
      `powf`, which misses the correctly rounded value used here by one unit in about 1 of 10,000 elements.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    blocked = len(exponents) - len(exponents) % _TORCH_BLOCK
    powers = np.float64(np.float32(theta)) ** exponents.astype(np.float64)
    powers = powers.astype(np.float32)
    powers[:blocked] = _sleef_powf(np.float32(theta), exponents[:blocked])
    return np.float32(1.0) / powers


def tables(theta: float, head_dim: int, length: int, *, another_pow: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of the rotary angles of positions 0 .. length-1, float32 [length, head_dim / 2] each.

    Args:
      theta: The rotary base.
      head_dim: Width of a head, even.
      length: Number of positions.
      another_pow: With every frequency but the first, which is 1, one unit in the last place up or down, in turn: what
        another C library may give.
    """
    positions = np.arange(length, dtype=np.float32)
    frequencies = inverse_frequencies(theta, head_dim)
    if another_pow:
        frequencies[1::2] = np.nextafter(frequencies[1::2], np.float32(2))
        frequencies[2::2] = np.nextafter(frequencies[2::2], np.float32(0))
    angles = (positions[:, None] * frequencies).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _sleef_powf(base: np.float32, exponents: np.ndarray) -> np.ndarray:
    """`base ** exponents` as `Sleef_powf_u10` gives it: the library's own approximations, not correctly rounded.

    SLEEF works in pairs of float32; float64 holds what such a pair holds, and more. Only where SLEEF itself drops to
    single float32 (the polynomials in `x2` and `s`) is each step rounded to float32, as its fused multiply-add does.
    Constants and reduction are those of `logkf` and `expkf` in SLEEF 3 (Boost Software License 1.0).
    """
    # log(base) = e ln 2 + 2 atanh x, with base = m 2^e and x = (m - 1) / (m + 1)
    exponent = np.frexp(base * np.float32(1 / 0.75))[1] - 1
    m = np.ldexp(np.float64(base), -exponent)
    x = (m - 1) / (m + 1)
    tail = _fma_polynomial(
        np.float32(x * x), (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
    )
    third = np.float64(np.float32(0.66666662693023681640625)) + np.float64(np.float32(3.69183861259614332084311e-09))
    ln2 = np.float64(np.float32(0.69314718246459960938)) + np.float64(np.float32(-1.904654323148236017e-09))
    log = exponent * ln2 + 2 * x + x * x * x * (x * x * np.float64(tail) + third)

    # exp(d) = 2^q exp(s), with s = d - q ln 2
    d = log * exponents.astype(np.float64)
    q = np.rint(d.astype(np.float32) * np.float32(1.442695040888963407359924681001892137426645954152985934135449406931))
    s = d + q.astype(np.float64) * (
        np.float64(np.float32(-0.693145751953125)) + np.float64(np.float32(-1.428606765330187045e-06))
    )
    second = _fma_polynomial(
        s.astype(np.float32),
        (
            0.00136324646882712841033936,
            0.00836596917361021041870117,
            0.0416710823774337768554688,
            0.166665524244308471679688,
            0.499999850988388061523438,
        ),
    )
    return np.ldexp((1 + s + s * s * second.astype(np.float64)).astype(np.float32), q.astype(np.int32))


def _fma_polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Horner's rule in float32 with one rounding a step; a product of two float32 is exact in float64."""
    value = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = np.float32(np.float64(value) * np.float64(x) + np.float64(np.float32(coefficient)))
    return value
