"""What was found at each stage and layer, put together: one finding for each mistake, with its sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apr_jax.parity.faults.outside import LAYOUT
from apr_jax.parity.faults.record import COMMON, IGNORED, LEAST, OR, UNION, Fault, Mistake, ranges
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.layouts import Layout
from apr_jax.parity.localise import Site
from apr_jax.parity.wording import sentence
from apr_jax.trace.stages import Key

_SAME = 0.01
"""Solved numbers that agree to this are one."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One mistake, wherever it was found.

    Attributes:
      fault: Its name in the table of faults; where nothing explains a stage, that of what is seen.
      layers: Layers that it was found in; "all"; or empty outside the layers.
      stage: The first stage that shows it.
      parameters: What it is parameterised by.
      residual_before: Largest relative L2 of their values against the right ones, over the stages that show it.
      residual_after: The same against the values under this mistake; None where it is not known.
      alternatives: Mistakes that give the same values here.
      certainty: "certain", "ambiguous" (see alternatives) or "unexplained".
      sentence: All of it in a line.
      cannot_show: Right stages that could not show it, were it made there too; of mistakes with a number.
      first: Row and column of the first position that shows it; None where no single one does.
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
    cannot_show: tuple[str, ...] = ()
    first: tuple[int, int] | None = None


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


Sighting = tuple[Mistake, Explanation]


def gather(explained: Iterable[Explanation], num_layers: int) -> list[Finding]:
    """Groups what was found at each stage into one finding for each mistake, in order of execution."""
    groups: list[list[Sighting]] = []
    for explanation in explained:
        for mistake in explanation.mistakes:
            sighting = (mistake, explanation)
            group = next((group for group in groups if all(_is_one(other, sighting) for other in group)), None)
            if group is None:
                groups.append([sighting])
            else:
                group.append(sighting)
    for fault in FAULTS.values():
        if fault.hides:
            groups = _without_hidden(groups, fault)
    for fault in FAULTS.values():
        if fault.consists_of:
            groups = _with_whole(groups, fault)
    return [_finding(group, num_layers) for group in groups]


def _is_one(known: Sighting, other: Sighting) -> bool:
    """Whether two sightings are one mistake; what is merely seen is a finding of its own at each stage."""
    (a, where), (b, there) = known, other
    if a.fault is not b.fault:
        return False
    if a.fault.unexplained:
        return where.site.stage == there.site.stage and a.parameters.get("where") == b.parameters.get("where")
    ours, theirs = ({k: v for k, v in m.pairs if k not in a.fault.merge} for m in (a, b))
    if a.within != b.within or a.stage != b.stage or not _has_common(a, b):
        return False
    return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)


def _has_common(a: Mistake, b: Mistake) -> bool:
    """Whether what two sightings could be has something in common."""
    names = (name for name, how in a.fault.merge.items() if how == COMMON)
    return all(set(a.parameters[name].split(OR)) & set(b.parameters[name].split(OR)) for name in names)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_SAME)
    return bool(a == b)


def _layers(groups: Iterable[list[Sighting]], name: str) -> set[int | None]:
    """The layers at whose stages a fault of this name was found."""
    return {explanation.site.layer for group in groups for mistake, explanation in group if mistake.name == name}


def _without(groups: Iterable[list[Sighting]], names: Iterable[str], layers: set[int | None]) -> list[list[Sighting]]:
    """The groups without what was found of some faults in some layers."""
    names = set(names)
    kept = [[s for s in group if s[0].name not in names or s[1].site.layer not in layers] for group in groups]
    return [group for group in kept if group]


def _without_hidden(groups: list[list[Sighting]], fault: Fault) -> list[list[Sighting]]:
    return _without(groups, fault.hides, _layers(groups, fault.name))


def _with_whole(groups: list[list[Sighting]], whole: Fault) -> list[list[Sighting]]:
    """Faults that were all made in a layer, said as the one that they are together."""
    common = set.intersection(*(_layers(groups, name) for name in whole.consists_of))
    first = whole.consists_of[0]
    members = [s for group in groups for s in group if s[0].name == first and s[1].site.layer in common]
    if not members:
        return groups
    made = [(whole.made(), explanation) for _, explanation in members]
    already = [s for group in groups for s in group if s[0].fault is whole]
    rest = [group for group in groups if group[0][0].fault is not whole]
    return [*_without(rest, whole.consists_of, common), [*already, *made]]


