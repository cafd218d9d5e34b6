"""README and docs/ are true: their commands and programs are run, and print what the pages show.

A block of code is fenced and has a language. What is done with it:

    sh       every line is a command, which has to end with exit code 0, or with that which its comment names
    console  "$ COMMAND", then lines of what it prints, in order; others may stand between them
    python   a program of its own
    text, json   is read by people only

Before a block, `<!-- not run: WHY -->` says why it is not run here. A page says in `<!-- prepared: NAME ...
-->` which of `PREPARED` stand in its folder. $APR_JAX_BIN is the folder of programs of an environment into
which the wheel is installed: that runs then, and this checkout otherwise.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.commands import entry
from apr_jax.trace.inputs import seeded
from tests import oracle, paths, tool
from tests.battery import parity_battery
from tests.battery.faulty_forward import Planted, forward, write_aprt

PAGES = [paths.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((paths.ROOT / "docs").glob("*.md"))
RUN, SHOWN = ("sh", "console", "python"), ("text", "json")
SAMPLE = paths.checkpoint("gqa_tied_bf16")
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
      line: Where it begins, from 1.
      language: Behind the fence.
      code: What stands between the fences.
      not_run: Why it is not run, if a comment says so.
    """

    line: int
    language: str
    code: str
    not_run: str | None

    def commands(self) -> list[tuple[str, int, list[str]]]:
        """Returns its commands, each with the exit code and the lines of output that the page tells."""
        if self.language == "console":
            return [(command, *_told(lines)) for command, lines in _session(self.code)]
        lines = self.code.replace("\\\n", " ").splitlines()
        return [(line, _exit_code(line), []) for line in lines if line.strip() and not line.startswith("#")]


def _told(lines: list[str]) -> tuple[int, list[str]]:
    codes = [line for line in lines if line.startswith("exit code ")]
    return int(codes[0].split()[-1]) if codes else -1, [line for line in lines if line not in ("", "...", *codes)]


def _exit_code(command: str) -> int:
    found = re.search(r"#.*exit code (\d+)", command)
    return int(found[1]) if found else 0


