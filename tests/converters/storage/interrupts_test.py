"""Signals: the first one interrupts, others wait, none is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

from absl.testing import absltest, parameterized

from apr_jax.converters.storage import interrupts


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


class BoundedTest(absltest.TestCase):
    def test_a_block_that_nothing_interrupts_leaves_nothing_behind_and_says_nothing(self):
        before, said = set(threading.enumerate()), []
        with interrupts.bounded(lambda: said.append("last words")):
            (watcher,) = set(threading.enumerate()) - before
        self.assertFalse(watcher.is_alive())
        self.assertEmpty(said)
        self.assertEqual(signal.set_wakeup_fd(-1), -1)

    def test_an_interrupt_that_the_block_notices_is_its_own_and_has_the_last_words_once(self):
        said = []
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        with self.assertRaises(KeyboardInterrupt), interrupts.bounded(lambda: said.append("last words")):
            os.kill(os.getpid(), signal.SIGINT)
        self.assertEqual(said, ["last words"])


if __name__ == "__main__":
    absltest.main()
