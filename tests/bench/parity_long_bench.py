"""parity on a long prompt with a mistake that begins at one position: `make parity-long`.

An engine that goes wrong at position 11,000 of 20,000 dumps layer outputs and keys of all positions and the other
stages of some; then the command is run on that dump as its user runs it, in a process of its own. Exits 1 if anything
else is named than the mistake, if its first position is another one, or where a bound of time or memory is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax import capture, open_checkpoint
from apr_jax.testing.sample import SAMPLES, write_sample
from apr_jax.trace.inputs import seeded
from tests import paths
from tests.bench import long_engine

MOST_BYTES = 12e9
MOST_SECONDS = {"cpu": 1800, "cuda": 180}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="qwen2_0.5b", choices=sorted(SAMPLES), help="default: qwen2_0.5b")
    parser.add_argument("--length", type=int, default=20000, help="default: 20000")
    parser.add_argument("--position", type=int, default=11000, help="where the mistake begins (default: 11000)")
    parser.add_argument("--mistakes", default="restart", help=f"of {', '.join(long_engine.MISTAKES)}, none; or several")
    parser.add_argument("--step", type=int, default=128, help="all stages of every so many positions (default: 128)")
    parser.add_argument("--device", default="cpu", choices=sorted(MOST_SECONDS), help="default: cpu")
    parser.add_argument("--scratch", default="/dev/shm", help="for the checkpoint and the dump (default: /dev/shm)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        model, dump = pathlib.Path(scratch, "hf"), pathlib.Path(scratch, "dump")
        write_sample(args.sample, model)
        results = [examine(args, mistake, model, dump) for mistake in args.mistakes.split(",")]
    return 0 if all(results) else 1


def examine(args: argparse.Namespace, mistake: str, model: pathlib.Path, dump: pathlib.Path) -> bool:
    """Dumps a run with a mistake and looks for it; returns whether that went as it has to."""
    begun = time.perf_counter()
    child = os.fork()  # what the engine takes is no memory of the command's
    if child == 0:
        _dump(args, None if mistake == "none" else mistake, model, dump)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the engine failed")
    size = sum(file.stat().st_size for file in dump.iterdir())
    print(f"{args.sample}, {args.length} positions, {mistake}: dumped {size / 1e9:.1f} GB", end=" ", flush=True)
    print(f"in {time.perf_counter() - begun:.0f} s", flush=True)
    begun = time.perf_counter()
    command = [sys.executable, paths.ROOT / "tools" / "parity.py", model, "--right", dump, "--json"]
    command += ["--left", args.device]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    report, seconds, peak = json.loads(text), time.perf_counter() - begun, used.ru_maxrss * 1024
    passed = right(report, mistake, args.position) and seconds <= MOST_SECONDS[args.device]
    passed &= args.device == "cuda" or peak <= MOST_BYTES  # CUDA's own libraries take several
    named = [(finding["fault"], finding["layers"], finding["parameters"]) for finding in report["findings"]]
    print(
        f"parity ({args.device}): {report['compared']['stages']} stages, {report['compared']['elements']} elements,"
        f" {named} in {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processor time), peak {peak / 1e9:.1f}"
        f" GB; bounds {MOST_SECONDS[args.device]} s, {MOST_BYTES / 1e9:.0f} GB: {'ok' if passed else 'FAILED'}"
    )
    for finding in report["findings"]:
        print(f"  {finding['sentence']}")
    firsts = sorted({(key.split(".")[-1], where["position"]) for key, where in report["first_wrong"].items()})
    print(f"  first wrong: {', '.join(f'{stage} {position}' for stage, position in firsts) or 'none'}", flush=True)
    return passed


def right(report: Mapping[str, Any], mistake: str, position: int) -> bool:
    """Whether a report names the mistake, alone, and where it begins."""
    firsts = [where["position"] for where in report["first_wrong"].values()]
    if mistake == "none":
        return not report["findings"] and not firsts
    found = [SimpleNamespace(**finding) for finding in report["findings"]]
    return named(found, mistake, position) and min(firsts) == position


def named(findings: Sequence[Any], mistake: str, position: int) -> bool:
    """Whether all findings are the mistake, with the position where it is a parameter."""
    name, parameters = long_engine.MISTAKES[mistake]
    wanted = {key: position if value is None else value for key, value in parameters.items()}
    return {finding.fault for finding in findings} == {name} and all(
        wanted.items() <= finding.parameters.items() for finding in findings
    )


def _dump(args: argparse.Namespace, mistake: str | None, model: pathlib.Path, dump: pathlib.Path) -> None:
    import jax

    ids = seeded(SAMPLES[args.sample].config.vocab_size, 1, args.length).input_ids
    columns = long_engine.sampled(args.length, args.step)
    with open_checkpoint(model) as checkpoint:
        weights = {name: tensor.read().astype(np.float32) for name, tensor in checkpoint.tensors.items()}
    config = json.loads((model / "config.json").read_text())
    with jax.default_device(jax.devices(args.device)[0]):
        values = long_engine.dump(weights, config, ids, mistake, args.position, columns)
    capture.arrays(dump, ids, values, positions=columns, force=True)


if __name__ == "__main__":
    sys.exit(main())
