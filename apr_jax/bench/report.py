"""Shows results of the benchmark as tables: text for a terminal, Markdown for docs/speed.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apr_jax.bench.cases import Case

OURS = "apr_jax"
Results = Mapping[str, Any]
"""What `commands.bench` writes: one model in one dtype on one machine."""


def heading(results: Results) -> str:
    """Says what was measured, on what, and what the machine reaches without a model."""
    machine, ceilings = results["machine"], results.get("ceilings")
    what = f"{results['model']}, {results['dtype']}, {machine['device']}"
    if machine["platform"] == "cpu":
        what += f", {machine['cores']} cores"
    if "engine" in results:
        what += f", products by {results['engine']}"
    if ceilings:
        what += f": product of matrices {_rate(ceilings['flops'], 'FLOP/s')}, memory {_rate(ceilings['bytes'], 'B/s')}"
    return what


def mesh(results: Results) -> str:
    """Says how a model lies on a mesh, and what runs it."""
    found = results["mesh"]
    cut = ", ".join(f"{name} {parts}" for name, parts in found["parts"].items())
    share = found["parameter_bytes_per_device"] / found["parameter_bytes"]
    return (
        f"mesh data={found['data']}, model={found['model']}; parts: {cut}; parameters of a device "
        f"{found['parameter_bytes_per_device'] / 1e6:.4g} MB, {share:.1%} of all; operations: {found['operations']}"
    )


def cases(results: Results) -> list[list[str]]:
    """Returns the table of cases, titles first; milliseconds of a prefill or a decode step; empty without cases."""
    if not results["cases"]:
        return []
    peers = _peers(results)
    titles = ["ms", "limit", "set by", OURS, "share of limit", *peers]
    rows = [_case_row(entry, peers) for entry in results["cases"]]
    return [titles, *rows]


def start_up(results: Results) -> list[list[str]]:
    """Returns the table of whole processes, titles first; empty if none were measured."""
    if not results.get("start_up"):
        return []
    rows = [
        [
            row["contestant"],
            f"{row['seconds']:.2f}",
            f"{row['load_seconds']:.2f}",
            f"{row['compile_seconds']:.2f}" if "compile_seconds" in row else "",
        ]
        for row in results["start_up"]
        if "seconds" in row
    ]
    return [["process to its first token, s", "whole", "load", "compile"], *rows]


def text(rows: Sequence[Sequence[str]]) -> str:
    """Lays a table out in columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Lays a table out in Markdown."""
    head, *body = rows
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def section(every: Iterable[tuple[Results, str | None]]) -> str:
    """Returns the account of results files for docs/speed.md: each with the path of its picture, if it has one."""
    parts = []
    for results, picture in every:
        parts.append(f"**{heading(results)}**")
        if picture:
            parts.append(f"![Arithmetic a second over arithmetic a byte, beside the machine's limits]({picture})")
        parts += [markdown(rows) for rows in (cases(results), start_up(results)) if rows]
        parts.append(provenance(results))
    return "\n\n".join(parts)


def provenance(results: Results) -> str:
    """Says when, with which versions and from which commit, and what else there is to know."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    notes = f" Note: {results['notes']}." if "notes" in results else ""
    return f"{results['date']}, commit {results['commit'] or 'unknown'}; {versions}.{notes}"


def row_of(entry: Mapping[str, Any], contestant: str) -> Mapping[str, Any]:
    """Returns a contestant's row of a case; empty if it was not measured."""
    return next((row for row in entry["rows"] if row["contestant"] == contestant), {})


def share(entry: Mapping[str, Any], contestant: str) -> float | None:
    """Returns what part of the machine's limit a contestant reaches, 1 being all of it; None if not measured."""
    taken = row_of(entry, contestant).get("milliseconds")
    return None if taken is None else entry["limit_milliseconds"] / taken


def _peers(results: Results) -> list[str]:
    seen = [row["contestant"] for entry in results["cases"] for row in entry["rows"] if row["contestant"] != OURS]
    return list(dict.fromkeys(seen))


def _case_row(entry: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    reached = share(entry, OURS)
    return [
        Case.parse(entry["case"]).title,
        _milliseconds(entry["limit_milliseconds"]),
        entry["bound"],
        _milliseconds(row_of(entry, OURS).get("milliseconds")),
        "" if reached is None else f"{reached:.0%}",
        *(_milliseconds(row_of(entry, peer).get("milliseconds")) for peer in peers),
    ]


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rate(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
