"""Products with narrow weights against NumPy's float64: every form, odd sizes, numbers that are none, many at once."""

import os
import pathlib
import subprocess
import sys
import warnings
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip("numba")

from apr_jax.converters.formats import codecs
from apr_jax.cpu import custom_call, products
from apr_jax.cpu.rows import BFLOAT16 as BFLOAT16_FORM
from apr_jax.cpu.rows import FLOAT16, Q4_K, SCALED_INT8
from tests import paths

BFLOAT16 = ml_dtypes.bfloat16
# Rounding of n float32 additions in any order, relative to the sum of magnitudes, with room for none.
UNIT = 2.0**-24


def numbers(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(dtype)


def stored(form, outputs, columns, seed):
    """Returns a weight's bytes as a program holds them, and its values in float64."""
    if form in (BFLOAT16_FORM, FLOAT16):
        weight = numbers((outputs, columns), seed, BFLOAT16 if form == BFLOAT16_FORM else np.float16)
        return weight, weight.astype(np.float64)
    if form == SCALED_INT8:
        levels = np.random.default_rng(seed).integers(-128, 128, (outputs, columns)).astype(np.int8)
        scales = np.linspace(0.5, 2, outputs, dtype=np.float32)[:, None]
        return np.hstack((scales.view(np.int8), levels)), scales.astype(np.float64) * levels
    padded = -(-columns // 256) * 256
    codec, values = codecs.Q4_K(), numbers((outputs, padded), seed)
    blocks = codec.encode(values.reshape(-1))
    decoded = np.empty(outputs * padded, np.float32)
    codec.decode(blocks, decoded)
    weight = np.frombuffer(blocks, np.uint8).reshape(outputs, -1)
    return weight, decoded.reshape(outputs, padded)[:, :columns].astype(np.float64)


@jax.jit
def bfloat16_products(weights, x):
    return [products.product(x, weight) for weight in weights]


def product(form, weight, x):
    custom_call.register()
    result = jax.ShapeDtypeStruct((len(x), len(weight)), np.float32)
    return np.asarray(jax.ffi.ffi_call(custom_call.TARGET, result)(weight, x, form=np.int64(form)))


class ProductTest(parameterized.TestCase):
    def assert_right(self, found, x, values):
        wide = x.astype(np.float64)
        bound = (x.shape[1] + 8) * UNIT * (np.abs(wide) @ np.abs(values).T)
        self.assertEqual(found.dtype, np.float32)
        np.testing.assert_array_less(np.abs(found - wide @ values.T), bound + 1e-30)

    @parameterized.product(
        form=(BFLOAT16_FORM, FLOAT16, SCALED_INT8, Q4_K),
        columns=(1, 7, 15, 16, 17, 63, 65, 255, 257, 511, 513, 896, 1030),
        vectors=(1, 3, 4, 6),
    )
    def test_every_column_counts_once(self, form, columns, vectors):
        weight, values = stored(form, 37, columns, seed=columns)
        x = numbers((vectors, columns), seed=1)
        self.assert_right(product(form, weight, x), x, values)

    @parameterized.product(form=(BFLOAT16_FORM, Q4_K), vectors=(1, 2, 5, 8, 13, 32, 33), outputs=(1, 15, 16, 18, 300))
    def test_every_row_and_vector_is_computed(self, form, vectors, outputs):
        weight, values = stored(form, outputs, 80, seed=outputs)
        x = numbers((vectors, 80), seed=2)
        self.assert_right(product(form, weight, x), x, values)

    @parameterized.parameters(1, 5)
    def test_pieces_of_a_large_weight_meet(self, vectors):
        weight, values = stored(BFLOAT16_FORM, 5003, 130, seed=0)
        x = numbers((vectors, 130), seed=3)
        self.assert_right(product(BFLOAT16_FORM, weight, x), x, values)

    @parameterized.product(dtype=(BFLOAT16, np.float16), vectors=(1, 4))
    def test_every_number_of_16_bits_is_widened_exactly(self, dtype, vectors):
        weight = np.arange(1 << 16, dtype=np.uint16).view(dtype)[:, None]
        x = np.ones((vectors, 1), np.float32)
        found = np.asarray(products.product(jnp.asarray(x), jnp.asarray(weight)))
        values = weight[:, 0].astype(np.float32)
        # XLA's threads take float32's subnormal numbers for zero, which some of bfloat16 are and none of float16.
        values = np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values)
        for row in found:
            np.testing.assert_array_equal(row, values)

    @parameterized.product(special=(np.nan, np.inf, -np.inf), vectors=(1, 4), column=(3, 40, 69))
    def test_what_is_no_number_stays_in_its_row_and_its_vector(self, special, vectors, column):
        weight, x = numbers((20, 70), 4, BFLOAT16), numbers((vectors, 70), 5)
        weight[11, column] = special
        found = np.asarray(products.product(jnp.asarray(x), jnp.asarray(weight)))
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        np.testing.assert_array_equal(found[:, 11], expected[:, 11].astype(np.float32))
        self.assertTrue(np.isfinite(np.delete(found, 11, axis=1)).all())
        x[0, column] = special
        found = np.asarray(products.product(jnp.asarray(x), jnp.asarray(np.abs(weight))))
        self.assertFalse(np.isfinite(found[0]).any())

    def test_products_that_run_at_once_do_not_meet(self):
        weights = [numbers((400 + i, 96), i, BFLOAT16) for i in range(24)]
        x = numbers((2, 96), 6)
        for _ in range(20):
            for weight, found in zip(weights, bfloat16_products(weights, x), strict=True):
                self.assert_right(np.asarray(found), x, weight.astype(np.float64))

    def test_a_product_is_the_same_bits_each_time_and_beside_any_rows(self):
        weight, x = numbers((1001, 896), 7, BFLOAT16), numbers((9, 896), 8)
        whole = product(BFLOAT16_FORM, weight, x)
        for _ in range(50):
            np.testing.assert_array_equal(product(BFLOAT16_FORM, weight, x), whole)
        np.testing.assert_array_equal(product(BFLOAT16_FORM, weight[10:30], x), whole[:, 10:30])


class AvailableTest(absltest.TestCase):
    def setUp(self):
        products.available.cache_clear()
        self.addCleanup(products.available.cache_clear)

    def test_it_is_here(self):
        self.assertTrue(products.available())
        self.assertIn("numba", products.engine())

    def test_the_switch_turns_it_off(self):
        with mock.patch.dict("os.environ", {products.SWITCH: "off"}):
            self.assertFalse(products.available())
            self.assertEqual(products.engine(), "XLA")
            self.assertFalse(products.supports(jnp.ones((1, 2)), jnp.ones((2, 2), jnp.bfloat16)))

    def test_without_numba_it_is_off(self):
        with mock.patch("importlib.util.find_spec", return_value=None):
            self.assertFalse(products.available())

    def test_an_interface_that_has_changed_is_warned_of_and_leaves_the_plain_operations(self):
        with mock.patch.object(custom_call, "TARGET", "nobody"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.assertFalse(products.available())
        self.assertIn("plain operations remain", str(caught[0].message))

    def test_a_kernel_that_computes_something_else_is_not_used(self):
        wrong = mock.patch.object(products, "product", return_value=np.zeros((5, 2)))
        with wrong, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.assertFalse(products.available())
        self.assertIn("plain operations remain", str(caught[0].message))


@pytest.mark.slow
class OtherProcessorsTest(absltest.TestCase):
    """The same tests where numba compiles for a processor with AVX2 and not AVX-512."""

    def test_vectors_of_256_bits(self):
        processor = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL}
        environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), **processor}
        command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "ProductTest"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stdout[-2000:])


HASWELL = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"


if __name__ == "__main__":
    absltest.main()
