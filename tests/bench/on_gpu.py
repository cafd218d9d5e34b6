"""The figures of one GPU in tests/bench/results, in about 2 minutes: `python tests/bench/on_gpu.py DIR`.

Compiling HuggingFace takes longer than everything else. So every case of the bars has a process of its own: one after
the other compiles our programs, since XLA picks kernels by timing them, then all compile HuggingFace side by side, and
when all are ready, one after the other takes its figures alone. Whole processes to the first token and the other cases,
without peers, follow. DIR/*.json are written as figures come; what would begin too late is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

DTYPE = "bfloat16"
BARS = ("decode-1x128", "decode-32x128", "prefill-8x2048", "prefill-1x2048")
OTHERS = ("decode-8x128", "decode-1x2048", "decode-8x2048", "decode-32x2048", "prefill-1x128")
SEVEN_BILLION = {"decode-1x128": True, "prefill-4x2048": False}  # whether beside HuggingFace
READY_SECONDS = 110


@dataclasses.dataclass
class Together:
    """What the processes share: when all have compiled, and whose turn it is."""

    tuned: Any
    ready: Any
    turn: Any
    results: Any
    device: str
    quick: bool
    models: dict[str, str]

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """One after the other; then waits for the others."""
        with self.turn:
            yield
        self._wait(self.tuned)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """When all are ready, or after long enough, one after the other."""
        self._wait(self.ready)
        with self.turn:
            yield

    def _wait(self, barrier: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(READY_SECONDS)


def measure(together: Together, model: str, cases: Sequence[str], peers: bool, in_line: bool) -> None:
    """Measures in this process; puts model and results into the queue after every case."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")
    from apr_jax.bench import session
    from apr_jax.bench.cases import Case

    parsed = tuple(Case.parse(case) for case in cases)
    settings = session.Settings(
        model=together.models[model],
        device=together.device,
        dtype=DTYPE,
        cases=parsed,
        start_up=False,
        peers=peers,
        compiled=parsed if peers else (),
        seconds=None,
        quick=together.quick,
        scratch=None,
    )

    def say(line: str) -> None:
        print(f"[{model}] {line}", flush=True)

    def keep(results: dict[str, Any]) -> None:
        together.results.put((model, json.dumps(results)))

    session.run(settings, say, keep, *([together] if in_line else []))


def merge(known: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Adds cases; the limits are those of the fastest ceilings that any of the processes met."""
    if known is None:
        return new
    from apr_jax.bench.cases import Case, Ceilings, Work

    best = {key: max(known["ceilings"][key], new["ceilings"][key]) for key in ("flops", "bytes")}
    ceilings = Ceilings(**best)
    cases = {entry["case"]: entry for entry in (*known["cases"], *new["cases"])}
    for entry in cases.values():
        least = Work(entry["flops"], entry["bytes"])
        entry |= {"limit_milliseconds": ceilings.floor(least) * 1e3, "bound": ceilings.bound(least)}
    apart = [r["relative_l2_to_huggingface"] for r in (known, new) if "relative_l2_to_huggingface" in r]
    worst = {"relative_l2_to_huggingface": max(apart)} if apart else {}
    return {
        **known,
        "ceilings": best,
        **worst,
        "cases": sorted(cases.values(), key=lambda entry: Case.parse(entry["case"])),
    }


class Files:
    """The results files, written whenever something is known."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self.known: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, model: str, results: dict[str, Any]) -> None:
        self.known[model] = merge(self.known.get(model), results)
        self.write(model)

    def write(self, model: str) -> None:
        text = json.dumps(self.known[model], indent=1) + "\n"
        (self._folder / f"gpu-{model}-{DTYPE}.json").write_text(text)

    def take(self, results: Any, processes: Sequence[Any]) -> None:
        """Takes results until the processes have ended."""
        while any(process.is_alive() for process in processes) or not results.empty():
            with contextlib.suppress(queue.Empty):
                model, text = results.get(timeout=1)
                self.add(model, json.loads(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path, help="where the results go")
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing later than 20 before (default: 120)")
    parser.add_argument("--scratch", default="/dev/shm", help="for a checkpoint of 1 GB (default: /dev/shm)")
    parser.add_argument(
        "--rehearse", metavar="MODEL", help="on the CPU, with this small checkpoint, one short turn each"
    )
    args = parser.parse_args()
    begun = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    models = {"0.5b": args.rehearse or "0.5b", "7b": args.rehearse or "7b"}
    jobs = [("0.5b", [case], True) for case in BARS] + [("7b", [case], peers) for case, peers in SEVEN_BILLION.items()]
    together = Together(
        context.Barrier(len(jobs)),
        context.Barrier(len(jobs)),
        context.Lock(),
        context.Queue(),
        "cpu" if args.rehearse else "cuda",
        bool(args.rehearse),
        models,
    )
    files = Files(args.folder)
    sample = pathlib.Path(args.rehearse or pathlib.Path(args.scratch, "apr_jax_bench_0.5b"))
    writer = context.Process(target=write_sample, args=(str(sample),))
    if not args.rehearse:
        writer.start()
    children = [context.Process(target=measure, args=(together, *job, True)) for job in jobs]
    for child in children:
        child.start()
    files.take(together.results, children)
    print(f"cases of the bars: {time.perf_counter() - begun:.0f} s", flush=True)
    if time.perf_counter() - begun < args.seconds - 30:
        if not args.rehearse:
            writer.join()
        add_start_up(files, str(sample), together.device)
        print(f"first tokens: {time.perf_counter() - begun:.0f} s", flush=True)
    if time.perf_counter() - begun < args.seconds - 20:
        others = context.Process(target=measure, args=(together, "0.5b", OTHERS, False, False))
        others.start()
        files.take(together.results, [others])
    print(f"all: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0


def write_sample(path: str) -> None:
    """Writes a checkpoint of the 0.5B shape."""
    from apr_jax.testing.sample import write_sample as write

    write("qwen2_0.5b", path, force=True)


def add_start_up(files: Files, sample: str, device: str) -> None:
    """Measures whole processes to the first token."""
    from apr_jax.bench import report, start_up

    rows = start_up.run(sample, device, DTYPE, 1, True)
    files.known["0.5b"]["start_up"] = rows
    files.write("0.5b")
    print(report.text(report.start_up(files.known["0.5b"])), flush=True)


if __name__ == "__main__":
    sys.exit(main())
