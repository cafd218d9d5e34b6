"""Signals: the first one interrupts, others wait, none is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from apr_jax.converters.storage import interrupts
from tests import paths


class InterruptTest(parameterized.TestCase):
    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_a_signal_that_was_ignored_stays_ignored_within_and_after(self, number):
        # As of a job behind nohup, whose terminal goes away.
        before = signal.signal(number, signal.SIG_IGN)
        self.addCleanup(signal.signal, number, before)
        with interrupts.termination_as_interrupt() as check:
            self.assertIs(signal.getsignal(number), signal.SIG_IGN)
            os.kill(os.getpid(), number)
            check()
        self.assertIs(signal.getsignal(number), signal.SIG_IGN)

    @parameterized.parameters((signal.default_int_handler, False), (signal.SIG_IGN, True), (signal.SIG_DFL, True))
    def test_until_a_command_begins_only_pythons_own_way_to_take_an_interrupt_is_replaced(self, handler, kept):
        before = signal.signal(signal.SIGINT, handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        interrupts.end_at_once()
        self.assertEqual(signal.getsignal(signal.SIGINT) is handler, kept)

    def test_signals_are_what_they_were_after_the_block_or_ignored_where_the_process_ends_with_it(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in before.items():
            self.addCleanup(signal.signal, number, handler)
        with interrupts.termination_as_interrupt():
            self.assertNotIn(signal.SIG_DFL, [signal.getsignal(number) for number in numbers])
        self.assertEqual({number: signal.getsignal(number) for number in numbers}, before)
        with interrupts.termination_as_interrupt(last=True):
            pass
        self.assertEqual([signal.getsignal(number) for number in numbers], [signal.SIG_IGN] * 3)

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_the_first_signal_is_raised_and_others_do_not_cut_the_cleaning_up_short(self, number):
        before = signal.getsignal(number)
        with self.assertRaises(KeyboardInterrupt), interrupts.termination_as_interrupt():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)
        self.assertIs(signal.getsignal(number), before)

    def test_a_swallowed_signal_comes_back_when_asked_at_the_end_and_in_place_of_an_error(self):
        def swallow() -> None:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

        with self.assertRaises(KeyboardInterrupt), interrupts.termination_as_interrupt():
            swallow()
        with self.assertRaises(KeyboardInterrupt), interrupts.termination_as_interrupt():
            swallow()
            raise ImportError("partially initialised")
        with self.assertRaises(KeyboardInterrupt), interrupts.termination_as_interrupt() as check:
            check()
            swallow()
            self.assertRaises(KeyboardInterrupt, check)


class BoundedTest(parameterized.TestCase):
    def test_a_block_that_nothing_interrupts_leaves_nothing_behind_and_says_nothing(self):
        before, said = set(threading.enumerate()), []
        with interrupts.bounded(), interrupts.last_act(lambda: said.append("last words")):
            (watcher,) = set(threading.enumerate()) - before
        self.assertFalse(watcher.is_alive())
        self.assertEmpty(said)
        self.assertEqual(signal.set_wakeup_fd(-1), -1)

    def test_an_interrupt_that_the_block_notices_is_its_own_and_has_the_last_words_once(self):
        said = []
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        with (
            self.assertRaises(KeyboardInterrupt),
            interrupts.bounded(),
            interrupts.last_act(lambda: said.append("last words")),
        ):
            os.kill(os.getpid(), signal.SIGINT)
        self.assertEqual(said, ["last words"])

    def test_in_a_helper_thread_nothing_is_done(self):
        done = []

        def work():
            with interrupts.termination_as_interrupt() as check, interrupts.bounded():
                check()
                done.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
        self.assertEqual(done, [True])

    def test_another_signal_than_those_that_end_a_process_ends_none(self):
        seen = []
        self.addCleanup(signal.signal, signal.SIGWINCH, signal.signal(signal.SIGWINCH, lambda *_: seen.append(1)))
        with mock.patch.object(interrupts, "GRACE_SECONDS", 0.05), interrupts.bounded():
            os.kill(os.getpid(), signal.SIGWINCH)
            time.sleep(0.3)
        self.assertEqual(seen, [1])

    def test_a_second_signal_is_nothing_to_complain_of(self):
        code = """
import os, signal, time
from apr_jax.converters.storage import interrupts
with interrupts.bounded():
    signal.signal(signal.SIGTERM, lambda *_: None)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_a_process_that_does_not_notice_is_ended_and_leaves_no_temporary(self, number):
        # Two locks of one mutex: a call into C that never returns, like a long compilation or product.
        code = """
import ctypes, os, sys, threading
from apr_jax.converters.storage import interrupts, output
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
kind = output.FolderKind("kind", lambda name: True, lambda name: True)
with (
    interrupts.termination_as_interrupt(last=True),
    interrupts.bounded(),
    output.atomic_file(sys.argv[1] + "/file", 9),
    output.atomic_folder(sys.argv[1] + "/folder", 9, kind=kind) as folder,
    folder.create("inner/file", 9),
    interrupts.last_act(lambda: print("last words", os.listdir(sys.argv[1]).__len__())),
):
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.3, print, ("stuck",), {"flush": True}).start()
    libc.pthread_mutex_lock(mutex)
"""
        folder = self.create_tempdir().full_path
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=paths.ROOT,
        )
        self.assertEqual(process.stdout.readline(), "stuck\n")
        begun = time.monotonic()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        self.assertLess(time.monotonic() - begun, 10, "1 s on an idle machine")
        self.assertEqual((process.returncode, output, errors), (130, "last words 2\n", "interrupted\n"))
        self.assertEmpty(os.listdir(folder))


if __name__ == "__main__":
    absltest.main()
