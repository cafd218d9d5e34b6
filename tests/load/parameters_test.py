"""Loading is strict: what a checkpoint lacks, has too much, or has in another shape is all named in one error."""

import json
import pathlib
import shutil
import sys
import types
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.load import load_model as load_model_
from apr_jax.load import parameters, upload
from apr_jax.load.load_model import load_model
from apr_jax.load.parameters import load_parameters, read_as
from tests import oracle, paths

SAMPLE = paths.checkpoint("mha_untied_f32_sharded")


def leaves(model):
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.parameters):
        yield ".".join(str(part.key) for part in path), np.asarray(leaf)


class Float16Test(absltest.TestCase):
    def test_a_processor_without_it_says_so_and_keeps_no_matrix_in_it(self):
        """XLA calls functions that it does not bring where there is no F16C; made so by another name for its error."""
        source = paths.checkpoint("mqa_f16")
        with mock.patch.object(jax, "jit", side_effect=jax.errors.JaxRuntimeError("Symbols not found")):
            self.assertFalse(parameters.computes_float16.__wrapped__())
        no = lambda: False  # noqa: E731
        with (
            mock.patch.object(load_model_, "computes_float16", no),
            mock.patch.object(parameters, "computes_float16", no),
        ):
            with self.assertRaisesRegex(UsageError, "F16C"):
                load_model(source, "float16", "cpu")
            self.assertEqual(set(load_model(source, "float32", "cpu", as_stored=True).storage), {"float32"})


