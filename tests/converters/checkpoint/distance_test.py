"""Sums over two tensors; the comparison's tests cover the distances themselves."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest

from apr_jax.converters.checkpoint import distance
from apr_jax.converters.checkpoint.distance import Sums
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert


class SumsTest(absltest.TestCase):
    def test_nothing_compared_is_no_distance(self):
        self.assertEqual((Sums().relative_l2, Sums().cosine), (0.0, 1.0))

    def test_all_but_the_largest_difference_adds_up(self):
        one, two = Sums(5, 2, 1, 9.0, 8.0, 7.0, 1.0, 0.5), Sums(6, 3, 0, 1.0, 2.0, 3.0, 4.0, 0.25)
        self.assertEqual(one + two, Sums(11, 5, 1, 10.0, 10.0, 10.0, 5.0, 0.5))
        self.assertEqual(one, Sums(5, 2, 1, 9.0, 8.0, 7.0, 1.0, 0.5))


class ComplexTest(absltest.TestCase):
    def test_complex_numbers_are_their_two_parts(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        a, b = np.array([1 + 2j, 3 - 4j, 5], np.complex64), np.array([1 + 2j, 3 - 3j, 7], np.complex64)
        for name, values in (("a", a), ("b", b)):
            write(folder / f"{name}.safetensors", values)
        with open_checkpoint(folder / "a.safetensors") as one, open_checkpoint(folder / "b.safetensors") as other:
            sums = distance.measure_range(one.tensors["x"], other.tensors["x"], 0, 3)
        self.assertEqual((sums.elements, sums.differing, sums.dd, sums.max_abs), (6, 2, 5.0, 2.0))


def write(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes complex numbers, which the safetensors package does not for numpy."""
    entry = {"dtype": "C64", "shape": list(values.shape), "data_offsets": [0, values.nbytes]}
    header = json.dumps({"x": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())


class RangesTest(absltest.TestCase):
    def test_parts_are_small_and_end_with_the_rows_that_a_type_pads(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        values = np.random.default_rng(0).normal(size=(900, 300)).astype(np.float32)
        safetensors.numpy.save_file({"a": values}, folder / "a.safetensors")
        convert(folder / "a.safetensors", folder / "b.apr", to="apr", cast=[CastRule.parse("q4k")])
        with open_checkpoint(folder / "a.safetensors") as plain, open_checkpoint(folder / "b.apr") as quantised:
            a, b = plain.tensors["a"], quantised.tensors["a"]
            expected = float(np.square(b.read().astype(np.float64) - values).sum())
            for pair in ((a, b), (b, a)):
                parts = list(distance.ranges(*pair))
                self.assertEqual([0, *(end for _, end in parts)], [*(begin for begin, _ in parts), values.size])
                self.assertLessEqual(max(end - begin for begin, end in parts), 1 << 17)
                sums = sum((distance.measure_range(*pair, *part) for part in parts), Sums())
                self.assertEqual(sums.elements, values.size)
                self.assertAlmostEqual(sums.dd, expected, delta=1e-5 * expected)


if __name__ == "__main__":
    absltest.main()
