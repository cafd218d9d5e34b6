"""Outputs appear whole or not at all, and nothing is replaced that should not be."""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import re
import stat
import subprocess
import sys
import tempfile
import threading
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.file_names import CHECKPOINT
from apr_jax.converters.errors import AprJaxError, MissingFileError, StorageError, UsageError
from apr_jax.converters.storage import output
from tests import file_faults, flushes
from tests.paths import ROOT


class OutputTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name).resolve()

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def raises(self, code: str, kind: type[AprJaxError] = UsageError):
        return _Raises(self, code, kind)


class _Raises:
    """Asserts kind and code of an error, and that its text names a file."""

    def __init__(self, test: absltest.TestCase, code: str, kind: type[AprJaxError]):
        self._test, self._code, self._kind = test, code, kind

    def __enter__(self) -> "_Raises":
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        self._test.assertIsInstance(error, self._kind)
        self._test.assertEqual(error.code, self._code)
        self._test.assertIsNotNone(error.file)
        self.error = error
        return True


def write(path: pathlib.Path, content: bytes, **arguments) -> None:
    with output.atomic_file(os.fspath(path), len(content), **arguments) as file:
        file.write_at(content, 0)


def write_folder(path: pathlib.Path, files: dict[str, bytes], **arguments) -> None:
    size = sum(map(len, files.values()))
    with output.atomic_folder(os.fspath(path), size, kind=CHECKPOINT, **arguments) as folder:
        for name, content in files.items():
            with folder.create(name, len(content)) as file:
                file.write_at(content, 0)


def _old_system():
    """A system, or a file system, without renameat2."""
    return mock.patch.object(output, "_renameat2", return_value=False)


