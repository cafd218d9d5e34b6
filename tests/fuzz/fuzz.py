"""Searches for inputs that a reader cannot bear, guided by the branches that they take (atheris, libFuzzer).

    python tests/fuzz/fuzz.py all --seconds 1200 --report RESULTS.md      every reader of targets.py, at once
    python tests/fuzz/fuzz.py apr safetensors --seconds 120 --out DIR     again with the same DIR goes on and adds up
    python tests/fuzz/fuzz.py apr --replay FILE                           one input again, with its traceback

A crash is whatever is no error of the family, an accepted file whose content differs from what an independent reader
finds, more memory than `MEMORY_BYTES` beyond what the process had (as a limit of the operating system), or more than
`SECONDS` for one input. Each kind is kept once, in OUT/crashes/READER, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
ROOT = pathlib.Path(__file__).resolve().parents[2]
SEEDS = ROOT / "tests" / "fuzz" / "seeds"
NAMES = sorted(folder.name for folder in SEEDS.iterdir())
MEMORY_BYTES = 192 << 20
"""Address space beyond what a process has once it has opened the seeds; libFuzzer's corpus is in it."""
SECONDS = 20
MAX_BYTES = 16 << 10
_GUIDING = (
    "apr_jax.converters",
    "apr_jax.engines",
    "apr_jax.generate",
    "apr_jax.parity.dumps",
    "apr_jax.trace",
    "jinja2",
)
"""Packages whose branches guide the search."""
_SHOWS = re.compile(r"#(\d+)\s+(INITED|NEW|REDUCE|pulse|RELOAD|DONE)\s+cov: (\d+) ft: (\d+) corp: (\d+)")


# --- one process, one reader


