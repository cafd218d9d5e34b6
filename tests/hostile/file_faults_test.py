"""Every call of the file system that a writing command makes goes wrong once, in every way.

Whatever happens: an error with its exit code, or success with the right bytes; under the final name what was there
before, or the whole new output; the source as it was; temporaries gone, or named; and the next run succeeds.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.commands.entry import COMMANDS
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.commands import cli
from apr_jax.converters.convert import streaming
from apr_jax.converters.errors import AprJaxError, StorageError
from tests import file_faults, paths
from tests.file_faults import Fault

pytestmark = pytest.mark.slow

EXIT_IO = 7
REMOVAL = ("unlink", "rmdir", "listdir", "stat", "lstat")
Check = Callable[[file_faults.Call, BaseException | None], str]
# A model of 2 KB, so that thousands of runs cost little.
CONFIG = json.loads((paths.checkpoint("gqa_tied_bf16") / "config.json").read_text()) | {
    "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 6,
}  # fmt: skip


def make_model(folder: pathlib.Path, seed: int) -> None:
    """Writes a HuggingFace folder with side files, one of them in a folder of its own."""
    random = np.random.default_rng(seed)
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates" / "tools.jinja").write_text(f"{{{{ {seed} }}}}")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = Qwen2Config.from_hf(CONFIG).tensor_shapes()
    values = {name: random.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    safetensors.numpy.save_file(values, folder / "model.safetensors", {"format": "pt"})


def content(path: pathlib.Path) -> dict[str, bytes] | bytes | None:
    """What stands at a path: a folder's files by their names, a file's bytes, or nothing."""
    if path.is_dir():
        return {os.fspath(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None


def run(command: str, *argv: object) -> None:
    """Runs a command in this process; AprJaxError and whatever else it raises come out."""
    module = importlib.import_module(COMMANDS[command][0])
    module.main(module.parse([command, *map(str, argv)]))


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command that writes.

    Attributes:
      command: Its name and arguments; "{source}" and "{output}" stand for paths.
      source, output: What these paths are called.
      older: Makes what --force replaces; None writes where nothing is.
    """

    command: Sequence[str]
    source: str
    output: str
    older: Sequence[str] | None = None


TO_APR = ("convert", "{source}", "--to", "apr", "-o", "{output}")
TO_SHARDS = ("convert", "{source}", "--to", "safetensors", "--max-shard-size", "500B", "-o", "{output}")
OTHER_TO = ("convert", "{other}", "--force", "-o", "{output}", "--to")
SCENARIOS = {
    "hf-to-apr": Scenario(TO_APR, "hf", "new.apr"),
    "apr-to-shards": Scenario(TO_SHARDS, "a.apr", "new"),
    "hf-to-one-file": Scenario(
        ("convert", "{source}", "--to", "safetensors", "-o", "{output}"), "hf", "new.safetensors"
    ),
    "apr-replaced": Scenario((*TO_APR, "--force"), "hf", "old.apr", (*OTHER_TO, "apr")),
    "folder-replaced": Scenario((*TO_SHARDS, "--force"), "a.apr", "old", (*OTHER_TO, "safetensors")),
    "page": Scenario(("show", "{source}", "--html", "{output}"), "hf", "new.html"),
    "page-replaced": Scenario(
        ("show", "{source}", "--html", "{output}", "--force"), "hf", "old.html",
        ("show", "{other}", "--html", "{output}", "--force"),
    ),
}  # fmt: skip


