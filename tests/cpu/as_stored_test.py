"""Models whose matrices stay in 16 bits: float32's golden values, generation, memory, what is differentiated."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

pytest.importorskip("numba")

from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import UsageError
from apr_jax.cpu import products
from apr_jax.generate.generator import Generator, load_generator
from apr_jax.kernels.cpu_ops import CPU_OPS
from apr_jax.load.load_model import load_model
from apr_jax.load.save import save
from apr_jax.model.qwen2 import OPS
from apr_jax.trace import golden, stages, tolerances
from apr_jax.trace.compare import relative_l2
from tests import faults, paths

SAMPLE = "gqa_tied_bf16"
PLAIN = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": ()}


def golden_error(name, ops):
    reference = golden.read(paths.golden(name))
    model = load_model(paths.checkpoint(name), "float32", "cpu", ops, as_stored=True)
    counted = reference.inputs.attention_mask == 1
    logits = np.asarray(model.logits(reference.inputs))
    assert logits.dtype == np.float32
    return relative_l2(logits[counted], reference.values[stages.LOGITS][counted])


@contextlib.contextmanager
def no_kernels():
    with mock.patch.dict("os.environ", {products.SWITCH: "off"}):
        products.available.cache_clear()
        try:
            yield
        finally:
            products.available.cache_clear()


class AsStoredTest(parameterized.TestCase):
    def test_matrices_of_16_bits_stay_and_all_else_is_float32(self):
        model = load_model(paths.checkpoint(SAMPLE), "float32", "cpu", as_stored=True)
        self.assertEqual(model.dtype, "float32")
        for leaf in jax.tree.leaves(model.parameters):
            self.assertEqual(leaf.dtype, jnp.bfloat16 if leaf.ndim == 2 else jnp.float32)

    def test_what_was_stored_in_float32_or_is_asked_for_otherwise_is_left(self):
        wide = load_model(paths.checkpoint("mha_untied_f32_sharded"), "float32", "cpu", as_stored=True)
        self.assertEqual(set(wide.storage), {"float32"})
        exact = load_model(paths.checkpoint(SAMPLE), "float64", "cpu", as_stored=True)
        self.assertEqual(set(exact.storage), {"float64"})

    def test_float32_logits_are_within_the_bar_of_huggingfaces(self):
        self.assertLessEqual(golden_error(SAMPLE, CPU_OPS), tolerances.FLOAT32)

    @pytest.mark.slow
    def test_the_plain_operations_compute_the_same(self):
        self.assertLessEqual(golden_error(SAMPLE, OPS), tolerances.FLOAT32)

    def test_generation_takes_it_and_says_the_same_tokens(self):
        prompts = [list(range(5, 40)), [7, 8, 9]]
        made = load_generator(paths.checkpoint(SAMPLE), device="cpu", text=False)
        self.assertIn("bfloat16", made.model.storage)
        wide = Generator(load_model(paths.checkpoint(SAMPLE), "float32", "cpu", CPU_OPS))
        found, expected = (each.generate(prompts, max_new_tokens=40, **PLAIN) for each in (made, wide))
        self.assertEqual([row.token_ids for row in found], [row.token_ids for row in expected])

    @pytest.mark.slow
    def test_what_is_not_to_be_trained_is_not_saved_and_says_how_to_load_it(self):
        generator = load_generator(paths.checkpoint(SAMPLE), device="cpu", text=False)
        told = self.assertRaisesRegex(UsageError, r"found bfloat16 .*load_model\(path\) gives it parameters of one")
        with tempfile.TemporaryDirectory() as folder, told:
            save(generator.model, os.path.join(folder, "m.apr"))

    def test_without_kernels_generation_loads_float32(self):
        with no_kernels():
            made = load_generator(paths.checkpoint(SAMPLE), device="cpu", text=False)
        self.assertEqual(set(made.model.storage), {"float32"})

    @pytest.mark.slow
    def test_the_modules_gradient_is_that_of_float32_parameters(self):
        ids = np.arange(24).reshape(2, 12)

        def gradients(as_stored):
            module = load_model(paths.checkpoint(SAMPLE), "float32", "cpu", as_stored=as_stored).module
            found = nnx.grad(lambda module: jnp.mean(jax.nn.logsumexp(module(ids), axis=-1)))(module)
            return jax.tree.leaves(nnx.to_pure_dict(found))

        for narrow, wide in zip(gradients(True), gradients(False), strict=True):
            bar = 1e-5 if narrow.dtype == jnp.float32 else 2.0**-8
            self.assertLessEqual(relative_l2(np.asarray(narrow, np.float32), np.asarray(wide)), bar)

    def test_no_program_holds_a_widened_matrix(self):
        model = load_model(paths.checkpoint(SAMPLE), "float32", "cpu", CPU_OPS, as_stored=True)
        generator = Generator(model)
        generator.generate([[1, 2, 3]], max_new_tokens=4, **PLAIN)
        texts = [each.as_text() for each in generator.programs._compiled.values()]
        shape = f"f32[{model.config.vocab_size},{model.config.hidden_size}]"
        self.assertFalse([text for text in texts if shape in text])
        self.assertTrue([text for text in texts if shape.replace("f32", "bf16") in text])


class QuantisedTest(parameterized.TestCase):
    """Models that compute from quantised rows, beside the same files decoded when they are loaded."""

    @parameterized.parameters(("q4k", "uint8", SAMPLE), ("q8", "int8", "odd_sizes"))
    def test_logits_are_those_of_the_decoded_weights(self, cast, dtype, name):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.apr")
            convert(paths.checkpoint(name), path, to="apr", cast=[CastRule.parse(cast)])
            packed, decoded = (load_model(path, "float32", "cpu", CPU_OPS, as_stored=each) for each in (True, False))
        self.assertIn(dtype, packed.storage)
        inputs = golden.read(paths.golden(name)).inputs
        counted = inputs.attention_mask == 1
        found, expected = (np.asarray(model.logits(inputs))[counted] for model in (packed, decoded))
        self.assertLessEqual(relative_l2(found, expected), tolerances.FLOAT32)


@pytest.mark.slow
class EveryCheckpointTest(parameterized.TestCase):
    @parameterized.parameters(*paths.NAMES)
    def test_float32_logits_are_within_the_bar_of_huggingfaces(self, name):
        self.assertLessEqual(golden_error(name, CPU_OPS), tolerances.FLOAT32)

    @parameterized.parameters(*faults.OPERATIONS.items())
    def test_a_fault_planted_in_the_table_leaves_the_bar(self, operation, fault):
        faulty = dataclasses.replace(CPU_OPS, **{operation: fault})
        self.assertGreater(golden_error(SAMPLE, faulty), tolerances.FLOAT32)

    def test_ten_thousand_sampled_tokens_are_the_same_from_run_to_run(self):
        generator = load_generator(paths.checkpoint(SAMPLE), device="cpu", text=False)
        settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "eos_token_id": (), "seed": 3}
        runs = [
            generator.generate([[row, 2, 3] for row in range(4)], max_new_tokens=2500, **settings) for _ in range(2)
        ]
        first, second = ([row.token_ids for row in run] for run in runs)
        self.assertEqual(sum(map(len, first)), 10_000)
        self.assertEqual(first, second)


if __name__ == "__main__":
    absltest.main()
