"""What AdamW may be asked for, and the vector of all parameters."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import UsageError
from apr_jax.optimizer.rule import Rule
from apr_jax.optimizer.settings import Layout, Settings, decay_of

SHAPES = {"model.embed_tokens.weight": (3, 2), "model.layers.0.self_attn.q_proj.bias": (2,), "model.norm.weight": (2,)}


class SettingsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"rates": (0.0,)}, "--lr"),
        ({"rates": ()}, "--lr"),
        ({"rates": (float("nan"),)}, "--lr"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"eps": -1e-8}, "--eps"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"decayed": "some"}, "--decay"),
        ({"clip_norm": 0.0}, "--clip-norm"),
    )
    def test_what_is_no_setting_is_refused_by_its_option(self, given, option):
        with self.assertRaisesRegex(UsageError, option):
            Settings(**{"rates": (1e-3,)} | given)

    def test_a_vector_and_back(self):
        layout = Layout(SHAPES)
        arrays = {name: np.random.default_rng(0).normal(size=shape) for name, shape in SHAPES.items()}
        back = layout.arrays(layout.flat(arrays))
        self.assertEqual(list(back), list(SHAPES))
        for name, value in arrays.items():
            np.testing.assert_array_equal(back[name], value)
        settings = Settings((1e-3,), weight_decay=0.1, decayed="matrices")
        self.assertEqual(layout.per_kind(decay_of(settings)).tolist(), [0.1] * 6 + [0.0] * 4)


class RuleTest(absltest.TestCase):
    def test_two_right_steps_by_hand(self):
        layout = Layout({"w.weight": (1,)})
        rule = Rule.right(Settings((0.1, 0.2), (0.5, 0.75), 0.01, 0.3, clip_norm=2.0), layout)
        after = rule.run(np.array([1.0]), lambda step, p: np.array([4.0, -1.0])[step : step + 1])
        # g is 2 (clipped), then -1; m 1, 0; v 1, 1; m / (1 - 0.5^t): 2, 0; v / (1 - 0.75^t): 4, 1 / 0.4375.
        first = 1 - 0.1 * (2 / (2 + 0.01) + 0.3)
        np.testing.assert_allclose(after, [first - 0.2 * (0.0 + 0.3 * first)], rtol=1e-14)
        # The second one again, with other numbers, in which it moves.
        after = rule.change(betas=(0.0, 0.75)).run(
            np.array([1.0]), lambda step, p: np.array([2.0, -1.0])[step : step + 1]
        )
        np.testing.assert_allclose(after, [first - 0.2 * (-1 / (np.sqrt(1 / 0.4375) + 0.01) + 0.3 * first)], rtol=1e-14)


if __name__ == "__main__":
    absltest.main()