class FileFaultsTestCase(parameterized.TestCase):
    """Runs something that writes again and again.

    Attributes:
      unlike: Files that are never the same, as those that hold the time of day.
    """

    unlike: frozenset[str] = frozenset()

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path).resolve()
        # In one order, so that call number k is the same one in every run.
        self.enter_context(mock.patch.object(streaming, "_MAX_THREADS", 1))
        self.said: list[str] = []
        self.enter_context(mock.patch.object(cli, "say", self.said.append))
        for stream in ("stdout", "stderr"):
            self.enter_context(mock.patch.object(sys, stream, open(os.devnull, "w")))  # noqa: SIM115

    def begin(self, scenario: Scenario) -> None:
        """Makes source, older output and the output that is expected."""
        make_model(self.folder / "model", seed=0)
        make_model(self.folder / "other", seed=1)
        self.root = self.folder / "root"
        self.root.mkdir()
        self.source, self.output = self.root / scenario.source, self.root / scenario.output
        if scenario.source.endswith(".apr"):
            run("convert", self.folder / "model", "--to", "apr", "-o", self.source)
        else:
            shutil.copytree(self.folder / "model", self.source)
        self.arguments = self.spelt(scenario.command)
        if scenario.older:
            run(*self.spelt(scenario.older))
        self.begun()

    def begun(self) -> None:
        """Looks at what is there, and what a run without faults makes of it."""
        self.kept = self.folder / "kept"
        shutil.copytree(self.root, self.kept, symlinks=True)
        self.before = self.content(self.root)
        self.older = self.content(self.output)
        self.act()
        self.newer = self.content(self.output)
        self.assertIsNotNone(self.newer)
        self.assertNotEqual(self.newer, self.older)
        self.again()

    def spelt(self, command: Sequence[str]) -> list[str]:
        return [word.format(source=self.source, output=self.output, other=self.folder / "other") for word in command]

    def act(self) -> None:
        run(*self.arguments)

    def again(self) -> None:
        """Puts everything back as it was before the run."""
        if self.content(self.root) != self.before:
            shutil.rmtree(self.root)
            shutil.copytree(self.kept, self.root, symlinks=True)
        self.said.clear()

    def each(self, fault: Fault, check: Check, first: int = 0, step: int = 1) -> Counter[str]:
        """Lets the fault happen at every call in turn, and checks each run; returns how often there was which outcome.

        Args:
          fault: What goes wrong.
          check: Takes the call and what the run raised; returns a word for the outcome.
          first, step: Which calls, where not all.
        """
        outcomes: Counter[str] = Counter()
        failures: list[str] = []
        at, tried = first, False
        while True:
            with file_faults.planted(self.root, fault, at) as hit:
                try:
                    self.act()
                    raised: BaseException | None = None
                except (AprJaxError, KeyboardInterrupt) as error:
                    raised = error
                except Exception as error:
                    failures.append(f"{fault.name} at {at}, {hit[:1]}: {error!r}")
                    raised = None
                    traceback.print_exception(error)
            if not hit:
                self.again()
                if tried or at == 0:
                    break
                # There are not as many calls.
                at //= 2
                continue
            tried = True
            try:
                outcomes[check(hit[0], raised)] += 1
            except AssertionError as error:
                failures.append(f"{fault.name} at {at}, {hit[0].name} {hit[0].path}: {error}")
            self.again()
            at += step
        self.assertEqual(failures, [])
        self.assertNotEmpty(outcomes, f"no call that {fault.name} can happen to")
        return outcomes

    def check(self, call: file_faults.Call, raised: BaseException | None) -> str:
        """Checks what has to hold whatever went wrong; returns a word for the outcome."""
        found = self.content(self.output)
        left = self.left()
        text = "\n".join([str(raised), *getattr(raised, "__notes__", ()), *self.said])
        for name in left:
            self.assertIn(name, text, "a temporary is left and not named")
        if raised is None:
            self.assertEqual(found, self.newer)
        elif isinstance(raised, AprJaxError):
            self.assertEqual(raised.exit_code, EXIT_IO, text)
            self.assertIsNotNone(raised.file, text)
            self.assertEqual(found, self.older, "an error leaves what was there before")
        self.assertIn(found, (self.older, self.newer), "partial")
        rest = {name: data for name, data in self.content(self.root).items() if not self.is_output(name)}
        self.assertEqual(
            rest, {name: data for name, data in self.before.items() if not self.is_output(name)}, "the source changed"
        )
        if left:
            # Nothing but a failing look or removal is a reason, or an interrupt in the middle of one.
            self.assertTrue(call.name in REMOVAL or isinstance(raised, KeyboardInterrupt), call)
            self.check_next_run(found)
        return "success" if raised is None else type(raised).__name__

    def content(self, path: pathlib.Path) -> dict[str, bytes] | bytes | None:
        found = content(path)
        if not isinstance(found, dict):
            return found
        place = path.relative_to(self.root)
        return {name: data for name, data in found.items() if os.fspath(place / name) not in self.unlike}

    def left(self) -> list[str]:
        return [name for name in os.listdir(self.root) if ".apr-jax-" in name]

    def check_next_run(self, found: dict[str, bytes] | bytes | None) -> None:
        """Checks that the next run succeeds, and removes what this one could not."""
        if found is not None and self.older is None:
            shutil.rmtree(self.output) if self.output.is_dir() else self.output.unlink()
        self.act()
        self.assertEqual(self.content(self.output), self.newer)
        self.assertEqual(self.left(), [])

    def is_output(self, name: str) -> bool:
        first = name.split(os.sep)[0]
        return first == self.output.name or ".apr-jax-" in first


