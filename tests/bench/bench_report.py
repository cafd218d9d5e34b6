"""Writes tables and pictures of docs/speed.md from tests/bench/results/*.json: `make bench-report`."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.bench import report, roofline

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- made by `make bench-report` -->", "<!-- end of `make bench-report` -->"


def results() -> dict[str, report.Results]:
    """Returns every committed results file, by its name without the suffix."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def picture(name: str, found: report.Results) -> str | None:
    """Returns the name of a results file's picture, which stands beside the page: a few cases make none."""
    return f"roofline-{name}.svg" if len(found["cases"]) > 3 else None


def pictures() -> dict[pathlib.Path, str]:
    """Returns the pictures, by path."""
    paths = {name: picture(name, found) for name, found in results().items()}
    return {PAGE.parent / path: roofline.svg(results()[name]) for name, path in paths.items() if path}


def section() -> str:
    """Returns what stands on the page between the two marks."""
    return report.section((found, picture(name, found)) for name, found in results().items())


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}", encoding="utf-8")
    for path, drawing in pictures().items():
        path.write_text(drawing, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
