"""From wrong stages to named mistakes.

At each wrong stage the hypotheses that touch it are computed from the other side's own inputs. One is believed if it
reproduces their values to within the stage's budget; if several do, the one with the fewest mistakes is named, and
those that cannot be told from it are its alternatives. What is found at several stages and layers is then put together.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax import rows, stages
from apr_jax.inputs import Inputs
from apr_jax.layouts import Layout, undo
from apr_jax.localise import Localisation, Site, judge, localise
from apr_jax.mistakes import Mistake, under
from apr_jax.model import LanguageModel
from apr_jax.scene import Scene, split
from apr_jax.search import Answer, Known, Search
from apr_jax.sentences import sentence

_THREADS = 8
"""At how many stages at a time what is known is tried: each takes some copies of the stage."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One mistake, wherever it was found.

    Attributes:
      fault: Its name; or "unknown", "non-finite", "constant" or "positions-permuted", which say what is seen.
      layers: Layers that it was found in; "all"; or empty outside the layers.
      stage: The first stage that shows it.
      parameters: What it is parameterised by.
      residual_before: Largest relative L2 of their values against the right ones, over the stages that show it.
      residual_after: The same against the values under this mistake; None where it is not known.
      alternatives: Mistakes that give the same values here.
      certainty: "certain", "ambiguous" (see alternatives) or "unexplained".
      sentence: All of it in a line.
    """

    fault: str
    layers: tuple[int, ...] | str
    stage: str
    parameters: Mapping[str, Any]
    residual_before: float
    residual_after: float | None
    alternatives: tuple[str, ...]
    certainty: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What became of one wrong stage.

    Attributes:
      site: The stage.
      mistakes: What was made there, or before it where stages were not dumped.
      after: Relative L2 of their values against those with these mistakes; None where that is not known.
      alternatives: Mistakes that give the same values, each a phrase of names.
      note: What else can be said.
      layers: Name of a mistake -> the layers that it is made in, where that is not the stage's own.
    """

    site: Site
    mistakes: tuple[Mistake, ...]
    after: float | None
    alternatives: tuple[str, ...] = ()
    note: str = ""
    layers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def layers_of(self, name: str) -> tuple[int, ...]:
        """Returns the layers that a mistake is made in; none outside the layers."""
        return self.layers.get(name, () if self.site.layer is None else (self.site.layer,))

    def instead_of(self, name: str) -> set[str]:
        """Returns what may have been made in place of one of the mistakes."""
        made = {mistake.name for mistake in self.mistakes}
        others = [set(phrase.split(" and ")) for phrase in self.alternatives]
        return {" and ".join(sorted(other - made)) for other in others if name not in other and other - made}

    @property
    def before(self) -> float:
        """Relative L2 of their values against the right ones."""
        return self.site.error / self.site.norm if self.site.norm else float("inf")


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The whole answer.

    Attributes:
      findings: The mistakes.
      localisation: The stages that they were found at.
      by_design: Deviations that were found and taken out because the file asks for them.
    """

    findings: tuple[Finding, ...]
    localisation: Localisation
    by_design: frozenset[str] = frozenset()


def diagnose(
    exact: LanguageModel,
    same: LanguageModel,
    inputs: Inputs,
    theirs: Mapping[str, np.ndarray],
    columns: np.ndarray | None = None,
) -> Diagnosis:
    """Localises and explains.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch.
      theirs: Trace key -> array [B, T, ...], or rows [B, R, ...]; stages may be missing.
      columns: Which columns of the batch such rows stand for, [B, R].
    """
    theirs, layouts = undo(exact, inputs, theirs, columns)
    order, mistake = _execution_order(exact, inputs, theirs)
    if mistake is not None:
        exact, same = (_reordered(model, order) for model in (exact, same))
    located = localise(exact, same, inputs, theirs, columns)
    scene = Scene(exact.config, exact.parameters, inputs, located.theirs)
    explained = _explain_all(scene, located)
    partial = bool(located.columns.keys() - {stages.LOGITS})
    if partial and _unknown(explained) and all(site.finite for site in located.sites):
        located, explained = min((located, explained), _explain_in_order(scene, located), key=lambda e: _unknown(e[1]))
    findings = _gather(explained, exact.config.num_layers)
    if mistake is not None:
        findings = [_order_finding(mistake), *findings]
    return Diagnosis((*findings, *_layout_findings(layouts, exact.config.num_layers)), located)


def _explain_all(scene: Scene, located: Localisation) -> list[Explanation]:
    """Explains every wrong stage, in order of execution.

    The first of each kind is searched among all hypotheses. What is found there is then tried at the others, several at
    a time; those that it does not explain are searched one by one.
    """
    wrong = [site for site in located.sites if site.wrong]
    found: dict[str, Explanation] = {}
    known, firsts = Known(), {site.stage: site for site in reversed(wrong)}
    for site in (site for site in wrong if firsts[site.stage] is site):
        found[site.key] = explain(scene, site, located, known)
    others = [site for site in wrong if site.key not in found and site.finite and known.at(site.stage)]
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        replayed = pool.map(lambda site: _replay(scene, site, located, known), others)
        found |= {site.key: answer for site, answer in zip(others, replayed, strict=True) if answer is not None}
    for site in wrong:
        if site.key not in found:
            found[site.key] = explain(scene, site, located, known)
    return [found[site.key] for site in wrong]


def _replay(scene: Scene, site: Site, located: Localisation, known: Known) -> Explanation | None:
    search = Search(scene, site, located)
    answer = search.replay(known)
    return None if answer is None else _explained(site, answer, search)


def explain(scene: Scene, site: Site, located: Localisation, known: Known) -> Explanation:
    """Finds the mistakes that reproduce one wrong stage; what was found at others before is in `known`."""
    theirs = np.asarray(located.theirs[site.key])
    if not site.finite:
        return Explanation(site, (Mistake.of("non-finite"),), None, note=_where_not_finite(theirs))
    search = Search(scene, site, located)
    if answer := search.replay(known) or search.run(known):
        return _explained(site, answer, search)
    if site.constant:
        return Explanation(site, (Mistake.of("constant", value=float(theirs.flat[0])),), None)
    columns = search.permuted()
    if columns is not None:
        moved = columns != np.arange(columns.shape[1])
        named = Mistake.of("positions-permuted", moved=int((moved & (scene.inputs.attention_mask == 1)).sum()))
        return Explanation(site, (named,), None, note=_places(moved, columns))
    note = _description(scene.inputs, np.asarray(theirs, np.float64), located, site, search.closest)
    if missing := [stage for _, stage in scene.undumped(split(site.key))[:-1]]:
        note += f"; not dumped before it: {', '.join(missing)}"
    return Explanation(site, (Mistake.of("unknown"),), None, note=note)


def _explained(site: Site, answer: Answer, search: Search) -> Explanation:
    after, layers = answer.error / (site.norm or 1.0), search.layers_of(answer.mistakes)
    return Explanation(site, answer.mistakes, after, answer.alternatives, layers=layers)


_BLURRING = ("unknown", "tf32-dots", "bf16-accumulation", "activations-quantised")
"""After these, keys and values that were not dumped are known to no more than a few digits."""


def _unknown(explained: Iterable[Explanation]) -> int:
    return sum(mistake.name == "unknown" for explanation in explained for mistake in explanation.mistakes)


def _explain_in_order(scene: Scene, located: Localisation) -> tuple[Localisation, list[Explanation]]:
    """Explains a dump of some positions with the mistakes that are found made at the others too.

    What was not dumped is first taken for right, as in an engine that only decodes wrongly. Where that leaves stages
    unexplained, the keys and values before the dumped positions may be as wrong as those that are seen: so this goes on
    in order of execution, from positions that hold what each stage's mistakes make of the stages before. What reads
    keys or values behind an unexplained stage, or behind roundings that are not ours, cannot be judged and is left out.

    A number that was solved for is known to what it leaves unexplained. Beside the values there are those that another
    number, off by that error, makes: a stage may differ from the one by as much as from the other.
    """
    values: dict[str, np.ndarray] = {}
    doubted = values
    sites: list[Site] = []
    explained: list[Explanation] = []
    known, order = Known(), list(stages.trace_keys(scene.config.num_layers))
    for before in located.sites:
        key, part = before.key, located.columns.get(before.key)
        here, there = (dataclasses.replace(scene, theirs=each, memo={}) for each in (values, doubted))
        right, theirs = here.compute(key), located.theirs[key]
        doubtful = right if doubted is values else there.compute(key)
        values[key], doubted[key] = (_filled_up(key, theirs, each, part) for each in (right, doubtful))
        own = right + np.hypot(right * (before.own / before.norm if before.norm else 0.0), doubtful - right)
        site = judge(key, values[key], right, own, scene.inputs, located.dtype, part)
        if site.wrong:
            one = dataclasses.replace(located, sites=(site,), reference={key: right}, theirs=values)
            explanation = explain(here, site, one, known)
            unexplained = explanation.after is None
            blurred = any(mistake.name in _BLURRING for other in explained for mistake in other.mistakes)
            if unexplained and blurred and _reads_cache(key, values, order):
                continue
            explained.append(explanation)
            if part is not None and not unexplained:
                made = under(here, explanation.mistakes).compute(key)
                others = _with_errors(explanation, here, made, part)
                if others != explanation.mistakes and doubted is values:
                    doubted = dict(values)
                doubted[key] = _filled_up(key, theirs, under(there, others).compute(key), part)
                values[key] = _filled_up(key, theirs, made, part)
        sites.append(site)
    return dataclasses.replace(located, sites=tuple(sites)), explained


def _filled_up(key: str, theirs: np.ndarray, ours: np.ndarray, part: np.ndarray | None) -> np.ndarray:
    """Their values at the positions that they dumped, ours elsewhere."""
    return theirs if part is None else rows.scatter(key, ours, rows.gather(key, theirs, part), part)


_STEP = 1e-4
"""Relative step of a number, to see what it changes."""


def _with_errors(explanation: Explanation, scene: Scene, made: np.ndarray, part: np.ndarray) -> tuple[Mistake, ...]:
    """Returns the mistakes with each solved number moved until it changes the dumped rows by what they leave."""
    key, left = explanation.site.key, (explanation.after or 0.0) * explanation.site.norm
    moved = list(explanation.mistakes)
    for place, mistake in enumerate(explanation.mistakes):
        other = _scaled(mistake, 1 + _STEP)
        if other != mistake:
            changed = under(scene, (*moved[:place], other, *moved[place + 1 :])).compute(key)
            change = float(np.linalg.norm(rows.gather(key, changed - made, part)))
            moved[place] = _scaled(mistake, 1 + min(_STEP * left / change, 1.0) if change else 1.0)
    return tuple(moved)


def _scaled(mistake: Mistake, factor: float) -> Mistake:
    """A mistake with its numbers that were solved for, which are floats, multiplied."""
    scaled = ((name, value * factor if isinstance(value, float) else value) for name, value in mistake.parameters)
    return Mistake(mistake.name, tuple(scaled))


def _reads_cache(key: str, dumped: Container[str], order: Sequence[str]) -> bool:
    """Whether a stage is computed from keys or values, itself or by way of stages before it that were not dumped."""
    gap = itertools.takewhile(
        lambda other: other == key or other not in dumped, reversed(order[: order.index(key) + 1])
    )
    return any(stages.stage_of(stage) in ("attn_scores", "attention") for stage in gap)


def _layout_findings(layouts: Iterable[Layout], num_layers: int) -> list[Finding]:
    """One finding for each kind of layout; it is said, and no mistake."""
    kinds: dict[str, list[Layout]] = {}
    for layout in layouts:
        kinds.setdefault(layout.kind, []).append(layout)
    findings = []
    for kind, members in kinds.items():
        layers = sorted({int(layout.key.split(".")[1]) for layout in members if layout.key.count(".") == 2})
        named: tuple[int, ...] | str = "all" if layers == list(range(num_layers)) else tuple(layers)
        shown = sorted({stages.stage_of(layout.key) for layout in members})
        parameters = {"kind": kind, "stages": shown}
        text = sentence("layout", named, ", ".join(shown), parameters, None, None)
        findings.append(
            Finding("layout", named, stages.stage_of(members[0].key), parameters, 0.0, None, (), "certain", text)
        )
    return findings


# --- Layers in another order -----------------------------------------------------------------------------------------

_TELLING = ("qkv_matmul", "qkv_bias", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
_BY_POSITION = ("qkv_matmul", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl")
"""What may be missing before a telling stage: each position is computed from itself alone."""
_ENOUGH_POSITIONS = 16


def _execution_order(
    exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray]
) -> tuple[list[int], Mistake | None]:
    """Which layer's weights each dumped layer was computed with, and what that order is called."""
    layers = exact.config.num_layers
    dumped = 1 + max((int(key.split(".")[1]) for key in theirs if key.count(".") == 2), default=-1)
    count = dumped if dumped > layers or _ends_after(exact, inputs, theirs, dumped) else layers
    order = [_weights_of(exact, inputs, theirs, layer) for layer in range(count)]
    if order == list(range(layers)):
        return order, None
    for layer in range(layers):
        if order == [index for index in range(layers) if index != layer]:
            return order, Mistake.of("layer-skipped", layer=layer)
        if order == sorted([*range(layers), layer]):
            return order, Mistake.of("layer-repeated", layer=layer)
    return order, Mistake.of("layer-order", order=tuple(order))


