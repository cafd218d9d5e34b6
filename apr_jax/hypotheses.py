"""What may have gone wrong at a stage: for each stage the mistakes that touch it, alone and stacked.

A hypothesis computes the stage under its mistakes from the other side's own inputs; whether it is true is for `explain`
to find out. Parameters that are numbers (a base, an eps, a scale, a shift) are solved for from the other side's values
and not guessed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax import rotation
from apr_jax.scene import (
    QKV,
    Scene,
    Value,
    head_weight,
    join_heads,
    product,
    scores,
    split_heads,
    unjoin,
)
from converters import codecs, dtypes


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A named mistake with its parameters.

    Attributes:
      name: Its name in the fault table.
      parameters: Sorted (name, value) pairs.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, **parameters: Any) -> Mistake:
        """Builds one from keyword parameters."""
        return cls(name, tuple(sorted(parameters.items())))


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A set of mistakes and what the stage would be under them.

    Attributes:
      mistakes: What is supposed to be wrong.
      value: Computes the stage, float64.
    """

    mistakes: tuple[Mistake, ...]
    value: Callable[[], Value]


def _same(value: Value) -> Value:
    return value


Generator = Callable[[Scene, int, str, Value], Iterator[Hypothesis]]
"""(scene, layer, stage, their value) -> hypotheses, those with fewer mistakes first."""

_NORM_WEIGHTS = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
}


