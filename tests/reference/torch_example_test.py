"""The example that captures a PyTorch model's stages: it is right as it stands, and each mistake is named."""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.trace import hf_reference
from tests import paths
from tests.examples.examples_test import run_example

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)


class TorchExampleTest(parameterized.TestCase):
    @parameterized.parameters(
        (None, "rounding: every stage is within the budget of float32 (35 stages"),
        ("rope", "adjacent-pair RoPE"),
        ("eps", "rms_norm eps is 0.001"),
        ("heads", "reads KV head h mod n_kv"),
    )
    def test_it_says_what_is_wrong(self, mistake, said):
        arguments = () if mistake is None else ("--mistake", mistake)
        with tempfile.TemporaryDirectory() as folder:
            done = run_example("find_mistake_in_torch.py", paths.checkpoint("gqa_tied_bf16"), *arguments, folder=folder)
        self.assertEqual(done.returncode, 0 if mistake is None else 1, done.stderr)
        self.assertIn(said, done.stdout)
        self.assertEqual("mistake: 1 found (35 stages" in done.stdout, mistake is not None)


if __name__ == "__main__":
    absltest.main()