def _ends_after(exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], dumped: int) -> bool:
    """Whether the final norm follows the last dumped layer: else the layers behind it ran and were not dumped."""
    source = stages.layer_key(dumped - 1, "post_ffn_residual")
    if source not in theirs or stages.FINAL_NORM not in theirs:
        return False
    config = dataclasses.replace(exact.config, num_layers=dumped)
    few = np.unique(np.linspace(0, theirs[source].shape[1] - 1, _ENOUGH_POSITIONS).astype(int))
    whole = theirs[source].shape[1] == inputs.input_ids.shape[1]
    tokens = (inputs.attention_mask == 1 if whole else np.ones(theirs[source].shape[:2], bool))[:, few]
    right = Scene(config, exact.parameters, inputs, {source: theirs[source]}, rows=few).compute(stages.FINAL_NORM)
    found = theirs[stages.FINAL_NORM][:, few]
    return float(np.linalg.norm((found - right)[tokens])) <= 0.05 * float(np.linalg.norm(right[tokens]))


def _weights_of(exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], layer: int) -> int:
    """The layer of the file whose matrices reproduce most products of a dumped layer; its own number in doubt."""
    count, votes = exact.config.num_layers, dict[int, int]()
    dumped = {stage for stage in stages.LAYER_STAGES if stages.layer_key(layer, stage) in theirs}
    for stage in _TELLING:
        if stage not in dumped or (stage == "qkv_bias" and "qkv_matmul" in dumped):
            continue
        best = _vote(exact, inputs, {name: theirs[stages.layer_key(layer, name)] for name in dumped}, stage, layer)
        if best is not None:
            votes[best] = votes.get(best, 0) + 1
    if layer < count and (not votes or votes.get(layer, 0) >= max(votes.values())):
        return layer
    # One matrix of another layer is a mistake of its own; a layer's place is told by most of them.
    best, most = max(votes.items(), key=lambda pair: pair[1], default=(min(layer, count - 1), 0))
    return best if most >= 2 else min(layer, count - 1)


