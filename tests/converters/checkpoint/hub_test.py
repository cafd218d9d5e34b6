"""Names on the Hub in place of a path: which they are, what of a repository is downloaded, what is said if it fails.

The Hub is one of our own, on loopback; huggingface_hub is the genuine client, in processes whose environment names it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.hub import HubName, located, needed
from apr_jax.converters.errors import MissingFileError, UsageError
from tests import hub
from tests.paths import ROOT, checkpoint

TIED, SHARDED = checkpoint("gqa_tied_bf16"), checkpoint("mha_untied_f32_sharded")
# Runs commands in one process, since each start of Python costs more than all of them; prints code and output of each.
RUNNER = """
import contextlib, importlib, io, json, sys
from apr_jax.commands.entry import COMMANDS
from apr_jax.converters.commands import cli
from apr_jax.converters.errors import AprJaxError
found = []
for name, *arguments in json.loads(sys.argv[1]):
    module, out = importlib.import_module(COMMANDS[name][0]), io.StringIO()
    with contextlib.redirect_stdout(out):
        args = module.parse([name, *arguments])
        try:
            code = module.main(args)
        except AprJaxError as error:
            code = cli.report(error, True)
    found.append((code, out.getvalue()))
json.dump(found, sys.stdout)
"""


class NamesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("Qwen/Qwen2.5-0.5B-Instruct", ("Qwen/Qwen2.5-0.5B-Instruct", "main", None)),
        ("Qwen/Qwen2.5-0.5B@v1.0", ("Qwen/Qwen2.5-0.5B", "v1.0", None)),
        ("hf://Qwen/Qwen2.5-0.5B", ("Qwen/Qwen2.5-0.5B", "main", None)),
        ("hf://a/b@refs/pr/3/sub/m.apr", ("a/b", "refs/pr/3", "sub/m.apr")),
        ("hf://a/b.apr", ("a/b.apr", "main", None)),
        ("hf://a/b/c.safetensors", ("a/b", "main", "c.safetensors")),
    )
    def test_names(self, text, expected):
        found = HubName.parse(text)
        self.assertEqual((found.repository, found.revision, found.file), expected)

    @parameterized.parameters(
        "model.apr",
        "a/b.safetensors",
        "./Qwen/Qwen2.5",
        "/Qwen/Qwen2.5",
        "../Qwen",
        "a/b/c",
        "a/b/",
        "gpt2",
        "a/b.gguf",
    )
    def test_paths_are_paths(self, path):
        self.assertIsNone(HubName.parse(path))
        self.assertEqual(located(path), path)

    def test_what_exists_here_wins(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.makedirs("Qwen/Qwen2.5-0.5B")
            os.symlink("nowhere", "Qwen/link")
            for path in ("Qwen/Qwen2.5-0.5B", "Qwen/link"):
                self.assertEqual(located(path), path)

    @parameterized.parameters("hf://", "hf://a", "hf:///a/b", "hf://a/b/../../../etc/passwd", "hf://a b/c")
    def test_urls_that_name_nothing(self, text):
        with self.assertRaises(UsageError):
            located(text)

    def test_without_huggingface_hub_it_says_how_to_get_it(self):
        with mock.patch.dict(sys.modules, {"huggingface_hub": None}), self.assertRaises(MissingFileError) as caught:
            located("Qwen/Qwen2.5-0.5B")
        self.assertRegex(str(caught.exception), r"`pip install .*\[hub\]'` installs that")


class NeededTest(parameterized.TestCase):
    def needed(self, *files):
        return needed(files, HubName("a/b"), "a/b")

    @parameterized.named_parameters(
        ("single", ["model.safetensors"], ["model.safetensors-index", "pytorch_model.bin", "onnx/model.safetensors"]),
        (
            "sharded",
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/model.safetensors"],
        ),
        (
            "adapter",
            ["adapter_model.safetensors", "adapter_config.json"],
            ["optimizer.pt", "checkpoint-5/x.safetensors"],
        ),
        ("apr", ["model.apr"], ["model.onnx", "notes.txt"]),
        ("split_gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], ["notes.txt"]),
    )
    def test_only_what_is_needed(self, wanted, left):
        beside = [] if wanted[0].endswith((".apr", ".gguf")) else ["config.json", "tokenizer.json"]
        self.assertCountEqual(self.needed(*left, *wanted, *beside), [*wanted, *beside])
        self.assertEqual(self.needed(*left, *wanted, *beside)[0], wanted[0])

    def test_a_part_of_a_split_file_brings_the_others(self):
        files = ("q4-00001-of-00002.gguf", "q4-00002-of-00002.gguf", "q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf")
        self.assertEqual(needed(files, HubName("a/b", file=files[3]), "a/b"), [files[3], files[2]])

    def test_a_file_that_the_repository_lacks(self):
        with self.assertRaises(MissingFileError) as caught:
            needed(("a.apr", "b.apr"), HubName("a/b", file="c.apr"), "hf://a/b/c.apr")
        self.assertEqual((caught.exception.code, caught.exception.found), ("hub-file", "a.apr, b.apr"))

    @parameterized.parameters(((),), (("pytorch_model.bin",),), (("a.apr", "b.apr"),))
    def test_nothing_that_can_be_told_apart(self, files):
        with self.assertRaises(MissingFileError) as caught:
            self.needed(*files)
        if files and files[0].endswith(".apr"):
            self.assertIn("hf://a/b/a.apr", str(caught.exception))


class DownloadTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        repository = self.folder / "repository"
        shutil.copytree(TIED, repository)
        for name in ("optimizer.pt", "pytorch_model.bin", "onnx/model.safetensors"):
            (repository / name).parent.mkdir(exist_ok=True)
            (repository / name).write_bytes(b"not needed")
        served = {"Qwen/Tiny": repository, "Qwen/Sharded": SHARDED, "a/apr": self.folder / "apr"}
        served |= dict.fromkeys(("Qwen/Gated", "Qwen/Shut"), TIED)
        (self.folder / "apr").mkdir()
        refusing = {"gated": ("Qwen/Gated",), "forbidden": ("Qwen/Shut",)}
        self.hub = self.enterContext(hub.serve(hub.Hub(served, **refusing)))

    def run_commands(self, *commands: tuple[object, ...], **environment: str) -> list[tuple[int, str]]:
        variables = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.folder / "home"), "JAX_PLATFORMS": "cpu"}
        listed = json.dumps([[str(argument) for argument in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, listed],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **variables, **environment},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_field_a_name_on_the_hub(self):
        """FIELD Configurations: OWNER/NAME or hf://OWNER/NAME@REVISION as a path -> what is needed is downloaded"""
        found = self.run_commands(
            ("verify", TIED, "Qwen/Tiny"),
            ("verify", TIED, f"hf://Qwen/Tiny@{hub.COMMIT}"),
            ("convert", "Qwen/Sharded@main", "-o", self.folder / "apr" / "m.apr", "--to", "apr"),
            ("verify", SHARDED, "hf://a/apr/m.apr"),
            ("verify", SHARDED, "a/apr"),
            ("show", "hf://Qwen/Tiny/model.safetensors"),
            ("golden", "Qwen/Tiny", "--export-inputs", self.folder / "inputs"),
        )
        for code, out in found:
            self.assertEqual(code, 0, out)
        for number in (0, 1, 3, 4):
            self.assertStartsWith(found[number][1], "identical")
        sharded = [path.name for path in SHARDED.iterdir()]
        self.assertCountEqual(self.hub.downloaded, [path.name for path in TIED.iterdir()] + sharded + ["m.apr"])
        # What is in the cache is there without the Hub too.
        self.hub.failing = True
        for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
            found = self.run_commands(
                ("verify", TIED, "Qwen/Tiny"), ("verify", "a/apr"), ("verify", "a/missing"), **environment
            )
            self.assertEqual([code for code, _ in found], [0, 0, 7], found)
            self.assertEqual(json.loads(found[2][1])["error"]["code"], "hub-unreachable")

    def test_field_what_the_hub_refuses(self):
        """FIELD Configurations: a repository that is gated, missing, private -> every command says how to log in"""
        output = ("-o", self.folder / "out")
        commands = (
            ("convert", "Qwen/Nope", *output, "--to", "apr"),
            ("verify", "Qwen/Nope"),
            ("verify", TIED, "Qwen/Nope"),
            ("show", "Qwen/Nope"),
            ("golden", "Qwen/Nope", *output),
            ("parity", "Qwen/Nope", "--right", "dump"),
            ("generate", "Qwen/Nope", "--prompt", "x"),
            ("checkpoint", "save", "Qwen/Nope", self.folder / "out"),
            ("bench", "Qwen/Nope"),
            ("show", "Qwen/Gated"),
            ("show", "Qwen/Shut"),
            ("show", "Qwen/Tiny@v9"),
            ("show", "hf://Qwen/Tiny/nope.safetensors"),
            ("show", "hf://Qwen/Ti--ny"),
        )
        found = self.run_commands(*commands)
        codes = [(code, json.loads(out)["error"]["code"]) for code, out in found]
        self.assertEqual(codes[:9], [(3, "hub-repository")] * 9)
        self.assertEqual(
            codes[9:], [(5, "hub-gated"), (5, "hub-refused"), (3, "hub-revision"), (3, "hub-file"), (2, "hub-name")]
        )
        for _, out in found[:11]:
            self.assertIn("hf auth login", out)


if __name__ == "__main__":
    absltest.main()
