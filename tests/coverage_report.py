"""Branch coverage of converters/, room by room, and every line and branch that no test takes, with the reason.

The reasons are in tests/coverage_reasons.txt.

python tests/coverage_report.py                  runs the suites that bear on converters/, and writes tests/COVERAGE.md
python tests/coverage_report.py --from FOLDER    makes the report of data that were recorded before
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "COVERAGE.md"
REASONS = ROOT / "tests" / "coverage_reasons.txt"
_COMMANDS = (
    "arguments", "convert", "folders", "hostile_texts", "ignore_config", "internal_errors", "looked_at", "outputs",
    "progress", "show", "streams", "verify",
)  # fmt: skip
SUITES = (
    "tests/converters", *(f"tests/commands/{name}_test.py" for name in _COMMANDS),
    *(f"tests/hostile/{name}_test.py" for name in ("cases", "judge", "output_places", "file_faults")),
    "tests/battery/damage_battery_test.py", "tests/load", "tests/refusals_test.py",
)  # fmt: skip
# Read by each process at its start: our threads are started below `threading`, where nobody hands the tracer on.
_EACH_PROCESS = """
import _thread, sys, threading
_start = _thread.start_new_thread
def _traced(function, *rest):
    def begin(*args, **options):
        if (trace := threading.gettrace()) is not None:
            sys.settrace(trace)
        return function(*args, **options)
    return _start(begin, *rest)
_thread.start_new_thread = _traced
import coverage
coverage.process_startup()
"""
LEAST = 95.0
_NO_TEST = "no test yet"


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why no test goes somewhere.

    Attributes:
      where: A file inside converters/, maybe with a function: "storage/isolation.py:serve"; "*" for all files.
      part: A part of the source line that is not taken, or that the branch not taken begins at.
      sentence: The reason.
    """

    where: str
    part: str
    sentence: str

    def holds(self, place: Place) -> bool:
        return self.where in ("*", place.file, f"{place.file}:{place.function}") and self.part in place.text


@dataclasses.dataclass(frozen=True)
class Place:
    """A line that is not taken, or one whose branches are not all taken; with the lines inside that are not, for that.

    Attributes:
      file: Inside converters/.
      function: Its qualified name, "" for a module's own lines.
      line: Counted from 1.
      text: The line, and whether it is taken one way.
      count: This and the lines inside.
    """

    file: str
    function: str
    line: int
    text: str
    count: int


def run(folder: pathlib.Path) -> None:
    """Runs the suites under coverage; failures of tests are theirs to report."""
    (folder / "sitecustomize.py").write_text(_EACH_PROCESS)
    search = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "COVERAGE_FILE": str(folder / "data"), "PYTHONPATH": search, "OPENBLAS_NUM_THREADS": "1"
    }  # fmt: skip
    command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", "-n", "2", *SUITES]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)


def measured(folder: pathlib.Path) -> dict[str, dict]:
    """Returns what was taken and what was not, file by file."""
    environment = os.environ | {"COVERAGE_FILE": str(folder / "data")}
    combine = [sys.executable, "-m", "coverage", "combine", "--keep", "--quiet", str(folder)]
    subprocess.run(combine, cwd=ROOT, env=environment, check=True)
    report = folder / "report.json"
    subprocess.run(
        [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(report)], cwd=ROOT, env=environment, check=True
    )
    return json.loads(report.read_text())["files"]


def percent(counts: list[dict], *kinds: str) -> float:
    """Returns how many of all lines or branches are taken."""
    total = {"lines": "num_statements", "branches": "num_branches"}
    taken = sum(count[f"covered_{kind}"] for count in counts for kind in kinds)
    return 100 * taken / max(1, sum(count[total[kind]] for count in counts for kind in kinds))


def reasons() -> list[Reason]:
    """Returns the table of reasons."""
    lines = REASONS.read_text().splitlines()
    return [Reason(*line.split("\t")) for line in lines if line and not line.startswith("#")]


def statements(source: str) -> dict[int, tuple[str, int]]:
    """Returns line -> the function that the statement there is in, and the line of the statement around it, or 0."""
    found: dict[int, tuple[str, int]] = {}

    def visit(node: ast.AST, function: str, around: int) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler):
                found.setdefault(child.lineno, (function, around))
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                visit(child, f"{function}.{child.name}".lstrip("."), 0)
            else:
                visit(child, function, child.lineno if isinstance(child, ast.stmt | ast.excepthandler) else around)

    visit(ast.parse(source), "", 0)
    return found


