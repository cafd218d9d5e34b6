"""Where there is no terminal, --verbose says how far a command is and when it will be done."""

import contextlib
import io
import pathlib
import re
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest

from apr_jax.converters.commands import progress, terminal
from tests import paths, tool

SOURCE = paths.checkpoint("gqa_tied_bf16")


class ProgressTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.now = 1000.0
        self.enter_context(mock.patch.object(progress.time, "monotonic", side_effect=lambda: self.now))
        self.enter_context(mock.patch.object(terminal.manner, "verbose", True))
        self.errors = self.enter_context(contextlib.redirect_stderr(io.StringIO()))

    def lines(self) -> list[str]:
        return [re.sub(r"\d\d:\d\d:\d\d,", "TIME,", line) for line in self.errors.getvalue().splitlines()]

    def test_a_line_every_ten_seconds_says_when_it_will_be_done(self):
        with progress.phases() as show:
            for done in range(0, 101, 10):
                show("bytes", done, 400)
                self.now += 4
            # Another phase begins anew.
            show("values", 5, 10)
            self.now += 30
            show("values", 6, 12)
        # 30 of 400 in 12 s: the other 370 take 148.
        self.assertEqual(
            self.lines(),
            [
                "bytes: 7 %, done at TIME, in 0:02:28",
                "bytes: 15 %, done at TIME, in 0:02:16",
                "bytes: 22 %, done at TIME, in 0:02:04",
                "values: 50 %, done at TIME, in 0:00:30",
            ],
        )

    def test_a_bar_of_bytes_adds_up(self):
        with progress.bar_of(1000) as advance:
            advance(0)
            for _ in range(5):
                self.now += 7
                advance(100)
        self.assertEqual(self.lines(), ["data: 20 %, done at TIME, in 0:00:56", "data: 40 %, done at TIME, in 0:00:42"])

    def test_nobody_looks_without_verbose_or_a_terminal(self):
        terminal.manner.verbose = False
        with progress.phases() as show, progress.bar_of(1) as advance:
            self.assertEqual((show, advance), (None, None))


class CommandTest(absltest.TestCase):
    def test_a_comparison_says_how_far_it_is(self):
        with mock.patch.object(progress, "_SECONDS_BETWEEN_LINES", 0.0):
            done = tool.ran(self, "verify", SOURCE, SOURCE, "--verbose")
            self.assertRegex(done.stderr, r"bytes: 100 %, done at \d\d:\d\d:\d\d, in 0:00:00\n")
            self.assertNotIn("%", tool.ran(self, "verify", SOURCE, SOURCE).stderr)


if __name__ == "__main__":
    absltest.main()
