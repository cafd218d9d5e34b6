"""Every example runs as a user runs it: from another folder, with paths as arguments."""

import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.verify.comparison import compare
from tests import paths, tool

pytestmark = pytest.mark.slow

TINY = paths.checkpoint("gqa_tied_bf16")


def run_example(name: str, *arguments: object, folder: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, paths.ROOT / "examples" / name, *map(str, arguments)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(paths.ROOT),
            "JAX_PLATFORMS": "cpu",
            # Nearly all of it is compilation: programs that are quickly made will do.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        capture_output=True,
        text=True,
    )


class ExamplesTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def test_every_example_is_run_by_a_test(self):
        tested = "".join(path.read_text() for path in paths.ROOT.glob("tests/*/*example*_test.py"))
        for path in (paths.ROOT / "examples").glob("*.py"):
            self.assertIn(f'"{path.name}"', tested)

    def test_finetune(self):
        text = pathlib.Path(self.folder, "text.txt")
        text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
        done = run_example(
            "finetune.py", TINY, text, "-o", "tuned.apr", "--steps", 12, "--learning-rate", 1e-3, folder=self.folder
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
        self.assertLen(losses, 12)
        self.assertLess(losses[-1], losses[0] - 1)
        with open_checkpoint(TINY) as before, open_checkpoint(pathlib.Path(self.folder, "tuned.apr")) as after:
            comparison = compare(before, after, diagnose=False)
            self.assertEqual(list(after.tensors), list(before.tensors))
            self.assertLen(comparison.unequal, len(before.tensors))
            self.assertEqual(after.files["tokenizer.json"], before.files["tokenizer.json"])
        told = tool.run("verify", TINY, pathlib.Path(self.folder, "tuned.apr"))
        self.assertEqual(told.returncode, 1, told.stderr)
        self.assertIn("fine-tuned, or otherwise trained on", told.stdout)

    def test_own_kernel(self):
        arguments = (TINY, paths.golden(TINY.name))
        right = run_example("own_kernel.py", *arguments, folder=self.folder)
        self.assertEqual(right.returncode, 0, right.stdout + right.stderr)
        self.assertIn("Ops(rms_norm=partial(rms_norm), activation=silu)", right.stdout)
        self.assertEqual(right.stdout.count("fine"), 4)
        wrong = run_example("own_kernel.py", *arguments, "--mistake", folder=self.folder)
        self.assertEqual(wrong.returncode, 1, wrong.stdout + wrong.stderr)
        self.assertIn("WRONG", wrong.stdout)

    def test_restore_with_orbax(self):
        done = tool.run("checkpoint", "save", TINY, pathlib.Path(self.folder, "prepared"), "--fused")
        self.assertEqual(done.returncode, 0, done.stderr)
        right = run_example("restore_with_orbax.py", "prepared", folder=self.folder)
        self.assertEqual(right.returncode, 0, right.stderr)
        self.assertEqual(right.stdout.count("float32"), 16)
        part = pathlib.Path(self.folder, "prepared", "parameters", "model.norm.weight", "0")
        part.write_bytes(bytes(256))
        wrong = run_example("restore_with_orbax.py", "prepared", folder=self.folder)
        self.assertIn("AssertionError: model.norm.weight", wrong.stderr)


if __name__ == "__main__":
    absltest.main()
