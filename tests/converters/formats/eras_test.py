"""Files of other ages and writers: refused with the right words, opened on request, re-imported without a change.

The files are built here byte by byte, from apr-v2-format sections 1 and 2; our writer has no part in them.
"""

import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError, RefusedError, UsageError
from apr_jax.converters.formats import casts, dtypes
from tests.paths import DATA, ROOT

ROW_MAJOR, QUANTIZED = 0x0400, 0x0020
RANDOM = np.random.default_rng(0)


def padded(data):
    return data + bytes(-len(data) % 64)


def old_file(tensors, flags=ROW_MAJOR, footer=True):
    """A file of name -> (dtype id, shape, payload), as writers of every age lay it out."""
    text = b'{"model_type":"qwen2","name":null,"param_count":0,"architecture":null}'
    index, data = b"", b""
    for name, (id, shape, payload) in sorted(tensors.items()):
        index += struct.pack(f"<H{len(name)}sBB", len(name), name.encode(), id, len(shape))
        index += struct.pack(f"<{len(shape)}QQQ", *shape, len(data), len(payload))
        data += padded(payload)
    at_index = 64 + len(padded(text))
    fields = (b"APR\0", 2, 0, flags, len(tensors), 64, len(text), at_index, at_index + len(padded(index)))
    header = struct.pack("<4sBBHIQIQQ", *fields)
    header += struct.pack("<I20x", zlib.crc32(header + bytes(20)))
    file = header + padded(text) + padded(index) + data
    return file + struct.pack("<I", zlib.crc32(file)) if footer else file


def floats(*shape):
    return RANDOM.normal(0, 0.1, shape).astype("<f4")


BF16 = floats(6, 4).astype(ml_dtypes.bfloat16)
Q4, Q8, Q4_EVEN = floats(3, 40), floats(5, 7), floats(4, 64)
# What aprender wrote until March 2026: bf16 as 2, its own q4 and q8 as 8 and 9.
OLD_APRENDER = {
    "bf16": (2, (6, 4), BF16.tobytes()),
    "f32": (0, (5, 7), Q8.tobytes()),
    "q4": (8, (3, 40), casts.quantise(Q4, "apr_q4", (3, 40))),
    "q8": (9, (5, 7), casts.quantise(Q8, "apr_q8", (5, 7))),
}
# The size of q4 leaves two types: 256 divides its elements.
AMBIGUOUS = OLD_APRENDER | {"even": (8, (4, 64), casts.quantise(Q4_EVEN, "apr_q4", (4, 64)))}
# What realizar's converters wrote, with a table of their own and later with GGML's numbers; no footer.
Q4_K = casts.quantise(floats(2, 256), "q4_k", (2, 256))
Q4_0 = np.array(0.5, "<f2").tobytes() + bytes(range(16))
Q8_0 = np.array(0.25, "<f2").tobytes() + bytes(range(32))
OLD_ENGINE = {"a": (0, (3,), floats(3).tobytes()), "k": (8, (2, 256), Q4_K), "n": (2, (6, 4), BF16.tobytes())}
ENGINE = {"a": (0, (3,), floats(3).tobytes()), "q4": (2, (2, 32), 2 * Q4_0), "q8": (8, (3, 32), 3 * Q8_0)}


class ErasTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, tensors, **options):
        path = self.folder / "old.apr"
        path.write_bytes(old_file(tensors, **options))
        return path

    def refusal(self, path, kind=RefusedError, **options):
        with self.assertRaises(kind) as caught:
            open_checkpoint(path, **options).close()
        return caught.exception

    def reimport(self, path, **options):
        new = self.folder / "new.apr"
        convert(path, new, to="apr", force=True, **options)
        return new


