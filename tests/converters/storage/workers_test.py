"""Threads for a block: results in order, the first error ends all, none is at work behind it, Ctrl-C or not."""

import ast
import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import StorageError
from apr_jax.converters.inspect import checks
from apr_jax.converters.storage.source import SourceFile
from apr_jax.converters.storage.workers import Workers, at_once
from apr_jax.converters.verify import comparison
from tests.paths import ROOT, checkpoint

LONG = 0.05


class InterruptedCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)


class WorkersTest(parameterized.TestCase):
    def test_results_come_in_the_order_of_the_items_whoever_is_first(self):
        def late(number):
            time.sleep(0.01 * (3 - number % 4))
            return number

        with Workers(4) as workers:
            self.assertEqual(list(workers.map(late, range(12))), list(range(12)))
            self.assertEqual(workers.start(pow, 2, 5).result(), 32)
            self.assertIsNone(workers.start(time.sleep, 0).result())

    @parameterized.parameters(1, 3)
    def test_there_are_as_many_threads_as_were_asked_for_and_never_this_one(self, most):
        lock, now, highest, seen = threading.Lock(), 0, 0, set()

        def watched(_):
            nonlocal now, highest
            with lock:
                now += 1
                highest = max(highest, now)
                seen.add(threading.get_ident())
            time.sleep(0.002)
            with lock:
                now -= 1

        with Workers(most) as workers:
            for _ in range(3):
                list(workers.map(watched, range(4 * most)))
                time.sleep(0.005)
        self.assertEqual(highest, most)
        self.assertNotIn(threading.get_ident(), seen)

    def test_each_of_the_threads_does_its_share_at_once(self):
        # Passes only if all of them are there together.
        barrier = threading.Barrier(3, timeout=10)
        numbers = []
        at_once(lambda workers: numbers.append(barrier.wait()), 3)
        self.assertCountEqual(numbers, [0, 1, 2])

    def test_the_first_error_is_raised_and_drops_what_has_not_begun(self):
        begun = []

        def failing(number):
            begun.append(number)
            if number == 3:
                raise StorageError("no", code="write-failed")
            time.sleep(0.001)

        with self.assertRaisesRegex(StorageError, "no"), Workers(2) as workers:
            list(workers.map(failing, range(10_000)))
        self.assertTrue(workers.stopped)
        self.assertLess(len(begun), 1000)

    def test_long_tasks_can_see_that_another_one_failed(self):
        def lasting():
            while not workers.stopped:
                time.sleep(0.001)

        def failing():
            raise ValueError("failed")

        with self.assertRaisesRegex(ValueError, "failed"), Workers(2) as workers:
            last, _ = workers.start(lasting), workers.start(failing)
            while not last.is_done():
                time.sleep(0.001)
            # It came to its end early: this is no result.
            last.result()
        self.assertIsInstance(workers.error, ValueError)

    def test_what_has_begun_is_awaited_behind_the_block_and_what_has_not_is_dropped(self):
        done = []

        def slow(number):
            time.sleep(LONG)
            done.append(number)

        with self.assertRaisesRegex(ValueError, "mine"), Workers(1) as workers:
            tasks = [workers.start(slow, number) for number in range(3)]
            while not workers._working:
                time.sleep(0.001)
            raise ValueError("mine")
        self.assertEqual(done, [0])
        self.assertEqual([task.is_done() for task in tasks], [True, False, False])
        with self.assertRaisesRegex(RuntimeError, "ended"):
            tasks[1].result()


