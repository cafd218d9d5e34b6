"""What JSON costs: the dearest texts that we know, for each file that is read as JSON, in memory and time.

    python tests/hostile/json_price.py     writes JSON.md; fails beyond 50 MB or below 50 MB/s

A text that 20 MB of are refused for its price is also measured where it is as long as is accepted. Tokenizers have
another price (merges are pairs of short texts): `strict_json.TOKENIZER` times their bytes.
"""

from __future__ import annotations

import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.converters.errors import BrokenContainerError
from apr_jax.converters.formats import strict_json

ROOT = pathlib.Path(__file__).resolve().parents[2]

MEGABYTES, BYTES_A_SECOND, SIZE = 50.0, 50e6, 20_000_000
ALLOWANCE_SECONDS = 0.1
"""As every file has, beyond the rate."""
TRIES = 3
"""What is beyond a bound is measured again: other processes compute on the same cores."""


class Row(NamedTuple):
    """What a text cost."""

    beyond: float
    name: str
    outcome: str
    size: float
    milliseconds: float
    broken: bool


def filled(size: int, opening: bytes, item: bytes, closing: bytes = b"]") -> bytes:
    """A text of `size` bytes of items."""
    return opening + (item + b",") * (size // (len(item) + 1)) + item + closing


TEXTS: dict[str, Callable[[int], bytes]] = {
    "empty arrays": lambda size: filled(size, b"[", b"[]"),
    "empty objects": lambda size: filled(size, b"[", b"{}"),
    "objects of one key": lambda size: filled(size, b"[", b'{"":0}'),
    "arrays of 3 levels": lambda size: filled(size, b"[", b"[[[]]]"),
    "digits": lambda size: filled(size, b"[", b"1"),
    "numbers of 20 digits": lambda size: filled(size, b"[", b"18446744073709551615"),
    "numbers of 90 digits": lambda size: filled(size, b"[", b"9" * 90),
    "one number of 20 MB": lambda size: b"[" + b"9" * size + b"]",
    "floats": lambda size: filled(size, b"[", b"0.5"),
    "floats of 90 digits": lambda size: filled(size, b"[", b"0." + b"3" * 88),
    "floats with exponents": lambda size: filled(size, b"[", b"1e-300"),
    "minus zero": lambda size: filled(size, b"[", b"-0"),
    "negative zeros as floats": lambda size: filled(size, b"[", b"-0.0"),
    "true": lambda size: filled(size, b"[", b"true"),
    "empty texts": lambda size: filled(size, b"[", b'""'),
    "texts of a letter": lambda size: filled(size, b"[", b'"a"'),
    "texts of two-byte letters": lambda size: filled(size, b"[", '"ä"'.encode()),
    "texts of four-byte letters": lambda size: filled(size, b"[", '"😀"'.encode()),
    "texts of 10 letters": lambda size: filled(size, b"[", b'"%s"' % (b"a" * 10)),
    "texts of 20 letters": lambda size: filled(size, b"[", b'"%s"' % (b"a" * 20)),
    "texts of 60 letters": lambda size: filled(size, b"[", b'"%s"' % (b"a" * 60)),
    "texts of 200 letters": lambda size: filled(size, b"[", b'"%s"' % (b"a" * 200)),
    "texts of 20 two-byte letters": lambda size: filled(size, b"[", b'"%s"' % ("ć" * 20).encode()),
    "texts of 60 two-byte letters": lambda size: filled(size, b"[", b'"%s"' % ("ć" * 60).encode()),
    "texts of 1000 letters, one of them wide": lambda size: filled(size, b"[", b'"%s"' % ("😀" + "a" * 999).encode()),
    "texts of 1000 letters beside a wide one": lambda size: filled(size, '["😀",'.encode(), b'"%s"' % (b"a" * 1000)),
    "one text": lambda size: b'["' + b"a" * size + b'"]',
    "one text that a letter makes four times as wide": lambda size: '["😀'.encode() + b"a" * size + b'"]',
    "one text that an escape makes four times as wide": lambda size: b'["\\ud83d\\ude00' + b"a" * size + b'"]',
    "one text that its end makes four times as wide": lambda size: b'["' + b"a" * size + '😀"]'.encode(),
    "one text that an escape at its end makes four times as wide": lambda size: (
        b'["' + b"a" * size + b'\\ud83d\\ude00"]'
    ),
    "one text that an escape at its end makes twice as wide": lambda size: b'["' + b"a" * size + b'\\u0107"]',
    "one text that a letter makes twice as wide": lambda size: '["ć'.encode() + b"a" * size + b'"]',
    "one text that an escape makes twice as wide": lambda size: b'["\\u0107' + b"a" * size + b'"]',
    "one text of two-byte letters": lambda size: b'["' + "ć".encode() * (size // 2) + b'"]',
    "one text of three-byte letters": lambda size: b'["' + "中".encode() * (size // 3) + b'"]',
    "one text of four-byte letters": lambda size: b'["' + "😀".encode() * (size // 4) + b'"]',
    "one text of escapes": lambda size: b'["' + b"\\n" * (size // 2) + b'"]',
    "one text of \\u0061": lambda size: b'["' + b"\\u0061" * (size // 6) + b'"]',
    "one text of surrogate pairs": lambda size: b'["' + b"\\ud83d\\ude00" * (size // 12) + b'"]',
    "one text of half pairs": lambda size: b'["' + b"\\ud83d" * (size // 6) + b'"]',
    "texts of half a pair": lambda size: filled(size, b"[", b'"\\ud83d"'),
    "texts of backslashes": lambda size: filled(size, b"[", b'"\\\\"'),
    "one text of backslashes": lambda size: b'["' + b"\\\\" * (size // 2) + b'"]',
    "quotes within a text": lambda size: b'["' + b'\\"' * (size // 2) + b'"]',
    "keys": lambda size: b"{" + b",".join(b'"%d":0' % n for n in range(size // 12)) + b"}",
    "keys that are equal": lambda size: filled(size, b"{", b'"a":0', b"}"),
    "keys that are equal once decoded": lambda size: b'{"a":0,' + filled(size, b"", b'"\\u0061":0', b"}"),
    "keys of 20 letters": lambda size: b"{" + b",".join(b'"%020d":0' % n for n in range(size // 25)) + b"}",
    "keys of 100 letters": lambda size: b"{" + b",".join(b'"%0100d":0' % n for n in range(size // 105)) + b"}",
    "keys and texts of 60 letters": lambda size: (
        b"{" + b",".join(b'"%060d":"%060d"' % (n, n) for n in range(size // 126)) + b"}"
    ),
    "objects of a long key": lambda size: filled(size, b"[", b'{"%s":0}' % (b"a" * 100)),
    "entries of a header": lambda size: (
        b"{"
        + b",".join(
            b'"model.layers.%d.mlp.down_proj.weight":{"dtype":"BF16","shape":[4096,1024],"data_offsets":[%d,%d]}'
            % (n, n << 23, (n + 1) << 23)
            for n in range(size // 110)
        )
        + b"}"
    ),
    "entries of an index": lambda size: (
        b"{"
        + b",".join(
            b'"model.layers.61.mlp.experts.%d.down_proj.weight":"model-00001-of-%05d.safetensors"' % (n, n)
            for n in range(size // 90)
        )
        + b"}"
    ),
    "long keys": lambda size: b"{" + b",".join(b'"%0999d":0' % n for n in range(size // 1002)) + b"}",
    "open brackets": lambda size: b"[" * size,
    "open braces": lambda size: b'{"":' * (size // 4),
    "closed brackets": lambda size: b"]" * size,
    "64 levels, again and again": lambda size: filled(size, b"[", b"[" * 62 + b"]" * 62),
    "65 levels, again and again": lambda size: filled(size, b"[", b"[" * 65 + b"]" * 65),
    "brackets in texts": lambda size: b'["' + b"[" * size + b'"]',
    "blanks": lambda size: b" " * size + b"[]",
    "commas": lambda size: b"[" + b"," * size + b"]",
    "colons": lambda size: b"{" + b":" * size + b"}",
    "quotes": lambda size: b'"' * size,
    "letters": lambda size: b"a" * size,
    "bytes that are no UTF-8": lambda size: b'["' + b"\xff" * size + b'"]',
    "NUL": lambda size: bytes(size),
}


def measured(name: str, size: int, wide: bool) -> tuple[str, float, float, int]:
    """Parses a text in this process, a fresh one; returns the outcome, seconds, MB beyond the text, and its bytes."""
    text = TEXTS[name](size)
    strict_json.loads(b"[1.5]", what="it", max_bytes=100)
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    begun = time.process_time()
    outcome = _outcome(text, wide)
    seconds = time.process_time() - begun
    return outcome, seconds, (_resident("VmHWM") - before) / 1024 - len(text) / 2**20, len(text)


def _outcome(text: bytes, wide: bool) -> str:
    try:
        strict_json.loads(text, what="the text", max_bytes=len(text), wide=wide)
    except BrokenContainerError as error:
        return error.code
    return "accepted"


def largest(name: str, wide: bool) -> int:
    """Returns the largest size at which a text is not refused for its price, to 1 %; 0 if there is none."""
    least, most = 0, SIZE
    while most - least > SIZE // 100:
        middle = (least + most) // 2
        least, most = (least, middle) if _outcome(TEXTS[name](middle), wide) == "json-count" else (middle, most)
    return least


def _resident(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _child(*arguments: object) -> list[str]:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def measure(name: str, wide: bool) -> Iterator[Row]:
    """Yields a text's row, and where it is refused for its price a second one: as long as it is accepted."""
    sizes = [SIZE]
    while sizes:
        asked = sizes.pop()
        for _ in range(TRIES):
            outcome, *figures = _child(name, int(wide), asked)
            seconds, beyond, size = float(figures[0]), float(figures[1]), int(figures[2])
            is_broken = beyond > MEGABYTES or seconds > ALLOWANCE_SECONDS + size / BYTES_A_SECOND
            if not is_broken:
                break
        print(
            f"{name:50} {size / 1e6:5.1f} MB {outcome:16} {beyond:7.1f} MB beyond, {1000 * seconds:4.0f} ms", flush=True
        )
        yield Row(beyond, name, outcome, size / 1e6, 1000 * seconds, is_broken)
        if outcome == "json-count" and (accepted := int(_child(name, int(wide))[0])):
            sizes.append(accepted)


def table(rows: list[Row]) -> list[str]:
    head = ["| text | MB | outcome | MB beyond the text | ms |", "| --- | --- | --- | --- | --- |"]
    return head + [
        f"| {row.name} | {row.size:.1f} | {row.outcome} | {max(0, row.beyond):.1f} | {row.milliseconds:.0f} |"
        for row in sorted(rows, reverse=True)
    ]


def main() -> int:
    match sys.argv[1:]:
        case [name, wide]:
            print(largest(name, wide == "1"))
            return 0
        case [name, wide, size]:
            print(*measured(name, int(size), wide == "1"))
            return 0
    rows = [row for name in TEXTS for row in measure(name, wide=False)]
    broken = [row.name for row in rows if row.broken]
    headers = [row for name in TEXTS if "wide" in name or "byte letters" in name for row in measure(name, wide=True)]
    lines = [
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}: {len(TEXTS)} texts of 20 MB, and as long as "
        f"is accepted where those are refused for their price; resident memory beyond the text at its highest and "
        f"processor time, each in a process of its own. Beyond a bound (50 MB; 100 ms and 20 ms for each MB): "
        f"{', '.join(broken) or 'none'}.",
        "",
        *table(rows),
        "",
        "In headers, metadata and tokenizers, which hold whole vocabularies, letters cost no more than the bytes that",
        "they have in the file, and one beyond U+FFFF makes all those of its text four bytes wide, twice for a moment:",
        "",
        *table(headers),
    ]
    (ROOT / "tests" / "hostile" / "JSON.md").write_text("\n".join(lines) + "\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
