"""Valid files with a few fields changed: each is refused, or gives the tensors that a judge reads in it.

The judge of safetensors is the package, that of `.apr` a reader of ten lines (targets.as_the_index_says). All of it:

    python tests/fuzz/mutations_test.py --count 10000
"""

import json
import pathlib
import struct
import sys
import tempfile
import zlib
from collections import Counter

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError
from tests.fuzz.targets import TARGETS

COUNT = int(sys.argv[sys.argv.index("--count") + 1]) if "--count" in sys.argv else 200
"""Files in all, half of each container."""
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
NAMES = st.sampled_from(
    ("a", "b", "model.norm.weight", "lm_head.weight", "\u00e9", "e\u0301", "", "\x1b[2J", "n" * 257, "__metadata__")
)
NUMBERS = st.one_of(
    st.integers(-2, 70), st.sampled_from((2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 64, 128, 256, 4096))
)
STRANGE = st.one_of(NUMBERS, st.sampled_from((None, True, 1.0, "1", [], {}, "F32", "f32", "F4", "I8")))
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def count_of(shape):
    count = 1
    for size in shape:
        count *= size
    return count


# What is done to a valid file, and the codes that have to come of it where it is the one change; () is any verdict.
SAFETENSORS = {
    "twice": ("json-duplicate",), "more": ("json-duplicate",), "drop": ("entry-fields",), "swap": ("accepted",),
    "longer": ("trailing-bytes",), "length": ("header-length", "json-syntax", "trailing-bytes"),
    "field": (), "offset": (), "shape": (), "name": (), "bytes": (),
}  # fmt: skip
APR = {
    "metadata": ("json-duplicate", "metadata-type"), "legacy": ("dtype-legacy", "dtype-ambiguous"),
    "far": ("file-truncated", "data-hole"), "longer": ("trailing-bytes", "padding", "footer-missing"),
    "name": (), "dtype": (), "shape": (), "offset": (), "size": (), "header": (), "bytes": (),
}  # fmt: skip
ACCEPTED = ("accepted",)


@st.composite
def safetensors_files(draw, changes):
    """A file of up to four tensors, its header as pairs, so that keys can stand there twice."""
    names = draw(
        st.lists(
            NAMES.filter(lambda name: name not in ("", "__metadata__", "\x1b[2J")), min_size=1, max_size=4, unique=True
        )
    )
    pairs, at = [], 0
    for name in names:
        code, shape = draw(st.sampled_from(sorted(WIDTHS))), draw(SHAPES)
        size = count_of(shape) * WIDTHS[code]
        pairs.append((name, [("dtype", code), ("shape", shape), ("data_offsets", [at, at + size])]))
        at += size
    if draw(st.booleans()):
        pairs.append(("__metadata__", [("format", "pt")]))
    data = draw(st.binary(min_size=at, max_size=at))
    for kind in changes:
        _change(draw, kind, pairs, len(names))
    text = _spelt(pairs).encode() + b" " * draw(st.integers(0, 9))
    length = len(text) + (draw(st.sampled_from((-1, -8, 2**40))) if "length" in changes else 0)
    whole = (length % 2**64).to_bytes(8, "little") + text + data + b"\0" * ("longer" in changes)
    return _damaged(draw, whole) if "bytes" in changes else whole


def _change(draw, kind, pairs, tensors):
    """Changes one thing of a header."""
    at = draw(st.integers(0, tensors - 1))
    name, fields = pairs[at]
    fields = [(key, list(value) if isinstance(value, list) else value) for key, value in fields]
    numbers = [value for key, value in fields if isinstance(value, list) and value and key == WHERE.get(kind)]
    if kind == "field":
        new = (draw(st.sampled_from(("dtype", "shape", "data_offsets", "strides"))), draw(STRANGE))
        at_field = draw(st.integers(0, 2))
        # Another change may have left fewer fields.
        fields[at_field : at_field + 1] = [new]
    elif numbers:
        (values,) = numbers
        values[draw(st.integers(0, len(values) - 1))] = draw(NUMBERS)
    elif kind == "twice":
        pairs.append((name, fields))
    elif kind == "drop":
        del fields[draw(st.integers(0, 2)) :]
    elif kind == "more":
        fields.append(draw(st.sampled_from(fields)) if fields else ("dtype", "F32"))
    pairs[at] = (draw(NAMES) if kind == "name" else name, fields)
    if kind == "swap":
        pairs.reverse()


WHERE = {"offset": "data_offsets", "shape": "shape"}


def _spelt(pairs):
    """Writes pairs as a JSON object, keys twice where they are there twice."""

    def spelt(value):
        return _spelt(value) if isinstance(value, list) and value and isinstance(value[0], tuple) else json.dumps(value)

    return "{" + ",".join(f"{json.dumps(key)}:{spelt(value)}" for key, value in pairs) + "}"


def _damaged(draw, whole):
    """Changes a byte, or cuts the end off."""
    at = draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :]
    return draw(st.sampled_from((whole[:at], changed)))


