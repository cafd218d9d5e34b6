"""Parts of tensors: the values of the whole, cut; and of the file no more than the part consists of."""

import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import part
from apr_jax.converters.checkpoint.decoded import DecodedTensor
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.packed_forms import dense_view
from apr_jax.converters.checkpoint.part import part_of
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.formats import dtypes
from apr_jax.converters.storage.source import SourceFile
from tests import paths

DECODED = sorted(name for name, dtype in dtypes.TYPES.items() if dtype.codec_name)
PLAIN = ["f32", "bf16", "f16", "f64", "i8"]
# What is cut of 12 rows of 1024 columns, and what part of the bytes that is where no block lies across the cut.
CUTS = {
    "rows": ((slice(3, 9), slice(None)), 0.5),
    "columns": ((slice(None), slice(256, 512)), 0.25),
    "last columns": ((slice(None), slice(768, 1024)), 0.25),
    "both": ((slice(6, 12), slice(0, 512)), 0.25),
    "all": ((slice(None), slice(0, 1024)), 1.0),
    "nothing": ((slice(4, 4), slice(None)), 0.0),
}


class PartTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def tensor(self, name, shape, layout=0) -> Tensor:
        """A tensor of random bytes behind some that are not its own; `layout` numbers the sizes that it may have."""
        dtype = dtypes.by_name(name)
        nbytes = dtype.sizes(shape)[layout]
        path = self.folder / "tensor.bin"
        path.write_bytes(b"before!" + np.random.default_rng(1).bytes(nbytes))
        source = self.enter_context(SourceFile(path))
        return Tensor("t", dtype, shape, nbytes, source, 7)

    def assert_is(self, tensor, slices, share=None):
        with np.errstate(all="ignore"):
            whole = tensor.read()[tuple(slices)]
            before = tensor.source.bytes_read
            found = part_of(tensor, slices)
            values = found.read()
            read = tensor.source.bytes_read - before
            again = np.frombuffer(found.raw(), np.uint8).tobytes()
        self.assertEqual((found.shape, values.shape), (whole.shape, whole.shape))
        self.assertEqual(values.tobytes(), np.ascontiguousarray(whole).tobytes())
        # In pieces of any size the same bytes come out.
        some = bytearray(found.nbytes)
        for begin in range(0, found.nbytes, 1000):
            found.readinto_at(begin, memoryview(some)[begin : begin + 1000])
        self.assertEqual(bytes(some), again)
        if share is not None:
            # A scale of the whole tensor goes with each read of a part.
            self.assertLessEqual(read, share * tensor.nbytes + 32)
            self.assertGreaterEqual(read, share * (tensor.nbytes - 4))

    @parameterized.product(name=PLAIN + DECODED, cut=list(CUTS))
    def test_a_part_is_the_whole_cut(self, name, cut):
        slices, share = CUTS[cut]
        with mock.patch.object(part, "_GAP_BYTES", 0):
            self.assert_is(self.tensor(name, (12, 1024)), slices, share)

    @parameterized.parameters("bf16", "q4_k", "apr_q8")
    def test_small_gaps_are_read_with_the_pieces(self, name):
        tensor = self.tensor(name, (300, 1024))
        self.assert_is(tensor, (slice(50, 300), slice(512, 768)))
        with mock.patch.object(part, "_SCRATCH_BYTES", 20_000):
            self.assert_is(tensor, (slice(50, 300), slice(512, 1024)))

    @parameterized.product(name=DECODED, columns=(33, 300), layout=(0, -1))
    def test_blocks_that_lie_across_a_cut_are_decoded(self, name, columns, layout):
        if not dtypes.by_name(name).sizes((7, columns)):
            return
        tensor = self.tensor(name, (7, columns), layout)
        for slices in (
            (slice(2, 5), slice(None)),
            (slice(None), slice(11, 20)),
            (slice(1, 7), slice(columns - 5, None)),
        ):
            self.assert_is(tensor, slices)

    def test_rows_that_are_padded_to_blocks_are_cut_at_blocks(self):
        tensor = self.tensor("q6_k", (5, 600), -1)
        self.assert_is(tensor, (slice(1, 3), slice(None)), 2 / 5)
        with mock.patch.object(part, "_GAP_BYTES", 0):
            self.assert_is(tensor, (slice(None), slice(256, 600)), 2 / 3)

    @parameterized.parameters("f32", "bf16", "q8_0", "q4_k", "apr_q8")
    def test_vectors(self, name):
        tensor = self.tensor(name, (1024,))
        self.assert_is(tensor, (slice(256, 512),), 0.25)
        self.assert_is(tensor, (slice(250, 1024),))

    def test_what_is_computed_from_others_is_cut_behind_the_computation(self):
        seen = 0
        for path in sorted((paths.DATA / "packed").glob("*.safetensors"))[:3]:
            with open_checkpoint(path, ignore_config=()) as opened:
                view = dense_view(opened)
                for tensor in view.tensors.values():
                    if tensor not in opened.tensors.values() and len(tensor.shape) == 2:
                        rows, columns = tensor.shape
                        self.assert_is(tensor, (slice(rows // 2, None), slice(None)))
                        self.assert_is(tensor, (slice(None), slice(columns // 2)))
                        # Not row by row: a decoder has much to prepare.
                        read = DecodedTensor.readinto_at
                        with (
                            mock.patch.object(part, "_GAP_BYTES", 0),
                            mock.patch.object(DecodedTensor, "readinto_at", autospec=True, side_effect=read) as calls,
                        ):
                            part_of(tensor, (slice(None), slice(columns // 2))).read()
                        self.assertLess(calls.call_count, 3)
                        seen += 1
        self.assertGreater(seen, 0)


if __name__ == "__main__":
    absltest.main()
