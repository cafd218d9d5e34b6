"""The committed golden values are what HuggingFace computes, now, from the committed checkpoints."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from apr_jax.testing import sample  # noqa: E402
from apr_jax.trace import golden, hf_reference  # noqa: E402
from apr_jax.trace.compare import loss_nats  # noqa: E402
from tests import oracle  # noqa: E402
from tests.data import regenerate  # noqa: E402

# Not zero: torch picks its kernels, and with them the order of sums, by CPU and number of threads.
RELATIVE_L2 = 1e-6


class GoldenRegeneratesTest(parameterized.TestCase):
    def test_there_is_one_golden_file_for_each_checkpoint(self) -> None:
        golden_files = {path.name for path in regenerate.golden_path("x").parent.iterdir()}
        self.assertEqual(golden_files, {regenerate.golden_path(name).name for name in sample.TINY})
        self.assertEqual({path.name for path in (regenerate.DATA / "checkpoints").iterdir()}, set(sample.TINY))

    @parameterized.parameters(*sample.TINY)
    def test_inputs_and_provenance(self, name: str) -> None:
        committed = golden.read(regenerate.golden_path(name))
        for field in ("input_ids", "attention_mask", "position_ids"):
            np.testing.assert_array_equal(
                getattr(committed.inputs, field), getattr(regenerate.batch(name), field), field
            )
        self.assertEqual(committed.inputs.input_ids.shape, (2, 64))
        self.assertEqual(committed.inputs.tokens, 2 * 64 - 13)
        self.assertEqual((committed.metadata["witness"], committed.metadata["dtype"]), ("huggingface", "float32"))
        self.assertContainsSubset({"torch", "transformers"}, json.loads(committed.metadata["versions"]))
        self.assertLess(regenerate.golden_path(name).stat().st_size, 250_000)

    @absltest.skipUnless(hf_reference.available(), "torch and transformers (the reference extra) are not installed")
    @parameterized.parameters(*sample.TINY)
    def test_live_values_equal_the_committed_ones(self, name: str) -> None:
        committed, live = golden.read(regenerate.golden_path(name)), regenerate.compute(name)
        self.assertEqual(set(live.values), set(committed.values))
        self.assertEqual(set(live.values), {"logits", "hidden.0", "hidden.1", "hidden.final_norm"})
        self.assertEqual(live.metadata["weights_sha256"], committed.metadata["weights_sha256"])
        self.assertEqual(live.metadata["config"], committed.metadata["config"])
        real = committed.inputs.attention_mask == 1
        worst = 0.0
        for key, expected in committed.values.items():
            found = live.values[key]
            self.assertEqual((found.dtype, found.shape), (expected.dtype, expected.shape))
            error = np.linalg.norm((found - expected)[real]) / np.linalg.norm(expected[real])
            self.assertLess(error, RELATIVE_L2, key)
            worst = max(worst, float(error))
        print(f"{name}: worst relative L2 against the committed values {worst:.1e}")

    @parameterized.parameters(*sample.TINY)
    def test_the_committed_values_agree_with_the_oracle(self, name: str) -> None:
        committed = golden.read(regenerate.golden_path(name))
        inputs = committed.inputs
        weights, config = oracle.load(regenerate.DATA / "checkpoints" / name)
        logits, stages = oracle.forward(weights, config, inputs.input_ids, inputs.attention_mask)
        expected = {
            "logits": logits,
            "hidden.0": stages["embedding"],
            "hidden.1": stages["0.post_ffn_residual"],
            "hidden.final_norm": stages["final_norm"],
        }
        self.assertEqual(set(expected), set(committed.values))
        real = inputs.attention_mask == 1
        for key, value in expected.items():
            error = np.linalg.norm((committed.values[key] - value)[real]) / np.linalg.norm(value[real])
            self.assertLess(error, 3e-6, key)
        loss = oracle.loss_nats(logits, inputs.input_ids, inputs.attention_mask)
        self.assertAlmostEqual(loss, loss_nats(committed.values["logits"], inputs), places=6)


if __name__ == "__main__":
    absltest.main()
