"""A sharded checkpoint of Qwen2.5-7B's shape (15.2 GB): converted both ways, killed at ten moments, resumed, verified.

Not part of the test suite: `python tests/bench/scale_bench.py FOLDER [--layers 28] [--parts convert,kill,verify]` needs
three times the checkpoint's bytes in FOLDER and prints one JSON object a line. Bounds, exit code 1 where one is broken:

  memory      of all commands: the bare interpreter's + 32 MB + 12 times the bytes of the .apr's metadata
  resumed     the same bytes as an undisturbed run
  done twice  at most 5 % of the bytes read, and of the bytes written, by the killed run and the resumed one together
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config  # noqa: E402
from apr_jax.converters.storage.workers import Workers  # noqa: E402
from tests.bench import convert_bench  # noqa: E402

MEMORY_BOUND, MEMORY_FACTOR = 32 << 20, 12
TWICE_BOUND = 0.05
SHARDS = 4
MOMENTS = (0.02, 0.1, 0.22, 0.35, 0.47, 0.6, 0.72, 0.85, 0.97, 1.0)
_NOISE_BYTES = 67_108_859  # a prime, so that no two blocks are alike
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 152_064,
    "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "max_position_embeddings": 32_768, "torch_dtype": "bfloat16",
}  # fmt: skip
# A command in a process of its own, and what it needed at most.
_MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
import atexit, time
begun = time.perf_counter()
def say():
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
    io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    heavy = ",".join(sorted({"numpy", "rich", "ml_dtypes", "jax"} & set(sys.modules)))
    print("measured", peak, io["rchar"], io["wchar"], time.perf_counter() - begun, heavy, file=sys.stderr)
atexit.register(say)
if len(sys.argv) > 2:
    from apr_jax.converters.commands import cli
    cli.start("apr_jax.converters.commands." + sys.argv[2], sys.argv[2:])
"""


