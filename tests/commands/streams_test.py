"""What commands print and how they end, whatever their streams, their arguments and the names in files are."""

import contextlib
import errno
import io
import json
import os
import pathlib
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.commands.entry import COMMANDS
from apr_jax.converters.commands import cli, progress, tables, terminal
from apr_jax.trace import aprt, inputs, stages
from tests import paths, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")
# What a terminal obeys: a clear, a title, a bidirectional override, a C1 introducer, a line of its own.
EVIL = "x\x1b[2J\x1b]0;t\x07\u202ey\u009b5m\u2066z"


def process(command: str, *args: object, **settings: object) -> subprocess.CompletedProcess:
    program = [sys.executable, str(paths.ROOT / "tools" / f"{command.replace('-', '_')}.py"), *map(str, args)]
    return subprocess.run(program, check=False, **{"capture_output": True, **settings})


def unsafe(text: str) -> list[str]:
    return [hex(ord(c)) for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")]


class StreamsTest(parameterized.TestCase):
    @parameterized.parameters((), ("--json",))
    def test_a_full_disk_under_stdout_is_an_error_of_its_own(self, *options):
        with open("/dev/full", "w") as full:
            done = process("show", SAMPLE, *options, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(done.returncode, 7)
        self.assertRegex(done.stderr.decode(), "error: stdout: the output cannot be written: No space")
        self.assertEqual(done.stderr.count(b"\n"), 1)

    @parameterized.parameters(("show", ["nothing"], 3), ("show", ["--nothing"], 2), ("verify", [SAMPLE, "nothing"], 3))
    def test_a_full_disk_under_stderr_changes_no_exit_code(self, command, args, code):
        with open("/dev/full", "w") as full:
            done = process(command, *args, capture_output=False, stdout=subprocess.PIPE, stderr=full)
        self.assertEqual((done.returncode, done.stdout), (code, b""))

    @parameterized.parameters((), ("--json",))
    def test_a_reader_that_went_away_is_no_failure(self, *options):
        reader, writer = os.pipe()
        os.close(reader)
        done = process("show", SAMPLE, *options, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    @parameterized.parameters(
        (MemoryError(), "error: there is not enough memory"),
        (OSError(errno.EACCES, "Permission denied", "x"), "error: x: Permission denied"),
        (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files"),
    )
    def test_what_the_system_refuses_is_one_line_and_exit_7(self, error, said):
        with (
            contextlib.redirect_stderr(io.StringIO()) as stream,
            self.assertRaises(SystemExit) as caught,
            cli._ending_on_error(["show"], lambda: None),
        ):
            raise error
        self.assertEqual((caught.exception.code, stream.getvalue().count("\n")), (7, 1))
        self.assertStartsWith(stream.getvalue(), said + ". ")

    @parameterized.parameters(*COMMANDS)
    def test_an_interrupt_while_modules_are_imported_says_nothing(self, command):
        """The handlers of a command are not there yet: a module that it imports sends the signal."""
        folder = pathlib.Path(self.create_tempdir().full_path)
        (folder / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        done = process(command, "--help", env={**os.environ, "PYTHONPATH": str(folder)})
        self.assertEqual((done.returncode, done.stdout, done.stderr), (130, b"", b""))

    @parameterized.parameters(*COMMANDS)
    def test_an_empty_name_is_an_error_in_the_usage(self, command):
        own = {"golden": "--check", "parity": "--right", "generate": "--prompts", "show": "--html", "loss": "--jsonl"}
        option = own.get(command, "-o")
        options = [""] if command in ("verify", "checkpoint") else [option, ""]
        options += ["--to", "apr"] if command == "convert" else []
        first = {"checkpoint": ["save", SAMPLE], "make-sample": ["gqa_tied_bf16"]}.get(command, [SAMPLE])
        done = tool.run(command.replace("-", "_"), *first, *options)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("the name is empty", done.stderr)

    def test_a_mistake_of_our_own_is_no_verdict_and_no_traceback(self):
        program = (
            f"import sys; sys.path.insert(0, {os.fspath(paths.ROOT)!r})\n"
            "from apr_jax.converters.commands import cli, verify\n"
            "verify._compare = lambda args: {}['no such key\\x1b']\n"
            "cli.start('apr_jax.converters.commands.verify')"
        )
        for options in ([], ["--json"]):
            done = subprocess.run([sys.executable, "-c", program, "a", "b", *options], capture_output=True, check=False)
            self.assertEqual(done.returncode, 70)
            said = done.stderr.decode()
            self.assertLen(said.splitlines(), 1)
            self.assertNotIn("\x1b", said)
            (log,) = re.findall(r"internal error: KeyError: .*the traceback is in (\S+)$", said.strip())
            self.assertIn("Traceback", pathlib.Path(log).read_text())
            os.unlink(log)
            if options:
                self.assertEqual(json.loads(done.stdout)["error"]["code"], "internal")


class TerminalTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"TERM": "xterm"}, True, True), ({"TERM": "dumb"}, False, False), ({"TERM": ""}, False, False),
        ({}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False), ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
    )  # fmt: skip
    def test_what_a_terminal_can_do(self, environment, moves, colours):
        stream = mock.Mock(isatty=lambda: True)
        with mock.patch.dict(os.environ, environment, clear=True):
            self.assertEqual((terminal.is_terminal(stream), terminal.has_colours(stream)), (moves, colours))
            self.assertFalse(terminal.has_colours(mock.Mock(isatty=lambda: False)))

    @parameterized.parameters(({"TERM": "dumb"}, False), ({"TERM": ""}, False), ({"NO_COLOR": "1"}, False), ({}, True))
    def test_escape_sequences_go_to_terminals_that_obey_them(self, environment, expected):
        outer, inner = pty.openpty()
        environment = (
            {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
        )
        done = process("show", SAMPLE, capture_output=False, stdout=inner, stderr=subprocess.PIPE, env=environment)
        os.close(inner)
        shown = b""
        # The end of a terminal is an error.
        with contextlib.suppress(OSError):
            while piece := os.read(outer, 1 << 16):
                shown += piece
        os.close(outer)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(b"embed_tokens", shown)
        self.assertEqual(b"\x1b" in shown, expected)


class ProgressTest(parameterized.TestCase):
    @parameterized.parameters((True, "3/3 bytes"), (False, "3/3"))
    def test_what_is_counted_is_shown(self, in_bytes, shown):
        stream = mock.MagicMock(wraps=io.StringIO(), isatty=lambda: True, encoding="utf-8")
        with (
            mock.patch.object(progress, "shows_progress", return_value=True),
            mock.patch.dict(os.environ, {"TERM": "xterm", "COLUMNS": "100"}),
            contextlib.redirect_stderr(stream),
            progress.bar_of(3, in_bytes=in_bytes) as advance,
        ):
            advance(3)
        written = "".join(call.args[0] for call in stream.write.call_args_list)
        self.assertIn(shown, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written))

    def test_a_warning_is_said_once_when_the_work_is_done(self):
        with contextlib.redirect_stderr(io.StringIO()) as stream, cli.warnings_said():
            for _ in range(2):
                warnings.warn("this is odd", UserWarning, stacklevel=1)
            self.assertEqual(stream.getvalue(), "")
        self.assertEqual(stream.getvalue(), "warning: this is odd\n")


class TableTest(absltest.TestCase):
    def test_cells_are_escaped_in_plain_tables_and_in_drawn_ones(self):
        for drawn in (False, True):
            out = io.StringIO()
            settled = mock.patch.object(tables, "has_colours", return_value=drawn)
            with settled, contextlib.redirect_stdout(out):
                tables.print_table(("tensor", "n"), [(EVIL, 1)], right=(1,))
            self.assertEqual(unsafe(out.getvalue()), [])
            self.assertIn(r"x\x1b[2J", out.getvalue())


class NamesTest(parameterized.TestCase):
    """Every command, on files whose names and contents try to command the terminal."""

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        self.model = self.folder / EVIL
        shutil.copytree(SAMPLE, self.model)
        (self.model / f"{EVIL}.txt").write_text("left behind")
        (self.model / f"README{EVIL}").write_text("goes along")

    def printed(self, command: str, *args: object, codes: tuple[int, ...] = (0,)) -> str:
        done = tool.run(command.replace("-", "_"), *args)
        text = done.stdout + done.stderr
        self.assertIn(done.returncode, codes, text)
        self.assertEqual(unsafe(text), [], text)
        self.assertNotIn("Traceback", text)
        return text

    def test_show_verify_and_convert(self):
        again = self.folder / f"again{EVIL}.apr"
        self.assertIn(r"\x1b", self.printed("convert", self.model, "--to", "apr", "-o", again))
        self.assertIn(r"\u202e", self.printed("show", self.model))
        self.assertIn(r"\u001b", self.printed("show", again, "--json"))
        self.printed("verify", self.model, again, codes=(0, 1))
        self.printed("verify", again, codes=(0, 1))
        self.printed("convert", self.model, "--to", "safetensors", "-o", self.folder / f"o{EVIL}", "--dry-run")
        self.printed("show", self.model, "--html", self.folder / f"page{EVIL}.html")
        self.printed("show", self.model, "--tensors", EVIL, codes=(2,))
        self.printed("show", self.folder / f"none{EVIL}", codes=(3,))

    def test_golden_and_parity_name_files_that_are_no_stage(self):
        batch = inputs.seeded(288, 1, 8)
        dump = self.folder / f"dump{EVIL}"
        aprt.write(dump, batch, {stages.FINAL_NORM: np.full((1, 8, 64), np.nan, np.float32)})
        (dump / f"{EVIL}.bin").write_bytes(b"APRT")
        said = self.printed("golden", self.model, "--check", dump, codes=(1,))
        self.assertRegex(said, r"no stage of this model: x\\x1b")
        said = self.printed("parity", self.model, "--right", dump, codes=(1,))
        self.assertRegex(said, r"no stage of this model: x\\x1b")
        self.printed("golden", self.model, "--export-inputs", self.folder / f"i{EVIL}")

    def test_the_others(self):
        self.printed("make-sample", EVIL, "-o", self.folder / "s", codes=(2,))
        self.printed("make-sample", "gqa_tied_bf16", "-o", self.folder / f"s{EVIL}")
        self.printed("checkpoint", "save", self.model, self.folder / f"p{EVIL}")
        self.printed("generate", self.model, "--prompt", "a", "--chat-template", EVIL, codes=(2,))
        self.printed("bench", self.model, "--cases", EVIL, codes=(2,))


if __name__ == "__main__":
    absltest.main()
