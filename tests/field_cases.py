"""The field cases: what people report, rebuilt small, as a table of inputs, right outcomes and whether they hold.

    python tests/field_cases.py [--report FILE] [PATH ...]

A case is a test whose name begins with `test_field_`; its docstring has "FIELD Kind: input -> right outcome". Runs
them all, prints the table, and exits 1 if one fails, if one was skipped, or if there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import re
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
_CASE = re.compile(r"FIELD (?P<kind>[\w ]+): (?P<input>.*?) -> (?P<right>.*)", re.DOTALL)


class Collector:
    """A plugin of pytest that keeps the docstring and the outcome of every field case."""

    def __init__(self) -> None:
        self.cases: dict[str, re.Match[str]] = {}
        self.outcomes: dict[str, str] = {}
        self.unlabelled: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.name.startswith("test_field_")]
        for item in items:
            case = _CASE.search(" ".join((item.obj.__doc__ or "").split()))
            if case is None:
                self.unlabelled.append(item.nodeid)
            else:
                self.cases[item.nodeid] = case

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def table(collector: Collector) -> str:
    """Returns the cases as Markdown, by kind; the members of a parameterised test are counted in one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for node, case in collector.cases.items():
        key = (case["kind"], case["input"], re.sub(r"\s*\(?\{?[^.]*\bparameterized\b.*", "", case["right"]))
        rows.setdefault(key, []).append(collector.outcomes.get(node, "not run"))
    lines = ["| kind | input | right outcome | members | holds |", "|---|---|---|---|---|"]
    for (kind, given, right), outcomes in sorted(rows.items()):
        passed = outcomes.count("passed")
        holds = "yes" if passed == len(outcomes) else f"**{passed} of {len(outcomes)}**"
        cells = [kind, given, right, str(len(outcomes)), holds]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=pathlib.Path, help="write the table there as well")
    parser.add_argument("paths", nargs="*", default=[str(ROOT / "tests")])
    args = parser.parse_args()
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as log:
        code = pytest.main(["-q", f"--ignore={ROOT}/tests/cuda", *args.paths], plugins=[collector])
    made = table(collector)
    passed = sum(outcome == "passed" for outcome in collector.outcomes.values())
    summary = f"{passed} of {len(collector.cases)} field cases hold."
    print(f"{made}\n\n{summary}")
    for node in collector.unlabelled:
        print(f"{node}: its docstring does not begin 'FIELD Kind: input -> right outcome'")
    if code:
        print(log.getvalue()[-8000:], file=sys.stderr)
    if args.report:
        args.report.write_text(f"# Field cases\n\n{made}\n\n{summary}\n")
    return 0 if not code and not collector.unlabelled and passed == len(collector.cases) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
