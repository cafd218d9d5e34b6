"""What may have gone wrong at a stage: for each stage the sets of mistakes that touch it, fewest first.

Whether one is true is for `explain` to find out, with the formulas of `mistakes`. Parameters that are numbers (a base,
an eps, a scale, a shift) are solved for from the other side's values and not guessed: in closed form where the stage
was dumped, else by how well a later stage is reproduced.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from apr_jax import rotation, round_numbers
from apr_jax.localise import EPSILON
from apr_jax.mistakes import (
    ACTIVATIONS,
    DOTS,
    NORMS,
    PRODUCTS,
    Made,
    Mistake,
    bias_was_added,
    name_rotation,
    norm_input,
    norm_name,
    under,
    visible,
)
from apr_jax.scene import QKV, Scene, Value, head_name, split, unjoin
from converters import codecs

Mistakes = tuple[Mistake, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """A wrong stage.

    Attributes:
      scene: The scene with all positions.
      probe: The scene with some positions, which most hypotheses are judged on.
      key: The stage's key in a trace.
      theirs: The other side's values.
      right: What they should be, from the other side's own inputs.
      tokens: Which positions are theirs and no padding, bool [B, T].
      given: Mistakes that are supposed to have been made before.
      dtype: What the other side declares to compute in.
    """

    scene: Scene
    probe: Scene
    key: str
    theirs: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    given: Mistakes = ()
    dtype: str = "float32"

    @property
    def layer(self) -> int:
        """The layer, -1 outside the layers."""
        return split(self.key)[0]

    @property
    def stage(self) -> str:
        """The bare stage name."""
        return split(self.key)[1]

    @property
    def nothing(self) -> float:
        """Relative difference below which values are taken for right ones, rounded."""
        return max(_NOTHING, 4 * EPSILON[self.dtype])

    def all(self) -> Scene:
        """The scene with all positions in which the given mistakes are made."""
        return self._inputs_of(self.scene)

    def some(self) -> Scene:
        """The same with some positions."""
        return self._inputs_of(self.probe)

    def _inputs_of(self, scene: Scene) -> Scene:
        return dataclasses.replace(under(scene, self.given), target=split(self.key), composed={})

    def their_rows(self) -> Value:
        """Their values at the probe's positions, float64."""
        return self.probe.look(self.stage, self.theirs)

    def value(self, mistakes: Mistakes) -> Value:
        """The stage at the probe's positions, with these mistakes beside the given ones."""
        return under(self.probe, self.given + mistakes).compute(self.key)

    def misfit(self, mistakes: Mistakes) -> float:
        """|theirs - the stage with these mistakes| at the probe's positions, over what is compared."""
        difference = self.their_rows() - self.value(mistakes)
        if self.stage in ("attn_scores", "attn_softmax"):
            difference = difference * visible(Made(()), self.probe)[:, None]
        return float(np.linalg.norm(difference[self._counted(difference)]))

    def _counted(self, values: Value) -> np.ndarray:
        tokens = self.tokens[:, self.probe.columns()]
        if self.stage in ("attn_scores", "attn_softmax"):
            return np.broadcast_to(tokens[:, None], values.shape[:3])
        return tokens


Generator = Callable[[Question], Iterator[Mistakes]]

_SLIGHT = 0.03
"""Relative L2 below which no other matrix is meant: only the same one, rounded or multiplied less precisely."""
_NOTHING = 1e-6
"""The least relative difference that counts, however fine the dtype."""
_QUIET_ROWS = 64
"""How many positions eps is solved from: those of the smallest activations feel it most."""
PRECISIONS = [mistake for mistake, _ in DOTS]


def other_weights(scene: Scene, layer: int, tensor: str, slight: bool = False) -> Iterator[Mistake]:
    """What may stand in a tensor's place: itself quantised and, unless only a slight difference is sought, the same
    one of another layer, or its bytes under another label."""
    right = scene.weight(layer, tensor)
    with np.errstate(over="ignore"):
        half = right.astype(np.float16)
    if np.isfinite(half).all() and (half != right).any():
        yield Mistake.of("weights-quantised", tensor=tensor, codec="fp16")
    if not codecs.stays_float(tensor, right.size):
        for codec in ("int8", "int4", "q4_k"):
            yield Mistake.of("weights-quantised", tensor=tensor, codec=codec)
    if slight:
        return
    for direction in ("bf16-as-f16", "f16-as-bf16"):
        yield Mistake.of("weights-relabelled", tensor=tensor, direction=direction)
    for other in range(scene.config.num_layers if layer >= 0 else 0):
        if other != layer:
            yield Mistake.of("weights-from-another-layer", tensor=tensor, layer=other)


