"""One self-contained HTML page about a checkpoint: facts, checks, metadata, and every tensor with a small histogram.

No script, no image, nothing from elsewhere. Whatever comes from the checkpoint is escaped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from apr_jax.converters.inspect.checks import RELABEL_SHARE, RELABEL_STD, TINY_SHARE, TINY_STD, Check
from apr_jax.converters.inspect.page import document, scrollable, text
from apr_jax.converters.inspect.statistics import HIGHEST_OCTAVE, LOWEST_OCTAVE, OCTAVES, RELABEL_OCTAVES, Statistics

_BAR, _HEIGHT = 4, 26
_SEVERITIES = ("failure", "note", "skipped", "ok")


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One line of the table of tensors.

    Attributes:
      name, dtype: As in the checkpoint.
      shape: Dimensions.
      nbytes: Bytes of its data.
      statistics: What was measured, or words that say why nothing was.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    statistics: Statistics | str


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page shows; text as it stands in the checkpoint, escaped here.

    Attributes:
      path: The checkpoint's path.
      summary: Name -> value, for the tiles at the top.
      header: Name -> value, of the container.
      metadata: Name -> value, abbreviated already.
      side_files: Name -> bytes.
      checks: Their outcomes.
      tensors: The table.
      placeholders: Name -> shape of heads without data.
    """

    path: str
    summary: Mapping[str, str]
    header: Mapping[str, str]
    metadata: Mapping[str, str]
    side_files: Mapping[str, int]
    checks: Sequence[Check]
    tensors: Sequence[TensorRow]
    placeholders: Mapping[str, tuple[int, ...]]


def render(page: Page) -> bytes:
    """Returns the page as UTF-8."""
    title = page.path.rstrip("/").rpartition("/")[2] or page.path
    parts = (
        f"<h1>{text(title)}</h1>",
        f'<p class="path">{text(page.path)}</p>' if page.path != title else "",
        _tiles(page),
        _section("Checks", _checks(page.checks), f"{_tally(page.checks)}"),
        _section("Tensors", _tensors(page), _LEGEND),
        '<div class="pair">',
        _section("Container", _pairs("field", "value", page.header.items())),
        _section("Side files", _pairs("file", "bytes", ((name, f"{n:,}") for name, n in page.side_files.items()))),
        "</div>",
        _section("Metadata", _pairs("key", "value", page.metadata.items())),
    )
    return document(title, "\n".join(parts), _CSS)


def _section(heading: str, content: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{heading}</h2>{lead}{content}</section>"


def _tiles(page: Page) -> str:
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in page.summary.items())
    return f'<dl class="tiles">{tiles}</dl>'


def _tally(checks: Sequence[Check]) -> str:
    words = {"failure": "failed", "note": "worth noting", "skipped": "not applicable", "ok": "passed"}
    counts = {severity: sum(check.severity == severity for check in checks) for severity in _SEVERITIES}
    return ", ".join(f"{count} {words[severity]}" for severity, count in counts.items() if count) or "none were made"


def _checks(checks: Sequence[Check]) -> str:
    ordered = sorted(checks, key=lambda check: _SEVERITIES.index(check.severity))
    passed = [check for check in ordered if check.severity == "ok"]
    shown = _check_table(check for check in ordered if check.severity != "ok")
    if passed:
        shown += f"<details><summary>{len(passed)} passed</summary>{_check_table(passed)}</details>"
    return shown


def _check_table(checks: Iterable[Check]) -> str:
    rows = "".join(
        f'<tr><td><b class="{check.severity}">{check.severity}</b></td><td>{text(check.name)}</td>'
        f'<td class="words">{text(check.sentence)}</td></tr>'
        for check in checks
    )
    columns = "".join(f'<th scope="col">{name}</th>' for name in ("outcome", "check", "what was seen"))
    head = f"<thead><tr>{columns}</tr></thead>"
    return scrollable(f'<table class="checks">{head}<tbody>{rows}</tbody></table>', "checks") if rows else ""


def _pairs(left: str, right: str, pairs: Iterable[tuple[str, object]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="words">{text(value)}</td></tr>' for name, value in pairs
    )
    if not rows:
        return "<p>none</p>"
    head = f'<thead><tr><th scope="col">{left}</th><th scope="col">{right}</th></tr></thead>'
    return scrollable(f"<table>{head}<tbody>{rows}</tbody></table>", f"{left} and {right}")


# --- tensors

_COLUMNS = (
    ("tensor", ""),
    ("type", ""),
    ("shape", ""),
    ("magnitudes", ""),
    ("mean", "n"),
    ("std", "n"),
    ("min", "n"),
    ("max", "n"),
    ("zeros", "n"),
    ("NaN", "n"),
    ("Inf", "n"),
    ("in [0.5, 4)", "n"),
    ("dead rows", "n"),
    ("bytes", "n"),
)

_LEGEND = (
    f"Each histogram counts magnitudes by octave, from 2<sup>&minus;{-LOWEST_OCTAVE}</sup> and below on the left to "
    f'2<sup>{HIGHEST_OCTAVE}</sup> and above on the right; the line marks 1. The <span class="swatch"></span> band is '
    "[0.5, 4): bf16 weights whose bytes are read as f16 all lie there, f16 weights read as bf16 lie at the left end. "
    "Mean, std, min and max are those of the finite values."
)


def _tensors(page: Page) -> str:
    head = "".join(f'<th scope="col"{_class(kind)}>{name}</th>' for name, kind in _COLUMNS)
    rows = "".join(map(_row, sorted(page.tensors, key=lambda row: _natural(row.name))))
    rows += "".join(
        f'<tr><th scope="row">{text(name)}</th><td></td><td>{_shape(shape)}</td>'
        f'<td colspan="{len(_COLUMNS) - 3}" class="bad">has no data: it stands for the embedding</td></tr>'
        for name, shape in page.placeholders.items()
    )
    table = f'<table class="tensors"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return scrollable(table, "tensors", "scroll tall")


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Orders layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name[:256])]


