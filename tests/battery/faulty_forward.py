"""A Qwen2 forward pass in NumPy that can be wrong in every way of the fault table: the other program of the battery.

It shares no code with the model or the converters; of the float64 oracle it takes the inverse frequencies only. It
computes in float64, in float32 as a float32 engine does, or in bfloat16 or float16 (every stage rounded, sums in
float32) with the order of casts of HuggingFace's eager code, to which it is bit-equal but for ties that fall
otherwise: a bias is added before the product is rounded. `FAULTS` says what each name means here, where the table
leaves room for more than one meaning.

What the dump holds: keys and shapes of a trace with a leading batch axis, the layer number being the position in
execution. "attn_scores" are the engine's own scores where its own mask lets a query see a key, and 0 elsewhere: with
`mask-not-causal` there are values above the diagonal, with `mask-window` there are zeros far below it; a mask fault
with the parameter {"scores": "all"} dumps the scores of all pairs, as an engine that masks inside its softmax does.
Rows of padded queries hold no meaning, but are finite where the engine is right.

Letters in shapes: B batch, T query positions, S key positions, N query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.battery.quantisers import QUANTISERS
from tests.oracle import base, inv_freq, rope, window

f32, f64 = np.float32, np.float64
REQUIRED = object()
OUTER = None
"""The "layer" of what lies outside the layers: embedding, final norm, head."""
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
ATTENTION_STAGES = ("attn_scores", "attn_softmax")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a fault's name.

    Attributes:
      meaning: What the engine does wrong.
      parameters: Their names and defaults.
      per_layer: Whether it can be planted in some layers only. Planted in all, it acts on final norm and head too.
    """

    meaning: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    per_layer: bool = True


_NORMS = {"norms": NORMS}
_MASK = {"scores": "own"}
_MASKS = ("mask-not-causal", "mask-off-by-one", "mask-without-window", "mask-window", "mask-chunk")
_TENSOR = {"tensor": REQUIRED}
_BLOCKS_OF_A_LAYER = {"blocks": ("attention", "mlp")}
_UNTURNED = {"heads": None, "pairs": None, "positions": None}
_PART = {"heads": None, "channels": None, "positions": None}