class InterruptTest(InterruptedCase):
    @parameterized.parameters("waits for a result", "is at the end of the block", "ends by an error")
    def test_ctrl_c_is_raised_when_what_has_begun_is_done_wherever_this_thread_is(self, where):
        done = []

        def interrupting():
            time.sleep(LONG)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(LONG)
            done.append(True)

        with self.assertRaises(KeyboardInterrupt), Workers(2) as workers:
            tasks = [workers.start(interrupting), workers.start(time.sleep, 3 * LONG)]
            while workers._working < 2:
                time.sleep(0.001)
            if where == "waits for a result":
                tasks[1].result()
            elif where == "ends by an error":
                raise ValueError
        self.assertEqual((done, workers._working), ([True], 0))

    def test_a_process_ends_however_often_it_was_interrupted_while_threads_began(self):
        # A thread that waits for a lock which an interrupt left held would keep it from ending.
        code = """
import random, signal, sys
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.storage.workers import Workers
signal.signal(signal.SIGALRM, signal.default_int_handler)
interrupted = 0
for moment in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.Random(moment).uniform(1e-6, 4e-4))
        try:
            with Workers(8) as workers:
                list(workers.map(int, range(8)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted)
"""
        done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True, timeout=60)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertGreater(int(done.stdout), 100)

    def test_nothing_is_at_work_behind_200_blocks_interrupted_at_any_moment(self):
        # The clock interrupts once in each round, within the block or around it.
        generator = random.Random(0)
        working: set[int] = set()
        interrupted = 0

        def busy(number):
            working.add(number)
            time.sleep(0.0005)
            working.discard(number)

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, signal.default_int_handler))
        for _ in range(200):
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-5, 5e-3))
                    with Workers(3) as workers:
                        list(workers.map(busy, range(20)))
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    # What is at work now is behind the block.
                    self.assertEmpty(working)
                    signal.setitimer(signal.ITIMER_REAL, 0)
        self.assertGreater(interrupted, 50)


class UsersTest(InterruptedCase):
    """Whoever reads files in threads: no read goes on when the interrupt is out, since files are closed then."""

    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(os, "sched_getaffinity", return_value=set(range(4))))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def interrupted(self, call: Callable[[], object], owner: type = SourceFile, name: str = "readinto_at") -> None:
        """Interrupts a call in its first read (or write) by a helper, which then goes on for a while."""
        real, lock, at_work, helped = getattr(owner, name), threading.Lock(), set(), []

        def slow(*arguments):
            helper = threading.get_ident()
            if helper == threading.main_thread().ident:
                return real(*arguments)
            with lock:
                first = not helped
                helped.append(helper)
                at_work.add(helper)
            if first:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(LONG)
            try:
                return real(*arguments)
            finally:
                at_work.discard(helper)

        with mock.patch.object(owner, name, slow), self.assertRaises(KeyboardInterrupt):
            call()
        self.assertEmpty(at_work)
        count = len(helped)
        time.sleep(2 * LONG)
        self.assertEqual(len(helped), count, "a helper went on")

    def test_a_conversion(self):
        self.interrupted(lambda: convert(checkpoint("gqa_tied_bf16"), self.folder / "m.apr", to="apr"))
        self.assertEqual(os.listdir(self.folder), [])

    def test_the_writes_of_a_conversion(self):
        from apr_jax.converters.storage.output import OutputFile

        writing = lambda: convert(checkpoint("gqa_tied_bf16"), self.folder / "m.apr", to="apr")  # noqa: E731
        self.interrupted(writing, OutputFile, "write_at")
        self.assertEqual(os.listdir(self.folder), [])

    def test_an_inspection(self):
        with open_checkpoint(checkpoint("gqa_tied_bf16")) as opened:
            self.interrupted(lambda: checks.inspect(opened))

    def test_a_comparison_of_bytes(self):
        with open_checkpoint(checkpoint("gqa_tied_bf16")) as a, open_checkpoint(checkpoint("gqa_tied_bf16")) as b:
            self.interrupted(lambda: comparison.compare(a, b))

    def test_loading_a_model(self):
        from apr_jax.load.load_model import load_model

        self.interrupted(lambda: load_model(checkpoint("gqa_tied_bf16"), "float32", "cpu"))


class OnePoolTest(absltest.TestCase):
    def test_nobody_else_starts_threads_or_joins_them(self):
        # One that watches for signals, or for other processes, is no helper: it reads and writes no tensors.
        allowed = {"workers.py", "interrupts.py", "processes.py"}
        for path in [*(ROOT / "converters").rglob("*.py"), *(ROOT / "apr_jax").rglob("*.py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                named = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
                named |= {node.module} if isinstance(node, ast.ImportFrom) else set()
                named |= {node.attr} if isinstance(node, ast.Attribute) else set()
                if path.name not in allowed:
                    self.assertEmpty(named & {"concurrent.futures", "_thread", "Thread", "multiprocessing"}, path)


if __name__ == "__main__":
    absltest.main()
