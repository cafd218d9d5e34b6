"""Whatever the last bits of a solved number, the one that an engine holds is among those tried before it."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.parity import round_numbers


class RoundNumbersTest(parameterized.TestCase):
    @parameterized.parameters(
        *((round_numbers.near, base) for base in (1e4, 5e5, 1e6, 1.5e6, 1.23e5)),
        *((round_numbers.epsilons, eps) for eps in (1e-5, 2e-5, 1e-6, 1e-8, 1e-12, 2.0**-23, 1.5e-5)),
        *((round_numbers.scales, scale) for scale in (1.0, 0.125, 0.2, 128**-0.5, 80**-0.5, 1 / 24, 1 / 128)),
    )
    def test_what_engines_hold_comes_before_what_was_solved(self, candidates, held):
        for off in np.random.default_rng(0).normal(size=20) * 3e-6:
            found = candidates(held * (1 + off))
            self.assertIn(held, found[:-1], found)
            self.assertEqual(found[-1], held * (1 + off))
            self.assertLen(set(found), len(found))

    def test_customary_eps_come_first_within_doubt_and_noise_around_none_is_none(self):
        self.assertEqual(round_numbers.epsilons(1.7e-8, 1e-8), [1e-8, 2e-8, 1.7e-8])
        self.assertEqual(round_numbers.epsilons(1.7e-8, 1e-9), [2e-8, 1.7e-8])
        self.assertEqual(round_numbers.epsilons(-3e-11, 1e-10), [1e-12])
        self.assertEqual(round_numbers.epsilons(-3e-6, 1e-10), [])

    def test_scales_that_no_head_has_are_left_alone(self):
        for scale in (-0.25, 0.0, 1e-200, 64.0, float("nan")):
            self.assertLessEqual(len(round_numbers.scales(scale)), 4)


if __name__ == "__main__":
    absltest.main()
