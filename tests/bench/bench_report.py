"""Writes the README's performance tables and pictures from tests/bench/results/*.json: `make bench-report`."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.bench import report, roofline

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by `make bench-report` -->", "<!-- end of `make bench-report` -->"


def results() -> dict[str, report.Results]:
    """Returns every committed results file, by its name without the suffix."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def pictures() -> dict[pathlib.Path, str]:
    """Returns the pictures, by path: one for every results file with more than a few cases."""
    return {
        ROOT / "docs" / f"roofline-{name}.svg": roofline.svg(found)
        for name, found in results().items()
        if len(found["cases"]) > 3
    }


def section() -> str:
    """Returns what stands in the README between the two marks."""
    drawn = {path.stem.removeprefix("roofline-"): path.relative_to(ROOT).as_posix() for path in pictures()}
    every = results()
    paths = {report.label(every[name]): path for name, path in drawn.items()}
    return report.section(every.values(), paths)


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}", encoding="utf-8")
    for path, drawing in pictures().items():
        path.write_text(drawing, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
