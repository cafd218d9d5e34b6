"""What the values of a dump say of the engine, before any mistake is looked for."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest

from apr_jax.parity.localise import infer_dtype
from tests.battery.parity_battery import Bench


class DtypeTest(absltest.TestCase):
    def test_the_dtype_is_seen_in_the_values(self):
        bench = Bench.of("gqa_tied_bf16")
        for dtype in ("float32", "bfloat16", "float64"):
            self.assertEqual(infer_dtype(bench.dump((), dtype)), dtype)

    def test_one_stage_that_bfloat16_does_not_hold_is_enough(self):
        short, long = np.ones((1, 2, 4), np.float32), np.full((1, 2, 4), 1 + 2**-20, np.float32)
        for values, dtype in (((short, short), "bfloat16"), ((short, long), "float32"), ((long, short), "float32")):
            self.assertEqual(infer_dtype(dict(zip(("stage.embedding", "logits"), values, strict=True))), dtype)
        # An engine in bfloat16 may keep that sum in float32.
        self.assertEqual(infer_dtype({"stage.embedding": short, "stage.0.qkv_matmul": long}), "bfloat16")


if __name__ == "__main__":
    absltest.main()
