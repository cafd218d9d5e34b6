"""After a power cut at any moment the final name is absent, old and whole, or new and whole: every state of a disk."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.file_names import CHECKPOINT
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import StorageError
from apr_jax.converters.storage import output
from tests import file_faults, paths, power_cut

SAMPLE = paths.checkpoint("gqa_tied_bf16")
FILES = {"config.json": b"new", "model.safetensors": b"weights" * 9, "additional_chat_templates/x.jinja": b"{{ x }}"}

# Without renameat2.
OLD_SYSTEM = mock.patch.object(output, "_renameat2", return_value=False)


def write(path: pathlib.Path, content: bytes, force: bool) -> None:
    with output.atomic_file(os.fspath(path), len(content), force=force) as file:
        for begin in range(0, len(content), 5):
            file.write_at(content[begin : begin + 5], begin)


def write_folder(path: pathlib.Path, files: dict[str, bytes], force: bool) -> None:
    with output.atomic_folder(os.fspath(path), 99, kind=CHECKPOINT, force=force) as folder:
        for name, content in files.items():
            with folder.create(name, len(content)) as file:
                file.write_at(content, 0)


class PowerCutTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path).resolve()

    def check(
        self, record: power_cut.Record, name: str, older: power_cut.Tree | None, *, aside: bool = False
    ) -> set[str]:
        """Checks every state after every prefix; returns which there were.

        Args:
          record: What was done.
          name: The final name.
          older: What stood there before.
          aside: Whether the old output may stand under another name for a moment, where nothing is under its own.
        """
        newer = power_cut.tree(self.folder / name)
        self.assertNotIn(newer, (None, older))
        seen = set()
        for calls in range(len(record.events) + 1):
            for state in power_cut.after(record, calls):
                found = state.get(name)
                if found is None and older is not None:
                    self.assertTrue(aside, f"nothing after {calls} of {record.events}")
                    self.assertIn(older, [tree for other, tree in state.items() if ".apr-jax-old." in other])
                else:
                    self.assertIn(found, (older, newer), f"after {calls} of {len(record.events)} calls")
                seen.add("absent" if found is None else "old" if found == older else "new")
        for state in power_cut.after(record, len(record.events)):
            self.assertEqual(state.get(name), newer, "a command that has ended well may lose its output")
        return seen


class PowerCutTest(PowerCutTestCase):
    @parameterized.product(force=[False, True], has_renameat2=[True, False])
    def test_a_file(self, force, has_renameat2):
        path = self.folder / "a"
        if force:
            path.write_bytes(b"old")
        older = power_cut.tree(path)
        without = (
            contextlib.nullcontext() if has_renameat2 else mock.patch.object(output, "_renameat2", return_value=False)
        )
        with without, power_cut.recorded(self.folder) as record:
            write(path, b"new content", force)
        self.assertEqual(self.check(record, "a", older), {"old" if force else "absent", "new"})

    @parameterized.product(force=[False, True], has_renameat2=[True, False])
    def test_a_folder_with_folders_in_it(self, force, has_renameat2):
        path = self.folder / "d"
        if force:
            write_folder(path, {"config.json": b"old", "model.safetensors": b"old", "vocab.json": b"old"}, False)
        older = power_cut.tree(path)
        without = (
            contextlib.nullcontext() if has_renameat2 else mock.patch.object(output, "_renameat2", return_value=False)
        )
        with without, power_cut.recorded(self.folder) as record:
            write_folder(path, FILES, force)
        seen = self.check(record, "d", older, aside=force and not has_renameat2)
        self.assertContainsSubset({"old" if force else "absent", "new"}, seen)

    @parameterized.product(to=["apr", "safetensors"], force=[False, True])
    def test_a_conversion(self, to, force):
        path = self.folder / ("m.apr" if to == "apr" else "m")
        if force:
            convert(paths.checkpoint("gqa_untied_bf16"), path, to=to)
        older = power_cut.tree(path)
        with power_cut.recorded(self.folder) as record:
            convert(SAMPLE, path, to=to, force=force, max_shard_bytes=100_000 if to == "safetensors" else None)
        self.check(record, path.name, older)

    def test_what_a_killed_run_left_and_the_next_one_puts_right(self):
        aside = self.folder / ".d.apr-jax-old.999999.00000000"
        write_folder(aside, {"config.json": b"old"}, False)
        older = power_cut.tree(aside)
        with power_cut.recorded(self.folder) as record:
            write_folder(self.folder / "d", FILES, True)
        for calls in range(len(record.events) + 1):
            for state in power_cut.after(record, calls):
                self.assertIn(state.get("d", state.get(aside.name)), (older, power_cut.tree(self.folder / "d")))

    def test_an_error_after_the_exchange_loses_nothing_either(self):
        path = self.folder / "d"
        write_folder(path, {"config.json": b"old", "vocab.json": b"old"}, False)
        older, newer = power_cut.tree(path), None
        fsyncs = file_faults.fails(5, frozenset(("fsync",)))
        with file_faults.recorded(self.folder) as calls:
            write_folder(self.folder / "e", FILES, False)
        last = sum(call.name == "fsync" for call in calls) - 1
        # The recorder sees what the faulty layer lets through.
        failing = file_faults.planted(self.folder, fsyncs, last)
        with power_cut.recorded(self.folder) as record, self.assertRaises(StorageError), failing:
            write_folder(path, FILES, True)
        newer = power_cut.tree(self.folder / "e")
        self.assertEqual(power_cut.tree(path), older)
        for number in range(len(record.events) + 1):
            for state in power_cut.after(record, number):
                self.assertIn(state.get("d"), (older, newer))


class ModelTest(PowerCutTestCase):
    """The model finds what is wrong with writers that are."""

    @parameterized.parameters("no fsync of the file", "no fsync of the folder", "removed before it is flushed")
    def test_a_careless_writer_is_found(self, how):
        path = self.folder / "d"
        write_folder(path, {"config.json": b"old", "vocab.json": b"old"}, False)
        older = power_cut.tree(path)
        if how == "no fsync of the file":
            careless = mock.patch.object(output.OutputFile, "sync", return_value=None)
        elif how == "no fsync of the folder":
            careless = mock.patch.object(output, "_sync_folder", return_value=None)
        else:
            careless = mock.patch.object(output, "_flush_names", return_value=None)
        with careless, power_cut.recorded(self.folder) as record:
            write_folder(path, FILES, True)
        with self.assertRaises(AssertionError):
            self.check(record, "d", older)


if __name__ == "__main__":
    absltest.main()