FAULTS: Mapping[str, Kind] = {
    "rope-adjacent-pairs": Kind("rotates (2i, 2i+1), in place"),
    "rope-theta": Kind("base `theta`", {"theta": 1e4}),
    "rope-position": Kind("positions + `shift`, or positions mod `restart`", {"shift": None, "restart": None}),
    "rope-not-on-q": Kind("q before RoPE, in `heads`, `pairs` (i, i + D/2), columns `positions`, or all", _UNTURNED),
    "rope-not-on-k": Kind("k as it was before RoPE, the same", _UNTURNED),
    "rope-part-dims": Kind(
        "the first `share` of the dimensions as a head of that width rotates its own; `cut` own: with its frequencies, "
        "head: with the first of the whole head's, sliced: by HuggingFace's cos and sin of the whole head, cut off",
        {"share": 0.75, "cut": "own"},
    ),
    "rope-scaling": Kind(
        "frequencies by transformers' `rule` linear, ntk (base times factor^(D/(D-2))), yarn (cos and sin times "
        "0.1 ln(factor) + 1), llama3 or dynamic, with `factor` and `original` positions",
        {"rule": "linear", "factor": 4.0, "original": 32768},
    ),
    "rope-unscaled": Kind("plain RoPE, whatever rule the configuration asks for"),
    "rope-precision": Kind(
        "`what` (inv_freq, angles or tables), and `besides` (positions too), rounded to `dtype` bfloat16 or float16",
        {"what": "angles", "dtype": "bfloat16", "besides": ()},
    ),
    "rope-half-dims": Kind(
        "the first D/2 dimensions rotated as a head of that width: pairs (i, i + D/4), theta^(-4i/D)"
    ),
    "rope-sign": Kind("angles negated"),
    "rms-norm-eps": Kind(
        "`eps` in the `norms` named; naming only ['norm'] hits the final one", {"eps": 1e-5, **_NORMS}
    ),
    "norm-weight-missing": Kind("x / rms(x)", _NORMS),
    "norm-weight-plus-one": Kind("(1 + weight) x / rms(x), the sum not rounded to bf16", _NORMS),
    "norm-mean-subtracted": Kind(
        "x - mean(x) in place of x, in numerator and rms alike: LayerNorm without bias", _NORMS
    ),
    "norm-part-of-width": Kind(
        "the squares of the first `columns` are summed, divided by their number (`divisor` those) or the width (all)",
        {"columns": REQUIRED, "divisor": "those", **_NORMS},
    ),
    "norm-before-residual": Kind("each norm but the first reads attn_out or ffn_out without what they are added to"),
    "residual-twice": Kind("`blocks` attention and mlp: 2 x + f(x)", _BLOCKS_OF_A_LAYER),
    "residual-behind-norm": Kind("norm(x) + f(norm(x)), in `blocks`", _BLOCKS_OF_A_LAYER),
    "norm-weight-before-cast": Kind("bf16: one rounding, after the weight; else the same", _NORMS),
    "final-norm-missing": Kind("final_norm is the last layer's output", per_layer=False),
    "qkv-bias-missing": Kind("none of the three; qkv_bias is qkv_matmul"),
    "q-bias-missing": Kind("no q bias"),
    "k-bias-missing": Kind("no k bias"),
    "v-bias-missing": Kind("no v bias"),
    **{f"{name}-bias-twice": Kind(f"the bias of {name} is added once more") for name in ("qkv", "q", "k", "v")},
    "bias-after-rope": Kind("qkv_bias holds the v bias only; those of q and k are added to the rotated values"),
    "mask-not-causal": Kind("all keys seen but padding", _MASK),
    "mask-off-by-one": Kind(
        "key column j <= i + `last`; a query left without keys gives a `empty` row: uniform over all columns (a finite "
        "mask value), self (its own key), or zero",
        {"last": -1, "empty": "uniform", **_MASK},
    ),
    "mask-without-window": Kind("the window of the configuration is not there", _MASK),
    "mask-window": Kind("key columns i - `window` < j <= i, its own key counted", {"window": 16, **_MASK}),
    "mask-chunk": Kind("key columns of the query's own chunk of `size`", {"size": 24, **_MASK}),
    "softmax-scale": Kind("`scale` in place of D^-1/2, in attn_scores", {"scale": 1.0}),
    "softmax-soft-cap": Kind("scores are `cap` tanh(scores / cap), in attn_scores", {"cap": 50.0}),
    "scores-precision": Kind(
        "attn_scores rounded to `dtype` behind the scale; `steps` product: before it as well",
        {"dtype": "float16", "steps": "scores"},
    ),
    "softmax-precision": Kind(
        "attn_softmax rounded to `dtype`; `steps` scores: what it is taken of as well",
        {"dtype": "float16", "steps": "shares"},
    ),
    "cache-precision": Kind(
        "keys or values (`part` k or v) are rounded to `dtype` float16, bfloat16, float8_e4m3, float8_e5m2 or q8_0 "
        "where attention reads them; the stages before are not",
        {"part": "k", "dtype": "float16"},
    ),
    "softmax-partial-warp": Kind(
        "maximum and sum over key columns j with j mod 64 < 32; every seen key keeps its numerator. A query that sees "
        "no such column is computed right"
    ),
    "kv-heads-interleaved": Kind("query head h reads keys and values of head h mod K"),
    "v-heads-swapped": Kind("values of KV head K-1-k in place of k; the stages before keep their order"),
    "o-proj-transposed": Kind(
        "`buffer` 'transposed': buffer of W^T read as [out, in]; 'file': W's as [in, out]", {"buffer": "transposed"}
    ),
    "down-proj-transposed": Kind("the same", {"buffer": "transposed"}),
    "attention-residual-missing": Kind("post_attn_residual is attn_out"),
    "mlp-residual-missing": Kind("post_ffn_residual is ffn_out"),
    "gate-up-swapped": Kind("the two weights change places: ffn_gate holds up's product, ffn_silu is silu of it"),
    "activation-on-up": Kind("ffn_gate and ffn_up are right, ffn_silu is silu(up), ffn_swigl is ffn_silu * gate"),
    "activation-gelu": Kind("x Phi(x), by erf"),
    "activation-gelu-tanh": Kind("its tanh approximation"),
    "activation-relu": Kind("max(x, 0)"),
    "layer-order": Kind("layer order[e] of the file is executed as number e", {"order": REQUIRED}, per_layer=False),
    "layer-skipped": Kind("the dump has one layer less", {"layer": REQUIRED}, per_layer=False),
    "layer-repeated": Kind("twice in a row; the dump has one layer more", {"layer": REQUIRED}, per_layer=False),
    "part-scaled": Kind(
        "in `stage`, `heads` (of width D, or of the attention stages), `channels` or columns of `positions` times "
        "`factor`; the engine goes on with that",
        {"stage": REQUIRED, "factor": 0.85, **_PART},
    ),
    "part-zeroed": Kind("the same with 0", {"stage": REQUIRED, **_PART}),
    "part-exchanged": Kind("`heads` or `channels` of `stage`, in reverse order", {"stage": REQUIRED, **_PART}),
    "stage-scaled": Kind("all values of `stage` times `factor`", {"stage": REQUIRED, "factor": 0.5}),
    "embedding-row-off-by-one": Kind("row id + 1; row 0 for the last id", per_layer=False),
    "embedding-transposed": Kind(
        "as o-proj-transposed; by default the file's [V, hidden] buffer read as [hidden, V]",
        {"buffer": "file"},
        per_layer=False,
    ),
    "head-transposed": Kind(
        "as o-proj-transposed; by default the file's [V, hidden] buffer read as [hidden, V]",
        {"buffer": "file"},
        per_layer=False,
    ),
    "head-missing": Kind("logits all zero", per_layer=False),
    "logits-position": Kind(
        "the head reads column + `shift` (the first or last one where there is none), or the last column (`last`)",
        {"shift": -1, "last": False},
        per_layer=False,
    ),
    "logits-temperature": Kind("logits divided by `temperature`", {"temperature": 0.7}, per_layer=False),
    "logits-soft-cap": Kind("`cap` tanh(logits / cap)", {"cap": 30.0}, per_layer=False),
    "logits-shifted": Kind("flat [B, T, V] rolled: element i moves to i + `shift`", {"shift": 1}, per_layer=False),
    "weights-relabelled": Kind(
        "`tensor`: suffix after model.layers.N., or a whole name; `direction` bf16-as-f16 or f16-as-bf16. A weight "
        "that is not of the first type is rounded to it before",
        {**_TENSOR, "direction": "bf16-as-f16"},
    ),
    "weights-from-another-layer": Kind("`tensor` is read from `layer` of the file", {**_TENSOR, "layer": REQUIRED}),
    "weights-quantised": Kind(
        "`tensor` or 'all' (what `apr import` 0.72.3 quantises: 1024 elements or more, no bias, no norm; embedding and "
        "head too if planted in all layers), `codec` int8, int4 or q4_k (rows padded to 256), or another of CODECS",
        {"tensor": "all", "codec": "int8"},
    ),
    "weights-permuted": Kind(
        "rows of each head of `tensor`: i and i + D/2 become 2i and 2i + 1 (`order` adjacent), or back (halves)",
        {**_TENSOR, "order": "adjacent"},
    ),
    "weights-interleaved": Kind(
        "columns of `tensor` in blocks of `block`: the two halves interleaved (`order` adjacent), or back (halves), or "
        "exchanged (swapped), or each two neighbours (flipped); `codec`: quantised before",
        {**_TENSOR, "block": 32, "order": "adjacent", "codec": None},
    ),
    "sum-cut-short": Kind(
        "of `product`, a weight below the layer, attn_scores, attention or logits, columns `first` to `last` are lost",
        {"product": REQUIRED, "first": REQUIRED, "last": REQUIRED},
    ),
    "activations-quantised": Kind(
        "what is multiplied with the weight of `module`, or of all, is rounded by `codec` q8_k, q8_0, int8 by row, or "
        "float8",
        {"module": "all", "codec": "int8 by row"},
    ),
    "tf32-dots": Kind(
        "inputs of every product with 10 mantissa bits: `mode` round (to nearest; `ties` to even, as in cuBLAS, or "
        "away, as by cvt.rna) or truncate; `sums` float32, or truncated: the running sum is cut off to float32 after "
        "every 8 products (tensor cores)",
        {"mode": "round", "ties": "even", "sums": "float32"},
    ),
    "bf16-accumulation": Kind("the running sum of every product is rounded to bf16 each `chunk` terms", {"chunk": 32}),
    "cache-position": Kind(
        "the first `prefill` columns are right; later ones decode one by one with a cache of slots that are zero until "
        "written: `side` write puts token t into slot t + shift and reads slots 0..t, read finds token j's slot at "
        "j + shift. A slot outside of 0..T-1 is lost, or zero. Columns of the attention stages are what was read",
        {"shift": 1, "prefill": 8, "side": "write"},
    ),
    "padding-attended": Kind("padded keys are seen where the causal mask lets them"),
    "layout": Kind(
        "`kind` heads-major: q_post_rope and k_post_rope as [heads, T, D]; qk-interleaved: in each head of q and k, "
        "dimension i to 2i and i + D/2 to 2i + 1, in qkv_matmul and qkv_bias too; transposed: every [T, X] as [X, T]. "
        "`stages` names others. Buffers of each row of the batch; shapes are nominal",
        {"kind": REQUIRED, "stages": None},
    ),
}


