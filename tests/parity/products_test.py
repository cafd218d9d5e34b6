"""Products of rounded factors are told by formulas that are not the table's own."""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from apr_jax.model.qwen2 import OPS
from tests.battery.parity_battery import Bench


def q8_k(x):
    """Rounds the last axis as GGML's Q8_K does: for each 256 values the largest magnitude is 127 steps."""
    parts = []
    for start in range(0, x.shape[-1], 256):
        part = x[..., start : start + 256]
        step = jnp.max(jnp.abs(part), axis=-1, keepdims=True) / 127
        parts.append(jnp.where(step > 0, jnp.round(part / step) * step, 0))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class ActivationsTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of("gqa_tied_bf16")

    def test_activations_in_int8_are_named_with_their_codec(self):
        def linear(ops, x, weight, *dtype):
            return OPS.linear(ops, q8_k(x), weight, *dtype)

        trace = self.bench.same.with_ops(dataclasses.replace(OPS, linear=linear)).trace(self.bench.inputs)
        findings = self.bench.diagnose({key: np.asarray(value) for key, value in trace.items()}).findings
        found = [(finding.fault, finding.layers, finding.parameters) for finding in findings]
        self.assertEqual(found, [("activations-quantised", "all", {"codec": "int8 by row or q8_k"})])


if __name__ == "__main__":
    absltest.main()
