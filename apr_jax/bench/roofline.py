"""Draws a roofline picture (Williams, Waterman, Patterson 2009) as SVG: every case beside the limits of the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

from apr_jax.bench import report
from apr_jax.bench.cases import Case

_WIDTH, _HEIGHT = 860, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 560, 40, 380
# By the beginning of the name; the first that fits.
_COLOURS = {report.OURS: "#1f6feb", "HuggingFace compiled": "#8250df", "HuggingFace": "#9a6700"}
_OTHER = "#57606a"
_UNITS = {"GFLOP/s": 9, "TFLOP/s": 12}
_NEAR = 14


def svg(results: report.Results) -> str:
    """Returns the picture: operations a byte to the right, operations a second upward, both logarithmic.

    Every case is a number above the dot of apr_jax; peers are circles straight below or above it. The line is the roof:
    the ceilings measured in the same run.
    """
    points = _points(results)
    scale = _Scale(
        (min(x for x, *_ in points), max(x for x, *_ in points)),
        (min(y for _, y, *_ in points), results["ceilings"]["flops"]),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
        ' font-size="12" fill="#1f2328">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="13">{escape(report.heading(results))}</text>',
        *_axes(scale, "TFLOP/s" if results["ceilings"]["flops"] >= 1e13 else "GFLOP/s"),
        *_roof(scale, results["ceilings"]),
        *_marks(scale, points),
        *_legend(results),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


Point = tuple[float, float, str, int]
"""Operations a byte, operations a second, contestant, number of the case."""

Label = tuple[float, float, list[int]]
"""Where the first of some dots lies, and the numbers of them all."""


def _points(results: report.Results) -> list[Point]:
    return [
        (entry["flops"] / entry["bytes"], entry["flops"] / row["milliseconds"] * 1e3, row["contestant"], number)
        for number, entry in enumerate(results["cases"], start=1)
        for row in entry["rows"]
        if "milliseconds" in row
    ]


class _Scale:
    """From operations to pixels; the axes end at powers of ten."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x = (math.floor(math.log10(x[0] / 1.5)), math.ceil(math.log10(x[1] * 1.5)))
        self.y = (math.floor(math.log10(y[0] / 1.5)), math.ceil(math.log10(y[1] * 1.5)))

    def across(self, value: float) -> float:
        return _LEFT + (math.log10(value) - self.x[0]) / (self.x[1] - self.x[0]) * (_RIGHT - _LEFT)

    def up(self, value: float) -> float:
        return _BOTTOM - (math.log10(value) - self.y[0]) / (self.y[1] - self.y[0]) * (_BOTTOM - _TOP)


def _axes(scale: _Scale, unit: str) -> list[str]:
    parts = []
    for power in range(scale.x[0], scale.x[1] + 1):
        x = scale.across(10.0**power)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_BOTTOM}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{_power(power)}</text>')
    for power in range(scale.y[0], scale.y[1] + 1):
        y = scale.up(10.0**power)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_power(power - _UNITS[unit])}</text>')
    middle = (_LEFT + _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_BOTTOM + 42}" text-anchor="middle">operations a byte of memory</text>')
    parts.append(
        f'<text transform="translate(18 {(_TOP + _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{unit}</text>'
    )
    return parts


def _power(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"


def _roof(scale: _Scale, ceilings: Mapping[str, float]) -> list[str]:
    ridge = ceilings["flops"] / ceilings["bytes"]
    first, last = 10.0 ** scale.x[0], 10.0 ** scale.x[1]
    start = max(first, 10.0 ** scale.y[0] / ceilings["bytes"])
    corners = [(start, min(start * ceilings["bytes"], ceilings["flops"]))]
    corners += [(x, ceilings["flops"]) for x in (ridge, last) if start < x <= last]
    line = " ".join(f"{scale.across(x):.1f},{scale.up(y):.1f}" for x, y in corners)
    return [f'<polyline points="{line}" fill="none" stroke="#1f2328" stroke-width="1.5"/>']


def _marks(scale: _Scale, points: list[Point]) -> list[str]:
    """Draws the dots; numbers of dots that lie close together share a label."""
    parts = []
    labels: list[Label] = []
    for x, y, contestant, number in points:
        across, up = scale.across(x), scale.up(y)
        parts.append(_dot(across, up, contestant))
        if contestant == report.OURS:
            near = [label for label in labels if math.hypot(label[0] - across, label[1] - up) < _NEAR]
            if near:
                near[0][2].append(number)
            else:
                labels.append((across, up, [number]))
    for across, up, numbers in labels:
        text = ", ".join(map(str, numbers))
        parts.append(
            f'<text x="{across:.1f}" y="{up - 9:.1f}" text-anchor="middle" font-weight="bold"'
            f' fill="{_COLOURS[report.OURS]}" stroke="#ffffff" stroke-width="3" paint-order="stroke">{text}</text>'
        )
    return parts


def _dot(across: float, up: float, contestant: str) -> str:
    colour = next((colour for name, colour in _COLOURS.items() if contestant.startswith(name)), _OTHER)
    fill = colour if contestant == report.OURS else "#ffffff"
    return f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" fill="{fill}" stroke="{colour}"/>'


def _legend(results: report.Results) -> list[str]:
    left, y = _RIGHT + 24, _TOP + 8
    lines = [f'<text x="{left + 16}" y="{y}" font-weight="bold">apr_jax, share of the limit</text>']
    lines.append(_dot(left + 4, y - 4, report.OURS))
    for number, entry in enumerate(results["cases"], start=1):
        reached, y = report.share(entry, report.OURS), y + 20
        title = Case.parse(entry["case"]).title + ("" if reached is None else f": {reached:.0%}")
        lines.append(f'<text x="{left}" y="{y}">{number}</text>')
        lines.append(f'<text x="{left + 16}" y="{y}">{escape(title)}</text>')
    for peer in dict.fromkeys(row["contestant"] for entry in results["cases"] for row in entry["rows"]):
        if peer != report.OURS:
            y += 20
            lines.append(_dot(left + 4, y - 4, peer))
            lines.append(f'<text x="{left + 16}" y="{y}">{escape(peer)}</text>')
    return lines
