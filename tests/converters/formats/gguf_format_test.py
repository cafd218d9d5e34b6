"""The GGUF container: what the gguf package writes is read, and what is not such a file is refused, with its place."""

import pathlib
import struct
import time

import gguf
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import gguf_format
from apr_jax.converters.storage.source import SourceFile


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(pairs: list[bytes] = [], tensors: list[bytes] = [], data: bytes = b"", version: int = 3) -> bytes:  # noqa: B006
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


PLAIN = tensor(b"a", (8,), 0, 0)


class GgufFormatTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.create_tempdir().full_path) / "m.gguf"

    def _read(self, content: bytes) -> gguf_format.GgufHeader:
        self.path.write_bytes(content)
        with SourceFile(self.path) as source:
            return gguf_format.read_header(source)

    def test_a_float_is_its_shortest_spelling_and_what_is_no_number_stays_that(self):
        values = (1e-6, 0.1, 16777217.0, -0.0, 3.4028234663852886e38, 1e-45, float("inf"), float("-inf"), float("nan"))
        pairs = [pair(b"x%d" % index, 6, struct.pack("<f", value)) for index, value in enumerate(values)]
        found = [self._read(file(pairs)).metadata[f"x{index}"] for index in range(len(values))]
        spelt = ["1e-06", "0.1", "16777216.0", "-0.0", "3.4028235e+38", "1e-45", "inf", "-inf", "nan"]
        self.assertEqual([repr(value) for value in found], spelt)

    def test_everything_that_the_gguf_package_writes(self):
        writer = gguf.GGUFWriter(self.path, "qwen2")
        for name, value in (("uint8", 3), ("int8", -3), ("uint32", 1 << 31), ("int64", -(1 << 40)), ("bool", True)):
            getattr(writer, f"add_{name}")(f"x.{name}", value)
        writer.add_float32("x.eps", 1e-6)
        writer.add_float64("x.pi", 3.141592653589793)
        writer.add_array("x.words", ["a", "ü", ""])
        writer.add_array("x.numbers", [1, 2, 3])
        writer.add_tensor("m", np.arange(6, dtype=np.float32).reshape(2, 3))
        writer.add_tensor("v", np.arange(5, dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        header = self._read(self.path.read_bytes())
        expected = {
            "general.architecture": "qwen2", "x.uint8": 3, "x.int8": -3, "x.uint32": 1 << 31, "x.int64": -(1 << 40),
            "x.bool": True, "x.eps": 1e-6, "x.pi": 3.141592653589793, "x.words": ["a", "ü", ""],
            "x.numbers": [1, 2, 3],
        }  # fmt: skip
        self.assertEqual(header.metadata, expected)
        data = self.path.read_bytes()
        shapes = {"m": ((2, 3), "f32", np.float32, 6), "v": ((5,), "f16", np.float16, 5)}
        self.assertEqual([entry.name for entry in header.entries], list(shapes))
        for entry in header.entries:
            shape, dtype, kind, count = shapes[entry.name]
            self.assertEqual((entry.shape, entry.dtype.name), (shape, dtype))
            np.testing.assert_array_equal(np.frombuffer(data, kind, count, entry.offset), np.arange(count))

    @parameterized.parameters(1e-6, 1e-5, 1e6, 10000.0, 0.1, 3.4028234663852886e38, 1.401298464324817e-45, 0.0, -2.5)
    def test_float32_values_are_the_shortest_decimals(self, value):
        header = self._read(file([pair(b"x", 6, struct.pack("<f", value))]))
        found = header.metadata["x"]
        self.assertEqual(struct.pack("<f", found), struct.pack("<f", value))
        self.assertEqual(found, float(str(np.float32(value))))

    @parameterized.parameters(
        ("empty magic", b"GGUG" + bytes(40), "gguf-magic"),
        ("version 1", file(version=1), "gguf-version"),
        ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "gguf-version"),
        ("tensor count", b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "gguf-count"),
        ("pair count", b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "gguf-count"),
        ("key length", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**64 - 1) + bytes(20), "gguf-count"),
        ("array length", file([pair(b"x", 9, struct.pack("<IQ", 4, 2**61))]), "gguf-count"),
        ("string length", file([pair(b"x", 8, struct.pack("<Q", 2**40))]), "gguf-count"),
        ("array depth", file([pair(b"x", 9, struct.pack("<IQ", 9, 1) * 5 + bytes(20))]), "gguf-metadata"),
        ("value type", file([pair(b"x", 13, bytes(8))]), "gguf-metadata"),
        ("bool", file([pair(b"x", 7, b"\2")]), "gguf-metadata"),
        ("utf-8", file([pair(b"x", 8, string(b"\xff"))]), "gguf-string"),
        ("key twice", file([pair(b"x", 0, b"\1")] * 2), "gguf-metadata"),
        ("alignment 0", file([pair(b"general.alignment", 4, bytes(4))]), "gguf-metadata"),
        ("alignment text", file([pair(b"general.alignment", 8, string(b"32"))]), "gguf-metadata"),
        ("dimensions 0", file([], [tensor(b"a", (), 0, 0)]), "gguf-shape"),
        ("dimensions 5", file([], [tensor(b"a", (1,) * 5, 0, 0)], bytes(4)), "gguf-shape"),
        ("overflow", file([], [tensor(b"a", (2**62, 2**62), 0, 0)], bytes(32)), "shape-overflow"),
        ("type", file([], [tensor(b"a", (8,), 99, 0)], bytes(32)), "dtype-unknown"),
        ("blocks", file([], [tensor(b"a", (33,), 8, 0)], bytes(68)), "shape-blocks"),
        ("name empty", file([], [tensor(b"", (8,), 0, 0)], bytes(32)), "name-empty"),
        ("name control", file([], [tensor(b"a\x1b[2J", (8,), 0, 0)], bytes(32)), "name-characters"),
        ("name twice", file([], [PLAIN, tensor(b"a", (8,), 0, 32)], bytes(64)), "gguf-tensors"),
        ("hole", file([], [tensor(b"a", (8,), 0, 32)], bytes(64)), "gguf-offset"),
        ("overlap", file([], [PLAIN, tensor(b"b", (8,), 0, 0)], bytes(32)), "gguf-offset"),
        ("unaligned", file([], [PLAIN, tensor(b"b", (8,), 0, 33)], bytes(80)), "gguf-offset"),
        ("cut", file([], [PLAIN], bytes(31)), "file-truncated"),
        ("trailing", file([], [PLAIN], bytes(64)), "trailing-bytes"),
    )
    def test_field_what_is_no_such_file(self, what, content, code):
        """FIELD Forms: a GGUF file that is cut, doubled, hostile -> refused within 100 ms, with the byte"""
        begun = time.process_time()
        with self.assertRaises((BrokenContainerError, RefusedError)) as caught:
            self._read(content)
        self.assertEqual(caught.exception.code, code, what)
        self.assertIsNotNone(caught.exception.offset)
        self.assertEqual(caught.exception.file, str(self.path))
        self.assertLess(time.process_time() - begun, 0.1)

    def test_strings_of_many_windows(self):
        random = np.random.default_rng(0)
        # Long ones and short ones: some windows end within a length, some within a string, one string is a window long.
        words = ["ü" * int(length) for length in random.integers(0, 300, 20_000)] + ["y" * (3 << 20), "", "z"]
        packed = b"".join(string(word.encode()) for word in words)
        header = self._read(
            file([pair(b"x", 9, struct.pack("<IQ", 8, len(words)) + packed), pair(b"y", 4, b"\7\0\0\0")])
        )
        self.assertEqual(header.metadata, {"x": words, "y": 7})

    def test_one_bad_string_of_many(self):
        words = [string(b"abc")] * 1000
        words[700] = string(b"a\xff\xfe")
        array = struct.pack("<IQ", 8, len(words)) + b"".join(words)
        with self.assertRaises(BrokenContainerError) as caught:
            self._read(file([pair(b"x", 9, array)]))
        self.assertEqual(
            (caught.exception.code, caught.exception.offset), ("gguf-string", 24 + 9 + 4 + 12 + 700 * 11 + 8)
        )

    def test_cut_anywhere(self):
        whole = file([pair(b"x", 9, struct.pack("<IQ", 8, 1) + string(b"word"))], [PLAIN], bytes(range(32)))
        self._read(whole)
        for end in range(len(whole)):
            with self.assertRaises(AprJaxError, msg=str(end)):
                self._read(whole[:end])

    def test_any_one_byte_changed_is_read_or_refused(self):
        whole = bytearray(file([pair(b"x", 9, struct.pack("<IQ", 8, 1) + string(b"word"))], [PLAIN], bytes(32)))
        refused = 0
        for at in range(len(whole) - 32):
            for value in (0, 1, 127, 255):
                changed = whole[:]
                changed[at] = value
                try:
                    self._read(bytes(changed))
                except AprJaxError:
                    refused += 1
        self.assertGreater(refused, 100)


if __name__ == "__main__":
    absltest.main()
