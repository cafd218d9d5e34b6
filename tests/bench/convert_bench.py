"""Speed and memory of the conversion of a 1 GB checkpoint, beside a plain copy of the same bytes in the same run.

Not part of the test suite: `python tests/bench/convert_bench.py [--folder /dev/shm/x] [--json FILE]` prints a table and
exits 1 where a bound is broken. The bounds: at least 0.75 of the speed of a readinto/write loop, CRC included; the
payload read once and written once; peak resident memory at most the bare interpreter's + 32 MB + 12 times the
metadata's bytes, with a small tokenizer and with one of 151,643 entries.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEED_BOUND = 0.75
MEMORY_BOUND = 32 << 20
MEMORY_FACTOR = 12
# Reading headers, JSON and the program itself, and writing the prologue, come on top of the payload.
EXTRA_READ = 64 << 20

_PEAK = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
def io():
    return {line.split(": ")[0]: int(line.split(": ")[1]) for line in open("/proc/self/io")}
"""
_BARE = _PEAK + "print(peak())"
# The conversion in a fresh process: its time without the interpreter's start, and what the kernel counted.
_CONVERT = (
    _PEAK
    + """
import contextlib, io as stdio, json, sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.commands import convert
args = convert.parse(["convert", *sys.argv[2:]])
before, begin = io(), time.perf_counter()
with contextlib.redirect_stdout(stdio.StringIO()) as out:
    code = convert.main(args)
seconds, after = time.perf_counter() - begin, io()
outcome = json.loads(out.getvalue())["outcome"]
print(json.dumps({"code": code, "seconds": seconds, "peak": peak(), "data_seconds": outcome["seconds"],
    "read": after["rchar"] - before["rchar"], "written": after["wchar"] - before["wchar"],
    "heavy": sorted({"numpy", "rich", "ml_dtypes", "jax", "torch"} & set(sys.modules))}))
"""
)
# The yardstick, in a fresh process too: the best of the buffer sizes.
_COPY = """
import json, os, sys, time
def copy(size):
    buffer = bytearray(size)
    view = memoryview(buffer)
    begin = time.perf_counter()
    with open(sys.argv[1], "rb", buffering=0) as source, open(sys.argv[2], "wb", buffering=0) as target:
        while count := source.readinto(buffer):
            target.write(view[:count])
    seconds = time.perf_counter() - begin
    os.unlink(sys.argv[2])
    return seconds
print(json.dumps({"seconds": copy(int(sys.argv[3]))}))
"""


def _child(code: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True, cwd="/"
    )
    return json.loads(done.stdout)


def _tensors(hidden: int, ffn: int, layers: int, vocab: int, kv: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.bias": (hidden,),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.k_proj.bias": (kv,),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.bias": (kv,),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    return dict(sorted(shapes.items()))


def write_checkpoint(folder: pathlib.Path, *, layers: int, entries: int) -> int:
    """Writes a bf16 checkpoint of Qwen2.5-0.5B's widths, its tokenizer of `entries` tokens; returns its data bytes."""
    vocab, hidden, ffn, kv, heads = 151_936, 896, 4864, 128, 14
    shapes = _tensors(hidden, ffn, layers, vocab, kv)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    noise = os.urandom(1 << 20)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, position, len(noise)):
            file.write(noise[: position - begin])
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, entries)
    return position


