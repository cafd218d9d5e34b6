"""Dumps as other engines write them: what is read comes back equal, what is broken or foreign is refused by name."""

import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, MissingFileError, RefusedError, UsageError
from apr_jax.load.load_model import load_model
from apr_jax.parity import dumps
from apr_jax.trace import aprt, golden, inputs
from apr_jax.trace.inputs import seeded
from apr_jax.trace.positions import gather_positions
from tests import paths

KEYS = ("stage.embedding", "stage.0.attn_softmax", "stage.1.q_post_rope", "stage.final_norm", "logits")


class DumpsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = load_model(paths.checkpoint("gqa_tied_bf16"), "float32", "cpu")
        cls.config = cls.model.config
        cls.inputs = seeded(cls.config.vocab_size, 2, 9)
        cls.trace = cls.model.trace(cls.inputs, KEYS)

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def refused(self, kind: type[AprJaxError], code: str, path, *args):
        with self.assertRaises(kind) as caught:
            dumps.read(path, self.config, *args)
        self.assertEqual(caught.exception.code, code)
        return str(caught.exception)

    def write_map(self, entries, **content):
        content = {"input_ids": self.inputs.input_ids.tolist(), "stages": entries} | content
        content = {key: value for key, value in content.items() if value is not None}
        (self.folder / "dump.json").write_text(json.dumps(content))

    def write_arrays(self, kept=None, **content):
        for key in KEYS:
            np.save(self.folder / f"{key}.npy", gather_positions(key, self.trace[key], kept))
        self.write_map({key: {"file": f"{key}.npy"} for key in KEYS}, **content)

    def assert_read(self, dump, kept=None):
        self.assertEqual(set(dump.values), set(KEYS))
        for key in KEYS:
            np.testing.assert_array_equal(dump.values[key], gather_positions(key, self.trace[key], kept), key)

    def test_arrays_come_back_in_every_dtype_that_holds_them(self):
        value = self.trace["stage.final_norm"]
        for name, dtype in (("float64", np.float64), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
            value.astype(dtype).tofile(self.folder / "x.raw")
            self.write_map({"stage.final_norm": {"file": "x.raw", "dtype": name}})
            read = dumps.read(self.folder, self.config).values["stage.final_norm"]
            np.testing.assert_array_equal(read, value.astype(dtype).astype(read.dtype))
            self.assertEqual(read.dtype, np.float64 if name == "float64" else np.float32)
        self.write_arrays(dtype="float32")
        dump = dumps.read(self.folder, self.config)
        self.assert_read(dump)
        self.assertEqual((dump.dtype, dump.columns), ("float32", None))

    def test_the_tokens_may_lie_beside_the_map(self):
        self.write_arrays(input_ids=None)
        self.refused(MissingFileError, "token-ids-missing", self.folder)
        for path in (inputs.write_plain(self.folder / "in", self.inputs), *(self.folder / "in").iterdir()):
            if path is not None:
                shutil.copy(path, self.folder)
        np.testing.assert_array_equal(dumps.read(self.folder, self.config).inputs.input_ids, self.inputs.input_ids)

    @parameterized.parameters(([4, 7],), ([[4, 7], [4, 7]],))
    def test_the_map_says_which_positions_there_are(self, positions):
        kept = np.array([[4, 7], [4, 7]])
        self.write_arrays(kept, positions=positions)
        dump = dumps.read(self.folder, self.config)
        self.assert_read(dump, kept)
        np.testing.assert_array_equal(dump.columns, kept)
        self.write_arrays(kept)
        self.assert_read(dumps.read(self.folder, self.config, None, [4, 7]), kept)
        self.assertIn("--positions", self.refused(RefusedError, "dump-size", self.folder))
        self.refused(UsageError, "positions", self.folder, None, [4, 70])
        self.refused(RefusedError, "dump-size", self.folder, None, [4, 5, 7])
        self.write_arrays(kept, positions="4-7")
        self.refused(UsageError, "positions", self.folder)

    def test_a_golden_file_says_it_too(self):
        kept = np.array([[2, 8], [2, 8]])
        arrays = {key: gather_positions(key, self.trace[key], kept) for key in KEYS}
        path = self.folder / "steps.safetensors"
        for positions in (np.array([2, 8], np.int32), kept.astype(np.int32)):
            whole = arrays | {"input_ids": self.inputs.input_ids, "positions": positions}
            safetensors.numpy.save_file(whole, path, {"dtype": "float32"})
            dump = dumps.read(path, self.config)
            self.assert_read(dump, kept)
            np.testing.assert_array_equal(dump.columns, kept)
        safetensors.numpy.save_file(arrays | {"input_ids": self.inputs.input_ids}, path)
        self.refused(RefusedError, "dump-size", path)
        self.assert_read(dumps.read(path, self.config, None, [2, 8]), kept)

    def test_a_golden_file_comes_back_and_is_held_against_other_tokens(self):
        path = self.folder / "golden.safetensors"
        made = golden.Golden(self.inputs, golden.stored(self.trace), {"dtype": "float32", "weights_sha256": "ab"})
        golden.write(path, made)
        dump = dumps.read(path, self.config, self.inputs)
        self.assert_read(dump)
        self.assertEqual((dump.dtype, dump.weights_sha256), ("float32", "ab"))
        self.refused(UsageError, "input-ids", path, seeded(288, 2, 9, seed=1))

    def test_gradients_of_parameters_are_read_when_they_are_wanted_and_not_kept(self):
        shapes = self.config.tensor_shapes()
        name, stage = "grad.model.norm.weight", "grad.stage.0.attn_norm"
        arrays = {
            name: np.arange(shapes["model.norm.weight"][0], dtype=np.float32),
            stage: np.ones((*self.inputs.input_ids.shape, 64), np.float32),
        }
        path = self.folder / "gradients.safetensors"
        safetensors.numpy.save_file(arrays | {"input_ids": self.inputs.input_ids}, path)
        gradients = dumps.read(path, self.config, backward=True).gradients
        self.assertCountEqual(gradients, arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(gradients[key], array)
        self.assertIs(gradients[stage], gradients[stage])
        self.assertIsNot(gradients[name], gradients[name])

    def test_a_golden_file_of_another_model_is_refused(self):
        for name, tensor in (("odd_sizes", "hidden.0"), ("mha_untied_f32_sharded", "stage.embedding")):
            self.assertIn(f"'{tensor}'", self.refused(RefusedError, "dump-size", paths.golden(name)))
        arrays = {"input_ids": self.inputs.input_ids, "stage.7.ffn_up": np.ones((2, 9, 160), np.float32)}
        path = self.folder / "deep.safetensors"
        safetensors.numpy.save_file(arrays, path)
        self.assertIn("stage.7.ffn_up", self.refused(RefusedError, "dump-stage", path))
        transposed = np.ascontiguousarray(self.trace["stage.final_norm"].swapaxes(1, 2))
        safetensors.numpy.save_file({"input_ids": self.inputs.input_ids, "stage.final_norm": transposed}, path)
        self.assertIn("[2, 64, 9]", self.refused(RefusedError, "dump-shape", path))

    def test_a_layer_more_than_the_model_has_is_read(self):
        (self.folder / "layer-2").mkdir()
        (self.folder / "layer-4").mkdir()
        value = np.ones((2, 9, 64), np.float32)
        for layer in (2, 4):
            (self.folder / f"layer-{layer}" / "ffn_out.bin").write_bytes(aprt.encode(layer, value))
        dump = dumps.read(self.folder, self.config, self.inputs)
        self.assertEqual((list(dump.values), dump.strangers), (["stage.2.ffn_out"], ("layer-4/ffn_out.bin",)))

    def test_broken_arrays_are_refused_by_name(self):
        self.write_arrays()
        path = self.folder / "stage.final_norm.npy"
        data = path.read_bytes()
        for content, kind, code in (
            (b"", BrokenContainerError, "npy"),
            (data[:50], BrokenContainerError, "npy"),
            (data[:-1], BrokenContainerError, "npy"),
            (b"PK\x03\x04" + data, BrokenContainerError, "npy"),
            (b"\x80\x04N.", BrokenContainerError, "npy"),
        ):
            path.write_bytes(content)
            self.assertIn("final_norm", self.refused(kind, code, self.folder))
        np.save(path, np.ones((2, 9, 64), np.int64))
        self.assertIn("int64", self.refused(RefusedError, "dump-dtype", self.folder))
        np.save(path, np.ones((2, 8, 64), np.float32))
        self.assertIn("[2, 9, 64]", self.refused(RefusedError, "dump-size", self.folder))

    def test_raw_files_of_a_wrong_size_are_refused_by_name(self):
        raw = self.folder / "x.raw"
        raw.write_bytes(bytes(2 * 9 * 64 * 4 - 1))
        self.write_map({"stage.final_norm": {"file": "x.raw"}})
        self.assertIn("x.raw", self.refused(BrokenContainerError, "dump-size", self.folder))
        raw.write_bytes(bytes(2 * 9 * 64 * 4 - 4))
        self.assertIn("1151", self.refused(RefusedError, "dump-size", self.folder))

    @parameterized.parameters("bbtd", "tbtd", "btbd", "btdb", "bth", "xtd", "td", "")
    def test_a_layout_that_names_an_axis_twice_or_lacks_one_is_refused(self, layout):
        # One row: its axis could be named any number of times, or left out, without changing the number of values.
        one = inputs.Inputs.of(self.inputs.input_ids[:1])
        np.save(self.folder / "x.npy", self.trace["stage.final_norm"][:1])
        self.write_map({"stage.final_norm": {"file": "x.npy", "layout": layout}})
        if layout in ("td", ""):
            dump = dumps.read(self.folder, self.config, one)
            np.testing.assert_array_equal(dump.values["stage.final_norm"], self.trace["stage.final_norm"][:1])
        else:
            self.assertIn(repr(layout)[1:-1], self.refused(UsageError, "dump-layout", self.folder, one))

    @parameterized.parameters(
        ("[", BrokenContainerError, "json-syntax"),
        ("[]", BrokenContainerError, "dump-map"),
        ('{"input_ids": [[1]]}', BrokenContainerError, "dump-map"),
        ('{"input_ids": [[1]], "stages": {"logits": "x.npy"}}', BrokenContainerError, "dump-map"),
        ('{"input_ids": [[1]], "stages": {"logits": {}}}', BrokenContainerError, "dump-map"),
        ('{"input_ids": [[1]], "stages": {}}', RefusedError, "nothing-compared"),
        ('{"input_ids": [[1]], "stages": {"stage.0.q_rope": {"file": "x"}}}', RefusedError, "dump-stage"),
        ('{"input_ids": 1, "stages": {"logits": {"file": "x"}}}', UsageError, "input-ids"),
        ('{"input_ids": [[1]], "dtype": "f32", "stages": {"logits": {"file": "x"}}}', UsageError, "dtype"),
        ('{"input_ids": [[1]], "stages": {"logits": {"file": "x"}}}', MissingFileError, "file-missing"),
    )
    def test_maps_that_say_nothing_sensible_are_refused(self, content, kind, code):
        (self.folder / "dump.json").write_text(content)
        self.refused(kind, code, self.folder)

    def test_an_empty_folder_and_no_folder_are_refused(self):
        self.assertIn("dump.json", self.refused(RefusedError, "dump-empty", self.folder))
        (self.folder / "q_rope.bin").write_bytes(aprt.encode(0, np.ones(3)))
        self.refused(MissingFileError, "token-ids-missing", self.folder)
        self.refused(RefusedError, "aprt-empty", self.folder, self.inputs)
        self.refused(MissingFileError, "file-missing", self.folder / "none")


if __name__ == "__main__":
    absltest.main()