def _session(code: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    open_document = False
    for line in code.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
            open_document = "<<'END'" in line
        elif open_document:
            found[-1] = (found[-1][0] + "\n" + line, [])
            open_document = line != "END"
        else:
            found[-1][1].append(line.strip())
    return found


def blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    found, why, begin = [], None, None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if begin is not None:
            if line == "```":
                language = lines[begin - 1].removeprefix("```")
                found.append(Block(begin, language, "\n".join(lines[begin : number - 1]), why))
                why, begin = None, None
        elif line.startswith("```"):
            begin = number
        elif comment := re.fullmatch(r"<!-- not run: (.+) -->", line):
            why = comment[1]
        elif line.strip():
            why = None
    if begin is not None:
        raise ValueError(f"the block of line {begin} has no end")
    return found


def runnable(page: pathlib.Path) -> list[Block]:
    """Returns the blocks of a page that are run."""
    return [block for block in blocks(page.read_text()) if block.not_run is None and block.language in RUN]


def prose(text: str) -> str:
    """Returns a page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def _copy(source: pathlib.Path) -> Callable[[pathlib.Path], object]:
    return lambda target: shutil.copytree(source, target)


def _write(text: str) -> Callable[[pathlib.Path], object]:
    return lambda target: target.write_text(text)


def _write_two_mistakes(target: pathlib.Path) -> None:
    ids = seeded(288, 1, 64).input_ids
    faults = (Planted("rope-theta", None, {"theta": 1e4}), Planted("mask-off-by-one", (1,), {"last": -1}))
    write_aprt(target, forward(*oracle.load(SAMPLE), ids, faults=faults), ids)


def _made(*command: object) -> Callable[[pathlib.Path], object]:
    def make(target: pathlib.Path) -> None:
        done = tool.run(*command, "-o", target)
        if done.returncode:
            raise ValueError(done.stderr)

    return make


# What the pages speak of without having made it, by name.
PREPARED: dict[str, Callable[[pathlib.Path], object]] = {
    "HF_FOLDER": _copy(SAMPLE),
    "OTHER_FOLDER": _copy(paths.checkpoint("gqa_untied_bf16")),
    "ADAPTER": _copy(paths.DATA / "adapters" / "lora"),
    "model.apr": _made("convert", SAMPLE, "--to", "apr"),
    "dump": parity_battery.write_real_case,
    "two_mistakes": _write_two_mistakes,
    "book.txt": _write(TEXT),
    "code.py": _write("def f(x):\n    return x + 1\n" * 40),
    "documents.jsonl": _write("".join(json.dumps({"text": TEXT[start : start + 90]}) + "\n" for start in (0, 9, 20))),
    "tests": lambda target: target.symlink_to(paths.ROOT / "tests"),
}


def prepared(text: str) -> list[str]:
    """Returns what a page says to find in its folder."""
    found = re.search(r"(?m)^<!-- prepared: (.+) -->$", text)
    return found[1].split() if found else []


def same_numbers(text: str) -> str:
    """Returns a text with four digits of each number, and one word for what rounding leaves: machines differ there."""
    text = re.sub(r"\b\d(\.\d+)?e-(0[6-9]|1\d)\b", "tiny", text)
    return re.sub(r"\d+\.\d{4,}", lambda found: f"{float(found[0]):.4g}", text)


class Runner:
    """Runs commands and programs in a folder, by this checkout or by an environment with the wheel."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.programs = os.environ.get("APR_JAX_BIN")
        self.python = f"{self.programs}/python" if self.programs else sys.executable

    def command(self, line: str) -> tuple[int, str]:
        """Returns exit code and all that a command prints."""
        words = shlex.split(line.splitlines()[0], comments=True)
        name = None
        if words[0] == "apr-jax" and words[1] in entry.COMMANDS:
            name, words = words[1].replace("-", "_"), words[2:]
        elif words[0] == "python" and words[1].startswith("tools/"):
            name, words = words[1].removeprefix("tools/").removesuffix(".py"), words[2:]
        if self.programs or name is None or {"|", ">", "&&"} & set(words):
            # Functions, since a link to the Python of an environment is not that environment's.
            shell = f'python() {{ {shlex.quote(self.python)} "$@"; }}; apr-jax() {{ python -m apr_jax "$@"; }}\n'
            return self._process(["bash", "-c", shell + line])
        done = tool.run(name, *words, cwd=self.folder)
        return done.returncode, done.stdout + done.stderr

    def program(self, code: str) -> tuple[int, str]:
        """Returns exit code and all that a Python program prints."""
        return self._process([self.python, "-c", code])

    def _process(self, command: list[str]) -> tuple[int, str]:
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = "" if self.programs else str(paths.ROOT)
        done = subprocess.run(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout


class PagesTest(parameterized.TestCase):
    @parameterized.named_parameters((page.stem, page) for page in PAGES)
    def test_every_block_is_run_or_says_why_not(self, page):
        text = page.read_text()
        self.assertNotRegex(prose(text), r"(?m)^\n    \S", "an indented block is not run: fence it, with a language")
        for block in blocks(text):
            with self.subTest(line=block.line):
                if block.not_run is None:
                    self.assertIn(block.language, (*RUN, *SHOWN), "no such language: say why it is not run")
                if block.language in ("sh", "console"):
                    self.assertNotEmpty(block.commands())
                if block.language in SHOWN:
                    self.assertNotRegex(block.code, r"(?m)^(\$|apr-jax|python|make|pip) ", "a command that is not run")
        self.assertContainsSubset(prepared(text), PREPARED)

    @parameterized.named_parameters((page.stem, page) for page in PAGES)
    def test_links_lead_to_files(self, page):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(page.read_text())):
            if not target.startswith(("https:", "http:")):
                self.assertTrue((page.parent / target).exists(), target)

    def test_most_blocks_are_run(self):
        every = [block for page in PAGES for block in blocks(page.read_text()) if block.language in RUN]
        run = [block for page in PAGES for block in runnable(page)]
        self.assertGreaterEqual(len(run), 50)
        self.assertGreater(len(run), 2 / 3 * len(every))
        self.assertGreaterEqual(sum(len(block.commands()) for block in run if block.language != "python"), 75)

    def test_the_readme_is_short(self):
        self.assertLessEqual(len((paths.ROOT / "README.md").read_text().splitlines()), 150)


@pytest.mark.slow
class RunTest(parameterized.TestCase):
    @parameterized.named_parameters((page.stem, page) for page in PAGES if runnable(page))
    def test_commands_and_programs_of(self, page):
        text, ran = page.read_text(), 0
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for item in prepared(text):
                PREPARED[item](folder / item)
            runner = Runner(folder)
            for block in runnable(page):
                with self.subTest(line=block.line):
                    if block.language == "python":
                        code, printed = runner.program(block.code)
                        self.assertEqual(code, 0, printed)
                    else:
                        for command, expected, lines in block.commands():
                            self.check(runner, command, expected, lines)
                    ran += 1
        self.assertEqual(ran, len(runnable(page)))

    def check(self, runner: Runner, command: str, expected: int, lines: list[str]) -> None:
        code, printed = runner.command(command)
        # A page that shows what a command prints need not say its exit code.
        self.assertIn(code, (0, 1) if expected < 0 else (expected,), f"{command}\n{printed}")
        printed, at = same_numbers(printed), 0
        for line in map(same_numbers, lines):
            found = printed.find(line, at)
            self.assertGreaterEqual(found, 0, f"{command}\ndoes not print (here)\n{line}\nbut\n{printed}")
            at = found + len(line)


@pytest.mark.slow
class SiteTest(absltest.TestCase):
    def test_the_site_is_built_without_warnings_and_needs_nothing_from_elsewhere(self):
        for package in ("mkdocs", "material", "mkdocstrings"):
            if importlib.util.find_spec(package) is None:
                self.skipTest(f"no {package}: pip install '.[docs]'")
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", name]
            done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            pages = list(pathlib.Path(name).rglob("*.html"))
            self.assertGreaterEqual(len(pages), len(list((paths.ROOT / "docs").glob("*.md"))))
            foreign = r"<(?:script|img)[^>]* src=\"?https?:|<link[^>]*stylesheet[^>]*https?:"
            for page in pages:
                self.assertNotRegex(page.read_text(), foreign, page.name)


if __name__ == "__main__":
    absltest.main()
