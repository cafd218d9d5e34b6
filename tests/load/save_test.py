"""What `save` writes: the parameters bit for bit under HuggingFace's names, and everything that came beside them."""

import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import MissingFileError, UsageError
from apr_jax.converters.verify.comparison import compare
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.load.load_model import load_model
from apr_jax.load.save import save
from apr_jax.model.language_model import LanguageModel
from tests import paths

TINY = paths.checkpoint("gqa_tied_bf16")
FOREIGN = paths.DATA / "apr" / "tiny_bf16_tied-int4.apr"
OUTPUTS = ("m.apr", "m.safetensors", "folder")


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class SaveTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def assert_same_parameters(self, one: LanguageModel, other: LanguageModel) -> None:
        self.assertEqual(one.config, other.config)
        self.assertEqual(jax.tree.structure(one.parameters), jax.tree.structure(other.parameters))
        for a, b in zip(jax.tree.leaves(one.parameters), jax.tree.leaves(other.parameters), strict=True):
            self.assertEqual(np.asarray(a).tobytes(), np.asarray(b).tobytes())


class ParametersTest(SaveTestCase):
    @parameterized.product(name=paths.NAMES, output=OUTPUTS)
    def test_they_come_back_bit_for_bit(self, name, output):
        for dtype, fused in (("float32", False), ("bfloat16", True)):
            model = load_model(paths.checkpoint(name), dtype, fused=fused)
            save(model, self.folder / output, force=True)
            self.assert_same_parameters(load_model(self.folder / output, dtype, fused=fused), model)

    @parameterized.parameters(False, True)
    def test_a_fused_model_is_written_as_a_separate_one(self, fused):
        save(load_model(TINY, "bfloat16", fused=fused), self.folder / "out")
        self.assertEqual(files(self.folder / "out"), files(TINY))

    def test_float64_is_written_as_it_is(self):
        model = load_model(TINY, "float64")
        save(model, self.folder / "m.safetensors")
        read = safetensors.numpy.load_file(self.folder / "m.safetensors")
        self.assertEqual({value.dtype for value in read.values()}, {np.dtype(np.float64)})
        self.assert_same_parameters(load_model(self.folder / "m.safetensors", "float64"), model)

    def test_shards(self):
        model = load_model(TINY)
        save(model, self.folder / "out", max_shard_bytes=100_000)
        self.assertGreater(len(list((self.folder / "out").glob("model-*.safetensors"))), 2)
        self.assert_same_parameters(load_model(self.folder / "out"), model)

    @parameterized.parameters(*OUTPUTS)
    def test_verify_names_what_was_tuned_and_nothing_else(self, output):
        model = load_model(TINY, "bfloat16", fused=True)
        weight = model.module.model.layers[1].self_attn.qkv_proj.weight
        key_rows = slice(model.config.num_heads * model.config.head_dim, None)
        weight[...] = weight[...].at[key_rows].multiply(1.25)
        save(model, self.folder / output)
        with open_checkpoint(TINY) as before, open_checkpoint(self.folder / output) as after:
            comparison = compare(before, after)
        changed = {tensor.name for tensor in comparison.unequal}
        self.assertEqual(changed, {f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv"})


class BesideTest(SaveTestCase):
    @parameterized.parameters(paths.NAMES)
    def test_a_folder_comes_back_byte_for_byte_but_for_the_dtype(self, name):
        source = paths.checkpoint(name)
        save(load_model(source), self.folder / "out")
        before, after = files(source), files(self.folder / "out")
        config = json.loads(after["config.json"])
        key = "dtype" if "dtype" in config else "torch_dtype"
        self.assertEqual(config[key], "float32")
        self.assertEqual(config, json.loads(before["config.json"]) | {key: "float32"})
        for file in before:
            if file != "config.json" and "safetensors" not in file:
                self.assertEqual(after[file], before[file])

    def test_through_an_apr_the_side_files_are_the_same(self):
        save(load_model(TINY, "bfloat16"), self.folder / "one.apr")
        save(load_model(self.folder / "one.apr", "bfloat16"), self.folder / "two")
        self.assertEqual(files(self.folder / "two"), files(TINY))
        convert(TINY, self.folder / "three.apr", to="apr")
        self.assertEqual((self.folder / "one.apr").read_bytes(), (self.folder / "three.apr").read_bytes())

    def test_an_apr_of_another_writer_keeps_its_metadata(self):
        model = load_model(FOREIGN)
        save(model, self.folder / "m.apr")
        with open_checkpoint(FOREIGN) as before, open_checkpoint(self.folder / "m.apr") as after:
            sizes = {"total_size": sum(tensor.nbytes for tensor in after.tensors.values())}
            changed = {key for key in before.metadata if after.metadata[key] != before.metadata[key]}
            self.assertLessEqual(changed, {"total_size", "param_count"})
            self.assertEqual(after.metadata["total_size"], sizes["total_size"])
            self.assertEqual(Tokenizer.of(after).encode("a b"), Tokenizer.of(before).encode("a b"))
        self.assert_same_parameters(load_model(self.folder / "m.apr"), model)
        save(model, self.folder / "out")
        # `apr` writes a copy of the embedding as a tied model's head: a folder leaves it out, as `convert` does.
        again = load_model(self.folder / "out")
        self.assertEqual(json.loads((self.folder / "out" / "config.json").read_text())["torch_dtype"], "float32")
        np.testing.assert_array_equal(again([[5, 6, 7]]), model([[5, 6, 7]]))

    @parameterized.parameters(*OUTPUTS)
    def test_a_model_from_nothing_gets_a_configuration(self, output):
        loaded = load_model(paths.checkpoint("head_dim_given"))
        model = LanguageModel(loaded.config, loaded.parameters, loaded.device)
        save(model, self.folder / output)
        self.assert_same_parameters(load_model(self.folder / output), model)

    def test_the_source_may_be_gone_by_then(self):
        convert(TINY, self.folder / "base.apr", to="apr")
        model = load_model(self.folder / "base.apr", "bfloat16")
        (self.folder / "base.apr").unlink()
        save(model, self.folder / "out")
        self.assertEqual(files(self.folder / "out"), files(TINY))


class OutputTest(SaveTestCase):
    @parameterized.parameters(*OUTPUTS)
    def test_what_is_there_is_replaced_on_request_only(self, output):
        model = load_model(TINY)
        save(model, self.folder / output)
        with self.assertRaisesRegex(UsageError, "force=True"):
            save(model, self.folder / output)
        model.module.model.norm.weight[...] *= 2
        save(model, self.folder / output, force=True)
        self.assert_same_parameters(load_model(self.folder / output), model)
        self.assertEqual(os.listdir(self.folder), [output])

    def test_the_base_itself_can_be_replaced(self):
        convert(TINY, self.folder / "m.apr", to="apr")
        model = load_model(self.folder / "m.apr", "bfloat16")
        model.module.model.norm.weight[...] *= 2
        save(model, self.folder / "m.apr", force=True)
        self.assert_same_parameters(load_model(self.folder / "m.apr", "bfloat16"), model)

    def test_a_folder_with_something_else_in_it_is_never_replaced(self):
        (self.folder / "out").mkdir()
        (self.folder / "out" / "thesis.tex").write_text("precious")
        with self.assertRaisesRegex(UsageError, r"thesis\.tex"):
            save(load_model(TINY), self.folder / "out", force=True)

    def test_what_cannot_be_written_says_why(self):
        model = load_model(TINY)
        with self.assertRaisesRegex(UsageError, r"nnx\.update"):
            save(model.module, self.folder / "m.apr")
        with self.assertRaises(MissingFileError):
            save(model, self.folder / "no" / "m.apr")
        model.module.model.layers[0].mlp.up_proj.weight.set_value(jnp.zeros((3, 4)))
        with self.assertRaisesRegex(UsageError, r"layers\.0\.mlp\.up_proj.*\[3, 4\].*\[160, 64\]"):
            save(model, self.folder / "m.apr")
        self.assertEqual(os.listdir(self.folder), [])


if __name__ == "__main__":
    absltest.main()
