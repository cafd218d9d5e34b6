"""Gradients against finite differences of the oracle's loss: no code is shared, no rule of differentiation either."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.model.gradients import gradients
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import predicted_pairs
from tests import oracle, paths

pytestmark = pytest.mark.slow

DIRECTIONS, STEP = 200, 2e-6
BOUND = 1e-6


class FiniteDifferencesTest(parameterized.TestCase):
    @parameterized.parameters("gqa_tied_bf16", "mha_untied_f32_sharded", "mqa_f16")
    def test_200_random_directions_agree(self, name):
        random = np.random.default_rng(7)
        ids, mask = random.integers(0, 280, (2, 12)), np.ones((2, 12), np.int64)
        mask[1, :4] = 0
        counted = random.random(ids.shape) < 0.8
        inputs = Inputs.of(ids, mask)
        loss, found = gradients(load_model(paths.checkpoint(name), "float64"), inputs, counted)
        weights, config = oracle.load(paths.checkpoint(name))
        wanted = predicted_pairs(inputs, counted)

        def loss_at(weights):
            logits = oracle.forward(weights, config, ids, mask)[0][:, :-1][wanted]
            top = logits.max(-1, keepdims=True)
            log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            return -np.take_along_axis(log_p, ids[:, 1:][wanted][:, None], -1).mean()

        self.assertAlmostEqual(loss, loss_at(weights), delta=1e-12)
        slopes, differences = [], []
        for _ in range(DIRECTIONS):
            # Each parameter moves by the same share of itself, so that each one counts.
            way = {key: random.normal(size=each.shape) * np.sqrt(np.mean(each**2)) for key, each in weights.items()}
            slopes.append(sum(float((found[f"grad.{key}"] * each).sum()) for key, each in way.items()))
            ahead, behind = (
                loss_at({key: each + sign * STEP * way[key] for key, each in weights.items()}) for sign in (1, -1)
            )
            differences.append((ahead - behind) / (2 * STEP))
        slopes, differences = np.array(slopes), np.array(differences)
        error = np.abs(slopes - differences).max() / np.sqrt(np.mean(differences**2))
        print(f"{name}: {DIRECTIONS} directions, largest difference {error:.1e} of a typical slope")
        self.assertLessEqual(error, BOUND)


if __name__ == "__main__":
    absltest.main()