def _row(row: TensorRow) -> str:
    first = f'<th scope="row">{text(row.name)}</th><td>{text(row.dtype)}</td><td>{_shape(row.shape)}</td>'
    found = row.statistics
    if isinstance(found, str):
        words = f'<td colspan="{len(_COLUMNS) - 4}" class="words">{text(found)}</td>'
        return f"<tr>{first}{words}<td class=n>{row.nbytes:,}</td></tr>"
    relabelled = len(row.shape) > 1 and found.relabel_share >= RELABEL_SHARE and found.std > RELABEL_STD
    tiny = len(row.shape) > 1 and found.tiny_share >= TINY_SHARE and not found.std >= TINY_STD
    dead = found.count > 0 and found.zeros == found.count
    cells = (
        *((_number(value), False) for value in (found.mean, found.std, found.minimum, found.maximum)),
        (f"{found.zeros:,}", dead),
        (f"{found.nans:,}", found.nans > 0),
        (f"{found.infs:,}", found.infs > 0),
        (f"{found.relabel_share:.1%}", relabelled),
        (f"{found.dead_rows:,}" if found.rows else "", found.rows > 0 and 4 * found.dead_rows >= found.rows),
        (f"{row.nbytes:,}", False),
    )
    numbers = "".join(f"<td{_class('n bad' if bad else 'n')}>{cell}</td>" for cell, bad in cells)
    return f"<tr>{first}<td>{_histogram(found, relabelled or tiny)}</td>{numbers}</tr>"


def _shape(shape: Sequence[int]) -> str:
    return " &times; ".join(map(str, shape)) or "scalar"


def _number(value: float) -> str:
    """Returns a number with four digits, in a spelling as short as the value allows."""
    if not math.isfinite(value):
        return "&ndash;"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "&minus;")


def _histogram(found: Statistics, suspicious: bool) -> str:
    """Returns an inline SVG: a bar for each octave that holds anything, as high as its share of the fullest one."""
    band = (RELABEL_OCTAVES.start - LOWEST_OCTAVE) * _BAR
    one = -LOWEST_OCTAVE * _BAR
    bars = "".join(_bars(found.histogram))
    kind = "sus" if suspicious else "fine"
    return (
        f'<svg class="{kind}" aria-hidden="true" viewBox="0 0 {len(OCTAVES) * _BAR} {_HEIGHT}">'
        f'<rect x="{band}" width="{len(RELABEL_OCTAVES) * _BAR}" height="{_HEIGHT}"/>'
        f'<path class="one" d="M{one} 0v{_HEIGHT}"/>'
        f'<path d="{bars}"/></svg>'
    )


def _bars(counts: Sequence[int]) -> Iterator[str]:
    top = max(counts)
    for position, count in enumerate(counts):
        if count:
            # A bar that holds anything is seen.
            height = max(1.0, count / top * _HEIGHT)
            yield f"M{position * _BAR} {_HEIGHT}v-{height:.3g}h{_BAR - 1}v{height:.3g}z"


_CSS = """
.checks .words{width:100%}
.tensors{font-size:13px}
.tensors thead th{position:sticky;top:0;z-index:2;border-bottom:1px solid var(--line)}
.tensors tbody th{position:sticky;left:0;z-index:1;background:var(--card)}
.tensors thead th:first-child{left:0;z-index:3}
.tensors th,.tensors td{padding:2px 7px}
.tensors thead th{white-space:normal}
svg{display:block;width:112px;height:24px;fill:var(--bar)}
svg.sus{fill:var(--bad)}
svg rect{fill:var(--band)}
svg .one{stroke:var(--dim);stroke-width:.6;stroke-dasharray:2 2}
.swatch{display:inline-block;width:12px;height:12px;background:var(--band);border:1px solid var(--line);
vertical-align:-1px}
"""
_NAMES = "\n".join(
    f'.tensors td:nth-child({place}):not([colspan])::before{{content:"{name}"}}'
    for place, (name, _) in enumerate(_COLUMNS, 1)
)
# A phone has no room for columns: a row becomes a block, in which the name of its column stands over each value.
_CSS += f"""
@media screen and (max-width:600px){{
.checks tr,.tensors tr{{display:grid;padding:6px 0;border-top:1px solid var(--line)}}
.checks tr{{grid-template-columns:auto 1fr;align-items:center}}
.tensors tr{{grid-template-columns:repeat(3,minmax(0,1fr))}}
.checks thead,.tensors thead{{display:none}}
.checks td,.tensors td,.tensors tbody th{{border:0;white-space:normal;overflow-wrap:anywhere;text-align:left}}
.checks .words,.tensors tbody th,.tensors td[colspan]{{grid-column:1/-1}}
.tensors tbody th{{position:static;font-weight:600}}
.tensors td::before{{display:block;color:var(--dim);font-size:11px;font-weight:400}}
{_NAMES}}}
"""
