"""Comparison of two checkpoints: levels, verdicts, heads, grouping of causes; closeness against NumPy in float64."""

import dataclasses
import json
import math
import os
import pathlib
import struct
import sys
import tempfile
import tracemalloc
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import StorageError
from apr_jax.converters.formats import dtypes
from apr_jax.converters.verify import comparison, tensor_pairs
from apr_jax.converters.verify.comparison import compare
from apr_jax.converters.verify.diagnosis import search
from apr_jax.converters.verify.diagnosis.causes import Cause
from tests.paths import DATA, NAMES, checkpoint

NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": ml_dtypes.bfloat16, "i8": np.int8}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STABLE_KEYS = ("verdict", "compared", "only_in_a", "only_in_b", "findings")
FINDING_KEYS = ["cause", "tensors", "parameters", "explained", "alternatives", "sentence"]


def write(path: pathlib.Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> pathlib.Path:
    """Writes a safetensors file of (type name, shape, bytes) by hand."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        code = dtypes.by_name(dtype).safetensors
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


def typed(values, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """Returns what `write` takes, from values that are cast as numpy does it."""
    with np.errstate(all="ignore"):
        array = np.asarray(values).astype(NUMPY[dtype])
    return dtype, array.shape, array.tobytes()


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


class ComparisonTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def compare(self, a, b, **arguments) -> comparison.Comparison:
        """Compares two paths, or two mappings for `write`; without a search for causes unless asked for."""
        a, b = (
            side if isinstance(side, pathlib.Path) else write(self.folder / f"{label}.safetensors", side)
            for label, side in (("a", a), ("b", b))
        )
        with open_checkpoint(a) as left, open_checkpoint(b) as right:
            return compare(left, right, **({"diagnose": False} | arguments))


class BytesTest(ComparisonTestCase):
    @parameterized.parameters(*NAMES)
    def test_a_conversion_to_apr_is_identical_in_every_byte(self, name):
        convert(checkpoint(name), self.folder / "m.apr", to="apr")
        for pair in ((checkpoint(name), self.folder / "m.apr"), (self.folder / "m.apr", checkpoint(name))):
            found = self.compare(*pair)
            self.assertEqual((found.verdict, found.exit_code, found.findings), ("identical", 0, ()))
            with open_checkpoint(checkpoint(name)) as opened:
                tensors = opened.tensors.values()
                counts = (
                    len(tensors),
                    sum(math.prod(tensor.shape) for tensor in tensors),
                    sum(tensor.nbytes for tensor in tensors),
                )
            self.assertEqual(dataclasses.astuple(found.compared), counts)
            self.assertGreater(counts[0], 20)
            self.assertEqual(found.metadata_differences, ())
            self.assertEqual(found.notes, ())

    @parameterized.product(at=(0, 999, 1000, 4095, 4096, 4097, 8191, 8192), dtype=("i8", "u8"))
    def test_one_flipped_bit_is_found_wherever_it_is(self, at, dtype):
        # Two blocks of 4096, and one byte.
        data = bytearray(np.random.default_rng(1).integers(1, 60, 8193, np.uint8).tobytes())
        shape = (8193,)
        tensors = {"x": (dtype, shape, bytes(data)), "y": (dtype, shape, bytes(data))}
        data[at] ^= 1
        with mock.patch.multiple(tensor_pairs, _CHUNK_BYTES=1000, _BLOCK_BYTES=4096):
            found = self.compare(tensors, tensors | {"y": (dtype, shape, bytes(data))})
        self.assertEqual([tensor.name for tensor in found.unequal], ["y"])
        self.assertEqual(found.unequal[0].sums.differing, 1)
        self.assertEqual(found.exit_code, 1)

    def test_equal_nan_bytes_are_equal_and_other_nan_bytes_are_not(self):
        quiet, other = (struct.pack("<I", bits) for bits in (0x7FC00000, 0x7FC00001))
        self.assertEqual(self.compare({"x": ("f32", (1,), quiet)}, {"x": ("f32", (1,), quiet)}).verdict, "identical")
        found = self.compare({"x": ("f32", (1,), quiet)}, {"x": ("f32", (1,), other)})
        self.assertEqual((found.verdict, found.exit_code), ("close", 1))

    def test_equal_bytes_with_another_tag_are_not_identical(self):
        bits = typed(weights(500), "bf16")[2]
        found = self.compare({"x": ("bf16", (500,), bits)}, {"x": ("f16", (500,), bits)})
        self.assertEqual((found.verdict, found.unequal[0].dtypes), ("different", ("bf16", "f16")))
        self.assertEqual(found.unequal[0].sums.differing, 500)

    def test_equal_bytes_with_another_tag_are_wholly_explained_by_it(self):
        bits = typed(weights(500), "bf16")[2]
        found = self.compare({"x": ("bf16", (500,), bits)}, {"x": ("f16", (500,), bits)}, diagnose=True)
        (finding,) = found.findings
        self.assertEqual((finding.cause, finding.explained), ("relabelled-dtype", 1.0))
        self.assertEqual(finding.parameters, {"from": "bf16", "to": "f16", "values_converted": False})

    def test_memory_does_not_grow_with_the_tensors(self):
        values = weights(2000, 4000)
        other = values.copy()
        other[-1, -1] += 1
        a, b = {"x": typed(values, "f32"), "y": typed(values, "f32")}, {"x": typed(other, "f32")}
        paths = [write(self.folder / f"{name}.safetensors", side) for name, side in (("p", a), ("q", a | b))]
        with open_checkpoint(paths[0]) as left, open_checkpoint(paths[1]) as right:
            compare(left, right, diagnose=False)
            tracemalloc.start()
            try:
                found = compare(left, right, diagnose=False)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        self.assertEqual([tensor.name for tensor in found.unequal], ["x"])
        self.assertLess(peak, 16 << 20)

    def test_types_that_are_not_decoded_are_compared_byte_by_byte(self):
        one = {"x": ("f4", (4,), b"\x12\x34"), "y": ("f4", (4,), b"\x12\x34")}
        self.assertEqual(self.compare(one, one).verdict, "identical")
        found = self.compare(one, one | {"x": ("f4", (4,), b"\x12\x35")})
        self.assertEqual((found.verdict, found.unequal[0].name, found.unequal[0].sums), ("different", "x", None))


class ValuesTest(ComparisonTestCase):
    SPECIAL = (0.0, -0.0, 1.0, -1.5, 2.0**-14, 2.0**-20, 240.0, np.inf, -np.inf, np.nan)

    @parameterized.parameters(
        ("f16", "f32"),
        ("bf16", "f32"),
        ("f32", "f64"),
        ("f32", "bf16"),
        ("f64", "f16"),
        ("f16", "bf16"),
        ("f32", "f16"),
    )
    def test_an_exact_cast_is_equal_in_value_narrowing_ones_included(self, source, target):
        # Multiples of 2**-6 up to 4: exact in every type here.
        values = np.concatenate([np.random.default_rng(0).integers(-255, 256, 400_000) / 64, self.SPECIAL])
        found = self.compare({"x": typed(values, source)}, {"x": typed(values, target)})
        self.assertEqual((found.verdict, found.exit_code), ("equal-values", 0))
        (finding,) = found.findings
        self.assertEqual((finding.cause, finding.tensors, finding.explained), ("exact-cast", ("x",), 1.0))
        self.assertEqual(finding.parameters, {"from": source, "to": target})
        self.assertEqual(found.unequal[0].sums.relative_l2, 0.0)

    def test_integers_are_compared_as_the_numbers_they_are(self):
        found = self.compare({"x": typed([-3, 0, 127], "i8")}, {"x": typed([-3.0, 0.0, 127.0], "f32")})
        self.assertEqual(found.verdict, "equal-values")
        found = self.compare(
            {"x": ("i64", (1,), struct.pack("<q", 2**62 + 1))}, {"x": ("f64", (1,), struct.pack("<d", 2.0**62))}
        )
        self.assertEqual(found.unequal[0].sums.differing, 1)

    def test_a_rounding_cast_is_no_exact_one_though_a_single_value_is_rounded(self):
        values = np.ones(300_000)
        values[-1] = 1 + 2.0**-10
        found = self.compare({"x": typed(values, "f32")}, {"x": typed(values, "bf16")})
        self.assertEqual((found.verdict, found.findings), ("close", ()))
        self.assertEqual(found.unequal[0].sums.differing, 1)

    @parameterized.parameters(("f32", "f32"), ("f32", "f16"), ("bf16", "bf16"))
    def test_a_zero_of_another_sign_is_a_difference_at_no_distance(self, source, target):
        found = self.compare({"x": typed([0.0, 1.0], source)}, {"x": typed([-0.0, 1.0], target)})
        self.assertEqual(found.verdict, "close")
        self.assertEqual((found.unequal[0].sums.differing, found.unequal[0].sums.relative_l2), (1, 0.0))

    @parameterized.product(
        pair=((np.nan, 2.0), (2.0, np.nan), (np.inf, 2.0), (2.0, -np.inf), (np.inf, -np.inf), (np.inf, np.nan)),
        dtype=("f16", "f32", "f64"),
    )
    def test_a_single_nan_or_infinity_at_one_side_is_never_close(self, pair, dtype):
        around = weights(200_000).tolist()
        found = self.compare({"x": typed([*around, pair[0]], dtype)}, {"x": typed([*around, pair[1]], dtype)})
        self.assertEqual((found.verdict, found.exit_code), ("different", 1))
        self.assertEqual((found.unequal[0].sums.differing, found.unequal[0].sums.relative_l2), (1, math.inf))
        json.dumps(found.to_json(), allow_nan=False)

    @parameterized.product(value=(np.nan, np.inf, -np.inf), dtype=("f32", "f64"))
    def test_equal_nan_and_infinities_hide_nothing_around_them(self, value, dtype):
        for factor, verdict in ((1.0001, "close"), (1.1, "different")):
            a, b = [value, 1.0, 2.0], [value, 1.0, 2.0 * factor]
            found = self.compare({"x": typed(a, dtype)}, {"x": typed(b, dtype)})
            self.assertEqual((found.verdict, found.unequal[0].sums.differing), (verdict, 1))

    @parameterized.parameters((0.9e-3, "close"), (1.1e-3, "different"))
    def test_close_ends_at_a_relative_l2_of_a_thousandth_in_any_tensor(self, distance, verdict):
        values = weights(300, 500)
        other = values * np.float32(1 + distance)
        same = typed(values, "f32")
        found = self.compare({"x": same, "y": same, "z": same}, {"x": same, "y": typed(other, "f32"), "z": same})
        self.assertEqual((found.verdict, found.exit_code), (verdict, 1))
        self.assertAlmostEqual(found.unequal[0].sums.relative_l2, distance, delta=1e-5)
        self.assertEqual(found.to_json()["levels"]["close"], 3 if verdict == "close" else 2)

    @parameterized.product(scale=(1.0, 1e-19, 1e-21, 1e-25, 1e-38, 1e25, 1e38), dtype=("f32", "f64"))
    def test_figures_are_those_of_float64_however_small_or_large_the_values(self, scale, dtype):
        a = (weights(331, 1000) * np.float64(scale)).astype(NUMPY[dtype])
        b = (a * (1 + 0.01 * np.random.default_rng(1).standard_normal(a.shape))).astype(NUMPY[dtype])
        (tensor,) = self.compare({"x": typed(a, dtype)}, {"x": typed(b, dtype)}).unequal
        a, b = a.astype(np.longdouble), b.astype(np.longdouble)
        self.assertEqual(tensor.sums.differing, np.count_nonzero(a != b))
        self.assertAlmostEqual(tensor.sums.relative_l2, float(np.linalg.norm(b - a) / np.linalg.norm(a)), delta=1e-7)
        cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        self.assertAlmostEqual(tensor.sums.cosine, cosine, delta=1e-6)
        np.testing.assert_allclose(tensor.sums.max_abs, float(np.abs(b - a).max()), rtol=1e-6)

    def test_values_whose_squares_vanish_or_overflow_are_not_taken_for_close(self):
        for scale in (1e-200, 1e200):
            found = self.compare({"x": typed([scale, scale], "f64")}, {"x": typed([scale, 2 * scale], "f64")})
            self.assertEqual(found.verdict, "different", scale)

    def test_zero_against_numbers_is_different(self):
        found = self.compare({"x": typed(np.zeros(9), "f32")}, {"x": typed(np.full(9, 1e-9), "f32")})
        self.assertEqual((found.verdict, found.unequal[0].sums.cosine), ("different", None))

    @parameterized.parameters("tiny_f32_tied-int8.apr", "tiny_f32_tied-int4.apr")
    def test_quantised_values_are_decoded_and_compared(self, name):
        with open_checkpoint(DATA / "apr" / name) as opened:
            decoded = {key: typed(tensor.read(), "f32") for key, tensor in opened.tensors.items()}
        found = self.compare(DATA / "apr" / name, decoded)
        self.assertEqual((found.verdict, found.exit_code), ("equal-values", 0))
        self.assertIn("exact-cast", [finding.cause for finding in found.findings])
        key = "model.layers.1.mlp.up_proj.weight"
        other = np.frombuffer(decoded[key][2], np.float32).copy()
        other[-1] += np.float32(1e-6)
        found = self.compare(DATA / "apr" / name, decoded | {key: ("f32", decoded[key][1], other.tobytes())})
        wrong = [tensor for tensor in found.tensors if tensor.verdict not in ("identical", "equal-values")]
        self.assertEqual([(tensor.name, tensor.sums.differing) for tensor in wrong], [(key, 1)])


class NamesTest(ComparisonTestCase):
    def test_a_tensor_that_one_side_lacks_is_a_difference(self):
        x, y = typed([1.0], "f32"), typed([2.0], "f32")
        found = self.compare({"x": x, "y": y}, {"x": x, "z": y})
        self.assertEqual((found.verdict, found.exit_code), ("different", 1))
        self.assertEqual((found.only_in_a, found.only_in_b), (("y",), ("z",)))
        self.assertEqual(found.compared.tensors, 1)

    def test_another_shape_is_a_difference_even_with_the_same_bytes(self):
        found = self.compare({"x": typed(weights(4, 6), "f32")}, {"x": typed(weights(6, 4), "f32")})
        self.assertEqual(found.verdict, "different")
        self.assertEqual((found.unequal[0].shapes, found.unequal[0].sums), (((4, 6), (6, 4)), None))
        self.assertEqual(found.to_json()["levels"]["names_and_shapes"], 0)

    def test_nothing_in_common_is_a_failure_that_speaks_of_names(self):
        x = typed([1.0], "f32")
        found = self.compare({"model.norm.weight": x}, {"blk.0.attn_norm.weight": x, "output_norm.weight": x})
        self.assertEqual((found.verdict, found.exit_code, found.compared.tensors), ("different", 1, 0))
        hint = found.notes[-1]
        for words in ("nothing was compared", "HuggingFace", "GGUF", "Map the names"):
            self.assertIn(words, hint)
        found = self.compare({}, {})
        self.assertEqual((found.verdict, found.exit_code), ("different", 1))

    def test_the_stable_json_object_has_exactly_the_promised_fields(self):
        x = typed(weights(8), "f32")
        found = self.compare({"x": x, "y": x}, {"x": typed(weights(8), "f64"), "z": x}).to_json()
        self.assertEqual(tuple(found)[:5], STABLE_KEYS)
        self.assertEqual(found["compared"], {"tensors": 1, "elements": 8, "bytes": 32})
        self.assertEqual((found["only_in_a"], found["only_in_b"]), (["y"], ["z"]))
        self.assertEqual([list(finding) for finding in found["findings"]], [FINDING_KEYS])


class HeadsTest(ComparisonTestCase):
    """An absent head, a placeholder and a copy of the embedding mean the same."""

    def with_head(self, head, embedding=None):
        tensors = {
            EMBEDDING: typed(weights(16, 8) if embedding is None else embedding, "bf16"),
            "x": typed([1.0], "f32"),
        }
        return tensors | ({} if head is None else {HEAD: head})

    @parameterized.product(dtype=("bf16", "f32"), swapped=(False, True))
    def test_a_copy_of_the_embedding_is_no_difference(self, dtype, swapped):
        rounded = weights(16, 8).astype(ml_dtypes.bfloat16)
        sides = self.with_head(None), self.with_head(typed(rounded, dtype))
        found = self.compare(*(reversed(sides) if swapped else sides))
        self.assertEqual((found.verdict, found.exit_code), ("identical", 0))
        self.assertEqual((found.only_in_a, found.only_in_b), ((), ()))
        self.assertIn(f"{HEAD} is only in {'A' if swapped else 'B'} and equals the embedding", found.notes[0])

    @parameterized.parameters(False, True)
    def test_a_head_of_its_own_that_the_other_lacks_is_a_difference(self, swapped):
        own = weights(16, 8)
        own[-1, -1] += 1
        sides = self.with_head(typed(own, "bf16")), self.with_head(None)
        found = self.compare(*(reversed(sides) if swapped else sides))
        self.assertEqual((found.verdict, found.exit_code), ("different", 1))
        self.assertEqual((found.only_in_b if swapped else found.only_in_a), (HEAD,))
        self.assertIn("values of its own", found.notes[0])

    def test_a_placeholder_is_a_tied_head_and_mentioned(self):
        # As `apr import` writes the head of a tied 16-bit model: full shape, no bytes.
        source = checkpoint("gqa_tied_bf16")
        convert(source, self.folder / "m.apr", to="apr")
        path = with_placeholder(self.folder / "m.apr")
        found = self.compare(source, path)
        self.assertEqual((found.verdict, found.exit_code, found.only_in_b), ("identical", 0, ()))
        (note,) = found.notes
        self.assertIn("lm_head.weight without data", note)
        untied = checkpoint("gqa_untied_bf16")
        found = self.compare(untied, path)
        self.assertIn(HEAD, found.only_in_a)

    def test_a_head_that_is_falsely_said_to_be_tied_is_named(self):
        source = checkpoint("gqa_untied_bf16")
        convert(source, self.folder / "m.apr", to="apr")
        path = with_metadata(self.folder / "m.apr", lambda metadata: metadata | {"tied_embeddings": True})
        found = self.compare(source, path)
        self.assertEqual(found.verdict, "identical")
        (difference,) = found.metadata_differences
        self.assertEqual((difference.attribute, difference.a, difference.b), ("tie_word_embeddings", False, True))
        self.assertIn("B says that its head is tied, but its lm_head.weight has values of its own", difference.sentence)


def with_metadata(path: pathlib.Path, change) -> pathlib.Path:
    """Rewrites an `.apr` with other metadata and right checksums."""
    return rewritten(path, change, lambda entries: entries)


def with_placeholder(path: pathlib.Path) -> pathlib.Path:
    def add(entries):
        embedding = next(entry for entry in entries if entry["name"] == EMBEDDING)
        return sorted([*entries, embedding | {"name": HEAD, "offset": 0, "data": b""}], key=lambda entry: entry["name"])

    return rewritten(path, lambda metadata: metadata, add)


def rewritten(path: pathlib.Path, change_metadata, change_entries) -> pathlib.Path:
    """Writes an `.apr` anew, from section 1 of the format's description alone."""
    import zlib

    data = path.read_bytes()
    count, _, size, index_at, data_at = struct.unpack_from("<IQIQQ", data, 8)
    metadata = json.loads(data[64 : 64 + size])
    entries, at = [], index_at
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        name, at = data[at + 2 : at + 2 + length].decode(), at + 2 + length
        dtype, dims = data[at], data[at + 1]
        numbers = struct.unpack_from(f"<{dims + 2}Q", data, at + 2)
        at += 2 + 8 * (dims + 2)
        begin = data_at + numbers[-2]
        entries.append({"name": name, "dtype": dtype, "shape": numbers[:-2], "data": data[begin : begin + numbers[-1]]})
    entries = change_entries(entries)

    def padded(part: bytes) -> bytes:
        return part + bytes(-len(part) % 64)

    text = json.dumps(change_metadata(metadata)).encode()
    index, payload = b"", b""
    for entry in entries:
        name, shape = entry["name"].encode(), entry["shape"]
        index += struct.pack("<H", len(name)) + name + bytes([entry["dtype"], len(shape)])
        index += struct.pack(f"<{len(shape) + 2}Q", *shape, len(payload), len(entry["data"]))
        payload += padded(entry["data"])
    index_at = 64 + len(padded(text))
    header = data[:8] + struct.pack("<IQIQQ", len(entries), 64, len(text), index_at, index_at + len(padded(index)))
    header += struct.pack("<I", zlib.crc32(header + bytes(20))) + bytes(20)
    whole = header + padded(text) + padded(index) + payload
    path.write_bytes(whole + struct.pack("<I", zlib.crc32(whole)))
    return path


class MetadataTest(ComparisonTestCase):
    @parameterized.parameters(
        ("rope_theta", 10000.0, "rope_theta"),
        ("rms_norm_eps", 1e-5, "rms_norm_eps"),
        ("num_attention_heads", 2, "num_heads"),
        ("max_position_embeddings", 77, "max_position_embeddings"),
    )
    def test_what_the_configurations_disagree_about_is_named_and_counts_if_it_changes_logits(
        self, key, value, attribute
    ):
        other = self.folder / "hf"
        other.mkdir()
        for file in checkpoint("gqa_tied_bf16").iterdir():
            content = file.read_bytes()
            if file.name == "config.json":
                config = json.loads(content)
                config.pop("rope_parameters", None)
                content = json.dumps(config | {key: value}).encode()
            (other / file.name).write_bytes(content)
        found = self.compare(checkpoint("gqa_tied_bf16"), other)
        self.assertEqual(found.weights, "identical")
        expected = ("identical", 0) if key == "max_position_embeddings" else ("different", 1)
        self.assertEqual((found.verdict, found.exit_code), expected)
        named = {difference.attribute: difference for difference in found.metadata_differences}
        self.assertIn(attribute, named)
        self.assertEqual(named[attribute].b, value)
        self.assertIn(f"{value} in B", named[attribute].sentence)

    def test_a_file_without_configuration_is_said_to_have_none(self):
        (self.folder / "bare.safetensors").write_bytes((checkpoint("gqa_tied_bf16") / "model.safetensors").read_bytes())
        found = self.compare(checkpoint("gqa_tied_bf16"), self.folder / "bare.safetensors")
        (difference,) = found.metadata_differences
        self.assertIn("the configuration of B cannot be had", difference.sentence)

    def test_a_head_that_is_said_to_be_untied_and_is_not_there_is_named(self):
        other = self.folder / "hf"
        convert(checkpoint("gqa_tied_bf16"), other, to="safetensors")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        (difference,) = self.compare(checkpoint("gqa_tied_bf16"), other).metadata_differences
        self.assertEqual(difference.sentence, "B says that its head is not tied, and has no lm_head.weight")

    def test_a_copied_head_and_numbers_rounded_to_float32_are_no_disagreement(self):
        def as_apr_imports(metadata):
            return {key: value for key, value in metadata.items() if key not in ("source_files", "hf_config")} | {
                "rms_norm_eps": float(np.float32(metadata["rms_norm_eps"]))
            }

        source = checkpoint("gqa_tied_bf16")
        convert(source, self.folder / "m.apr", to="apr", tied_head="copy")
        found = self.compare(source, with_metadata(self.folder / "m.apr", as_apr_imports))
        self.assertEqual((found.verdict, found.metadata_differences), ("identical", ()))

    def test_a_file_that_changes_meanwhile_is_an_error(self):
        path = write(self.folder / "p.safetensors", {"x": typed(weights(9), "f32")})

        def touch(*_):
            os.utime(path, (1, 1))

        with open_checkpoint(path) as opened, self.assertRaises(StorageError) as raised:
            compare(opened, opened, touch)
        self.assertEqual(raised.exception.code, "source-changed")


class FindingsTest(ComparisonTestCase):
    """Grouping, with causes that are given instead of searched for."""

    def findings(self, causes: dict[str, Cause], distances: dict[str, float] | None = None):
        a, b = {}, {}
        for number, name in enumerate(causes):
            values = weights(4, 5 + number)
            a[name] = typed(values, "f32")
            b[name] = typed(values * (1 + (distances or {}).get(name, 0.5)), "f32")
        a["exact"], b["exact"] = typed([1.0], "f16"), typed([1.0], "f32")
        with mock.patch.object(search, "diagnose", lambda one, two, context: [causes[one.name]]):
            return self.compare(a, b, diagnose=True).findings

    def test_equal_causes_with_equal_parameters_are_one_finding_and_others_are_not(self):
        shift = Cause("shifted", {"by": 1, "unit": "elements"}, 1.0)
        found = self.findings(
            {
                "p": shift,
                "q": Cause("shifted", {"unit": "elements", "by": 1}, 1.0),
                "r": Cause("shifted", {"by": 2}, 1.0),
            }
        )
        self.assertEqual(
            [(finding.cause, finding.tensors) for finding in found],
            [("shifted", ("p", "q")), ("shifted", ("r",)), ("exact-cast", ("exact",))],
        )

    def test_the_worst_comes_first_and_exact_casts_last(self):
        causes = {name: Cause(cause, {}, 1.0) for name, cause in (("p", "scaled"), ("q", "offset"), ("r", "zeroed"))}
        found = self.findings(causes, {"p": 0.01, "q": 0.7, "r": 0.2})
        self.assertEqual([finding.cause for finding in found], ["offset", "zeroed", "scaled", "exact-cast"])

    def test_explained_is_weighted_by_differing_elements_and_alternatives_are_what_all_share(self):
        found = self.findings(
            {"p": Cause("scaled", {}, 0.5, ("offset", "quantised")), "q": Cause("scaled", {}, 1.0, ("quantised",))}
        )[0]
        self.assertAlmostEqual(found.explained, (20 * 0.5 + 24 * 1.0) / 44)
        self.assertEqual(found.alternatives, ("quantised",))
        self.assertIn("%", found.sentence)
        self.assertIn("2 tensors", found.sentence)

    def test_of_different_weights_the_figures_are_told(self):
        found = self.findings({name: Cause("different-weights", {}, 0.0) for name in "pq"}, {"p": 0.25, "q": 0.5})[0]
        self.assertIn("100 % of the elements differ, relative L2 0.25 to 0.5, cosine 1", found.sentence)

    def test_other_explanations_of_a_tensor_are_alternatives_and_no_findings_of_their_own(self):
        norm = "model.norm.weight"
        found = self.compare({norm: typed([1.0] * 64, "f32")}, {norm: typed([2.0] * 64, "f32")}, diagnose=True)
        (finding,) = found.findings
        self.assertEqual((finding.cause, finding.alternatives), ("offset", ("scaled",)))


class MovedTest(ComparisonTestCase):
    """Tensors that one side lacks, with the search for causes."""

    PREFIX = "model.layers.0.self_attn."

    def test_fused_projections_are_one_finding_and_still_a_difference(self):
        parts = {f"{role}_proj.{kind}": weights(6, 4, seed=n) for n, role in enumerate("qkv") for kind in ("weight",)}
        a = {self.PREFIX + name: typed(values, "f32") for name, values in parts.items()}
        b = {self.PREFIX + "qkv_proj.weight": typed(np.concatenate(list(parts.values())), "f32")}
        a["x"] = b["x"] = typed([1.0], "f32")
        found = self.compare(a, b, diagnose=True)
        self.assertEqual((found.verdict, len(found.only_in_a), len(found.only_in_b)), ("different", 3, 1))
        (finding,) = found.findings
        self.assertEqual((finding.cause, set(finding.tensors)), ("qkv-order", {*a, *b} - {"x"}))
        self.assertIn("q, k and v were fused, laid out as q,k,v", finding.sentence)

    def test_layers_that_were_fused_alike_are_one_finding_and_others_are_another(self):
        a, b = {}, {}
        for layer, order in enumerate(("qkv", "kqv", "qkv")):
            prefix = f"model.layers.{layer}.self_attn."
            parts = {role: weights(6, 4, seed=10 * layer + n) for n, role in enumerate("qkv")}
            a |= {f"{prefix}{role}_proj.weight": typed(values, "f32") for role, values in parts.items()}
            b[f"{prefix}qkv_proj.weight"] = typed(np.concatenate([parts[role] for role in order]), "f32")
        found = self.compare(a, b, diagnose=True).findings
        self.assertEqual(
            {finding.parameters["to"]: {name.split(".")[2] for name in finding.tensors} for finding in found},
            {"q,k,v": {"0", "2"}, "k,q,v": {"1"}},
        )
        self.assertEqual([len(finding.tensors) for finding in found], [8, 4])

    def test_equal_tensors_under_other_names_are_pointed_out(self):
        a = {f"model.layers.{n}.mlp.up_proj.weight": typed(weights(30, 20, seed=n), "f32") for n in range(3)}
        b = {f"blk.{n}.ffn_up.weight": value for n, value in enumerate(a.values())}
        found = self.compare(a, b, diagnose=True)
        self.assertEqual((found.verdict, found.compared.tensors, found.findings), ("different", 0, ()))
        self.assertIn("equal under other names: model.layers.0.mlp.up_proj.weight of A is blk.0", found.notes[-1])
        self.assertIn("and 2 more", found.notes[-1])


class ProgressTest(ComparisonTestCase):
    def test_every_phase_is_reported_to_its_end(self):
        same, other = typed(weights(300, 1000), "f32"), typed(weights(300, 1000, seed=1), "f32")
        told: dict[str, list[tuple[int, int]]] = {}
        self.compare(
            {"x": same, "y": same},
            {"x": same, "y": other},
            diagnose=True,
            progress=lambda phase, done, total: told.setdefault(phase, []).append((done, total)),
        )
        self.assertEqual({phase: seen[-1] for phase, seen in told.items()}["bytes"], (2 * 1_200_000,) * 2)
        self.assertEqual({phase: seen[-1] for phase, seen in told.items()}["values"], (300_000,) * 2)
        self.assertEqual({phase: seen[-1] for phase, seen in told.items()}["causes"], (1_200_000,) * 2)


class ChecksumTest(ComparisonTestCase):
    def test_of_a_different_apr_it_is_said_whether_it_changed_after_it_was_written(self):
        source, path = checkpoint("gqa_tied_bf16"), self.folder / "m.apr"
        convert(source, path, to="apr")
        data = bytearray(path.read_bytes())
        data[-200] ^= 0x40
        path.write_bytes(data)
        found = self.compare(source, path)
        self.assertEqual(found.verdict, "different")
        self.assertIn("the checksum of B is wrong", found.notes[0])


if __name__ == "__main__":
    absltest.main()
