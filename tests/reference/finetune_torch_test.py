"""examples/finetune.py beside the same training in torch: 200 steps with equal losses; and what the result is."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.verify.comparison import compare
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.trace import hf_reference
from tests import paths, tool

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)
import torch

SAMPLE = paths.checkpoint("gqa_tied_bf16")
STEPS, LENGTH, RATE, BOUND = 200, 64, 3e-4, 1e-4
# A text that does not change, on one line: after 200 steps the model knows some of its words.
TEXT = " ".join((paths.ROOT / "LICENSE").read_text().split())[:6000]
EXAMPLE = paths.ROOT / "examples" / "finetune.py"


class FinetuneTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        (cls.folder / "text.txt").write_text(TEXT)
        # With its own learning rate, which is `RATE`.
        command = [EXAMPLE, SAMPLE, "text.txt", "-o", "tuned.apr", "--steps", STEPS, "--length", LENGTH]
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cls.folder,
            env={**os.environ, "PYTHONPATH": str(paths.ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        cls.losses = np.array([float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")])

    def test_200_losses_are_torchs(self):
        spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        with open_checkpoint(SAMPLE) as checkpoint:
            ids = Tokenizer.of(checkpoint).encode(TEXT)
        model = hf_reference.load(SAMPLE)
        # optax's default decay; all else is the same on both sides.
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
        expected = []
        for batch in example.batches(ids, 4, LENGTH, STEPS):
            batch = torch.tensor(batch)
            logits = model(batch, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        off = np.abs(self.losses - expected)
        print(f"{len(off)} steps, loss {expected[0]:.4f} to {expected[-1]:.4f}, largest difference {off.max():.1e}")
        print("largest up to step 50, 100, 150:", *(f"{off[:n].max():.1e}" for n in (50, 100, 150)))
        self.assertLen(off, STEPS)
        self.assertLess(expected[-1], 0.8 * expected[0])
        self.assertLessEqual(off.max(), BOUND)

    def test_verify_names_what_changed(self):
        with open_checkpoint(SAMPLE) as before, open_checkpoint(self.folder / "tuned.apr") as after:
            self.assertEqual(list(after.tensors), list(before.tensors))
            self.assertLen(compare(before, after, diagnose=False).unequal, len(before.tensors))
        done = tool.run("verify", SAMPLE, self.folder / "tuned.apr")
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertRegex(done.stdout, "fine-tuned, or otherwise trained on")

    def test_apr_runs_it(self):
        if not (binary := os.environ.get("APR_BIN")):
            self.skipTest("APR_BIN does not name the genuine apr")
        done = subprocess.run(
            [
                binary,
                "run",
                "tuned.apr",
                "--prompt",
                "subject to the terms and conditions of this Licens",
                "--max-tokens",
                "6",
                "--temperature",
                "0",
            ],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertTrue(re.search(r"Output:\n.+", done.stdout), done.stdout)
        print(done.stdout)


if __name__ == "__main__":
    absltest.main()
