"""Sums over two tensors; the comparison's tests cover the distances themselves."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest

from apr_jax.converters.checkpoint.distance import Sums


class SumsTest(absltest.TestCase):
    def test_nothing_compared_is_no_distance(self):
        self.assertEqual((Sums().relative_l2, Sums().cosine), (0.0, 1.0))

    def test_all_but_the_largest_difference_adds_up(self):
        one, two = Sums(5, 2, 1, 9.0, 8.0, 7.0, 1.0, 0.5), Sums(6, 3, 0, 1.0, 2.0, 3.0, 4.0, 0.25)
        self.assertEqual(one + two, Sums(11, 5, 1, 10.0, 10.0, 10.0, 5.0, 0.5))
        self.assertEqual(one, Sums(5, 2, 1, 9.0, 8.0, 7.0, 1.0, 0.5))


if __name__ == "__main__":
    absltest.main()
