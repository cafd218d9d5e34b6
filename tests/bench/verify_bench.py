"""Speed and memory of `verify` on 0.5B-shaped checkpoints (1 GB), beside `cmp` and plain reads in the same run.

Not part of the test suite: `python tests/bench/verify_bench.py [--folder /dev/shm/x] [--json FILE]` prints a table and
exits 1 where a bound is broken. The bounds:

  two equal files: at least 0.8 of the speed of `cmp`, whole commands, start-up included; peak resident memory at most
    the bare interpreter's + 48 MB
  one .apr file with its checksum: at least 0.8 of the speed of a plain read with ISA-L's CRC-32, both without start-up
    and imports
  two checkpoints with every tensor different: the whole command within 3 times the time of comparing them, and the
    comparison alone in constant memory

On a machine that does something else besides, processor seconds (printed too) say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEED_BOUND = 0.8
DIAGNOSIS_BOUND = 3.0
MEMORY_BOUND = 48 << 20
# numpy and its libraries, which comparing values needs.
VALUES_MEMORY_BOUND = 128 << 20
SAMPLE = "qwen2_0.5b"

_PEAK = """
import resource
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
"""
# In a fresh process: the command, and what it needed at most.
_VERIFY = (
    _PEAK
    + """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.commands import verify
args = verify.parse(["verify", *sys.argv[2:], "--json"])
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = verify.main(args)
found = json.loads(out.getvalue())
print(json.dumps({"code": code, "peak": peak(), "cpu": cpu(), "verdict": found["verdict"],
    "causes": sorted({finding["cause"] for finding in found["findings"]})}))
"""
)
_INSPECT = (
    _PEAK
    + """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.inspect.checks import inspect
begin, used = time.perf_counter(), cpu()
with open_checkpoint(sys.argv[2]) as checkpoint:
    failed = [check.name for check in inspect(checkpoint) if check.passed is False]
print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": cpu() - used, "peak": peak(), "failed": failed}))
"""
)
_COMPARE = (
    _PEAK
    + """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.verify.comparison import compare
begin = time.perf_counter()
with open_checkpoint(sys.argv[2]) as a, open_checkpoint(sys.argv[3]) as b:
    found = compare(a, b, diagnose=False)
print(json.dumps({"seconds": time.perf_counter() - begin, "peak": peak(), "cpu": cpu(), "verdict": found.verdict,
    "unequal": len(found.unequal), "tensors": found.compared.tensors}))
"""
)
# The yardstick for one file: one pass of readinto with the same CRC, best of three sizes of buffer.
_READ = (
    _PEAK
    + """
