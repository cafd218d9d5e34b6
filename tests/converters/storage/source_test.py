"""Reading at offsets: what is refused, what is named when the file changes, and that nothing is mapped."""

import contextlib
import os
import pathlib
import socket
import tempfile
import threading
import time

from absl.testing import absltest

from apr_jax.converters.errors import MissingFileError, RefusedError, StorageError
from apr_jax.converters.storage import source


class SourceFileTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "data"
        self.content = os.urandom(10_000)
        self.path.write_bytes(self.content)

    def test_reads_any_part_into_any_buffer(self):
        with source.SourceFile(self.path) as opened:
            self.assertEqual(opened.size, 10_000)
            for offset, nbytes in ((0, 10_000), (1, 1), (9_999, 1), (10_000, 0), (333, 4_444)):
                self.assertEqual(opened.read_at(offset, nbytes), self.content[offset : offset + nbytes])
            buffer = bytearray(100)
            opened.readinto_at(7, memoryview(buffer)[10:20])
            self.assertEqual(buffer, bytes(10) + self.content[7:17] + bytes(80))

    def test_short_counts_of_the_system_are_continued(self):
        real = os.preadv
        calls = []

        def one_byte_or_two(fd, views, offset):
            calls.append(offset)
            return real(fd, [views[0][:7]], offset)

        with source.SourceFile(self.path) as opened, absltest.mock.patch.object(os, "preadv", one_byte_or_two):
            self.assertEqual(opened.read_at(5, 100), self.content[5:105])
        self.assertEqual(calls, list(range(5, 105, 7)))

    def test_a_file_that_shrinks_is_named_with_the_byte(self):
        with source.SourceFile(self.path) as opened:
            os.truncate(self.path, 5_000)
            with self.assertRaises(StorageError) as caught:
                opened.read_at(4_000, 2_000)
            error = caught.exception
            self.assertEqual((error.code, error.file, error.offset), ("short-read", str(self.path), 5_000))
            with self.assertRaises(StorageError) as caught:
                opened.check_unchanged()
            self.assertEqual(caught.exception.code, "source-changed")

    def test_nothing_is_allocated_for_bytes_that_are_not_there(self):
        with source.SourceFile(self.path) as opened, self.assertRaises(StorageError) as caught:
            opened.read_at(0, 1 << 60)
        self.assertEqual(caught.exception.code, "short-read")

    def test_a_file_that_grows_is_seen(self):
        with source.SourceFile(self.path) as opened:
            opened.check_unchanged()
            with open(self.path, "ab") as grown:
                grown.write(b"x")
            with self.assertRaises(StorageError):
                opened.check_unchanged()

    def test_a_file_replaced_by_a_rename_goes_on_being_read(self):
        with source.SourceFile(self.path) as opened:
            other = self.folder / "other"
            other.write_bytes(bytes(10_000))
            other.rename(self.path)
            self.assertEqual(opened.read_at(0, 10_000), self.content)

    def test_errors_of_the_system_are_storage_errors(self):
        with source.SourceFile(self.path) as opened:
            failing = absltest.mock.patch.object(os, "preadv", side_effect=OSError(5, "Input/output error"))
            with failing, self.assertRaises(StorageError) as caught:
                opened.read_at(3, 4)
            self.assertEqual((caught.exception.code, caught.exception.offset), ("read-failed", 3))
            self.assertIn("Input/output error", str(caught.exception))
        failing = absltest.mock.patch.object(os, "open", side_effect=PermissionError(13, "Permission denied"))
        with failing, self.assertRaises(StorageError) as caught:
            source.SourceFile(self.path)
            self.assertEqual((caught.exception.code, caught.exception.exit_code), ("open-failed", 7))

    def test_missing_files(self):
        for path in (self.folder / "none", self.path / "below", "a\0b"):
            with self.assertRaises(MissingFileError) as caught:
                source.SourceFile(path)
            self.assertEqual(caught.exception.code, "file-missing")

    def test_what_is_no_regular_file_is_refused_without_waiting(self):
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        # From within, since the name of a socket has little room.
        with contextlib.chdir(self.folder):
            listener.bind("socket")
        kinds = {
            fifo: "FIFO",
            self.folder: "directory",
            "/dev/zero": "character device",
            self.folder / "socket": "socket",
        }
        for path, kind in kinds.items():
            begin = time.monotonic()
            with self.assertRaises(RefusedError) as caught:
                source.SourceFile(path)
            self.assertLess(time.monotonic() - begin, 1)
            self.assertEqual(caught.exception.code, "not-a-regular-file")
            self.assertIn(kind, str(caught.exception))

    def test_a_fifo_put_in_place_after_the_look_does_not_hang(self):
        fifo = self.folder / "fifo"
        os.mkfifo(fifo)
        regular = os.stat(self.path)
        done = threading.Event()

        def open_it():
            with absltest.mock.patch.object(os, "stat", return_value=regular), self.assertRaises(RefusedError):
                source.SourceFile(fifo)
            done.set()

        threading.Thread(target=open_it, daemon=True).start()
        self.assertTrue(done.wait(5))

    def test_it_shows_which_file_it_is(self):
        with source.SourceFile(self.path) as opened:
            self.assertEqual(repr(opened), f"SourceFile({opened.path!r}, size={os.path.getsize(self.path)})")

    def test_no_descriptor_is_left_open(self):
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        if before is None:
            self.skipTest("descriptors are counted in /proc")
        opened = source.SourceFile(self.path)
        opened.close()
        opened.close()
        for path in (self.folder, self.folder / "none"):
            with self.assertRaises((RefusedError, MissingFileError)):
                source.SourceFile(path)
        self.assertLen(os.listdir("/proc/self/fd"), before)

    def test_nothing_is_mapped(self):
        if not os.path.exists("/proc/self/maps"):
            self.skipTest("mappings are listed in /proc")
        with source.SourceFile(self.path) as opened:
            opened.read_at(0, 10_000)
            self.assertNotIn(str(self.path), pathlib.Path("/proc/self/maps").read_text())


if __name__ == "__main__":
    absltest.main()
