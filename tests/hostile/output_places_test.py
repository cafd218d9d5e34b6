"""Where an output may go, and what is said where it may not: two writers, links, odd places, limits."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import stat
import subprocess
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError, StorageError, UsageError
from tests import file_faults, paths
from tests.hostile.file_faults_test import content, make_model

# Waits, when the output is whole but has no name yet, until a file is there.
_WAITING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.storage import output
place = output._put_in_place
def waiting(*args):
    print("whole", flush=True)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    place(*args)
output._put_in_place = waiting
from apr_jax.converters.commands import cli
cli.start("apr_jax.converters.commands.convert", ["convert", *sys.argv[3:]])
"""


class OutputPlacesTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path).resolve()
        self.models = [self.folder / "one", self.folder / "two"]
        for seed, model in enumerate(self.models):
            make_model(model, seed)
        self.work = self.folder / "work"
        self.work.mkdir()

    def expected(self, model: pathlib.Path, to: str) -> object:
        path = self.folder / f"expected-{model.name}-{to}"
        path = path.with_suffix(".apr") if to == "apr" else path
        if not path.exists():
            convert(model, path, to=to)
        return content(path)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.work))


class TwoWritersTest(OutputPlacesTestCase):
    @parameterized.product(to=["apr", "safetensors"], force=[False, True])
    def test_both_are_about_to_name_their_output(self, to, force):
        name = "m.apr" if to == "apr" else "m"
        if force:
            convert(paths.checkpoint("gqa_tied_bf16"), self.work / name, to=to)
        go = self.folder / "go"
        options = ["--to", to, "-o", str(self.work / name), *(["--force"] if force else [])]
        command = [sys.executable, "-c", _WAITING, str(paths.ROOT), str(go)]
        writers = [
            subprocess.Popen([*command, model, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for model in self.models
        ]
        for writer in writers:
            self.assertEqual(writer.stdout.readline(), "whole\n")
        go.touch()
        said = [writer.communicate(timeout=60)[1] for writer in writers]
        codes = [writer.returncode for writer in writers]
        self.assertEqual(self.names(), [name], said)
        found = content(self.work / name)
        if force:
            # One after the other: the last one stands.
            self.assertEqual(codes, [0, 0], said)
            self.assertIn(found, [self.expected(model, to) for model in self.models])
        else:
            self.assertEqual(sorted(codes), [0, 2], said)
            self.assertEqual(found, self.expected(self.models[codes.index(0)], to))
            self.assertRegex(said[codes.index(2)], r"^(warning: .*\n)*error: .*: the output exists\. ")


class LinksTest(OutputPlacesTestCase):
    @parameterized.parameters("apr", "safetensors")
    def test_a_link_is_written_through_and_stays(self, to):
        name = "real.apr" if to == "apr" else "real"
        convert(self.models[1], self.work / name, to=to)
        link = self.work / ("link.apr" if to == "apr" else "link")
        link.symlink_to(name)
        with self.assertRaises(UsageError):
            convert(self.models[0], link, to=to)
        convert(self.models[0], link, to=to, force=True)
        self.assertTrue(link.is_symlink())
        self.assertEqual(content(self.work / name), self.expected(self.models[0], to))
        self.assertLen(self.names(), 2)

    @parameterized.parameters("apr", "safetensors")
    def test_a_dangling_link_counts_as_an_output_and_force_makes_its_target(self, to):
        name = "real.apr" if to == "apr" else "real"
        link = self.work / ("link.apr" if to == "apr" else "link")
        link.symlink_to(name)
        with self.assertRaises(UsageError) as caught:
            convert(self.models[0], link, to=to)
        self.assertEqual(caught.exception.code, "output-exists")
        convert(self.models[0], link, to=to, force=True)
        self.assertTrue(link.is_symlink())
        self.assertEqual(content(self.work / name), self.expected(self.models[0], to))

    def test_a_link_that_leads_nowhere_or_in_a_circle(self):
        (self.work / "a.apr").symlink_to("missing/b.apr")
        (self.work / "c.apr").symlink_to("c.apr")
        for name, code in (("a.apr", 3), ("c.apr", 7)):
            with self.assertRaises(AprJaxError) as caught:
                convert(self.models[0], self.work / name, to="apr", force=True)
            self.assertEqual(caught.exception.exit_code, code, caught.exception)
        self.assertEqual(self.names(), ["a.apr", "c.apr"])


class PlacesTest(OutputPlacesTestCase):
    def refused(self, path: object, to: str = "apr", *, model: object = None, **arguments: object) -> AprJaxError:
        before = self.names()
        with self.assertRaises(AprJaxError) as caught:
            convert(model or self.models[0], path, to=to, **arguments)
        self.assertEqual(self.names(), before)
        return caught.exception

    def test_what_is_no_place_for_a_file(self):
        (self.work / "d.apr").mkdir()
        os.mkfifo(self.work / "fifo.apr")
        (self.work / "null.apr").symlink_to("/dev/null")
        (self.work / "out.apr").symlink_to("/dev/stdout")
        refusals = {"d.apr": "output-is-folder", "fifo.apr": "output-not-file", "null.apr": "output-not-file"}
        for name, code in refusals.items():
            self.assertEqual(self.refused(self.work / name, force=True).code, code)
        # Whatever stdout is: a pipe, a terminal, a file that the shell has opened.
        tool = str(paths.ROOT / "tools" / "convert.py")
        command = [sys.executable, tool, str(self.models[0]), "--to", "apr", "--force"]
        done = subprocess.run([*command, "-o", str(self.work / "out.apr")], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("the output is not a regular file", done.stderr)
        self.assertEqual(done.stdout, "")
        self.assertTrue(stat.S_ISCHR(os.stat("/dev/null").st_mode))

    def test_a_name_of_255_bytes_and_one_that_is_longer(self):
        name = "ü" * 125 + "x.apr"
        self.assertLen(name.encode(), 255)
        convert(self.models[0], self.work / name, to="apr")
        convert(self.models[1], self.work / name, to="apr", force=True)
        self.assertEqual(content(self.work / name), self.expected(self.models[1], "apr"))
        error = self.refused(self.work / ("x" + name))
        self.assertEqual((error.code, error.exit_code), ("name-too-long", 7))

    @parameterized.parameters(
        (errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "no-space"),
        (errno.EFBIG, "file-too-large"), (errno.EMFILE, "write-failed"),
    )  # fmt: skip
    def test_what_the_system_refuses_is_named(self, number, code):
        for call in ("open", "pwrite", "renameat2"):
            fault = file_faults.fails(number, frozenset((call,)))
            with file_faults.planted(self.work, fault, 0) as hit:
                error = self.refused(self.work / "m.apr")
            self.assertLen(hit, 1)
            self.assertEqual((error.code, error.exit_code), (code, 7))
            self.assertIn(os.strerror(number).lower(), str(error))

    def mounted(self, options: str) -> pathlib.Path:
        """Returns a folder of the work folder that is a disk of its own."""
        place = self.work / "mount"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            self.skipTest(f"no tmpfs can be mounted: {done.stderr.strip()}")
        self.addCleanup(subprocess.run, ["umount", place], check=True)
        return place

    def test_a_read_only_folder(self):
        place = self.mounted("ro")
        for to, name in (("apr", "m.apr"), ("safetensors", "m")):
            error = self.refused(place / name, to=to)
            self.assertIsInstance(error, StorageError)
            self.assertEqual(error.code, "read-only")

    @parameterized.parameters("size=32k", "nr_inodes=4")
    def test_a_disk_that_is_too_small(self, options):
        place = self.mounted(options)
        if "inodes" in options:
            for name in ("a", "b", "c"):
                (place / name).touch()
        stood = sorted(os.listdir(place))
        for to, name in (("apr", "m.apr"), ("safetensors", "m")):
            error = self.refused(place / name, to=to, force=True, model=paths.checkpoint("gqa_tied_bf16"))
            self.assertEqual((error.code, error.exit_code), ("no-space", 7), error)
            self.assertEqual(sorted(os.listdir(place)), stood)

    @parameterized.parameters(("apr", "m.apr"), ("safetensors", "m"))
    def test_a_disk_on_which_an_output_fits_once_but_not_beside_the_old_one(self, to, name):
        convert(self.models[1], self.work / name, to=to)
        files = [file.stat().st_size for file in (self.work / name, *(self.work / name).rglob("*")) if file.is_file()]
        page = os.sysconf("SC_PAGE_SIZE")
        place = self.mounted(f"size={sum(-(-size // page) for size in files) * page}")
        convert(self.models[1], place / name, to=to)
        before = content(place / name)
        error = self.refused(place / name, to=to, force=True)
        self.assertEqual((error.code, error.exit_code), ("no-space", 7), error)
        self.assertEqual(content(place / name), before)
        self.assertEqual(os.listdir(place), [name])

    def test_a_folder_that_vanishes_while_the_output_is_written(self):
        gone = self.work / "gone"
        gone.mkdir()
        fault = file_faults.before("vanishes", lambda: shutil.rmtree(gone), frozenset(("renameat2",)))
        with file_faults.planted(self.work, fault, 0), self.assertRaises(StorageError):
            convert(self.models[0], gone / "m.apr", to="apr")
        self.assertEqual(self.names(), [])

    def test_what_somebody_adds_to_a_folder_meanwhile_is_not_lost(self):
        target = self.work / "m"
        convert(self.models[1], target, to="safetensors")
        thesis = target / "thesis.txt"
        add = file_faults.before("grows", lambda: thesis.write_text("years"), frozenset(("renameat2",)))
        with file_faults.planted(self.work, add, 0), self.assertRaises(UsageError) as caught:
            convert(self.models[0], target, to="safetensors", force=True)
        self.assertEqual(caught.exception.code, "output-not-replaceable")
        self.assertEqual((target / "thesis.txt").read_text(), "years")
        self.assertEqual(self.names(), ["m"])

    def test_what_takes_the_place_of_a_file_meanwhile_is_not_lost(self):
        target = self.work / "m.apr"
        convert(self.models[1], target, to="apr")

        def exchange() -> None:
            target.unlink()
            target.mkdir()
            (target / "thesis.txt").write_text("years")

        swap = file_faults.before("becomes a folder", exchange, frozenset(("renameat2",)))
        with file_faults.planted(self.work, swap, 0), self.assertRaises(UsageError) as caught:
            convert(self.models[0], target, to="apr", force=True)
        self.assertEqual(caught.exception.code, "output-is-folder")
        self.assertEqual((target / "thesis.txt").read_text(), "years")
        self.assertEqual(self.names(), ["m.apr"])

    def test_a_file_that_may_not_be_read_is_replaced_all_the_same(self):
        target = self.work / "m.apr"
        convert(self.models[1], target, to="apr")
        target.chmod(0o200)
        denied = mock.patch.object(os, "open", _denying(os.open, target))
        with denied:
            convert(self.models[0], target, to="apr", force=True)
        self.assertEqual(content(target), self.expected(self.models[0], "apr"))
        self.assertEqual(stat.S_IMODE(target.stat().st_mode), 0o200)


def _denying(real, target):
    def opened(path, flags, *rest, **options):
        if os.fspath(path) == os.fspath(target):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *rest, **options)

    return opened


if __name__ == "__main__":
    absltest.main()
