"""The default suite and the batteries as other CPUs compute: a verdict must not hang on one CPU's last bits.

    python tests/every_cpu.py [--only TEXT] [--parts suite parity batteries] [--workers N]

XLA, OpenBLAS, NumPy and torch are told to leave out instructions that this CPU has, and to use one thread or two: sums
are then added in another order. "parity" is the share of the suite that judges other engines' dumps, for `.ci/run`.
Prints one line for each variation; exits 1 if something fails under any of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from numpy._core._multiarray_umath import __cpu_dispatch__ as DISPATCHED
from numpy._core._multiarray_umath import __cpu_features__ as SUPPORTED

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUTSIDE = ("reference", "cuda")
"""Folders of tests that are not in the default suite."""
JUDGING = ("parity_test.py", "positions_test.py")


@dataclasses.dataclass(frozen=True)
class Variation:
    """A CPU to compute as.

    Attributes:
      name: What it is called.
      environment: Variables that make it so.
      threads: Threads of each product.
    """

    name: str
    environment: Mapping[str, str]
    threads: int = 1

    def variables(self) -> dict[str, str]:
        """The whole environment of a process."""
        flags = [os.environ.get("XLA_FLAGS", ""), self.environment.get("XLA_FLAGS", "")]
        flags += ["--xla_cpu_multi_thread_eigen=false"] if self.threads == 1 else []
        changed = {"XLA_FLAGS": " ".join(filter(None, flags)), "OPENBLAS_NUM_THREADS": str(self.threads)}
        return {**os.environ, **self.environment, **changed}


def numpy_without(*kinds: str) -> dict[str, str]:
    """NumPy without what it dispatches of these kinds on this machine; naming what it does not makes it complain."""
    named = [name for name in DISPATCHED if SUPPORTED[name] and name.startswith(kinds)]
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(named)} if named else {}


WIDEST, WIDE = ("AVX512", "X86_V4"), ("AVX", "X86_V", "FMA", "F16C")
"""What NumPy calls AVX-512, and AVX2 or more: names since 2.4, and before."""


def other_cpu(isa: str, core: str, torch: str, numpy: Sequence[str]) -> dict[str, str]:
    """A CPU as XLA, OpenBLAS, torch and NumPy know it."""
    flags = f"--xla_cpu_max_isa={isa}"
    return {"XLA_FLAGS": flags, "OPENBLAS_CORETYPE": core, "ATEN_CPU_CAPABILITY": torch} | numpy_without(*numpy)


AVX2 = other_cpu("AVX2", "Haswell", "avx2", WIDEST)
SSE4_2 = other_cpu("SSE4_2", "Nehalem", "default", WIDE)
THREADS = {1: "one thread", 2: "two threads"}
VARIATIONS = (
    *(Variation(f"native, {count}", {}, threads) for threads, count in THREADS.items()),
    *(Variation(f"AVX2, {count}", AVX2, threads) for threads, count in THREADS.items()),
    *(Variation(f"SSE4.2, {count}", SSE4_2, threads) for threads, count in THREADS.items()),
    Variation("NumPy without AVX-512", numpy_without(*WIDEST)),
    Variation("NumPy without AVX2", numpy_without(*WIDE)),
)


def judging() -> list[str]:
    """The test files that judge other engines' dumps."""
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("*_test.py"))]
    chosen = [path for path in files if path.name in JUDGING or {"battery", "parity"} & set(path.parts)]
    return [str(path) for path in chosen if not set(OUTSIDE) & set(path.parts)]


def commands(part: str, workers: int) -> list[list[str]]:
    """What a part runs, in the root of the repository."""
    if part == "batteries":
        names = ("parity_battery.py", "clean_runs.py", "four_fold.py", "damage_battery.py")
        return [[sys.executable, f"tests/battery/{name}"] for name in names]
    paths = judging() if part == "parity" else ["tests", *(f"--ignore=tests/{folder}" for folder in OUTSIDE)]
    return [[sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *paths]]


def run(variation: Variation, parts: Sequence[str], workers: int) -> bool:
    """Runs parts under a variation; prints a line, and behind it what the commands that failed said last."""
    started, failed = time.perf_counter(), []
    for command in (command for part in parts for command in commands(part, workers)):
        done = subprocess.run(command, cwd=ROOT, env=variation.variables(), capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr + done.stdout).strip().splitlines()
            failed.append("\n".join([f"    {' '.join(command[1:4])} ... exits {done.returncode}", *said[-20:]]))
    verdict = "failed" if failed else "passed"
    print(f"{variation.name:24} {verdict} {time.perf_counter() - started:6.0f} s", *failed, sep="\n", flush=True)
    return not failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variations whose name holds this")
    parser.add_argument(
        "--parts", nargs="+", choices=("suite", "parity", "batteries"), default=["suite", "batteries"], help="what"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of the suite (default: 2)")
    args = parser.parse_args(argv)
    chosen = [variation for variation in VARIATIONS if args.only in variation.name]
    if not chosen:
        parser.error(f"no variation is called {args.only!r}; there are {'; '.join(v.name for v in VARIATIONS)}")
    passed = [run(variation, args.parts, args.workers) for variation in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
