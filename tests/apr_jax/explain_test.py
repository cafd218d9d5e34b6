"""Mistakes planted by the NumPy engine are named; clean dumps have none. The whole battery: make parity-battery."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.explain import diagnose
from apr_jax.localise import infer_dtype
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import REAL_CASE, Bench, matches

GQA = "gqa_tied_bf16"
CASES = {
    "theta_in_one_layer": [Planted("rope-theta", (1,), {"theta": 5e5})],
    "eps": [Planted("rms-norm-eps", None, {"eps": 1e-4})],
    "scale": [Planted("softmax-scale", None, {"scale": 0.2})],
    "window": [Planted("mask-window", None, {"window": 16})],
    "warp": [Planted("softmax-partial-warp")],
    "heads": [Planted("kv-heads-interleaved")],
    "order": [Planted("layer-order", None, {"order": (1, 0)})],
    "shifted": [Planted("logits-shifted", None, {"shift": 7})],
    "late_bias": [Planted("bias-after-rope")],
    "quantised": [Planted("weights-quantised", None, {"tensor": "mlp.down_proj.weight", "codec": "int8"})],
    "tf32": [Planted("tf32-dots", None, {"mode": "round"})],
    "real_case": list(REAL_CASE),
}


class ExplainTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of(GQA)

    @parameterized.parameters(list(CASES))
    def test_every_planted_mistake_is_named_and_nothing_else(self, case):
        findings = self.bench.diagnose(self.bench.dump(CASES[case])).findings
        for planted in CASES[case]:
            self.assertTrue(any(matches(self.bench, planted, f) for f in findings), [f.sentence for f in findings])
        self.assertLen(findings, len(CASES[case]), [f.sentence for f in findings])
        for finding in findings:
            self.assertEqual(finding.certainty, "certain", finding)

    def test_a_clean_dump_has_no_finding(self):
        self.assertEqual(self.bench.diagnose(self.bench.dump(())).findings, ())

    def test_a_layout_is_said_and_undone_before_a_mistake_is_looked_for(self):
        dump = self.bench.dump([Planted("layout", None, {"kind": "heads-major"}), Planted("rope-sign")])
        self.assertEqual({f.fault for f in self.bench.diagnose(dump).findings}, {"layout", "rope-sign"})

    def test_not_a_number_is_a_finding_of_its_own(self):
        dump = self.bench.dump(())
        dump["stage.1.ffn_up"][1, 5, 3] = np.nan
        (finding,) = self.bench.diagnose(dump).findings
        self.assertEqual((finding.fault, finding.layers), ("non-finite", (1,)))
        self.assertIn("[1, 5, 3]", finding.sentence)

    def test_what_nothing_explains_is_unknown_and_says_where(self):
        dump = self.bench.dump(())
        dump["stage.0.ffn_out"][1, 40] *= 1.01
        findings = self.bench.diagnose(dump).findings
        self.assertEqual({f.fault for f in findings}, {"unknown"})
        self.assertIn("row 1 position 40", findings[0].sentence)

    def test_stages_that_were_not_dumped_are_composed_over(self):
        dump = {k: v for k, v in self.bench.dump(REAL_CASE).items() if "attn_s" not in k and "ffn_silu" not in k}
        findings = diagnose(self.bench.exact, self.bench.same, self.bench.inputs, dump).findings
        self.assertEqual({f.fault for f in findings}, {planted.name for planted in REAL_CASE})

    def test_the_dtype_is_seen_in_the_values(self):
        for dtype in ("float32", "bfloat16", "float64"):
            self.assertEqual(infer_dtype(self.bench.dump((), dtype)), dtype)


if __name__ == "__main__":
    absltest.main()
