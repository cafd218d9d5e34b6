"""The first minutes with a wheel: installed into an empty environment, and a first verify in one more command.

    python tests/first_install.py WHEEL [PYTHON ...]

For each Python, with and without the extra `model`: how long `pip install` takes, how much it puts there, and what
`apr-jax verify` says of the sample model. Prints a table; fails if a command fails. Needs the package index.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

SAMPLE = pathlib.Path(__file__).resolve().parent / "data" / "checkpoints" / "gqa_tied_bf16"


def rows(wheel: pathlib.Path, python: str) -> Iterator[str]:
    """Yields the rows of the table of one Python."""
    version = said([python, "--version"]).split()[1]
    for extra in ("", "[model]"):
        with tempfile.TemporaryDirectory() as name:
            environment = pathlib.Path(name)
            said([python, "-m", "venv", str(environment)])
            before, started = size(environment), time.perf_counter()
            said([str(environment / "bin" / "pip"), "install", "--quiet", "--no-cache-dir", f"{wheel}{extra}"])
            installed = time.perf_counter()
            verdict = said([str(environment / "bin" / "apr-jax"), "verify", str(SAMPLE)]).splitlines()[0]
            verified = time.perf_counter()
            yield (
                f"| {version} | `{wheel.name}{extra}` | {installed - started:.0f} s "
                f"| {(size(environment) - before) / 1e6:.0f} MB | {verdict}, in {verified - installed:.1f} s |"
            )


def said(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def size(folder: pathlib.Path) -> int:
    """Returns the bytes of all files in a folder, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", metavar="WHEEL", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("pythons", metavar="PYTHON", nargs="*", default=[sys.executable])
    args = parser.parse_args()
    print("| Python | installed | time | size | first `apr-jax verify` |\n|---|---|---|---|---|", flush=True)
    for python in args.pythons:
        for row in rows(args.wheel, python):
            print(row, flush=True)


if __name__ == "__main__":
    main()
