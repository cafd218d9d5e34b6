"""Branch coverage of converters/, room by room, and every line and branch that no test takes, with the reason.

python tests/coverage_report.py                  runs the suites that bear on converters/, and writes tests/COVERAGE.md
python tests/coverage_report.py --from FOLDER    makes the report of data that were recorded before
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "COVERAGE.md"
_COMMANDS = ("convert", "folders", "hostile_texts", "ignore_config", "internal_errors", "looked_at", "outputs", "show",
             "streams", "verify")  # fmt: skip
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
# Why no test goes there: a part of the source line that is not taken, or that the branch not taken begins at.
REASONS = {
    "if TYPE_CHECKING:": "for the type checker alone",
    "os._exit(": "ends the process before coverage is written; interrupts_test watches it from outside",
    "_last_acts": "in a process that is ended at once; interrupts_test watches it from outside",
    "act()": "in a process that is ended at once; interrupts_test watches it from outside",
    "raise AssertionError": "cannot happen",
    "except ImportError": "a package that is always there in the suite",
    "NotImplementedError": "no caller asks for it: the type has no blocks",
    "while not workers.stopped": "a loop that an error of another thread ends, wherever it is just then",
    "range(1, 10)": "a loop that ends by returning: nine digits are enough for float32",
    "range(1, 18)": "a loop that ends by returning: seventeen digits are enough for float64",
    "os.geteuid() == 0": "the suite runs as one user, root or not",
}


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


def missing(path: str, found: dict) -> list[tuple[int, str]]:
    """Returns the lines that are not taken and those whose branches are not, with their text."""
    text = (ROOT / path).read_text().split("\n")
    lines = [(number, text[number - 1].strip()) for number in found["missing_lines"]]
    branches = {begin for begin, end in found["missing_branches"] if begin not in found["missing_lines"]}
    return sorted([*lines, *((number, f"{text[number - 1].strip()} (one way)") for number in branches)])


def render(files: dict[str, dict]) -> str:
    """Returns the report."""
    rooms: dict[str, list[dict]] = {}
    for path, found in files.items():
        parts = pathlib.PurePosixPath(path).parts
        inside = parts[parts.index("converters") + 1 :]
        rooms.setdefault(inside[0] if len(inside) > 1 else ".", []).append(found["summary"])
    summaries = [summary for room in rooms.values() for summary in room]
    whole, branches = percent(summaries, "lines"), percent(summaries, "branches")
    lines = [
        "# Coverage of converters/",
        "",
        f"Made by `make coverage`, {datetime.date.today()}, Python {platform.python_version()}, {platform.machine()}.",
        f"Branches: {branches:.1f} %; at least {LEAST:.0f} % is wanted. Lines: {whole:.1f} %.",
        "",
        "| room | branches | lines | not taken |",
        "|---|---|---|---|",
    ]
    for room, counts in sorted(rooms.items()):
        left = sum(count["missing_lines"] + count["missing_branches"] for count in counts)
        lines.append(f"| {room} | {percent(counts, 'branches'):.1f} % | {percent(counts, 'lines'):.1f} % | {left} |")
    lines += ["", "## Not taken", ""]
    unexplained = 0
    for path, found in sorted(files.items()):
        for number, text in missing(path, found):
            reason = next((reason for part, reason in REASONS.items() if part in f"{path}: {text}"), "no test yet")
            unexplained += reason == "no test yet"
            lines.append(f"- `{path.removeprefix('apr_jax/')}:{number}` `{text.replace('`', chr(39))[:90]}`: {reason}")
    lines.insert(4, f"{unexplained} places are without a reason other than that there is no test yet.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or pathlib.Path(made)
        if args.folder is None:
            run(folder)
        REPORT.write_text(render(measured(folder)))
    print(f"wrote {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
