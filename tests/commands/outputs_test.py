"""No command writes over what it reads: every output option of every command, every kind of input, links included."""

import argparse
import importlib
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.commands.entry import COMMANDS
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import UsageError
from tests import paths

SAMPLE = paths.checkpoint("gqa_tied_bf16")
IDS = "[[5, 6, 7]]"
# Options and arguments that name what a command writes, and how it is told to; and all others that name a path.
OUTPUTS = {
    ("convert", "output"): ["{model}", "--to", "apr", "--force", "-o", "{output}"],
    ("show", "html"): ["{model}", "--force", "--html", "{output}"],
    ("golden", "output"): ["{model}", "--force", "-o", "{output}"],
    ("golden", "export_inputs"): ["{model}", "--force", "--export-inputs", "{output}"],
    ("parity", "html"): ["{model}", "--right", "{ids}", "--force", "--html", "{output}"],
    ("loss", "per_token"): ["{model}", "--input-ids", "{ids}", "--force", "--per-token", "{output}"],
    ("checkpoint", "folder"): ["save", "{model}", "{output}", "--force"],
    ("bench", "output"): ["{model}", "--force", "-o", "{output}"],
    ("bench", "svg"): ["{model}", "--force", "--svg", "{output}"],
}
OF_PREPARED = {("checkpoint", "output"): ["restore", "{model}", "--force", "-o", "{output}"]}
OF_NO_INPUT = {("make-sample", "output"), ("bench", "scratch")}
INPUTS = {
    *((command, name) for command in COMMANDS for name in ("model", "source", "path", "a", "b", "adapter")),
    *((command, name) for command in ("golden", "parity", "generate") for name in ("input_ids", "positions")),
    *((command, "check") for command in ("golden", "loss")),
    *(("loss", name) for name in ("text", "jsonl", "input_ids")),
    *(("parity", name) for name in ("right",)),
    *(("generate", name) for name in ("prompts", "tools", "chat_template")),
}  # fmt: skip
# By what is there, or by what its name says: all of them leave it alone.
REFUSALS = ("same-file", "output-holds-source", "output-not-replaceable", "output-not-folder", "output-is-folder",
            "output-name", "aprt-trace")  # fmt: skip
PATHS = ("FILE", "DIR", "OUT", "PATH", "DUMP", "GOLDEN", "SRC", "MODEL", "A", "B")


def options(command: str) -> list[argparse.Action]:
    """What a command's parser takes, its subcommands' included."""
    parser = importlib.import_module(COMMANDS[command][0]).parser_of(command)
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [inner for sub in action.choices.values() for inner in sub._actions]
    return actions


def names_a_path(action: argparse.Action) -> bool:
    words = str(action.metavar or "").replace("|", " ").split()
    return any(word in PATHS for word in words)


class OutputsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = pathlib.Path(self.create_tempdir().full_path)
        self.folder = folder
        shutil.copytree(SAMPLE, folder / "hf")
        (folder / "ids.json").write_text(IDS)
        (folder / "ids").mkdir()
        (folder / "ids" / "token_ids.json").write_text("[5, 6, 7]")

    def refused(self, command: str, arguments: list[str], **names: object) -> None:
        """Checks that a command refuses its output with exit code 2 and leaves every file as it is."""
        before = self.contents()
        named = {"ids": self.folder / "ids.json", **names}
        argv = [str(argument).format(**named) for argument in arguments]
        module = importlib.import_module(COMMANDS[command][0])
        with self.assertRaises(UsageError) as caught:
            module.main(module.parse([command, *argv]))
        self.assertIn(caught.exception.code, REFUSALS)
        self.assertEqual(self.contents(), before)

    def contents(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def test_every_option_that_names_a_path_is_known_here(self):
        """A new output has to join the table above, and so the tests below."""
        found = {(command, action.dest) for command in COMMANDS for action in options(command) if names_a_path(action)}
        self.assertGreater(len(found), 25)
        self.assertEqual(found - INPUTS - OF_NO_INPUT - set(OUTPUTS) - set(OF_PREPARED), set())
        self.assertEqual((set(OUTPUTS) | set(OF_PREPARED) | OF_NO_INPUT) - found, set())

    @parameterized.parameters(*OUTPUTS)
    def test_no_file_of_the_model_is_replaced(self, command, option):
        arguments = OUTPUTS[command, option]
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            self.refused(command, arguments, model=self.folder / "hf", output=self.folder / "hf" / name)

    @parameterized.parameters(*OUTPUTS)
    def test_no_link_to_it_and_no_folder_that_holds_it(self, command, option):
        arguments, hf = OUTPUTS[command, option], self.folder / "hf"
        os.link(hf / "model.safetensors", self.folder / "hard")
        os.symlink(hf / "model.safetensors", self.folder / "soft")
        os.symlink(hf, self.folder / "folder")
        for output in ("hard", "soft", "hf", "folder", "hf/../hf/model.safetensors"):
            self.refused(command, arguments, model=hf, output=self.folder / output)

    @parameterized.parameters(*OUTPUTS)
    def test_no_lone_file_and_no_shard(self, command, option):
        arguments = OUTPUTS[command, option]
        apr, shards = self.folder / "a.apr", self.folder / "shards"
        convert(self.folder / "hf", apr, to="apr")
        self.refused(command, arguments, model=apr, output=apr)
        convert(self.folder / "hf", shards, to="safetensors", max_shard_bytes=100_000)
        self.assertGreater(len(list(shards.glob("*.safetensors"))), 1)
        for name in ("model-00002-of-0*", "model.safetensors.index.json"):
            (output,) = shards.glob(name)
            self.refused(command, arguments, model=shards, output=output)

    @parameterized.parameters("output", "export_inputs")
    def test_no_token_ids_that_golden_reads(self, option):
        arguments = OUTPUTS["golden", option]
        for given, output in (("ids.json", "ids.json"), ("ids", "ids/token_ids.json"), ("ids", "ids")):
            self.refused("golden", [*arguments, "--input-ids", "{ids}"], model=self.folder / "hf",
                         output=self.folder / output, ids=self.folder / given)  # fmt: skip

    @parameterized.parameters(
        ("--text", "ids.json", "ids.json"), ("--jsonl", "ids.json", "ids.json"),
        ("--input-ids", "ids.json", "ids.json"), ("--input-ids", "ids", "ids/token_ids.json"),
        ("--input-ids", "ids", "ids"),
    )  # fmt: skip
    def test_no_text_that_loss_reads(self, option, given, output):
        arguments = ["{model}", option, "{ids}", "--force", "--per-token", "{output}"]
        self.refused("loss", arguments, model=self.folder / "hf", output=self.folder / output,
                     ids=self.folder / given)  # fmt: skip

    @parameterized.parameters("--check", "--chat-template")
    def test_nothing_else_that_loss_reads(self, option):
        arguments = ["{model}", "--jsonl", "{ids}", option, "{other}", "--force", "--per-token", "{output}"]
        (self.folder / "other").write_text("x")
        self.refused("loss", arguments, model=self.folder / "hf", output=self.folder / "other",
                     other=self.folder / "other")  # fmt: skip

    @parameterized.parameters("convert", "golden", "checkpoint")
    def test_no_adapter(self, command):
        adapter = self.folder / "adapter"
        shutil.copytree(paths.DATA / "adapters" / "lora", adapter)
        option = "folder" if command == "checkpoint" else "output"
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            self.refused(command, [*OUTPUTS[command, option], "--adapter", str(adapter)], model=self.folder / "hf",
                         output=self.folder / "adapter" / name)  # fmt: skip

    @parameterized.parameters("convert", "golden", "show", "checkpoint")
    def test_no_file_of_a_prepared_folder(self, command):
        from apr_jax.converters.checkpoint.openers import open_checkpoint
        from apr_jax.load import prepared

        with open_checkpoint(self.folder / "hf") as checkpoint:
            prepared.save(checkpoint, os.fspath(self.folder / "prepared"), dtype="float32", fused=False)
        option = "html" if command == "show" else "output"
        for path in [path for path in (self.folder / "prepared").rglob("*") if path.is_file()][:12]:
            arguments = (OUTPUTS | OF_PREPARED)[command, option]
            self.refused(command, arguments, model=self.folder / "prepared", output=path)


if __name__ == "__main__":
    absltest.main()
