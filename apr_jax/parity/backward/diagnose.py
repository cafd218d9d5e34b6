"""From another engine's gradients to named mistakes of its backward pass.

Gradients are judged in the order in which a backward pass makes them, from the loss down. What explains a wrong one is
believed for those that are computed from it and were not dumped, so that stacked mistakes show one by one.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from apr_jax.converters.checkpoint.adapters import LowRank
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.backward import nodes, scaling
from apr_jax.parity.backward.describe import describe
from apr_jax.parity.backward.localise import Bench, GradientSite, Judged, judge
from apr_jax.parity.backward.loss import Loss
from apr_jax.parity.backward.replay import Backward
from apr_jax.parity.backward.search import Question, accumulated, search
from apr_jax.parity.faults.record import Mistake, Mistakes
from apr_jax.parity.faults.seen import NON_FINITE, UNKNOWN
from apr_jax.parity.findings import Explanation, Finding, gather
from apr_jax.parity.replay import Replay
from apr_jax.parity.search import silent
from apr_jax.trace import stages
from apr_jax.trace.stages import GRADIENT, Key

NO_ADAPTER: Mapping[str, LowRank] = types.MappingProxyType({})
NOTHING: Mapping[str, np.ndarray] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class BackwardDiagnosis:
    """The whole answer.

    Attributes:
      findings: The mistakes, from the loss down.
      sites: The gradients that were judged.
      unexamined: Gradients that could not be judged -> why.
      positions: How many tokens there are in the batch.
      notes: What else the reader has to know.
    """

    findings: tuple[Finding, ...]
    sites: tuple[GradientSite, ...]
    unexamined: Mapping[str, str]
    positions: int
    notes: tuple[str, ...] = ()


def diagnose_backward(
    forward: Replay,
    before: Iterable[Explanation],
    gradients: Mapping[str, np.ndarray],
    counted: np.ndarray | None,
    dtype: str,
    rounded: Mapping[str, np.ndarray] = NOTHING,
    adapter: Mapping[str, LowRank] = NO_ADAPTER,
    progress: Callable[[str], None] = silent,
) -> BackwardDiagnosis:
    """Judges and explains gradients.

    Args:
      forward: The replay of the forward pass over the other side's values; nothing has to be dumped.
      before: What was found in the forward pass: the right backward pass is the one that follows it.
      gradients: Key (`stages.Key`) -> gradient.
      counted: Which tokens the loss is over, bool [B, T]; None is all.
      dtype: What the other side computes in.
      rounded: Values of the forward pass as a right engine has them in that dtype, for those that were not dumped.
      adapter: Name of a weight -> what a low-rank adapter adds to it, which the model's weights hold already.
      progress: Is told what is going on, often.
    """
    before = tuple(before)
    back = Backward(
        forward.under(_in_layers(before)),
        Loss.of(forward.inputs, counted),
        gradients,
        adapter,
        _by_stage(forward, before),
    )
    pass_ = _Pass(Bench.of(back, dtype, rounded), gradients, progress)
    pass_.unfollowed = _unfollowed(back, before)
    pass_.run()
    findings = [*pass_.of_all, *gather(pass_.explained, forward.config.num_layers)]
    findings, notes = scaling.without_loss_scale(findings)
    return BackwardDiagnosis(tuple(findings), tuple(pass_.sites), pass_.unexamined, forward.inputs.tokens, notes)


def undumped_values(same: LanguageModel, forward: Replay) -> dict[str, np.ndarray]:
    """Returns the values of the forward pass that were not dumped, as a right engine in the model's dtype has them.

    Args:
      same: The model in the other side's dtype.
      forward: The replay over the values that were dumped.
    """
    keys = [key for key in stages.trace_keys(same.config.num_layers) if key not in forward.theirs]
    if not keys:
        return {}
    finite = {
        key: np.nan_to_num(value, posinf=0.0, neginf=0.0)
        for key, value in forward.theirs.items()
        if key != stages.LOGITS
    }
    return same.trace(forward.inputs, keys, finite)


def _in_layers(before: Iterable[Explanation]) -> Mistakes:
    """The mistakes of the forward pass, each in the layers that it was found in."""
    return tuple(
        dict.fromkeys(
            mistake if mistake.layers is not None else mistake.in_layers(*(one.layers_of(mistake.name) or (None,)))
            for one in before
            for mistake in one.mistakes
            if mistake.fault.changes
        )
    )


def _by_stage(forward: Replay, before: Iterable[Explanation]) -> dict[Key, Mistakes]:
    """Stage -> the mistakes of the forward pass that are made at it, itself or in the gap before it."""
    found: dict[Key, dict[Mistake, None]] = {}
    for one in before:
        for node in forward.undumped(one.site.key):
            for mistake in one.mistakes:
                if mistake.fault.changes and node.stage in mistake.stages(forward):
                    found.setdefault(node, {})[mistake] = None
    return {key: tuple(mistakes) for key, mistakes in found.items()}


_FOLLOWED = frozenset(
    (
        *("tensor", "weight", "matrix", "bias", "early_bias", "eps", "norm_weight", "kv_heads", "scale", "rotation"),
        *("activation", "gating", "last_key", "first_key", "window", "real_keys", "empty_row", "summed", "v_heads"),
        *("row", "table", "dot", "softmax_input", "shares", "stream"),
    )
)
"""Steps of the forward pass that the backward pass goes through in the same way, or whose result was dumped."""
_LESS_PRECISE = 0.03
"""What products that are less precise in the forward pass may move a gradient by, if they are so here too."""


_HELD = frozenset(("matrix", "weight", "tensor", "bias", "early_bias", "norm_weight", "table", "row"))
"""Steps that make something of a parameter before it is used."""


def _unfollowed(back: Backward, before: Iterable[Explanation]) -> dict[Key, str]:
    """Gradients through a stage whose forward formula is not known: of a mistake that is followed by none here."""
    found: dict[Key, str] = {}
    for one in before:
        strange = [m for m in one.mistakes if m.fault.unexplained or not _followed(back, m, one)]
        if strange:
            for node in back.forward.undumped(one.site.key):
                why = f"{node.stage} is {strange[0].name} in the forward pass"
                for key in nodes.order(back.config):
                    if node in reads(key, back):
                        found.setdefault(key, why)
    return found


def _followed(back: Backward, mistake: Mistake, one: Explanation) -> bool:
    if mistake.within is not None or not set(mistake.fault.changes) <= _FOLLOWED:
        return False
    if "stream" in mistake.fault.changes:
        made = back.at(one.site.key.layer, one.site.key.stage).step(
            "stream", np.ones(1), one.site.key.layer, one.site.key.stage
        )
        return np.shape(made) == (1,)
    return True


def reads(key: Key, back: Backward) -> tuple[Key, ...]:
    """Returns the stages whose forward formulas a gradient goes back through."""
    return tuple(Key(source.removeprefix(GRADIENT)) for source in nodes.sources(key, back.config))


class _Pass:
    """One way through the gradients, from the loss down."""

    def __init__(self, bench: Bench, gradients: Mapping[str, np.ndarray], progress: Callable[[str], None]):
        self.bench, self.gradients, self.progress = bench, gradients, progress
        self.sites: list[GradientSite] = []
        self.explained: list[Explanation] = []
        self.of_all: list[Finding] = []
        self.unexamined: dict[str, str] = {}
        self.unfollowed: dict[Key, str] = {}
        self.doubtful: set[Key] = set()
        self.blurred: set[Key] = set()
        self.sound: set[Key] = set()

    def run(self) -> None:
        order = [key for key in nodes.order(self.bench.exact.config) if key in self.gradients]
        common = scaling.common_factor(self.bench, order, self.gradients)
        if common is not None:
            self.of_all.append(common.finding)
            self.gradients = scaling.Divided(self.gradients, common.factor)
            self.bench = self.bench.over(self.gradients)
        for index, key in enumerate(order):
            self.progress(f"gradient {index + 1} of {len(order)}: {key}")
            self._one(key, order[index + 1 :])
        if common is None and (other := scaling.of_other_tokens(self.bench, self.explained, self.gradients)):
            self.of_all.append(other)
            self.explained = [one for one in self.explained if one.mistakes[0].fault is not UNKNOWN]

    def _one(self, key: Key, later: Sequence[Key]) -> None:
        gap = self.bench.exact.gap(key)
        why = next((self.unfollowed[node] for node in gap if node in self.unfollowed), None)
        if why is not None:
            self.unexamined[str(key)] = why
            return
        judged = judge(self.bench, key, self.gradients[key])
        site = judged.site
        if not site.wrong:
            self.sound.update(nodes.shown_by(key, gap))
            self.doubtful -= set(nodes.shown_by(key, gap))
            self.sites.append(site)
            return
        if why := self._held_wrongly(key) or self._less_precise(site):
            self.unexamined[str(key)] = why
            return
        if self.doubtful & set(gap):
            self.unexamined[str(key)] = "behind a gradient that nothing explains"
            return
        blurred = bool(self.blurred & set(gap))
        explanation = self._explain(judged, later, blurred)
        if blurred and explanation.after is None:
            self.unexamined[str(key)] = "behind one that is known nearly"
            return
        self.sites.append(site)
        self.explained.append(explanation)
        inner = tuple(m for m in explanation.mistakes if self._is_inside(m, gap[:-1]))
        if inner:
            self.bench = self.bench.believing(inner)
            rough = [mistake for mistake in inner if mistake.fault.chaotic]
            self.blurred |= {node for node in gap for mistake in rough if self.bench.exact.makes(mistake, node)}
        if explanation.after is not None:
            self.sound.update(nodes.shown_by(key, gap))

    def _held_wrongly(self, key: Key) -> str | None:
        """Says why a parameter's gradient means nothing: the forward pass has something else in its place."""
        back = self.bench.exact
        for stage in reads(key, back) if key.of_parameter else ():
            for mistake in back.made_before.get(stage, ()):
                if _HELD & mistake.fault.changes.keys():
                    return f"{mistake.name} in the forward pass"
        return None

    def _less_precise(self, site: GradientSite) -> str | None:
        """Says why a gradient that is off by little is none of a mistake made here."""
        ways = [mistake for mistake in self.bench.exact.forward.made if mistake.fault.multiplies]
        if ways and site.error <= _LESS_PRECISE * site.norm:
            return f"{ways[0].name} in the forward pass"
        return None

    def _is_inside(self, mistake: Mistake, gap: Sequence[Key]) -> bool:
        return any(self.bench.exact.makes(mistake, node) for node in gap)

    def _explain(self, judged: Judged, later: Sequence[Key], blurred: bool) -> Explanation:
        site = judged.site
        if not site.finite:
            bad = int((~np.isfinite(judged.theirs)).sum())
            self._doubt(site.key, later)
            return Explanation(
                site, (NON_FINITE.made(),), None, note=f"{bad} of {judged.theirs.size} values are NaN or infinite"
            )
        question = Question(self.bench, judged, frozenset(self.sound))
        rounding = scaling.rounding_of(question, [mistake for one in self.explained for mistake in one.mistakes])
        found, closest = (
            search(question, later, stacked=not blurred) if rounding is None else (accumulated(question), None)
        )
        if found is None and rounding is not None:
            return Explanation(site, (rounding,), None)
        if found is None:
            if not blurred:
                self._doubt(site.key, later)
            seen = describe(question, closest)
            return Explanation(site, (UNKNOWN.made(**seen.parameters),), None, note=seen.note)
        layers = {m.name: tuple(layer for layer in m.layers or () if layer is not None) for m in found.mistakes}
        return Explanation(site, found.mistakes, found.error / (site.norm or 1.0), found.alternatives, layers=layers)

    def _doubt(self, key: Key, later: Sequence[Key]) -> None:
        """Doubts what an unexplained gradient was made of and was not dumped, but for what others are right with."""
        gap = set(self.bench.exact.gap(key)[:-1]) - self.sound
        for other in later:
            shared = gap & set(self.bench.exact.gap(other))
            if shared and not judge(self.bench, other, self.gradients[other]).site.wrong:
                gap -= shared
        self.doubtful |= gap