# --- Norms -----------------------------------------------------------------------------------------------------------


def norms(question: Question) -> Iterator[Mistakes]:
    """Another eps, weights left out or plus one, a mean subtracted; a final norm that is missing; another weight."""
    scene, stage, layer = question.all(), question.stage, question.layer
    tokens = question.tokens
    x = norm_input(scene, layer, stage)[tokens]
    quiet = np.argsort((x * x).mean(axis=-1))[:_QUIET_ROWS]
    x, theirs = x[quiet], np.asarray(question.theirs, np.float64)[tokens][quiet]
    if stage == "final_norm":
        yield (Mistake.of("final-norm-missing"),)
    found: list[Mistakes] = []
    labels = [
        None,
        Mistake.of("norm-weight-missing"),
        Mistake.of("norm-weight-plus-one"),
        *other_weights(scene, layer, NORMS[stage]),
    ]
    for label, centred in itertools.product(labels, (False, True)):
        mistakes: Mistakes = () if label is None else (label,)
        mistakes += (Mistake.of("norm-mean-subtracted"),) if centred else ()
        weight = _norm_weight(Made(mistakes), scene, layer, NORMS[stage])
        base = x - x.mean(axis=-1, keepdims=True) if centred else x
        found += [mistakes] if mistakes else []
        for eps in _solve_eps(base, weight, theirs, scene.config.rms_norm_eps, question.nothing):
            found.append((*mistakes, Mistake.of("rms-norm-eps", eps=eps, norms=(norm_name(stage),))))
    yield from sorted(found, key=len)


def _norm_weight(made: Made, scene: Scene, layer: int, tensor: str) -> Value:
    weight = made.weight(scene, layer, tensor)
    if made.has("norm-weight-missing"):
        return np.ones_like(weight)
    return 1 + weight if made.has("norm-weight-plus-one") else weight


def _solve_eps(x: Value, weight: Value, theirs: Value, right: float, nothing: float) -> list[float]:
    """y = r w x with r = 1 / sqrt(mean square + eps): r is fitted for each row, and eps follows from it.

    As r is known to a relative `nothing`, eps is to twice that share of mean square + eps.
    """
    with np.errstate(all="ignore"):
        base = weight * x
        power = (base * base).sum(axis=-1)
        r = (theirs * base).sum(axis=-1) / power
        square = 1 / (r * r)
        eps = square - (x * x).mean(axis=-1)
        # Rows of small activations feel eps most: its error there is that of 1 / r^2.
        weights = square**-2.0
    good = np.isfinite(eps) & np.isfinite(weights)
    if not good.any():
        return []
    solved = float(np.average(eps[good], weights=weights[good]))
    if solved > 10 or abs(solved / right - 1) < 0.005:
        return []
    return round_numbers.epsilons(solved, 2 * nothing * float(np.average(square[good], weights=weights[good])))


# --- Products --------------------------------------------------------------------------------------------------------

TRANSPOSED = {"attn_out": "o-proj-transposed", "ffn_out": "down-proj-transposed"}


def products(question: Question) -> Iterator[Mistakes]:
    """One weight: transposed, swapped, relabelled, another layer's; dot products computed less precisely; both."""
    scene, stage = question.scene, question.stage
    tensor = PRODUCTS[stage][1]
    special: list[Mistake] = []
    if stage in TRANSPOSED:
        special.append(Mistake.of(TRANSPOSED[stage]))
        rows, columns = scene.weight(question.layer, tensor).shape
        special += [Mistake.of(TRANSPOSED[stage], buffer="file")] if rows != columns else []
    if stage in ("ffn_gate", "ffn_up"):
        special.append(Mistake.of("gate-up-swapped"))
    yield from _imprecise(_is_slight(question), special, scene, question.layer, tensor)