@dataclasses.dataclass(frozen=True)
class Planted:
    """A mistake to make.

    Attributes:
      name: A key of FAULTS.
      layers: Positions in execution; None means all of them, and outside the layers where that applies.
      parameters: As FAULTS says; what is not given has the default there.
    """

    name: str
    layers: tuple[int, ...] | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in FAULTS:
            raise ValueError(f"no such fault: {self.name}")
        kind = FAULTS[self.name]
        if unknown := set(self.parameters) - set(kind.parameters):
            raise ValueError(f"{self.name} has no parameter {sorted(unknown)}; it has {sorted(kind.parameters)}")
        if missing := [key for key, value in self.values.items() if value is REQUIRED]:
            raise ValueError(f"{self.name} needs {missing}")
        if self.layers is not None and not kind.per_layer:
            raise ValueError(f"{self.name} is no fault of single layers")
        if str(self.values.get("tensor")).startswith("model.layers."):
            raise ValueError("a tensor of the layers is named by its suffix, and `layers`")
        if self.name == "rope-position" and (self.values["shift"] is None) == (self.values["restart"] is None):
            raise ValueError("rope-position takes shift or restart")

    @property
    def values(self) -> dict[str, Any]:
        """All parameters, defaults included."""
        return {**FAULTS[self.name].parameters, **self.parameters}

    def acts_on(self, layer: int | None) -> bool:
        """Whether it is planted in this layer, or (None) outside the layers."""
        return self.layers is None or layer in self.layers

    def acts_on_norm(self, norm: str, layer: int | None) -> bool:
        """The same for one of NORMS; the final norm is hit as well where it is named among few."""
        named = norm in self.values["norms"]
        asked_for = norm == "norm" and "norms" in self.parameters
        return named and (self.acts_on(layer) or asked_for)


