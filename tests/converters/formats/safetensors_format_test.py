"""The safetensors container against the safetensors package, and what the package lets through and we do not."""

import json
import struct

import numpy as np
import safetensors
import safetensors.numpy
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import dtypes, safetensors_format

F32 = dtypes.by_name("f32")


def file_of(header, data=b"", pad=b""):
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + pad
    return struct.pack("<Q", len(text)) + text + data


def parse(file):
    length = safetensors_format.parse_header_length(file[:8], len(file), file="x.safetensors")
    return safetensors_format.parse_header(file[8 : 8 + length], len(file), file="x.safetensors")


def tensor(shape=(2,), begin=0, end=8, dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


class PackageAsOracleTest(parameterized.TestCase):
    def arrays(self):
        generator = np.random.default_rng(0)
        return {
            "wide": generator.normal(size=(3, 5)),
            "w": generator.normal(size=(7,)).astype(np.float32),
            "odd": np.arange(5, dtype=np.uint8),
            "flag": np.array([True, False, True]),
            "half": generator.normal(size=(2, 2, 3)).astype(np.float16),
            "scalar": np.array(3, np.int32),
            "empty": np.zeros((0, 4), np.int64),
            "é😀": np.zeros(2, np.int16),
        }

    def test_reads_what_the_package_writes(self):
        arrays = self.arrays()
        file = safetensors.numpy.save(arrays, metadata={"format": "pt", "ü": "x\n"})
        header = parse(file)
        self.assertEqual(header.metadata, {"format": "pt", "ü": "x\n"})
        self.assertCountEqual([e.name for e in header.entries], arrays)
        for entry in header.entries:
            data = file[header.data_start + entry.begin : header.data_start + entry.end]
            self.assertEqual(data, arrays[entry.name].tobytes())
            self.assertEqual(entry.shape, arrays[entry.name].shape)
            self.assertEqual(entry.dtype.numpy, arrays[entry.name].dtype)

    def test_writes_what_the_package_writes_byte_for_byte(self):
        arrays = self.arrays()
        for metadata in (None, {"format": "pt"}):
            file = safetensors.numpy.save(arrays, metadata=metadata)
            header = parse(file)
            tensors = {e.name: (e.name, e.dtype, e.shape) for e in header.entries}
            order = safetensors_format.data_order((name, dtype) for name, dtype, _ in tensors.values())
            written = safetensors_format.serialise_header((tensors[name] for name in order), metadata)
            self.assertEqual(written, file[: header.data_start])

    def test_every_dtype_is_ordered_as_the_package_orders_it(self):
        codes = [dtype.safetensors for dtype in dtypes.TYPES.values() if dtype.safetensors]
        names = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 bfloat16 float8_e4m3fn \
            float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 complex64".split()
        data = np.zeros(64, np.uint8)
        specs = {}
        for position, name in enumerate(names):
            for size in range(1, 9):
                try:
                    spec = safetensors.TensorSpec(dtype=name, shape=[1], data_ptr=data.ctypes.data, data_len=size)
                    safetensors.serialize({"x": spec})
                except safetensors.SafetensorError:
                    continue
                specs[f"{position:02}"] = spec
                break
        self.assertLen(specs, len(names))
        header = parse(bytes(safetensors.serialize(specs)))
        by_offset = [e.name for e in sorted(header.entries, key=lambda e: e.begin)]
        self.assertEqual(safetensors_format.data_order((e.name, e.dtype) for e in header.entries), by_offset)
        self.assertLen(codes, len(names) + 2)

    @settings(max_examples=150, derandomize=True, deadline=None)
    @given(st.data())
    def test_the_package_reads_what_is_written(self, data):
        kinds = [dtype for dtype in dtypes.TYPES.values() if dtype.safetensors]
        text = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp")), min_size=1, max_size=9)
        names = data.draw(st.lists(text.filter(lambda name: name != "__metadata__"), unique=True, max_size=6))
        tensors = []
        for name in names:
            dtype = data.draw(st.sampled_from(kinds))
            shape = (*data.draw(st.lists(st.integers(0, 9), max_size=3)), dtype.block_elements)
            tensors.append((name, dtype, shape))
        metadata = data.draw(st.none() | st.dictionaries(text, st.text(max_size=9), max_size=3))
        written = safetensors_format.serialise_header(tensors, metadata)
        self.assertEqual(len(written) % 8, 0)
        file = written + bytes(sum(dtype.nbytes(shape) for _, dtype, shape in tensors))
        theirs = dict(safetensors.deserialize(file))
        ours = parse(file)
        self.assertEqual(ours.metadata, metadata)
        self.assertEqual([(e.name, e.dtype, e.shape) for e in ours.entries], tensors)
        for entry in ours.entries:
            self.assertEqual(theirs[entry.name]["shape"], list(entry.shape))
            self.assertEqual(theirs[entry.name]["dtype"], entry.dtype.safetensors)
            self.assertEqual(len(theirs[entry.name]["data"]), entry.end - entry.begin)
        self.assertLen(theirs, len(tensors))


class AcceptedTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("no_tensors", b"{}", b""),
        ("padding", b"{}" + b" " * 1000, b""),
        ("newline", b"{}\n", b""),
        ("scalar", {"a": tensor((), 0, 4)}, bytes(4)),
        ("empty", {"a": tensor((0, 3), 0, 0)}, b""),
        ("any_order", {"b": tensor(begin=8, end=16), "a": tensor()}, bytes(16)),
        ("misaligned", {"a": tensor((1,), 0, 1, "U8"), "b": tensor((2,), 1, 9)}, bytes(9)),
        ("empty_between", {"a": tensor(), "e": tensor((0,), 8, 8), "b": tensor(begin=8, end=16)}, bytes(16)),
        ("metadata", {"__metadata__": {"k": "v"}, "a": tensor()}, bytes(8)),
    )
    def test_accepts(self, header, data):
        file = file_of(header, data)
        parse(file)
        safetensors.deserialize(file)

    def test_names_that_differ_in_normalisation_are_a_warning(self):
        header = {"e\u0301": tensor(), "\u00e9": tensor(begin=8, end=16)}
        self.assertIn("normalisation", parse(file_of(header, bytes(16))).warnings[0])
        self.assertEmpty(parse(file_of({"é": tensor(), "b": tensor(begin=8, end=16)}, bytes(16))).warnings)


