"""What is being done, and when it will be done, is said if it takes long; a terminal's line is gone at the end."""

import contextlib
import io
import os
import pathlib
import pty
import re
import subprocess
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.converters.commands import progress, terminal
from tests import paths, tool

SOURCE = paths.checkpoint("gqa_tied_bf16")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class TellingTest(parameterized.TestCase):
    def shown(self, stream: io.StringIO, seconds: float) -> str:
        self.enter_context(mock.patch.dict(os.environ, TERM="xterm"))
        self.enter_context(mock.patch.multiple(progress, _FIRST=0.2, _BETWEEN=0.2))
        with mock.patch.object(sys, "stderr", stream), progress.telling("loading [a] model") as tell:
            for text in ("reading", "judging \x1b[2J"):
                time.sleep(seconds / 2)
                tell(text)
            time.sleep(seconds / 2)
        return stream.getvalue()

    def test_a_terminal_shows_what_is_done_now_and_clears_it_at_the_end(self):
        shown = self.shown(_Terminal(), 1.2)
        self.assertIn("loading [a] model", shown)
        self.assertIn("judging", shown)
        self.assertNotIn("\x1b[2J", shown)
        self.assertEndsWith(shown, "\x1b[2K")

    def test_elsewhere_it_is_lines(self):
        shown = self.shown(io.StringIO(), 0.6)
        self.assertEqual(shown, "... reading\n... judging \\x1b[2J\n")

    @parameterized.parameters(_Terminal, io.StringIO)
    def test_what_is_quick_shows_nothing(self, kind):
        self.assertEqual(self.shown(kind(), 0.01), "")

    @parameterized.parameters(_Terminal, io.StringIO)
    def test_quiet(self, kind):
        with mock.patch.object(terminal.manner, "quiet", True):
            self.assertEqual(self.shown(kind(), 0.6), "")


class RemainingTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.now = 1000.0
        self.enter_context(mock.patch.object(progress.time, "monotonic", side_effect=lambda: self.now))
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

    def test_nobody_looks_with_quiet(self):
        self.enter_context(mock.patch.object(terminal.manner, "quiet", True))
        with progress.phases() as show, progress.bar_of(1) as advance:
            self.assertEqual((show, advance), (None, None))


class VerifyTest(absltest.TestCase):
    def test_a_comparison_says_how_far_it_is(self):
        with mock.patch.object(progress, "_BETWEEN", 0.0):
            done = tool.ran(self, "verify", SOURCE, SOURCE)
            self.assertRegex(done.stderr, r"bytes: 100 %, done at \d\d:\d\d:\d\d, in 0:00:00\n")
            self.assertNotIn("%", tool.ran(self, "verify", SOURCE, SOURCE, "--quiet").stderr)


class CommandsTest(parameterized.TestCase):
    @pytest.mark.slow
    @parameterized.parameters(
        ("golden", "SAMPLE", "-o", "golden.safetensors"),
        ("generate", "SAMPLE", "--prompt", "x", "--max-new-tokens", "1"),
        ("loss", "SAMPLE", "--text", "text.txt"),
        ("checkpoint", "save", "SAMPLE", "prepared"),
        ("parity", "SAMPLE", "--right", "cpu"),
    )
    def test_what_takes_its_time_says_what_it_does(self, *words):
        folder = pathlib.Path(self.create_tempdir().full_path)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
        (folder / "SAMPLE").symlink_to(paths.checkpoint("gqa_tied_bf16"))
        # As if everything took its time.
        code = "import sys; from apr_jax.converters.commands import progress; progress._FIRST = 0.0\n"
        code += "from apr_jax.commands import entry; sys.argv = ['apr-jax', *sys.argv[1:]]; entry.run()"
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(paths.ROOT)}
        with subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
        ) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    part = os.read(ours, 4096)
                except OSError:  # the other end is closed
                    break
                if not part:
                    break
                shown += part
        os.close(ours)
        self.assertEqual(process.returncode, 0, shown)
        self.assertRegex(shown.decode(), r"(loading|computing|saving|running)[a-z ]*.*0:00:0")


if __name__ == "__main__":
    absltest.main()