def _vote(exact: LanguageModel, inputs: Inputs, dumped: Mapping[str, np.ndarray], stage: str, layer: int) -> int | None:
    """The layer of the file that makes one stage of a layer out of the others that were dumped of it; None if none."""
    count, length = exact.config.num_layers, dumped[stage].shape[1]
    few = np.unique(np.linspace(0, length - 1, _ENOUGH_POSITIONS).astype(int))
    whole = length == inputs.input_ids.shape[1]
    tokens = (inputs.attention_mask == 1 if whole else np.ones(dumped[stage].shape[:2], bool))[:, few]
    wanted = dumped[stage][:, few]
    if not np.isfinite(wanted[tokens]).all():
        return None
    enough, distances = 0.05 * float(np.linalg.norm(wanted[tokens])), []
    # Its own layer first: it is seldom another one's.
    for candidate in sorted(range(count), key=lambda index: index != layer):
        moved = {stages.layer_key(candidate, name): values for name, values in dumped.items()}
        scene = Scene(exact.config, exact.parameters, inputs, moved, rows=few)
        gap = scene.undumped((candidate, stage))[:-1]
        if any(name not in _BY_POSITION or place != candidate for place, name in gap):
            return None
        value = scene.compute(stages.layer_key(candidate, stage))
        distances.append((float(np.linalg.norm((value - wanted)[tokens])), candidate))
        if candidate == layer and distances[-1][0] <= enough:
            break
    distance, best = min(distances)
    return best if distance <= enough else None


