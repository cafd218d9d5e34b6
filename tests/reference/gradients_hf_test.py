"""Gradients of parameters and of stages against torch's autograd through transformers' own modules."""

import contextlib
import functools
import pathlib
import sys
import tempfile

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
from tests.reference import more_checkpoints

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)

BOUNDS = {"float64": 1e-10, "float32": 2e-5}
BFLOAT16_FACTOR = 1.1
"""Our error in bfloat16 against float64 over torch's."""
BATCHES = 8
EVERY = [*paths.NAMES, *more_checkpoints.CONFIGURATIONS]


@functools.cache
def folder_of(name):
    """Returns the folder of a committed checkpoint, or of one that is made here."""
    if name in paths.NAMES:
        return paths.checkpoint(name)
    return more_checkpoints.write(name, pathlib.Path(tempfile.mkdtemp()))


def batch(vocab_size, seed=5):
    """Three rows: whole, padded on the left, padded on the right; and some labels that do not count."""
    generator = np.random.default_rng(seed)
    mask = np.ones((3, 20), np.int64)
    mask[1, :6], mask[2, 13:] = 0, 0
    inputs = Inputs.of(generator.integers(0, vocab_size, mask.shape), mask)
    return inputs, generator.random(mask.shape) < 0.8


class GradientsTest(parameterized.TestCase):
    def test_there_are_thirteen_checkpoints(self):
        self.assertLen(set(EVERY), 13)

    @parameterized.product(name=EVERY, dtype=("float64", "float32"))
    def test_every_parameter_and_every_stage_is_torchs(self, name, dtype):
        model = load_model(folder_of(name), dtype)
        inputs, labelled = batch(model.config.vocab_size)
        loss, ours = gradients(model, inputs, labelled, with_stages=True)
        expected, theirs = self.torchs(name, dtype, inputs, labelled, trace=True)
        self.assertAlmostEqual(loss, expected, delta=BOUNDS[dtype] * expected)
        self.assertEqual(
            {key for key in ours if not key.endswith((".as_embedding", ".as_head"))}, {f"grad.{key}" for key in theirs}
        )
        errors = {}
        for key, value in theirs.items():
            mine = ours[f"grad.{key}"]
            if not Key(f"grad.{key}").of_parameter:
                # What comes out of padding, and what a key that is not seen would change, reaches nothing that counts.
                window = model.config.window_of(Key(key).layer)
                counted = compared_positions(key, inputs, mine.shape, window=window)
                mine, value = mine[counted], value[counted]
            errors[key] = relative_l2(mine, value)
        worst = max(errors, key=errors.get)
        print(f"{name}, {dtype}: {len(errors)} gradients, largest relative L2 {errors[worst]:.1e} ({worst})")
        self.assertLessEqual(errors[worst], BOUNDS[dtype], worst)

    @staticmethod
    def torchs(name, dtype, inputs, labelled, trace=False):
        arrays = (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        with hf_reference.float64_patched() if dtype == "float64" else contextlib.nullcontext():
            return hf_reference.gradients(
                folder_of(name), *arrays, predicted_pairs(inputs, labelled), dtype, trace=trace
            )

    @parameterized.parameters(EVERY)
    def test_in_bfloat16_gradients_are_as_near_as_torchs_own(self, name):
        """Over all parameters and some batches: how near a single one comes in bfloat16 is a matter of luck."""
        exact, coarse = (load_model(folder_of(name), dtype) for dtype in ("float64", "bfloat16"))
        errors = []
        for seed in range(BATCHES):
            inputs, labelled = batch(exact.config.vocab_size, seed)
            right, ours = (gradients(model, inputs, labelled)[1] for model in (exact, coarse))
            for key, each in self.torchs(name, "bfloat16", inputs, labelled)[1].items():
                reference = right[f"grad.{key}"]
                errors.append([relative_l2(ours[f"grad.{key}"], reference), relative_l2(each, reference)])
        # Of some batches in a hundred the error is three times as large, on either side.
        mine, other = np.exp(np.log(errors).mean(0))
        print(
            f"{name}, bfloat16: geometric mean of relative L2, ours {mine:.2e}, torch {other:.2e}: {mine / other:.2f}"
        )
        self.assertLessEqual(mine, BFLOAT16_FACTOR * other)

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