class AtomicFileTest(OutputTestCase):
    def test_name_appears_at_the_end_with_the_content_and_the_umasks_permissions(self):
        before = os.umask(0o027)
        try:
            with output.atomic_file(os.fspath(self.folder / "a"), 6) as file:
                self.assertEqual([name.startswith(".a.apr-jax-tmp.") for name in self.names()], [True])
                file.write_at(b"def", 3)
                file.write_at(b"abc", 0)
        finally:
            os.umask(before)
        self.assertEqual(self.names(), ["a"])
        self.assertEqual((self.folder / "a").read_bytes(), b"abcdef")
        self.assertEqual(stat.S_IMODE((self.folder / "a").stat().st_mode), 0o640)

    @parameterized.parameters(0o000, 0o022, 0o077)
    def test_permissions_are_all_that_the_umask_leaves(self, mask):
        before = os.umask(mask)
        try:
            write(self.folder / "a", b"")
            write_folder(self.folder / "d", {"config.json": b"", "layer-0/x.bin": b""})
        finally:
            os.umask(before)
        for name, mode in (("a", 0o666), ("d", 0o777), ("d/config.json", 0o666), ("d/layer-0", 0o777)):
            self.assertEqual(stat.S_IMODE((self.folder / name).stat().st_mode), mode & ~mask, name)

    def test_what_is_not_written_is_zero(self):
        with output.atomic_file(os.fspath(self.folder / "a"), 5) as file:
            file.write_at(b"x", 2)
        self.assertEqual((self.folder / "a").read_bytes(), b"\0\0x\0\0")

    @parameterized.parameters(ValueError, KeyboardInterrupt, SystemExit)
    def test_an_exception_leaves_nothing_behind_and_the_old_file_as_it_was(self, kind):
        (self.folder / "a").write_bytes(b"old")
        with self.assertRaises(kind), output.atomic_file(os.fspath(self.folder / "a"), 3, force=True) as file:
            file.write_at(b"new", 0)
            raise kind
        self.assertEqual(self.names(), ["a"])
        self.assertEqual((self.folder / "a").read_bytes(), b"old")

    def test_set_user_id_does_not_pass_to_other_content(self):
        path = self.folder / "a"
        path.write_bytes(b"program")
        path.chmod(0o6755)
        write(path, b"new", force=True)
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o755)

    @absltest.skipIf(os.geteuid() != 0, "needs another user")
    def test_root_keeps_the_owner_and_others_leave_the_file_alone(self):
        path = self.folder / "a"
        path.write_bytes(b"theirs")
        os.chown(path, 12345, 54321)
        write(path, b"new", force=True)
        self.assertEqual((path.stat().st_uid, path.stat().st_gid), (12345, 54321))
        with self.raises("output-foreign"), mock.patch.object(os, "geteuid", return_value=999):
            write(path, b"other", force=True)
        self.assertEqual(path.read_bytes(), b"new")

    def test_existing_output_is_refused_without_force_and_replaced_with_it_keeping_its_mode(self):
        path = self.folder / "a"
        path.write_bytes(b"old")
        path.chmod(0o604)
        with self.raises("output-exists") as caught:
            write(path, b"new")
        self.assertEqual(caught.error.exit_code, 2)
        self.assertEqual(path.read_bytes(), b"old")
        write(path, b"new", force=True)
        self.assertEqual(path.read_bytes(), b"new")
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o604)

    @parameterized.parameters(True, False)
    def test_a_file_that_appears_meanwhile_is_not_overwritten(self, has_renameat2):
        without = contextlib.nullcontext() if has_renameat2 else _old_system()
        with self.raises("output-exists"), without, output.atomic_file(os.fspath(self.folder / "a"), 3) as file:
            file.write_at(b"new", 0)
            (self.folder / "a").write_bytes(b"other")
        self.assertEqual((self.folder / "a").read_bytes(), b"other")
        self.assertEqual(self.names(), ["a"])

    @parameterized.parameters("same", "hard link", "symbolic link")
    def test_input_as_output_is_refused_whatever_its_name(self, how):
        source, target = self.folder / "source", self.folder / "target"
        source.write_bytes(b"data")
        if how == "same":
            target = source
        elif how == "hard link":
            target.hardlink_to(source)
        else:
            target.symlink_to(source)
        with self.raises("same-file"):
            write(target, b"new", force=True, sources=[os.fspath(source)])
        self.assertEqual(source.read_bytes(), b"data")

    def test_a_symbolic_link_is_written_through(self):
        (self.folder / "real").write_bytes(b"old")
        (self.folder / "link").symlink_to("real")
        with self.raises("output-exists"):
            write(self.folder / "link", b"new")
        write(self.folder / "link", b"new", force=True)
        self.assertTrue((self.folder / "link").is_symlink())
        self.assertEqual((self.folder / "real").read_bytes(), b"new")

    def test_a_folder_or_a_device_is_no_place_for_a_file(self):
        (self.folder / "d").mkdir()
        with self.raises("output-is-folder"):
            write(self.folder / "d", b"new", force=True)
        os.mkfifo(self.folder / "fifo")
        with self.raises("output-not-file"):
            write(self.folder / "fifo", b"new", force=True)

    def test_a_missing_folder_is_named(self):
        with self.raises("output-folder-missing", MissingFileError):
            write(self.folder / "no" / "a", b"new")

    def test_a_name_of_the_longest_possible_length_works(self):
        path = self.folder / ("x" * 255)
        write(path, b"new")
        self.assertEqual(self.names(), [path.name])

    def test_too_little_space_is_seen_before_anything_is_written(self):
        path = os.fspath(self.folder / "a")
        with self.raises("no-space", StorageError) as caught, output.atomic_file(path, 1 << 60):
            self.fail("was opened")
        self.assertIn("missing", str(caught.error))
        self.assertEqual(self.names(), [])

    def test_a_disk_that_fills_up_leaves_nothing_and_says_how_much_is_missing(self):
        full = mock.patch.object(os, "pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with full, self.raises("no-space", StorageError) as caught:
            write(self.folder / "a", b"new")
        self.assertRegex(str(caught.error), r"\d+ bytes are missing")
        self.assertEqual(self.names(), [])

    def test_short_writes_are_continued(self):
        real = os.pwrite
        with mock.patch.object(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset)):
            write(self.folder / "a", bytes(range(100)))
        self.assertEqual((self.folder / "a").read_bytes(), bytes(range(100)))