def _merged(group: Iterable[Sighting]) -> dict[str, Any]:
    """The parameters of all sightings of one mistake."""
    mistakes = [mistake for mistake, _ in group]
    parameters = mistakes[0].shown
    for name, how in mistakes[0].fault.merge.items():
        values = [mistake.parameters[name] for mistake in mistakes if name in mistake.parameters]
        if how == IGNORED:
            parameters.pop(name, None)
        elif how == COMMON:
            left = [item for item in values[0].split(OR) if all(item in value.split(OR) for value in values)]
            parameters[name] = OR.join(left)
        elif how == LEAST:
            parameters[name] = min(values)
        elif how == UNION and (isinstance(values[0], tuple) or len(set(values)) > 1):
            parameters[name] = sorted({item for v in values for item in (v if isinstance(v, tuple) else (v,))})
    return parameters


def _finding(group: list[Sighting], num_layers: int) -> Finding:
    fault, explanations = group[0][0].fault, [explanation for _, explanation in group]
    parameters, stage = _merged(group), explanations[0].site.stage
    if (where := group[0][0].stage) not in ("", stage):
        parameters["where"] = f"{parameters['where']} of {where}" if "where" in parameters else where
        parameters["stage"] = where
    found = sorted({layer for e in explanations for layer in e.layers_of(fault.name)})
    layers: tuple[int, ...] | str = "all" if found == list(range(num_layers)) and num_layers > 1 else tuple(found)
    alternatives = tuple(sorted({other for e in explanations for other in e.instead_of(fault.name)} - {fault.name}))
    before = max(e.before for e in explanations)
    after = max((e.after for e in explanations if e.after is not None), default=None)
    note = next((e.note for e in explanations if e.note), "")
    certainty = "unexplained" if fault.unexplained else ("ambiguous" if alternatives else "certain")
    text = sentence(fault, layers, stage, parameters, before, after, note)
    firsts = [explanation.site.first for explanation in explanations if explanation.site.first is not None]
    first = min(firsts, key=lambda place: (place[1], place[0]), default=None)
    return Finding(fault.name, layers, stage, parameters, before, after, alternatives, certainty, text, first=first)


def cannot_show(finding: Finding, keys: Sequence[Key]) -> Finding:
    """Returns a finding that says which right stages could not show it: layers in which it was not found, and norms."""
    layers = {key.layer for key in keys if key.layer is not None}
    layers -= set() if isinstance(finding.layers, str) else set(finding.layers)
    if finding.layers == "all":
        layers = set()
    unshown = tuple(key for key in keys if key.layer is None or key.layer in layers)
    if not unshown:
        return finding
    said = [f"layer{'s' if len(layers) > 1 else ''} {ranges(sorted(layers))}"] if layers else []
    said += [key.stage for key in unshown if key.layer is None]
    text = f"{finding.sentence}; {' and '.join(said)} cannot show it"
    return dataclasses.replace(finding, sentence=text, cannot_show=tuple(map(str, unshown)))


def order_finding(mistake: Mistake) -> Finding:
    """Returns the finding of layers that are executed in another order."""
    parameters = {name: list(value) if isinstance(value, tuple) else value for name, value in mistake.pairs}
    text = sentence(mistake.fault, (), "", parameters, None, None)
    return Finding(mistake.name, (), "", parameters, float("nan"), None, (), "certain", text)


def layout_findings(layouts: Iterable[Layout], num_layers: int) -> list[Finding]:
    """One finding for each kind of layout; it is said, and no mistake."""
    kinds: dict[str, list[Layout]] = {}
    for layout in layouts:
        kinds.setdefault(layout.kind, []).append(layout)
    findings = []
    for kind, members in kinds.items():
        layers = sorted({layout.key.layer for layout in members if layout.key.layer is not None})
        named: tuple[int, ...] | str = "all" if layers == list(range(num_layers)) else tuple(layers)
        shown = sorted({layout.key.stage for layout in members})
        parameters = {"kind": kind, "stages": shown}
        text = sentence(LAYOUT, named, ", ".join(shown), parameters, None, None)
        findings.append(Finding(LAYOUT.name, named, members[0].key.stage, parameters, 0.0, None, (), "certain", text))
    return findings
