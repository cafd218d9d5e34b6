"""Dumps of layer outputs or of logits alone: mistakes are found jointly, in all layers or in a single one."""

import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.parity import search
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.replay import Replay
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench

EPS = {"eps": 1e-4}


def of_layers(dump):
    return {key: value for key, value in dump.items() if key.count(".") < 2 or key.endswith("post_ffn_residual")}


def of_logits(dump):
    return {"logits": dump["logits"]}


class CoarseTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of("gqa_tied_bf16")

    def found(self, shown, *planted):
        return self.bench.diagnose(shown(self.bench.dump(planted))).findings

    @parameterized.parameters((of_layers, None), (of_layers, (1,)), (of_logits, None))
    def test_an_eps_of_both_norms_is_one_mistake(self, shown, layers):
        finding, *others = self.found(shown, Planted("rms-norm-eps", layers, EPS))
        self.assertEqual((finding.fault, finding.layers), ("rms-norm-eps", layers or "all"), finding.sentence)
        self.assertAlmostEqual(finding.parameters["eps"] / 1e-4, 1, places=2)
        self.assertEqual(others, [])

    def test_logits_tell_the_layer_that_makes_a_mistake(self):
        (finding,) = self.found(of_logits, Planted("k-bias-missing", (0,)))
        self.assertEqual((finding.fault, finding.layers), ("k-bias-missing", (0,)), finding.sentence)

    def test_a_norm_that_reads_no_stream_is_found_though_what_the_layer_before_adds_is_in_no_dump(self):
        (finding,) = self.found(of_layers, Planted("norm-before-residual", (1,)))
        self.assertEqual((finding.fault, finding.layers), ("norm-before-residual", (1,)), finding.sentence)

    @parameterized.parameters(of_layers, of_logits)
    def test_a_right_engine_has_no_finding(self, shown):
        self.assertEqual(self.found(shown), ())

    def test_a_mistake_of_one_layer_is_made_there_alone(self):
        # The witness is the engine that makes it: every stage of both layers, none of them dumped.
        inputs, config = self.bench.inputs, self.bench.exact.config
        replay = Replay(config, self.bench.exact.parameters, inputs, {})
        mistake = FAULTS["activation-relu"].made().in_layers(1)
        theirs = self.bench.dump([Planted("activation-relu", (1,))], "float64")
        for key in ("stage.0.ffn_silu", "stage.1.ffn_silu", "logits"):
            tokens = inputs.attention_mask == 1
            ours = replay.under((mistake,)).compute(key)
            self.assertLess(abs(ours - theirs[key])[tokens].max(), 1e-9, key)

    def test_a_search_that_is_ended_says_so(self):
        with mock.patch.object(search, "_MOST_STACKS", 5):
            findings = self.found(of_layers, Planted("softmax-scale", None, {"scale": 0.3}), Planted("gate-up-swapped"))
        self.assertIn("unknown", {finding.fault for finding in findings})
        self.assertIn("the search was ended after", findings[0].sentence)


if __name__ == "__main__":
    absltest.main()