class OldAprenderTest(ErasTestCase):
    @parameterized.parameters(
        ("bf16", 2, "bf16 (aprender until March 2026, realizar until 2026-01-30"),
        ("q4", 8, "apr_q4 (aprender in March 2026"),
        ("q8", 9, "apr_q8 (aprender in March 2026"),
    )
    def test_each_old_id_is_refused_with_what_it_may_mean(self, name, id, candidates):
        error = self.refusal(self.write({"f32": OLD_APRENDER["f32"], name: OLD_APRENDER[name]}))
        self.assertEqual((error.code, error.exit_code, error.tensor, error.found), ("dtype-legacy", 5, name, id))
        self.assertIn(candidates, error.expected)
        self.assertIn(f"--legacy reads it as {dtypes.by_apr_id(*self.resolved(name), legacy=True).name}", error.hint)
        self.assertIn("of the file together fit: aprender", error.hint)
        data = (self.folder / "old.apr").read_bytes()
        self.assertEqual(data[error.offset + 2 :][: len(name)], name.encode(), "the offset is that of the entry")

    def resolved(self, name):
        id, shape, payload = OLD_APRENDER[name]
        return id, shape, len(payload)

    def test_legacy_opens_the_file_and_its_values_are_right(self):
        with open_checkpoint(self.write(OLD_APRENDER), legacy=True) as opened:
            types = {name: tensor.dtype.name for name, tensor in opened.tensors.items()}
            self.assertEqual(types, {"bf16": "bf16", "f32": "f32", "q4": "apr_q4", "q8": "apr_q8"})
            np.testing.assert_array_equal(opened.tensors["bf16"].read(), BF16)
            np.testing.assert_allclose(opened.tensors["q4"].read(), Q4, atol=0.05)
            np.testing.assert_allclose(opened.tensors["q8"].read(), Q8, atol=0.002)
            self.assertEqual(opened.apr.eras, ("aprender<2026-03",))

    def test_reimport_writes_todays_ids_and_the_very_same_payloads(self):
        new = self.reimport(self.write(OLD_APRENDER), legacy=True)
        with open_checkpoint(new) as opened:
            self.assertEqual(
                {entry.name: entry.dtype_id for entry in opened.apr.entries},
                {"bf16": 30, "f32": 0, "q4": 128, "q8": 129},
            )
            for name, (_, shape, payload) in OLD_APRENDER.items():
                self.assertEqual((opened.tensors[name].raw(), opened.tensors[name].shape), (payload, shape))
            self.assertEqual(opened.apr.eras, ("current",))
            self.assertEqual(opened.metadata["param_count"], 0)
            self.assertIsNone(opened.metadata["architecture"])
        again = self.folder / "again.apr"
        convert(new, again, to="apr")
        self.assertEqual(again.read_bytes(), new.read_bytes())

    def test_legacy_turns_the_file_into_safetensors(self):
        convert(
            self.write({"bf16": OLD_APRENDER["bf16"]}), self.folder / "x.safetensors", to="safetensors", legacy=True
        )
        with open_checkpoint(self.folder / "x.safetensors") as opened:
            self.assertEqual(opened.tensors["bf16"].raw(), BF16.tobytes())

    def test_an_ambiguous_tensor_is_refused_with_and_without_legacy(self):
        for legacy in (False, True, {2: "bf16"}):
            tensors = AMBIGUOUS if legacy else {"even": AMBIGUOUS["even"]}
            error = self.refusal(self.write(tensors), legacy=legacy)
            self.assertEqual((error.code, error.exit_code, error.tensor), ("dtype-ambiguous", 5, "even"))
            self.assertIn("apr_q4 (aprender", error.expected)
            self.assertIn("q4_k (realizar until 2026-01-30", error.expected)
            self.assertIn("--legacy 8=apr_q4 or --legacy 8=q4_k", error.hint)
        # The other tensors of the file leave one writer, and the message says so.
        error = self.refusal(self.write(AMBIGUOUS), legacy=True)
        self.assertTrue(error.hint.endswith("together fit: aprender until March 2026"), error.hint)

    def test_saying_what_an_id_means_opens_an_ambiguous_file(self):
        path = self.write(AMBIGUOUS)
        with open_checkpoint(path, legacy={8: "apr_q4"}) as opened:
            self.assertEqual(opened.tensors["even"].dtype.name, "apr_q4")
            self.assertEqual(opened.tensors["bf16"].dtype.name, "bf16", "what size decides needs no word")
            np.testing.assert_allclose(opened.tensors["even"].read(), Q4_EVEN, atol=0.05)
        with open_checkpoint(self.reimport(path, legacy={8: "apr_q4"})) as opened:
            self.assertEqual(opened.tensors["even"].raw(), AMBIGUOUS["even"][2])

    def test_a_wrong_word_is_found_by_size_or_by_the_registry(self):
        error = self.refusal(self.write(OLD_APRENDER), AprJaxError, legacy={2: "q4_0"})
        self.assertEqual((error.code, error.tensor), ("size-mismatch", "bf16"))
        error = self.refusal(self.write(OLD_APRENDER), UsageError, legacy={8: "f32"})
        self.assertEqual((error.code, error.exit_code), ("legacy-meaning", 2))

    def test_files_of_march_2026_have_the_new_bf16_and_the_old_q8(self):
        path = self.write({"bf16": (30, *OLD_APRENDER["bf16"][1:]), "q8": OLD_APRENDER["q8"]})
        self.assertIn("fit: aprender in March 2026", self.refusal(path).hint)
        with open_checkpoint(path, legacy=True) as opened:
            self.assertEqual(opened.apr.eras, ("aprender=2026-03",))

    def test_a_file_that_no_single_writer_made_is_named(self):
        path = self.write({"a": OLD_APRENDER["bf16"], "b": (30, *OLD_APRENDER["bf16"][1:])})
        self.assertIn("fit no writer known", self.refusal(path).hint)


