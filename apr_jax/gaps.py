"""Mistakes at stages that were not dumped, as in engines with fused kernels: looked for at the first dumped stage
behind them.

A fused attention shows q, k and v at best, and then what comes out. What went wrong in between is found by making each
mistake that the gap allows, alone and together with others, until the dumped stage is reproduced. Numbers are solved
for by how well it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from apr_jax import round_numbers
from apr_jax.hypotheses import (
    GENERATORS,
    INTERLEAVED,
    ON_UP,
    OTHER_ACTIVATIONS,
    PRECISIONS,
    SWAPPED,
    TRANSPOSED,
    WARP,
    Mistakes,
    Question,
    caches,
    fixed_masks,
    other_weights,
)
from apr_jax.mistakes import NORMS, PRODUCTS, Mistake, norm_name
from apr_jax.scene import QKV, Node, head_name, split

_LONGEST = 24
"""A gap of more stages than a layer and a half is not searched: too many mistakes could hide in it."""
_KEPT = 8
"""How many of the best stacks are built on."""
_MOST = 3
"""As many mistakes are stacked before one dumped stage."""
_NO_EFFECT = 1e-9
"""A mistake that changes less than this share of the difference cannot be seen at the stage."""


def hypotheses(question: Question, left: Mapping[Mistakes, float]) -> Iterator[Mistakes]:
    """Yields the hypotheses about a wrong stage: its own, and those about what was not dumped before it.

    Args:
      question: The stage.
      left: What share of the difference each hypothesis so far leaves; filled in between.
    """
    nodes = question.scene.undumped(split(question.key))
    own = filter(None, GENERATORS[question.stage](question))
    if len(nodes) == 1 or len(nodes) > _LONGEST:
        yield from own
        return
    stacks = list(own)
    yield from (stack for stack in stacks if len(stack) == 1)
    plain, weights = _made_before(nodes, question)
    singles = [(mistake,) for mistake in (*plain, *weights)]
    yield from singles
    yield from _solved(nodes, question)
    yield from _all_quantised(nodes, question)
    yield from (stack for stack in stacks if len(stack) > 1)
    yield from _stacked(nodes, question, plain, weights, left)


def _stacked(
    nodes: Sequence[Node],
    question: Question,
    plain: Sequence[Mistake],
    weights: Sequence[Mistake],
    left: Mapping[Mistakes, float],
) -> Iterator[Mistakes]:
    """Two mistakes, all combinations; then more on the best of them."""
    seen = [mistake for mistake in (*plain, *weights) if abs(left.get((mistake,), 0.0) - 1) > _NO_EFFECT]
    bases: list[Mistakes] = [(mistake,) for mistake in plain if mistake in seen]
    others = [mistake for mistake in seen if mistake.name != "weights-from-another-layer"]
    longer: list[Mistakes] = []
    for count in range(2, _MOST + 1):
        made: dict[frozenset[Mistake], Mistakes] = {}
        longer = [stack for stack in longer if len(stack) > count]
        for base in bases:
            given = dataclasses.replace(question, given=base)
            behind = [(*base, *stack) for stack in GENERATORS[question.stage](given) if stack]
            longer += [stack for stack in behind if len(stack) > count]
            beside = ((*base, other) for other in others)
            solved = ((*base, *stack) for stack in _solved(nodes, given))
            for stack in itertools.chain(behind, beside, solved):
                if len({mistake.name for mistake in stack}) == count and frozenset(stack) not in made:
                    made[frozenset(stack)] = stack
                    yield stack
        yield from (stack for stack in longer if len(stack) == count + 1)
        # To three digits: among those that come as near, the cut shall not hang on the last bits.
        bases = sorted(made.values(), key=lambda stack: float(f"{left.get(stack, np.inf):.2e}"))[:_KEPT]


# --- What the gap allows ---------------------------------------------------------------------------------------------


def _made_before(nodes: Sequence[Node], question: Question) -> tuple[list[Mistake], list[Mistake]]:
    """Mistakes without a number to solve for at the stages of a gap, the last of which is dumped; those of weights and
    of the way of multiplying apart."""
    plain: dict[Mistake, None] = {}
    weights: dict[Mistake, None] = {}
    for layer, stage in nodes[:-1]:
        plain |= dict.fromkeys(_plain(stage, question))
        for tensor in _tensors(stage):
            weights |= dict.fromkeys(other_weights(question.scene, layer, tensor))
        if stage in ("qkv_matmul", "attn_scores", "attention", *PRODUCTS):
            weights |= dict.fromkeys(PRECISIONS)
    return list(plain), list(weights)


def _plain(stage: str, question: Question) -> Iterator[Mistake]:
    if stage in NORMS:
        yield from (Mistake.of(name) for name in _NORM_MISTAKES)
    yield from _SIMPLE.get(stage, ())
    if stage == "qkv_bias":
        yield from _missing_biases(question)
    if stage in TRANSPOSED:
        yield from (Mistake.of(TRANSPOSED[stage]), Mistake.of(TRANSPOSED[stage], buffer="file"))
    if stage in ("q_post_rope", "k_post_rope"):
        yield from _rotations(stage, question)
    if stage == "attn_softmax":
        yield from fixed_masks(question.scene)
        yield WARP
        yield from _windows(question)
    if stage == "attn_scores":
        yield INTERLEAVED
        size = float(np.abs(question.right).max())
        yield from (mistake for (mistake,) in caches(question, _off(question).max(axis=0), size))


_CARRIES = {"q": "q_post_rope", "k": "k_post_rope", "v": "attention"}
_NORM_MISTAKES = ("norm-weight-missing", "norm-weight-plus-one", "norm-mean-subtracted")
_SIMPLE: Mapping[str, Sequence[Mistake]] = {
    "embedding": [Mistake.of("embedding-row-off-by-one")],
    "attention": [SWAPPED, INTERLEAVED],
    "post_attn_residual": [Mistake.of("attention-residual-missing")],
    "ffn_gate": [Mistake.of("gate-up-swapped")],
    "ffn_up": [Mistake.of("gate-up-swapped")],
    "ffn_silu": [*OTHER_ACTIVATIONS, ON_UP],
    "ffn_swigl": [ON_UP],
    "post_ffn_residual": [Mistake.of("mlp-residual-missing")],
    "final_norm": [Mistake.of("final-norm-missing")],
}


def _missing_biases(question: Question) -> Iterator[Mistake]:
    """Those that the dumped stage can show."""
    reached = {stage for _, stage in question.scene.undumped(split(question.key))}
    parts = [part for part, stage in _CARRIES.items() if stage in reached]
    yield from (Mistake.of(f"{part}-bias-missing") for part in parts)
    if len(parts) == len(_CARRIES):
        yield Mistake.of("qkv-bias-missing")


def _rotations(stage: str, question: Question) -> Iterator[Mistake]:
    yield Mistake.of("rope-adjacent-pairs")
    if question.scene.config.head_dim % 4 == 0:
        yield Mistake.of("rope-half-dims")
    yield Mistake.of("rope-sign")
    yield Mistake.of(f"rope-not-on-{stage[0]}")
    yield Mistake.of("bias-after-rope")
    last = int(question.scene.inputs.positions().max())
    yield from (Mistake.of("rope-position", restart=1 << power) for power in range(2, last.bit_length()))


def _tensors(stage: str) -> list[str]:
    if stage == "qkv_matmul":
        return [f"self_attn.{name}.weight" for name in QKV]
    if stage == "embedding":
        return ["model.embed_tokens.weight"]
    return [PRODUCTS[stage][1]] if stage in PRODUCTS else []


def _all_quantised(nodes: Sequence[Node], question: Question) -> Iterator[Mistakes]:
    """Every weight of the gap and of the stage itself, by one codec."""
    found: dict[str, list[Mistake]] = {}
    for layer, stage in nodes:
        for tensor in [head_name(question.scene.config)] if stage == "logits" else _tensors(stage):
            for mistake in other_weights(question.scene, layer, tensor, slight=True):
                found.setdefault(dict(mistake.parameters)["codec"], []).append(mistake)
    yield from (tuple(mistakes) for mistakes in found.values() if len(mistakes) > 1)


def _off(question: Question) -> np.ndarray:
    """The largest difference from the right values at each token, [B, T]."""
    off = np.abs(question.theirs - question.right).max(axis=tuple(range(2, question.theirs.ndim)))
    return off * question.tokens


def _windows(question: Question) -> Iterator[Mistake]:
    """A window is as wide as the tokens that come before the first one which is off; beside another mistake, which
    hides that, only powers of two are tried."""
    last = int(question.scene.inputs.positions().max())
    wrong = _off(question) > max(1e-3, question.nothing) * np.abs(question.right).max()
    before = int(np.where(wrong, question.scene.positions(), last + 1).min())
    windows = [before, *(1 << power for power in range(2, (last + 1).bit_length()))]
    yield from (Mistake.of("mask-window", window=window) for window in windows if 0 < window <= last)


# --- Numbers ---------------------------------------------------------------------------------------------------------

_BASES = (1e3, 3e3, 1e4, 2e4, 3e4, 5e4, 1e5, 1.5e5, 2e5, 3e5, 5e5, 7e5, 1e6, 1.5e6, 2e6, 3e6, 5e6, 8e6, 1e7, 3e7, 1e8)
_EPS = tuple(10.0**power for power in range(-12, -1))
_SCALES = tuple(2.0 ** (power / 2) for power in range(-12, 5))
_WORTH = 0.7
"""A number is solved for to the end only if some value nearby leaves less than this share of the difference."""
_STEPS = 36
_GOLDEN = (5**0.5 - 1) / 2


def _solved(nodes: Sequence[Node], question: Question) -> Iterator[Mistakes]:
    """Mistakes with a number: base, eps and scale that reproduce the dumped stage best."""
    stages = {stage for _, stage in nodes[:-1]}
    if stages & {"q_post_rope", "k_post_rope"}:
        for theta in _solve(question, lambda x: Mistake.of("rope-theta", theta=x), _BASES, round_numbers.near):
            yield (Mistake.of("rope-theta", theta=theta),)
    if "attn_scores" in stages:
        for scale in _solve(question, lambda x: Mistake.of("softmax-scale", scale=x), _SCALES, round_numbers.scales):
            yield (Mistake.of("softmax-scale", scale=scale),)
    for stage in (stage for stage in NORMS if stage in stages):
        names = (norm_name(stage),)
        for eps in _solve(question, partial(_eps, names), _EPS, round_numbers.epsilons):
            yield (_eps(names, eps),)


def _eps(names: tuple[str, ...], eps: float) -> Mistake:
    return Mistake.of("rms-norm-eps", eps=eps, norms=names)


def _solve(
    question: Question,
    mistake: Callable[[float], Mistake],
    grid: Iterable[float],
    near: Callable[[float], list[float]],
) -> list[float]:
    """Returns the number that leaves least, among those `near` it that engines hold; none if no number helps."""

    def misfit(logarithm: float) -> float:
        value = question.misfit((mistake(float(np.exp(logarithm))),))
        return value if np.isfinite(value) else np.inf

    if any(mistake(1.0).name == made.name for made in question.given):
        return []
    points = np.log(list(grid))
    errors = [misfit(point) for point in points]
    best = int(np.argmin(errors))
    if errors[best] > _WORTH * question.misfit(()):
        return []
    low, high = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [misfit(point) for point in inner]
    for _ in range(_STEPS):
        if values[0] < values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - _GOLDEN * (high - low)
            values[0] = misfit(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + _GOLDEN * (high - low)
            values[1] = misfit(inner[1])
    return near(float(np.exp((low + high) / 2)))
