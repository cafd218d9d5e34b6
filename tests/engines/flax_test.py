"""A Flax NNX model of other names, captured in two lines: the right one has no finding, five mistakes are named."""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from apr_jax import capture, open_checkpoint
from apr_jax.converters.errors import AprJaxError, UsageError
from apr_jax.load.load_model import load_model
from apr_jax.parity import dumps
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace.inputs import seeded
from tests import paths
from tests.engines import flax_engine

pytestmark = pytest.mark.slow

NAME = "gqa_tied_bf16"
load = functools.lru_cache(load_model)


@functools.cache
def tensors():
    with open_checkpoint(paths.checkpoint(NAME)) as checkpoint:
        return {name: tensor.read().astype(np.float32) for name, tensor in checkpoint.tensors.items()}


class FlaxTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path) / "dump"
        self.exact, self.same = (load(paths.checkpoint(NAME), dtype, "cpu") for dtype in ("float64", "float32"))
        self.ids = seeded(283, 1, 64).input_ids

    def model(self, mistake=None):
        return flax_engine.load(flax_engine.Engine(self.exact.config, mistake), tensors())

    @parameterized.parameters(None, *flax_engine.MISTAKES)
    def test_right_is_clean_and_each_mistake_has_its_name(self, mistake):
        model = self.model(mistake)
        with jax.default_matmul_precision("highest"), capture.flax(model, self.folder):
            nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(self.ids))
        dump = dumps.read(self.folder, self.exact.config)
        self.assertLen(dump.values, 35)
        findings = diagnose(self.exact, self.same, dump.inputs, dump.values).findings
        self.assertEqual({each.fault for each in findings}, {flax_engine.MISTAKES[mistake]} if mistake else set())

    @parameterized.product(name=(NAME, "mha_untied_f32_sharded"), fused=(False, True))
    def test_our_own_module_shows_every_stage(self, name, fused):
        model = load_model(paths.checkpoint(name), "float32", "cpu", fused=fused)
        padded = np.ones((2, 8), np.int32)
        padded[1, 5:] = 0
        with capture.flax(model.module, self.folder):
            model.module(self.ids[:, :16].reshape(2, 8), attention_mask=padded)
        dump = dumps.read(self.folder, model.config)
        self.assertEqual(set(dump.values), set(model.trace(dump.inputs)))
        np.testing.assert_array_equal(dump.inputs.attention_mask, padded)
        exact = load(paths.checkpoint(name), "float64", "cpu")
        self.assertEmpty(diagnose(exact, model, dump.inputs, dump.values).findings)

    def test_a_table_that_is_read_and_not_called(self):
        class Reads(flax_engine.Engine):
            def __call__(self, tokens):
                x = self.embedder.embedding[tokens]
                for block in self.blocks:
                    x = block(x)
                return self.norm(x) @ self.embedder.embedding.T

        model = flax_engine.load(Reads(self.exact.config), tensors())
        with jax.default_matmul_precision("highest"), capture.flax(model, self.folder):
            model(jnp.asarray(self.ids))
        dump = dumps.read(self.folder, self.exact.config)
        self.assertLen(dump.values, 35)
        self.assertEmpty(diagnose(self.exact, self.same, dump.inputs, dump.values).findings)

    def test_the_classes_are_as_before_and_nothing_is_written_where_the_model_fails(self):
        before = flax_engine.Engine.__call__, jax.nn.softmax, flax_engine.rope, nnx.Linear.__call__
        with self.assertRaises(ZeroDivisionError), capture.flax(self.model(), self.folder):
            raise ZeroDivisionError
        self.assertFalse(self.folder.exists())
        self.assertEqual((flax_engine.Engine.__call__, jax.nn.softmax, flax_engine.rope, nnx.Linear.__call__), before)

    def test_what_cannot_be_captured_is_said(self):
        for kind, code, model in (
            (UsageError, "capture-model", object()),
            (AprJaxError, "capture-layers", nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        ):
            with self.assertRaises(kind) as caught, capture.flax(model, self.folder):
                pass
            self.assertEqual(caught.exception.code, code)
        with self.assertRaises(AprJaxError) as caught, capture.flax(self.model(), self.folder):
            pass
        self.assertEqual(caught.exception.code, "nothing-captured")


if __name__ == "__main__":
    absltest.main()
