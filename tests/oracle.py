"""The float64 oracle: a Qwen2 forward pass in plain NumPy that shares no code with the model or the converters.

Written to be read beside the formulas: one line per operation, no layers, no classes. Letters in the einsums: B batch,
T query position, S key position, K key/value head, G query heads per key/value head, D head dimension.

Rotary angles are part of the definition, not of the arithmetic under test: `inv_freq` is torch's float32 value, an
angle is float32(position) * inv_freq in float32, its cosine and sine are rounded to float32 once; from there on all is
float64. Rules that stretch the context are written from their papers, in float64 and rounded once.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import safetensors

f32, f64 = np.float32, np.float64


def load(folder: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a HuggingFace folder; returns name -> float64 array, and the content of config.json."""
    folder = pathlib.Path(folder)
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            if tensor["dtype"] == "BF16":
                values = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(f32)
            else:
                values = np.frombuffer(tensor["data"], {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor["dtype"]])
            weights[name] = values.reshape(tensor["shape"]).astype(f64)
    return weights, json.loads((folder / "config.json").read_text())


def forward(
    weights: dict[str, np.ndarray],
    config: dict[str, Any],
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Runs the model in float64.

    Args:
      weights: Name -> array, as `load` returns them.
      config: config.json's content.
      input_ids: Integers [B, T].
      attention_mask: [B, T], 0 where a position is padding; None means none is. Rows of padded queries hold no meaning.
      position_ids: [B, T]; None counts the positions that are no padding, as HuggingFace's generate() does.

    Returns:
      Logits float64 [B, T, vocab], and stage -> float64 array: "embedding", "final_norm" and "{layer}.{name}", with the
      names and shapes of an APRT dump behind a leading batch axis. "attn_scores" is 0 where the key is not visible.
    """
    ids = np.asarray(input_ids)
    batch, length = ids.shape
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) if position_ids is None else np.asarray(position_ids)
    n_q, n_kv = config["num_attention_heads"], config["num_key_value_heads"] or config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // n_q
    frequencies, factor = rope(config, dim, int(positions.max()) + 1)
    angles = positions.astype(f32)[..., None] * frequencies
    cos, sin = ((f(angles.astype(f64)).astype(f32) * f32(factor)).astype(f64)[:, :, None] for f in (np.cos, np.sin))
    # A padded query sees at least itself, so that no row is empty; that changes nothing for the others.
    causal = np.tril(np.ones((length, length), bool)) & (mask[:, None, :] | np.eye(length, dtype=bool))
    behind = np.arange(length)[:, None] - np.arange(length)
    stages: dict[str, np.ndarray] = {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w(name)

    def rotate(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x.reshape(batch, length, -1, dim), 2, -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def w(name: str) -> np.ndarray:
        return np.asarray(weights[name + ".weight"], f64)

    x = w("model.embed_tokens")[ids]
    stages["embedding"] = x
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        s = {}
        visible = causal & (behind < window(config, layer))
        s["attn_norm"] = norm(x, p + "input_layernorm")
        qkv = [p + f"self_attn.{name}_proj" for name in "qkv"]
        s["qkv_matmul"] = np.concatenate([s["attn_norm"] @ w(name).T for name in qkv], -1)
        s["qkv_bias"] = s["qkv_matmul"] + np.concatenate([np.asarray(weights[name + ".bias"], f64) for name in qkv])
        q, k, v = np.split(s["qkv_bias"], [n_q * dim, (n_q + n_kv) * dim], -1)
        q, k, v = rotate(q), rotate(k), v.reshape(batch, length, n_kv, dim)
        s["q_post_rope"], s["k_post_rope"] = q.reshape(batch, length, -1), k.reshape(batch, length, -1)
        grouped = q.reshape(batch, length, n_kv, n_q // n_kv, dim)
        scores = np.einsum("BTKGD,BSKD->BKGTS", grouped, k).reshape(batch, n_q, length, length) / np.sqrt(dim)
        s["attn_scores"] = np.where(visible[:, None], scores, 0.0)
        scores = np.where(visible[:, None], scores, -np.inf)
        exps = np.exp(scores - scores.max(-1, keepdims=True))
        s["attn_softmax"] = exps / exps.sum(-1, keepdims=True)
        shares = s["attn_softmax"].reshape(batch, n_kv, n_q // n_kv, length, length)
        s["attention"] = np.einsum("BKGTS,BSKD->BTKGD", shares, v).reshape(batch, length, -1)
        s["attn_out"] = s["attention"] @ w(p + "self_attn.o_proj").T
        s["post_attn_residual"] = x + s["attn_out"]
        s["ffn_norm"] = norm(s["post_attn_residual"], p + "post_attention_layernorm")
        s["ffn_gate"], s["ffn_up"] = (s["ffn_norm"] @ w(p + f"mlp.{name}_proj").T for name in ("gate", "up"))
        s["ffn_silu"] = s["ffn_gate"] / (1.0 + np.exp(-s["ffn_gate"]))
        s["ffn_swigl"] = s["ffn_silu"] * s["ffn_up"]
        s["ffn_out"] = s["ffn_swigl"] @ w(p + "mlp.down_proj").T
        x = s["post_ffn_residual"] = s["post_attn_residual"] + s["ffn_out"]
        stages |= {f"{layer}.{name}": value for name, value in s.items()}
    stages["final_norm"] = norm(x, "model.norm")
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return stages["final_norm"] @ w(head).T, stages


def window(config: dict[str, Any], layer: int) -> float:
    """Returns how many keys a query of a layer sees, itself included; infinite is all before it."""
    types = config.get("layer_types")
    has = layer >= config.get("max_window_layers", 28) if types is None else types[layer] == "sliding_attention"
    return config["sliding_window"] if config.get("use_sliding_window") and has else np.inf


def base(config: dict[str, Any]) -> float:
    """Returns the rotary base, wherever it stands."""
    rule = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rule.get("rope_theta") or config.get("rope_theta") or 1e4


def rope(config: dict[str, Any], dim: int, length: int) -> tuple[np.ndarray, float]:
    """Returns the rotary frequencies of a batch of this length, float32 [dim / 2], and what cos and sin are times.

    The formulas of the papers, in float64: position interpolation (arXiv:2306.15595), NTK-aware scaling by the length,
    YaRN (arXiv:2309.00071, section 3.2 and equation 22), LongRoPE (arXiv:2402.13753, with the attention of its Phi-3),
    Llama 3.1 (`apply_scaling` of its reference code). Plain RoPE is torch's bit for bit.
    """
    rule = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rule.get("rope_type") or rule.get("type") or "default"
    theta = base(config)
    if kind == "default":
        return inv_freq(theta, dim), 1.0
    longest = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or rule.get("original_max_position_embeddings") or longest
    s = rule.get("factor") or longest / original
    plain, attention = f64(theta) ** (-np.arange(0, dim, 2) / dim), 1.0
    if kind == "linear":
        made = plain / s
    elif kind == "dynamic":
        grown = theta * (s * max(length, longest) / longest - (s - 1)) ** (dim / (dim - 2))
        made = grown ** (-np.arange(0, dim, 2) / dim)
    elif kind == "yarn":
        bounds = [
            dim * np.log(original / (2 * np.pi * turns)) / (2 * np.log(theta))
            for turns in (rule.get("beta_fast") or 32, rule.get("beta_slow") or 1)
        ]
        if rule.get("truncate", True):
            bounds = [np.floor(bounds[0]), np.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], dim - 1)
        gamma = np.clip((np.arange(dim // 2) - low) / (high - low or 1e-3), 0, 1)
        made = plain * (1 - gamma) + plain / s * gamma
        top, bottom = rule.get("mscale") or 0, rule.get("mscale_all_dim") or 0
        top, bottom = (top, bottom) if top and bottom else (1, 0)
        attention = (0.1 * top * np.log(s) + 1) / (0.1 * bottom * np.log(s) + 1) if s > 1 else 1.0
    elif kind == "longrope":
        made = plain / np.array(rule["long_factor" if length > original else "short_factor"])
        attention = np.sqrt(1 + np.log(s) / np.log(original)) if s > 1 else 1.0
    elif kind == "llama3":
        turns = original * plain / (2 * np.pi)
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        made = (1 - smooth) * plain / s + smooth * plain
    else:
        share = int((rule.get("partial_rotary_factor") or 1) * dim // 2)
        made = np.where(np.arange(dim // 2) < share, plain / (rule.get("factor") or 1), 0)
    return made.astype(f32), float(rule.get("attention_factor") or attention)


def loss_nats(logits: np.ndarray, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> float:
    """Returns the mean next-token cross-entropy over the pairs in which neither position is padding."""
    logits, ids = np.asarray(logits, f64)[:, :-1], np.asarray(input_ids)
    mask = np.ones(ids.shape) if attention_mask is None else np.asarray(attention_mask)
    pairs = (mask[:, :-1] * mask[:, 1:]) != 0
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return float((log_sum - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0])[pairs].mean())


def inv_freq(theta: float, dim: int) -> np.ndarray:
    """Returns torch's float32 `1 / theta ** (arange(0, dim, 2) / dim)` bit for bit, [dim / 2].

    On a CPU with AVX-512, torch raises whole blocks of 32 elements to a power with SLEEF's powf (1.0 ulp: one value in
    80 is not the nearest), the rest with the C library's, which gives the nearest float but for one value in 10^4.
    """
    exponents = np.arange(0, dim, 2).astype(f32) / f32(dim)
    powers = np.power(f64(f32(theta)), exponents.astype(f64)).astype(f32)
    blocks = exponents.size // 32 * 32
    powers[:blocks] = _sleef_pow(f32(theta), exponents[:blocks])
    return f32(1) / powers


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """float32 a * b + c, rounded once: the float64 sum is rounded to odd, so that the second rounding is right."""
    product, c = np.multiply(a, b, dtype=f64), np.asarray(c, f64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1) * ((error != 0) & (bits % 2 == 0))
    return (bits + step).view(f64).astype(f32)


def _sleef_pow(x: np.float32, y: np.ndarray) -> np.ndarray:
    """x ** y for x > 1 and 0 <= y < 1 as SLEEF 3's powf_u10 with FMA: exp(y log x) on pairs (high, low) of float32."""

    def fast(a: Any, b: Any) -> Any:  # |a| >= |b|
        high = a[0] + b[0]
        return high, ((a[0] - high) + b[0]) + a[1] + b[1]

    def add(a: Any, b: Any) -> Any:
        high = a[0] + b[0]
        back = high - a[0]
        return high, ((a[0] - (high - back)) + (b[0] - back)) + (a[1] + b[1])

    def times(a: Any, b: Any) -> Any:
        high = a[0] * b[0]
        return high, _fma(a[0], b[1], _fma(a[1], b[0], _fma(a[0], b[0], -high)))

    def square(a: Any) -> Any:
        high = a[0] * a[0]
        return high, _fma(a[0] + a[0], a[1], _fma(a[0], a[0], -high))

    def over(a: Any, b: Any) -> Any:
        inverse = f32(1) / b[0]
        high = a[0] * inverse
        rest = _fma(-b[1], inverse, _fma(-b[0], inverse, f32(1)))
        return high, _fma(high, rest, _fma(a[1], inverse, _fma(inverse, a[0], -high)))

    def polynomial(at: Any, *coefficients: float) -> Any:
        value = np.full_like(at, coefficients[0])
        for c in coefficients[1:]:
            value = _fma(value, at, f32(c))
        return value

    zero, one = np.zeros_like(y), np.ones_like(y)
    exponent = np.frexp(x * f32(1 / 0.75))[1] - 1
    mantissa = one * np.ldexp(x, -exponent)
    r = over(add((-one, zero), (mantissa, zero)), add((one, zero), (mantissa, zero)))
    r2 = square(r)
    t = polynomial(r2[0], 0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
    tail = add(times(r2, (t, zero)), (one * f32(0.66666662693023681640625), one * f32(3.69183861259614332084311e-09)))
    log = times((one * f32(0.69314718246459960938), one * f32(-1.904654323148236017e-09)), (one * f32(exponent), zero))
    log = fast(fast(log, (r[0] * 2, r[1] * 2)), times(times(r2, r), tail))
    z = times(log, (y, zero))
    n = np.rint((z[0] + z[1]) * f32(1.4426950408889634))
    z = add(add(z, (n * f32(-0.693145751953125), zero)), (n * f32(-1.428606765330187045e-06), zero))
    z = (z[0] + z[1], (z[0] - (z[0] + z[1])) + z[1])
    u = polynomial(
        z[0],
        0.00136324646882712841033936,
        0.00836596917361021041870117,
        0.0416710823774337768554688,
        0.166665524244308471679688,
        0.499999850988388061523438,
    )
    high, low = fast((one, zero), fast(z, times(square(z), (u, zero))))
    return np.ldexp(high + low, n.astype(np.int32))
