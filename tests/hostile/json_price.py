"""What JSON costs: the dearest texts that we know, for each file that is read as JSON, in memory and time.

    python tests/hostile/json_price.py     writes JSON.md; fails beyond 50 MB or below 50 MB/s

Tokenizers have another price (merges are pairs of short texts): `strict_json.TOKENIZER` times their bytes.
"""

from __future__ import annotations

import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.converters.errors import BrokenContainerError
from apr_jax.converters.formats import strict_json

ROOT = pathlib.Path(__file__).resolve().parents[2]

MEGABYTES, BYTES_A_SECOND, SIZE = 50.0, 50e6, 20_000_000
ALLOWANCE_SECONDS = 0.1
"""As every file has, beyond the rate."""


def filled(opening: bytes, item: bytes, closing: bytes = b"]") -> bytes:
    """A text of SIZE bytes of items."""
    return opening + (item + b",") * (SIZE // (len(item) + 1)) + item + closing


TEXTS: dict[str, Callable[[], bytes]] = {
    "empty arrays": lambda: filled(b"[", b"[]"),
    "empty objects": lambda: filled(b"[", b"{}"),
    "objects of one key": lambda: filled(b"[", b'{"":0}'),
    "arrays of 3 levels": lambda: filled(b"[", b"[[[]]]"),
    "digits": lambda: filled(b"[", b"1"),
    "numbers of 20 digits": lambda: filled(b"[", b"18446744073709551615"),
    "numbers of 90 digits": lambda: filled(b"[", b"9" * 90),
    "one number of 20 MB": lambda: b"[" + b"9" * SIZE + b"]",
    "floats": lambda: filled(b"[", b"0.5"),
    "floats of 90 digits": lambda: filled(b"[", b"0." + b"3" * 88),
    "floats with exponents": lambda: filled(b"[", b"1e-300"),
    "minus zero": lambda: filled(b"[", b"-0"),
    "negative zeros as floats": lambda: filled(b"[", b"-0.0"),
    "true": lambda: filled(b"[", b"true"),
    "empty texts": lambda: filled(b"[", b'""'),
    "texts of a letter": lambda: filled(b"[", b'"a"'),
    "texts of two-byte letters": lambda: filled(b"[", '"ä"'.encode()),
    "texts of four-byte letters": lambda: filled(b"[", '"😀"'.encode()),
    "one text": lambda: b'["' + b"a" * SIZE + b'"]',
    "one text that a letter makes four times as wide": lambda: '["😀'.encode() + b"a" * SIZE + b'"]',
    "one text of escapes": lambda: b'["' + b"\\n" * (SIZE // 2) + b'"]',
    "one text of \\u0061": lambda: b'["' + b"\\u0061" * (SIZE // 6) + b'"]',
    "one text of surrogate pairs": lambda: b'["' + b"\\ud83d\\ude00" * (SIZE // 12) + b'"]',
    "one text of half pairs": lambda: b'["' + b"\\ud83d" * (SIZE // 6) + b'"]',
    "texts of half a pair": lambda: filled(b"[", b'"\\ud83d"'),
    "texts of backslashes": lambda: filled(b"[", b'"\\\\"'),
    "one text of backslashes": lambda: b'["' + b"\\\\" * (SIZE // 2) + b'"]',
    "quotes within a text": lambda: b'["' + b'\\"' * (SIZE // 2) + b'"]',
    "keys": lambda: b"{" + b",".join(b'"%d":0' % n for n in range(SIZE // 12)) + b"}",
    "keys that are equal": lambda: filled(b"{", b'"a":0', b"}"),
    "keys that are equal once decoded": lambda: b'{"a":0,' + filled(b"", b'"\\u0061":0', b"}"),
    "long keys": lambda: b"{" + b",".join(b'"%0999d":0' % n for n in range(SIZE // 1002)) + b"}",
    "open brackets": lambda: b"[" * SIZE,
    "open braces": lambda: b'{"":' * (SIZE // 4),
    "closed brackets": lambda: b"]" * SIZE,
    "64 levels, again and again": lambda: filled(b"[", b"[" * 62 + b"]" * 62),
    "65 levels, again and again": lambda: filled(b"[", b"[" * 65 + b"]" * 65),
    "brackets in texts": lambda: b'["' + b"[" * SIZE + b'"]',
    "blanks": lambda: b" " * SIZE + b"[]",
    "commas": lambda: b"[" + b"," * SIZE + b"]",
    "colons": lambda: b"{" + b":" * SIZE + b"}",
    "quotes": lambda: b'"' * SIZE,
    "letters": lambda: b"a" * SIZE,
    "bytes that are no UTF-8": lambda: b'["' + b"\xff" * SIZE + b'"]',
    "NUL": lambda: bytes(SIZE),
}


def measured(name: str) -> tuple[str, float, float, int]:
    """Parses a text in this process, a fresh one; returns the outcome, seconds, MB beyond the text, and its bytes."""
    text = TEXTS[name]()
    strict_json.loads(b"[1.5]", what="it", max_bytes=100)
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    begun = time.process_time()
    try:
        value = strict_json.loads(text, what="the text", max_bytes=len(text))
        outcome = "accepted"
        del value
    except BrokenContainerError as error:
        outcome = error.code
    seconds = time.process_time() - begun
    return outcome, seconds, (_resident("VmHWM") - before) / 1024, len(text)


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> int:
    if len(sys.argv) > 1:
        outcome, seconds, megabytes, size = measured(sys.argv[1])
        print(f"{outcome}\t{seconds}\t{megabytes}\t{size}")
        return 0
    rows, broken = [], []
    for name in TEXTS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        outcome, seconds, megabytes, size = done.stdout.strip().split("\t")
        beyond, rate = float(megabytes) - int(size) / 2**20, int(size) / float(seconds) / 1e6
        if beyond > MEGABYTES or float(seconds) > ALLOWANCE_SECONDS + int(size) / BYTES_A_SECOND:
            broken.append(name)
        rows.append((beyond, rate, name, outcome, int(size)))
        print(f"{name:50} {outcome:16} {beyond:7.1f} MB beyond the text {rate:8.0f} MB/s", flush=True)
    head = (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}: {len(rows)} texts of 20 MB, "
        f"resident memory beyond the text "
        f"at its highest and processor time, each in a process of its own. Beyond a bound (50 MB; 50 MB/s and 100 ms): "
        f"{', '.join(broken) or 'none'}.\n\n| text | outcome | MB beyond the text | MB/s |\n| --- | --- | --- | --- |\n"
    )
    lines = [
        f"| {name} | {outcome} | {max(0, beyond):.1f} | {rate:.0f} |"
        for beyond, rate, name, outcome, _ in sorted(rows, reverse=True)
    ]
    (ROOT / "tests" / "hostile" / "JSON.md").write_text(head + "\n".join(lines) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