APR_WIDTHS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 5: (1, 8), 12: (256, 144), 14: (256, 210)}
LEGACY_WIDTHS = {2: (32, 18), 8: (32, 34), 9: (32, 36)}
BAD_METADATA = (b'{"a":1,"a":2}', b"[]", b"{} ")
GOOD_METADATA = (b"{}", b'{"a":1.50}', b'{"hf_config":{}}', b'{"architecture":"qwen2"}')


@st.composite
def apr_files(draw, changes):
    """A file of up to four tensors, with fields of header and index changed, and both checksums right again."""
    tensors, at = [], 0
    known = st.lists(
        NAMES.filter(lambda name: 0 < len(name) < 256 and name[0] != "\x1b"), min_size=1, max_size=4, unique=True
    )
    for name in sorted(draw(known), key=str.encode):
        widths = LEGACY_WIDTHS if "legacy" in changes and not tensors else APR_WIDTHS
        number = draw(st.sampled_from(sorted(widths)))
        block, width = widths[number]
        shape = draw(SHAPES) if block == 1 else [draw(st.integers(1, 2)), block]
        size = count_of(shape) // block * width
        tensors.append([name.encode(), number, shape, at, size])
        at += -(-size // 64) * 64
    data = draw(st.binary(max_size=at)).ljust(at, b"\0")
    gaps = {offset + n for *_, offset, size in tensors for n in range(size)}
    data = bytes(byte if n in gaps else 0 for n, byte in enumerate(data))
    for kind in changes:
        tensor = draw(st.sampled_from(tensors))
        if kind == "name":
            tensor[0] = draw(NAMES).encode("utf-8", "surrogatepass")
        elif kind == "dtype":
            tensor[1] = draw(st.integers(0, 255))
        elif kind == "shape":
            tensor[2] = draw(st.lists(NUMBERS.map(lambda n: n % 2**64), max_size=10))
        elif kind in ("offset", "size"):
            tensor[3 if kind == "offset" else 4] = draw(NUMBERS) % 2**64
        elif kind == "far":
            tensor[3] = draw(st.sampled_from((2**31, 2**32, 2**63 - 64, 2**64 - 64)))
    metadata = draw(st.sampled_from(BAD_METADATA if "metadata" in changes else GOOD_METADATA))
    index = b"".join(
        struct.pack(f"<H{len(name)}sBB{len(shape)}QQQ", len(name), name, number, len(shape), *shape, offset, size)
        for name, number, shape, offset, size in tensors
    )
    padded = [part.ljust(-(-len(part) // 64) * 64, b"\0") for part in (metadata, index)]
    fields = [b"APR\0", 2, 0, 0x400, len(tensors), 64, len(metadata), 64 + len(padded[0]), 64 + sum(map(len, padded))]
    if "header" in changes:
        where = draw(st.integers(1, 8))
        width = (4, 1, 1, 2, 4, 8, 4, 8, 8)[where]
        fields[where] = draw(NUMBERS) % 256**width
    first = struct.pack("<4sBBHIQIQQ", *fields)
    body = first + struct.pack("<I", zlib.crc32(bytes(20), zlib.crc32(first))) + bytes(20) + b"".join(padded) + data
    whole = body + struct.pack("<I", zlib.crc32(body)) + b"\0" * ("longer" in changes)
    return _damaged(draw, whole) if "bytes" in changes else whole


class MutationsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=self.create_tempdir().full_path))
        self.verdicts = Counter()

    def look(self, name, data, expected):
        """Judges a file by the target that fuzzing has, and counts what came of it."""
        TARGETS[name].opens(data, self.folder)
        try:
            open_checkpoint(self.folder / f"x.{name}").close()
            verdict = "accepted"
        except AprJaxError as error:
            verdict = error.code
        self.verdicts[verdict] += 1
        if expected:
            self.assertIn(verdict, expected, data)

    def judge(self, strategy, name, expected, count):
        always = {"deadline": None, "database": None, "derandomize": True}

        @settings(max_examples=count, suppress_health_check=list(HealthCheck), **always)
        @given(strategy)
        def judged(data):
            self.look(name, data, expected)

        judged()

    def check(self, files, name, kinds):
        """A quarter of the files is valid, a half has one change, each kind as often, a quarter has two."""
        share = max(2, COUNT // 4 // len(kinds))
        pairs = st.tuples(*[st.sampled_from(sorted(kinds))] * 2)
        parts = [(files(()), ACCEPTED, COUNT // 8)]
        parts += [(files((kind,)), expected, share) for kind, expected in kinds.items()]
        parts += [(pairs.flatmap(files), (), COUNT // 8)]
        for strategy, expected, count in parts:
            self.judge(strategy, name, expected, count)
        print(f"{name}: {sum(self.verdicts.values())} files: {dict(self.verdicts.most_common())}")
        certain = {code for codes in kinds.values() if len(codes) == 1 for code in codes}
        self.assertContainsSubset(certain, self.verdicts)
        self.assertGreaterEqual(self.verdicts["accepted"], COUNT // 8)

    def test_safetensors(self):
        self.check(safetensors_files, "safetensors", SAFETENSORS)

    def test_apr(self):
        self.check(apr_files, "apr", APR)


if __name__ == "__main__":
    if "--count" in sys.argv:
        at = sys.argv.index("--count")
        del sys.argv[at : at + 2]
    absltest.main()