def _reordered(model: LanguageModel, order: Sequence[int]) -> LanguageModel:
    outer = model.parameters["model"]
    layers = {place: outer["layers"][source] for place, source in enumerate(order)}
    config = dataclasses.replace(model.config, num_layers=len(order))
    parameters = {**model.parameters, "model": {**outer, "layers": layers}}
    return LanguageModel(config, parameters, model.device, model.ops)


def _order_finding(mistake: Mistake) -> Finding:
    parameters = {name: list(value) if isinstance(value, tuple) else value for name, value in mistake.parameters}
    text = sentence(mistake.name, (), "", parameters, None, None)
    return Finding(mistake.name, (), "", parameters, float("nan"), None, (), "certain", text)


# --- Putting together ------------------------------------------------------------------------------------------------


def _gather(explained: Iterable[Explanation], num_layers: int) -> list[Finding]:
    """Groups what was found at each stage into one finding for each mistake, in order of execution."""
    groups: dict[tuple[str, Any], list[tuple[Mistake, Explanation]]] = {}
    for explanation in explained:
        for mistake in explanation.mistakes:
            identity = _identity(mistake, explanation)
            group = next((known for known in groups if _agree(known, identity)), identity)
            groups.setdefault(group, []).append((mistake, explanation))
    _merge_biases(groups)
    return [_finding(name, members, num_layers) for (name, _), members in groups.items()]


