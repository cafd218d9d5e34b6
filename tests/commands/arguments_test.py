"""Every command against the options that commands share, help at any width, and first commands that are wrong."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.commands import entry
from apr_jax.commands.entry import COMMANDS
from apr_jax.converters.commands import arguments
from apr_jax.converters.errors import UsageError
from tests import paths, tool

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "options.md"
SAMPLE = paths.checkpoint("gqa_tied_bf16")
_NO_MODEL = "opens no checkpoint"
_BYTES = "reads and writes bytes: nothing is computed on a device"
_DEVICES = ("--mesh", *arguments.OF_PROCESSES)
REASONS = {
    ("convert", "--device"): _BYTES,
    ("convert", "--dtype"): "--cast says what types are written",
    ("show", "--device"): _BYTES,
    ("show", "--dtype"): _BYTES,
    ("show", "--adapter"): "shows what is stored",
    ("verify", "--device"): _BYTES,
    ("verify", "--dtype"): _BYTES,
    ("verify", "--force"): "writes nothing",
    ("parity", "--device"): "has two sides: --left and --right",
    ("generate", "--force"): "writes nothing",
    **{(command, option): _BYTES for command in ("convert", "show", "verify") for option in _DEVICES},
    **{(f"checkpoint {command}", option): "one process sees all devices" for command in ("save", "restore")
       for option in _DEVICES[1:]},
    **{("checkpoint show", option): "shows what is stored" for option in ("--device", *_DEVICES)},
    **{("make-sample", option): _NO_MODEL for option in _DEVICES},
    **{("bench", option): "measures one process" for option in _DEVICES[1:]},
    **{(f"checkpoint {command}", option): "reads what save wrote" for option in ("--dtype", "--lenient", "--legacy",
       "--follow-links", "--adapter") for command in ("restore", "show")},
    ("checkpoint show", "--ignore-config"): "reads what save wrote",
    ("checkpoint show", "--force"): "writes nothing",
    **{("bench", option): "measures shapes and checkpoints as they are" for option in ("--lenient", "--legacy",
       "--follow-links", "--adapter")},
    **{("make-sample", option): _NO_MODEL for option in ("--device", "--dtype", "--lenient", "--legacy",
       "--follow-links", "--ignore-config", "--adapter")},
}  # fmt: skip
"""Why a command lacks a shared option."""
# Arguments after the command's name; {} is a folder with what they name, and what has to be said.
WRONG = {
    "convertt": "`apr-jax convert`",
    "verfy {}/model.apr": "`apr-jax verify`",
    "chat {}/model.apr": "`apr-jax --help`",
    "convert": "missing: SRC",
    "convert {}/model.apr": "DST or -o OUT",
    "convert {}/model.apr {}/a.apr {}/b.apr": "more arguments than expected",
    "convert {}/model.apr {}/a.gguf": "FILE.apr, FILE.safetensors or a folder",
    "convert {}/model.apr -o {}/a.bin": "FILE.apr, FILE.safetensors or a folder",
    "convert {}/model.apr {}/out --too safetensors": "--to",
    "convert {}/model.apr {}/out --to safetensor": "safetensors",
    "convert {}/model.apr {}/out --cast bf17": "bf16",
    "convert {}/nothing {}/out.apr": "no such file",
    "convert {}/model.apr {}/model.apr": "same",
    "convert {}/other {}/out.apr": "model.safetensors",
    "convert Qwen/Qwen2.5-Coder-0.5B {}/out.apr": "Qwen/Qwen2.5-Coder-0.5B",
    "convert {}/model.apr {}/full": "--force",
    "convert {}/hf/config.json {}/out.apr": "folder",
    "show": "missing: MODEL",
    "show {}/pictures": "no",
    "show {}/model.apr --tensor layers": "--tensors",
    "show {}/model.apr --tensors 'nothing*'": "--tensors",
    "show {}/empty.apr": "0",
    "show {}/text.apr": "",
    "show {}/hf/tokenizer.json": "folder",
    "verify {}/model.apr {}/model.apr {}/model.apr": "more arguments than expected",
    "verify {}/model.apr --jsno": "--json",
    "verify {}/model.apr {}/missing.apr": "missing.apr",
    "verify -v {}/model.apr": "-v",
    "golden {}/model.apr": "-o/--output",
    "golden {}/model.apr -o {}/g.safetensors --dtype bf61": "bf16",
    "golden {}/model.apr -o {}/g.safetensors --device gpu": "cuda",
    "golden {}/model.apr -o {}/g.safetensors --device cuda:x": "cuda:1",
    "golden {}/model.apr --check {}/nothing.safetensors": "nothing.safetensors",
    "golden {}/model.apr --chek {}/nothing.safetensors": "--check",
    "golden {}/model.apr -o {}/g.safetensors --input-ids {}/text.apr": "text.apr",
    "parity {}/model.apr": "--right",
    "parity {}/model.apr {}/dump": "--right",
    "parity {}/model.apr --right {}/pictures": "pictures",
    "parity {}/model.apr --right {}/nothing": "nothing",
    "parity --rigth {}/dump {}/model.apr": "--right",
    "generate {}/model.apr": "--prompt",
    "generate {}/model.apr Hello": "--prompt",
    "generate {}/model.apr --promt Hello": "--prompt",
    "generate {}/model.apr --prompt Hello --max-tokens 5": "--max-new-tokens",
    "generate {}/model.apr --prompt Hello --top-k many": "--top-k",
    "loss {}/model.apr": "--text",
    "loss {}/model.apr --text {}/nothing.txt": "nothing.txt",
    "checkpoint sav {}/model.apr {}/prepared": "save",
    "checkpoint restore {}/hf --force": "-o OUT",
    "checkpoint restore {}/hf -o {}/out.apr --device cpu": "leave --device and --mesh out",
    "checkpoint show {}/hf": "checkpoint save",
    "bench 0.6b": "0.6b",
    "make-sample": "--list",
}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command, subcommands as commands of their own."""
    found = {}
    for name, (module, _) in COMMANDS.items():
        parser = importlib.import_module(module).parser_of(f"apr-jax {name}")
        inner = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        found |= {f"{name} {sub}": made for choices in inner for sub, made in choices.items()} or {name: parser}
    return found


