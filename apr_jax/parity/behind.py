"""Mistakes in parts of stages that were not dumped: some heads, channels, pairs or positions, or some terms of a sum.

There are thousands of such parts in a gap, in each of its layers and in all of them. A `Response` tells of all what
they would change; those whose change is most like the difference are computed whole, with their number solved for and
their ends moved as long as that leaves less.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from apr_jax.parity import round_numbers
from apr_jax.parity.faults.attention import SCALE
from apr_jax.parity.faults.norms import PART_OF_WIDTH
from apr_jax.parity.faults.parts import EXCHANGED, SCALED, STAGE_SCALED, ZEROED
from apr_jax.parity.faults.record import Mistake, Mistakes, Region
from apr_jax.parity.faults.rope import NOT_ON_K, NOT_ON_Q
from apr_jax.parity.faults.sums import CUT_SHORT, terms_of
from apr_jax.parity.question import Question
from apr_jax.parity.replay import NORMS, PRODUCTS, Value, norm_input
from apr_jax.parity.response import Response
from apr_jax.trace.stages import PER_PAIR, Key

_TRIED = 24
"""As many suspects are computed whole."""
_LIKE, _ALIKE = 0.3, 0.9
"""The least cosine of a suspect, and of one that may give the same values as what explains them already."""
_MOST_CHANNELS = 512
"""Runs of channels and of terms are told apart where there are no more."""
_PROMISING = 0.8
"""What a suspect has to leave at most for its ends to be moved."""
_STEPS = (1, 2, 4, 8, 16, 32)
_ITERATIONS, _SETTLED = 8, 1e-11
_NAMED_APART = ("attn_scores", "logits")
"""What a factor of the whole stage has its own name at."""
_HEADED = ("q_post_rope", "k_post_rope", "attention")
_BY_STAGE_ALONE = ("embedding", "final_norm", "logits")

Layers = tuple[int | None, ...] | None


class Suspect(NamedTuple):
    """A mistake, and how like the difference what it changes is expected to be."""

    likeness: float
    mistake: Mistake


def hypotheses(question: Question, explained: bool = False) -> Iterator[Mistakes]:
    """Yields what parts of the stages of a gap may have gone wrong, the likest first.

    Args:
      question: The dumped stage behind the gap.
      explained: Whether something explains it, so that only what gives the same values is of interest.
    """
    response = question.response
    if response is None:
        return
    found = sorted(suspects(question, response), key=lambda suspect: -suspect.likeness)
    kept = [suspect for suspect in found if suspect.likeness > (_ALIKE if explained else _LIKE)]
    # Channels of one head, or the same ones of two stages with nothing between them, are expected to do the same.
    different = {(s.mistake.fault, s.mistake.layers, round(s.likeness, 6)): s.mistake for s in reversed(kept)}
    for mistake in list(different.values())[: -_TRIED - 1 : -1]:
        yield from ((made,) for made in _solved(question, mistake))
    if not explained:
        yield from ((mistake,) for mistake in _turned(question))


def _turned(question: Question) -> Iterator[Mistake]:
    """Heads of q or k that are not rotated: that is a large change, of which a prediction says little."""
    config, off = question.replay.config, _first_wrong(question)
    for stage, fault, heads in (
        ("q_post_rope", NOT_ON_Q, config.num_heads),
        ("k_post_rope", NOT_ON_K, config.num_kv_heads),
    ):
        if any(node.stage == stage for node in question.nodes[:-1]):
            regions = [Region("heads", (head,), heads) for head in range(heads if heads > 1 else 0)]
            if off is not None:
                regions.append(_positions(question.tokens, off, question.tokens.shape[1] - 1))
            made = [fault.made().confined(region, stage) for region in regions]
            yield from (dataclasses.replace(each, layers=layers) for layers in _choices(question) for each in made)


def _choices(question: Question) -> list[Layers]:
    """All layers of the gap, and each of several."""
    layers = sorted({node.layer for node in question.nodes if node.layer is not None})
    return [None, *((layer,) for layer in (layers if len(layers) > 1 else ()))]


def _first_wrong(question: Question) -> int | None:
    """The first column that is wrong; None if tokens are wrong from the start."""
    off, columns = question.off().max(axis=0), np.flatnonzero(question.tokens.any(axis=0))
    wrong = np.flatnonzero(off > max(1e-6, question.nothing) * np.abs(question.right).max())
    return int(wrong[0]) if len(wrong) and wrong[0] > columns[0] + 1 else None


def _positions(tokens: np.ndarray, first: int, last: int) -> Region:
    """The tokens of a run of columns."""
    run = range(first, last + 1)
    places = tuple((row, column) for row, column in itertools.product(range(len(tokens)), run) if tokens[row, column])
    return Region("positions", places, int(tokens.sum()))


def suspects(question: Question, response: Response) -> Iterator[Suspect]:
    """Yields the parts whose change is like the difference, a few of each kind, stage and layer."""
    parts = _Parts(question, response)
    for chosen in _choices(question):
        for stage in dict.fromkeys(key.stage for key in response.values):
            keys = [key for key in response.values if key.stage == stage and (not chosen or key.layer in chosen)]
            if keys and (chosen is None or keys[0].layer is not None):
                for suspect in parts.of(stage, keys):
                    yield suspect._replace(mistake=dataclasses.replace(suspect.mistake, layers=chosen))


class _Parts:
    """What parts of stages contribute, computed once for each stage of each layer."""

    def __init__(self, question: Question, response: Response):
        self._question, self._response = question, response
        self._known: dict[tuple[str, Key], Value] = {}
        self._known_widths: dict[Key, dict[str, Value]] = {}
        self._known_terms: dict[Key, list[tuple[str, Value]]] = {}
        self._config = question.replay.config
        self._first = _first_wrong(question)

    def of(self, stage: str, keys: list[Key]) -> Iterator[Suspect]:
        """Yields suspects of a stage, made at these keys alike."""
        yield from self._whole(stage, keys)
        if stage in PER_PAIR:
            yield from self._scaled(stage, self._sum("channels", keys), "heads")
        else:
            if stage in _HEADED:
                yield from self._scaled(stage, self._by_head(self._sum("channels", keys)), "heads")
            yield from self._scaled(stage, self._sum("channels", keys), "channels")
        yield from self._exchanged(stage, keys)
        yield from self._cut_short(stage, keys)
        yield from self._not_rotated(stage, keys)
        yield from self._part_of_norm(stage, keys)
        if self._first is not None and stage not in _BY_STAGE_ALONE:
            yield from self._at_positions(stage, self._sum("columns", keys), SCALED.made(factor=0.0))

    # --- Contributions -----------------------------------------------------------------------------------------------

    def _sum(self, kind: str, keys: Iterable[Key]) -> Value:
        return sum((self._contributed(kind, key) for key in keys), np.zeros(()))

    def _contributed(self, kind: str, key: Key) -> Value:
        name = kind, key
        if name not in self._known:
            gradient, value = self._response.gradients[key], self._response.values[key].astype(np.float32)
            if kind in ("channels", "columns"):
                self._known[name] = _by_part(gradient, value, kind)
            elif kind == "crossed":
                spec = "pbnts,bmts->pnm" if value.ndim == 4 else "pbtn,btm->pnm"
                self._known[name] = np.einsum(spec, gradient, value, optimize=True)
            else:
                change = (self._unrotated(key) - self._response.values[key]).astype(np.float32)
                self._known[name] = _by_part(gradient, change, kind.split()[1])
        return self._known[name]

    def _unrotated(self, key: Key) -> Value:
        """q or k of a layer before the rotation."""
        fault = NOT_ON_Q if key.stage == "q_post_rope" else NOT_ON_K
        return self._response.right.under((fault.made(),)).compute(key)

    def _by_head(self, contributed: Value) -> Value:
        return contributed.reshape(len(contributed), -1, self._config.head_dim).sum(axis=-1)

    # --- Kinds of suspects -------------------------------------------------------------------------------------------

    def _whole(self, stage: str, keys: list[Key]) -> Iterator[Suspect]:
        if stage not in _NAMED_APART:
            expected = self._response.predicted(self._sum("channels", keys).sum(axis=-1))
            yield Suspect(abs(float(expected.cosine)), STAGE_SCALED.made(factor=1 + float(expected.factor)).at(stage))

    def _scaled(self, stage: str, contributed: Value, kind: str) -> Iterator[Suspect]:
        """The run of heads or channels whose gains explain most."""
        count = contributed.shape[1]
        for likeness, first, last, factor in _best_runs(self._response, contributed):
            region = Region(kind, tuple(range(first, last + 1)), count)
            yield Suspect(likeness, SCALED.made(factor=1 + factor).confined(region, stage))

    def _exchanged(self, stage: str, keys: list[Key]) -> Iterator[Suspect]:
        """The two heads or channels that, exchanged, explain most."""
        crossed, width = self._sum("crossed", keys), 1
        for kind in ("channels", "heads"):
            if kind == "channels" and (stage in PER_PAIR or crossed.shape[1] > _MOST_CHANNELS):
                continue
            if kind == "heads" and stage not in PER_PAIR:
                if stage not in _HEADED:
                    continue
                width = self._config.head_dim
                blocks = crossed.reshape(len(crossed), -1, width, crossed.shape[2] // width, width)
                crossed = np.einsum("pahbh->pab", blocks)
            own = np.einsum("pnn->pn", crossed)
            both = crossed + crossed.swapaxes(1, 2) - own[:, :, None] - own[:, None]
            expected = np.triu(self._response.predicted(both).cosine, 1)
            one, other = (int(index) for index in np.unravel_index(int(np.argmax(expected)), expected.shape))
            made = EXCHANGED.made(those=(other, one), places=(one, other), width=width, first=0)
            region = Region(kind, (one, other), crossed.shape[1])
            yield Suspect(float(expected[one, other]), made.confined(region, stage))

    def _cut_short(self, stage: str, keys: list[Key]) -> Iterator[Suspect]:
        """The run of a sum's terms that, left out, explains most."""
        by_product: dict[str, Value] = {}
        for product, terms in itertools.chain.from_iterable(map(self._terms, keys)):
            by_product[product] = by_product.get(product, np.zeros(())) - terms
        for product, contributed in by_product.items():
            for likeness, first, last, _ in _best_runs(self._response, contributed, whole=True):
                yield Suspect(likeness, CUT_SHORT.made(product=product, first=first, last=last))

    def _terms(self, key: Key) -> list[tuple[str, Value]]:
        """What each term of the products of a stage contributes, by product."""
        if key not in self._known_terms:
            self._known_terms[key] = [
                (product, self._of_terms(key, x.astype(np.float32), weight.astype(np.float32), part))
                for product, x, weight, part in terms_of(self._response.right, key)
                if x.shape[-1] <= _MOST_CHANNELS
            ]
        return self._known_terms[key]

    def _of_terms(self, key: Key, x: Value, weight: Value, part: slice) -> Value:
        gradient = self._response.gradients[key][..., part]
        if weight.ndim == 2:
            return np.einsum("pbto,oi,bti->pi", gradient, weight, x, optimize=True)
        if key.stage == "attention":
            gradient = gradient.reshape(*gradient.shape[:3], x.shape[1], -1).swapaxes(2, 3)
        else:
            gradient = gradient * self._config.head_dim**-0.5
        return np.einsum("pbnto,bnoi,bnti->pi", gradient, weight, x, optimize=True)

    def _not_rotated(self, stage: str, keys: list[Key]) -> Iterator[Suspect]:
        """The heads, pairs or positions of q or k that, not rotated, explain most."""
        if stage not in ("q_post_rope", "k_post_rope"):
            return
        fault, half = NOT_ON_Q if stage == "q_post_rope" else NOT_ON_K, self._config.head_dim // 2
        channels = self._sum("unrotated channels", keys)
        by_pair = channels.reshape(len(channels), -1, 2, half).sum(axis=(1, 2))
        for kind, contributed in (("heads", self._by_head(channels)), ("pairs", by_pair)):
            for likeness, first, last, _ in _best_runs(self._response, contributed, whole=True):
                region = Region(kind, tuple(range(first, last + 1)), contributed.shape[1])
                yield Suspect(likeness, fault.made().confined(region, stage))
        if self._first is not None:
            yield from self._at_positions(stage, self._sum("unrotated columns", keys), fault.made())

    def _at_positions(self, stage: str, contributed: Value, mistake: Mistake) -> Iterator[Suspect]:
        """A mistake in a run of columns from the first wrong one on."""
        assert self._first is not None
        sums = np.cumsum(contributed[:, self._first :], axis=1)
        expected = self._response.predicted(sums)
        ends = np.argsort(-np.abs(expected.cosine))[:2]
        for end in dict.fromkeys((*ends.tolist(), sums.shape[1] - 1)):
            region = _positions(self._question.tokens, self._first, self._first + end)
            scaled = mistake.fault is SCALED
            made = SCALED.made(factor=1 + float(expected.factor[end])) if scaled else mistake
            if region.indices and (scaled or expected.part[end] > 0):
                yield Suspect(abs(float(expected.cosine[end])), made.confined(region, stage))

    def _part_of_norm(self, stage: str, keys: list[Key]) -> Iterator[Suspect]:
        """The number of columns that, if the mean square is taken of them alone, explains most; in all norms too."""
        if stage not in NORMS:
            return
        others = [key for key in self._response.values if key.stage in NORMS and key.layer in {k.layer for k in keys}]
        for made_at, where in ((keys, stage), (others, "")):
            for divisor in ("those", "all"):
                expected = self._response.predicted(np.sum([self._widths(key)[divisor] for key in made_at], axis=0))
                columns = int(np.argmin(expected.left)) + 1
                mistake = PART_OF_WIDTH.made(columns=columns, divisor=divisor)
                yield Suspect(float(expected.cosine[columns - 1]), dataclasses.replace(mistake, stage=where))

    def _widths(self, key: Key) -> dict[str, Value]:
        """What norms over the first columns contribute, [1 + directions, columns - 1], by what they divide by."""
        if key not in self._known_widths:
            x = norm_input(self._response.right, key.layer, key.stage)
            gain = np.einsum("pbtc,btc->pbt", self._response.gradients[key], self._response.values[key])
            sums, eps = np.cumsum(x * x, axis=-1), self._config.rms_norm_eps
            right, width = sums[..., -1:] / x.shape[-1] + eps, x.shape[-1]
            divisors = {"those": np.arange(1, width), "all": np.full(width - 1, width)}
            self._known_widths[key] = {
                name: np.einsum("pbt,btn->pn", gain, np.sqrt(right / (sums[..., :-1] / divisor + eps)) - 1)
                for name, divisor in divisors.items()
            }
        return self._known_widths[key]