class LeftoversTest(OutputTestCase):
    def test_a_killed_runs_temporaries_are_removed_and_named_others_kept(self):
        (self.folder / ".a.apr-jax-tmp.999999.00000000").write_bytes(b"half")
        (self.folder / ".a.apr-jax-tmp.999999.00000001").mkdir()
        (self.folder / ".a.apr-jax-tmp.999999.00000001" / "x").write_bytes(b"half")
        (self.folder / ".ab.apr-jax-tmp.999999.00000000").write_bytes(b"of another output")
        said: list[str] = []
        write(self.folder / "a", b"new", notice=said.append)
        self.assertEqual(self.names(), [".ab.apr-jax-tmp.999999.00000000", "a"])
        self.assertLen(said, 2)
        self.assertIn(".a.apr-jax-tmp.999999.00000000", said[0])

    def test_what_no_run_makes_under_such_a_name_is_kept_and_stops_nothing(self):
        (self.folder / "mine").write_bytes(b"mine")
        link, pipe = (self.folder / f".a.apr-jax-tmp.999999.0000000{number}" for number in range(2))
        link.symlink_to("mine")
        write(self.folder / "a", b"new")
        self.assertEqual(self.names(), [link.name, "a", "mine"])
        link.unlink()
        # To open a pipe for reading would wait for somebody who writes.
        os.mkfifo(pipe)
        write(self.folder / "a", b"newer", force=True)
        self.assertEqual((self.folder / "a").read_bytes(), b"newer")

    def test_a_live_runs_temporary_is_kept_even_under_a_dead_process_id(self):
        temporary = self.folder / ".a.apr-jax-tmp.999999.00000000"
        with open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            write(self.folder / "a", b"new")
        self.assertEqual(self.names(), [temporary.name, "a"])

    def test_where_the_file_system_has_no_locks_the_process_id_tells(self):
        dead, live, odd = (self.folder / f".a.apr-jax-tmp.{owner}.00000000" for owner in (999999, os.getpid(), "x"))
        for left in (dead, live, odd):
            left.write_bytes(b"half")
        said: list[str] = []
        with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, "no locks")):
            write(self.folder / "a", b"new", notice=said.append)
        self.assertEqual(self.names(), sorted([live.name, odd.name, "a"]))
        self.assertLen(said, 1)

    def test_what_cannot_be_removed_is_named(self):
        left = self.folder / ".a.apr-jax-tmp.999999.00000000"
        left.write_bytes(b"half")
        said: list[str] = []
        with mock.patch.object(os, "unlink", side_effect=PermissionError(errno.EPERM, os.strerror(errno.EPERM))):
            write(self.folder / "a", b"new", notice=said.append)
        self.assertRegex(said[0], f"^could not remove '{re.escape(left.name)}'")
        self.assertEqual((self.folder / "a").read_bytes(), b"new")

    def test_a_temporary_that_another_run_took_for_a_leftover_is_made_again(self):
        real, taken = fcntl.flock, []

        def flock(fd, how):
            if not taken:
                taken.append(os.readlink(f"/proc/self/fd/{fd}"))
                os.unlink(taken[0])
            real(fd, how)

        with mock.patch.object(fcntl, "flock", flock):
            write(self.folder / "a", b"new")
        self.assertEqual(self.names(), ["a"])
        self.assertIn(".apr-jax-tmp.", taken[0])

    def test_a_temporary_of_which_nothing_can_be_learnt_is_an_error(self):
        real = os.stat

        def failing(path, **arguments):
            if ".apr-jax-tmp." in os.fspath(path) and not isinstance(path, int):
                raise OSError(errno.EIO, "Input/output error")
            return real(path, **arguments)

        with self.raises("write-failed", StorageError), mock.patch.object(os, "stat", failing):
            write(self.folder / "a", b"new")
        self.assertNotIn("a", self.names())

    def test_two_writers_of_one_output_do_not_disturb_each_other(self):
        with output.atomic_file(os.fspath(self.folder / "a"), 3) as file:
            write(self.folder / "a", b"one")
            self.assertLen(self.names(), 2)
            with self.raises("output-exists"):
                write(self.folder / "a", b"two")
            file.write_at(b"two", 0)
            os.unlink(self.folder / "a")
        self.assertEqual((self.folder / "a").read_bytes(), b"two")

    def test_a_folder_set_aside_by_a_killed_run_comes_back(self):
        aside = self.folder / ".a.apr-jax-old.999999.00000000"
        aside.mkdir()
        (aside / "config.json").write_bytes(b"old")
        said: list[str] = []
        with self.raises("output-exists"):
            write_folder(self.folder / "a", {"config.json": b"new"}, notice=said.append)
        self.assertEqual((self.folder / "a" / "config.json").read_bytes(), b"old")
        self.assertIn("put", said[0])