def forward(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    faults: Sequence[Planted] = (),
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Runs the model, wrong as asked for.

    Args:
      weights: Name -> array of any float type, as `tests.oracle.load` returns them.
      config: config.json's content.
      input_ids: Integers [B, T].
      attention_mask: [B, T], 0 at padding; None means there is none.
      position_ids: [B, T]; None counts the positions that are no padding.
      faults: What to do wrong, all at once. Of two that say the same of one operation, the first counts.
      dtype: "float64", "float32", "bfloat16" or "float16".

    Returns:
      "stage.embedding", "stage.{layer}.{name}", "stage.final_norm" and "logits" -> float32 array, float64 for
      "float64"; shapes as in an APRT dump behind a leading batch axis.
    """
    with np.errstate(all="ignore"):
        dump = _Engine(weights, config, input_ids, attention_mask, position_ids, faults, dtype).run()
        for planted in faults:
            if planted.name == "layout":
                dump = _rearrange(dump, planted, config)
    return dump


def effect(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    planted: Planted | Sequence[Planted] = (),
    dtype: str = "float64",
) -> dict[str, float]:
    """Returns key -> |faulty - right| / |right| for the keys that both dumps have; infinite where not finite.

    Positions that are no padding count; in the attention stages, those keys of them that a right engine sees.
    """
    faults = [planted] if isinstance(planted, Planted) else list(planted)
    inputs = (weights, config, input_ids, attention_mask, position_ids)
    right, wrong = forward(*inputs, dtype=dtype), forward(*inputs, faults, dtype=dtype)
    tokens = np.ones(np.shape(input_ids), bool) if attention_mask is None else np.asarray(attention_mask) != 0
    pairs = np.tril(tokens[:, :, None] & tokens[:, None, :])
    effects = {}
    for key in right.keys() & wrong.keys():
        counted = pairs[:, None] if key.endswith(ATTENTION_STAGES) else tokens[..., None]
        expected, found = (np.where(counted, dump[key], 0).astype(f64) for dump in (right, wrong))
        norm, difference = np.linalg.norm(expected), np.linalg.norm(found - expected)
        share = difference / norm if norm else (math.inf if difference else 0.0)
        effects[key] = float(share) if np.isfinite(share) else math.inf
    return {key: effects[key] for key in right if key in effects}


def at_rows(dump: Mapping[str, np.ndarray], rows: Any) -> dict[str, np.ndarray]:
    """Returns a partial dump of some query positions, as decoding gives it: [B, rows, X], [B, N, rows, S]."""
    return {key: x[:, :, rows] if key.endswith(ATTENTION_STAGES) else x[:, rows] for key, x in dump.items()}


def write_aprt(
    folder: str | pathlib.Path,
    dump: Mapping[str, np.ndarray],
    input_ids: Any,
    attention_mask: Any = None,
    row: int = 0,
    all_logits: bool = False,
) -> None:
    """Writes the tokens of one row as a folder of APRT files with `token_ids.json`; the last logits only, or all.

    Padding is left out, which is right for dumps in the standard layout only.
    """
    folder, ids = pathlib.Path(folder), np.asarray(input_ids)[row]
    tokens = np.flatnonzero(np.ones(ids.shape) if attention_mask is None else np.asarray(attention_mask)[row])
    outer = {"stage.embedding": (0, "layer-0/embedding"), "stage.final_norm": (2**32 - 1, "final_norm")}
    outer["logits"] = (2**32 - 1, "lm_head")
    for key, array in dump.items():
        _, *inner = key.split(".")
        layer, path = outer[key] if key in outer else (int(inner[0]), f"layer-{inner[0]}/{inner[1]}")
        values = array[row][:, tokens][:, :, tokens] if key.endswith(ATTENTION_STAGES) else array[row][tokens]
        values = (values[-1] if key == "logits" and not all_logits else values).astype("<f4")
        file = folder / f"{path}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"APRT" + np.array([layer, values.size], "<u4").tobytes() + values.tobytes())
    (folder / "token_ids.json").write_text(json.dumps(ids[tokens].tolist()))


# --- Numbers ---------------------------------------------------------------------------------------------------------


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, ties to even; float32 in and out. NaN stays NaN."""
    bits = np.ascontiguousarray(x, f32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(f32)
    np.copyto(rounded, f32(np.nan), where=np.isnan(x))
    return rounded


def to_tf32(x: np.ndarray, mode: str, ties: str = "even") -> np.ndarray:
    """Keeps 10 bits of the mantissa of float32 or float64 values: rounded (ties to even or away) or cut off."""
    wide = x.dtype == f64
    dropped = 42 if wide else 13
    bits: Any = np.ascontiguousarray(x).view(np.uint64 if wide else np.uint32)
    if mode == "round":
        odd = (bits >> bits.dtype.type(dropped)) % bits.dtype.type(2)
        half = bits.dtype.type(1 << (dropped - 1))
        bits = bits + (half if ties == "away" else half - 1 + odd)
    kept = (bits >> bits.dtype.type(dropped)) << bits.dtype.type(dropped)
    return np.where(np.isfinite(x), kept.view(x.dtype), x)


def _truncating_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [..., T, n] times b [..., n, m]; after every 8 products what float32 cannot hold is cut off, towards zero."""
    total = np.zeros(())
    for start in range(0, a.shape[-1], 8):
        total = total + a[..., start : start + 8] @ b[..., start : start + 8, :]
        total = (total.view(np.uint64) & ~np.uint64((1 << 29) - 1)).view(f64)
    return total


def relabel(values: np.ndarray, direction: str) -> np.ndarray:
    """Reads the bytes of bfloat16 values as float16, or the reverse; returns float32."""
    if direction == "bf16-as-f16":
        return (to_bfloat16(values).view(np.uint32) >> 16).astype(np.uint16).view(np.float16).astype(f32)
    bits = np.asarray(values, f32).astype(np.float16).view(np.uint16)
    return {"f16-as-bf16": (bits.astype(np.uint32) << 16).view(f32)}[direction]


def quantise(values: np.ndarray, codec: str) -> np.ndarray:
    """Takes float32 values through int8 (one scale), int4 (blocks of 32) or q4_k (blocks of 256) and back."""
    values = np.ascontiguousarray(values, f32)
    if codec == "int8":
        one = f32(abs(values).max() / f32(127)) or f32(1)
        return np.clip(_half_away(values / one), -127, 127) * one
    if codec == "int4":
        blocks = _blocks(values.reshape(1, -1), 32)
        scale = abs(blocks).max(-1, keepdims=True) / f32(7)
        scale = np.where(scale == 0, f32(1), scale)
        coded = np.clip(_half_away(blocks / scale), -8, 7) * scale.astype(np.float16).astype(f32)
        return coded.reshape(-1)[: values.size].reshape(values.shape)
    if codec in CODECS:
        return CODECS[codec](values).astype(f32)
    if codec != "q4_k":
        raise ValueError(f"no such codec: {codec}")
    rows = values.reshape(-1, values.shape[-1])
    coded = _q4_k(_blocks(rows, 256)).reshape(len(rows), -1)
    return coded[:, : rows.shape[1]].reshape(values.shape)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """[..., 256] -> values of Q4_K's 8 sub-blocks of 32 as `apr` quantises them: d sc q - dmin m."""
    # The floor is a literal in `apr`, just below the smallest normal half; it replaces what is not above it.
    sub, least = blocks.reshape(*blocks.shape[:-1], 8, 32), f32(6.1e-5)
    low, high = sub.min(-1), sub.max(-1)
    scales = np.where(high - low > least, (high - low) / f32(15), least)
    minima = np.maximum(-low, f32(0))
    tops = [x.max(-1, keepdims=True) for x in (scales, minima)]
    d, dmin = (np.where(top > least, top / f32(63), least) for top in tops)
    sc, m = np.minimum(_half_away(scales / d), 63)[..., None], np.minimum(_half_away(minima / dmin), 63)[..., None]
    step, offset = d[..., None] * sc, dmin[..., None] * m
    q = np.where(step > 0, np.clip(_half_away((sub + offset) / np.where(step > 0, step, 1)), 0, 15), 0)
    d, dmin = (x.astype(np.float16).astype(f32)[..., None] for x in (d, dmin))
    return (d * sc * q - dmin * m).reshape(blocks.shape)


def to_float(x: np.ndarray, bits: int, least: int, largest: float) -> np.ndarray:
    """Rounds to a float with `bits` of mantissa behind the first, 2^`least` the smallest normal, ties to even; larger
    values become infinite, or the largest where there is no infinity (e4m3)."""
    wide = np.asarray(x, f64)
    step = np.exp2(np.maximum(np.floor(np.log2(np.where(wide == 0, 1, np.abs(wide)))), least) - bits)
    rounded = np.rint(wide / step) * step
    beyond = np.nan if largest == 448 else np.inf
    return np.where(np.abs(rounded) > largest, np.sign(wide) * beyond, rounded).astype(np.asarray(x).dtype)


_NARROW: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "bfloat16": lambda x: to_bfloat16(x).astype(x.dtype),
    "float16": lambda x: x.astype(np.float16).astype(x.dtype),
    "float8_e4m3": lambda x: to_float(x, 3, -6, 448.0),
    "float8_e5m2": lambda x: to_float(x, 2, -14, 57344.0),
    "q8_0": lambda x: QUANTISERS["q8_0"](x.astype(f32)).astype(x.dtype),
}


def by_groups(size: int, levels: int, zero_point: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """Integers with a step for each group of a row; with a zero point, all levels between the extremes and 0."""

    def quantised(values: np.ndarray) -> np.ndarray:
        out = np.empty(values.shape, f32)
        flat, into = values.reshape(-1, values.shape[-1]).astype(f32), out.reshape(-1, values.shape[-1])
        for row, start in itertools.product(range(len(flat)), range(0, flat.shape[1], size or flat.shape[1])):
            part = flat[row, start : start + (size or flat.shape[1])]
            low, high = min(part.min(), f32(0)), max(part.max(), f32(0))
            step = (high - low) / f32(levels) if zero_point else np.abs(part).max() / f32(levels)
            step = step or f32(1)
            zero = np.clip(np.rint(-low / step), 0, levels) if zero_point else 0
            bounds = (0 - zero, levels - zero) if zero_point else (-levels, levels)
            codes = np.rint(part / step) if zero_point else _half_away(part / step)
            into[row, start : start + len(part)] = np.clip(codes, *bounds) * step
        return out

    return quantised


def _fp8_by_row(values: np.ndarray) -> np.ndarray:
    step = np.abs(values).max(-1, keepdims=True) / f32(448)
    return _NARROW["float8_e4m3"](values / np.where(step == 0, f32(1), step)) * step


CODECS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    **{name: QUANTISERS[name] for name in ("q8_0", "q4_0", "q4_1")},
    "int8 by row": by_groups(0, 127),
    "int4 by 64": by_groups(64, 7),
    "int4 with zero points by 32": by_groups(32, 15, zero_point=True),
    "fp16": lambda x: _NARROW["float16"](x),
    "bf16": lambda x: _NARROW["bfloat16"](x),
    "fp8_e4m3": lambda x: _NARROW["float8_e4m3"](x),
    "fp8_e5m2": lambda x: _NARROW["float8_e5m2"](x),
    "fp8_e4m3 by row": _fp8_by_row,
}
"""Further ways to quantise a weight."""


def _blocks(rows: np.ndarray, size: int) -> np.ndarray:
    """[rows, columns] -> [rows, blocks, size], filled up with zeros."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % size))).reshape(len(rows), -1, size)


def _half_away(x: np.ndarray) -> np.ndarray:
    """Rounds to whole numbers, ties away from zero."""
    whole = np.trunc(x)
    return whole + np.where(abs(x - whole) >= 0.5, np.sign(x), 0).astype(x.dtype)


_erf: Any = np.frompyfunc(math.erf, 1, 1)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * ((1 + _erf(x.astype(f64) / math.sqrt(2)).astype(f64)) / 2).astype(x.dtype)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x))) / 2


_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "activation-gelu": _gelu,
    "activation-gelu-tanh": _gelu_tanh,
    "activation-relu": lambda x: np.maximum(x, 0),
}


# --- The model -------------------------------------------------------------------------------------------------------


class _Engine:
    """One run. Arrays are float64 or float32; in bfloat16 they are float32 that hold rounded values."""

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        faults: Sequence[Planted],
        dtype: str,
    ):
        self.weights, self.config, self.faults, self.ids = weights, config, faults, np.asarray(input_ids)
        self.batch, self.length = self.ids.shape
        self.mask = np.ones(self.ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
        counted = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
        self.positions = counted if position_ids is None else np.asarray(position_ids)
        self.n_q, self.n_kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.n_q
        self.order = self._execution_order()
        self.wide: Any = {"float64": f64}.get(dtype, f32)
        rounded = {"bfloat16": to_bfloat16, "float16": lambda x: np.asarray(x, np.float16).astype(f32)}
        self.rounded = rounded.get(dtype, lambda x: np.asarray(x, self.wide))
        if late := [p for p in faults if not set(p.layers or ()) <= set(range(len(self.order)))]:
            raise ValueError(f"no such layer: {late}")
        names = {"all", *weights, *(name.removeprefix("model.layers.0.") for name in weights)}
        if unknown := [p for p in faults if p.values.get("tensor", "all") not in names]:
            raise ValueError(f"no such tensor: {unknown}")

    def run(self) -> dict[str, np.ndarray]:
        shift = 1 if self._of("embedding-row-off-by-one", OUTER) is not None else 0
        rows = (self.ids + shift) % len(self.weights["model.embed_tokens.weight"])
        if transposed := self._of("embedding-transposed", OUTER):
            x = _transposed(self._weight("model.embed_tokens.weight", OUTER), transposed["buffer"])[rows]
        else:
            x = self._weight("model.embed_tokens.weight", OUTER, rows)
        x = self._parts("embedding", x, OUTER)
        dump, update = {"stage.embedding": x}, x
        for layer in range(len(self.order)):
            stages = self._layer(x, update, layer)
            x, update = stages["post_ffn_residual"], stages["ffn_out"]
            dump |= {f"stage.{layer}.{name}": value for name, value in stages.items()}
        read = update if self._has("norm-before-residual", OUTER) else x
        missing = self._of("final-norm-missing", OUTER) is not None
        x = dump["stage.final_norm"] = self._parts(
            "final_norm", x if missing else self._norm(read, "norm", OUTER), OUTER
        )
        dump["logits"] = self._parts("logits", self._logits(x), OUTER)
        return dump

    def _layer(self, x: np.ndarray, update: np.ndarray, layer: int) -> dict[str, np.ndarray]:
        """The stages of a layer; x is the residual stream, to which `update` was added last."""
        s = _Stages(lambda stage, value: self._parts(stage, value, layer))
        without = self._has("norm-before-residual", layer)
        s["attn_norm"] = self._norm(update if without else x, "input_layernorm", layer)
        q, k, v = self._qkv(s, layer)
        self._attention(s, q, k, v, layer)
        s["attn_out"] = self._linear(s["attention"], "self_attn.o_proj", layer)
        s["post_attn_residual"] = self._added(x, s["attn_norm"], s["attn_out"], "attention", layer)
        without = self._has("norm-before-residual", layer)
        s["ffn_norm"] = self._norm(
            s["attn_out" if without else "post_attn_residual"], "post_attention_layernorm", layer
        )
        self._mlp(s, layer)
        s["post_ffn_residual"] = self._added(s["post_attn_residual"], s["ffn_norm"], s["ffn_out"], "mlp", layer)
        return dict(s)

    def _added(self, x: np.ndarray, normed: np.ndarray, update: np.ndarray, block: str, layer: int) -> np.ndarray:
        """The residual stream behind a block."""
        if self._has(f"{block}-residual-missing", layer):
            return update
        twice, behind = (self._of(name, layer) for name in ("residual-twice", "residual-behind-norm"))
        if twice and block in twice["blocks"]:
            x = x + x
        if behind and block in behind["blocks"]:
            x = normed
        return self.rounded(x + update)

    def _parts(self, stage: str, value: np.ndarray, layer: int | None) -> np.ndarray:
        """A stage with some of its heads, channels or positions wrong."""
        for name in ("part-scaled", "part-zeroed", "part-exchanged", "stage-scaled"):
            for planted in self._named(name):
                if planted.values["stage"] == stage and planted.acts_on(layer):
                    value = self._part(name, value, {**_PART, **planted.values})
        return value

    def _part(self, name: str, value: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
        pairs, chosen = value.ndim == 4, np.ones(value.shape, bool)
        if values["heads"] is not None:
            width = 1 if pairs else self.dim
            places = (np.array(values["heads"])[:, None] * width + np.arange(width)).ravel()
        else:
            places = np.arange(value.shape[1 if pairs else 2])
            places = places if values["channels"] is None else np.array(values["channels"])
        chosen = np.isin(np.arange(value.shape[1 if pairs else 2]), places)
        chosen = np.broadcast_to(chosen[:, None, None] if pairs else chosen, value.shape)
        if values["positions"] is not None:
            columns = np.isin(np.arange(self.length), values["positions"])
            chosen = chosen & (columns[:, None])
        if name == "part-exchanged":
            number = len(values["heads"] if values["heads"] is not None else values["channels"])
            backwards = places.reshape(number, -1)[::-1].ravel()
            moved = value.copy()
            moved[(slice(None), places) if pairs else (..., places)] = value[
                (slice(None), backwards) if pairs else (..., backwards)
            ]
            return moved
        factor = values.get("factor", 0.0)
        return np.where(chosen, self.rounded(value * self.wide(factor)), value)

    def _norm(self, x: np.ndarray, norm: str, layer: int | None) -> np.ndarray:
        def of(name: str) -> dict[str, Any] | None:
            return next((p.values for p in self._named(name) if p.acts_on_norm(norm, layer)), None)

        if of("norm-mean-subtracted") is not None:
            x = x - x.mean(-1, keepdims=True)
        eps = (of("rms-norm-eps") or {"eps": self.config["rms_norm_eps"]})["eps"]
        square = (x * x).mean(-1, keepdims=True)
        if part := of("norm-part-of-width"):
            first = x[..., : part["columns"]]
            square = (first * first).sum(-1, keepdims=True, dtype=x.dtype) / self.wide(
                part["columns"] if part["divisor"] == "those" else x.shape[-1]
            )
        unit = x * (1 / np.sqrt(square + self.wide(eps)))
        if of("norm-weight-missing") is not None:
            return self.rounded(unit)
        weight = self._weight("model.norm.weight" if layer is OUTER else norm + ".weight", layer)
        if of("norm-weight-plus-one") is not None:
            weight = 1 + weight
        return self.rounded(weight * (unit if of("norm-weight-before-cast") is not None else self.rounded(unit)))

    def _qkv(self, s: dict[str, np.ndarray], layer: int) -> list[np.ndarray]:
        """Fills qkv_matmul to k_post_rope; returns q, k, v as [B, T, heads, D]."""
        products = [self._product(s["attn_norm"], f"self_attn.{name}_proj", layer) for name in "qkv"]
        product = np.concatenate(products, -1)
        s["qkv_matmul"] = self.rounded(product)
        if any(planted.values.get("stage") == "qkv_matmul" for planted in self.faults):
            product = s["qkv_matmul"]
        biases = [self._weight(f"self_attn.{name}_proj.bias", layer) for name in "qkv"]
        for index, name in enumerate("qkv"):
            if self._has("qkv-bias-missing", layer) or self._has(f"{name}-bias-missing", layer):
                biases[index] = np.zeros_like(biases[index])
            if self._has("qkv-bias-twice", layer) or self._has(f"{name}-bias-twice", layer):
                biases[index] = 2 * biases[index]
        late = self._has("bias-after-rope", layer)
        early = np.concatenate([np.zeros_like(b) if late and index < 2 else b for index, b in enumerate(biases)])
        s["qkv_bias"] = self.rounded(product + early)
        ends = [self.n_q * self.dim, (self.n_q + self.n_kv) * self.dim]
        q, k, v = (x.reshape(self.batch, self.length, -1, self.dim) for x in np.split(s["qkv_bias"], ends, -1))
        turned = []
        for name, x, bias in (("q", q, biases[0]), ("k", k, biases[1])):
            x = self._unrotated(name, x, layer)
            x = self.rounded(x + bias.reshape(-1, self.dim)) if late else x
            s[f"{name}_post_rope"] = x.reshape(self.batch, self.length, -1)
            turned.append(s[f"{name}_post_rope"].reshape(x.shape))
        return [*turned, v]

    def _unrotated(self, name: str, x: np.ndarray, layer: int) -> np.ndarray:
        """q or k [B, T, heads, D] rotated, but for the heads that are not."""
        rotated, left = self._rotated(x, layer), self._of(f"rope-not-on-{name}", layer)
        if left is None:
            return rotated

        def among(part: str, places: np.ndarray) -> np.ndarray:
            return np.ones(len(places), bool) if left[part] is None else np.isin(places, left[part])

        heads, positions = among("heads", np.arange(x.shape[2])), among("positions", np.arange(self.length))
        pairs = among("pairs", np.arange(self.dim) % (self.dim // 2))
        return np.where(positions[:, None, None] & heads[:, None] & pairs, x, rotated)

    def _rotated(self, x: np.ndarray, layer: int) -> np.ndarray:
        config = self.config
        if other := self._of("rope-theta", layer):
            rules = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)]
            config = config | {"rope_theta": other["theta"]}
            config |= {key: config[key] | {"rope_theta": other["theta"]} for key in rules}
        positions = self.positions
        if where := self._of("rope-position", layer):
            positions = positions % where["restart"] if where["restart"] else positions + where["shift"]
        part = self._of("rope-part-dims", layer) or {"share": 1.0, "cut": "own"}
        width = self.dim // 2 if self._has("rope-half-dims", layer) else round(self.dim * part["share"])
        if width % 2:
            raise ValueError(f"{width} dimensions make no pairs")
        reach, whole = int(self.positions.max()) + 1, width if part["cut"] == "own" else self.dim
        frequencies, gain = rope(config, whole, reach)
        if self._has("rope-unscaled", layer):
            frequencies, gain = inv_freq(base(config), whole), 1.0
        if scaled := self._of("rope-scaling", layer):
            frequencies, gain = scaled_frequencies(base(config), whole, reach=reach, **scaled)
        first, second = frequencies[: width // 2], frequencies[: width // 2]
        if part["cut"] == "sliced":
            second = np.concatenate([frequencies, frequencies])[width // 2 : width]
        less = self._of("rope-precision", layer) or {"what": "", "besides": ()}

        def held(what: str, values: np.ndarray) -> np.ndarray:
            return _NARROW[less["dtype"]](values) if what in (less["what"], *less["besides"]) else values

        steps = held("positions", positions.astype(f32))
        sign = -1 if self._has("rope-sign", layer) else 1

        def tables(frequencies: np.ndarray) -> list[np.ndarray]:
            angles = held("angles", steps[..., None] * held("inv_freq", frequencies)).astype(f64)
            made = (held("tables", f(angles).astype(f32) * f32(gain)) for f in (np.cos, lambda x: sign * np.sin(x)))
            return [self.rounded(table)[:, :, None] for table in made]

        (cos, sin), (high_cos, high_sin) = tables(first), tables(second)
        adjacent = self._has("rope-adjacent-pairs", layer)
        low, high = (
            (slice(0, width, 2), slice(1, width, 2)) if adjacent else (slice(width // 2), slice(width // 2, width))
        )
        a, b, r = x[..., low], x[..., high], self.rounded
        turned = x.copy()
        turned[..., low] = r(r(a * cos) - r(b * sin))
        turned[..., high] = r(r(b * high_cos) + r(a * high_sin))
        return turned

    def _attention(self, s: dict[str, np.ndarray], q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int) -> None:
        """Fills attn_scores, attn_softmax and attention from q [B, T, N, D], k and v [B, T, K, D]."""
        heads = np.arange(self.n_q) * self.n_kv // self.n_q
        if self._has("kv-heads-interleaved", layer):
            heads = np.arange(self.n_q) % self.n_kv
        v = v[:, :, ::-1] if self._has("v-heads-swapped", layer) else v
        scale = (self._of("softmax-scale", layer) or {"scale": self.dim**-0.5})["scale"]
        k, v = self._cached("k", k, layer), self._cached("v", v, layer)
        keys = k[:, :, heads].transpose(0, 2, 3, 1)
        products = self.rounded(self._dot(q.swapaxes(1, 2), self._cut_short(keys, "attn_scores", layer), layer))
        less = self._of("scores-precision", layer)
        if less and less["steps"] == "product":
            products = _NARROW[less["dtype"]](products)
        scores = self.rounded(products * self.wide(scale))
        scores = _NARROW[less["dtype"]](scores) if less else scores
        if capped := self._of("softmax-soft-cap", layer):
            scores = self.rounded(self.wide(capped["cap"]) * np.tanh(scores / self.wide(capped["cap"])))
        tokens = self._tokens_read(layer)
        if tokens is not None:  # a slot of the cache that holds nothing is zero, and so are its scores
            scores = np.where(tokens >= 0, scores[:, :, np.arange(self.length)[:, None], tokens], self.wide(0))
        seen = self._visible(layer)[:, None]
        masks = [self._of(name, layer) for name in _MASKS]
        everywhere = any(mask is not None and mask["scores"] == "all" for mask in masks)
        s["attn_scores"] = scores if everywhere else np.where(seen, scores, self.wide(0))
        scores = np.where(seen, s["attn_scores"], scores)
        s["attn_softmax"] = self._softmax(scores, seen, layer)
        shares = s["attn_softmax"] if tokens is None else _by_token(s["attn_softmax"], tokens)
        values = self._cut_short(v[:, :, heads].swapaxes(1, 2), "attention", layer)
        values = self.rounded(self._dot(shares, values, layer))
        s["attention"] = values.swapaxes(1, 2).reshape(self.batch, self.length, -1)

    def _cached(self, part: str, x: np.ndarray, layer: int) -> np.ndarray:
        """Keys or values [B, T, K, D] as the cache holds them."""
        for planted in self._named("cache-precision"):
            if planted.acts_on(layer) and planted.values["part"] == part:
                flat = x.reshape(self.batch, self.length, -1)
                return _NARROW[planted.values["dtype"]](flat).reshape(x.shape)
        return x

    def _visible(self, layer: int) -> np.ndarray:
        """Which columns each query sees, [B, T, S]."""
        query, key = np.arange(self.length)[:, None], np.arange(self.length)
        seen = key <= query + (self._of("mask-off-by-one", layer) or {"last": 0})["last"]
        if self._has("mask-not-causal", layer):
            seen = np.ones_like(seen)
        within = (self._of("mask-window", layer) or {"window": window(self.config, layer)})["window"]
        if not self._has("mask-without-window", layer):
            seen &= key > query - within
        if chunk := self._of("mask-chunk", layer):
            seen &= key >= query // chunk["size"] * chunk["size"]
        keys = np.ones_like(self.mask) if self._has("padding-attended", layer) else self.mask
        return seen & (keys[:, None, :] | (key == query))  # padding sees itself, so that no row of a right run is empty

    def _softmax(self, scores: np.ndarray, seen: np.ndarray, layer: int) -> np.ndarray:
        summed, less = seen, self._of("softmax-precision", layer)
        if less and less["steps"] == "scores":
            scores = _NARROW[less["dtype"]](scores)
        if self._has("softmax-partial-warp", layer):
            lanes = seen & (np.arange(self.length) % 64 < 32)
            summed = np.where(lanes.any(-1, keepdims=True), lanes, seen)
        top = np.where(summed, scores, -np.inf).max(-1, keepdims=True)
        exps = np.where(seen, np.exp(scores - top), self.wide(0))
        shares = exps / np.where(summed, exps, self.wide(0)).sum(-1, keepdims=True)
        shares = _NARROW[less["dtype"]](shares) if less else shares
        empty = (self._of("mask-off-by-one", layer) or {"empty": "uniform"})["empty"]
        instead: dict[str, Any] = {
            "uniform": np.full(2 * (self.length,), 1 / self.length),
            "self": np.eye(self.length),
            "zero": 0,
        }
        return self.rounded(np.where(seen.any(-1, keepdims=True), shares, instead[empty]).astype(self.wide))

    def _tokens_read(self, layer: int) -> np.ndarray | None:
        """Which token's key and value each query finds at each column, [T, S]; -1 for a slot that holds nothing."""
        cache = self._of("cache-position", layer)
        if cache is None:
            return None
        columns = np.arange(self.length)
        tokens = np.tile(columns, (self.length, 1))
        shift, write = cache["shift"], cache["side"] == "write"
        slots = np.full(self.length, -1)
        slots[: cache["prefill"]] = columns[: cache["prefill"]]
        for token in range(cache["prefill"], self.length):
            if 0 <= (slot := token + (shift if write else 0)) < self.length:
                slots[slot] = token
            at = columns if write else columns + shift
            tokens[token] = np.where((at >= 0) & (at < self.length), slots[at % self.length], -1)
        return tokens

    def _mlp(self, s: dict[str, np.ndarray], layer: int) -> None:
        names = ["up", "gate"] if self._has("gate-up-swapped", layer) else ["gate", "up"]
        s["ffn_gate"], s["ffn_up"] = (self._linear(s["ffn_norm"], f"mlp.{name}_proj", layer) for name in names)
        names = ["ffn_up", "ffn_gate"] if self._has("activation-on-up", layer) else ["ffn_gate", "ffn_up"]
        activation = next((f for name, f in _ACTIVATIONS.items() if self._has(name, layer)), _silu)
        s["ffn_silu"] = self.rounded(activation(s[names[0]]))
        s["ffn_swigl"] = self.rounded(s["ffn_silu"] * s[names[1]])
        s["ffn_out"] = self._linear(s["ffn_swigl"], "mlp.down_proj", layer)

    def _logits(self, x: np.ndarray) -> np.ndarray:
        tied = self.config.get("tie_word_embeddings")
        weight = self._weight("model.embed_tokens.weight" if tied else "lm_head.weight", OUTER)
        if transposed := self._of("head-transposed", OUTER):
            weight = _transposed(weight, transposed["buffer"])
        if where := self._of("logits-position", OUTER):
            columns = np.arange(self.length)
            x = x[:, columns * 0 - 1 if where["last"] else np.clip(columns + where["shift"], 0, self.length - 1)]
        logits = self.rounded(self._dot(x, self._cut_short(weight.T, "logits", OUTER), OUTER))
        if heated := self._of("logits-temperature", OUTER):
            logits = self.rounded(logits / self.wide(heated["temperature"]))
        if capped := self._of("logits-soft-cap", OUTER):
            logits = self.rounded(self.wide(capped["cap"]) * np.tanh(logits / self.wide(capped["cap"])))
        if self._has("head-missing", OUTER):
            logits = np.zeros_like(logits)
        shift = (self._of("logits-shifted", OUTER) or {"shift": 0})["shift"]
        return np.roll(logits.ravel(), shift).reshape(logits.shape)

    def _linear(self, x: np.ndarray, module: str, layer: int) -> np.ndarray:
        return self.rounded(self._product(x, module, layer))

    def _product(self, x: np.ndarray, module: str, layer: int) -> np.ndarray:
        weight = self._weight(module + ".weight", layer)
        name = {"self_attn.o_proj": "o-proj-transposed", "mlp.down_proj": "down-proj-transposed"}.get(module)
        if name and (transposed := self._of(name, layer)):
            weight = _transposed(weight, transposed["buffer"])
        rounded = self._of("activations-quantised", layer)
        if rounded and rounded["module"] in ("all", module):
            x = quantised_activations(x, rounded["codec"])
        return self._dot(x, self._cut_short(weight.T, module + ".weight", layer), layer)

    def _cut_short(self, b: np.ndarray, product: str, layer: int | None) -> np.ndarray:
        """What is multiplied from the right, [..., n, m], without the terms that the sum leaves out."""
        for planted in self._named("sum-cut-short"):
            if planted.values["product"] == product and planted.acts_on(layer):
                b = b.copy()
                b[..., planted.values["first"] : planted.values["last"] + 1, :] = 0
        return b

    def _dot(self, a: np.ndarray, b: np.ndarray, layer: int | None) -> np.ndarray:
        """a [..., T, n] times b [..., n, m], summed in the wide type."""
        if tf32 := self._of("tf32-dots", layer):
            a, b = (to_tf32(x, tf32["mode"], tf32["ties"]) for x in (a, b))
            if tf32["sums"] == "truncated":
                return _truncating_sum(a.astype(f64), b.astype(f64)).astype(self.wide)
        partial = self._of("bf16-accumulation", layer)
        if partial is None:
            return a @ b
        chunk, total = partial["chunk"], self.wide(0)
        for start in range(0, a.shape[-1], chunk):
            part = slice(start, start + chunk)
            total = to_bfloat16((total + a[..., part] @ b[..., part, :]).astype(f32)).astype(self.wide)
        return total

    def _weight(self, name: str, layer: int | None, rows: Any = ...) -> np.ndarray:
        """Returns (rows of) a tensor as the engine holds it; inside the layers `name` is what follows the number."""
        chosen = {fault: self._of(fault, layer, name) for fault in FAULTS if fault.startswith("weights-")}
        full = name
        if layer is not OUTER:
            other = chosen["weights-from-another-layer"]
            full = f"model.layers.{other['layer'] if other else self.order[layer]}.{name}"
        values = np.asarray(self.weights[full])
        if relabelled := chosen["weights-relabelled"]:
            values = relabel(np.asarray(values, f32), relabelled["direction"])
        if (quantised := chosen["weights-quantised"]) and (quantised["tensor"] == name or _is_quantised(name, values)):
            values = quantise(values, quantised["codec"])
        for fault, length in (("weights-permuted", self.dim), ("weights-interleaved", None)):
            if moved := chosen[fault]:
                values = quantise(values, moved["codec"]) if moved.get("codec") else values
                values = _in_another_order(values, moved.get("block", length), moved["order"], rows=length is not None)
        return self.rounded(values[rows].astype(self.wide, copy=False))

    def _execution_order(self) -> list[int]:
        """Returns the file's layer of each position in execution."""
        order = list(range(self.config["num_hidden_layers"]))
        if permuted := self._of("layer-order", OUTER):
            if sorted(permuted["order"]) != order:
                raise ValueError(f"{permuted['order']} is no order of {len(order)} layers")
            order = list(permuted["order"])
        for planted in self._named("layer-skipped"):
            order.remove(planted.values["layer"])
        for planted in self._named("layer-repeated"):
            order.insert(order.index(planted.values["layer"]), planted.values["layer"])
        return order

    def _named(self, name: str) -> Iterator[Planted]:
        return (planted for planted in self.faults if planted.name == name)

    def _of(self, name: str, layer: int | None, tensor: str | None = None) -> dict[str, Any] | None:
        """Returns the parameters of the first such fault that acts here (on this tensor), or None."""
        for planted in self._named(name):
            if planted.acts_on(layer) and (tensor is None or planted.values["tensor"] in (tensor, "all")):
                return planted.values
        return None

    def _has(self, name: str, layer: int | None) -> bool:
        return self._of(name, layer) is not None


def _is_quantised(name: str, values: np.ndarray) -> bool:
    """`apr import`'s rule."""
    return values.size >= 1024 and not any(part in name for part in ("bias", "layernorm", "layer_norm", "norm.weight"))


def _in_another_order(weight: np.ndarray, block: int, order: str, rows: bool) -> np.ndarray:
    """Rows, or columns, of each block: the halves interleaved ("adjacent"), or even and odd ones apart ("halves"); the
    halves exchanged ("swapped"), or each two neighbours ("flipped")."""
    count = weight.shape[0] if rows else weight.shape[-1]
    there = {
        "adjacent": np.arange(block).reshape(2, -1).T,
        "halves": np.arange(block).reshape(-1, 2).T,
        "swapped": np.roll(np.arange(block), block // 2),
        "flipped": np.arange(block) ^ 1,
    }[order].ravel()
    places = (np.arange(0, count, block)[:, None] + there).ravel()
    return weight[places] if rows else weight[..., places]


def quantised_activations(x: np.ndarray, codec: str) -> np.ndarray:
    """Activations [B, T, C] through integers or float8 and back, a row at a time."""
    if codec == "q8_k":
        blocks = _blocks(x.reshape(-1, x.shape[-1]), 256)
        step = np.abs(blocks).max(-1, keepdims=True) / 127
        coded = np.rint(blocks / np.where(step == 0, 1, step)) * step
        return coded.reshape(-1, coded.shape[1] * 256)[:, : x.shape[-1]].reshape(x.shape).astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(f32)
    made = {"q8_0": QUANTISERS["q8_0"], "fp8_e4m3": _NARROW["float8_e4m3"], **CODECS}[codec](rows)
    return made.reshape(x.shape).astype(x.dtype)


def scaled_frequencies(
    theta: float, width: int, rule: str, factor: float, original: int, reach: int
) -> tuple[np.ndarray, float]:
    """Inverse frequencies by one of transformers' rules, and what cos and sin are multiplied by."""
    plain = inv_freq(theta, width).astype(f64)
    if rule == "linear":
        return (plain / factor).astype(f32), 1.0
    if rule == "dynamic":
        longer = max(factor * reach / original - (factor - 1), 1.0)
        return inv_freq(theta * longer ** (width / (width - 2)), width), 1.0
    if rule == "ntk":
        return inv_freq(theta * factor ** (width / (width - 2)), width), 1.0
    waves = 2 * math.pi / plain
    if rule == "llama3":
        smooth = (original / waves - 1) / (4 - 1)
        mixed = (1 - smooth) * plain / factor + smooth * plain
        slow, fast = waves > original / 1, waves < original / 4
        return np.where(slow, plain / factor, np.where(fast, plain, mixed)).astype(f32), 1.0
    found = [width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)]
    low, high = max(math.floor(found[0]), 0), min(math.ceil(found[1]), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return (plain / factor * ramp + plain * (1 - ramp)).astype(f32), 0.1 * math.log(factor) + 1


class _Stages(dict[str, np.ndarray]):
    """The stages of a layer, each wrong in part as it is put in."""

    def __init__(self, wrong: Callable[[str, np.ndarray], np.ndarray]):
        super().__init__()
        self.wrong = wrong

    def __setitem__(self, stage: str, value: np.ndarray) -> None:
        super().__setitem__(stage, self.wrong(stage, value))


def _transposed(weight: np.ndarray, buffer: str) -> np.ndarray:
    """Reads a buffer with the axes confused; both ways are W^T where W is square."""
    rows, columns = weight.shape
    return {"transposed": weight.T.reshape(rows, columns), "file": weight.reshape(columns, rows).T}[buffer]


def _by_token(shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Turns shares of slots [B, N, T, S] into shares of tokens; tokens [T, S] says who is where, -1 nobody."""
    result = np.zeros_like(shares)
    rows, columns = np.nonzero(tokens >= 0)
    np.add.at(result, (slice(None), slice(None), rows, tokens[rows, columns]), shares[:, :, rows, columns])
    return result


def _rearrange(dump: Mapping[str, np.ndarray], planted: Planted, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Stores stages in another order of elements."""
    n_q, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // n_q
    kind, stages = planted.values["kind"], planted.values["stages"]
    default: dict[str, tuple[str, ...] | None] = {"heads-major": ("q_post_rope", "k_post_rope"), "transposed": None}
    default["qk-interleaved"] = ("qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope")
    stages = default[kind] if stages is None else stages
    result = dict(dump)
    for key, array in dump.items():
        _, *inner = key.split(".")
        here = planted.layers is None or (len(inner) == 2 and int(inner[0]) in planted.layers)
        chosen = key.split(".")[-1] in stages if stages is not None else not key.endswith(ATTENTION_STAGES)
        if here and chosen:
            result[key] = _stored(array, kind, dim, (n_q + n_kv) * dim)
    return result


def _stored(array: np.ndarray, kind: str, dim: int, qk_width: int) -> np.ndarray:
    batch, length = array.shape[:2]
    if kind == "transposed":
        return array.swapaxes(-1, -2).reshape(array.shape)
    if kind == "heads-major":
        return array.reshape(batch, length, -1, dim).swapaxes(1, 2).reshape(array.shape)
    qk, rest = array[..., :qk_width], array[..., qk_width:]
    halves = qk.reshape(batch, length, -1, 2, dim // 2).swapaxes(-1, -2)
    return np.concatenate([halves.reshape(qk.shape), rest], -1)