def _by_part(gradient: Value, change: Value, kind: str) -> Value:
    """What a change contributes by channel or head, or by column, [1 + directions, n]."""
    if change.ndim == 4:
        return np.einsum("pbnts,bnts->pn" if kind == "channels" else "pbnts,bnts->pt", gradient, change)
    return np.einsum("pbtc,btc->pc" if kind == "channels" else "pbtc,btc->pt", gradient, change)


def _best_runs(response: Response, contributed: Value, whole: bool = False) -> Iterator[tuple[float, int, int, float]]:
    """The run of parts whose contributions explain most, and the part that alone does: cosine, first, last, factor.

    With `whole` what they contribute is done once, and not some number of times.
    """
    count = contributed.shape[1]

    def best(moved: Value, allowed: Value) -> int:
        expected = response.predicted(moved)
        worth = -expected.left if whole else np.abs(expected.cosine)
        return int(np.argmax(np.where(allowed, worth, -np.inf)))

    runs = {(best(contributed, np.ones(count, bool)),) * 2}
    if 1 < count <= _MOST_CHANNELS:
        sums = np.concatenate([np.zeros((len(contributed), 1)), np.cumsum(contributed, axis=1)], axis=1)
        part = np.triu(np.ones((count + 1, count + 1), bool), 1)
        part[0, count] = False  # all of them are no part
        first, end = divmod(best(sums[:, None] - sums[:, :, None], part), count + 1)
        runs.add((first, end - 1))
    for first, last in sorted(runs):
        expected = response.predicted(contributed[:, first : last + 1].sum(axis=1))
        if last - first + 1 < count and (expected.part > 0 or not whole):
            yield abs(float(expected.cosine)), first, last, float(expected.factor)