class FileFaultsTest(FileFaultsTestCase):
    @parameterized.product(
        scenario=list(SCENARIOS), fault=[*file_faults.ERRORS, *file_faults.INTERRUPTS, file_faults.SHORT]
    )
    def test_a_call_that_goes_wrong(self, scenario, fault):
        self.begin(SCENARIOS[scenario])
        outcomes = self.each(fault, self.check, *sampled(scenario + fault.name))
        if fault is file_faults.SHORT:
            self.assertEqual(set(outcomes), {"success"})

    @parameterized.parameters("hf-to-apr", "apr-replaced", "folder-replaced")
    def test_a_disk_that_goes_away_for_good(self, scenario):
        self.begin(SCENARIOS[scenario])

        def check(call: file_faults.Call, raised: BaseException | None) -> str:
            # Nothing can be put back or removed any more.
            found = self.content(self.output)
            self.assertIn(found, (self.older, self.newer), "partial")
            if raised is None:
                self.assertEqual(found, self.newer)
                return "success"
            self.assertEqual(raised.exit_code, EXIT_IO)
            if found != self.older:
                self.assertRegex(str(raised), "is whole, but may be either output after a power cut")
            for name in self.left():
                self.assertIn(name, str(raised))
            self.check_next_run(found)
            return "error"

        outcomes = self.each(file_faults.DEAD, check, *sampled(scenario))
        self.assertGreater(outcomes["error"], 0)

    @parameterized.parameters("apr-to-shards", "folder-replaced")
    def test_a_source_that_changes_while_it_is_read(self, scenario):
        self.begin(SCENARIOS[scenario])
        size = self.source.stat().st_size
        other = self.folder / "other.apr"
        run("convert", self.folder / "other", "--to", "apr", "-o", other)

        def refused(call: file_faults.Call, raised: BaseException | None) -> str:
            self.assertIsInstance(raised, StorageError)
            self.assertIn(raised.code, ("short-read", "source-changed"))
            self.assertEqual(raised.file, str(self.source))
            self.assertEqual(self.content(self.output), self.older)
            self.assertEqual(self.left(), [])
            return raised.code

        def goes_on(call: file_faults.Call, raised: BaseException | None) -> str:
            self.assertIsNone(raised)
            self.assertEqual(self.content(self.output), self.newer)
            return "success"

        def overwrite() -> None:
            with open(self.source, "r+b") as file:
                file.seek(size - 100)
                file.write(bytes(50))

        first, step = sampled(scenario)
        for name, deed, check in (
            ("shrinks", lambda: os.truncate(self.source, size // 2), refused),
            ("grows", lambda: os.truncate(self.source, size + 1), refused),
            ("is overwritten", overwrite, refused),
            ("is replaced", lambda: os.replace(shutil.copy(other, self.folder / "copy"), self.source), goes_on),
        ):
            self.each(file_faults.before(name, deed), check, first % 3, min(step, 3))


def sampled(name: str) -> tuple[int, int]:
    """Returns the first call that goes wrong and the distance to the next: each in `make fault-injection`; in the suite
    a few, other ones for each name."""
    step = int(os.environ.get("FAULT_STEP", "83"))
    return zlib.crc32(name.encode()) % step, step


if __name__ == "__main__":
    absltest.main()