import json, sys, time
from isal.isal_zlib import crc32
def read(size):
    buffer = bytearray(size)
    view = memoryview(buffer)
    crc, begin, used = 0, time.perf_counter(), cpu()
    with open(sys.argv[1], "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = crc32(view[:count], crc)
    return time.perf_counter() - begin, cpu() - used
seconds, used = zip(*map(read, (1 << 18, 1 << 20, 1 << 22)))
print(json.dumps({"seconds": min(seconds), "cpu": min(used)}))
"""
)


def _child(code: str, *arguments: object) -> dict[str, Any]:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True, cwd="/"
    )
    return {"whole_seconds": time.perf_counter() - begin} | json.loads(done.stdout)


def _seconds(*command: object) -> float:
    begin = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def _tool(name: str, *arguments: object) -> None:
    subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )


def _row(what: str, ratio: float, bound: str, failed: bool, **figures: Any) -> dict[str, Any]:
    return {"what": what, "ratio": ratio, "bound": bound, "ok": not failed, **figures}


def equal_files(source: pathlib.Path, folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Two copies of one safetensors file, verify and `cmp` in turn."""
    copy = folder / "copy"
    shutil.copytree(source, copy)
    files = [place / "model.safetensors" for place in (source, copy)]
    cmp, ours = [], []
    for _ in range(rounds):
        cmp.append(_seconds("cmp", *files))
        ours.append(_child(_VERIFY, ROOT, source, copy))
    shutil.rmtree(copy)
    size = files[0].stat().st_size
    bare = _child(_PEAK + "import json; print(json.dumps({'peak': peak()}))")["peak"]
    ratio = min(cmp) / min(run["whole_seconds"] for run in ours)
    most = max(run["peak"] for run in ours)
    right = all(run["verdict"] == "identical" and run["code"] == 0 for run in ours)
    return _row(
        "two equal files / cmp",
        ratio,
        f">= {SPEED_BOUND}, {(bare + MEMORY_BOUND) / 1e6:.0f} MB",
        ratio < SPEED_BOUND or most > bare + MEMORY_BOUND or not right,
        gb_per_s=size / min(run["whole_seconds"] for run in ours) / 1e9,
        yardstick_gb_per_s=size / min(cmp) / 1e9,
        cpu=min(run["cpu"] for run in ours),
        yardstick_cpu=None,
        peak_mb=most / 1e6,
        verdict=ours[0]["verdict"],
    )


def one_file(source: pathlib.Path, folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    """One `.apr` with its checksum."""
    apr = folder / "model.apr"
    _tool("convert", "--to", "apr", source, "-o", apr)
    reads, ours = [], []
    for _ in range(rounds):
        reads.append(_child(_READ, apr))
        ours.append(_child(_INSPECT, ROOT, apr))
    size = apr.stat().st_size
    apr.unlink()
    best, plain = (min(run["seconds"] for run in runs) for runs in (ours, reads))
    return _row(
        "one .apr / read + CRC",
        plain / best,
        f">= {SPEED_BOUND}",
        plain / best < SPEED_BOUND or bool(ours[0]["failed"]),
        gb_per_s=size / best / 1e9,
        yardstick_gb_per_s=size / plain / 1e9,
        cpu=min(run["cpu"] for run in ours),
        yardstick_cpu=min(run["cpu"] for run in reads),
        peak_mb=max(run["peak"] for run in ours) / 1e6,
        verdict=f"failed: {ours[0]['failed']}" if ours[0]["failed"] else "passed",
    )


def different(what: str, source: pathlib.Path, other: pathlib.Path, rounds: int) -> dict[str, Any]:
    """Two checkpoints in which every tensor differs: the whole command over the comparison alone, in turn."""
    turns = [[_child(code, ROOT, source, other) for code in (_COMPARE, _VERIFY)] for _ in range(rounds)]
    compared, whole = (min(runs, key=lambda run: run["whole_seconds"]) for runs in zip(*turns, strict=True))
    ratio = whole["whole_seconds"] / compared["whole_seconds"]
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    bare = _child(_PEAK + "import json; print(json.dumps({'peak': peak()}))")["peak"]
    memory_bound = bare + VALUES_MEMORY_BOUND
    return _row(
        f"{what}: diagnosis / comparison",
        ratio,
        f"<= {DIAGNOSIS_BOUND:.0f}, comparison {memory_bound / 1e6:.0f} MB",
        ratio > DIAGNOSIS_BOUND or compared["peak"] > memory_bound or compared["unequal"] != compared["tensors"],
        gb_per_s=size / whole["whole_seconds"] / 1e9,
        yardstick_gb_per_s=size / compared["whole_seconds"] / 1e9,
        cpu=whole["cpu"],
        yardstick_cpu=compared["cpu"],
        peak_mb=whole["peak"] / 1e6,
        comparison_peak_mb=compared["peak"] / 1e6,
        verdict=f"{whole['verdict']} ({', '.join(whole['causes'])})",
    )


def relabelled(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the same bytes with the tag F16 in place of BF16."""
    shutil.copytree(source, folder)
    with open(folder / "model.safetensors", "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        file.seek(8)
        file.write(header.replace(b'"BF16"', b'"F16" '))


def measure(folder: pathlib.Path, sample: str, rounds: int) -> list[dict[str, Any]]:
    """Runs everything; yields one row for each bound."""
    source, other = folder / "hf", folder / "other"
    # A small tokenizer: 20 MB of JSON, parsed at each opening, are not what is measured here.
    _tool("make_sample", sample, "--tokenizer", "small", "-o", source)
    rows = [equal_files(source, folder, rounds), one_file(source, folder, rounds)]
    _tool("make_sample", sample, "--tokenizer", "small", "-o", other, "--seed", 1)
    rows.append(different("other weights", source, other, rounds))
    shutil.rmtree(other)
    _tool("convert", "--to", "safetensors", "--cast", "f16", source, "-o", other)
    rows.append(different("cast to f16", source, other, rounds))
    shutil.rmtree(other)
    relabelled(source, other)
    rows.append(different("tagged f16", source, other, rounds))
    return rows


def main() -> int:
    """Prints the table; returns 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="a tmpfs")
    parser.add_argument("--sample", default=SAMPLE, help="which of make_sample's checkpoints, in one file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verify-bench-", dir=args.folder) as name:
        rows = measure(pathlib.Path(name), args.sample, args.rounds)
    heads = f"{'ratio':>6} {'bound':28} {'GB/s: ours':>10} {'other':>6} {'CPU s: ours':>11} {'other':>6} {'peak MB':>8}"
    print(" " * 37, heads)
    for row in rows:
        other = "" if row["yardstick_cpu"] is None else f"{row['yardstick_cpu']:.2f}"
        print(
            f"{row['what']:37} {row['ratio']:6.2f} {row['bound']:28} {row['gb_per_s']:10.2f} "
            f"{row['yardstick_gb_per_s']:6.2f} {row['cpu']:11.2f} {other:>6} {row['peak_mb']:8.1f}  {row['verdict']}"
            + ("" if row["ok"] else " BROKEN")
        )
    result = {"rows": rows, "python": sys.version.split()[0], "cpus": os.cpu_count()}
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"ratios": [round(row["ratio"], 3) for row in rows], "ok": all(row["ok"] for row in rows)}))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