def _imprecise(slight: bool, special: Sequence[Mistake], scene: Scene, layer: int, tensor: str) -> Iterator[Mistakes]:
    """Dot products computed less precisely, each other weight, then two of them together."""
    if slight:
        yield from ((precision,) for precision in PRECISIONS)
    found = list(other_weights(scene, layer, tensor, slight))
    others = found if slight else [*special, *found]
    yield from ((other,) for other in others)
    yield from itertools.product(others, PRECISIONS[:3])
    if not slight:
        quantised = [mistake for mistake in found if mistake.name == "weights-quantised"]
        yield from itertools.product(special, quantised)


def _is_slight(question: Question) -> bool:
    theirs = question.their_rows()
    counted = question._counted(theirs)
    return question.misfit(()) < _SLIGHT * float(np.linalg.norm(theirs[counted]))


def logits(question: Question) -> Iterator[Mistakes]:
    """A head that is missing, transposed or relabelled; a buffer that is shifted."""
    if not np.any(question.theirs):
        yield (Mistake.of("head-missing"),)
        return
    slight = _is_slight(question)
    if not slight:
        shift = _roll(question.right, question.theirs)
        yield from [(Mistake.of("logits-shifted", shift=shift),)] if shift else []
    special = [Mistake.of("head-transposed", buffer="file"), Mistake.of("head-transposed", buffer="transposed")]
    yield from _imprecise(slight, special, question.scene, -1, head_name(question.scene.config))


def _roll(ours: Value, theirs: Value) -> int:
    """By how many elements `theirs` is `ours` rolled, from their cross-correlation; positive to higher indices."""
    size = ours.size
    spectrum = np.fft.rfft(np.nan_to_num(theirs).ravel()) * np.fft.rfft(ours.ravel()).conj()
    shift = int(np.argmax(np.fft.irfft(spectrum, size)))
    return shift - size if shift > size // 2 else shift


# --- q, k and v ------------------------------------------------------------------------------------------------------

_Option = tuple[Mistakes, Value]


def projections(question: Question) -> Iterator[Mistakes]:
    """q, k and v products: each of the three on its own, so that three mistakes are three answers."""
    scene = question.some()
    x = scene.get(question.layer, "attn_norm")
    parts = []
    for tensor, theirs in zip(_tensors("weight"), _parts(question), strict=True):
        plain = Made(()).dot(x, scene.weight(question.layer, tensor))
        options: list[_Option] = [((), plain)]
        distance, norm = np.linalg.norm(plain - theirs), np.linalg.norm(theirs)
        if distance >= question.nothing * norm:
            wrong = _imprecise(bool(distance < _SLIGHT * norm), (), scene, question.layer, tensor)
            options += [(m, Made(m).dot(x, Made(m).weight(scene, question.layer, tensor))) for m in wrong]
        parts.append((options, theirs))
    yield _by_part(question, parts)


def biases(question: Question) -> Iterator[Mistakes]:
    """Biases of q, k and v: each there, missing, or another one; over wrong products too, if those were not dumped."""
    scene = question.some()
    bases = np.split(scene.get(question.layer, "qkv_matmul"), _ends(question), axis=-1)
    composed = not scene.dumped((question.layer, "qkv_matmul"))
    parts = []
    for name, base, theirs in zip(QKV, bases, _parts(question), strict=True):
        weight, bias = f"self_attn.{name}.weight", f"self_attn.{name}.bias"
        right, missing = scene.weight(question.layer, bias), (Mistake.of(f"{name[0]}-bias-missing"),)
        options: list[_Option] = [((), base + right), (missing, base)]
        for other in other_weights(scene, question.layer, bias):
            options.append(((other,), base + Made((other,)).weight(scene, question.layer, bias)))
        if composed and _distance(options[:2], theirs) >= question.nothing * np.linalg.norm(theirs):
            x, slight = scene.get(question.layer, "attn_norm"), _distance(options[:2], theirs)
            wrong = _imprecise(bool(slight < _SLIGHT * np.linalg.norm(theirs)), (), scene, question.layer, weight)
            for mistakes in wrong:
                value = Made(mistakes).dot(x, Made(mistakes).weight(scene, question.layer, weight))
                options += [(mistakes, value + right), (mistakes + missing, value)]
        parts.append((options, theirs))
    yield _by_part(question, parts)