_SAME_NUMBER = 0.01
"""Relative difference up to which two solved numbers are one: they are compared, not rounded, which has edges."""
_UNEXPLAINED = ("unknown", "non-finite", "constant", "positions-permuted")
"""What is seen, and not how it came about: a finding of its own at each stage."""


def _identity(mistake: Mistake, explanation: Explanation) -> tuple[str, Any]:
    """What makes two sightings one mistake, if it agrees."""
    parameters = dict(mistake.parameters)
    for found_at_the_site in ("norms", "chunk", "empty"):
        parameters.pop(found_at_the_site, None)
    if mistake.name in _UNEXPLAINED:
        return mistake.name, explanation.site.stage
    return mistake.name, tuple(sorted(parameters.items()))


def _agree(one: tuple[str, Any], other: tuple[str, Any]) -> bool:
    """Whether two identities are of one mistake: solved numbers may differ by 1 %, nothing else."""
    if one[0] != other[0] or one[0] in _UNEXPLAINED or len(one[1]) != len(other[1]):
        return one == other
    pairs = zip(one[1], other[1], strict=True)
    return all(a == b or (a[0] == b[0] and _close(a[1], b[1])) for a, b in pairs)


def _close(one: Any, other: Any) -> bool:
    return isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=_SAME_NUMBER)


def _merge_biases(groups: dict[tuple[str, Any], list[tuple[Mistake, Explanation]]]) -> None:
    """Three missing biases are one mistake; q and k biases that are added after the rotation are not missing."""
    names = {part: (f"{part}-bias-missing", ()) for part in "qkv"}
    late = {site.site.layer for _, site in groups.get(("bias-after-rope", ()), [])}
    for part in "qk":
        if late and names[part] in groups:
            kept = [pair for pair in groups[names[part]] if pair[1].site.layer not in late]
            groups[names[part]] = kept
    where = {part: {pair[1].site.layer for pair in groups.get(name, [])} for part, name in names.items()}
    common = where["q"] & where["k"] & where["v"]
    if common:
        whole = [pair for pair in groups[names["q"]] if pair[1].site.layer in common]
        groups[("qkv-bias-missing", ())] = [(Mistake.of("qkv-bias-missing"), site) for _, site in whole]
        for name in names.values():
            groups[name] = [pair for pair in groups[name] if pair[1].site.layer not in common]
    _merge_quantised(groups)
    for key in [key for key, members in groups.items() if not members]:
        del groups[key]


