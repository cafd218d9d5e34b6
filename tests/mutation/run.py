"""Plants small mistakes in converters/ and apr_jax/, one at a time, and tells which ones no test notices.

    python tests/mutation/run.py [--seed N] [--count N] [--jobs N] [--output FILE] [PATH ...]
    python tests/mutation/run.py --again FILE [--jobs N] [--output FILE]     # what survived in an earlier run's FILE

A seeded sample of all mutants (see mutants.py) is drawn; PATHs restrict it to files or folders. Each is planted in a
copy of the tree, and the tests that could notice it are run there, the nearest first, until one fails: as many as take
no longer than `--seconds` together, one at least. What an unchanged tree takes is measured once for each file
of tests; a mutant that takes more than thrice that is killed as well. Results go into a file, line by line, and what is
there already is not run again, unless the module or its tests have changed. Exits 1 if fewer than 85 % are killed.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.mutation.mutants import Mutant, mutants
from tests.mutation.which_tests import WhichTests, modules
from tests.paths import ROOT

LEFT_OUT = {
    "cuda": "needs an NVIDIA GPU",
    "bench": "measures, on hardware of its own",
    "bench.py": "measures, on hardware of its own",
    "hf_reference.py": "needs HuggingFace",
}
"""Folders and files whose tests are not in the default suite, and why."""
ENOUGH = 0.85
_PATIENCE, _START_SECONDS = 3.0, 60.0


def copy_tree(target: pathlib.Path) -> None:
    """Copies what git knows or would add."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


class Tree:
    """A copy of the repository in which mutants are planted and tests run."""

    def __init__(self, base: pathlib.Path, folder: pathlib.Path):
        self.root, self._scratch = folder / "tree", folder / "scratch"
        shutil.copytree(base, self.root, symlinks=True)

    def run(self, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Runs files of tests until one fails; returns pytest's exit code, None after `seconds`, and what failed."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        # Compiled modules are told by size and second: a mutant of a mutant's age would be taken for it.
        env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self._scratch)}
        # Would hide that a program does not flush what it prints.
        env.pop("PYTHONUNBUFFERED", None)
        with subprocess.Popen(
            command, cwd=self.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                printed, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None, "took too long"
            finally:
                # With all that the tests have started.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        lines = (line.split() for line in printed.splitlines() if line.startswith(("FAILED", "ERROR", "SUBFAILED")))
        failed = [word for words in lines for word in words if word.startswith("tests/")]
        return process.returncode, failed[0] if failed else f"exit code {process.returncode}"

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """Plants a mutant for the length of the block."""
        path = self.root / mutant.path
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        try:
            yield
        finally:
            path.write_bytes(source)


class Results:
    """What is known: of files of tests how long they take, of mutants what became of them. One JSON object a line."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {entry["key"]: entry for entry in map(json.loads, lines)}

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns what is known under a key."""
        return self._known.get(key)

    def add(self, key: str, **entry: Any) -> dict[str, Any]:
        """Keeps what has become known."""
        with self._lock, self._path.open("a") as file:
            self._known[key] = {"key": key, **entry}
            file.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]