class ResumableTest(OutputTestCase):
    def test_a_journal_that_cannot_be_looked_at_at_its_beginning_is_not_left(self):
        fails = file_faults.fails(errno.EIO, frozenset({"pread"}))
        with file_faults.planted(self.folder, fails, 0) as hit, self.raises("write-failed", StorageError):
            write(self.folder / "a", b"new", resumable={"source": "b"})
        self.assertIn("journal", hit[0].path)
        self.assertEqual(self.names(), [])

    @parameterized.parameters(("pread", 0), ("fstat", 2), ("fstat", 3))
    def test_what_was_left_and_cannot_be_looked_at_is_an_error_and_stays_for_the_next_run(self, call, at):
        made_of = {"source": "b"}
        path = os.fspath(self.folder / "a")
        with self.assertRaises(KeyboardInterrupt), output.atomic_file(path, 3, resumable=made_of):
            raise KeyboardInterrupt
        before, said = self.names(), []
        fails = file_faults.fails(errno.EIO, frozenset({call}))
        with file_faults.planted(self.folder, fails, at), self.raises("write-failed", StorageError):
            write(self.folder / "a", b"new", resumable=made_of)
        self.assertEqual(self.names(), before)
        write(self.folder / "a", b"new", resumable=made_of, notice=said.append)
        self.assertIn("goes on from", said[0])
        self.assertEqual(self.names(), ["a"])