class LoadingTest(parameterized.TestCase):
    def copy(self, config=None, **tensors) -> pathlib.Path:
        """Writes the sample as one file, with tensors replaced (array), dropped (None) or added."""
        folder = pathlib.Path(self.create_tempdir().full_path)
        weights = {}
        for shard in SAMPLE.glob("*.safetensors"):
            weights |= safetensors.numpy.load_file(shard)
        weights |= {name.replace("__", "."): value for name, value in tensors.items()}
        weights = {name: value for name, value in weights.items() if value is not None}
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        content = json.loads((SAMPLE / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    @parameterized.parameters(paths.NAMES)
    def test_every_tensor_arrives_with_its_values_under_its_name(self, name):
        expected, _ = oracle.load(paths.checkpoint(name))
        loaded = dict(leaves(load_model(paths.checkpoint(name))))
        self.assertEqual(set(loaded), set(expected))
        for key, value in loaded.items():
            np.testing.assert_array_equal(value, expected[key].astype(np.float32), key)

    @parameterized.parameters("without", "doubled")
    def test_field_names_that_transformers_finds(self, kind):
        """FIELD Configurations: names without `model.`, or with it twice -> loaded, the same parameters"""
        weights = {}
        for shard in SAMPLE.glob("*.safetensors"):
            weights |= safetensors.numpy.load_file(shard)
        rename = {"without": lambda name: name.removeprefix("model."), "doubled": lambda name: f"model.{name}"}[kind]
        folder = self.copy(**dict.fromkeys(weights))
        safetensors.numpy.save_file({rename(n): a for n, a in weights.items()}, folder / "model.safetensors")
        loaded, expected = dict(leaves(load_model(folder))), dict(leaves(load_model(SAMPLE)))
        self.assertEqual(set(loaded), set(expected))
        for key, value in loaded.items():
            np.testing.assert_array_equal(value, expected[key], key)

    def test_field_tables_that_old_transformers_saved(self):
        """FIELD Configurations: rotary_emb.inv_freq beside the weights -> loaded, the same parameters"""
        folder = self.copy(model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(6, np.float32))
        loaded, expected = dict(leaves(load_model(folder))), dict(leaves(load_model(SAMPLE)))
        self.assertEqual(set(loaded), set(expected))

    def test_field_a_head_for_another_task(self):
        """FIELD Configurations: a value head beside the weights is loaded -> refused, and --leave-out gets past it"""
        with self.assertRaises(RefusedError) as caught:
            load_model(self.copy(v_head__summary__weight=np.ones((1, 60), np.float32)))
        self.assertIn("unexpected: v_head.summary.weight", str(caught.exception))
        self.assertIn("--leave-out", str(caught.exception))

    def test_field_a_prefix_that_transformers_does_not_know(self):
        """FIELD Configurations: names with `_orig_mod.` in front are loaded -> refused in one line, with --rename"""
        weights = {}
        for shard in SAMPLE.glob("*.safetensors"):
            weights |= safetensors.numpy.load_file(shard)
        folder = self.copy(**dict.fromkeys(weights))
        safetensors.numpy.save_file({f"_orig_mod.{n}": a for n, a in weights.items()}, folder / "model.safetensors")
        with self.assertRaises(RefusedError) as caught:
            load_model(folder)
        self.assertEqual(caught.exception.code, "names-prefixed")
        self.assertIn("'_orig_mod.' in front", str(caught.exception))
        self.assertIn("--rename _orig_mod.=", str(caught.exception))

    def test_all_offenders_are_named_at_once(self):
        shape = safetensors.numpy.load_file(next(SAMPLE.glob("*00001*")))["model.embed_tokens.weight"].shape
        folder = self.copy(
            model__norm__weight=None,
            lm_head__weight=np.zeros((shape[1], shape[0]), np.float32),
            model__layers__0__mlp__extra__weight=np.zeros(3, np.float32),
        )
        with self.assertRaises(RefusedError) as caught:
            load_model(folder)
        text = str(caught.exception)
        self.assertEqual((caught.exception.code, caught.exception.exit_code), ("tensors-mismatch", 5))
        for part in (
            "missing: model.norm.weight",
            "unexpected: model.layers.0.mlp.extra.weight [3]",
            f"shape: lm_head.weight is [{shape[1]}, {shape[0]}], the configuration needs [{shape[0]}, {shape[1]}]",
            "3 of them",
        ):
            self.assertIn(part, text)

    def test_every_unsupported_attribute_is_named_at_once(self):
        folder = self.copy(
            {
                "use_sliding_window": "yes",
                "rope_scaling": {"rope_type": "mrope", "factor": 4.0},
                "hidden_act": "gelu",
                "model_type": "qwen3",
                "is_causal": False,
            }
        )
        with self.assertRaises(RefusedError) as caught:
            load_model(folder)
        self.assertEqual(caught.exception.code, "config-unsupported")
        for part in ("use_sliding_window", "mrope", "gelu", "qwen3", "is_causal"):
            self.assertIn(part, str(caught.exception))

    def test_a_tied_head_may_be_a_copy_and_nothing_else(self):
        tied = paths.checkpoint("gqa_tied_bf16")
        folder = pathlib.Path(self.create_tempdir().full_path, "copy")
        shutil.copytree(tied, folder)
        weights = safetensors.numpy.load_file(folder / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding.astype(np.float32)
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        np.testing.assert_array_equal(load_model(folder)([[1, 2, 3]]), load_model(tied)([[1, 2, 3]]))
        weights["lm_head.weight"][-1, -1] += 1
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        with (
            self.assertRaises(RefusedError) as caught,
            absltest.mock.patch("apr_jax.converters.checkpoint.tied_heads._COMPARED_BYTES", 999),
        ):
            load_model(folder)
        self.assertEqual(caught.exception.code, "tied-head-differs")

    def test_parameters_that_are_no_floats_are_refused(self):
        folder = self.copy(model__norm__weight=np.ones(60, np.int64))
        with self.assertRaises(RefusedError) as caught:
            load_model(folder)
        self.assertIn(caught.exception.code, ("parameter-dtype", "tensors-mismatch"))

    def test_float64_is_rounded_once(self):
        # Halfway between two bf16 values but for a bit that f32 cannot hold: f32 first would round to even, down.
        values = np.array([[1.00390625 + 2.0**-40]])
        path = pathlib.Path(self.create_tempdir().full_path, "x.safetensors")
        safetensors.numpy.save_file({"x": values}, path)
        with open_checkpoint(path) as checkpoint:
            self.assertEqual(float(read_as([checkpoint.tensors["x"]], "bfloat16")[0, 0]), 1.0078125)

    def test_narrowing_rounds_to_nearest_even_whatever_the_chunks(self):
        values = np.random.default_rng(0).normal(size=(5000, 33)).astype(np.float32)
        values[0, :3] = (1.00390625, 1.01171875, np.nan)
        path = pathlib.Path(self.create_tempdir().full_path, "x.safetensors")
        safetensors.numpy.save_file({"x": values}, path)
        with open_checkpoint(path) as checkpoint, absltest.mock.patch("apr_jax.load.parameters._CHUNK_BYTES", 10_000):
            read = read_as([checkpoint.tensors["x"]], "bfloat16")
        np.testing.assert_array_equal(read.view(np.uint16), values.astype(ml_dtypes.bfloat16).view(np.uint16))
        self.assertEqual([float(x) for x in read[0, :2]], [1.0, 1.015625])

    def test_an_accelerator_casts_what_it_rounds_alike_and_the_host_the_rest(self):
        names = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight")
        expected, _ = oracle.load(SAMPLE)
        folder = self.copy(**{name: expected[name].astype(np.float64) for name in names})
        device, uploaded = jax.devices("cpu")[0], []

        def upload_to_cpu(sources, dtype, to):
            self.assertIs(to, accelerator)
            uploaded.extend(sources)
            return {path: jax.device_put(read_as(tensors, dtype), device) for path, tensors in sources.items()}

        accelerator = types.SimpleNamespace(platform="gpu")
        with (
            open_checkpoint(folder) as checkpoint,
            mock.patch.object(parameters, "_put", lambda array, _: jax.device_put(array, device)),
            mock.patch.object(upload, "upload", upload_to_cpu),
            mock.patch.object(upload, "_SMALLEST_DEVICE_CAST", 1),
        ):
            loaded = load_parameters(checkpoint, checkpoint.model_config(), "bfloat16", accelerator)
        leaves = jax.tree_util.tree_leaves_with_path(loaded)
        found = {".".join(str(part.key) for part in path): np.asarray(leaf) for path, leaf in leaves}
        self.assertEqual(set(found), set(expected))
        self.assertLen(uploaded, len(expected) - len(names))
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name].astype(ml_dtypes.bfloat16), name)

    def test_the_cpu_backend_takes_host_arrays_over_without_a_copy(self):
        with open_checkpoint(SAMPLE) as checkpoint:
            array = read_as([checkpoint.tensors["model.embed_tokens.weight"]], "float32")
        kept = jax.device_put(array, jax.devices("cpu")[0], may_alias=True)
        self.assertEqual(kept.unsafe_buffer_pointer(), array.ctypes.data)


if __name__ == "__main__":
    absltest.main()
