"""Casts from and to quantised types: bytes, what stays float, what it cost, and what cannot be quantised."""

import hashlib
import json
import os
import pathlib
import struct
import sys
import tempfile
import tracemalloc
import zlib
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.distance import Sums
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.convert import recoding
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import casts, codecs, dtypes
from tests import quantiser_cases
from tests.paths import DATA, checkpoint

INT8, INT4 = DATA / "apr" / "tiny_f32_tied-int8.apr", DATA / "apr" / "tiny_bf16_tied-int4.apr"
CASTS = dict(quantiser_cases.KINDS.values())


class RecodingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def convert(self, source, output, *casts, **arguments):
        rules = [CastRule.parse(text) for text in casts]
        to = "apr" if output.endswith(".apr") else "safetensors"
        return convert(source, self.folder / output, to=to, cast=rules, force=True, **arguments)

    def save(self, **values):
        safetensors.numpy.save_file(values, self.folder / "x.safetensors")
        return self.folder / "x.safetensors"

    def values(self, path):
        with open_checkpoint(self.folder / path) as opened:
            return {name: tensor.read() for name, tensor in opened.tensors.items()}

    def assert_footer(self, name):
        data = (self.folder / name).read_bytes()
        self.assertEqual(struct.unpack("<I", data[-4:])[0], zlib.crc32(data[:-4]))

    @parameterized.parameters(*quantiser_cases.KINDS)
    def test_a_file_holds_the_payloads_of_apr_and_float32_for_the_rest(self, kind):
        cast, name_of_type = quantiser_cases.KINDS[kind]
        self.convert(checkpoint("odd_sizes"), "q.apr", cast)
        self.assert_footer("q.apr")
        digest, floats = hashlib.sha256(), 0
        with open_checkpoint(self.folder / "q.apr") as opened, open_checkpoint(checkpoint("odd_sizes")) as source:
            for name, tensor in opened.tensors.items():
                if tensor.dtype.is_block:
                    self.assertEqual(tensor.dtype.name, name_of_type)
                    digest.update(tensor.raw())
                else:
                    self.assertEqual(tensor.read().tobytes(), source.tensors[name].read().astype("<f4").tobytes())
                    self.assertTrue(codecs.stays_float(name, tensor.nbytes // 4))
                    floats += 1
        self.assertEqual(digest.hexdigest(), quantiser_cases.ODD_SIZES_SHA256[kind])
        self.assertEqual(floats, 11)

    @parameterized.product(cast=list(CASTS), shape=((1500, 300), (2, 250_000), (450_001,), (40, 80, 100)))
    def test_large_tensors_are_quantised_piece_by_piece_as_at_once(self, cast, shape):
        values = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
        values.reshape(-1)[-1] = 2.5
        self.convert(self.save(w=values), "q.apr", cast)
        self.assert_footer("q.apr")
        with open_checkpoint(self.folder / "q.apr") as opened:
            self.assertEqual(opened.tensors["w"].raw(), casts.quantise(values, CASTS[cast], shape))

    @parameterized.product(cast=list(CASTS), dtype=(np.float16, ml_dtypes.bfloat16, np.float64))
    def test_other_floats_are_cast_to_float32_first(self, cast, dtype):
        values = np.random.default_rng(0).normal(0, 0.1, (40, 70)).astype(dtype)
        source = self.save(w=values)
        self.convert(source, "q.apr", cast)
        with open_checkpoint(self.folder / "q.apr") as opened:
            expected = casts.quantise(values.astype(np.float32), CASTS[cast], (40, 70))
            self.assertEqual(opened.tensors["w"].raw(), expected)

    @parameterized.product(source=(INT8, INT4), target=("f32", "bf16", "f16", "f64"), output=("out", "out.apr"))
    def test_quantised_files_are_decoded_into_floats(self, source, target, output):
        self.convert(source, output, target)
        types = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "f64": np.float64}
        found = self.values(output)
        with open_checkpoint(source) as opened:
            for name, values in found.items():
                expected = opened.tensors[name].read().astype(types[target])
                self.assertEqual((values.dtype, values.tobytes()), (expected.dtype, expected.tobytes()), name)
        self.assertGreater(len(found), 20)
        if output.endswith(".apr"):
            self.assert_footer(output)

    def test_row_padded_tensors_are_decoded_into_floats_and_into_other_blocks(self):
        values = np.random.default_rng(0).normal(0, 0.1, (1100, 300)).astype(np.float32)
        self.convert(self.save(w=values), "k.apr", "q4k")
        (decoded,) = self.values("k.apr").values()
        self.assertLess(np.linalg.norm(decoded - values) / np.linalg.norm(values), 0.09)
        for cast, name in CASTS.items():
            self.convert(self.folder / "k.apr", "other.apr", cast)
            with open_checkpoint(self.folder / "other.apr") as opened, open_checkpoint(self.folder / "k.apr") as k:
                tensor = opened.tensors["w"]
                same = k.tensors["w"].raw() if name == "q4_k" else casts.quantise(decoded, name, (1100, 300))
                self.assertEqual(tensor.raw(), same)
        self.convert(self.folder / "k.apr", "k.safetensors", "f32")
        self.assertEqual(self.values("k.safetensors")["w"].tobytes(), decoded.tobytes())

    @parameterized.parameters("q8", "q4k")
    def test_a_wrong_footer_of_a_source_that_is_decoded_is_found(self, cast):
        self.convert(checkpoint("odd_sizes"), "q.apr", cast)
        data = bytearray((self.folder / "q.apr").read_bytes())
        with open_checkpoint(self.folder / "q.apr") as opened:
            tensor = opened.tensors["model.layers.0.mlp.up_proj.weight"]
            data[tensor.offset + tensor.nbytes // 2] ^= 1
        (self.folder / "q.apr").write_bytes(data)
        with self.assertRaises(BrokenContainerError) as caught:
            self.convert(self.folder / "q.apr", "hf", "f32")
        self.assertEqual(caught.exception.code, "footer-crc")
        self.assertEqual(os.listdir(self.folder), ["q.apr"])

    def test_later_rules_win_and_what_stays_float_can_have_any_type(self):
        self.convert(checkpoint("odd_sizes"), "q.apr", "q4k", "*norm*=bf16", "*lm_head*=f16", "*embed*=q8")
        with open_checkpoint(self.folder / "q.apr") as opened:
            types = {name: tensor.dtype.name for name, tensor in opened.tensors.items()}
        self.assertEqual(types["model.norm.weight"], "bf16")
        self.assertEqual(types["lm_head.weight"], "f16")
        self.assertEqual(types["model.embed_tokens.weight"], "apr_q8")
        self.assertEqual(types["model.layers.0.mlp.up_proj.weight"], "q4_k")
        self.assertEqual(types["model.layers.0.self_attn.q_proj.bias"], "f32")

    @parameterized.parameters(*CASTS)
    def test_the_report_is_that_of_the_values_at_once(self, cast):
        values = np.random.default_rng(0).normal(0, 0.1, (1500, 300)).astype(np.float32)
        values[1234:1236] *= 1e-3
        outcome = self.convert(self.save(w=values, small=np.ones(5, np.float32)), "q.apr", cast)
        self.assertEqual(list(outcome.quantised), ["w"])
        error = outcome.quantised["w"]
        found, source = self.values("q.apr")["w"].astype(np.float64), values.astype(np.float64)
        self.assertAlmostEqual(
            error.sums.relative_l2, np.linalg.norm(found - source) / np.linalg.norm(source), places=9
        )
        norms = np.linalg.norm(found) * np.linalg.norm(source)
        self.assertAlmostEqual(error.cosine, np.vdot(found, source) / norms, places=9)
        self.assertEqual(error.sums.max_abs, np.abs(found - source).max())
        self.assertBetween(error.worst_relative_l2, error.sums.relative_l2, 3.0)
        report = error.to_json((1500, 300))
        self.assertEqual(json.loads(json.dumps(report)), report)
        row, column = report["worst_block"]["begins_at"]
        # Rows of Q4_K are padded, so that the second block of a row begins at 256 and has 44 values.
        end = min(column + 256, 300) if cast == "q4k" else column + {"q4": 32, "q8": 256}[cast]
        block = np.s_[row * 300 + column : row * 300 + end]
        moved = np.linalg.norm((found - source).reshape(-1)[block])
        worst = moved / np.linalg.norm(source.reshape(-1)[block])
        self.assertAlmostEqual(report["worst_block"]["relative_l2"], worst, places=9)
        if cast != "q4":
            self.assertIn(row, (1234, 1235))

    @parameterized.product(cast=list(CASTS), bad=(np.nan, np.inf, -np.inf))
    def test_nan_and_infinities_are_refused_with_the_tensor(self, cast, bad):
        values = np.ones((40, 70), np.float32)
        values[39, 69] = bad
        with self.assertRaises(RefusedError) as caught:
            self.convert(self.save(good=np.ones((40, 70), np.float32), bad=values), "q.apr", cast)
        self.assertEqual((caught.exception.code, caught.exception.tensor), ("cast-non-finite", "bad"))
        self.assertEqual(os.listdir(self.folder), ["x.safetensors"])
        self.convert(self.folder / "x.safetensors", "q.apr", cast, "bad=f32")

    def test_scales_that_no_half_holds_are_an_overflow(self):
        source = self.save(w=np.full((40, 70), 1e6, np.float32))
        self.convert(source, "q.apr", "q8")
        with self.assertRaises(RefusedError) as caught:
            self.convert(source, "q4.apr", "q4")
        self.assertEqual(caught.exception.code, "cast-overflow")
        outcome = self.convert(source, "q4.apr", "q4", allow_overflow=True)
        report = outcome.quantised["w"].to_json((40, 70))
        self.assertEqual(json.loads(json.dumps(report, allow_nan=False)), report)

    def test_types_that_nothing_decodes_are_refused_by_name(self):
        values = np.zeros(1024, np.int64)
        with self.assertRaises(AprJaxError) as caught:
            self.convert(self.save(w=values), "q.apr", "q8")
        self.assertEqual(caught.exception.code, "cast-source")
        self.assertIn("w is i64", str(caught.exception))

    @parameterized.parameters(*CASTS)
    def test_memory_does_not_grow_with_the_tensor(self, cast):
        source = self.save(w=np.tile(np.float32([-1, 1]), (3072, 1024)))
        tracemalloc.start()
        self.convert(source, "q.apr", cast)
        self.convert(self.folder / "q.apr", "back.apr", "bf16")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 20 << 20)
        self.assertEqual(dtypes.by_name("f32").nbytes((3072, 2048)), 24 << 20)

    def test_errors_add_up_whatever_the_order(self):
        parts = [
            recoding.QuantisationError(Sums(dd=1, aa=4, bb=5, ab=4, max_abs=0.5), 64, 0.3),
            recoding.QuantisationError(Sums(dd=2, aa=6, bb=7, ab=6, max_abs=0.25), 0, 0.3),
        ]
        self.assertEqual(parts[0] + parts[1], parts[1] + parts[0])
        self.assertEqual((parts[0] + parts[1]).worst_first, 0)
        self.assertEqual((parts[0] + parts[1]).sums, Sums(dd=3, aa=10, bb=12, ab=10, max_abs=0.5))
        self.assertEqual(recoding.QuantisationError(Sums(), 0, 0.0).cosine, 1.0)
        self.assertEqual(recoding.QuantisationError(Sums(aa=1.0, dd=1.0, max_abs=1.0), 0, 1.0).cosine, 0.0)


class ByteOrderTest(parameterized.TestCase):
    @parameterized.parameters("f32", "f16")
    def test_decoded_values_are_written_little_endian_whatever_the_machines_order(self, target):
        read = Tensor.read_flat
        with open_checkpoint(DATA / "apr" / "tiny_f32_tied-int4.apr") as opened:
            tensor = opened.tensors["model.embed_tokens.weight"]
            self.assertTrue(tensor.dtype.is_block)
            recoded = recoding.Recoding(tensor, dtypes.by_name(target))
            expected = bytes(recoded.recode(0, 64)[0])
            with mock.patch.object(Tensor, "read_flat", lambda *range_: read(*range_).astype(">f4")):
                self.assertEqual(bytes(recoded.recode(0, 64)[0]), expected)


if __name__ == "__main__":
    absltest.main()