class AtomicFolderTest(OutputTestCase):
    def test_folder_appears_whole(self):
        with output.atomic_folder(os.fspath(self.folder / "d"), 3, kind=CHECKPOINT) as folder:
            with folder.create("config.json", 3) as file:
                file.write_at(b"new", 0)
            self.assertFalse((self.folder / "d").exists())
        self.assertEqual(self.names(), ["d"])
        self.assertEqual((self.folder / "d" / "config.json").read_bytes(), b"new")

    @parameterized.parameters(True, False)
    def test_an_existing_checkpoint_is_exchanged_with_force_only(self, has_renameat2):
        write_folder(self.folder / "d", {"config.json": b"old", "tokenizer.json": b"old"})
        (self.folder / "d").chmod(0o705)
        with self.raises("output-exists"):
            write_folder(self.folder / "d", {"config.json": b"new"})
        without = contextlib.nullcontext() if has_renameat2 else _old_system()
        with without:
            write_folder(self.folder / "d", {"config.json": b"new"}, force=True)
        self.assertEqual(self.names(), ["d"])
        self.assertEqual(os.listdir(self.folder / "d"), ["config.json"])
        self.assertEqual((self.folder / "d" / "config.json").read_bytes(), b"new")
        self.assertEqual(stat.S_IMODE((self.folder / "d").stat().st_mode), 0o705)

    @parameterized.parameters(ValueError, KeyboardInterrupt)
    def test_an_exception_leaves_the_old_folder(self, kind):
        write_folder(self.folder / "d", {"config.json": b"old"})
        opened = output.atomic_folder(os.fspath(self.folder / "d"), 3, kind=CHECKPOINT, force=True)
        with self.assertRaises(kind), opened as folder:
            with folder.create("config.json", 3) as file:
                file.write_at(b"new", 0)
            raise kind
        self.assertEqual(self.names(), ["d"])
        self.assertEqual((self.folder / "d" / "config.json").read_bytes(), b"old")

    @parameterized.parameters(
        ({"config.json": b"", "photo.jpg": b""}, None),
        ({"notes.txt": b""}, None),
        ({"config.json": b""}, "subfolder"),
    )
    def test_a_folder_that_is_no_checkpoint_is_never_replaced(self, files, subfolder):
        path = self.folder / "home"
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        if subfolder:
            (path / subfolder).mkdir()
        with self.raises("output-not-replaceable"):
            write_folder(path, {"config.json": b"new"}, force=True)
        self.assertLen(os.listdir(path), len(files) + bool(subfolder))

    def test_the_sources_folder_and_those_above_are_refused(self):
        source = self.folder / "up" / "model"
        source.mkdir(parents=True)
        (source / "model.safetensors").write_bytes(b"data")
        for path in (source, self.folder / "up", self.folder):
            with self.raises("output-holds-source"):
                write_folder(path, {"config.json": b""}, force=True, sources=[os.fspath(source / "model.safetensors")])
        self.assertEqual((source / "model.safetensors").read_bytes(), b"data")

    def test_a_file_in_the_folders_place_is_refused(self):
        (self.folder / "d").write_bytes(b"")
        with self.raises("output-not-folder"):
            write_folder(self.folder / "d", {}, force=True)

    @parameterized.parameters("../x", "/x", "", "..", "a/../b", "a//b", "a/")
    def test_a_file_name_that_leads_out_is_refused(self, name):
        with self.raises("file-name"):
            write_folder(self.folder / "d", {name: b"x"})
        self.assertEqual(self.names(), [])