# --- Solving ---------------------------------------------------------------------------------------------------------


def _solved(question: Question, mistake: Mistake) -> Iterator[Mistake]:
    """A suspect with its number, and with ends that leave least; its number round first."""
    whole = question.misfit(())
    scaled = mistake.fault in (SCALED, STAGE_SCALED)
    if scaled:
        mistake = _with_factor(question, mistake)
    left = question.misfit((mistake,))
    if left > _PROMISING * whole:
        yield mistake
        return
    mistake = _with_ends(question, mistake, left)
    if not scaled:
        yield mistake
        yield from _of_what_is_read(question, mistake)
        return
    mistake = _by_heads(_with_factor(question, mistake), question.replay.config.head_dim)
    factor = float(mistake.parameters["factor"])
    if mistake.fault is SCALED:
        zeroed = dataclasses.replace(mistake, fault=ZEROED, pairs=())
        yield from (zeroed, *_of_the_product(question, zeroed))
    if mistake.fault is STAGE_SCALED and mistake.stage in ("q_post_rope", "k_post_rope") and factor > 0:
        # What scales all scores alike is named by that.
        for scale in round_numbers.scales(factor * question.replay.config.head_dim**-0.5):
            yield dataclasses.replace(SCALE.made(scale=scale), layers=mistake.layers)
    for value in round_numbers.near(abs(factor)) if factor else []:
        yield mistake.having(factor=float(np.copysign(value, factor)))


