"""From another engine's dump to named mistakes.

At each wrong stage the hypotheses that touch it are computed from the other side's own inputs. One is believed if it
reproduces their values to within the stage's budget; if several do, the one with the fewest mistakes is named, and
those that cannot be told from it are its alternatives. What is found at several stages and layers is then put together.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np

from apr_jax.converters.storage.workers import Workers
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity import excerpts
from apr_jax.parity.description import describe
from apr_jax.parity.faults.record import Mistake, Mistakes
from apr_jax.parity.faults.seen import CONSTANT, NON_FINITE, OVERFLOW, PERMUTED, UNKNOWN
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.findings import Explanation, Finding, cannot_show, gather, layout_findings, order_finding
from apr_jax.parity.layer_order import execution_order, reordered
from apr_jax.parity.layouts import undo
from apr_jax.parity.localise import (
    UNWIDENED,
    Localisation,
    Site,
    judge,
    localise,
    row_norms,
    turn_budgets,
    worst_share,
)
from apr_jax.parity.replay import Replay
from apr_jax.parity.search import Answer, Known, Search, silent
from apr_jax.parity.wording import LARGEST_HALF, overflows, places, where_not_finite
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import (
    compared_positions,
    complete,
    gather_positions,
    position_axis,
    scatter_positions,
)
from apr_jax.trace.stages import Key

_SHOWN_BY = 32
"""Positions by which it is judged whether a stage can show a mistake."""
_THREADS = 8
"""At how many stages at a time what is known is tried: each takes some copies of the stage."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The whole answer.

    Attributes:
      findings: The mistakes.
      localisation: The stages that they were found at.
      by_design: Deviations that were found and taken out because the file asks for them.
      explained: What was found at each wrong stage.
      replay: The replay that stages were explained with; None of a long sequence.
    """

    findings: tuple[Finding, ...]
    localisation: Localisation
    by_design: frozenset[str] = frozenset()
    explained: tuple[Explanation, ...] = ()
    replay: Replay | None = None


def diagnose(
    exact: LanguageModel,
    same: LanguageModel,
    inputs: Inputs,
    theirs: Mapping[str, np.ndarray],
    columns: np.ndarray | None = None,
    progress: Callable[[str], None] = silent,
    widened: Mapping[str, float] = UNWIDENED,
) -> Diagnosis:
    """Localises and explains.

    Args:
      exact: The model in float64.
      same: The model in the dtype that the other side computes in.
      inputs: The batch.
      theirs: Trace key -> array [B, T, ...], or rows [B, R, ...]; stages may be missing.
      columns: Which columns of the batch such rows stand for, [B, R].
      progress: Is told what is going on, often.
      widened: Stage -> how many times its budget is applied; one where it is not named.
    """
    if excerpts.needed(exact.config, inputs):
        return _diagnose_long(exact, same, inputs, theirs, columns, progress, widened)
    dumped, layouts = undo(exact, inputs, complete(theirs, inputs, columns, lambda: exact.trace(inputs)))
    order, mistake = execution_order(exact, inputs, dumped.rows())
    if mistake is not None:
        exact, same = (reordered(model, order) for model in (exact, same))
        dumped = dumped.over(exact.trace(inputs)) if dumped.partial else dumped
    progress(f"{len(dumped.values)} stages are judged")
    located = localise(exact, same, inputs, dumped, widened)
    replay = Replay(exact.config, exact.parameters, inputs, located.theirs)
    explained = _explain_all(replay, located, progress)
    if dumped.partial and _unknown(explained) and all(site.finite for site in located.sites):
        located, explained = min(
            (located, explained), _explain_in_order(replay, located, progress), key=lambda e: _unknown(e[1])
        )
    findings = [_with_unshown(finding, replay, located) for finding in gather(explained, exact.config.num_layers)]
    if mistake is not None:
        findings = [order_finding(mistake), *findings]
    found = (*findings, *layout_findings(layouts, exact.config.num_layers))
    return Diagnosis(found, located, explained=tuple(explained), replay=None if mistake is not None else replay)


def nothing(exact: LanguageModel, inputs: Inputs, dtype: str) -> Diagnosis:
    """Returns the answer on a dump that holds no value of the forward pass, for its gradients to be examined."""
    return Diagnosis((), Localisation((), {}, dtype, {}, {}), replay=Replay(exact.config, exact.parameters, inputs, {}))


def _diagnose_long(
    exact: LanguageModel,
    same: LanguageModel,
    inputs: Inputs,
    theirs: Mapping[str, np.ndarray],
    columns: np.ndarray | None,
    progress: Callable[[str], None],
    widened: Mapping[str, float],
) -> Diagnosis:
    """As `diagnose`, by excerpts: what was dumped at all positions is judged there, layouts are taken as they are."""
    dump = excerpts.LongDump(exact, same, inputs, theirs, columns, widened)
    order, mistake = execution_order(exact, *dump.sample())
    if mistake is not None:
        exact, same = (reordered(model, order) for model in (exact, same))
        dump = excerpts.LongDump(exact, same, inputs, theirs, columns, widened)
    judged: dict[str, list[Site]] = {}
    explained: list[Explanation] = []
    parts = []
    for part in dump.parts(progress):
        parts.append(part)
        for site in part.sites:
            judged.setdefault(site.key, []).append(site)
        explained += _explain_part(part, explained, progress)
    found = gather(explained, exact.config.num_layers)
    findings = [_with_unshown(finding, parts[0].replay, parts[0].located) for finding in found]
    if mistake is not None:
        findings = [order_finding(mistake), *findings]
    sites = tuple(excerpts.joined(judged[key]) for key in stages.trace_keys(exact.config.num_layers) if key in judged)
    partial = {key: some for key in judged if (some := dump.columns_of(key)) is not None}
    return Diagnosis(tuple(findings), Localisation(sites, {}, same.dtype, theirs, partial, widened))


def _explain_part(
    part: excerpts.Part, before: Sequence[Explanation], progress: Callable[[str], None]
) -> list[Explanation]:
    """Explains what is wrong at some positions of a long sequence: by what explains others first."""
    replay, located = part.replay, part.located
    recalled: dict[str, Explanation | None] = {}
    tried: list[tuple[Site, Known]] = []
    for site in (site for site in located.sites if site.wrong and site.finite and before):
        nodes = set(replay.undumped(site.key))
        inside = [explanation for explanation in before if explanation.site.key in nodes]
        if any(explanation.after is None for explanation in inside):
            recalled[site.key] = None  # behind what nothing explains
        elif mistakes := tuple(dict.fromkeys(mistake for one in inside for mistake in one.mistakes)):
            tried.append((site, Known()))
            tried[-1][1].add(site.stage, Answer(mistakes, 0.0))
    with Workers(min(_THREADS, os.cpu_count() or 1)) as workers:
        answers = workers.map(lambda pair: _recall(replay, pair[0], located, pair[1]), tried)
        recalled |= {site.key: answer for (site, _), answer in zip(tried, answers, strict=True) if answer is not None}
    rest = tuple(site for site in located.sites if site.key not in recalled)
    explained = _explain_all(replay, dataclasses.replace(located, sites=rest), progress)
    shown = {site.key for site in located.sites if site.wrong}
    for site in (site for site in part.sites if site.wrong and site.key not in shown):
        explained.append(Explanation(site, (UNKNOWN.made(),), None, note="at positions that were not looked at again"))
    return [*(answer for answer in recalled.values() if answer is not None), *explained]


def _with_unshown(finding: Finding, replay: Replay, located: Localisation) -> Finding:
    """Says which right stages could not show a mistake with a number, were it made there too."""
    fault = FAULTS[finding.fault]
    if fault.grid is None or callable(fault.stages) or finding.layers == ():
        return finding
    unshown, few = [], _few(located)
    for site in located.sites:
        if site.stage not in fault.stages or site.wrong or not site.elements:
            continue
        number = {fault.grid.parameter: finding.parameters[fault.grid.parameter]}
        parameters = {**next(iter(fault.variants(None, site.key)), {}), **number}
        if not finding.parameters.keys() <= parameters.keys():
            break  # the number alone does not make it
        mistake = fault.made(**parameters)
        some = dataclasses.replace(replay, rows=few)
        made, right = some.under((mistake,)).compute(site.key), some.look(site.stage, located.reference[site.key])
        window = replay.config.window_of(site.layer)
        counted = compared_positions(site.key, replay.inputs, located.theirs[site.key].shape, window=window)
        counted = counted.take(few, position_axis(site.key))
        moved = row_norms(made - right, counted)
        share = len(few) / replay.inputs.input_ids.shape[1]
        rows = site.row_budgets.take(few, position_axis(site.key))
        if float(np.linalg.norm(moved)) <= site.budget * share**0.5 and worst_share(moved, rows) <= 1.0:
            unshown.append(site.key)
    return cannot_show(finding, unshown)


def _few(located: Localisation) -> np.ndarray:
    """Some columns that every stage was dumped at."""
    lengths = [value.shape[position_axis(key)] for key, value in located.theirs.items()]
    return np.unique(np.linspace(0, min(lengths) - 1, _SHOWN_BY).astype(int))


def _explain_all(replay: Replay, located: Localisation, progress: Callable[[str], None]) -> list[Explanation]:
    """Explains every wrong stage, in order of execution.

    The first of each kind is searched among all hypotheses. What is found there is then tried at the others, several at
    a time; those that it does not explain are searched one by one.
    """
    wrong = [site for site in located.sites if site.wrong]
    found: dict[str, Explanation] = {}
    known, firsts = Known(progress=progress), {site.stage: site for site in reversed(wrong)}
    for site in (site for site in wrong if firsts[site.stage] is site):
        found[site.key] = explain(replay, site, located, known)
    others = [site for site in wrong if site.key not in found and site.finite and known.at(site.stage)]
    with Workers(min(_THREADS, os.cpu_count() or 1)) as workers:
        recalled = workers.map(lambda site: _recall(replay, site, located, known), others)
        found |= {site.key: answer for site, answer in zip(others, recalled, strict=True) if answer is not None}
    for site in wrong:
        if site.key not in found:
            found[site.key] = explain(replay, site, located, known)
    return [found[site.key] for site in wrong]


def _recall(replay: Replay, site: Site, located: Localisation, known: Known) -> Explanation | None:
    search = Search(replay, site, located)
    answer = search.recall(known)
    return None if answer is None else _explained(site, answer, search)


def explain(replay: Replay, site: Site, located: Localisation, known: Known) -> Explanation:
    """Finds the mistakes that reproduce one wrong stage; what was found at others before is in `known`."""
    theirs = np.asarray(located.theirs[site.key])
    if not site.finite:
        return _not_finite(replay, site, theirs, located.reference[site.key])
    search = Search(replay, site, located)
    if replay.beyond is not None and (columns := search.permuted()) is not None:
        return _permuted(replay, site, columns)  # slots of a cache; cheaper to see than to search for
    if answer := search.recall(known) or search.run(known):
        return _explained(site, answer, search)
    if site.constant:
        return Explanation(site, (CONSTANT.made(value=float(theirs.flat[0])),), None)
    columns = search.permuted()
    if columns is not None:
        return _permuted(replay, site, columns)
    seen = describe(replay.config, replay.inputs, located, site, search.closest)
    notes = [seen.note] if seen.note else []
    if missing := [before.stage for before in replay.undumped(site.key)[:-1]]:
        notes.append(f"not dumped before it: {', '.join(missing)}")
    if search.ended is not None:
        notes.append(f"the search was ended after {search.ended} explanations, sets of several mistakes among them")
    return Explanation(site, (UNKNOWN.made(**seen.parameters),), None, note="; ".join(notes))


def _not_finite(replay: Replay, site: Site, theirs: np.ndarray, right: np.ndarray) -> Explanation:
    """Values that are no numbers: those that float16 has none for, or any."""
    scores = site.stage == "attn_scores"
    mistake, scale = NON_FINITE.made(), replay.config.head_dim**0.5 if scores else 1.0
    if theirs.shape == right.shape and overflows(theirs, right, scale):
        mistake = OVERFLOW.made(
            largest=LARGEST_HALF, what="products of q and k, before their scale," if scores else "values"
        )
    return Explanation(site, (mistake,), None, note=where_not_finite(theirs, right))


def _permuted(replay: Replay, site: Site, columns: np.ndarray) -> Explanation:
    moved = columns != np.arange(columns.shape[1])
    named = PERMUTED.made(moved=int((moved & (replay.inputs.attention_mask == 1)).sum()))
    return Explanation(site, (named,), None, note=places(replay.inputs, moved, columns))


def _explained(site: Site, answer: Answer, search: Search) -> Explanation:
    after, layers = answer.error / (site.norm or 1.0), search.layers_of(answer)
    untold = [name for name, told in answer.told.items() if not told]
    note = f"these values do not tell the layers of {' and '.join(untold)}" if untold else ""
    return Explanation(site, answer.mistakes, after, answer.alternatives, note=note, layers=layers)


def _blurs(mistake: Mistake) -> bool:
    """Whether keys and values that were not dumped are known to no more than a few digits behind a mistake."""
    return mistake.fault is UNKNOWN or mistake.fault.multiplies


def _unknown(explained: Iterable[Explanation]) -> int:
    return sum(mistake.fault is UNKNOWN for explanation in explained for mistake in explanation.mistakes)


def _explain_in_order(
    replay: Replay, located: Localisation, progress: Callable[[str], None]
) -> tuple[Localisation, list[Explanation]]:
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
    known, order = Known(progress=progress), list(stages.trace_keys(replay.config.num_layers))
    for before in located.sites:
        key, part = before.key, located.columns.get(before.key)
        here, there = (dataclasses.replace(replay, theirs=each, memo={}) for each in (values, doubted))
        right, theirs = here.compute(key), located.theirs[key]
        each = turn_budgets(here, key, located.dtype)
        doubtful = right if doubted is values else there.compute(key)
        values[key], doubted[key] = (_filled_up(key, theirs, each, part) for each in (right, doubtful))
        own = right + np.hypot(right * (before.own / before.norm if before.norm else 0.0), doubtful - right)
        site = judge(key, values[key], right, own, replay.inputs, located.dtype, part, each)
        site = dataclasses.replace(site, widened=before.widened)
        if site.wrong:
            one = dataclasses.replace(located, sites=(site,), reference={key: right}, theirs=values)
            explanation = explain(here, site, one, known)
            unexplained = explanation.after is None
            blurred = any(_blurs(mistake) for other in explained for mistake in other.mistakes)
            if unexplained and blurred and _reads_cache(key, values, order):
                continue
            explained.append(explanation)
            if part is not None and not unexplained:
                made = here.under(explanation.mistakes).compute(key)
                others = _with_errors(explanation, here, made, part)
                if others != explanation.mistakes and doubted is values:
                    doubted = dict(values)
                doubted[key] = _filled_up(key, theirs, there.under(others).compute(key), part)
                values[key] = _filled_up(key, theirs, made, part)
        sites.append(site)
    return dataclasses.replace(located, sites=tuple(sites)), explained


def _filled_up(key: str, theirs: np.ndarray, ours: np.ndarray, part: np.ndarray | None) -> np.ndarray:
    """Their values at the positions that they dumped, ours elsewhere."""
    return theirs if part is None else scatter_positions(key, ours, gather_positions(key, theirs, part), part)


_STEP = 1e-4
"""Relative step of a number, to see what it changes."""


def _with_errors(explanation: Explanation, replay: Replay, made: np.ndarray, part: np.ndarray) -> Mistakes:
    """Returns the mistakes with each solved number moved until it changes the dumped rows by what they leave."""
    key, left = explanation.site.key, (explanation.after or 0.0) * explanation.site.norm
    moved = list(explanation.mistakes)
    for place, mistake in enumerate(explanation.mistakes):
        other = _scaled(mistake, 1 + _STEP)
        if other != mistake:
            changed = replay.under((*moved[:place], other, *moved[place + 1 :])).compute(key)
            change = float(np.linalg.norm(gather_positions(key, changed - made, part)))
            moved[place] = _scaled(mistake, 1 + min(_STEP * left / change, 1.0) if change else 1.0)
    return tuple(moved)


def _scaled(mistake: Mistake, factor: float) -> Mistake:
    """A mistake with its numbers that were solved for, which are floats, multiplied."""
    scaled = {name: value * factor if isinstance(value, float) else value for name, value in mistake.pairs}
    return mistake.having(**scaled)


def _reads_cache(key: str, dumped: Container[str], order: Sequence[str]) -> bool:
    """Whether a stage is computed from keys or values, itself or by way of stages before it that were not dumped."""
    gap = itertools.takewhile(
        lambda other: other == key or other not in dumped, reversed(order[: order.index(key) + 1])
    )
    return any(Key(other).stage in ("attn_scores", "attention") for other in gap)
