"""Gradients of parameters and of stages against torch's autograd through transformers' own modules."""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.model.gradients import gradients
from apr_jax.trace import hf_reference
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import compared_positions, predicted_pairs
from apr_jax.trace.stages import Key
from tests import paths

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)

BOUNDS = {"float64": 1e-10, "float32": 2e-5}


def batch(vocab_size):
    """Three rows: whole, padded on the left, padded on the right; and some labels that do not count."""
    generator = np.random.default_rng(5)
    mask = np.ones((3, 20), np.int64)
    mask[1, :6], mask[2, 13:] = 0, 0
    inputs = Inputs.of(generator.integers(0, vocab_size, mask.shape), mask)
    return inputs, generator.random(mask.shape) < 0.8


class GradientsTest(parameterized.TestCase):
    @parameterized.product(name=paths.NAMES, dtype=("float64", "float32"))
    def test_every_parameter_and_every_stage_is_torchs(self, name, dtype):
        model = load_model(paths.checkpoint(name), dtype)
        inputs, labelled = batch(model.config.vocab_size)
        loss, ours = gradients(model, inputs, labelled, with_stages=True)
        arrays = (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        with hf_reference.float64_patched() if dtype == "float64" else contextlib.nullcontext():
            expected, theirs = hf_reference.gradients(
                paths.checkpoint(name), *arrays, predicted_pairs(inputs, labelled), dtype, trace=True
            )
        self.assertAlmostEqual(loss, expected, delta=BOUNDS[dtype] * expected)
        self.assertEqual(
            {key for key in ours if not key.endswith((".as_embedding", ".as_head"))}, {f"grad.{key}" for key in theirs}
        )
        for key, value in theirs.items():
            mine = ours[f"grad.{key}"]
            if not Key(f"grad.{key}").of_parameter:
                # What comes out of padding, and what a key that is not seen would change, reaches nothing that counts.
                counted = compared_positions(key, inputs, mine.shape)
                mine, value = mine[counted], value[counted]
            with self.subTest(key):
                self.assertLessEqual(relative_l2(mine, value), BOUNDS[dtype])

    def test_the_two_parts_of_a_tied_embedding_are_those_of_an_untied_twin(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), "float64")
        inputs, counted = batch(model.config.vocab_size)
        _, ours = gradients(model, inputs, counted)
        name = "grad.model.embed_tokens.weight"
        import torch

        with hf_reference.float64_patched():
            twin = hf_reference.load(paths.checkpoint("gqa_tied_bf16"), "float64")
            twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().clone())
            ids, mask, positions = (
                torch.tensor(np.asarray(each, np.int64))
                for each in (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
            )
            logits = twin(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            wanted = torch.tensor(predicted_pairs(inputs, counted))
            torch.nn.functional.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted]).backward()
        for suffix, expected in ((".as_embedding", twin.model.embed_tokens.weight), (".as_head", twin.lm_head.weight)):
            self.assertLessEqual(relative_l2(ours[name + suffix], expected.grad.numpy()), 1e-10)


if __name__ == "__main__":
    absltest.main()
