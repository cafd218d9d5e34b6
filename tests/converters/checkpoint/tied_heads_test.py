"""When a head is taken for a copy of the embedding."""

import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import tied_heads
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.tensor import Tensor
from tests.paths import DATA

VALUES = np.array([[0.5, -2.0, 0.0], [1.0, np.inf, 3.0]], np.float32)


class SameValuesTest(parameterized.TestCase):
    def same(self, a: np.ndarray, b: np.ndarray) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "x.safetensors"
            safetensors.numpy.save_file({"a": a, "b": b}, path)
            with open_checkpoint(path) as opened:
                found = [tied_heads.same_values(opened.tensors[x], opened.tensors[y]) for x, y in ("ab", "ba")]
        self.assertEqual(found[0], found[1])
        return found[0]

    @parameterized.product(
        a=[np.float32, np.float16, ml_dtypes.bfloat16, np.float64], b=[np.float32, np.float16, ml_dtypes.bfloat16]
    )
    def test_values_that_both_types_hold_are_the_same(self, a, b):
        self.assertTrue(self.same(VALUES.astype(a), VALUES.astype(b)))
        other = VALUES.copy()
        other[-1, -1] = 4
        self.assertFalse(self.same(VALUES.astype(a), other.astype(b)))

    def test_rounding_signs_of_zero_and_nan(self):
        self.assertFalse(self.same(np.array([1.001], np.float32), np.array([1.001], np.float16)))
        self.assertFalse(self.same(np.array([0.0], np.float32), np.array([-0.0], np.float16)))
        self.assertTrue(self.same(np.array([np.nan], np.float32), np.array([np.nan], np.float16)))
        self.assertFalse(self.same(np.array([np.nan], np.float32), np.array([-np.nan], np.float16)))

    def test_shape_and_kind_count(self):
        self.assertFalse(self.same(VALUES, VALUES.reshape(3, 2)))
        self.assertFalse(self.same(VALUES, VALUES.reshape(3, 2).astype(np.float16)))
        self.assertFalse(self.same(np.ones(2, np.int32), np.ones(2, np.float32)))
        self.assertTrue(self.same(np.ones(2, np.int32), np.ones(2, np.int32)))
        for shape in ((), (0, 3), (3, 0)):
            self.assertTrue(self.same(np.ones(shape, np.float32), np.ones(shape, np.float16)))

    def test_a_difference_beyond_the_first_part_is_found_and_one_in_it_ends_the_reading(self):
        a = np.arange(4096, dtype=np.float64).reshape(1024, 4) % 64
        late, early = a.astype(np.float16), a.astype(np.float16)
        late[-1, -1] += 1
        early[0, 0] += 1
        with mock.patch.object(tied_heads, "_COMPARED_BYTES", 8192):
            self.assertTrue(self.same(a, a.astype(np.float16)))
            self.assertFalse(self.same(a, late))
            with mock.patch.object(Tensor, "read", autospec=True, side_effect=Tensor.read) as read:
                self.assertFalse(self.same(a, early))
            self.assertEqual(read.call_count, 4)

    def test_quantised_values_are_compared_as_they_decode(self):
        with open_checkpoint(DATA / "apr" / "tiny_f32_tied-int8.apr") as opened:
            name, tensor = next((n, t) for n, t in opened.tensors.items() if t.dtype.name == "apr_q8")
            decoded = tensor.read()
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "x.safetensors"
                other = decoded.copy()
                other.reshape(-1)[-1] += 1
                safetensors.numpy.save_file({name: decoded, "other": other}, path)
                with open_checkpoint(path) as plain:
                    self.assertTrue(tied_heads.same_values(tensor, plain.tensors[name]))
                    self.assertFalse(tied_heads.same_values(tensor, plain.tensors["other"]))


if __name__ == "__main__":
    absltest.main()
