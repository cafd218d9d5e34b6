"""Rotary tables, made once on the host and passed to every program as arrays.

RoPE decides the last digits of a Qwen2 forward pass: one unit in the last place of every inverse frequency moves the
logits by 1.2e-5 (relative L2) at 97 positions and by 1.3e-4 at 1024. So the inverse frequencies here are bit for bit
those that torch computes, the angles are float32 products as in `Qwen2RotaryEmbedding`, and cos and sin are the
correctly rounded float32 values of those angles, the same on every backend and in every dtype.

The rules that stretch a context (`RopeScaling`) change the frequencies, step by step as `modeling_rope_utils.py` of
HuggingFace transformers does it in float32; two of them by the length of the longest sequence of a call.
`frequencies` is the one place that knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.checkpoint.rope_scaling import RopeScaling

# torch's CPU kernels take 2 x 16 float32 at a time (AVX-512) through SLEEF and the rest through the C library.
_TORCH_BLOCK = 32
_f32 = np.float32


def frequencies(config: Qwen2Config, length: int = 0) -> tuple[np.ndarray, float]:
    """Returns what turns the pairs of a head at each position, and what cos and sin are multiplied with.

    Args:
      config: With the base, and the rule if it has one.
      length: Positions of the longest sequence of the call, those in the cache included. Only the rules "dynamic" and
        "longrope" ask for it; 0 is a short one.

    Returns:
      Inverse frequencies, float32 [head_dim / 2], bit-equal to torch as `inverse_frequencies`, and the attention
      factor, 1 but for the rules "yarn" and "longrope".
    """
    rule = config.rope_scaling
    if rule is None:
        return inverse_frequencies(config.rope_theta, config.head_dim), 1.0
    return _RULES[rule.rule](config, rule, length), rule.attention_factor


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
    return _f32(1.0) / _powers(theta, head_dim)


def tables(
    config: Qwen2Config, length: int, reach: int | None = None, *, another_pow: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of the rotary angles of positions 0 .. length-1, float32 [length, head_dim / 2] each.

    Args:
      config: The model's configuration.
      length: Number of positions.
      reach: Positions of the longest sequence of the call, as `frequencies` asks for; None is `length`.
      another_pow: With every frequency but the first, which is 1, one unit in the last place up or down, in turn: what
        another C library may give.
    """
    turns, factor = frequencies(config, length if reach is None else reach)
    if another_pow:
        turns[1::2] = np.nextafter(turns[1::2], _f32(2))
        turns[2::2] = np.nextafter(turns[2::2], _f32(0))
    return _cos_sin(np.arange(length, dtype=_f32)[:, None] * turns, factor)


def relevant_length(config: Qwen2Config, length: int) -> int:
    """Returns a length that has the same frequencies as this one; few rules tell any apart.

    Under "dynamic" those up to `max_position_embeddings` are one, under "longrope" those up to the original length,
    and those beyond it.
    """
    rule = config.rope_scaling
    if rule is None or not rule.depends_on_length:
        return 0
    if rule.rule == "dynamic":
        return max(length, config.max_position_embeddings)
    return rule.original_max_position_embeddings + (length > rule.original_max_position_embeddings)