def norms(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Another eps, weights left out or plus one, a mean subtracted; a final norm that is missing; another weight."""
    x = (
        scene.get(layer, "post_attn_residual")
        if stage == "ffn_norm"
        else scene.residual(_position(scene, layer, stage))
    )
    name = _NORM_WEIGHTS[stage]
    where = name.removesuffix(".weight").removeprefix("model.")
    right = scene.weight(layer, name)
    if stage == "final_norm":
        yield Hypothesis((Mistake.of("final-norm-missing"),), partial(_same, x))
    eps = scene.config.rms_norm_eps
    tokens = scene.inputs.attention_mask == 1
    shapes: list[tuple[Mistake | None, Value]] = [
        (None, right),
        (Mistake.of("norm-weight-missing"), np.ones_like(right)),
        (Mistake.of("norm-weight-plus-one"), 1 + right),
        *other_weights(scene, layer, name),
    ]
    found: list[tuple[tuple[Mistake, ...], Value]] = []
    for (label, weight), centred in itertools.product(shapes, (False, True)):
        base = x - x.mean(axis=-1, keepdims=True) if centred else x
        mistakes = [] if label is None else [label]
        mistakes += [Mistake.of("norm-mean-subtracted")] if centred else []
        for solved in (eps, *_solve_eps(base[tokens], weight, theirs[tokens], eps)):
            changed = [] if solved == eps else [Mistake.of("rms-norm-eps", eps=solved, norms=(where,))]
            if mistakes or changed:
                found.append(((*mistakes, *changed), _scaled(base, weight, solved)))
    for stack, value in sorted(found, key=lambda pair: len(pair[0])):
        yield Hypothesis(stack, partial(_same, value))


def _scaled(x: Value, weight: Value, eps: float) -> Value:
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def _solve_eps(x: Value, weight: Value, theirs: Value, right: float) -> list[float]:
    """y = r w x with r = 1 / sqrt(mean square + eps): r is fitted for each row, and eps follows from it."""
    base = weight * x
    power = (base * base).sum(axis=-1)
    usable = power > 0
    if not usable.any():
        return []
    r = (theirs * base).sum(axis=-1)[usable] / power[usable]
    mean_square = (x * x).mean(axis=-1)[usable]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        eps = 1 / (r * r) - mean_square
        # Rows of small activations feel eps most: its error there is that of 1 / r^2.
        weights = (1 / (r * r)) ** -2.0
    good = np.isfinite(eps) & np.isfinite(weights)
    if not good.any():
        return []
    solved = float(np.average(eps[good], weights=weights[good]))
    if not 0 < solved < 10 or abs(solved / right - 1) < 0.005:
        return []
    return list(dict.fromkeys([float(f"{solved:.0e}"), float(f"{solved:.2e}"), solved]))


def _position(scene: Scene, layer: int, stage: str) -> int:
    return scene.config.num_layers if stage == "final_norm" else layer


def products(tensor: str, mistakes: Mapping[str, str]) -> Generator:
    """Hypotheses about x W^T for one weight: transposed, swapped, relabelled, another layer's, rounded inputs."""
    sources = {
        "self_attn.o_proj.weight": "attention",
        "mlp.gate_proj.weight": "ffn_norm",
        "mlp.up_proj.weight": "ffn_norm",
        "mlp.down_proj.weight": "ffn_swigl",
    }

    def generate(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
        x, right = scene.get(layer, sources[tensor]), scene.weight(layer, tensor)
        weights: list[tuple[Mistake, Value]] = []

        def others(slight: bool) -> list[tuple[Mistake, Value]]:
            return ([] if slight else weights) + other_weights(scene, layer, tensor, slight)

        if "transposed" in mistakes:
            name = mistakes["transposed"]
            if right.shape[0] == right.shape[1]:
                weights.append((Mistake.of(name), right.T))
            else:
                weights.append((Mistake.of(name), right.T.reshape(right.shape)))
                weights.append((Mistake.of(name, buffer="file"), right.reshape(right.shape[::-1]).T))
        if "swapped" in mistakes:
            weights.append((Mistake.of("gate-up-swapped"), scene.weight(layer, mistakes["swapped"])))
        yield from _products(x, right, theirs, others)

    return generate


_NOTHING = 1e-6
"""Relative L2 below which one of three parts is taken for right."""
_SLIGHT = 0.03
"""Relative L2 below which no other matrix is meant: only the same one, rounded or multiplied less precisely."""


def _products(
    x: Value, right: Value, theirs: Value, weights: Callable[[bool], Iterable[tuple[Mistake, Value]]]
) -> Iterator[Hypothesis]:
    """Dot products computed less precisely, each other weight, then both together.

    Args:
      x: The inputs [B, T, in].
      right: The weight [out, in].
      theirs: What is to be explained [B, T, out].
      weights: Gives other weights; its argument says whether only slightly different ones come into question.
    """
    difference = float(np.linalg.norm(product(x, right) - theirs))
    slight = difference < _SLIGHT * float(np.linalg.norm(theirs))
    others = list(weights(slight))
    if slight:
        for mistake, dot in DOTS:
            yield Hypothesis((mistake,), partial(dot, x, right))
    for mistake, weight in others:
        yield Hypothesis((mistake,), partial(product, x, weight))
    for (mistake, weight), (precision, dot) in itertools.product(others, DOTS[:3]):
        yield Hypothesis((mistake, precision), partial(dot, x, weight))


def other_weights(scene: Scene, layer: int, tensor: str, slight: bool = False) -> list[tuple[Mistake, Value]]:
    """What may stand in a tensor's place: itself quantised and, unless only a slight difference is sought, the same
    one of another layer, or its bytes under another label."""
    right = scene.weight(layer, tensor)
    found = [
        (Mistake.of("weights-quantised", tensor=tensor, codec=codec), value)
        for codec, value in _quantised(tensor, right)
    ]
    if slight:
        return found
    for direction, (stored, read) in _LABELS.items():
        misread = right.astype(stored).view(read).astype(np.float64)
        if np.isfinite(misread).all():
            found.append((Mistake.of("weights-relabelled", tensor=tensor, direction=direction), misread))
    if layer >= 0:
        for other in range(scene.config.num_layers):
            if other != layer:
                mistake = Mistake.of("weights-from-another-layer", tensor=tensor, layer=other)
                found.append((mistake, scene.weight(other, tensor)))
    return found


_CODECS = {"int8": "apr_q8", "int4": "apr_q4", "q4_k": "q4_k"}


def _quantised(tensor: str, weight: Value) -> Iterator[tuple[str, Value]]:
    """The values that a weight has after `apr import --quantize`, where that would touch it."""
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16).astype(np.float64)
    if (half != weight).any() and np.isfinite(half).all():
        yield "fp16", half
    if codecs.stays_float(tensor, weight.size):
        return
    for name, type_name in _CODECS.items():
        dtype = dtypes.by_name(type_name)
        payload = codecs.quantise(weight.astype(np.float32), type_name, weight.shape)
        columns = dtype.padded_columns(weight.shape, len(payload))
        width = weight.shape[-1] if columns is None else columns + -columns % dtype.block_elements
        out = np.empty(weight.size // weight.shape[-1] * width, np.float32)
        dtype.codec.decode(payload, out)
        yield name, out.reshape(-1, width)[:, : weight.shape[-1]].reshape(weight.shape).astype(np.float64)


_LABELS = {"bf16-as-f16": (ml_dtypes.bfloat16, np.float16), "f16-as-bf16": (np.float16, ml_dtypes.bfloat16)}


def _tf32_round(x: Value) -> Value:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _tf32_truncate(x: Value) -> Value:
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _q8_k(x: Value) -> Value:
    """Blocks of 256 in int8 with one scale each (GGML's Q8_K), as engines round what they multiply with Q4_K."""
    columns = x.shape[-1]
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % 256)]).reshape(*x.shape[:-1], -1, 256)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(scale > 0, scale, 1)) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., :columns]