class Run:
    """One run over a sample."""

    def __init__(self, base: pathlib.Path, results: Results, seconds: float, folder: pathlib.Path, jobs: int):
        self._base, self._results, self._seconds = base, results, seconds
        self._which = WhichTests(base)
        self._trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(jobs):
            self._trees.put(Tree(base, folder / str(number)))

    def judge(self, mutant: Mutant) -> dict[str, Any]:
        """Returns what becomes of a mutant: "killed by" a test, or None if it survives."""
        tests = self._tests(mutant.path)
        key = _digest(mutant.path, mutant.begin, mutant.end, mutant.after, *map(self._content, (mutant.path, *tests)))
        if (known := self._results.get(key)) is not None:
            return known
        if not tests:
            return self._results.add(key, mutant=str(mutant), killed_by=None, tests=[])
        allowed = _START_SECONDS + _PATIENCE * sum(self._takes(test) or 0.0 for test in tests)
        with self._tree() as tree, tree.planted(mutant):
            code, said = tree.run(tests, allowed)
        if code == 5:
            raise RuntimeError(f"no tests were found: {said}")
        return self._results.add(key, mutant=str(mutant), killed_by=None if code == 0 else said, tests=tests)

    def _tests(self, path: str) -> list[str]:
        """The nearest tests, one at least, and as many more as there is time for, in this order."""
        chosen: list[str] = []
        left = self._seconds
        for test in itertools.chain.from_iterable(self._which.by_distance(path)):
            takes = self._takes(test)
            if takes is None:
                continue
            if takes <= left or not chosen:
                chosen.append(test)
            # What is too long counts as well, or all of a large suite would have to be measured first.
            left -= takes
            if left <= 0:
                break
        return chosen

    def _takes(self, test: str) -> float | None:
        """How long a file of tests takes where nothing is planted; None if it fails even so, twice."""
        key = f"takes {test} {self._content(test)}"
        if (known := self._results.get(key)) is None:
            with self._tree() as tree:
                for _ in range(2):
                    started = time.monotonic()
                    code, said = tree.run([test], 1800)
                    taken = round(time.monotonic() - started, 1)
                    if code == 0:
                        break
                    print(f"WARNING: {test} fails without any mutant: {said}", flush=True)
            known = self._results.add(key, seconds=taken if code == 0 else None)
        return known["seconds"]

    def _content(self, path: str) -> str:
        return hashlib.sha256((self._base / path).read_bytes()).hexdigest()[:16]

    @contextlib.contextmanager
    def _tree(self) -> Iterator[Tree]:
        tree = self._trees.get()
        try:
            yield tree
        finally:
            self._trees.put(tree)


def sample(root: pathlib.Path, seed: int, count: int, paths: Sequence[str]) -> list[Mutant]:
    """Draws mutants of all files, or of those below some paths; what is no Python is drawn again."""
    known = [path for path in modules(root).values() if not set(pathlib.PurePath(path).parts) & LEFT_OUT.keys()]
    chosen = [path for path in known if not paths or any(pathlib.PurePath(path).is_relative_to(at) for at in paths)]
    every = [mutant for path in chosen for mutant in mutants(path, (root / path).read_bytes())]
    random.Random(seed).shuffle(every)
    print(f"{len(every)} mutants in {len(chosen)} files, {count} of them drawn with seed {seed}")
    for name, reason in LEFT_OUT.items():
        print(f"left out: {name}, which {reason}")
    found: list[Mutant] = []
    for mutant in every:
        if len(found) < count and _is_python(mutant.apply((root / mutant.path).read_bytes())):
            found.append(mutant)
    return found


def survivors_of(root: pathlib.Path, file: pathlib.Path) -> list[Mutant]:
    """Returns the mutants that survived in an earlier run, wherever in their file they stand now; prints those gone."""
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    every = {path: mutants(path, (root / path).read_bytes()) for path in modules(root).values()}
    found: list[Mutant] = []
    for said in (entry["mutant"] for entry in entries if "mutant" in entry and entry["killed_by"] is None):
        path, line, change = said.split(":", 2)
        alike = [each for each in every.get(path, ()) if str(each).split(":", 2)[2] == change and each not in found]
        if alike:
            found.append(min(alike, key=lambda each: abs(each.line - int(line))))
        else:
            print(f"gone: {said}")
    return found


def _is_python(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def report(verdicts: Sequence[dict[str, Any]]) -> bool:
    """Prints the share that was killed and the survivors; returns whether it is enough."""
    survivors = [verdict for verdict in verdicts if verdict["killed_by"] is None]
    killed = len(verdicts) - len(survivors)
    print(f"killed: {killed} of {len(verdicts)}, {killed / max(1, len(verdicts)):.1%}; survivors:")
    for verdict in sorted(survivors, key=lambda verdict: verdict["mutant"]):
        print(f"  {verdict['mutant']}" + ("" if verdict["tests"] else "  (no tests)"))
    return bool(verdicts) and killed >= ENOUGH * len(verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--again", type=pathlib.Path, metavar="FILE", help="what survived in an earlier run, no sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "mutation-output.jsonl")
    args = parser.parse_args(argv)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        # What is being worked on may go on changing.
        base = pathlib.Path(folder, "base")
        copy_tree(base)
        drawn = survivors_of(base, args.again) if args.again else sample(base, args.seed, args.count, args.paths)
        run = Run(base, Results(args.output), args.seconds, pathlib.Path(folder), args.jobs)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for number, verdict in enumerate(pool.map(run.judge, drawn), 1):
                verdicts.append(verdict)
                print(f"{number:4} {verdict['killed_by'] or 'SURVIVED'}: {verdict['mutant']}", flush=True)
    return 0 if report(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
