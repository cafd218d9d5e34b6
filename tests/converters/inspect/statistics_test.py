"""Streamed statistics against NumPy on the whole array, for every type whose values can be read."""

import json
import pathlib
import sys
import tempfile
import tracemalloc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.formats import dtypes
from apr_jax.converters.inspect import statistics
from apr_jax.converters.storage.source import SourceFile
from tests.paths import DATA, NAMES, checkpoint

FLOATS = ("bf16", "f16", "f32", "f64", "f8_e4m3", "f8_e5m2", "f8_e5m2fnuz", "f8_e4m3fnuz")
INTEGERS = ("i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64")


class StatisticsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def tensor(self, values, dtype, shape=None, offset=0):
        """A tensor of these values in a file of its own, at a byte that need not be aligned."""
        path = self.folder / "data"
        data = bytes(offset) + values.tobytes()
        path.write_bytes(data)
        source = SourceFile(path)
        self.addCleanup(source.close)
        return Tensor(
            "x", dtypes.by_name(dtype), values.shape if shape is None else shape, values.nbytes, source, offset
        )

    def measure(self, values, dtype, **where):
        return statistics.measure(self.tensor(values, dtype, **where))

    def assert_is_what_numpy_says(self, found, values):
        wide = np.asarray(values).astype(np.float64)
        finite = wide[np.isfinite(wide)]
        self.assertEqual(found.count, wide.size)
        self.assertEqual(found.nans, np.isnan(wide).sum())
        self.assertEqual(found.infs, np.isinf(wide).sum())
        self.assertEqual(found.zeros, (wide == 0).sum())
        self.assertEqual((found.minimum, found.maximum), (finite.min(), finite.max()))
        scale = np.abs(finite).max()
        np.testing.assert_allclose(found.mean, finite.mean(), rtol=1e-12, atol=1e-14 * scale)
        np.testing.assert_allclose(found.std, finite.std(), rtol=1e-11, atol=1e-14 * scale)
        np.testing.assert_allclose(found.l2, np.sqrt(np.square(finite).sum()), rtol=1e-12)
        magnitudes = np.abs(finite)
        self.assertEqual(round(found.relabel_share * found.count), ((magnitudes >= 0.5) & (magnitudes < 4)).sum())
        self.assertEqual(round(found.tiny_share * found.count), ((magnitudes > 0) & (magnitudes < 2.0**-20)).sum())
        octaves = np.floor(np.log2(magnitudes[magnitudes > 0])).clip(
            statistics.LOWEST_OCTAVE, statistics.HIGHEST_OCTAVE
        )
        self.assertEqual(found.histogram, tuple((octaves == octave).sum() for octave in statistics.OCTAVES))
        self.assertEqual(sum(found.histogram) + found.zeros + found.nans + found.infs, found.count)

    @parameterized.parameters(*FLOATS)
    def test_every_float_type_with_nan_inf_zeros_and_subnormals(self, dtype):
        generator = np.random.default_rng(1)
        target = dtypes.by_name(dtype).numpy
        with np.errstate(all="ignore"):
            values = (generator.standard_normal((700, 900)) * 0.6).astype(target)
            values.reshape(-1)[::97] = 0
            values.reshape(-1)[::101] = np.array(-0.0).astype(target)
            values.reshape(-1)[5:9] = np.array([np.nan, -np.nan, np.inf, -np.inf]).astype(target)
            values.reshape(-1)[20:24] = np.array([1e-7, -1e-7, 3e-8, 1e-40]).astype(target)
            values[13] = 0
        found = self.measure(values, dtype, offset=3)
        self.assert_is_what_numpy_says(found, values)
        self.assertEqual((found.rows, found.dead_rows), (700, 1))
        self.assertGreater(found.zeros, 900)

    @parameterized.parameters(*INTEGERS)
    def test_every_integer_type(self, dtype):
        limits = np.iinfo(dtypes.by_name(dtype).numpy)
        values = np.random.default_rng(2).integers(limits.min, limits.max, (300, 1000), limits.dtype, endpoint=True)
        values[0, :5] = 0
        self.assert_is_what_numpy_says(self.measure(values, dtype), values)

    def test_bool_and_a_bool_that_is_neither(self):
        values = np.random.default_rng(3).random(100_000) < 0.3
        found = self.measure(values, "bool")
        self.assertEqual((found.zeros, found.maximum), ((~values).sum(), 1.0))
        np.testing.assert_allclose(found.mean, values.mean())
        with self.assertRaises(BrokenContainerError) as caught:
            self.measure(np.array([0, 1, 2], np.uint8), "bool")
        self.assertEqual((caught.exception.code, caught.exception.tensor), ("bool-value", "x"))

    @parameterized.parameters("f32", "bf16", "f16", "f64")
    def test_every_bit_pattern_of_a_type_of_two_bytes_and_a_sample_of_wider_ones(self, dtype):
        width = dtypes.by_name(dtype).numpy.itemsize
        if width == 2:
            values = np.arange(1 << 16, dtype=np.uint16).view(dtypes.by_name(dtype).numpy)
        else:
            values = np.random.default_rng(4).bytes(width << 18)
            values = np.frombuffer(values, dtypes.by_name(dtype).numpy)
            # Squares of the largest f64 overflow in NumPy too.
            values = np.where(np.abs(values) > 1e150, 1.0, values).astype(values.dtype) if dtype == "f64" else values
        with np.errstate(all="ignore"):
            self.assert_is_what_numpy_says(self.measure(values, dtype), values)

    def test_a_small_deviation_about_a_large_mean_is_not_cancelled(self):
        values = (1e6 + np.random.default_rng(5).standard_normal(3_000_000)).astype(np.float32)
        found = self.measure(values, "f32")
        np.testing.assert_allclose(found.std, values.astype(np.float64).std(), rtol=1e-10)
        with np.errstate(invalid="ignore"):
            naive = float(np.sqrt(np.square(values).mean() - values.mean() ** 2))
        self.assertFalse(abs(naive - found.std) < 1e-3, "the values do not tell the methods apart")

    @parameterized.product(width=(1, 2, 3, 896, 4864, 262_144, 300_000, 1_000_003), dtype=("bf16", "f32"))
    def test_dead_rows_wherever_rows_and_chunks_end(self, width, dtype):
        generator = np.random.default_rng(width)
        rows = max(3, 1_500_000 // width)
        alive = generator.random(rows) < 0.7
        values = np.zeros((rows, width), dtypes.by_name(dtype).numpy)
        # One value is enough, at the beginning, in the middle, at the end, or anywhere.
        columns = generator.choice([0, width // 2, width - 1, int(generator.integers(width))], rows)
        values[np.arange(rows)[alive], columns[alive]] = 1e-3
        values[~alive] *= np.array(-1, values.dtype)
        found = self.measure(values, dtype)
        self.assertEqual((found.rows, found.dead_rows), (rows, int((~alive).sum())))
        self.assertEqual(found.zeros, values.size - int(alive.sum()))

    @parameterized.parameters("bf16", "f32", "u8")
    def test_the_one_dead_row_of_a_dense_matrix_that_chunks_cut_in_two(self, dtype):
        values = np.ones((2000, 997), dtypes.by_name(dtype).numpy)
        cut = statistics._CHUNK_BYTES // values.itemsize
        self.assertNotEqual(cut % 997, 0)
        values[cut // 997] = 0
        self.assertEqual(self.measure(values, dtype).dead_rows, 1)
        # One value before the cut, or after it, keeps the row alive.
        for column in (0, 996):
            values[cut // 997, column] = 1
            self.assertEqual(self.measure(values, dtype).dead_rows, 0)
            values[cut // 997, column] = 0

    def test_rows_are_those_of_the_last_axis_and_vectors_have_none(self):
        values = np.ones((3, 4, 5), np.float32)
        values[1, 2] = 0
        self.assertEqual(self.measure(values, "f32").dead_rows, 1)
        self.assertEqual(self.measure(values, "f32").rows, 12)
        self.assertEqual(self.measure(values[1, 2], "f32").rows, 0)
        self.assertEqual(self.measure(np.float32(7).reshape(()), "f32").mean, 7.0)

    @parameterized.parameters((0,), (0, 3), (3, 0))
    def test_no_elements(self, *shape):
        for dtype in ("bf16", "f32"):
            values = np.zeros(shape, dtypes.by_name(dtype).numpy)
            found = self.measure(values, dtype)
            self.assertEqual((found.count, found.dead_rows, sum(found.histogram)), (0, 0, 0))
            self.assertTrue(np.isnan([found.mean, found.std, found.minimum, found.maximum]).all())
            self.assertIsNone(found.to_json()["mean"])

    def test_nothing_finite(self):
        for dtype in ("bf16", "f32"):
            values = np.array([np.nan, np.inf, -np.inf]).astype(dtypes.by_name(dtype).numpy)
            found = self.measure(values, dtype)
            self.assertEqual((found.count, found.nans, found.infs, found.zeros), (3, 1, 2, 0))
            self.assertTrue(np.isnan(found.std))
            json.dumps(found.to_json(), allow_nan=False)

    @parameterized.parameters("c64", "f4", "f6_e2m3")
    def test_what_has_no_real_values_that_can_be_read_is_refused(self, dtype):
        values = np.zeros(48, np.uint8)
        with self.assertRaises(RefusedError) as caught:
            self.measure(values, dtype, shape=(dtypes.by_name(dtype).block_elements,))
        self.assertEqual(caught.exception.code, "dtype-not-decoded")

    def test_a_bf16_matrix_read_as_f16_and_the_reverse_are_far_from_every_genuine_one(self):
        compared = 0
        for name in NAMES:
            with open_checkpoint(checkpoint(name)) as opened:
                for tensor in opened.tensors.values():
                    if len(tensor.shape) < 2:
                        continue
                    genuine = statistics.measure(tensor)
                    values = tensor.read().astype(np.float32)
                    as_f16 = self.measure(values.astype(ml_dtypes.bfloat16), "f16")
                    as_bf16 = self.measure(values.astype(np.float16), "bf16")
                    self.assertLess(genuine.relabel_share, 0.05)
                    self.assertLess(genuine.tiny_share, 0.01)
                    self.assertGreaterEqual(as_f16.relabel_share, 0.995)
                    self.assertGreater(as_f16.std, 0.9)
                    self.assertGreater(as_bf16.tiny_share, 0.9)
                    self.assertLess(as_bf16.std, 1e-4)
                    compared += 1
        self.assertGreaterEqual(compared, 7 * 15)

    @parameterized.parameters("tiny_f32_tied-int8.apr", "tiny_bf16_tied-int4.apr")
    def test_quantised_tensors_are_measured_by_their_values(self, name):
        with open_checkpoint(DATA / "apr" / name) as opened:
            quantised = [tensor for tensor in opened.tensors.values() if tensor.dtype.is_block]
            for tensor in quantised:
                self.assert_is_what_numpy_says(statistics.measure(tensor), tensor.read())
        self.assertGreater(len(quantised), 10)

    def test_large_quantised_tensors_are_cut_into_parts_that_cover_them(self):
        for shape in (
            (),
            (5,),
            (700_000,),
            (3, 4),
            (3, 300_000),
            (1, 1, 700_001),
            (1000, 700),
            (2, 3, 100_000),
            (0, 4),
        ):
            values = np.zeros(shape, np.int8)
            for part in statistics._parts(shape):
                self.assertLessEqual(values[part].size, statistics._CHUNK_ELEMENTS)
                values[part] += 1
            self.assertTrue((values == 1).all(), shape)

    def test_memory_is_constant(self):
        peaks = []
        for count in (2 << 20, 16 << 20):
            tensor = self.tensor(np.ones(count, np.float16), "f16", shape=(1024, count // 1024))
            statistics.measure(tensor)
            tracemalloc.start()
            statistics.measure(tensor)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        self.assertLess(peaks[1], 1.2 * peaks[0])
        self.assertLess(peaks[1], 24 << 20)

    def test_progress_adds_up_to_the_bytes(self):
        seen = []
        tensor = self.tensor(np.ones(3_000_001, np.uint8), "u8")
        statistics.measure(tensor, seen.append)
        self.assertEqual(sum(seen), tensor.nbytes)


if __name__ == "__main__":
    absltest.main()