class PowerCutTest(OutputTestCase):
    """Content is on the disk before its name is, and the name before anything is removed that it replaces."""

    @parameterized.parameters((False, True), (False, False), (True, True))
    def test_a_file_is_flushed_before_it_gets_its_name_and_its_folder_after(self, force, has_renameat2):
        if force:
            (self.folder / "a").write_bytes(b"old")
        without = contextlib.nullcontext() if has_renameat2 else _old_system()
        with flushes.recorded(self.folder) as flushed, without:
            write(self.folder / "a", b"new", force=force)
        self.assertEqual(flushes.lacking(flushed, self.folder / "a"), [])

    @parameterized.product(force=[False, True], has_renameat2=[True, False])
    def test_so_is_a_folder_with_every_file_and_folder_in_it(self, force, has_renameat2):
        path = self.folder / "d"
        if force:
            write_folder(path, {"config.json": b"old"})
        old = path.stat().st_ino if force else None
        without = contextlib.nullcontext() if has_renameat2 else _old_system()
        with flushes.recorded(self.folder) as flushed, without:
            write_folder(path, {"config.json": b"new", "layer-0/x.bin": b"x", "p/q/y.bin": b"y"}, force=force)
        self.assertEqual(flushes.lacking(flushed, path), [])
        if force:
            named = [flush for flush in flushed if flush.names.get("d") == path.stat().st_ino]
            self.assertIn(old, named[0].names.values(), "the old folder was removed before the new name was flushed")

    def test_folders_do_not_wait_for_each_other_to_be_flushed(self):
        real, met = os.fsync, threading.Barrier(2, timeout=20)

        def fsync(fd):
            # The folder of the output is flushed alone, in the end.
            if stat.S_ISDIR(os.fstat(fd).st_mode) and not os.path.samestat(os.fstat(fd), os.stat(self.folder)):
                met.wait()
            real(fd)

        with mock.patch.object(os, "fsync", fsync):
            write_folder(self.folder / "d", {f"layer-{number}/x.bin": b"x" for number in range(3)})
        self.assertEqual(self.names(), ["d"])

    def test_a_disk_that_refuses_to_flush_is_an_error_and_leaves_nothing(self):
        for number in (errno.EIO, errno.ENOSPC):
            for writing in (
                lambda: write(self.folder / "a", b"x"),
                lambda: write_folder(self.folder / "d", {"x": b""}),
            ):
                with mock.patch.object(os, "fsync", side_effect=OSError(number, "no")), self.assertRaises(StorageError):
                    writing()
                self.assertEqual(self.names(), [])

    @parameterized.parameters(errno.EINVAL, errno.ENOTSUP)
    def test_where_folders_cannot_be_flushed_they_need_not_be(self, number):
        # As on some network file systems.
        real = os.fsync

        def fsync(fd):
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(number, os.strerror(number))
            real(fd)

        with mock.patch.object(os, "fsync", fsync):
            write(self.folder / "a", b"x")
            write_folder(self.folder / "d", {"config.json": b"y"})
        self.assertEqual(self.names(), ["a", "d"])

    def test_a_folder_that_cannot_be_listed_for_flushing_is_an_error_and_leaves_nothing(self):
        failing = mock.patch.object(os, "scandir", side_effect=OSError(errno.EIO, "Input/output error"))
        with self.raises("write-failed", StorageError), failing:
            write_folder(self.folder / "d", {"x": b""})
        self.assertEqual(self.names(), [])


class ReplacedTest(OutputTestCase):
    def test_an_old_folder_that_cannot_be_removed_is_named(self):
        write_folder(self.folder / "d", {"config.json": b"old"})
        said: list[str] = []
        with mock.patch.object(os, "rmdir", side_effect=OSError(errno.EBUSY, "Device or resource busy")):
            write_folder(self.folder / "d", {"config.json": b"new"}, force=True, notice=said.append)
        self.assertEqual((self.folder / "d" / "config.json").read_bytes(), b"new")
        self.assertRegex(said[-1], "which was replaced, could not be removed: device or resource busy")