def work(name: str, out: pathlib.Path, seconds: float, number: int) -> None:
    """Is a worker: fuzzes a reader until the time is over; libFuzzer ends the process."""
    import atheris

    from tests.fuzz import targets

    target = targets.TARGETS[name]
    crashes, corpus = out / "crashes" / name, out / "corpus" / name
    crashes.mkdir(parents=True, exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    words = out / f"{name}.dict"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    folder = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    watch = _Watch(out / f"{name}.{os.getpid()}.json", crashes)

    def once(data: bytes) -> None:
        begun = time.perf_counter()
        try:
            target.opens(data, folder)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            watch.crashed(data, error)
        watch.looked(time.perf_counter() - begun, data)

    for seed in sorted((SEEDS / name).iterdir()):
        once(seed.read_bytes())
    watch.begin()
    arguments = [
        sys.argv[0],
        f"-max_total_time={int(seconds)}",
        f"-timeout={SECONDS}",
        "-rss_limit_mb=0",
        f"-max_len={MAX_BYTES}",
        f"-dict={words}",
        f"-artifact_prefix={crashes}/",
        f"-seed={number + 1}",
        "-reload=1",
        "-print_final_stats=0",
        str(corpus),
        str(SEEDS / name),
    ]
    if name == "template":
        arguments.append(str(ROOT / "tests" / "data" / "chat_templates"))
    atheris.Setup(arguments, once)
    atheris.Fuzz()


class _Watch:
    """Keeps what a worker saw in a file, since libFuzzer ends processes without a word to Python."""

    def __init__(self, path: pathlib.Path, crashes: pathlib.Path):
        self._path, self._crashes = path, crashes
        self._slowest, self._told, self._base, self._executions = 0.0, 0.0, 0, 0
        self._known: set[str] = set()

    def begin(self) -> None:
        """Bounds the memory from now on."""
        with open("/proc/self/statm", "rb") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
        self._base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._slowest = 0.0

    def crashed(self, data: bytes, error: BaseException) -> None:
        """Keeps an input, once for each place and kind of error."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__}-{pathlib.Path(where.filename).stem}-{where.lineno}"
        if kind not in self._known:
            self._known.add(kind)
            (self._crashes / kind).write_bytes(data)
            (self._crashes / f"{kind}.txt").write_text("".join(traceback.format_exception(error)))

    def looked(self, seconds: float, data: bytes) -> None:
        self._executions += 1
        now = time.monotonic()
        if seconds > self._slowest:
            self._slowest = seconds
            if self._base and seconds > 1:
                (self._crashes.parent.parent / f"slowest-{self._crashes.name}").write_bytes(data)
        elif now - self._told < 1:
            return
        self._told = now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._base if self._base else 0
        child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        text = json.dumps(
            {"slowest": self._slowest, "peak_kb": peak, "child_kb": child, "executions": self._executions}
        )
        self._path.write_text(text)


# --- the other side: workers of all readers, watched


@dataclasses.dataclass
class Result:
    """What came of a reader.

    Attributes:
      executions: Inputs that were opened.
      seeds, branches: Branches that were taken by the seeds, and by all.
      features, corpus: libFuzzer's counts, of branches with how often they were taken, and of inputs kept.
      slowest: Seconds of the slowest input, the machine's other work included.
      peak: Most resident memory beyond what the process had, and of a child, in MB.
      crashes: Kinds of crashes.
      seconds: How long all its workers searched, together; without those that an input ended.
    """

    name: str
    executions: int = 0
    seeds: int = 0
    branches: int = 0
    features: int = 0
    corpus: int = 0
    slowest: float = 0.0
    peak: float = 0.0
    child: float = 0.0
    seconds: float = 0.0
    crashes: tuple[str, ...] = ()

    COLUMNS = (
        "reader",
        "executions",
        "a second",
        "branches of the seeds",
        "in the end",
        "features",
        "inputs kept",
        "slowest ms",
        "MB beyond start",
        "MB of a child",
        "crashes",
    )

    def row(self) -> tuple[str, ...]:
        rate = self.executions / self.seconds if self.seconds else 0.0
        cells = (self.executions, f"{rate:.0f}", self.seeds, self.branches, self.features, self.corpus)
        return (
            self.name,
            *map(str, cells),
            f"{1000 * self.slowest:.0f}",
            f"{self.peak:.0f}",
            f"{self.child:.0f}",
            ", ".join(self.crashes) or "none",
        )


class _Worker:
    """A process that fuzzes; started again with the time that is left where an input ended it."""

    def __init__(self, name: str, number: int, out: pathlib.Path, seconds: float):
        self.name, self.number, self._out = name, number, out
        self._end, self._starts = time.monotonic() + seconds, 0
        self._start()

    def _start(self) -> None:
        self._starts += 1
        log_path = self._out / f"{self.name}.{self.number}.{time.time_ns()}.log"
        program = [sys.executable, __file__, self.name, "--work", str(self.number), "--out", str(self._out)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with log_path.open("wb") as log:
            left = max(1, self._end - time.monotonic())
            self._process = subprocess.Popen(
                [*program, "--seconds", str(int(left))], stdout=log, stderr=log, env=environment, cwd=ROOT
            )

    def over(self) -> bool:
        """Whether it has ended for good."""
        if self._process.poll() is None:
            return False
        if self._process.returncode != 0 and time.monotonic() < self._end - 5 and self._starts < 20:
            self._start()
            return False
        return True

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def result_of(name: str, out: pathlib.Path) -> Result:
    """Adds up what the workers of a reader wrote into a folder, in this run and in earlier ones."""
    result = Result(name)
    for log in sorted(out.glob(f"{name}.*.log")):
        text = log.read_text(errors="replace")
        lines = [match for match in map(_SHOWS.search, text.splitlines()) if match]
        if lines:
            result.executions += int(lines[-1][1])
            result.branches = max(result.branches, *(int(match[3]) for match in lines))
            result.features = max(result.features, *(int(match[4]) for match in lines))
            result.corpus = max(result.corpus, *(int(match[5]) for match in lines))
        result.seeds = result.seeds or next((int(match[3]) for match in lines if match[2] == "INITED"), 0)
        done = re.search(r"^Done \d+ runs in (\d+) second", text, re.MULTILINE)
        result.seconds += int(done[1]) if done else 0
    for seen in out.glob(f"{name}.*.json"):
        told = json.loads(seen.read_text())
        result.slowest = max(result.slowest, told["slowest"])
        result.peak = max(result.peak, told["peak_kb"] / 1024)
        result.child = max(result.child, told["child_kb"] / 1024)
    kept = (out / "crashes" / name).glob("*")
    result.crashes = tuple(sorted(path.name for path in kept if path.suffix != ".txt"))
    return result


def fuzz(names: list[str], seconds: float, out: pathlib.Path, workers: int, at_once: int) -> list[Result]:
    """Fuzzes readers, `workers` processes each, `at_once` processes at a time."""
    waiting = [(name, number) for number in range(workers) for name in names]
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, number = waiting.pop(0)
                running.append(_Worker(name, number, out, seconds))
            time.sleep(0.2)
            for worker in [worker for worker in running if worker.over()]:
                running.remove(worker)
                print(f"{worker.name} has ended", file=sys.stderr, flush=True)
    finally:
        for worker in running:
            worker.stop()
    return [result_of(name, out) for name in names]


def table(results: list[Result]) -> str:
    """Returns the results as Markdown."""
    rows = [Result.COLUMNS, ("---",) * len(Result.COLUMNS), *(result.row() for result in results)]
    total, seconds = (sum(getattr(result, name) for result in results) for name in ("executions", "seconds"))
    models = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    machine = f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
    head = f"{time.strftime('%Y-%m-%d')}, {machine}, Python {platform.python_version()}, {seconds:.0f} s of all readers"
    return f"{head}; {total:,} executions.\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", metavar="READER", help=f"all, or of {' '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=120, help="for each reader (default 120)")
    parser.add_argument("--workers", type=int, default=1, help="processes of each reader (default 1)")
    parser.add_argument("--at-once", type=int, help="most processes at a time (default: all)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="where logs, inputs kept and crashes go (default: a new folder)"
    )
    parser.add_argument("--report", type=pathlib.Path, help="file to write the table into")
    parser.add_argument("--replay", type=pathlib.Path, help="open one input with the reader, and nothing else")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = NAMES if args.readers == ["all"] else args.readers
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"no such reader: {' '.join(unknown)}")
    if args.replay:
        from tests.fuzz import targets

        with tempfile.TemporaryDirectory() as folder:
            targets.TARGETS[names[0]].opens(args.replay.read_bytes(), pathlib.Path(folder))
        print("no crash")
        return 0
    out = args.out or pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    out.mkdir(parents=True, exist_ok=True)
    if args.work is not None:
        _instrumented_import()
        work(names[0], out, args.seconds, args.work)
        return 0
    total = len(names) * args.workers
    results = fuzz(names, args.seconds, out, args.workers, args.at_once or total)
    text = table(results)
    print(text)
    print(f"logs, inputs kept and crashes: {out}", file=sys.stderr)
    if args.report:
        args.report.write_text(text)
    return 1 if any(result.crashes or not result.executions for result in results) else 0


def _instrumented_import() -> None:
    import atheris

    with atheris.instrument_imports(include=list(_GUIDING)):
        from tests.fuzz import targets  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