def table() -> str:
    """Commands against shared options, as docs/options.md holds it."""
    made = parsers()
    lines = ["# Options that commands share", "", "Each is described by `apr-jax COMMAND --help`.", ""]
    lines += [f"| option | {' | '.join(made)} |", f"|---{'|---' * len(made)}|"]
    notes: dict[str, int] = {}
    for option in arguments.SHARED:
        cells = []
        for command, parser in made.items():
            reason = REASONS.get((command, option), "")
            has = option in parser._option_string_actions
            cells.append("yes" if has else f"no ({notes.setdefault(reason, len(notes) + 1)})" if reason else "?")
        lines.append(f"| `{option}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Why not:", "", *(f"{number}. {reason}" for reason, number in notes.items()), ""])


class SharedOptionsTest(parameterized.TestCase):
    def test_no_command_lacks_one_without_a_reason(self):
        made = parsers()
        self.assertGreaterEqual(len(made), 11)
        for command, parser in made.items():
            for option in arguments.SHARED:
                has = option in parser._option_string_actions
                self.assertNotEqual(has, (command, option) in REASONS, (command, option))

    def test_an_option_means_the_same_everywhere(self):
        for option, settings in arguments.SHARED.items():
            for command, parser in parsers().items():
                if (action := parser._option_string_actions.get(option)) is not None and "metavar" in settings:
                    self.assertEqual(action.metavar, settings["metavar"], (command, option))

    def test_the_table_in_docs_is_this(self):
        self.assertEqual(TABLE.read_text(), table(), "python tests/commands/arguments_test.py --write")

    @parameterized.parameters(*arguments.DTYPES.items())
    def test_types_may_be_spelt_short(self, short, name):
        parser = argparse.ArgumentParser()
        arguments.add_dtype(parser, list(arguments.DTYPES.values()), "type")
        self.assertEqual(parser.parse_args(["--dtype", short]).dtype, name)


