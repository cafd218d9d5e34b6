"""Files of other formats are named by their first bytes."""

from __future__ import annotations

from absl.testing import absltest, parameterized

from apr_jax.converters.errors import BrokenContainerError
from apr_jax.converters.formats import foreign


class ForeignFormatTest(parameterized.TestCase):
    @parameterized.parameters(
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"PK\3\4\x14\0", "ZIP"),
        (b"\x80\2}q\0", "pickle"),
        (b"\x80\4\x95", "pickle"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x93NUMPY\1\0", "NumPy"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\n  <html lang=en>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git-LFS"),
        (b"APRN\1\0", "version 1 (APRN)"),
        (b"APR1", "whisper.apr"),
        (b"\0RPA", "byte-swapped"),
        (b"APR\0\1\0\0\0\0\x50\x53\x54", "aprender-tsp"),
        (b"<?xml version", "XML"),
    )
    def test_is_named(self, first, words):
        self.assertIn(words, foreign.foreign_format(first + bytes(40)))
        with self.assertRaises(BrokenContainerError) as caught:
            foreign.refuse_foreign(first, wanted="x", file="f")
        self.assertEqual(caught.exception.code, "foreign-format")

    @parameterized.parameters(
        b"", b"\x80", b"APR\0\2\0\0\4", b"APR2\2\0", b"\x40\1\0\0\0\0\0\0{", b"\x80\0\0\0\0\0\0\0{"
    )
    def test_own_formats_and_nothing_are_not(self, first):
        self.assertIsNone(foreign.foreign_format(first))

    def test_the_way_out_of_a_pointer_is_said(self):
        with self.assertRaises(BrokenContainerError) as caught:
            foreign.refuse_foreign(b"version https://git-lfs", wanted="x", file="f")
        self.assertIn("git lfs pull", caught.exception.hint)


if __name__ == "__main__":
    absltest.main()