def write_checkpoint(folder: pathlib.Path, layers: int, entries: int) -> int:
    """Writes the shards and side files; returns the bytes of the tensors."""
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    convert_bench.write_tokenizer(folder, entries)
    shapes = Qwen2Config.from_hf(config).tensor_shapes()
    noise = os.urandom(_NOISE_BYTES) * 2
    total = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    shards: list[dict[str, Any]] = [{}]
    held, placed = 0, {}
    for name, shape in sorted(shapes.items()):
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if held + nbytes > total / SHARDS and held and len(shards) < SHARDS:
            shards.append({})
            held = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [held, held + nbytes]}
        placed[name] = len(shards)
        held += nbytes
    written = 0
    for number, header in enumerate(shards, 1):
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / f"model-{number:05}-of-{len(shards):05}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            end = written + max(fields["data_offsets"][1] for fields in header.values())
            while written < end:
                at, count = written % _NOISE_BYTES, min(16 << 20, end - written)
                file.write(memoryview(noise)[at : at + count])
                written += count
    weight_map = {name: f"model-{number:05}-of-{len(shards):05}.safetensors" for name, number in placed.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, or of a folder's names and files."""
    if path.is_dir():
        with Workers(2) as workers:
            files = sorted(path.iterdir())
            return ",".join(
                f"{file.name}:{found}" for file, found in zip(files, workers.map(digest, files), strict=True)
            )
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts a command of converters in a process that says at its end what it needed."""
    command = [sys.executable, "-c", _MEASURED, ROOT, *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits for it; returns its answer and what it needed."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    _, peak, read, written, seconds, *heavy = errors.strip().splitlines()[-1].split()
    figures = {"peak": int(peak), "read": int(read), "written": int(written), "seconds": round(float(seconds), 2)}
    return figures | {"heavy": heavy, "answer": json.loads(out) if out.strip().startswith("{") else out}


def remove(path: pathlib.Path) -> None:
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def written_by(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Bytes that a process has read and written so far."""
    with open(f"/proc/{process.pid}/io") as file:
        io = dict(line.split(": ") for line in file.read().splitlines())
    return int(io["rchar"]), int(io["wchar"])


def converted(direction: str, arguments: tuple[object, ...], target: pathlib.Path) -> dict[str, Any]:
    """An undisturbed conversion: its figures, and the digest of what it wrote."""
    remove(target)
    found = finish(start("convert", *arguments, "--json"))
    row = {"direction": direction, **{key: found[key] for key in ("peak", "read", "written", "seconds", "heavy")}}
    return row | {"data_seconds": found["answer"]["outcome"]["seconds"], "digest": digest(target)}


def killed(
    direction: str, arguments: tuple[object, ...], target: pathlib.Path, whole: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Kills the conversion at each of `MOMENTS`, resumes it, and yields what was done twice."""
    for moment in MOMENTS:
        remove(target)
        process = start("convert", *arguments, "--resume", "--json")
        wanted = moment * 0.999 * whole["written"]
        while written_by(process)[1] < wanted:
            time.sleep(2e-3)
        if moment == 1.0:
            time.sleep(0.05)  # while it is being flushed
        process.send_signal(signal.SIGSTOP)
        read, written = written_by(process)
        process.kill()
        process.communicate()
        assert not target.exists()
        found = finish(start("convert", *arguments, "--resume", "--json"))
        kept = found["answer"]["outcome"]["kept_bytes"]
        # What was kept has been read once more, from the output, to be checked.
        twice = (read + found["read"] - kept - whole["read"], written + found["written"] - whole["written"])
        shares = [round(max(0, excess) / whole["written"], 5) for excess in twice]
        same = digest(target) == whole["digest"]
        row = {"direction": direction, "moment": moment, "kept": kept, "read_twice": shares[0]}
        row |= {"written_twice": shares[1], "same": same, "peak": found["peak"], "seconds": found["seconds"]}
        yield row | {"ok": same and max(shares) <= TWICE_BOUND and found["peak"] <= whole["bound"]}


def main() -> int:
    """Runs the parts; returns 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--entries", type=int, default=1000, help="of the tokenizer; 151643 are Qwen's")
    parser.add_argument("--parts", default="convert,kill,verify")
    args = parser.parse_args()
    source, apr, back = args.folder / "hf", args.folder / "m.apr", args.folder / "back"
    if not source.exists():
        print(json.dumps({"bytes": write_checkpoint(source, args.layers, args.entries), "shards": SHARDS}), flush=True)
    bare = finish(start())["peak"]
    ok = True
    to_apr = (source, "-o", apr)
    to_shards = (apr, "-o", back, "--max-shard-size", "5GB")

    def say(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal ok
        ok = ok and row.get("ok", True)
        print(json.dumps(row), flush=True)
        return row

    for direction, arguments, target in (("hf-to-apr", to_apr, apr), ("apr-to-hf", to_shards, back)):
        if not {"convert", "kill"} & set(args.parts.split(",")):
            break
        whole = converted(direction, arguments, target)
        metadata = convert_bench.metadata_bytes(apr)
        bound = bare + MEMORY_BOUND + MEMORY_FACTOR * metadata
        whole |= {"bare": bare, "metadata": metadata, "bound": bound, "ok": whole["peak"] <= bound}
        say(whole)
        if "kill" in args.parts:
            for row in killed(direction, arguments, target, whole):
                say(row)
    if "verify" in args.parts:
        found = finish(start("verify", source, apr, "--json"))
        begun = time.perf_counter()
        subprocess.run(["cat", *source.glob("*.safetensors"), apr], check=True, stdout=subprocess.DEVNULL)
        row = {key: found[key] for key in ("peak", "seconds", "heavy")} | {"verdict": found["answer"]["verdict"]}
        say({"verify": row, "read_seconds": round(time.perf_counter() - begun, 2)})
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