class HelpTest(parameterized.TestCase):
    @parameterized.product(width=(60, 80, 200), command=tuple(parsers()))
    def test_it_fits_and_holds_everything(self, width, command):
        parser = parsers()[command]
        with mock.patch.dict(os.environ, COLUMNS=str(width)):
            text = parser.format_help()
        self.assertLessEqual(max(map(len, text.splitlines())), width)
        words = " ".join(text.split())
        for action in parser._actions:
            self.assertTrue(action.help, (command, action.dest))
            for option in action.option_strings:
                self.assertIn(option, words)
        for paragraph in (parser.epilog or "").split():
            self.assertIn(paragraph.replace("%(prog)s", parser.prog).replace("%%", "%"), words)
        self.assertNotIn("helpfull", text)

    @parameterized.parameters(60, 80, 200)
    def test_the_list_of_commands_fits(self, width):
        with mock.patch.dict(os.environ, COLUMNS=str(width)):
            text = entry.description()
        self.assertLessEqual(max(map(len, text.splitlines())), width)
        words = " ".join(text.split())
        for command, (_, summary) in COMMANDS.items():
            self.assertIn(f"{command} {summary}", words)

    def test_examples_are_of_the_command_that_was_called(self):
        shown = subprocess.run(
            [sys.executable, "tools/golden.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        self.assertIn("\n  python tools/golden.py model.apr -o golden.safetensors", shown)

    def test_python_m(self):
        for words, said in ((("help", "verify"), "usage: apr-jax verify"), (("--version",), "apr_jax 0"),
                            (("verify", "--version"), "apr_jax 0")):  # fmt: skip
            done = subprocess.run([sys.executable, "-m", "apr_jax", *words], cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertStartsWith(done.stdout, said)


class WrongCommandsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        shutil.copytree(SAMPLE, cls.folder / "hf")
        tool.run("convert", SAMPLE, cls.folder / "model.apr")
        (cls.folder / "empty.apr").touch()
        (cls.folder / "text.apr").write_text("this is no model")
        for name, file in (("pictures", "cat.png"), ("other", "model.gguf.part"), ("full", "thesis.tex")):
            (cls.folder / name).mkdir()
            (cls.folder / name / file).write_text("x")

    @parameterized.parameters(*WRONG)
    def test_it_is_answered_with_the_next_step(self, line):
        command, *words = shlex.split(line.replace("{}", str(self.folder)))
        if command in COMMANDS:
            done = tool.run(command.replace("-", "_"), *words)
        else:
            done = subprocess.run([sys.executable, "-m", "apr_jax", command, *words], capture_output=True, text=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertNotEqual(done.returncode, 70, done.stderr)
        self.assertBetween(len(done.stderr.splitlines()), 1, 3, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertIn(WRONG[line], done.stderr)

    def test_an_error_of_usage_is_json_too(self):
        done = tool.run("verify", self.folder / "model.apr", "--jsno", "--json")
        self.assertEqual(json.loads(done.stdout)["error"]["code"], "usage")


class MannerTest(absltest.TestCase):
    def test_verbose_says_what_a_report_needs_and_quiet_says_no_warning(self):
        odd = pathlib.Path(self.create_tempdir().full_path) / "hf"
        shutil.copytree(SAMPLE, odd)
        (odd / "unknown.py").touch()
        said = tool.ran(self, "convert", odd, odd.parent / "a.apr", "--verbose")
        self.assertIn("warning: ", said.stderr)
        self.assertRegex(said.stderr, r"took [0-9.]+ s and at most [0-9]+ MB of memory; apr_jax ")
        self.assertEqual(tool.ran(self, "convert", odd, odd.parent / "b.apr", "--quiet").stderr, "")

    def test_color_is_as_it_was_asked_for(self):
        for color, coloured in (("always", True), ("never", False), ("auto", False)):
            done = tool.run("show", "nothing.apr", "--color", color)
            self.assertEqual("\x1b[31;1merror:\x1b[0m" in done.stderr, coloured, color)

    def test_verbose_shows_where_an_error_comes_from(self):
        self.assertIn("Traceback", tool.run("show", "nothing.apr", "--verbose").stderr)


class NearestTest(parameterized.TestCase):
    @parameterized.parameters(("--dtpye", "--dtype"), ("--dev", "--device"), ("--zzz", None))
    def test_what_was_meant(self, word, meant):
        self.assertEqual(arguments.nearest(word, arguments.SHARED), meant)

    @parameterized.parameters(
        (["--legacy", "x.apr"], ["--legacy=", "x.apr"]),
        (["--legacy", "8=q8", "x.apr"], ["--legacy=8=q8", "x.apr"]),
        (["--legacy"], ["--legacy="]),
        (["--legacy", "--", "--legacy", "8=q8"], ["--legacy=", "--", "--legacy", "8=q8"]),
    )
    def test_what_follows_an_option_that_needs_nothing(self, given, understood):
        self.assertEqual(list(arguments._without_guessing(given)), understood)

    @parameterized.parameters(
        ("data=2", {"data": 2}), ("data=2,model=4", {"data": 2, "model": 4}), ("modl=2", "did you mean model"),
        ("rows=2", "they are data"), ("data", "is no mesh"), ("data=0", "is no mesh"), ("data=2,data=2", "is no mesh"),
    )  # fmt: skip
    def test_meshes(self, text, expected):
        if isinstance(expected, dict):
            self.assertEqual(arguments._mesh(text), expected)
        else:
            with self.assertRaisesRegex(argparse.ArgumentTypeError, expected):
                arguments._mesh(text)

    @parameterized.parameters(
        ("auto", True), ("host:1", True), ("host:65535", True), ("host:65536", False), ("host:0", False),
        ("host", False), (":80", False), ("host:\u0661", False),
    )  # fmt: skip
    def test_addresses(self, text, is_one):
        if is_one:
            self.assertEqual(arguments._coordinator(text), text)
        else:
            with self.assertRaisesRegex(argparse.ArgumentTypeError, "is no address"):
                arguments._coordinator(text)

    def test_a_package_that_is_missing_is_said_with_the_versions(self):
        missing = mock.patch("importlib.metadata.version", side_effect=importlib.metadata.PackageNotFoundError)
        with missing:
            self.assertIn("flax (not installed)", arguments.versions())

    def test_options_are_not_guessed_from_their_beginning(self):
        parser = arguments.complete(arguments.make_parser("apr-jax x", "It."))
        with self.assertRaisesRegex(UsageError, "--quiet"):
            parser.parse_args(["--qui"])


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE.write_text(table())
    else:
        absltest.main()