_READ_ALONE = {"attention": "attn_out", "ffn_swigl": "ffn_out", "final_norm": "logits"}
"""What one product alone reads: channels that are zero there are terms that its sum leaves out."""


def _of_the_product(question: Question, zeroed: Mistake) -> Iterator[Mistake]:
    """Channels that are zero, as a sum that is cut short."""
    reader, region = _READ_ALONE.get(zeroed.stage), zeroed.within
    assert region is not None
    if reader is None or region.kind not in ("channels", "heads"):
        return
    width = question.replay.config.head_dim if region.kind == "heads" else 1
    product = PRODUCTS[reader][1] if reader in PRODUCTS else reader
    first, end = region.indices[0] * width, (region.indices[-1] + 1) * width
    cut = CUT_SHORT.made(product=product, first=first, last=end - 1)
    yield dataclasses.replace(cut, layers=zeroed.layers)


def _of_what_is_read(question: Question, cut: Mistake) -> Iterator[Mistake]:
    """A sum that is cut short, as channels that are zero."""
    products = {PRODUCTS[reader][1] if reader in PRODUCTS else reader: read for read, reader in _READ_ALONE.items()}
    read = products.get(cut.parameters["product"]) if cut.fault is CUT_SHORT else None
    if read is not None and any(node.stage == read for node in question.nodes[:-1]):
        count = question.reference[next(node for node in question.nodes if node.stage == read)].shape[-1]
        indices = tuple(range(cut.parameters["first"], cut.parameters["last"] + 1))
        zeroed = ZEROED.made().confined(Region("channels", indices, count), read)
        yield dataclasses.replace(zeroed, layers=cut.layers)