class EngineTest(ErasTestCase):
    def engine_file(self, tensors):
        return self.write(tensors, flags=QUANTIZED, footer=False)

    def test_a_file_with_the_engines_own_table_is_read_by_size_and_word(self):
        path = self.engine_file(OLD_ENGINE)
        self.assertEqual(self.refusal(path, lenient=True, legacy=True).code, "dtype-ambiguous")
        with open_checkpoint(path, lenient=True, legacy={8: "q4_k"}) as opened:
            self.assertIn("engine<2026-01-30", opened.apr.eras)
            self.assertEqual(opened.tensors["n"].dtype.name, "bf16")
            expected = np.empty((2, 256), np.float32)
            dtypes.by_name("q4_k").codec.decode(Q4_K, expected.reshape(-1))
            np.testing.assert_array_equal(opened.tensors["k"].read(), expected)
        with open_checkpoint(self.reimport(path, lenient=True, legacy={8: "q4_k"})) as opened:
            self.assertEqual([entry.dtype_id for entry in opened.apr.entries], [0, 12, 30])
            self.assertEqual(opened.tensors["k"].raw(), Q4_K)

    def test_a_file_with_ggmls_numbers_is_decoded(self):
        path = self.engine_file(ENGINE)
        with open_checkpoint(path, lenient=True, legacy=True) as opened:
            self.assertEqual(opened.apr.eras, ("engine>=2026-01-30",))
            low = np.array([(byte & 15) - 8 for byte in range(16)] + [(byte >> 4) - 8 for byte in range(16)])
            np.testing.assert_array_equal(opened.tensors["q4"].read(), np.tile(low * 0.5, (2, 1)))
            np.testing.assert_array_equal(opened.tensors["q8"].read(), np.tile(np.arange(32) * 0.25, (3, 1)))

    def test_types_without_an_id_of_today_need_a_cast(self):
        path = self.engine_file(ENGINE)
        with self.assertRaises(RefusedError) as caught:
            self.reimport(path, lenient=True, legacy=True)
        self.assertEqual(caught.exception.code, "apr-unsupported")
        self.assertIn("q8: the format has no id for q8_0", str(caught.exception))
        self.assertIn("--cast", caught.exception.hint)
        rules = [CastRule.parse("q*=f32")]
        with open_checkpoint(self.reimport(path, lenient=True, legacy=True, cast=rules)) as opened:
            self.assertEqual({tensor.dtype.name for tensor in opened.tensors.values()}, {"f32"})
            np.testing.assert_array_equal(opened.tensors["q8"].read()[2], np.arange(32) * 0.25)


class CommandLineTest(ErasTestCase):
    def run_tool(self, tool, *arguments, code=0):
        command = [sys.executable, ROOT / "tools" / tool, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def test_show_says_the_eras_of_every_file(self):
        self.write(OLD_APRENDER)
        found = json.loads(self.run_tool("show.py", "--json", "--legacy", "old.apr").stdout)
        self.assertEqual(found["header"]["eras"], ["aprender<2026-03"])
        self.assertRegex(self.run_tool("show.py", "old.apr", "--legacy").stdout, r"eras +.*aprender<2026-03")
        done = self.run_tool("show.py", "old.apr", code=5)
        self.assertIn("together fit: aprender until March 2026", done.stderr)
        golden = json.loads(self.run_tool("show.py", "--json", DATA / "apr" / "golden_v2.apr").stdout)
        self.assertEqual(golden["header"]["eras"], list(dtypes.ERAS))

    def test_legacy_takes_no_path_for_a_meaning(self):
        self.write(AMBIGUOUS)
        self.run_tool("convert.py", "--to", "apr", "-o", "x.apr", "--legacy", "old.apr", code=5)
        self.run_tool("convert.py", "--to", "apr", "-o", "a.apr", "--legacy", "8=apr_q4", "old.apr")
        self.run_tool("convert.py", "--legacy=8=apr_q4", "--legacy", "old.apr", "--to", "apr", "-o", "b.apr")
        self.assertEqual((self.folder / "a.apr").read_bytes(), (self.folder / "b.apr").read_bytes())
        self.run_tool("show.py", "--legacy", "8=f32", "old.apr", code=2)


if __name__ == "__main__":
    absltest.main()
