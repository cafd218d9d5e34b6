"""What rotation was applied is read off vectors before and after it, whatever it is."""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.parity.rope_fit import Right, Rotation, candidates

RIGHT = Right(Qwen2Config.from_hf({"model_type": "qwen2", "rope_theta": 1e6}), 80)
POSITIONS = np.stack([np.r_[np.full(10, -1), np.arange(70)], np.arange(80)])


class RotationTest(parameterized.TestCase):
    @parameterized.product(
        width=[16, 64],
        turn=[
            Rotation(),
            Rotation(theta=1e4),
            Rotation(theta=5e5),
            Rotation(adjacent=True),
            Rotation(part=0.5),
            Rotation(part=0.75),
            Rotation(part=0.5, cut="head"),
            Rotation(part=0.75, cut="sliced"),
            Rotation(adjacent=True, part=0.25),
            Rotation(negated=True),
            Rotation(shift=3),
            Rotation(shift=-7),
            Rotation(restart=32),
            Rotation(theta=1e4, adjacent=True),
            Rotation(theta=7.3e5, shift=5, negated=True),
            Rotation(theta=123456.0, restart=24),
            Rotation(none=True),
        ],
    )
    def test_the_rotation_that_was_applied_is_found_and_its_base_to_a_millionth(self, width, turn):
        generator = np.random.default_rng(width)
        right = Right(dataclasses.replace(RIGHT.config, head_dim=width), 80)
        before = generator.normal(size=(2, 80, 4, width)) + 5 * generator.normal(size=(4, width))
        after = turn.apply(before, POSITIONS, right)
        after *= 1 + 6e-8 * generator.normal(size=after.shape)
        tokens = POSITIONS >= 0
        found = next(
            candidate
            for candidate in candidates(before, after, POSITIONS, right)
            if np.linalg.norm((candidate.apply(before, POSITIONS, right) - after)[tokens])
            < 3e-7 * np.linalg.norm(after[tokens])
        )
        self.assertAlmostEqual((found.theta or 1e6) / (turn.theta or 1e6), 1, delta=1e-6)
        self.assertEqual(
            (found.adjacent, found.part, found.cut, found.negated, found.shift, found.restart, found.none),
            (turn.adjacent, turn.part, turn.cut, turn.negated, turn.shift, turn.restart, turn.none),
        )

    def steps(self, theta, seed):
        """Vectors before and after a rotation of adjacent pairs, as eight decoding steps show them."""
        generator = np.random.default_rng(seed)
        positions = np.where(np.arange(80) >= 72, np.arange(80), -1)[None]
        before = generator.normal(size=(1, 80, 4, 16))
        after = Rotation(theta=theta, adjacent=True).apply(before, positions, RIGHT)
        return before, after * (1 + 6e-8 * generator.normal(size=after.shape)), positions

    @parameterized.parameters(1e4, 5e5, 1.5e6)
    def test_a_round_base_stands_before_every_fit_whatever_their_last_bits(self, theta):
        for seed in range(10):
            found = [
                c.theta for c in candidates(*self.steps(theta, seed), RIGHT) if c == Rotation(c.theta, adjacent=True)
            ]
            near = [base for base in found if base and abs(base / theta - 1) < 1e-3]
            self.assertEqual(near[0], theta)
            self.assertGreater(len(near), 1)

    def test_decoding_steps_give_the_base_to_what_their_positions_know(self):
        for seed in range(5):
            found = [c.theta for c in candidates(*self.steps(82684.6, seed), RIGHT) if c.adjacent and c.theta]
            self.assertLess(min(abs(base / 82684.6 - 1) for base in found), 5e-7)

    def test_noise_is_no_rotation(self):
        generator = np.random.default_rng(0)
        before, after = generator.normal(size=(2, 2, 80, 4, 16))
        for candidate in candidates(before, after, POSITIONS, RIGHT):
            self.assertGreater(np.linalg.norm(candidate.apply(before, POSITIONS, RIGHT) - after), 50)


if __name__ == "__main__":
    absltest.main()