class RefusedTest(parameterized.TestCase):
    def assert_refused(self, file, code):
        with self.assertRaises(AprJaxError) as caught:
            parse(file)
        self.assertEqual(caught.exception.code, code, str(caught.exception))
        self.assertEqual(caught.exception.file, "x.safetensors")
        return caught.exception

    @parameterized.parameters(*range(8))
    def test_shorter_than_the_length_field(self, size):
        self.assert_refused(bytes(size), "file-too-short")

    @parameterized.parameters(0, 1, 3, 2**31, 2**63, 2**64 - 1)
    def test_impossible_lengths(self, length):
        self.assert_refused(struct.pack("<Q", length) + b"{}", "header-length")

    def test_length_over_the_cap_is_refused_before_anything_is_read(self):
        size = safetensors_format.MAX_HEADER_BYTES + 1
        with self.assertRaises(BrokenContainerError) as caught:
            safetensors_format.parse_header_length(struct.pack("<Q", size), size + 8)
        self.assertEqual(caught.exception.code, "header-length")

    def test_a_file_cut_anywhere_is_refused(self):
        file = file_of({"a": tensor(), "b": tensor(begin=8, end=16)}, bytes(16))
        for size in range(len(file)):
            with self.assertRaises(BrokenContainerError):
                parse(file[:size])

    @parameterized.named_parameters(
        ("leading_space", b" {}", "header-json"),
        ("array", b"[]", "header-json"),
        ("null", b"null", "header-json"),
        ("bom", b"\xef\xbb\xbf{}", "header-json"),
        ("utf16", "{}".encode("utf-16-le"), "json-syntax"),
        ("nul_padding", b"{}\0\0", "json-syntax"),
        ("two_documents", b"{}{}", "json-syntax"),
        ("overlong", b'{"\xc0\xaf":0}', "json-utf8"),
        ("deep", b'{"a":{"shape":[[]]}}', "json-depth"),
        ("very_deep", b'{"a":' + b"[" * 100_000, "json-depth"),
        ("duplicate_tensor", b'{"a":{},"\\u0061":{}}', "json-duplicate"),
        ("duplicate_metadata", b'{"__metadata__":{},"__metadata__":{}}', "json-duplicate"),
        ("duplicate_metadata_key", b'{"__metadata__":{"a":"","a":""}}', "json-duplicate"),
        ("duplicate_field", b'{"a":{"dtype":"F32","dtype":"F32"}}', "json-duplicate"),
        ("lone_surrogate", b'{"\\ud800":{}}', "json-surrogate"),
        ("null_metadata", {"__metadata__": None}, "metadata-type"),
        ("list_metadata", {"__metadata__": []}, "metadata-type"),
        ("number_in_metadata", {"__metadata__": {"a": 1}}, "metadata-type"),
        ("nested_metadata", {"__metadata__": {"a": {}}}, "metadata-type"),
    )
    def test_header(self, header, code):
        self.assert_refused(file_of(header), code)

    @parameterized.named_parameters(
        ("no_object", [1], "entry-fields"),
        ("no_dtype", {"shape": [2], "data_offsets": [0, 8]}, "entry-fields"),
        ("no_shape", {"dtype": "F32", "data_offsets": [0, 8]}, "entry-fields"),
        ("no_offsets", {"dtype": "F32", "shape": [2]}, "entry-fields"),
        ("extra_field", tensor(extra=1), "entry-fields"),
        ("unknown_dtype", tensor(dtype="F31"), "dtype-unknown"),
        ("lower_case", tensor(dtype="f32"), "dtype-unknown"),
        ("alias", tensor(dtype="F8_E4M3FN"), "dtype-unknown"),
        ("dtype_is_a_number", tensor(dtype=0), "dtype-unknown"),
        ("dtype_is_a_list", tensor(dtype=["F32"]), "dtype-unknown"),
        ("shape_is_a_number", {**tensor(), "shape": 2}, "shape-type"),
        ("65_dimensions", tensor((1,) * 64 + (2,)), "shape-type"),
        ("negative", tensor((-2,)), "shape-dimension"),
        ("float", tensor((2.0,)), "shape-dimension"),
        ("exponent", {**tensor(), "shape": [2e0]}, "shape-dimension"),
        ("string", tensor(("2",)), "shape-dimension"),
        ("true", tensor((True, 2)), "shape-dimension"),
        ("two_to_63", tensor((2**63, 0), 0, 0), "shape-dimension"),
        ("two_to_64", tensor((2**64,)), "shape-dimension"),
        ("overflow_to_0", tensor((2**32, 2**32), 0, 0), "shape-overflow"),
        ("overflow_to_4", tensor((4194305, 4194305, 211106198978564), 0, 16), "shape-overflow"),
        ("overflow_times_0", tensor((2**62, 2**62, 0), 0, 0), "shape-overflow"),
        ("overflow_of_bytes", tensor((2**61,), 0, 0), "shape-overflow"),
        ("half_a_byte", tensor((3,), 0, 2, "F4"), "shape-blocks"),
        ("one_offset", {**tensor(), "data_offsets": [0]}, "offsets-type"),
        ("three_offsets", {**tensor(), "data_offsets": [0, 8, 8]}, "offsets-type"),
        ("float_offsets", {**tensor(), "data_offsets": [0, 8.0]}, "offsets-type"),
        ("minus_zero", {**tensor(), "data_offsets": [-0.0, 8]}, "offsets-type"),
        ("true_offset", {**tensor((1,), 0, 1, "U8"), "data_offsets": [False, True]}, "offsets-type"),
        ("backwards", {**tensor(), "data_offsets": [8, 0]}, "offsets-order"),
        ("negative_offset", {**tensor(), "data_offsets": [-8, 0]}, "offsets-order"),
        ("too_small", tensor((2,), 0, 4), "size-mismatch"),
        ("too_large", tensor((2,), 0, 12), "size-mismatch"),
        ("beyond_file", tensor((1000,), 0, 4000), "file-truncated"),
        ("hole_at_the_start", tensor((1,), 4, 8), "data-hole"),
        ("bytes_at_the_end", tensor((1,), 0, 4), "trailing-bytes"),
    )
    def test_entry(self, value, code):
        error = self.assert_refused(file_of({"name": value}, bytes(8)), code)
        self.assertEqual(error.tensor, None if code == "trailing-bytes" else "name")

    @parameterized.named_parameters(
        ("hole", {"a": tensor((1,), 0, 4), "b": tensor((1,), 8, 12)}, 12, "data-hole"),
        ("overlap", {"a": tensor(), "b": tensor((2,), 4, 12)}, 12, "data-overlap"),
        ("alias", {"a": tensor(), "b": tensor()}, 8, "data-overlap"),
        ("empty_inside", {"a": tensor(), "e": tensor((0,), 4, 4)}, 8, "data-overlap"),
        ("nothing_declared", {}, 8, "trailing-bytes"),
        ("polyglot", {"a": tensor()}, 30, "trailing-bytes"),
    )
    def test_cover(self, header, size, code):
        self.assert_refused(file_of(header, bytes(size)), code)

    @parameterized.named_parameters(
        ("empty", "", "name-empty"),
        ("nul", "a\0b", "name-characters"),
        ("newline", "a\nb", "name-characters"),
        ("escape", "a\x1b[31m", "name-characters"),
        ("bidi", "a\u202eb", "name-characters"),
        ("a_megabyte", "a" * 1_000_000, "name-too-long"),
    )
    def test_names(self, name, code):
        self.assert_refused(file_of({name: tensor()}, bytes(8)), code)


class WritingTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("reserved", [("__metadata__", F32, (1,))], None, "name-reserved"),
        ("twice", [("a", F32, (1,)), ("a", F32, (1,))], None, "name-reserved"),
        ("quantised", [("a", dtypes.by_name("q4_k"), (256,))], None, "dtype-unsupported"),
        ("metadata_number", [], {"a": 1}, "metadata-type"),
        ("metadata_key", [], {1: "a"}, "metadata-type"),
        ("surrogate", [], {"a": "\ud800"}, "json-surrogate"),
    )
    def test_refuses(self, tensors, metadata, code):
        with self.assertRaises(RefusedError) as caught:
            safetensors_format.serialise_header(tensors, metadata)
        self.assertEqual(caught.exception.code, code)

    def test_header_over_the_cap_is_refused(self):
        with self.assertRaises(RefusedError) as caught:
            safetensors_format.serialise_header([], {"a": "x" * safetensors_format.MAX_HEADER_BYTES})
        self.assertEqual(caught.exception.code, "header-length")


if __name__ == "__main__":
    absltest.main()