def step_tables(config: Qwen2Config, length: int, lags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin for tokens that are made one by one, under a rule that depends on the length.

    The token at position p of a row is turned by the frequencies of a call that reaches p + 1 positions, more where
    another row of the batch is longer: what is in the cache keeps the turn that it got.

    Args:
      config: The model's configuration, with such a rule.
      length: Number of positions.
      lags: By how many positions each row is behind the longest, int [B].

    Returns:
      float32 [B, length, head_dim / 2] each.
    """
    reaches = 1 + np.arange(length) + np.asarray(lags)[:, None]
    relevant = np.vectorize(lambda reach: relevant_length(config, int(reach)), otypes=[np.int64])(reaches)
    different, which = np.unique(relevant, return_inverse=True)
    turns = np.stack([frequencies(config, int(reach))[0] for reach in different])[which.reshape(relevant.shape)]
    return _cos_sin(np.arange(length, dtype=_f32)[:, None] * turns, frequencies(config)[1])


def _cos_sin(angles: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns cos and sin of float32 angles, rounded to float32 and then multiplied."""
    wide = angles.astype(np.float64)
    cos, sin = np.cos(wide).astype(_f32), np.sin(wide).astype(_f32)
    return (cos, sin) if factor == 1 else (cos * _f32(factor), sin * _f32(factor))


# --- Rules, in the order and the precision of transformers -----------------------------------------------------------


def _linear(config: Qwen2Config, rule: RopeScaling, length: int) -> np.ndarray:
    """Every frequency divided by the factor."""
    return inverse_frequencies(config.rope_theta, config.head_dim) / _f32(rule.factor)


def _dynamic(config: Qwen2Config, rule: RopeScaling, length: int) -> np.ndarray:
    """A base that grows with the sequence, from `max_position_embeddings` on ("NTK-aware")."""
    longest, width = config.max_position_embeddings, config.head_dim
    if length <= longest:
        stretch = rule.factor * longest / longest - (rule.factor - 1)
        return inverse_frequencies(config.rope_theta * stretch ** (width / (width - 2)), width)
    # There torch has the length as a tensor, and goes on in float32.
    stretched = _f32(rule.factor) * _f32(length) / _f32(longest) - _f32(rule.factor - 1)
    base = _f32(np.float64(stretched) ** (width / (width - 2)))
    return inverse_frequencies(float(base * _f32(config.rope_theta)), width)


def _yarn(config: Qwen2Config, rule: RopeScaling, length: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071): fast pairs stay, slow ones are divided by the factor, a ramp lies between."""
    powers = _powers(config.rope_theta, config.head_dim)
    divided = _f32(1) / (_f32(rule.factor) * powers)
    low, high = (
        config.head_dim
        * np.log(rule.original_max_position_embeddings / (turns * 2 * np.pi))
        / (2 * np.log(config.rope_theta))
        for turns in (rule.beta_fast, rule.beta_slow)
    )
    if rule.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(config.head_dim // 2, dtype=_f32) - _f32(low)) / _f32(high - low), _f32(0), _f32(1))
    kept = _f32(1) - ramp
    return divided * (_f32(1) - kept) + _f32(1) / powers * kept


def _longrope(config: Qwen2Config, rule: RopeScaling, length: int) -> np.ndarray:
    """LongRoPE (arXiv:2402.13753): each frequency has its own divisor, and another one beyond the original length."""
    factors = rule.long_factor if length > rule.original_max_position_embeddings else rule.short_factor
    return _f32(1) / (np.array(factors, _f32) * _powers(config.rope_theta, config.head_dim))


def _llama3(config: Qwen2Config, rule: RopeScaling, length: int) -> np.ndarray:
    """Llama 3.1: short waves stay, long ones are divided by the factor, those between are mixed."""
    plain, original = inverse_frequencies(config.rope_theta, config.head_dim), rule.original_max_position_embeddings
    low, high = rule.low_freq_factor, rule.high_freq_factor
    # torch divides a number by a tensor in two steps.
    waves = _f32(1) / plain * _f32(2 * np.pi)
    long, short = waves > _f32(original / low), waves < _f32(original / high)
    scaled = np.where(long, plain / _f32(rule.factor), plain)
    share = (_f32(1) / waves * _f32(original) - _f32(low)) / _f32(high - low)
    mixed = (_f32(1) - share) * scaled / _f32(rule.factor) + share * scaled
    return np.where(~long & ~short, mixed, scaled)


def _proportional(config: Qwen2Config, rule: RopeScaling, length: int) -> np.ndarray:
    """The first share of the frequencies, divided by the factor; the other pairs are not turned."""
    turned = int(rule.partial_rotary_factor * config.head_dim // 2)
    plain = np.zeros(config.head_dim // 2, _f32)
    plain[:turned] = _f32(1) / _powers(config.rope_theta, config.head_dim, turned)
    return plain / _f32(rule.factor)


_RULES: Mapping[str, Callable[[Qwen2Config, RopeScaling, int], np.ndarray]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


# --- torch's powers --------------------------------------------------------------------------------------------------


def _powers(theta: float, head_dim: int, count: int | None = None) -> np.ndarray:
    """Returns `theta ** (arange(0, 2 count, 2) / head_dim)` as torch computes it in float32; None is all, half as many
    as the head is wide."""
    count = head_dim // 2 if count is None else count
    exponents = np.arange(0, 2 * count, 2, dtype=_f32) / _f32(head_dim)
    blocked = len(exponents) - len(exponents) % _TORCH_BLOCK
    powers = (np.float64(_f32(theta)) ** exponents.astype(np.float64)).astype(_f32)
    powers[:blocked] = _sleef_powf(_f32(theta), exponents[:blocked])
    return powers


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