class OldSystemTest(OutputTestCase):
    """Where two paths cannot change places in one step, or what was done cannot be undone."""

    def test_a_library_or_a_file_system_without_the_call_is_asked_for_plain_renames(self):
        def function(number):
            def call(*_):
                ctypes.set_errno(number)
                return -1

            return call

        for library in (object(), *(mock.Mock(renameat2=function(number)) for number in
                                    (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP))):  # fmt: skip
            (self.folder / "a").write_bytes(b"old")
            with mock.patch.object(ctypes, "CDLL", return_value=library):
                write(self.folder / "a", b"new", force=True)
                with self.raises("output-exists"):
                    write(self.folder / "a", b"newer")
            self.assertEqual((self.names(), (self.folder / "a").read_bytes()), (["a"], b"new"))
        with (
            self.raises("write-failed", StorageError),
            mock.patch.object(ctypes, "CDLL", return_value=mock.Mock(renameat2=function(errno.EIO))),
        ):
            write(self.folder / "a", b"newer", force=True)
        self.assertEqual((self.names(), (self.folder / "a").read_bytes()), (["a"], b"new"))

    def replaced(self, *patches: contextlib.AbstractContextManager) -> AprJaxError:
        """Returns the error of replacing a folder; it is there as it was, and nothing else."""
        write_folder(self.folder / "d", {"config.json": b"old"})
        with contextlib.ExitStack() as stack:
            caught = stack.enter_context(self.raises("write-failed", StorageError))
            for patch in patches:
                stack.enter_context(patch)
            write_folder(self.folder / "d", {"config.json": b"new"}, force=True)
        self.assertEqual((self.folder / "d" / "config.json").read_bytes(), b"old")
        return caught.error

    @parameterized.parameters("/d", "/.d.apr-jax-tmp.")
    def test_a_folder_stays_or_comes_back_if_its_successor_cannot_have_its_name(self, moved):
        real = os.rename

        def rename(source, target):
            if moved in source[len(os.fspath(self.folder)) :]:
                raise OSError(errno.EIO, "Input/output error")
            real(source, target)

        self.replaced(_old_system(), mock.patch.object(os, "rename", rename))
        self.assertEqual(self.names(), ["d"])

    @parameterized.parameters(True, False)
    def test_names_that_cannot_be_flushed_are_given_back(self, has_renameat2):
        real, failed = output._sync_folder, []

        def sync_folder(folder):
            if folder == os.fspath(self.folder) and not failed:
                failed.append(folder)
                raise OSError(errno.EIO, "Input/output error")
            real(folder)

        without = contextlib.nullcontext() if has_renameat2 else _old_system()
        self.replaced(mock.patch.object(output, "_sync_folder", sync_folder), without)
        self.assertEqual(self.names(), ["d"])

    def test_a_file_that_took_the_place_of_another_for_good_is_told_with_the_error(self):
        (self.folder / "a").write_bytes(b"old")
        outcomes = [OSError(errno.EIO, "Input/output error"), None]
        failing = mock.patch.object(output, "_sync_folder", side_effect=outcomes)
        with self.raises("write-failed", StorageError) as caught, _old_system(), failing:
            write(self.folder / "a", b"new", force=True)
        self.assertEqual((self.names(), (self.folder / "a").read_bytes()), (["a"], b"new"))
        self.assertIn("a' is whole, but may be either output after a power cut", caught.error.hint)

    def test_names_that_cannot_be_flushed_either_way_are_told_as_a_doubt(self):
        real = output._sync_folder

        def sync_folder(folder):
            if folder == os.fspath(self.folder):
                raise OSError(errno.EIO, "Input/output error")
            real(folder)

        error = self.replaced(mock.patch.object(output, "_sync_folder", sync_folder))
        self.assertIn("may be either output after a power cut (input/output error)", error.hint)


class LimitsTest(OutputTestCase):
    def test_a_full_tmpfs_leaves_nothing_behind(self):
        mount = self.folder / "small"
        mount.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, text=True)
        if done.returncode:
            self.skipTest(f"no tmpfs can be mounted: {done.stderr.strip()}")
        self.addCleanup(subprocess.run, ["umount", mount], check=True)
        with self.raises("no-space", StorageError):
            write(mount / "a", bytes(2 << 20))
        # The space goes while the file is being written.
        path = os.fspath(mount / "a")
        with self.raises("no-space", StorageError) as caught, output.atomic_file(path, 800 << 10) as file:
            (mount / "other").write_bytes(bytes(512 << 10))
            for begin in range(0, 800 << 10, 4096):
                file.write_at(b"x" * 4096, begin)
        missing = int(str(caught.error).split(" bytes are missing")[0].split()[-1])
        self.assertBetween(missing, 200 << 10, 400 << 10)
        self.assertEqual(os.listdir(mount), ["other"])

    def test_a_file_size_limit_leaves_nothing_behind(self):
        code = (
            "import os, resource, sys\n"
            f"sys.path.insert(0, {os.fspath(ROOT)!r})\n"
            "from apr_jax.converters.storage import output\n"
            "from apr_jax.converters.errors import StorageError\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try:\n"
            "    with output.atomic_file('a', 8192) as file: file.write_at(bytes(8192), 0)\n"
            "except StorageError as error: print(error.code)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=self.folder, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "file-too-large\n")
        self.assertEqual(self.names(), [])


if __name__ == "__main__":
    absltest.main()