def _in_bf16(chunk: int) -> Callable[[Value, Value], Value]:
    """x W^T whose running sum is rounded to bf16 after every `chunk` terms."""

    def dot(x: Value, weight: Value) -> Value:
        total = np.zeros((*x.shape[:-1], weight.shape[0]), np.float32)
        for start in range(0, x.shape[-1], chunk):
            part = x[..., start : start + chunk] @ weight[:, start : start + chunk].T
            total = (total + part.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
        return total.astype(np.float64)

    return dot


DOTS: list[tuple[Mistake, Callable[[Value, Value], Value]]] = [
    (Mistake.of("tf32-dots", mode="round"), lambda x, w: product(_tf32_round(x), _tf32_round(w))),
    (Mistake.of("tf32-dots", mode="truncate"), lambda x, w: product(_tf32_truncate(x), _tf32_truncate(w))),
    (Mistake.of("activations-quantised", codec="q8_k"), lambda x, w: product(_q8_k(x), w)),
    *((Mistake.of("bf16-accumulation", chunk=1 << power), _in_bf16(1 << power)) for power in range(9, 2, -1)),
]


def projections(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """q, k and v products: each of the three on its own, so that three mistakes are three answers."""
    x = scene.get(layer, "attn_norm")

    def options(tensor: str, part: Value) -> list[Option]:
        right = scene.weight(layer, tensor)
        if np.linalg.norm(product(x, right) - part) < _NOTHING * np.linalg.norm(part):
            return [((), product(x, right))]
        wrong = _products(x, right, part, lambda slight: other_weights(scene, layer, tensor, slight))
        return [((), product(x, right)), *((hypothesis.mistakes, hypothesis.value()) for hypothesis in wrong)]

    tensors = [f"self_attn.{name}.weight" for name in QKV]
    ends = np.cumsum([len(scene.weight(layer, tensor)) for tensor in tensors])[:-1]
    parts = np.split(theirs, ends, axis=-1)
    yield _by_part(scene, theirs, [options(*pair) for pair in zip(tensors, parts, strict=True)])


def biases(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Biases of q, k and v: each there, missing, or another one."""
    sums: list[list[Option]] = []
    start, base = 0, scene.get(layer, "qkv_matmul")
    for name in QKV:
        tensor = f"self_attn.{name}.bias"
        right = scene.weight(layer, tensor)
        part = base[..., start : start + len(right)]
        start += len(right)
        others = [((mistake,), part + bias) for mistake, bias in other_weights(scene, layer, tensor)]
        sums.append([((), part + right), ((Mistake.of(f"{name[0]}-bias-missing"),), part), *others])
    yield _by_part(scene, theirs, sums)


Option = tuple[tuple[Mistake, ...], Value]


def _by_part(scene: Scene, theirs: Value, parts: Sequence[Sequence[Option]]) -> Hypothesis:
    """Chooses for each part of the last axis what is nearest to their values, and joins the parts."""
    chosen, start = [], 0
    for options in parts:
        width = options[0][1].shape[-1]
        chosen.append(_closest(options, theirs[..., start : start + width], scene))
        start += width
    mistakes = tuple(dict.fromkeys(mistake for stack, _ in chosen for mistake in stack))
    return Hypothesis(mistakes, partial(np.concatenate, [value for _, value in chosen], -1))


def _closest(options: Sequence[Option], theirs: Value, scene: Scene) -> Option:
    """The option nearest to their values; one with more mistakes has to be clearly nearer."""
    tokens = scene.inputs.attention_mask == 1
    best, least = options[0], math.inf
    for option in options:
        distance = float(np.linalg.norm((option[1] - theirs)[tokens]))
        if distance < 0.3 * least or (distance < least and len(option[0]) <= len(best[0])):
            best, least = option, distance
    return best


def ropes(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Rotations that are not the right one, and biases added behind the rotation."""
    which = 0 if stage == "q_post_rope" else 1
    name = QKV[which]
    before, after = scene.heads(layer)[which], unjoin(theirs, scene.config)
    bias = scene.weight(layer, f"self_attn.{name}.bias").reshape(-1, scene.config.head_dim)
    late = Mistake.of("bias-after-rope")
    # The dump may show the input of the rotation with the bias or, rightly for this engine, without it.
    none = np.zeros_like(bias)
    variants = [((), before, none), ((late,), before, bias), ((late,), before - bias, bias)]
    found = []
    for extra, x, added in variants:
        for turn in rotation.candidates(x, after - added, scene.inputs.positions(), scene.config.rope_theta):
            mistakes = (*extra, *name_rotation(turn, name[0]))
            if mistakes:
                found.append((mistakes, x, added, turn))
    for mistakes, x, added, turn in sorted(found, key=lambda item: len(item[0])):
        yield Hypothesis(mistakes, partial(_rotated, scene, x, added, turn))


def _rotated(scene: Scene, x: Value, added: Value, turn: rotation.Rotation) -> Value:
    return join_heads(turn.apply(x, scene.inputs.positions(), scene.config.rope_theta) + added)


def name_rotation(turn: rotation.Rotation, projection: str) -> list[Mistake]:
    """Returns the mistakes that a rotation consists of."""
    if turn.none:
        return [Mistake.of(f"rope-not-on-{projection}")]
    named = []
    if turn.adjacent:
        named.append(Mistake.of("rope-adjacent-pairs"))
    if turn.half:
        named.append(Mistake.of("rope-half-dims"))
    if turn.negated:
        named.append(Mistake.of("rope-sign"))
    if turn.theta is not None:
        named.append(Mistake.of("rope-theta", theta=turn.theta))
    if turn.shift:
        named.append(Mistake.of("rope-position", shift=turn.shift))
    if turn.restart:
        named.append(Mistake.of("rope-position", restart=turn.restart))
    return named


def all_scores(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Another scale, KV heads read in another order, or entries that the engine's own mask left at zero."""
    seen = masks(scene)["right"][:, None]
    maps: dict[tuple[Mistake, ...], Value] = {
        (): scores(scene, layer),
        (Mistake.of("kv-heads-interleaved"),): _interleaved_scores(scene, layer),
    }
    found: list[Option] = []
    for mapped, raw in maps.items():
        power = float((raw * raw * seen).sum())
        ratio = float((np.where(seen, theirs, 0) * raw).sum()) / power if power else 1.0
        if mapped:
            found.append((mapped, raw))
        if abs(ratio - 1) > 1e-3:
            for scale in _near(ratio * scene.config.head_dim**-0.5):
                scaled = raw * (scale * scene.config.head_dim**0.5)
                found.append(((*mapped, Mistake.of("softmax-scale", scale=scale)), scaled))
    for mistake, dot in DOTS:
        found.append(((mistake,), _scores_by(scene, layer, dot)))
    for stack, value in sorted(found, key=lambda pair: len(pair[0])):
        yield Hypothesis(stack, partial(_same, value))
    yield from _stale_scores(scene, theirs, maps[()])
    for mistake, visible in wrong_masks(scene, theirs):
        for mapped, raw in maps.items():
            hidden = np.where(visible[:, None], raw, 0.0)
            yield Hypothesis((*mapped, mistake), partial(_same, hidden))


_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)


def _cache_mistakes(length: int, first: int) -> Iterator[tuple[Mistake, np.ndarray]]:
    """Caches written or read at position + n: which token each query finds at each column, [T, S], -1 for none."""
    for shift, side in itertools.product(_SHIFTS, ("write", "read")):
        tokens = np.tile(np.arange(length), (length, 1))
        slots = np.where(np.arange(length) < first, np.arange(length), -1)
        for token in range(first, length):
            slot = token + shift if side == "write" else token
            if 0 <= slot < length:
                slots[slot] = token
            at = np.arange(length) + (shift if side == "read" else 0)
            tokens[token] = np.where((at >= 0) & (at < length), slots[np.clip(at, 0, length - 1)], -1)
        yield Mistake.of("cache-position", shift=shift, side=side, prefill=first), tokens


def _found(values: Value, tokens: np.ndarray) -> Value:
    """Gathers columns: values [B, N, T, S] at tokens [T, S], 0 where there is none."""
    gathered = np.take_along_axis(values, np.maximum(tokens, 0)[None, None], axis=-1)
    return np.where(tokens >= 0, gathered, 0.0)


def _stale_scores(scene: Scene, theirs: Value, raw: Value) -> Iterator[Hypothesis]:
    """Scores of decoding steps that find other tokens in the cache than they should."""
    seen = masks(scene)["right"][:, None]
    wrong = np.abs(np.where(seen, theirs - raw, 0)).max(axis=(0, 1, 3)) > 1e-3 * np.abs(raw[np.isfinite(raw)]).max()
    first = int(np.argmax(wrong))
    if not wrong[first:].any() or first == 0:
        return
    for mistake, tokens in _cache_mistakes(theirs.shape[-1], first):
        yield Hypothesis((mistake,), partial(_found, raw, tokens))


def _stale_values(scene: Scene, theirs: Value, shares: Value, heads: Value) -> Iterator[Hypothesis]:
    """The same for the values: shares [B, N, T, S] belong to columns, not to tokens."""
    right = _weighted(shares, heads, product)
    wrong = np.abs(theirs - right).max(axis=(0, 2)) > 1e-3 * np.abs(right).max()
    first = int(np.argmax(wrong))
    if not wrong.any() or first == 0:
        return
    length = shares.shape[-1]
    for mistake, tokens in _cache_mistakes(length, first):
        by_token = np.zeros((*shares.shape[:3], length + 1))
        for query in range(length):
            for column, token in enumerate(tokens[query]):
                by_token[:, :, query, token] += shares[:, :, query, column]
        yield Hypothesis((mistake,), partial(_weighted, by_token[..., :length], heads, product))


def _near(value: float) -> list[float]:
    return list(dict.fromkeys([*(float(f"{value:.{digits}e}") for digits in (0, 1, 2, 4)), value]))


def _scores_by(scene: Scene, layer: int, dot: Callable[[Value, Value], Value]) -> Value:
    """Scores whose dot products are computed by `dot`."""
    config = scene.config
    q, k = (unjoin(scene.get(layer, name), config) for name in ("q_post_rope", "k_post_rope"))
    group = config.num_heads // config.num_kv_heads
    rows = [
        [dot(q[b, :, h], k[b, :, h // group]) * config.head_dim**-0.5 for h in range(config.num_heads)]
        for b in range(len(q))
    ]
    return np.array(rows)


def _interleaved_scores(scene: Scene, layer: int) -> Value:
    config = scene.config
    q, k = (unjoin(scene.get(layer, name), config) for name in ("q_post_rope", "k_post_rope"))
    return np.einsum("btnh,bsnh->bnts", q, _interleave(k, config.num_heads), optimize=True) * config.head_dim**-0.5


def _interleave(x: Value, heads: int) -> Value:
    return x[:, :, np.arange(heads) % x.shape[2]]


def masks(scene: Scene) -> dict[str, Value]:
    """The right mask and its parts, bool [B, T, S]: by column, as engines build them."""
    tokens = scene.inputs.attention_mask == 1
    length = tokens.shape[1]
    query, key = np.arange(length)[:, None], np.arange(length)
    own = key == query
    return {
        "right": (key <= query) & (tokens[:, None, :] | own),
        "tokens": tokens[:, None, :] | own,
        "causal": np.broadcast_to(key <= query, (len(tokens), length, length)),
    }


def wrong_masks(scene: Scene, theirs: Value) -> Iterator[tuple[Mistake, Value]]:
    """Masks that are not the right one; a window's width is read off their values [B, N, T, S]."""
    parts = masks(scene)
    length = theirs.shape[-1]
    query, key = np.arange(length)[:, None], np.arange(length)
    yield Mistake.of("mask-not-causal"), np.broadcast_to(parts["tokens"], parts["causal"].shape)
    for last in (-1, 1):
        yield Mistake.of("mask-off-by-one", last=last), (key <= query + last) & parts["tokens"]
    if (scene.inputs.attention_mask == 0).any():
        yield Mistake.of("padding-attended"), parts["causal"]
    tokens = scene.inputs.attention_mask == 1
    widths = (np.abs(theirs).max(axis=1) > 0) & parts["right"]
    distance = np.where(widths & tokens[:, :, None], query - key + 1, 0)
    window = int(distance.max(initial=0))
    if 0 < window < length:
        yield Mistake.of("mask-window", window=window), parts["right"] & (key > query - window)


def softmaxes(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Wrong masks, and a sum over part of the keys."""
    raw = scene.get(layer, "attn_scores")
    right = masks(scene)["right"]
    warp = Mistake.of("softmax-partial-warp")
    single = list(wrong_masks(scene, theirs))
    for mistake, seen in single:
        for empty in ("uniform", "self", "zero"):
            value = softmax(raw, seen[:, None], empty=empty)
            yield Hypothesis((mistake,), partial(_same, value))
            if seen[scene.inputs.attention_mask == 1].any(axis=-1).all():
                break
    yield Hypothesis((warp,), partial(softmax, raw, right[:, None], lanes=True))
    for mistake, seen in single:
        value = softmax(raw, seen[:, None], lanes=True)
        yield Hypothesis((mistake, warp), partial(_same, value))


def softmax(raw: Value, seen: Value, lanes: bool = False, empty: str = "uniform") -> Value:
    """Softmax of [B, N, T, S] over the keys seen; `lanes` takes maximum and sum over the first 32 of every 64."""
    length = raw.shape[-1]
    summed = seen & (np.arange(length) % 64 < 32) if lanes else seen
    summed = np.where(summed.any(axis=-1, keepdims=True), summed, seen)
    top = np.where(summed, raw, -np.inf).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        powers = np.where(seen, np.exp(raw - top), 0.0)
        shares = powers / np.where(summed, powers, 0.0).sum(axis=-1, keepdims=True)
    square = (length, length)
    instead = {"uniform": np.full(square, 1 / length), "self": np.eye(length), "zero": np.zeros(square)}[empty]
    return np.where(seen.any(axis=-1, keepdims=True), shares, instead)


def attentions(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Values of other heads than the right ones."""
    shares, config = scene.get(layer, "attn_softmax"), scene.config
    v = split_heads(scene.get(layer, "qkv_bias"), config)[2]
    group = config.num_heads // config.num_kv_heads
    swapped, interleaved = Mistake.of("v-heads-swapped"), Mistake.of("kv-heads-interleaved")
    spread: list[Option] = [
        ((swapped,), np.repeat(v[:, :, ::-1], group, axis=2)),
        ((interleaved,), _interleave(v, config.num_heads)),
        ((swapped, interleaved), _interleave(v[:, :, ::-1], config.num_heads)),
    ]
    for mistakes, heads in spread:
        yield Hypothesis(mistakes, partial(_weighted, shares, heads, product))
    for mistake, dot in DOTS:
        yield Hypothesis((mistake,), partial(_weighted, shares, np.repeat(v, group, axis=2), dot))
    yield from _stale_values(scene, theirs, shares, np.repeat(v, group, axis=2))


def _weighted(shares: Value, heads: Value, dot: Callable[[Value, Value], Value]) -> Value:
    """[B, N, T, S] times one v for each query head [B, S, N, H] -> [B, T, N * H]."""
    batch, count = shares.shape[:2]
    rows = [[dot(shares[b, h], heads[b, :, h].T) for h in range(count)] for b in range(batch)]
    return join_heads(np.array(rows).transpose(0, 2, 1, 3))


def residual_missing(name: str, update: str) -> Generator:
    """The stream is replaced by the update."""

    def generate(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
        yield Hypothesis((Mistake.of(name),), partial(scene.get, layer, update))

    return generate


def _gelu(x: Value) -> Value:
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def _gelu_tanh(x: Value) -> Value:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Value) -> Value:
    return x / (1 + np.exp(-x))


_ACTIVATIONS = {
    "": _silu,
    "activation-gelu": _gelu,
    "activation-gelu-tanh": _gelu_tanh,
    "activation-relu": lambda x: np.maximum(x, 0.0),
}


def activations(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Another function than silu, on the gate or on up."""
    on_up = Mistake.of("activation-on-up")
    for extra, source in (((), "ffn_gate"), ((on_up,), "ffn_up")):
        for name, function in _ACTIVATIONS.items():
            mistakes = (*extra, *([Mistake.of(name)] if name else []))
            if mistakes:
                yield Hypothesis(mistakes, partial(function, scene.get(layer, source)))


def gated(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """The gate where up belongs."""
    value = scene.get(layer, "ffn_silu") * scene.get(layer, "ffn_gate")
    yield Hypothesis((Mistake.of("activation-on-up"),), partial(_same, value))


def embeddings(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """Neighbouring rows, or a table read under another label."""
    table = scene.weight(-1, "model.embed_tokens.weight")
    ids = (scene.inputs.input_ids + 1) % len(table)
    yield Hypothesis((Mistake.of("embedding-row-off-by-one"),), partial(_same, table[ids]))
    for mistake, other in other_weights(scene, -1, "model.embed_tokens.weight"):
        yield Hypothesis((mistake,), partial(_same, other[scene.inputs.input_ids]))


def logits(scene: Scene, layer: int, stage: str, theirs: Value) -> Iterator[Hypothesis]:
    """A head that is missing, transposed or relabelled; a buffer that is shifted."""
    x, right = scene.get(-1, "final_norm"), head_weight(scene)
    if theirs.shape[1] == 1:
        x = _last_tokens(x, scene)
    name = "model.embed_tokens.weight" if scene.config.tie_word_embeddings else "lm_head.weight"
    if not theirs.any():
        yield Hypothesis((Mistake.of("head-missing"),), partial(_same, np.zeros_like(theirs)))
        return
    plain = product(x, right)
    if plain.shape == theirs.shape and (shift := _roll(plain, theirs)):
        moved = np.roll(plain.ravel(), shift).reshape(plain.shape)
        yield Hypothesis((Mistake.of("logits-shifted", shift=shift),), partial(_same, moved))
    transposed = [
        (Mistake.of("head-transposed"), right.reshape(right.shape[::-1]).T),
        (Mistake.of("head-transposed", buffer="transposed"), right.T.reshape(right.shape)),
    ]
    yield from _products(
        x, right, theirs, lambda slight: ([] if slight else transposed) + other_weights(scene, -1, name, slight)
    )


def _last_tokens(x: Value, scene: Scene) -> Value:
    """The last token of each row, [B, 1, D]."""
    last = np.where(scene.inputs.attention_mask == 1, np.arange(x.shape[1]), -1).max(axis=1)
    return x[np.arange(len(x)), last][:, None]


def _roll(ours: Value, theirs: Value) -> int:
    """By how many elements `theirs` is `ours` rolled, from their cross-correlation; positive to higher indices."""
    size = ours.size
    spectrum = np.fft.rfft(np.nan_to_num(theirs).ravel()) * np.fft.rfft(ours.ravel()).conj()
    shift = int(np.argmax(np.fft.irfft(spectrum, size)))
    return shift - size if shift > size // 2 else shift


GENERATORS: dict[str, Generator] = {
    "embedding": embeddings,
    "attn_norm": norms,
    "qkv_matmul": projections,
    "qkv_bias": biases,
    "q_post_rope": ropes,
    "k_post_rope": ropes,
    "attn_scores": all_scores,
    "attn_softmax": softmaxes,
    "attention": attentions,
    "attn_out": products("self_attn.o_proj.weight", {"transposed": "o-proj-transposed"}),
    "post_attn_residual": residual_missing("attention-residual-missing", "attn_out"),
    "ffn_norm": norms,
    "ffn_gate": products("mlp.gate_proj.weight", {"swapped": "mlp.up_proj.weight"}),
    "ffn_up": products("mlp.up_proj.weight", {"swapped": "mlp.gate_proj.weight"}),
    "ffn_silu": activations,
    "ffn_swigl": gated,
    "ffn_out": products("mlp.down_proj.weight", {"transposed": "down-proj-transposed"}),
    "post_ffn_residual": residual_missing("mlp-residual-missing", "ffn_out"),
    "final_norm": norms,
    "logits": logits,
}