def places(file: str, source: str, found: dict) -> list[Place]:
    """Returns what is not taken of a file; a line that is not, because a branch around it is not, counts with that."""
    text, around = source.split("\n"), statements(source)
    lines = set(found["missing_lines"])
    ends: dict[int, list[int]] = {}
    for begin, end in found["missing_branches"]:
        ends.setdefault(begin, []).append(end)
    counts: dict[int, int] = {}
    for line in sorted(lines | ends.keys()):
        outer = line
        while outer in lines:
            parent = around.get(outer, ("", 0))[1]
            if parent not in lines and not any(parent < end <= outer for end in ends.get(parent, ())):
                break
            outer = parent
        counts[outer] = counts.get(outer, 0) + 1
    return [
        Place(file, around.get(line, ("", 0))[0], line, _said(text[line - 1], line in lines), count)
        for line, count in counts.items()
    ]


def _said(line: str, is_missing: bool) -> str:
    return line.strip() if is_missing else f"{line.strip()} (one way)"


def render(files: dict[str, dict], table: Iterable[Reason]) -> tuple[str, bool]:
    """Returns the report, and whether all is as wanted."""
    rooms: dict[str, list[dict]] = {}
    for path, found in files.items():
        parts = pathlib.PurePosixPath(path).parts
        inside = parts[parts.index("converters") + 1 :]
        rooms.setdefault(inside[0] if len(inside) > 1 else ".", []).append(found["summary"])
    summaries = [summary for room in rooms.values() for summary in room]
    whole, branches = percent(summaries, "lines"), percent(summaries, "branches")
    lines, unexplained = listed(files, list(table))
    return "\n".join([
        "# Coverage of converters/",
        "",
        f"Made by `make coverage`, {datetime.date.today()}, Python {platform.python_version()}, {platform.machine()}.",
        f"Branches: {branches:.1f} %; at least {LEAST:.0f} % is wanted. Lines: {whole:.1f} %.",
        f"{unexplained} places are without a reason other than that there is no test yet.",
        "",
        "| room | branches | lines | not taken |",
        "|---|---|---|---|",
        *room_lines(rooms),
        "",
        "## Not taken",
        "",
        *lines,
        "",
    ]), branches >= LEAST and not unexplained  # fmt: skip


def room_lines(rooms: dict[str, list[dict]]) -> Iterator[str]:
    """Yields a line of the table for each room."""
    for room, counts in sorted(rooms.items()):
        left = sum(count["missing_lines"] + count["missing_branches"] for count in counts)
        yield f"| {room} | {percent(counts, 'branches'):.1f} % | {percent(counts, 'lines'):.1f} % | {left} |"


def listed(files: dict[str, dict], table: list[Reason]) -> tuple[list[str], int]:
    """Returns a line for each place, and how many are without a reason."""
    lines, unexplained, used = [], 0, set()
    for path, found in sorted(files.items()):
        for place in places(path.rpartition("converters/")[2], (ROOT / path).read_text(), found):
            reason = next((reason for reason in table if reason.holds(place)), None)
            unexplained += reason is None
            used.add(reason)
            text = place.text.replace("`", "'")[:90]
            more = f" and {place.count - 1} more inside" if place.count > 1 else ""
            said = _NO_TEST if reason is None else reason.sentence
            lines.append(f"- `converters/{place.file}:{place.line}` `{text}`{more}: {said}")
    idle = [reason for reason in table if reason not in used]
    if idle:
        lines += ["", "## Reasons that this run did not need", ""]
        lines += [f"- `{reason.where}` `{reason.part.replace('`', chr(39))}`" for reason in idle]
    return lines, unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or pathlib.Path(made)
        if args.folder is None:
            run(folder)
        report, is_wanted = render(measured(folder), reasons())
        REPORT.write_text(report)
    print(f"wrote {REPORT.relative_to(ROOT)}")
    return 0 if is_wanted else 1


if __name__ == "__main__":
    sys.exit(main())
