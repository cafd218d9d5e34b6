"""A key of config.json that nobody knows: every command that loads a model names it, and goes on where told so."""

import contextlib
import importlib
import io
import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax import load_generator, load_model
from apr_jax.commands.entry import COMMANDS
from apr_jax.converters.errors import AprJaxError, RefusedError
from tests import paths

BASE = paths.checkpoint("gqa_tied_bf16")
KNOWN = {
    "unsloth_fixed": True,
    "dual_chunk_attention_config": {"chunk_size": 262144},
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}
IGNORE = ("--ignore-config", "unheard_of", "--ignore-config", "rope_scaling.other")


class IgnoreConfigTest(parameterized.TestCase):
    def folder(self, config: dict) -> pathlib.Path:
        folder = pathlib.Path(self.create_tempdir().full_path) / "model"
        shutil.copytree(BASE, folder)
        whole = json.loads((BASE / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(whole))
        return folder

    def strange(self) -> pathlib.Path:
        """A folder with two keys that nobody knows, one within an object."""
        return self.folder(KNOWN | {"unheard_of": 3, "rope_scaling": KNOWN["rope_scaling"] | {"other": 1}})

    def run_command(self, name: str, *arguments: object) -> tuple[int, str, str]:
        command = importlib.import_module(COMMANDS[name][0])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command.main(command.parse(["apr-jax", *map(str, arguments)]))
            except AprJaxError as error:
                return error.exit_code, out.getvalue(), str(error)
        return code, out.getvalue(), err.getvalue()

    @parameterized.parameters("golden", "generate", "parity", "checkpoint")
    def test_field_every_command_that_loads_a_model_goes_on(self, name):
        """FIELD Configurations: two keys that nobody knows -> refused with the options, and computed with them."""
        folder, out = self.strange(), pathlib.Path(self.create_tempdir().full_path)
        arguments = {
            "golden": (folder, "-o", out / "g.safetensors"),
            "generate": (folder, "--prompt", "Hi", "--max-new-tokens", "2", "--greedy"),
            # Without a dump it ends where it has opened the model, before minutes of computation.
            "parity": (folder, "--right", out / "missing"),
            "checkpoint": ("save", folder, out / "prepared"),
        }[name]
        code, _, error = self.run_command(name, *arguments)
        self.assertEqual(code, 5)
        for part in ("unheard_of (3)", "rope_scaling.other", " ".join(IGNORE)):
            self.assertIn(part, error)
        code, _, error = self.run_command(name, *arguments, *IGNORE)
        self.assertEqual(code, 3 if name == "parity" else 0, error)
        if name != "parity":
            self.assertEqual(error.count("dual chunk attention"), 1)
        if name == "checkpoint":
            self.assertEqual(self.run_command(name, "restore", out / "prepared", "--device", "cpu")[0], 5)
            self.assertEqual(self.run_command(name, "restore", out / "prepared", "--device", "cpu", *IGNORE)[0], 0)

    def test_bench_has_the_option(self):
        command = importlib.import_module(COMMANDS["bench"][0])
        self.assertEqual(command.parse(["apr-jax", "m", *IGNORE]).ignore_config, ["unheard_of", "rope_scaling.other"])

    def test_in_python_it_is_an_argument_and_the_model_is_that_of_the_known_keys(self):
        strange, known = self.strange(), self.folder(KNOWN)
        with self.assertRaisesRegex(RefusedError, r"ignore_config=\['unheard_of', 'rope_scaling.other'\]"):
            load_model(strange)
        keys = ["unheard_of", "rope_scaling.other"]
        ids = np.arange(40)[None]
        expected = np.asarray(load_model(known)(ids))
        np.testing.assert_array_equal(np.asarray(load_model(strange, ignore_config=keys)(ids)), expected)
        self.assertEqual(load_generator(strange, ignore_config=keys).model.config, load_model(known).config)
        self.assertGreater(np.abs(expected - np.asarray(load_model(BASE)(ids))).max(), 1e-3)

    def test_verify_shows_the_rule_and_a_file_of_ours_keeps_it(self):
        known, out = self.folder(KNOWN), pathlib.Path(self.create_tempdir().full_path) / "m.apr"
        self.assertEqual(self.run_command("convert", "--to", "apr", known, "-o", out)[0], 0)
        code, text, _ = self.run_command("verify", out)
        self.assertEqual(code, 0)
        self.assertIn("RoPE scaled by yarn (factor 4, original_max_position_embeddings 1024", text)
        self.assertEqual(load_model(out).config, load_model(known).config)
        code, text, _ = self.run_command("verify", known, BASE)
        self.assertEqual(code, 1)
        self.assertIn("rope_scaling yarn (factor 4", text)


if __name__ == "__main__":
    absltest.main()
