"""A conversion that was stopped goes on where it was, gives the same bytes, and does little twice."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert import streaming
from apr_jax.converters.convert.plan import CastRule, make_plan
from apr_jax.converters.convert.run import Outcome, run
from apr_jax.converters.errors import AprJaxError, BrokenContainerError, StorageError, UsageError
from apr_jax.converters.storage import output, temporaries
from apr_jax.converters.storage.workers import Workers
from tests import file_faults, paths, power_cut, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")
BLOCK = 1 << 12
TARGETS = {"m.apr": None, "m.safetensors": None, "hf": None, "shards": 50_000}


class Stop(BaseException):
    """Ends a conversion as nothing else does."""


class ResumeTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path).resolve()
        self.source = pathlib.Path(shutil.copytree(SAMPLE, self.folder / "source"))
        self.enter_context(mock.patch.object(streaming, "_CHUNK_BYTES", BLOCK // 4))
        self.enter_context(mock.patch.object(streaming, "_BLOCK_BYTES", BLOCK))
        self.enter_context(mock.patch.object(streaming, "_MAX_THREADS", 1))
        self.said: list[str] = []

    def convert(
        self, name: str, source: os.PathLike[str] | None = None, *, folder: str = ".", resume: bool = True,
        force: bool = False, cast: str | None = None, shard_bytes: int | None = None,
    ) -> Outcome:  # fmt: skip
        path = self.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        with open_checkpoint(source or self.source) as checkpoint:
            plan = make_plan(
                checkpoint,
                str(path),
                to="apr" if name.endswith(".apr") else "safetensors",
                cast=[CastRule.parse(cast)] if cast else (),
                max_shard_bytes=shard_bytes or TARGETS.get(name),
            )
            return run(plan, force=force, resume=resume, notice=self.said.append)

    def stopped(self, name: str, writes: int, error: BaseException | None = None, **arguments) -> None:
        """Ends a conversion, with what it has to do at an interrupt, at the write of that number."""
        real, count = output.OutputFile.write_at, [0]

        def write_at(file, data, offset):
            count[0] += 1
            if count[0] > writes:
                raise error or Stop
            real(file, data, offset)

        with (
            mock.patch.object(output.OutputFile, "write_at", write_at),
            self.assertRaises((Stop, AprJaxError, KeyboardInterrupt)) as caught,
        ):
            self.convert(name, **arguments)
        self.error = caught.exception

    def whole(self, name: str, **arguments) -> power_cut.Tree:
        """What a run that nothing disturbs makes."""
        outcome = self.convert(name, folder="whole", resume=False, **arguments)
        self.assertEqual(outcome.kept_bytes, 0)
        return self.tree(f"whole/{name}")

    def tree(self, name: str) -> power_cut.Tree:
        found = power_cut.tree(self.folder / name)
        self.assertIsNotNone(found)
        return found

    def left(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if ".apr-jax-" in name)

    def temporary(self) -> pathlib.Path:
        (name,) = (name for name in self.left() if temporaries.TEMPORARY in name)
        return self.folder / name

    def journal(self) -> pathlib.Path:
        (name,) = (name for name in self.left() if temporaries.JOURNAL in name)
        return self.folder / name

    def refused(self, code: str, **arguments) -> AprJaxError:
        with self.assertRaises(UsageError) as caught:
            self.convert("m.apr", **arguments)
        self.assertEqual(caught.exception.code, code)
        return caught.exception


class ResumeTest(ResumeTestCase):
    @parameterized.parameters(*TARGETS)
    def test_stopped_anywhere_it_gives_the_same_bytes_and_does_nothing_twice(self, name):
        whole = self.whole(name)
        for writes in (0, 1, 2, 9, 30, 60):
            with mock.patch.object(
                streaming._Mover, "_move", autospec=True, side_effect=streaming._Mover._move
            ) as move:
                self.stopped(name, writes)
                self.assertFalse((self.folder / name).exists())
                self.assertLen(self.left(), 2)
                outcome = self.convert(name)
            self.assertEqual(self.tree(name), whole)
            self.assertEqual(self.left(), [])
            self.assertIn(f"goes on from '{self.folder}/.{name}.apr-jax-tmp.", self.said[-1])
            moved = sum(call.args[1].nbytes for call in move.call_args_list)
            self.assertBetween(moved, 210_048, 210_048 + BLOCK)
            if writes == 60:
                self.assertGreaterEqual(outcome.kept_bytes, 10 * BLOCK)
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def test_from_an_apr_whose_checksum_covers_what_an_earlier_run_has_read(self):
        self.convert("m.apr", folder="from", resume=False)
        source = self.folder / "from" / "m.apr"
        whole = self.whole("shards", source=source)
        self.stopped("shards", 40, source=source)
        outcome = self.convert("shards", source=source)
        self.assertTrue(outcome.footer_checked)
        self.assertGreater(outcome.kept_bytes, 0)
        self.assertEqual(self.tree("shards"), whole)
        data = bytearray(source.read_bytes())
        data[-200_000] ^= 1
        source.write_bytes(data)
        self.stopped("hf", 40, source=source)
        with self.assertRaises(BrokenContainerError) as caught:
            self.convert("hf", source=source)
        self.assertEqual(caught.exception.code, "footer-crc")
        self.assertEqual(self.left(), [], "what cannot become right is not kept")

    @parameterized.parameters("q8", "q4k", "f16")
    def test_casts_come_to_the_same_bytes_and_figures(self, cast):
        whole = self.whole("m.apr", cast=cast)
        expected = self.convert("n.apr", cast=cast, resume=False)
        self.stopped("m.apr", 19, cast=cast)
        outcome = self.convert("m.apr", cast=cast)
        self.assertGreater(outcome.kept_bytes, 0)
        self.assertEqual(self.tree("m.apr"), whole)
        self.assertEqual((outcome.damage, outcome.quantised), (expected.damage, expected.quantised))

    def test_what_was_written_and_is_no_longer_so_is_written_again(self):
        whole = self.whole("m.apr")
        self.stopped("m.apr", 60)
        notes = [json.loads(line[9:]) for line in self.journal().read_text().splitlines()[1:]]
        kept = sum(note["bytes"] for note in notes)
        self.assertGreater(kept, 10 * BLOCK)
        with open(self.temporary(), "r+b") as file:
            file.seek(notes[3]["at"] + 100)
            file.write(b"another")
        outcome = self.convert("m.apr")
        self.assertEqual(outcome.kept_bytes, kept - BLOCK)
        self.assertEqual(self.tree("m.apr"), whole)

    @parameterized.parameters((-1, 1), (-30, 1), (0, 0))
    def test_of_a_torn_journal_the_whole_lines_count(self, end, lacking):
        whole = self.whole("m.apr")
        self.stopped("m.apr", 60)
        text = self.journal().read_bytes()
        self.journal().write_bytes(text[:end] if end else text + b"0" * 100)
        self.stopped("m.apr", 30)
        # What the second run has noted behind the torn line counts as well.
        lines = self.journal().read_bytes().splitlines()
        self.assertGreater(len(lines), len(text.splitlines()))
        outcome = self.convert("m.apr")
        self.assertGreaterEqual(outcome.kept_bytes, (len(text.splitlines()) - 1 - lacking) * BLOCK)
        self.assertEqual(self.tree("m.apr"), whole)

    def test_a_replaced_output_stays_until_the_new_one_is_whole(self):
        older = self.whole("m.apr", source=paths.checkpoint("gqa_untied_bf16"))
        newer = self.whole("m2.apr")
        shutil.copy(self.folder / "whole" / "m.apr", self.folder / "m.apr")
        self.stopped("m.apr", 50, force=True)
        self.refused("output-exists")
        self.assertEqual((self.tree("m.apr"), len(self.left())), (older, 2))
        self.assertGreater(self.convert("m.apr", force=True).kept_bytes, 0)
        self.assertEqual((self.tree("m.apr"), self.left()), (newer, []))

    def test_a_full_disk_is_gone_on_from_when_there_is_room(self):
        whole = self.whole("m.apr")
        self.stopped("m.apr", 50, StorageError("cannot write the output", code="no-space"))
        self.assertIn("--resume goes on from", self.error.text())
        self.assertIn("resume=True", str(self.error))
        # What is there already needs no more room.
        need = (self.folder / "whole" / "m.apr").stat().st_size - self.temporary().stat().st_blocks * 512
        with mock.patch.object(output, "_free_bytes", return_value=need - 1), self.assertRaises(StorageError):
            self.convert("m.apr")
        with mock.patch.object(output, "_free_bytes", return_value=need):
            self.assertGreater(self.convert("m.apr").kept_bytes, 0)
        self.assertEqual(self.tree("m.apr"), whole)

    def test_an_error_of_one_thread_stops_another_within_a_block_which_does_not_count(self):
        whole = self.whole("m.apr")
        begun, lock, threads, all_workers = threading.Event(), threading.Lock(), list[int](), list[Workers]()
        work, write = streaming._Mover.work, output.OutputFile.write_at

        def work_noted(mover, workers):
            all_workers.append(workers)
            work(mover, workers)

        def write_at(file, data, offset):
            if not all_workers:
                return write(file, data, offset)  # what stands before the tensors
            with lock:
                threads.append(threading.get_ident())
                first = threading.get_ident() == threads[0]
            if first:
                self.assertTrue(begun.wait(60))
                raise StorageError("cannot write the output", code="no-space")
            write(file, data, offset)
            begun.set()
            deadline = time.monotonic() + 60
            while not all_workers[0].stopped and time.monotonic() < deadline:
                time.sleep(1e-3)
            return None

        with (
            mock.patch.object(streaming, "_MAX_THREADS", 2),
            mock.patch.object(os, "sched_getaffinity", return_value={0, 1}),
            mock.patch.object(streaming._Mover, "work", work_noted),
            mock.patch.object(output.OutputFile, "write_at", write_at),
            self.assertRaises(StorageError),
        ):
            self.convert("m.apr")
        self.assertLen(threads, 2, "a chunk of each")
        self.assertLen(self.journal().read_text().splitlines(), 1, "nothing but what it is the journal of")
        self.assertEqual(self.convert("m.apr").kept_bytes, 0)
        self.assertEqual(self.tree("m.apr"), whole)

    def test_what_an_earlier_run_left_is_cut_off_while_it_is_read(self):
        self.stopped("m.apr", 60)
        temporary = self.temporary()

        def shrinks(call, real, args, options):
            if call.path == str(temporary):
                os.truncate(temporary, 5000)
            return real(*args, **options)

        fault = file_faults.Fault("shrinks", frozenset({"preadv"}), shrinks, lasting=True)
        with file_faults.planted(self.folder, fault, 0), self.assertRaises(StorageError) as caught:
            self.convert("m.apr")
        self.assertIn("the file has become shorter", str(caught.exception))

    def test_a_journal_that_cannot_be_removed_is_named_and_the_output_is_whole(self):
        whole = self.whole("m.apr")
        fails = file_faults.fails(errno.EIO, frozenset({"unlink"}))
        with file_faults.planted(self.folder, fails, 0) as hit:
            self.convert("m.apr")
        self.assertIn(temporaries.JOURNAL, hit[0].path)
        self.assertEqual(self.said[-1], f"'{hit[0].path}' could not be removed: input/output error")
        self.assertEqual((self.tree("m.apr"), len(self.left())), (whole, 1))
        self.convert("m.apr", force=True)
        self.assertEqual(self.left(), [])

    @parameterized.parameters(0, 1)
    def test_what_cannot_be_taken_over_is_left_to_the_next_run(self, which):
        whole = self.whole("m.apr")
        self.stopped("m.apr", 60)
        fails = file_faults.fails(errno.EIO, frozenset({"rename"}))
        with file_faults.planted(self.folder, fails, which), self.assertRaises(StorageError):
            self.convert("m.apr")
        self.assertLen(self.left(), 2)
        self.assertGreater(self.convert("m.apr").kept_bytes, 10 * BLOCK)
        self.assertEqual((self.tree("m.apr"), self.left()), (whole, []))


class RefusedTest(ResumeTestCase):
    def setUp(self):
        super().setUp()
        self.stopped("m.apr", 50)
        self.before = self.left()

    def test_another_source_is_refused_even_with_the_size_and_the_time_of_the_first(self):
        file = self.source / "model.safetensors"
        found = file.stat()
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
        error = self.refused("resume-differs")
        self.assertEqual(error.found, f"source: {file}")
        self.assertIn("Leave --resume away to start anew", error.text())
        self.assertEqual(self.left(), self.before)
        other = paths.checkpoint("gqa_untied_bf16")
        self.assertEqual(self.refused("resume-differs", source=other).found, "source, options")

    def test_other_options_are_refused(self):
        self.assertEqual(self.refused("resume-differs", cast="f32").found, "options")
        self.assertEqual(self.refused("resume-differs", cast="*norm*=f32").found, "options")
        self.assertEqual(self.left(), self.before)

    def test_another_version_is_refused(self):
        with mock.patch("importlib.metadata.version", return_value="99.0"):
            self.assertEqual(self.refused("resume-differs").found, "version")

    def test_the_command_says_what_to_do(self):
        done = tool.ran(self, "convert", self.source, self.folder / "m.apr", "--cast", "f32", "--resume", code=2)
        self.assertIn("was made of something else (found options, expected the same version", done.stderr)
        done = tool.ran(self, "convert", self.source, self.folder / "m.apr", "--resume", "--json")
        self.assertGreater(json.loads(done.stdout)["outcome"]["kept_bytes"], 10 * BLOCK)
        self.assertIn("goes on from", done.stderr)

    def test_without_resume_it_begins_anew_and_removes_both(self):
        self.assertEqual(self.convert("m.apr", resume=False).kept_bytes, 0)
        self.assertCountEqual(self.said, [f"removed '{name}', which an earlier run had left" for name in self.before])
        self.assertEqual(self.left(), [])

    def test_what_another_process_is_writing_is_not_touched(self):
        locks = [os.open(self.folder / name, os.O_RDONLY) for name in self.before]
        self.addCleanup(lambda: [os.close(fd) for fd in locks])
        import fcntl

        for fd in locks:
            fcntl.flock(fd, fcntl.LOCK_EX)
        self.assertEqual(self.convert("m.apr").kept_bytes, 0)
        self.assertEqual(self.left(), self.before)

    def test_what_somebody_else_may_have_made_is_not_gone_on_with(self):
        for name in ("temporary", "journal"):
            path = getattr(self, name)()
            os.link(path, self.folder / "other")
            self.assertEqual(self.convert("m.apr").kept_bytes, 0, name)
            (self.folder / "m.apr").unlink()
            (self.folder / "other").unlink()
            self.stopped("m.apr", 50)

    def test_links_are_not_followed(self):
        for name in ("temporary", "journal"):
            path = getattr(self, name)()
            content = path.read_bytes()
            path.rename(self.folder / "elsewhere")
            path.symlink_to(self.folder / "elsewhere")
            self.assertEqual(self.convert("m.apr").kept_bytes, 0, name)
            self.assertEqual((self.folder / "elsewhere").read_bytes(), content)
            for left in ("m.apr", *self.left()):
                (self.folder / left).unlink()
            self.stopped("m.apr", 50)

    @absltest.skipIf(os.geteuid() != 0, "only root gives files away")
    def test_another_users_journal_is_not_believed(self):
        os.chown(self.journal(), 12345, -1)
        self.assertEqual(self.convert("m.apr").kept_bytes, 0)

    def test_a_journal_without_its_output_and_the_other_way_round_are_removed(self):
        for kind in (temporaries.TEMPORARY, temporaries.JOURNAL):
            with self.subTest(kind):
                (name,) = (name for name in self.left() if kind in name)
                (self.folder / name).unlink()
                self.assertEqual(self.convert("m.apr").kept_bytes, 0)
                self.assertEqual(self.left(), [])
                (self.folder / "m.apr").unlink()
                self.stopped("m.apr", 50)

    def test_a_folder_with_files_of_others_in_it_is_refused(self):
        self.stopped("shards", 50)
        (stray,) = (self.folder / name for name in self.left() if name.startswith(".shards.apr-jax-tmp"))
        (stray / "thesis.txt").write_text("unique")
        with self.assertRaises(UsageError) as caught:
            self.convert("shards")
        self.assertEqual((caught.exception.code, caught.exception.found), ("resume-foreign", "thesis.txt"))


def states(folder: pathlib.Path, record: power_cut.Record, step: int) -> Iterator[dict[str, power_cut.Tree]]:
    """Yields every so many-th state of a disk after a power cut at any moment."""
    number = 0
    for calls in range(len(record.events) + 1):
        for state in power_cut.after(record, calls):
            number += 1
            if number % step == 0:
                yield state


def build(path: pathlib.Path, tree: power_cut.Tree) -> None:
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, inner in tree:
        build(path / name, inner)


@pytest.mark.slow
class PowerCutTest(ResumeTestCase):
    @parameterized.parameters("m.apr", "shards")
    def test_after_a_power_cut_at_any_moment_it_goes_on_to_the_same_bytes(self, name):
        whole = self.whole(name)
        inner = self.folder / "inner"
        inner.mkdir()
        with (
            mock.patch.object(streaming, "_BLOCK_BYTES", 1 << 15),
            mock.patch.object(streaming, "_CHUNK_BYTES", 1 << 15),
        ):
            with power_cut.recorded(inner) as record:
                self.convert(name, folder="inner")
            outcomes: Counter[str] = Counter()
            for state in states(inner, record, 101 if name == "m.apr" else 2503):
                shutil.rmtree(inner)
                inner.mkdir()
                for each, tree in state.items():
                    build(inner / each, tree)
                if name in state:
                    self.assertEqual(state[name], whole)
                    outcomes["whole"] += 1
                    continue
                kept = self.convert(name, folder="inner").kept_bytes
                outcomes["kept" if kept else "anew"] += 1
                self.assertEqual(self.tree(f"inner/{name}"), whole)
                self.assertEqual(os.listdir(inner), [name])
        self.assertGreater(outcomes["kept"], 2, outcomes)
        self.assertGreater(outcomes["anew"], 2, outcomes)


@pytest.mark.slow
class FaultTest(ResumeTestCase):
    @parameterized.product(name=["m.apr", "shards"], fault=[*file_faults.ERRORS, *file_faults.INTERRUPTS])
    def test_after_any_call_that_goes_wrong_it_goes_on_to_the_same_bytes(self, name, fault):
        whole = self.whole(name)
        inner = self.folder / "inner"
        at, outcomes = 0, Counter[str]()
        with mock.patch.object(streaming, "_BLOCK_BYTES", 1 << 15):
            while True:
                inner.mkdir()
                with file_faults.planted(inner, fault, at) as hit:
                    try:
                        self.convert(name, folder="inner")
                    except (AprJaxError, KeyboardInterrupt) as error:
                        outcomes[type(error).__name__] += 1
                if not hit:
                    break
                self.assertIn(power_cut.tree(inner / name), (None, whole))
                if not (inner / name).exists():
                    outcomes["kept"] += bool(self.convert(name, folder="inner").kept_bytes)
                self.assertEqual(self.tree(f"inner/{name}"), whole)
                self.assertEqual([each for each in os.listdir(inner) if temporaries.TEMPORARY in each], [])
                shutil.rmtree(inner)
                at += 7
        self.assertNotEmpty(outcomes)


# As a user runs it, but in small pieces, so that a kill comes between any two of them; counts what is read.
_COUNTED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.convert import streaming
from apr_jax.converters.storage import source
streaming._CHUNK_BYTES, streaming._BLOCK_BYTES = 1 << 10, 1 << 10
counted = open(sys.argv[2], "a", buffering=1)
move = streaming._Mover._move
def counting(self, block, buffer, workers):
    counted.write(f"{block.nbytes}\\n")
    time.sleep(1e-3)
    return move(self, block, buffer, workers)
streaming._Mover._move = counting
from apr_jax.converters.commands import cli
cli.start("apr_jax.converters.commands.convert", ["convert", *sys.argv[3:]])
"""


