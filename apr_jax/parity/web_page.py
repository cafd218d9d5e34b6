"""The answer as one self-contained page: verdict, heat map, curves, findings with their formulas, logits, provenance.

It is made from the answer in JSON (`report.report`) and from nothing else. The map is a grid that is walked with the
arrow keys; a stage's numbers are said below it as the focus or the pointer moves. What is told by colour is told by a
sign and in words as well.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from apr_jax.converters.errors import printable
from apr_jax.converters.inspect import page
from apr_jax.parity.localise import STANDINGS
from apr_jax.trace import stages

SIGNS = {**dict(zip(STANDINGS, "✓≈✕", strict=True)), "not judged": "?"}
"""How a standing is shown in a cell."""
STEPS = (0.01, 0.1, 1.0, 10.0, 1e3, 1e5)
"""Where the shades of the map change, in budgets: three up to one, four beyond."""


def render(answer: Mapping[str, Any]) -> bytes:
    """Returns the page as UTF-8.

    Args:
      answer: What `parity --json` prints: of a dump of values, or of a dump of numbers.
    """
    sides = answer["sides"]
    title = f"Parity: {_name(sides['theirs']['examined'])} against {_name(sides['reference']['checkpoint'])}"
    body = _template().render(
        answer=answer,
        title=title,
        layers=_layers(answer),
        rows=_rows(answer),
        steps=STEPS,
        signs=SIGNS,
        tallied=[(standing, _count(answer, standing)) for standing in SIGNS],
    )
    return page.document(title, body, _file("report.css"), _file("report.js"))


def _name(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath("web", name).read_text("utf-8")


@functools.cache
def _template() -> jinja2.Template:
    """The template. Whatever it is given is escaped, control and bidirectional characters too."""
    environment = jinja2.Environment(
        autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for function in (number, value, times, shade, said, drawn):
        environment.filters[function.__name__] = function
    return environment.from_string(_file("report.html"))


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def number(value: float | None) -> str:
    """Returns a number with four digits; "not finite" for None."""
    return "not finite" if value is None else f"{value:.4g}"


def value(parameter: Any) -> str:
    """Returns a parameter of a finding as text."""
    if isinstance(parameter, list | tuple):
        return ", ".join(map(value, parameter))
    return f"{parameter:.6g}" if isinstance(parameter, float) else str(parameter)


def times(share: float | None) -> str:
    """Returns an error in budgets, in words."""
    return "beyond all bounds" if share is None else f"{share:.3g} times its budget"


def shade(share: float | None) -> int:
    """Returns which shade a cell has, 0 to 6; the deepest where there is no number."""
    return len(STEPS) if share is None else sum(share > step for step in STEPS)


def said(site: Mapping[str, Any]) -> str:
    """Returns all that is known of a stage in a sentence."""
    if not site["elements"]:
        return f"{site['key']}: not judged, something before it is not finite"
    return (
        f"{site['key']}: {site['standing']}, {times(site['share'])}. Off from float64 by {number(site['error'])} (L2);"
        f" the dtype allows {number(site['allowed'])}, the budget is {number(site['budget'])}."
        f" The right values have {number(site['norm'])}, {site['elements']} elements."
    )


def _count(answer: Mapping[str, Any], standing: str) -> int:
    return sum(site["standing"] == standing for site in answer.get("stages", ()))


def _layers(answer: Mapping[str, Any]) -> list[int]:
    return sorted({site["layer"] for site in answer.get("stages", ()) if site["layer"] is not None})


def _rows(answer: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any] | None]]]:
    """The rows of the map, in order of execution: a stage, and its site outside the layers and in each of them."""
    by_place = {(site["stage"], site["layer"]): site for site in answer.get("stages", ())}
    places = [None, *_layers(answer)]
    rows: list[tuple[str, list[Mapping[str, Any] | None]]] = []
    for name in ("embedding", *stages.LAYER_STAGES, "final_norm", "logits"):
        cells = [by_place.get((name, layer)) for layer in places]
        if any(cells):
            rows.append((name, cells))
    return rows


# --- Curves ----------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 36


def drawn(curve: Mapping[str, Any]) -> Markup:
    """Returns a curve as an inline SVG: theirs a line, the budget dashed, on a logarithmic scale."""
    theirs, budget = curve["theirs"], curve["budget"]
    low, high = _decades([*(value for value in theirs if value), *(value for value in budget if value)])
    x = _Scale(0, max(len(theirs) - 1, 1), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(curve, x, y, low, high)]
    parts.append(f'<path class="budget" d="{_path(budget, x, y, low)}"/>')
    parts.append(f'<path class="theirs" d="{_path(theirs, x, y, low)}"/>')
    if len(theirs) <= 64:
        marks = "".join(
            f'<circle cx="{x(i):.1f}" cy="{y(_log(value, low)):.1f}" r="1.8"/>'
            for i, value in enumerate(theirs)
            if value is not None
        )
        parts.append(f'<g class="points">{marks}</g>')
    missing = "".join(f"M{x(i):.1f} {_TOP}v7" for i, value in enumerate(theirs) if value is None)
    parts.append(f'<path class="missing" d="{missing}"/>' if missing else "")
    label = page.text(_sentence(curve))
    return Markup(f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>')


def _sentence(curve: Mapping[str, Any]) -> str:
    finite = [
        (value, label) for value, label in zip(curve["theirs"], curve["labels"], strict=True) if value is not None
    ]
    if not finite:
        return f"Error over {curve['over']}: nothing is finite"
    (least, _), (most, where) = min(finite), max(finite)
    over = sum(v is None or (b is not None and v > b) for v, b in zip(curve["theirs"], curve["budget"], strict=True))
    return (
        f"Error over {curve['over']}, relative: from {number(least)} to {number(most)}, the largest at {where};"
        f" {over} of {len(curve['theirs'])} points are beyond the budget"
    )


class _Scale:
    """A linear scale from values to places."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self._low, self._start = low, start
        self._slope = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._slope


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around some positive numbers; at least one decade, at most 16 from the top."""
    if not values:
        return -1, 0
    high = math.ceil(math.log10(max(values)))
    low = max(math.floor(math.log10(min(values))), high - 16)
    return (low, high) if low < high else (low - 1, high)


def _log(value: float, low: int) -> float:
    return math.log10(value) if value > 10.0**low else low


def _path(values: Sequence[float | None], x: _Scale, y: _Scale, low: int) -> str:
    """A line through the values; broken where one is not finite. A single one is drawn across."""
    if len(values) == 1 and values[0] is not None:
        return f"M{_LEFT} {y(_log(values[0], low)):.1f}H{_WIDTH - _RIGHT}"
    steps, pen = [], "M"
    for i, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        steps.append(f"{pen}{x(i):.1f} {y(_log(value, low)):.1f}")
        pen = "L"
    return "".join(steps)


def _axes(curve: Mapping[str, Any], x: _Scale, y: _Scale, low: int, high: int) -> str:
    every = max(1, -(-(high - low) // 6))
    lines, words = [], []
    for power in range(low, high + 1, every):
        lines.append(f"M{_LEFT} {y(power):.1f}H{_WIDTH - _RIGHT}")
        words.append(f'<text class="y" x="{_LEFT - 5}" y="{y(power) + 3.5:.1f}">1e{power}</text>')
    labels = curve["labels"]
    shown = sorted({round(i * (len(labels) - 1) / 4) for i in range(5)})
    for i in shown:
        anchor = "start" if i == 0 else ("end" if i == len(labels) - 1 else "middle")
        words.append(
            f'<text text-anchor="{anchor}" x="{x(i):.1f}" y="{_HEIGHT - _BOTTOM + 14}">{page.text(labels[i])}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    words.append(f'<text text-anchor="middle" x="{middle}" y="{_HEIGHT - 6}">{page.text(curve["over"])}</text>')
    return f'<path class="grid" d="{"".join(lines)}"/>{"".join(words)}'
