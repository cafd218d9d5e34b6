"""The rotary tables against values that torch computed (tests/data/torch_inverse_frequencies.json)."""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model import rotary
from tests import paths

CONFIG = Qwen2Config.from_hf(json.loads((paths.checkpoint("gqa_tied_bf16") / "config.json").read_text()))
RECORDED = json.loads((paths.DATA / "torch_inverse_frequencies.json").read_text())


class RotaryTest(parameterized.TestCase):
    def test_inverse_frequencies_are_bit_equal_to_torchs(self):
        compared = 0
        for case in RECORDED["cases"]:
            ours = rotary.inverse_frequencies(case["theta"], case["head_dim"])
            self.assertEqual(ours.dtype, np.float32)
            self.assertEqual(ours.view(np.uint32).tolist(), case["bits"], case)
            compared += len(case["bits"])
        self.assertGreater(compared, 500)

    def test_a_correctly_rounded_power_would_not_be(self):
        # What the emulation is for: theta 1e6 at head_dim 128 is the case of Qwen2.5-1.5B and 7B.
        exponents = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
        rounded = np.float32(1) / (1e6 ** exponents.astype(np.float64)).astype(np.float32)
        self.assertEqual(np.flatnonzero(rounded != rotary.inverse_frequencies(1e6, 128)).tolist(), [37])

    def test_tables_are_the_correctly_rounded_cosine_and_sine_of_float32_angles(self):
        config = dataclasses.replace(CONFIG, rope_theta=1e6, head_dim=64)
        cos, sin = rotary.tables(config, 300)
        angles = np.float32(299) * rotary.inverse_frequencies(1e6, 64)
        np.testing.assert_array_equal(cos[299], np.cos(np.longdouble(angles)).astype(np.float32))
        np.testing.assert_array_equal(sin[299], np.sin(np.longdouble(angles)).astype(np.float32))
        self.assertEqual((cos.shape, cos.dtype, cos[0].tolist()), ((300, 32), np.float32, [1.0] * 32))


if __name__ == "__main__":
    absltest.main()
