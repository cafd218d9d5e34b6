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


@st.composite
def safetensors_files(draw):
    """A file of up to four tensors, its header as pairs, so that keys can stand there twice."""
    names = draw(
        st.lists(NAMES.filter(lambda name: name not in ("", "__metadata__", "\x1b[2J")), max_size=4, unique=True)
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
    for _ in range(draw(st.integers(0, 2))):
        data = _change(draw, pairs, data)
    text = _spelt(pairs).encode() + b" " * draw(st.integers(0, 9))
    length = len(text) + draw(st.sampled_from((0,) * 12 + (1, -1, 8, 2**40)))
    whole = (length % 2**64).to_bytes(8, "little") + text + data
    return _damaged(draw, whole)


def _change(draw, pairs, data):
    """Changes one thing of a header; returns the data."""
    kind = draw(
        st.sampled_from(("field", "offset", "shape", "name", "twice", "drop", "more", "swap", "data", "metadata"))
    )
    if kind == "data" or not pairs:
        return draw(st.sampled_from((data + b"\0", data[:-1], data + data)))
    at = draw(st.integers(0, len(pairs) - 1))
    name, fields = pairs[at]
    fields = [(key, list(value) if isinstance(value, list) else value) for key, value in fields]
    numbers = [value for _, value in fields if isinstance(value, list) and value]
    if kind == "field":
        where = draw(st.integers(0, len(fields) - 1)) if fields else 0
        fields[where : where + 1] = [
            (draw(st.sampled_from(("dtype", "shape", "data_offsets", "strides"))), draw(STRANGE))
        ]
    elif kind in ("offset", "shape") and numbers:
        values = draw(st.sampled_from(numbers))
        values[draw(st.integers(0, len(values) - 1))] = draw(NUMBERS)
    elif kind == "twice":
        pairs.append((name, fields))
    elif kind == "drop":
        del fields[draw(st.integers(0, 2)) :]
    elif kind == "more":
        fields.append(draw(st.sampled_from(fields)) if fields else ("dtype", "F32"))
    elif kind == "swap":
        pairs.reverse()
        return data
    pairs[at] = (draw(NAMES) if kind == "name" else name, fields)
    return data


def _spelt(pairs):
    """Writes pairs as a JSON object, keys twice where they are there twice."""

    def spelt(value):
        return _spelt(value) if isinstance(value, list) and value and isinstance(value[0], tuple) else json.dumps(value)

    return "{" + ",".join(f"{json.dumps(key)}:{spelt(value)}" for key, value in pairs) + "}"


def _damaged(draw, whole):
    """Most of the time the same; else a byte changed, or the end cut off."""
    if whole and draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(whole) - 1))
        return draw(
            st.sampled_from(
                (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :])
            )
        )
    return whole


APR_WIDTHS = {
    0: (1, 4),
    1: (1, 2),
    30: (1, 2),
    5: (1, 4),
    28: (1, 8),
    12: (256, 144),
    14: (256, 210),
    2: (32, 18),
    8: (32, 34),
    9: (32, 36),
}


@st.composite
def apr_files(draw):
    """A file of up to four tensors, with fields of header and index changed, and both checksums right again."""
    tensors, at = [], 0
    for name in sorted(
        draw(st.lists(NAMES.filter(lambda name: 0 < len(name) < 256 and name[0] != "\x1b"), max_size=4, unique=True)),
        key=str.encode,
    ):
        number = draw(st.sampled_from(sorted(APR_WIDTHS)))
        block, width = APR_WIDTHS[number]
        shape = draw(SHAPES) if block == 1 else [draw(st.integers(0, 2)), block]
        size = count_of(shape) // block * width
        tensors.append([name.encode(), number, shape, at, size])
        at += -(-size // 64) * 64
    data = draw(st.binary(max_size=at)).ljust(at, b"\0")
    gaps = {offset + n for *_, offset, size in tensors for n in range(size)}
    data = bytes(byte if n in gaps else 0 for n, byte in enumerate(data))
    for _ in range(draw(st.integers(0, 2)) if tensors else 0):
        tensor = draw(st.sampled_from(tensors))
        field = draw(st.integers(0, 4))
        new = (
            draw(NAMES).encode("utf-8", "surrogatepass")
            if field == 0
            else draw(st.integers(0, 255))
            if field == 1
            else draw(st.lists(NUMBERS.map(lambda n: n % 2**64), max_size=10))
            if field == 2
            else draw(NUMBERS) % 2**64
        )
        tensor[field] = new
    metadata = draw(
        st.sampled_from(
            (
                *[b"{}"] * 9,
                b'{"a":1.50}',
                b'{"a":1,"a":2}',
                b"[]",
                b'{"hf_config":{}}',
                b"{} ",
                b'{"architecture":"qwen2"}',
            )
        )
    )
    index = b"".join(
        struct.pack(f"<H{len(name)}sBB{len(shape)}QQQ", len(name), name, number, len(shape), *shape, offset, size)
        for name, number, shape, offset, size in tensors
    )
    padded = [part.ljust(-(-len(part) // 64) * 64, b"\0") for part in (metadata, index)]
    fields = [b"APR\0", 2, 0, 0x400, len(tensors), 64, len(metadata), 64 + len(padded[0]), 64 + sum(map(len, padded))]
    if draw(st.integers(0, 7)) == 0:
        where = draw(st.integers(1, 8))
        width = (4, 1, 1, 2, 4, 8, 4, 8, 8)[where]
        fields[where] = draw(NUMBERS) % 256**width
    first = struct.pack("<4sBBHIQIQQ", *fields)
    body = first + struct.pack("<I", zlib.crc32(bytes(20), zlib.crc32(first))) + bytes(20) + b"".join(padded) + data
    return _damaged(draw, body + struct.pack("<I", zlib.crc32(body)))


class MutationsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=self.create_tempdir().full_path))
        self.verdicts = Counter()

    def look(self, name, data):
        """Judges a file by the target that fuzzing has, and counts what came of it."""
        TARGETS[name].opens(data, self.folder)
        try:
            open_checkpoint(self.folder / f"x.{name}").close()
            self.verdicts["accepted"] += 1
        except AprJaxError as error:
            self.verdicts[error.code] += 1

    def check(self, files, name):
        @settings(max_examples=COUNT // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(files)
        def judged(data):
            self.look(name, data)

        judged()
        refused = sum(self.verdicts.values()) - self.verdicts["accepted"]
        print(
            f"{name}: {sum(self.verdicts.values())} files, {self.verdicts['accepted']} accepted, "
            f"refused with {len(self.verdicts) - 1} codes"
        )
        self.assertGreater(min(self.verdicts["accepted"], refused), COUNT // 20, self.verdicts)
        self.assertGreater(len(self.verdicts), 10)

    def test_safetensors(self):
        self.check(safetensors_files(), "safetensors")

    def test_apr(self):
        self.check(apr_files(), "apr")


if __name__ == "__main__":
    if "--count" in sys.argv:
        at = sys.argv.index("--count")
        del sys.argv[at : at + 2]
    absltest.main()
