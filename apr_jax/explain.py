"""From wrong stages to named mistakes.

At each wrong stage the hypotheses that touch it are computed from the other side's own inputs. One is believed if it
reproduces their values to within the stage's budget; if several do, the one with the fewest mistakes is named, and
those that cannot be told from it are its alternatives. What is found at several stages and layers is then put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax import stages
from apr_jax.hypotheses import GENERATORS, Hypothesis, Mistake
from apr_jax.inputs import Inputs
from apr_jax.layouts import Layout, undo
from apr_jax.localise import Localisation, Site, judge, localise
from apr_jax.model import LanguageModel
from apr_jax.scene import Scene
from apr_jax.sentences import sentence

_SLACK = 1.5
"""A hypothesis may be this much farther off than a right stage: the mistake's own rounding is not ours."""


_STEPPED = ("bf16-accumulation", "activations-quantised")
_CHAOTIC = 0.1
"""What sums in bf16 and activations in int8 may leave unexplained."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One mistake, wherever it was found.

    Attributes:
      fault: Its name, or "unknown".
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
    """What became of one wrong stage."""

    site: Site
    mistakes: tuple[Mistake, ...]
    after: float | None
    alternatives: tuple[str, ...] = ()
    note: str = ""

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


def diagnose(exact: LanguageModel, same: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray]) -> Diagnosis:
    """Localises and explains.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch.
      theirs: Trace key -> array [B, T, ...].
    """
    theirs, layouts = undo(exact, inputs, theirs)
    order, mistake = _execution_order(exact, inputs, theirs)
    if mistake is not None:
        exact, same = (_reordered(model, order) for model in (exact, same))
    located = localise(exact, same, inputs, theirs)
    scene = Scene(exact.config, exact.parameters, inputs, theirs)
    explained = [explain(scene, site, located) for site in located.sites if site.wrong]
    findings = _gather(explained, exact.config.num_layers)
    if mistake is not None:
        findings = [_order_finding(mistake), *findings]
    return Diagnosis((*findings, *_layout_findings(layouts, exact.config.num_layers)), located)


def explain(scene: Scene, site: Site, located: Localisation) -> Explanation:
    """Finds the mistakes that reproduce one wrong stage."""
    theirs = np.asarray(scene.theirs[site.key], np.float64)
    if not site.finite:
        return Explanation(site, (Mistake.of("non-finite"),), None, note=_where_not_finite(theirs))
    layer = -1 if site.layer is None else site.layer
    accepted: list[tuple[Hypothesis, float]] = []
    closest: tuple[Hypothesis, float] | None = None
    for hypothesis in GENERATORS[site.stage](scene, layer, site.stage, theirs):
        if not hypothesis.mistakes:
            continue
        if accepted and len(hypothesis.mistakes) > len(accepted[0][0].mistakes):
            break
        value = hypothesis.value()
        error, within = _fits(scene, site, located, value)
        # A rounding that falls the other way moves a whole step: such mistakes are told by most values, not by all.
        chaotic = hypothesis.mistakes[-1].name in _STEPPED and error <= _CHAOTIC * site.error
        if within or chaotic:
            accepted.append((hypothesis, error))
        elif np.isfinite(error) and (closest is None or error < closest[1]):
            closest = (hypothesis, error)
    if not accepted:
        return Explanation(site, (Mistake.of("unknown"),), None, note=_description(theirs, located, site, closest))
    error = min(error for _, error in accepted)
    chosen = next(pair for pair in accepted if pair[1] <= 2 * error + 0.5 * site.budget)
    others = {_names(hypothesis) for hypothesis, other in accepted if other <= 2 * error + 0.1 * site.budget}
    alternatives = tuple(sorted(others - {_names(chosen[0])}))
    return Explanation(site, chosen[0].mistakes, chosen[1] / site.norm if site.norm else chosen[1], alternatives)


def _names(hypothesis: Hypothesis) -> str:
    return " and ".join(sorted({mistake.name for mistake in hypothesis.mistakes}))


def _fits(scene: Scene, site: Site, located: Localisation, value: np.ndarray) -> tuple[float, bool]:
    """Returns |theirs - value| and whether that is rounding, by the measure that right stages are judged with."""
    theirs, reference = scene.theirs[site.key], located.reference[site.key]
    if not np.isfinite(value).all():
        return float("inf"), False
    # Our own error at the right stage, carried over to the size of the wrong values.
    scale = max(1.0, float(np.linalg.norm(value)) / max(float(np.linalg.norm(reference)), 1e-300))
    noise = value * (1 + scale * site.own / site.norm) if site.norm else value
    judged = judge(site.key, theirs, value, noise, scene.inputs, located.dtype)
    return judged.error, judged.error <= _SLACK * judged.budget and judged.worst <= 2 * _SLACK


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

_TELLING = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
_FED_BY = {
    "qkv_matmul": "attn_norm",
    "attn_out": "attention",
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
    "ffn_out": "ffn_swigl",
}


def _execution_order(
    exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray]
) -> tuple[list[int], Mistake | None]:
    """Which layer's weights each dumped layer was computed with, and what that order is called."""
    layers = exact.config.num_layers
    dumped = 1 + max((int(key.split(".")[1]) for key in theirs if key.count(".") == 2), default=-1)
    whole = stages.FINAL_NORM in theirs or stages.LOGITS in theirs
    count = dumped if whole and dumped else layers
    order = [_weights_of(exact, inputs, theirs, layer) for layer in range(count)]
    if order == list(range(layers)):
        return order, None
    for layer in range(layers):
        if order == [index for index in range(layers) if index != layer]:
            return order, Mistake.of("layer-skipped", layer=layer)
        if order == sorted([*range(layers), layer]):
            return order, Mistake.of("layer-repeated", layer=layer)
    return order, Mistake.of("layer-order", order=tuple(order))