def _merge_quantised(groups: dict[tuple[str, Any], list[tuple[Mistake, Explanation]]]) -> None:
    """Several tensors quantised by one codec are one finding."""
    by_codec: dict[str, list[tuple[str, Any]]] = {}
    for key in groups:
        if key[0] == "weights-quantised":
            by_codec.setdefault(dict(key[1])["codec"], []).append(key)
    for codec, keys in by_codec.items():
        if len(keys) < 2:
            continue
        members = [pair for key in keys for pair in groups.pop(key)]
        names = tuple(sorted({dict(mistake.parameters)["tensor"] for mistake, _ in members}))
        mistake = Mistake.of("weights-quantised", codec=codec, tensor=names)
        groups["weights-quantised", (codec, names)] = [(mistake, explanation) for _, explanation in members]


def _finding(name: str, members: list[tuple[Mistake, Explanation]], num_layers: int) -> Finding:
    explanations = [explanation for _, explanation in members]
    parameters: dict[str, Any] = dict(members[0][0].parameters)
    parameters.pop("empty", None)
    if "chunk" in parameters:
        # Sums no longer than a chunk do not tell how long it is.
        parameters["chunk"] = min(dict(mistake.parameters)["chunk"] for mistake, _ in members)
    if "norms" in parameters:
        parameters["norms"] = sorted({norm for mistake, _ in members for norm in dict(mistake.parameters)["norms"]})
    found = sorted({layer for e in explanations for layer in e.layers_of(name)})
    layers: tuple[int, ...] | str = "all" if found == list(range(num_layers)) and num_layers > 1 else tuple(found)
    afters = [e.after for e in explanations if e.after is not None]
    alternatives = tuple(sorted({other for e in explanations for other in e.instead_of(name)} - {name}))
    unexplained = name in _UNEXPLAINED
    before, after = max(e.before for e in explanations), max(afters, default=None)
    notes = [e.note for e in explanations if e.note]
    text = sentence(name, layers, explanations[0].site.stage, parameters, before, after, notes[0] if notes else "")
    return Finding(
        name,
        layers,
        explanations[0].site.stage,
        parameters,
        before,
        after,
        alternatives,
        "unexplained" if unexplained else ("ambiguous" if alternatives else "certain"),
        text,
    )


# --- What can be said where nothing fits -----------------------------------------------------------------------------


def _where_not_finite(theirs: np.ndarray) -> str:
    bad = ~np.isfinite(theirs)
    first = tuple(int(index) for index in np.argwhere(bad)[0])
    return f"{int(bad.sum())} of {theirs.size} values are NaN or infinite, the first at {list(first)}"


def _places(moved: np.ndarray, columns: np.ndarray) -> str:
    shown = [f"row {b} position {t} holds {columns[b, t]}" for b, t in np.argwhere(moved)[:3]]
    return ", ".join(shown) + (", ..." if moved.sum() > 3 else "")


def _description(
    inputs: Inputs, theirs: np.ndarray, located: Localisation, site: Site, closest: tuple[str, float] | None
) -> str:
    axis, notes = rows.axis_of(site.key), []
    counted = rows.tokens(inputs, located.columns.get(site.key))
    shown = np.expand_dims(counted, tuple(other for other in range(1, theirs.ndim) if other != axis))
    theirs, reference = (np.where(shown, values, 0.0) for values in (theirs, located.reference[site.key]))
    power = float((reference * reference).sum())
    factor = float((theirs * reference).sum()) / power if power else 0.0
    rest = float(np.linalg.norm(theirs - factor * reference))
    if factor and rest < 0.1 * site.error:
        notes.append(f"theirs is {factor:.6g} times the right value")
    each = np.sqrt(((theirs - reference) ** 2).sum(axis=tuple(a for a in range(1, theirs.ndim) if a != axis)))
    wrong = each > 0.1 * each.max()
    if wrong.sum() < 0.5 * counted.sum():
        places = [f"row {b} position {t}" for b, t in np.argwhere(wrong)[:4]]
        notes.append(f"{int(wrong.sum())} of {int(counted.sum())} positions carry it ({', '.join(places)}, ...)")
    if closest and closest[1] < 0.3:
        notes.append(f"closest is {closest[0]}, which leaves {closest[1]:.1%} of the difference")
    return "; ".join(notes) or "it is spread over all positions"
