"""Our `.apr` files before the genuine `apr` ($APR_BIN), and the genuine files before our reader."""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from tests.paths import CHECKPOINTS, fixtures

FIXTURES = fixtures()
GENUINE = sorted((FIXTURES / "genuine").iterdir()) if FIXTURES else []
SOURCES = {path.name: path for path in CHECKPOINTS} | {path.name: path / "hf" for path in GENUINE}
# The unquantised ones, which hold the values of the folder beside them.
IMPORTED = {path.name: path / "apr" / "plain.apr" for path in GENUINE}
HEAD = "lm_head.weight"


def read_all(path: os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name -> type, shape and hash of every tensor, through the safetensors package."""
    path = pathlib.Path(path)
    found = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        for name, value in safetensors.deserialize(file.read_bytes()):
            found[name] = (value["dtype"], tuple(value["shape"]), hashlib.sha256(bytes(value["data"])).hexdigest())
    return found


def as_f32(path: os.PathLike[str]) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as opened:
        return {name: tensor.read().astype(np.float32) for name, tensor in opened.tensors.items()}


class GenuineTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


class AprAcceptsTest(GenuineTestCase):
    def setUp(self):
        super().setUp()
        self.binary = os.environ.get("APR_BIN", "")
        if not self.binary:
            self.skipTest("APR_BIN does not name the genuine apr")

    def apr(self, *arguments: object) -> str:
        done = subprocess.run(
            [self.binary, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def convert(self, name: str, **arguments) -> pathlib.Path:
        path = self.folder / "m.apr"
        convert(SOURCES[name], path, to="apr", **arguments)
        return path

    @parameterized.product(name=sorted(SOURCES), tied_head=("absent", "copy"))
    def test_tensors_lists_what_we_wrote(self, name, tied_head):
        path = self.convert(name, tied_head=tied_head)
        listed = json.loads(self.apr("tensors", path, "--json", "--limit", "1000"))
        found = {tensor["name"]: (tensor["dtype"].lower(), tuple(tensor["shape"])) for tensor in listed["tensors"]}
        with open_checkpoint(path) as opened:
            ours = {name: (tensor.dtype.name, tensor.shape) for name, tensor in opened.tensors.items()}
        self.assertEqual(found, ours)
        self.assertGreater(len(found), 12)

    @parameterized.parameters(*sorted(SOURCES))
    def test_inspect_reads_our_metadata(self, name):
        shown = self.apr("inspect", self.convert(name))
        self.assertIn("Qwen2", shown)
        inspected = json.loads(self.apr("inspect", self.folder / "m.apr", "--json"))
        self.assertTrue(inspected["checksum_valid"])
        config = json.loads((SOURCES[name] / "config.json").read_text())
        self.assertEqual(inspected["metadata"]["hidden_size"], config["hidden_size"])
        self.assertEqual(inspected["metadata"]["num_layers"], config["num_hidden_layers"])

    @parameterized.parameters(*sorted(SOURCES))
    def test_validate_passes(self, name):
        self.assertIn("VALID", self.apr("validate", self.convert(name)))

    @parameterized.product(name=sorted(SOURCES), tied_head=("absent", "copy"))
    def test_run_generates_text(self, name, tied_head):
        path = self.convert(name, tied_head=tied_head)
        shown = self.apr("run", path, "--prompt", "a b", "--max-tokens", "3", "--temperature", "0")
        self.assertTrue(re.search(r"Output:\n.+", shown), shown)

    @parameterized.parameters(*sorted(SOURCES))
    def test_export_gives_the_sources_values_back(self, name):
        exported = self.folder / "exported.safetensors"
        self.apr("export", self.convert(name), "--format", "safetensors", "-o", exported)
        found, expected = as_f32(exported), as_f32(SOURCES[name])
        # A tied head may be added by the export; every tensor of the source has to be there.
        self.assertEqual(set(found) - {HEAD}, set(expected) - {HEAD})
        self.assertContainsSubset(set(expected), set(found))
        for tensor, values in expected.items():
            self.assertEqual(found[tensor].tobytes(), values.tobytes(), tensor)


class GenuineFilesTest(GenuineTestCase):
    def setUp(self):
        super().setUp()
        if FIXTURES is None:
            self.skipTest("there are no fixtures: APR_FIXTURES names none, and there is no shared/fixtures")

    @parameterized.parameters(*(sorted(IMPORTED) or [("none",)]))
    def test_an_import_by_apr_becomes_the_huggingface_tensors_again(self, name):
        convert(IMPORTED[name], self.folder / "hf", to="safetensors")
        expected = read_all(SOURCES[name])
        self.assertGreater(len(expected), 12)
        self.assertEqual(read_all(self.folder / "hf"), expected)
        rebuilt = json.loads((self.folder / "hf" / "config.json").read_text())
        config = json.loads((SOURCES[name] / "config.json").read_text())
        for key in ("num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
            self.assertEqual(rebuilt[key], config[key], key)

    @parameterized.parameters(*sorted(SOURCES))
    def test_huggingface_to_apr_and_back_is_identical(self, name):
        source = SOURCES[name]
        convert(source, self.folder / "m.apr", to="apr")
        convert(self.folder / "m.apr", self.folder / "hf", to="safetensors")
        self.assertEqual(read_all(self.folder / "hf"), read_all(source))
        files = [file for file in source.iterdir() if "safetensors" not in file.name]
        self.assertGreaterEqual(len(files), 4)
        for file in files:
            self.assertEqual((self.folder / "hf" / file.name).read_bytes(), file.read_bytes(), file.name)

    def test_every_genuine_file_survives_apr_to_apr(self):
        assert FIXTURES is not None
        compared = 0
        for path in sorted(FIXTURES.glob("genuine/*/apr/*.apr")):
            copy = self.folder / "copy.apr"
            convert(path, copy, to="apr", force=True)
            with open_checkpoint(path) as before, open_checkpoint(copy) as after:
                self.assertEqual(list(before.tensors), list(after.tensors))
                self.assertEqual(json.dumps(before.metadata), json.dumps(after.metadata))
                for name, tensor in before.tensors.items():
                    self.assertEqual(tensor.raw(), after.tensors[name].raw())
                    compared += 1
        self.assertGreater(compared, 300)


if __name__ == "__main__":
    absltest.main()
