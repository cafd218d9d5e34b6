"""CRC-32 against zlib, and the combination of two against the CRC of the whole."""

import importlib
import random
import sys
import zlib
from unittest import mock

from absl.testing import absltest, parameterized

from apr_jax.converters.storage import crc


class CrcTest(parameterized.TestCase):
    def test_is_the_crc_of_zlib_for_every_kind_of_buffer(self):
        data = random.Random(0).randbytes(10_007)
        for buffer in (data, bytearray(data), memoryview(data)):
            self.assertEqual(crc.crc32(buffer), zlib.crc32(data))
        self.assertEqual(crc.crc32(data[5000:], crc.crc32(data[:5000])), zlib.crc32(data))
        self.assertEqual(crc.crc32(b"123456789"), 0xCBF43926)

    def test_without_isal_zlib_serves(self):
        try:
            with mock.patch.dict(sys.modules, {"isal": None, "isal.isal_zlib": None}):
                importlib.reload(crc)
                self.assertIs(crc._crc32, zlib.crc32)
                self.assertEqual(crc.crc32(b"123456789"), 0xCBF43926)
        finally:
            importlib.reload(crc)

    @parameterized.parameters(0, 1, 2, 63, 64, 65, 4096, 1_000_003)
    def test_combination_is_the_crc_of_the_whole(self, length):
        a, b = random.Random(1).randbytes(1000), random.Random(2).randbytes(length)
        self.assertEqual(crc.crc32_combine(zlib.crc32(a), zlib.crc32(b), length), zlib.crc32(a + b))

    def test_combination_takes_lengths_beyond_4_gib(self):
        # Five parts of 1 GiB of zeros, from the CRC of one.
        part = zlib.crc32(bytes(1 << 20))
        total, length = part, 1 << 20
        while length < 1 << 33:
            total, length = crc.crc32_combine(total, total, length), 2 * length
        backwards = crc.crc32_combine(part, crc.crc32_combine(total, part, 1 << 20), length + (1 << 20))
        self.assertEqual(backwards, crc.crc32_combine(crc.crc32_combine(part, total, length), part, 1 << 20))

    def test_negative_length_is_refused(self):
        with self.assertRaises(ValueError):
            crc.crc32_combine(0, 0, -1)


if __name__ == "__main__":
    absltest.main()
