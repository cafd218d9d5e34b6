"""The whole answer as plain JSON values, which text and page are made from, so that all three say the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax.model.language_model import LanguageModel
from apr_jax.parity import curves, formulas
from apr_jax.parity.backward.diagnose import BackwardDiagnosis
from apr_jax.parity.diagnose import Diagnosis
from apr_jax.parity.dumps import Dump
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.findings import Finding
from apr_jax.parity.localise import STANDINGS, UNWIDENED, Localisation, Site
from apr_jax.trace import stages
from apr_jax.trace.agreement import agreement
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import dumped_columns, dumped_tokens, gather_positions, shown_positions, token_mask


def report(diagnosis: Diagnosis, dump: Dump, exact: LanguageModel, notes: Sequence[str]) -> dict[str, Any]:
    """Returns the answer.

    Args:
      diagnosis: What was found.
      dump: What was examined.
      exact: The model in float64.
      notes: What else the reader has to know.

    Returns:
      "verdict" ("equal", "rounding" or "mistake"), "standing" (one of `STANDINGS`, the worst stage's), "compared",
      "dtype" (that theirs is judged in), "widened" (stage -> how many times its budget was applied, where not once),
      "unexamined", "first_wrong" (each wrong stage -> its first wrong position), "findings", "notes", "stages" (each
      with its errors in L2), "worst_stage" (with its curves), "logits" (end to end: theirs against float64 from the
      tokens on). NaN and infinities are None.
    """
    located = diagnosis.localisation
    sites = [site for site in located.sites if site.elements]
    mistakes = [finding for finding in diagnosis.findings if FAULTS[finding.fault].mistake]
    exactly = all(site.error == 0 for site in sites)
    unexplained = any(site.wrong for site in sites) and not diagnosis.by_design
    verdict = "mistake" if mistakes or unexplained else ("equal" if exactly else "rounding")
    values = {
        "verdict": verdict,
        "standing": _standing(verdict, sites),
        "compared": {
            "stages": len(sites),
            "elements": sum(site.elements for site in sites),
            "positions": _compared_positions(diagnosis, dump),
        },
        "dtype": located.dtype,
        "widened": {stage: factor for stage, factor in located.widened.items() if factor != 1.0},
        "unexamined": _unexamined(diagnosis, dump, exact),
        "findings": [_of_finding(finding, exact) for finding in diagnosis.findings],
        "first_wrong": _first_wrong(diagnosis, dump),
        "notes": list(notes),
        "stages": [_of_site(site) for site in located.sites],
        # Of a long sequence, which is judged by excerpts, no value of ours is there at all positions.
        "worst_stage": _worst_stage(located, dump, exact) if located.reference else None,
        "logits": _of_logits(dump, exact) if located.reference else None,
    }
    return finite(values)


def with_gradients(answer: Mapping[str, Any], back: BackwardDiagnosis, exact: LanguageModel) -> dict[str, Any]:
    """Returns the answer with what was found of a backward pass: its findings and gradients behind the forward pass's.

    Args:
      answer: As `report` returns it.
      back: What was found.
      exact: The model in float64.

    Returns:
      The same entries; where no value of the forward pass was dumped, no stage is listed as not examined.
    """
    sites = [site for site in back.sites if site.elements]
    wrong = any(site.wrong for site in sites)
    verdicts = ("equal", "rounding", "mistake")
    verdict = "mistake" if back.findings or wrong else "rounding" if any(site.error for site in sites) else "equal"
    if answer["stages"]:
        verdict = max(verdict, answer["verdict"], key=verdicts.index)
    compared = answer["compared"]
    forward_only = list(answer["unexamined"]) if answer["stages"] else []
    standings = [answer["standing"]] if answer["stages"] else []
    standings += [_standing(verdict, sites)]
    values = {
        **answer,
        "verdict": verdict,
        "standing": max(standings, key=STANDINGS.index),
        "compared": {
            "stages": compared["stages"] + len(sites),
            "elements": compared["elements"] + sum(site.elements for site in sites),
            "positions": max(compared["positions"], back.positions),
        },
        "unexamined": [*forward_only, *(f"{key} ({why})" for key, why in back.unexamined.items())],
        "findings": [*answer["findings"], *(_of_finding(finding, exact) for finding in back.findings)],
        "notes": [*answer["notes"], *back.notes],
        "stages": [*answer["stages"], *(_of_site(site) for site in back.sites)],
    }
    return finite(values)


def of_summaries(answer: Any, dump: Dump, dtype: str, widened: Mapping[str, float] = UNWIDENED) -> dict[str, Any]:
    """Returns the answer on a dump of a few numbers of each stage: "first" are those of the first stage that differs.

    Args:
      answer: As `summaries.judge` returns it.
      dump: What was examined.
      dtype: What it was judged in.
      widened: Stage -> how many times more its numbers were allowed to be off.
    """
    values = {
        "verdict": "mistake" if answer.differences else "rounding",
        "compared": {
            "stages": len(answer.compared),
            "numbers": sum(len(dump.summaries[key].numbers) for key in answer.compared),
        },
        "dtype": dtype,
        "widened": {stage: factor for stage, factor in widened.items() if factor != 1.0},
        "first": [dataclasses.asdict(difference) for difference in answer.differences],
        "shortlist": list(answer.shortlist),
    }
    return finite(values)


def finite(value: Any) -> Any:
    """Returns JSON values in which a number that is not finite is None, and tuples are lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _standing(verdict: str, sites: Sequence[Site]) -> str:
    """The worst stage's; what the file asks for (activations rounded beside quantised weights) is no mistake."""
    if verdict == "mistake":
        return STANDINGS[2]
    return STANDINGS[int(any(site.standing != STANDINGS[0] for site in sites))]


def _of_finding(finding: Finding, exact: LanguageModel) -> dict[str, Any]:
    pair = formulas.pair(finding, exact.config)
    return dataclasses.asdict(finding) | {"formulas": pair and pair._asdict()}


def _of_site(site: Site) -> dict[str, Any]:
    """What is known of a stage; one behind a value that is not finite was not judged."""
    numbers = {name: getattr(site, name) for name in ("error", "own", "allowed", "budget", "norm", "share")}
    place = {"key": str(site.key), "layer": site.layer, "stage": site.stage, "elements": site.elements}
    if not site.elements:
        return place | dict.fromkeys(numbers) | {"standing": "not judged"}
    return place | numbers | {"standing": site.standing, "finite": site.finite}


def _worst_stage(located: Localisation, dump: Dump, exact: LanguageModel) -> dict[str, Any] | None:
    site = curves.worst(located)
    if site is None:
        return None
    drawn = curves.curves(located, site, dump.inputs, exact.config)
    return {"key": str(site.key), "curves": [dataclasses.asdict(curve) for curve in drawn]}


def _of_logits(dump: Dump, exact: LanguageModel) -> dict[str, Any] | None:
    """How their logits agree with a right run's, whatever they computed on the way; None without logits."""
    theirs = dump.values.get(stages.LOGITS)
    if theirs is None:
        return None
    inputs, key = dump.inputs, stages.LOGITS
    columns = dumped_columns(key, theirs.shape[1], inputs, dump.columns)
    right, counted = (gather_positions(key, x, columns) for x in (exact.trace(inputs, [key])[key], token_mask(inputs)))
    found = agreement(np.asarray(theirs)[counted], np.asarray(right)[counted])
    return found.to_json() | {"worst": _place(found.worst_position, counted, inputs, columns)}


def _place(index: int, counted: np.ndarray, inputs: Inputs, columns: np.ndarray | None) -> dict[str, int] | None:
    """Where one of the compared positions stands: row of the batch, position, and the token there."""
    if index < 0:
        return None
    row, column = np.argwhere(counted)[index]
    column = column if columns is None else columns[row, column]
    return {
        "row": int(row),
        "position": int(inputs.positions()[row, column]),
        "input_id": int(inputs.input_ids[row, column]),
    }


def _first_wrong(diagnosis: Diagnosis, dump: Dump) -> dict[str, dict[str, Any]]:
    """Each wrong stage -> its first wrong position, and the last one before that was dumped and so is right."""
    found: dict[str, dict[str, Any]] = {}
    for site in diagnosis.localisation.sites:
        if not site.wrong or site.first is None:
            continue
        row, column = site.first
        tokens = dumped_tokens(dump.inputs, diagnosis.localisation.columns.get(site.key))[row]
        before, positions = np.flatnonzero(tokens[:column]), dump.inputs.position_ids[row]
        last = int(positions[before[-1]]) if len(before) else None
        found[site.key] = {"row": row, "position": int(positions[column]), "right_before": last}
    return found


def _compared_positions(diagnosis: Diagnosis, dump: Dump) -> int:
    """The number of positions of which some stage was compared."""
    partial, seen = diagnosis.localisation.columns, np.zeros(dump.inputs.input_ids.shape, bool)
    for site in diagnosis.localisation.sites:
        if site.elements:
            seen = seen | dumped_tokens(dump.inputs, partial.get(site.key))
    return int(seen.sum())


def _unexamined(diagnosis: Diagnosis, dump: Dump, exact: LanguageModel) -> list[str]:
    """Stages that were not dumped, or only behind a value that is not finite; positions that were not dumped."""
    judged = {site.key for site in diagnosis.localisation.sites if site.elements}
    keys: list[str] = [key for key in stages.trace_keys(exact.config.num_layers) if key not in judged]
    if dump.columns is None:
        return keys
    others = np.delete(np.arange(dump.inputs.input_ids.shape[1]), np.unique(dump.columns))
    missing = shown_positions(dump.inputs, np.tile(others, (len(dump.columns), 1)))
    return [*keys, f"positions {missing}"] if missing else keys
