"""The two NumPy engines that tests judge by, against torch and HuggingFace themselves."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from absl.testing import absltest

from tests import oracle, paths
from tests.battery import faulty_forward

GQA = "gqa_tied_bf16"


class OracleTest(absltest.TestCase):
    def test_inverse_frequencies_are_bit_equal_to_torchs(self):
        capability = torch.backends.cpu.get_cpu_capability()
        if capability not in ("AVX512", "AVX2"):
            self.skipTest(f"torch's powf on {capability} is another one")
        thetas = [1e4, 5e5, 1e6, 1e7, 1.5e5, 123456.789, *np.exp(np.random.default_rng(0).uniform(1, 20, 40))]
        compared = wrong = 0
        for theta in thetas:
            for dim in range(2, 258, 2):
                expected = 1.0 / (float(theta) ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
                # Beyond whole blocks (of 32 with AVX-512, of 16 with AVX2) torch calls the C library's powf.
                whole = dim // 2 // 32 * 32
                different = (oracle.inv_freq(float(theta), dim) != expected.numpy())[:whole]
                compared, wrong = compared + whole, wrong + int(different.sum())
        self.assertEqual(wrong, 0)
        self.assertGreater(compared, 100_000)


class FaultyForwardTest(absltest.TestCase):
    def test_bfloat16_is_nearer_to_huggingface_than_bfloat16_is_to_the_truth(self):
        weights, config = oracle.load(paths.checkpoint(GQA))
        ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, 80))
        model = transformers.Qwen2ForCausalLM.from_pretrained(
            paths.checkpoint(GQA), dtype=torch.bfloat16, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model(torch.tensor(ids)).logits.float().numpy()
        found, exact = (
            faulty_forward.forward(weights, config, ids, dtype=dtype)["logits"] for dtype in ("bfloat16", "float64")
        )
        error = np.linalg.norm(logits - exact)
        self.assertLess(np.linalg.norm(found - logits), error / 3)


if __name__ == "__main__":
    absltest.main()
