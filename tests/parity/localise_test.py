"""What the values of a dump say of the engine, before any mistake is looked for."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest

from apr_jax.parity.localise import infer_dtype, judge
from apr_jax.trace.inputs import Inputs
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
        half = np.full((1, 2, 4), 1 + 2**-10, np.float32)
        self.assertEqual(infer_dtype({"stage.embedding": short, "logits": half}), "float16")
        self.assertEqual(infer_dtype({"stage.embedding": half, "logits": np.full((1, 2), 1 + 2**-30)}), "float64")
        # Zeros are in every dtype.
        self.assertEqual(infer_dtype({"stage.embedding": 0 * short, "logits": half}), "float16")
        self.assertEqual(infer_dtype({"stage.embedding": 0 * short}), "float32")
        # An engine in bfloat16 may keep that sum in float32.
        self.assertEqual(infer_dtype({"stage.embedding": short, "stage.0.qkv_matmul": long}), "bfloat16")


class SumsTest(absltest.TestCase):
    def judged(self, factor):
        """A softmax whose first key has nearly all, in float32, the sum made one after the other; the last row off."""
        scores = np.where(np.tri(120, dtype=bool), np.where(np.arange(120), -16.7, 0.0), -np.inf)
        raised = np.exp(scores)
        reference, narrow = raised / raised.sum(-1, keepdims=True), raised.astype(np.float32)
        theirs = narrow / np.add.accumulate(narrow, axis=-1, dtype=np.float32)[..., -1:]
        theirs[-1] *= np.float32(factor)
        own = reference.astype(np.float32)
        inputs = Inputs.of(np.zeros((1, 120), int))
        return judge("stage.0.attn_softmax", *(x[None, None] for x in (theirs, reference, own)), inputs, "float32")

    def test_a_plain_sum_may_lose_what_is_too_small_to_be_added(self):
        right = self.judged(1.0)
        self.assertLess(right.worst, 1.0)
        self.assertGreater(right.error, 50 * right.own)

    def test_and_nothing_else(self):
        self.assertGreater(self.judged(1.00002).worst, 1.0)


if __name__ == "__main__":
    absltest.main()