@pytest.mark.slow
class KillTest(ResumeTestCase):
    def start(self, name: str, source: pathlib.Path) -> subprocess.Popen[bytes]:
        shards = ("--max-shard-size", "50KB") if name == "shards" else ()
        arguments = (source, "--resume", "-o", self.folder / name, *shards)
        command = [sys.executable, "-c", _COUNTED, paths.ROOT, self.folder / "counted", *arguments]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def begun(self) -> bool:
        counted = self.folder / "counted"
        return counted.exists() and counted.stat().st_size > 0

    @parameterized.parameters(("m.apr", False), ("shards", True))
    def test_kill_9_at_ten_moments(self, name, from_apr):
        source = self.source
        if from_apr:
            self.convert("m.apr", folder="from", resume=False)
            source = self.folder / "from" / "m.apr"
        whole = self.whole(name, source=source)
        chance, total, twice = random.Random(18), 210_048, []
        for moment in range(10):
            process = self.start(name, source)
            while not self.begun():
                time.sleep(1e-3)
            time.sleep(chance.uniform(0.02, 0.18))
            process.kill()
            process.communicate()
            self.assertFalse((self.folder / name).exists(), f"moment {moment}: it had ended")
            process = self.start(name, source)
            _, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0, errors)
            self.assertIn(b"goes on from", errors)
            self.assertEqual((self.tree(name), self.left()), (whole, []))
            read = sum(map(int, (self.folder / "counted").read_text().split()))
            twice.append((read - total) / total)
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self.folder / "counted").unlink()
        print(f"{name}: done twice, in percent: {[round(100 * share, 2) for share in twice]}")
        self.assertLessEqual(max(twice), 0.05)
        self.assertGreaterEqual(min(twice), 0)


if __name__ == "__main__":
    absltest.main()