def _weights_of(exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], layer: int) -> int:
    """The layer of the file whose matrices reproduce most products of a dumped layer; its own number in doubt."""
    scene = Scene(exact.config, exact.parameters, inputs, theirs)
    tokens = inputs.attention_mask == 1
    votes: dict[int, int] = {}
    for stage in _TELLING:
        key, source = stages.layer_key(layer, stage), stages.layer_key(layer, _FED_BY[stage])
        if key not in theirs or source not in theirs or not np.isfinite(theirs[key][tokens]).all():
            continue
        fixed = dataclasses.replace(scene, theirs={source: theirs[source]})
        distances = []
        for candidate in range(exact.config.num_layers):
            moved = dataclasses.replace(fixed, theirs={stages.layer_key(candidate, _FED_BY[stage]): theirs[source]})
            value = moved.compute(stages.layer_key(candidate, stage))
            distances.append(float(np.linalg.norm((value - theirs[key])[tokens])))
            if candidate == layer and distances[-1] <= 0.05 * np.linalg.norm(theirs[key][tokens]):
                break
        best = int(np.argmin(distances))
        if distances[best] <= 0.05 * np.linalg.norm(theirs[key][tokens]):
            votes[best] = votes.get(best, 0) + 1
    if layer < exact.config.num_layers and (not votes or votes.get(layer, 0) >= max(votes.values())):
        return layer
    # One matrix of another layer is a mistake of its own; a layer's place is told by most of them.
    best, count = max(votes.items(), key=lambda pair: pair[1], default=(min(layer, exact.config.num_layers - 1), 0))
    return best if count >= 2 else min(layer, exact.config.num_layers - 1)


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
            groups.setdefault(_identity(mistake, explanation), []).append((mistake, explanation))
    _merge_biases(groups)
    return [_finding(name, members, num_layers) for (name, _), members in groups.items()]


def _identity(mistake: Mistake, explanation: Explanation) -> tuple[str, Any]:
    """What makes two sightings one mistake. Solved numbers are the same if they agree to 1 %."""
    parameters = dict(mistake.parameters)
    for found_at_the_site in ("norms", "chunk"):
        parameters.pop(found_at_the_site, None)
    rounded = tuple((k, float(f"{v:.1e}") if isinstance(v, float) else v) for k, v in sorted(parameters.items()))
    if mistake.name in ("unknown", "non-finite"):
        return mistake.name, explanation.site.stage
    return mistake.name, rounded


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
    if "chunk" in parameters:
        # Sums no longer than a chunk do not tell how long it is.
        parameters["chunk"] = min(dict(mistake.parameters)["chunk"] for mistake, _ in members)
    if "norms" in parameters:
        parameters["norms"] = sorted({norm for mistake, _ in members for norm in dict(mistake.parameters)["norms"]})
    found = sorted({e.site.layer for e in explanations if e.site.layer is not None})
    layers: tuple[int, ...] | str = "all" if found == list(range(num_layers)) and num_layers > 1 else tuple(found)
    afters = [e.after for e in explanations if e.after is not None]
    alternatives = tuple(sorted({other for e in explanations for other in e.alternatives} - {name}))
    unexplained = name in ("unknown", "non-finite")
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


def _description(
    theirs: np.ndarray, located: Localisation, site: Site, closest: tuple[Hypothesis, float] | None
) -> str:
    reference = located.reference[site.key]
    if theirs.shape != reference.shape:
        return "only the last position was dumped"
    notes = []
    if site.constant:
        notes.append(f"all values are {theirs.flat[0]:.6g}")
    power = float((reference * reference).sum())
    factor = float((theirs * reference).sum()) / power if power else 0.0
    rest = float(np.linalg.norm(theirs - factor * reference))
    if factor and rest < 0.1 * site.error:
        notes.append(f"theirs is {factor:.6g} times the right value")
    axes = tuple(range(2, theirs.ndim))
    rows = np.sqrt(((theirs - reference) ** 2).sum(axis=axes))
    wrong = rows > 0.1 * rows.max()
    if wrong.mean() < 0.5:
        places = [f"row {b} position {t}" for b, t in np.argwhere(wrong)[:4]]
        notes.append(f"{int(wrong.sum())} of {wrong.size} positions carry it ({', '.join(places)}, ...)")
    if closest and closest[1] < 0.3 * site.error:
        notes.append(f"closest is {_names(closest[0])}, which leaves {closest[1] / site.error:.1%} of the difference")
    return "; ".join(notes) or "it is spread over all positions"