def _distance(options: Sequence[_Option], theirs: Value) -> float:
    """How far the nearest option is."""
    return min(float(np.linalg.norm(value - theirs)) for _, value in options)


def _tensors(kind: str) -> list[str]:
    return [f"self_attn.{name}.{kind}" for name in QKV]


def _ends(question: Question) -> np.ndarray:
    return np.cumsum([len(question.scene.weight(question.layer, tensor)) for tensor in _tensors("bias")])[:-1]


def _parts(question: Question) -> list[Value]:
    return np.split(question.their_rows(), _ends(question), axis=-1)


def _by_part(question: Question, parts: Sequence[tuple[Sequence[_Option], Value]]) -> Mistakes:
    """Chooses for each part of the last axis what is nearest to their values."""
    tokens = question.tokens[:, question.probe.columns()]
    chosen = [_closest(options, theirs, tokens) for options, theirs in parts]
    return tuple(dict.fromkeys(mistake for stack in chosen for mistake in stack))


def _closest(options: Sequence[_Option], theirs: Value, tokens: np.ndarray) -> Mistakes:
    """The option nearest to their values; one with more mistakes has to be clearly nearer."""
    best, least = options[0][0], math.inf
    for mistakes, value in options:
        with np.errstate(invalid="ignore"):
            distance = float(np.linalg.norm((value - theirs)[tokens]))
        if distance < 0.3 * least or (distance < least and len(mistakes) <= len(best)):
            best, least = mistakes, distance
    return best


def ropes(question: Question) -> Iterator[Mistakes]:
    """Rotations that are not the right one, and biases added behind the rotation."""
    scene, which = question.all(), 0 if question.stage == "q_post_rope" else 1
    name, late = QKV[which], Mistake.of("bias-after-rope")
    positions = np.where(question.tokens, scene.positions(), -1)
    after = unjoin(np.asarray(question.theirs, np.float64), scene.config)
    found: list[Mistakes] = []
    for extra in ((), (late,)):
        added: Value | float = 0.0
        inner = dataclasses.replace(question, given=question.given + extra).all()
        before = inner.heads(question.layer)[which]
        if extra:
            added = scene.weight(question.layer, f"self_attn.{name}.bias").reshape(-1, scene.config.head_dim)
            before = before - added if bias_was_added(inner, question.layer, which) else before
        for turn in rotation.candidates(before, after - added, positions, scene.config.rope_theta):
            found.append((*extra, *name_rotation(turn, name[0])))
    yield from sorted(filter(None, found), key=len)


# --- Attention -------------------------------------------------------------------------------------------------------

INTERLEAVED = Mistake.of("kv-heads-interleaved")
SWAPPED = Mistake.of("v-heads-swapped")
WARP = Mistake.of("softmax-partial-warp")
_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)


def all_scores(question: Question) -> Iterator[Mistakes]:
    """Another scale, KV heads read in another order, or entries that the engine's own mask left at zero."""
    tokens = question.tokens[:, question.probe.columns()]
    theirs, seen = question.their_rows(), (visible(Made(()), question.probe) & tokens[:, :, None])[:, None]
    found: list[Mistakes] = []
    for mapped in ((), (INTERLEAVED,)):
        raw = question.value(mapped)
        power = float((raw * raw * seen).sum())
        ratio = float((np.where(seen, theirs, 0) * raw).sum()) / power if power else 1.0
        found += [mapped] if mapped else []
        if abs(ratio - 1) > question.nothing:
            scales = round_numbers.scales(ratio * question.scene.config.head_dim**-0.5)
            found += [(*mapped, Mistake.of("softmax-scale", scale=scale)) for scale in scales]
    found += [(precision,) for precision in PRECISIONS]
    yield from sorted(found, key=len)
    tokens = question.tokens[:, None, :, None]
    off = np.where(visible(Made(()), question.scene)[:, None] & tokens, question.theirs - question.right, 0)
    yield from caches(question, np.abs(off).max(axis=(0, 1, 3)), float(np.abs(question.right).max()))
    for mask in wrong_masks(question):
        yield (mask,)
        yield INTERLEAVED, mask