def _by_heads(mistake: Mistake, width: int) -> Mistake:
    """The mistake with channels that are whole heads as these."""
    region = mistake.within
    if region is None or region.kind != "channels" or mistake.stage not in _HEADED:
        return mistake
    first, end = region.indices[0], region.indices[-1] + 1
    if first % width or end % width:
        return mistake
    heads = Region("heads", tuple(range(first // width, end // width)), region.of // width)
    return mistake.confined(heads, mistake.stage)


def _with_factor(question: Question, mistake: Mistake) -> Mistake:
    """The mistake with the factor that leaves least: what it changes has to be one times what is to be explained."""
    right = question.value(())
    off = question.compared(question.their_rows() - right)

    def missing(gain: float) -> float:
        changed = question.compared(question.value((mistake.having(factor=1 + gain),)) - right)
        power = float(np.vdot(changed, changed))
        return float(np.vdot(changed, off)) / power - 1 if power else 0.0

    gain = float(mistake.parameters["factor"]) - 1
    gain, before = (gain, 0.0) if abs(gain) > 1e-3 else (float(np.copysign(1e-3, gain)), 0.0)
    lacking = missing(gain)
    step = gain * lacking
    for _ in range(_ITERATIONS):
        if not np.isfinite(step) or abs(step) <= _SETTLED * abs(gain):
            break
        before, known = gain, lacking
        gain = gain + float(np.clip(step, -abs(gain) / 2 - 0.5, abs(gain) / 2 + 0.5))
        if not gain:
            break
        lacking = missing(gain)
        if lacking == known:
            break
        step = -lacking * (gain - before) / (lacking - known)
    return mistake.having(factor=1 + gain)


def _with_ends(question: Question, mistake: Mistake, left: float) -> Mistake:
    """The mistake with the ends of its run moved as long as that leaves less."""
    moved: Callable[[Mistake, int, int], Mistake | None] | None = None
    if mistake.fault is CUT_SHORT:
        moved = _moved_terms
    elif mistake.fault is PART_OF_WIDTH:
        moved = _moved_width
    elif mistake.within is not None and mistake.within.kind in ("channels", "pairs", "heads"):
        moved = _moved_region if mistake.fault is not EXCHANGED else None
    if moved is None:
        return mistake
    while True:
        tried = [
            other
            for step in _STEPS
            for ends in ((step, 0), (-step, 0), (0, step), (0, -step))
            if (other := moved(mistake, *ends)) is not None
        ]
        misfits = [question.misfit((other,)) for other in tried]
        best = int(np.argmin(misfits)) if misfits else 0
        if not misfits or misfits[best] >= left * (1 - 1e-6):
            return mistake
        mistake, left = tried[best], misfits[best]


def _moved_terms(mistake: Mistake, first: int, last: int) -> Mistake | None:
    numbers = mistake.parameters
    first, last = numbers["first"] + first, numbers["last"] + last
    return mistake.having(**numbers | {"first": first, "last": last}) if 0 <= first <= last else None


def _moved_width(mistake: Mistake, first: int, last: int) -> Mistake | None:
    columns = mistake.parameters["columns"] + last
    return mistake.having(**mistake.parameters | {"columns": columns}) if columns > 0 and not first else None


def _moved_region(mistake: Mistake, first: int, last: int) -> Mistake | None:
    region = mistake.within
    assert region is not None
    first, last = region.indices[0] + first, region.indices[-1] + last
    if not (0 <= first <= last < region.of and last - first + 1 < region.of):
        return None
    return mistake.confined(dataclasses.replace(region, indices=tuple(range(first, last + 1))), mistake.stage)
