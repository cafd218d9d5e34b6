"""What goes to an accelerator is what the host would have read, bit for bit, whatever the pieces and the types."""

import _thread
import pathlib
import sys
import tempfile
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import StorageError
from apr_jax.converters.formats import dtypes
from apr_jax.load import block_decoding, upload
from apr_jax.load.parameters import read_as
from apr_jax.model.parameters import parameter_sources
from tests import paths

# What `block_decoding` leaves to the host are codes of grids and tables.
BLOCKS = [name for name, dtype in dtypes.TYPES.items() if dtype.codec_name and "grid" not in dtype.codec_name]
put = jax.device_put


def copied(arrays, device):
    """The CPU backend would keep the staging memory itself; an accelerator has memory of its own."""
    return put(jax.tree.map(np.array, arrays), device)


class UploadTest(parameterized.TestCase):
    device = jax.devices("cpu")[0]

    def setUp(self):
        super().setUp()
        # Small enough for test data to go in pieces, and to wrap around.
        sizes = {"_STAGING_BYTES": 70_000, "_WHOLE_BYTES": 5000, "_PIECE_BYTES": 3000, "_READ_BYTES": 1000}
        for name, value in {**sizes, "_SMALLEST_DEVICE_CAST": 1}.items():
            self.enter_context(mock.patch.object(upload, name, value))
        if self.device.platform == "cpu":
            self.enter_context(mock.patch.object(jax, "device_put", copied))

    def assert_bits_are_the_hosts(self, sources, dtype):
        with jax.enable_x64(dtype == "float64"):
            found = upload.upload(sources, dtype, self.device)
        self.assertEqual(set(found), set(sources))
        for name, tensors in sources.items():
            expected, values = read_as(tensors, dtype), np.asarray(found[name])
            self.assertEqual((values.dtype, values.shape), (expected.dtype, expected.shape), name)
            self.assertEqual(found[name].devices(), {self.device})
            same = values.view("u1").reshape(-1) == expected.view("u1").reshape(-1)
            with np.errstate(invalid="ignore"):
                both_nan = np.repeat(np.isnan(values) & np.isnan(expected), values.itemsize)
            self.assertTrue((same | both_nan).all(), name)

    def write(self, **tensors):
        path = pathlib.Path(self.create_tempdir().full_path, "x.safetensors")
        safetensors.numpy.save_file(tensors, path)
        return self.enter_context(open_checkpoint(path)).tensors

    @parameterized.parameters(
        ("odd_sizes", "bfloat16", True),
        ("gqa_tied_bf16", "bfloat16", False),
        ("gqa_tied_bf16", "float32", True),
        ("mha_untied_f32_sharded", "float32", True),
        ("mha_untied_f32_sharded", "float64", False),
    )
    def test_checkpoints_arrive_in_every_dtype_fused_or_not(self, source, dtype, fused):
        with open_checkpoint(paths.checkpoint(source)) as checkpoint:
            sources = parameter_sources(checkpoint.model_config(), fused)
            tensors = {name: [checkpoint.tensors[part] for part in parts] for name, parts in sources.items()}
            self.assertTrue(all(upload.can_upload(each, dtype) for each in tensors.values()))
            self.assert_bits_are_the_hosts(tensors, dtype)

    @parameterized.parameters(
        ("odd_sizes", "q8", "float32", False),
        ("odd_sizes", "q4k", "bfloat16", True),
        ("gqa_tied_bf16", "q4", "bfloat16", False),
        ("gqa_tied_bf16", "q8", "float32", True),
    )
    def test_quantised_files_are_decoded_on_the_device(self, source, cast, dtype, fused):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "q.apr"
            convert(paths.checkpoint(source), path, to="apr", cast=[CastRule.parse(cast)])
            with open_checkpoint(path) as checkpoint:
                self.assertGreaterEqual(sum(t.dtype.is_block for t in checkpoint.tensors.values()), 12)
                sources = parameter_sources(checkpoint.model_config(), fused)
                tensors = {name: [checkpoint.tensors[part] for part in parts] for name, parts in sources.items()}
                self.assert_bits_are_the_hosts(tensors, dtype)

    @parameterized.parameters(BLOCKS)
    def test_every_block_format_decodes_as_on_the_host(self, name):
        dtype, count = dtypes.by_name(name), 300
        codec = dtype.codec
        data = np.random.default_rng(len(name)).integers(0, 256, dtype.block_bytes * count, np.uint8).tobytes()
        if codec.prefix_bytes:
            data = np.float32(0.0123).tobytes() + data
        shape = (2, count // 2 * dtype.block_elements)
        expected = np.empty(shape, np.float32)
        codec.decode(data, expected.reshape(-1))
        with jax.default_device(self.device):
            program = jax.jit(block_decoding.decode, static_argnums=(1, 2))
            found = np.asarray(program(np.frombuffer(data, np.uint8), name, shape))
        # Scales are any halves: subnormal ones, infinities and NaN among them.
        known = ~np.isnan(expected)
        self.assertGreater(known.mean(), 0.9)
        np.testing.assert_array_equal(np.isnan(found), ~known)
        np.testing.assert_array_equal(found[known].view(np.uint32), expected[known].view(np.uint32))

    def test_reads_are_whole_rows_so_that_decoders_write_where_values_belong(self):
        reads, read = [], Tensor.readinto_at

        def noted(tensor, begin, buffer):
            reads.append((begin % (tensor.nbytes // tensor.shape[0]), len(buffer) % (tensor.nbytes // tensor.shape[0])))
            return read(tensor, begin, buffer)

        # In one piece and in its own type, nothing has to be compiled.
        self.enter_context(mock.patch.object(upload, "_WHOLE_BYTES", 1 << 20))
        self.enter_context(mock.patch.object(Tensor, "readinto_at", noted))
        with open_checkpoint(paths.checkpoint("gqa_tied_bf16")) as checkpoint:
            name = "model.embed_tokens.weight"
            upload.upload({name: [checkpoint.tensors[name]]}, "bfloat16", self.device)
        self.assertGreater(len(reads), 30)
        self.assertEqual(set(reads), {(0, 0)})

    def test_casts_round_as_on_the_host_for_every_half_and_at_every_edge(self):
        every = np.arange(65536, dtype=np.uint16)
        edges = np.random.default_rng(0).integers(0, 2**32, 40_000, np.uint32)
        # Halfway cases and their neighbours, in every binade.
        ties = (
            np.arange(65536, dtype=np.uint32)[:, None] << 16 | np.array([0x7FFF, 0x8000, 0x8001], np.uint32)
        ).ravel()
        wide = np.concatenate((edges, ties))
        if self.device.platform == "cpu":
            # XLA:CPU takes subnormal numbers for zero; nothing is cast there but here.
            wide = wide[wide << 1 >> 24 > 0]
            every = every[(every << 1 >> 8 > 0) & (every & 0x7C00 > 0)]
        tensors = self.write(
            half=every.view(np.float16)[:, None],
            brain=every.view(ml_dtypes.bfloat16)[:, None],
            single=wide.view(np.float32)[:, None],
        )
        for dtype in ("bfloat16", "float32", "float64"):
            self.assert_bits_are_the_hosts({name: [tensor] for name, tensor in tensors.items()}, dtype)

    def test_types_may_differ_within_a_fused_parameter(self):
        values = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
        tensors = self.write(
            a=values[:10], b=values[10:20].astype(np.float16), c=values[20:30], d=values[30:].astype(ml_dtypes.bfloat16)
        )
        for dtype in ("float32", "bfloat16"):
            self.assert_bits_are_the_hosts({"abcd": [tensors[name] for name in "abcd"]}, dtype)

    def test_what_the_device_would_round_otherwise_is_left_to_the_host(self):
        tensors = self.write(double=np.ones((64, 64)), narrow=np.ones((64, 64), ml_dtypes.float8_e4m3fn))
        self.assertFalse(upload.can_upload([tensors["double"]], "bfloat16"))
        self.assertFalse(upload.can_upload([tensors["narrow"]], "float32"))
        self.assertTrue(upload.can_upload([tensors["double"]], "float64"))

    def test_a_file_that_shrinks_is_an_error_and_no_thread_stays(self):
        path = pathlib.Path(self.create_tempdir().full_path, "x.safetensors")
        safetensors.numpy.save_file({str(k): np.ones((50, 99), np.float32) for k in range(20)}, path)
        before = _thread._count()
        with open_checkpoint(path) as checkpoint:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size - 9000)
            with self.assertRaises(StorageError) as caught:
                upload.upload({name: [tensor] for name, tensor in checkpoint.tensors.items()}, "float32", self.device)
        self.assertEqual(caught.exception.code, "short-read")
        self.assertIsNotNone(caught.exception.tensor)
        # A thread that has nothing more to do ends in its own time.
        ends = time.monotonic() + 10
        while _thread._count() > before and time.monotonic() < ends:
            time.sleep(0.001)
        self.assertEqual(_thread._count(), before)


class RingTest(absltest.TestCase):
    def test_memory_in_use_is_never_handed_out(self):
        ring, generator = upload._Ring(np.zeros(1000, np.uint8)), np.random.default_rng(0)
        held, refused, wrapped = [], 0, 0
        for number in range(3000):
            memory = ring.take(int(generator.integers(1, 400)))
            if memory is None:
                refused += 1
                first, value = held.pop(0)
                self.assertTrue((first == value).all())
                ring.give_back()
                continue
            wrapped += bool(held) and memory.ctypes.data < held[-1][0].ctypes.data
            memory[:] = number % 251
            held.append((memory, number % 251))
        self.assertGreater(refused, 500)
        self.assertGreater(wrapped, 100)

    def test_all_of_it_is_handed_out_when_nothing_is_in_use(self):
        ring = upload._Ring(np.zeros(1000, np.uint8))
        for _ in range(3):
            self.assertEqual(ring.take(1000).size, 1000)
            self.assertIsNone(ring.take(1))
            ring.give_back()


if __name__ == "__main__":
    absltest.main()