def caches(question: Question, off: np.ndarray, size: float) -> Iterator[Mistakes]:
    """Caches written or read at position + n, where positions are right up to some column.

    Args:
      question: The wrong stage.
      off: By how much each column is off, [T].
      size: The largest right value.
    """
    # What the first wrong column is off by may be little more than rounding.
    nothings = [max(1e-3, times * EPSILON[question.dtype]) for times in (1.25, 2.5, 5.0)]
    firsts = dict.fromkeys(int(np.argmax(off > nothing * size)) for nothing in nothings)
    for first, shift, side in itertools.product(firsts, _SHIFTS, ("write", "read")):
        if first:
            yield (Mistake.of("cache-position", shift=shift, side=side, prefill=first),)


def wrong_masks(question: Question) -> Iterator[Mistake]:
    """Masks that are not the right one; a window's width is read off their values [B, N, T, S]."""
    scene = question.scene
    yield from fixed_masks(scene)
    columns = scene.columns()
    shown = (np.abs(question.theirs).max(axis=1) > 0) & visible(Made(()), scene) & question.tokens[:, :, None]
    window = int(np.where(shown, columns[:, None] - columns + 1, 0).max(initial=0))
    if 0 < window < len(columns):
        yield Mistake.of("mask-window", window=window)


def fixed_masks(scene: Scene) -> Iterator[Mistake]:
    """Wrong masks without a number to find."""
    yield Mistake.of("mask-not-causal")
    for last in (-1, 1):
        mask = Mistake.of("mask-off-by-one", last=last)
        yield mask
        if not visible(Made((mask,)), scene)[scene.tokens()].any(axis=-1).all():
            # What a query that sees nothing gets depends on how the engine masks.
            yield from (Mistake.of("mask-off-by-one", last=last, empty=empty) for empty in ("self", "zero"))
    if (scene.inputs.attention_mask == 0).any():
        yield Mistake.of("padding-attended")


def softmaxes(question: Question) -> Iterator[Mistakes]:
    """Wrong masks, and a sum over part of the keys."""
    masks = list(wrong_masks(question))
    yield from ((mask,) for mask in masks)
    yield (WARP,)
    yield from ((mask, WARP) for mask in masks)


def attentions(question: Question) -> Iterator[Mistakes]:
    """Values of other heads than the right ones."""
    yield (SWAPPED,)
    yield (INTERLEAVED,)
    yield from ((precision,) for precision in PRECISIONS)
    off = np.where(question.tokens, np.abs(question.theirs - question.right).max(axis=-1), 0)
    yield from caches(question, off.max(axis=0), float(np.abs(question.right).max()))
    yield SWAPPED, INTERLEAVED


# --- The rest --------------------------------------------------------------------------------------------------------


def _listed(*mistakes: Mistakes) -> Generator:
    return lambda question: iter(mistakes)


ON_UP = Mistake.of("activation-on-up")
OTHER_ACTIVATIONS = [Mistake.of(name) for name in ACTIVATIONS]


def embeddings(question: Question) -> Iterator[Mistakes]:
    """Neighbouring rows, or a table read under another label."""
    yield (Mistake.of("embedding-row-off-by-one"),)
    yield from ((other,) for other in other_weights(question.scene, -1, "model.embed_tokens.weight"))


GENERATORS: Mapping[str, Generator] = {
    "embedding": embeddings,
    **dict.fromkeys(NORMS, norms),
    "qkv_matmul": projections,
    "qkv_bias": biases,
    "q_post_rope": ropes,
    "k_post_rope": ropes,
    "attn_scores": all_scores,
    "attn_softmax": softmaxes,
    "attention": attentions,
    **dict.fromkeys(PRODUCTS, products),
    "post_attn_residual": _listed((Mistake.of("attention-residual-missing"),)),
    "ffn_silu": _listed(
        *((other,) for other in OTHER_ACTIVATIONS), (ON_UP,), *((ON_UP, other) for other in OTHER_ACTIVATIONS)
    ),
    "ffn_swigl": _listed((ON_UP,)),
    "post_ffn_residual": _listed((Mistake.of("mlp-residual-missing"),)),
    "logits": logits,
}
"""For each dumped stage the hypotheses about it."""