def write_tokenizer(folder: pathlib.Path, entries: int) -> None:
    """Writes tokenizer.json, vocab.json and merges.txt, with tokens in several scripts as real ones have them."""
    scripts = ("token", "Ġwort", "слово", "単語", "😀")
    tokens = {f"{scripts[number % len(scripts)]}{number:x}": number for number in range(entries)}
    names = list(tokens)
    merges = [[names[number - 1], names[number]] for number in range(1, max(1, entries - 256))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": entries, "content": "<|endoftext|>", "special": True}],
        "model": {"type": "BPE", "vocab": tokens, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")


def metadata_bytes(apr: pathlib.Path) -> int:
    """Returns how long the metadata of an `.apr` are."""
    with open(apr, "rb") as file:
        return int(struct.unpack_from("<I", file.read(64), 20)[0])


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def measure(folder: pathlib.Path, *, layers: int, entries: int, rounds: int) -> list[dict[str, Any]]:
    """Converts both ways, `rounds` times in turn with the plain copy, and returns one row per direction."""
    bare = _child(_BARE)
    source, apr, back = folder / "hf", folder / "model.apr", folder / "back"
    payload = write_checkpoint(source, layers=layers, entries=entries)
    copies: list[float] = []
    runs: dict[str, list[dict[str, Any]]] = {"HF -> apr": [], "apr -> HF": []}
    for _ in range(rounds):
        for size in (1 << 18, 1 << 20):
            copies.append(_child(_COPY, source / "model.safetensors", folder / "copy", size)["seconds"])
        for direction, begin, to, end in (
            ("HF -> apr", source, "apr", apr),
            ("apr -> HF", apr, "safetensors", back),
        ):
            _remove(end)
            runs[direction].append(_child(_CONVERT, ROOT, begin, "--to", to, "-o", end, "--json"))
    metadata = metadata_bytes(apr)
    same = all(
        (back / file.name).read_bytes() == file.read_bytes()
        for file in source.iterdir()
        if file.suffix != ".safetensors"
    )
    same = same and _same_file(source / "model.safetensors", back / "model.safetensors")
    written = {"HF -> apr": apr.stat().st_size, "apr -> HF": sum(file.stat().st_size for file in back.iterdir())}
    rows = []
    for direction, found in runs.items():
        ratio = min(copies) / min(run["data_seconds"] for run in found)
        peak = max(run["peak"] for run in found)
        bound = bare + MEMORY_BOUND + MEMORY_FACTOR * metadata
        read = max(run["read"] for run in found)
        wrote = max(run["written"] for run in found)
        failures = []
        if ratio < SPEED_BOUND:
            failures.append("speed")
        if peak > bound:
            failures.append("memory")
        if read > payload + EXTRA_READ or wrote != written[direction]:
            failures.append("more than one pass")
        if not same:
            failures.append("not identical")
        if any(run["heavy"] for run in found):
            failures.append("imports " + " ".join(found[0]["heavy"]))
        rows.append(
            {
                "direction": direction,
                "tokenizer_entries": entries,
                "payload_bytes": payload,
                "metadata_bytes": metadata,
                "copy_gb_per_s": payload / min(copies) / 1e9,
                "convert_gb_per_s": payload / min(run["data_seconds"] for run in found) / 1e9,
                "ratio": ratio,
                "whole_command_seconds": min(run["seconds"] for run in found),
                "bytes_read": read,
                "bytes_written": wrote,
                "bare_rss": bare,
                "peak_rss": peak,
                "peak_rss_bound": bound,
                "failures": failures,
            }
        )
    for path in (source, apr, back):
        _remove(path)
    return rows


def _same_file(one: pathlib.Path, other: pathlib.Path) -> bool:
    with open(one, "rb") as a, open(other, "rb") as b:
        while block := a.read(1 << 22):
            if block != b.read(1 << 22):
                return False
        return not b.read(1)


def main() -> int:
    """Runs both tokenizer sizes; returns 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="a tmpfs")
    parser.add_argument("--layers", type=int, default=27, help="27 layers are 1.08 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON too")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="convert-bench-", dir=args.folder) as name:
        for entries in (256, 151_643):
            rows += measure(pathlib.Path(name), layers=args.layers, entries=entries, rounds=args.rounds)
    print(
        f"{'direction':10} {'tokens':>7} {'copy GB/s':>9} {'ours GB/s':>9} {'ratio':>6} {'read':>12} {'written':>12} "
        f"{'metadata':>9} {'peak MB':>8} {'bound MB':>8}  verdict"
    )
    for row in rows:
        print(
            f"{row['direction']:10} {row['tokenizer_entries']:7} {row['copy_gb_per_s']:9.2f} "
            f"{row['convert_gb_per_s']:9.2f} {row['ratio']:6.2f} {row['bytes_read']:12} "
            f"{row['bytes_written']:12} {row['metadata_bytes']:9} "
            f"{row['peak_rss'] / 1e6:8.1f} {row['peak_rss_bound'] / 1e6:8.1f}  {', '.join(row['failures']) or 'ok'}"
        )
    result = {
        "rows": rows,
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "seconds": time.perf_counter() - began,
    }
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps({"ratios": [round(row["ratio"], 3) for row in rows], "ok": not any(row["failures"] for row in rows)})
    )
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
