"""Parts of stages and sums behind a gap: what is predicted of a change is what an engine that makes it shows."""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.parity.faults.parts import SCALED, STAGE_SCALED
from apr_jax.parity.faults.record import Region
from apr_jax.parity.localise import localise
from apr_jax.parity.replay import Replay
from apr_jax.parity.search import Search
from apr_jax.trace.positions import complete
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import REAL_CASE, Bench, matches

SLIGHTLY = 1 + 1e-3
OUTPUTS, LOGITS = "post_ffn_residual", "logits"

bench = functools.cache(lambda: Bench.of("gqa_tied_bf16"))


def dumped(shown, *planted):
    """What the NumPy engine, which shares no code with the search, shows of these mistakes in float64."""
    return {key: value for key, value in bench().dump(planted, "float64").items() if key.split(".")[-1] == shown}


def question(shown, *planted):
    this = bench()
    located = localise(this.exact, this.same, this.inputs, complete(dumped(shown, *planted), this.inputs))
    replay = Replay(this.exact.config, this.exact.parameters, this.inputs, located.theirs)
    site = next(site for site in located.sites if site.wrong)
    return Search(replay, site, located)._question()


class ResponseTest(parameterized.TestCase):
    @parameterized.product(shown=(OUTPUTS, LOGITS), stage=("qkv_bias", "attn_scores", "ffn_gate"))
    def test_a_slight_change_is_predicted_to_be_all_of_the_difference(self, shown, stage):
        asked = question(shown, Planted("stage-scaled", (1,), {"stage": stage, "factor": SLIGHTLY}))
        mistake = STAGE_SCALED.made(factor=SLIGHTLY).at(stage)
        moved = asked.response.of(mistake)
        expected = asked.response.predicted(moved[1])
        self.assertAlmostEqual(float(expected.part), 1.0, delta=0.01)
        # As many random directions tell a size to a tenth; three times that is chance in a thousand.
        self.assertAlmostEqual(float(expected.size), 1.0, delta=0.3)

    def test_another_head_or_layer_is_predicted_to_be_something_else(self):
        planted = Planted("part-scaled", (1,), {"stage": "attention", "heads": (2,), "factor": SLIGHTLY})
        asked = question(LOGITS, planted)

        def of(head):
            mistake = SCALED.made(factor=SLIGHTLY).confined(Region("heads", (head,), 4), "attention")
            return asked.response.of(mistake)

        self.assertAlmostEqual(float(asked.response.predicted(of(2)[1]).part), 1.0, delta=0.01)
        for moved in (of(2)[0], of(1)[1]):
            self.assertLess(abs(float(asked.response.predicted(moved).cosine)), 0.9)


@pytest.mark.slow
class PartsTest(parameterized.TestCase):
    def found(self, shown, planted):
        dump = {key: value for key, value in bench().dump([planted]).items() if key.split(".")[-1] == shown}
        (finding,) = bench().diagnose(dump).findings
        return finding

    @parameterized.parameters(
        ("part-scaled", None, {"stage": "attention", "heads": (1,), "factor": 1.2}),
        ("part-zeroed", (1,), {"stage": "qkv_bias", "channels": (3, 4, 5)}),
        ("part-exchanged", (0,), {"stage": "ffn_up", "channels": (8, 9)}),
        ("part-exchanged", (1,), {"stage": "attn_softmax", "heads": (1, 2)}),
        ("rope-not-on-q", (0,), {"heads": (1,)}),
        ("sum-cut-short", (1,), {"product": "self_attn.k_proj.weight", "first": 8, "last": 15}),
        ("norm-part-of-width", None, {"columns": 56, "divisor": "all"}),
        ("residual-twice", (1,), {"blocks": ("mlp",)}),
        ("weights-interleaved", (1,), {"tensor": "mlp.up_proj.weight", "block": 32}),
        ("rope-scaling", None, {"rule": "linear", "factor": 2.5}),
    )
    def test_logits_tell_what_happened_to_a_part_of_a_stage_and_where(self, name, layers, parameters):
        finding = self.found(LOGITS, Planted(name, layers, parameters))
        self.assertEqual((finding.fault, finding.layers), (name, layers or "all"), finding.sentence)
        for key in {"heads", "channels", "first", "last", "columns", "block", "factor"} & parameters.keys():
            value = finding.parameters[key]
            np.testing.assert_allclose(np.asarray(value), np.asarray(parameters[key]), rtol=1e-3, err_msg=key)

    def test_the_finding_says_of_which_stage_a_part_is(self):
        parameters = {"stage": "attention", "heads": (1,), "factor": 1.2}
        finding = self.found(OUTPUTS, Planted("part-scaled", (1,), parameters))
        self.assertIn("layer 1, post_ffn_residual: head 1 of 4 of attention scaled by 1.2", finding.sentence)

    def test_a_scaled_stage_that_gives_the_same_scores_is_an_alternative(self):
        finding = self.found(OUTPUTS, Planted("stage-scaled", None, {"stage": "k_post_rope", "factor": 1.138629}))
        self.assertIn("stage-scaled", (finding.fault, *finding.alternatives))
        self.assertIn("softmax-scale", (finding.fault, *finding.alternatives))

    def test_channels_that_are_zero_and_a_sum_without_their_terms_are_one_class(self):
        planted = Planted("sum-cut-short", None, {"product": "self_attn.o_proj.weight", "first": 56, "last": 63})
        finding = self.found(OUTPUTS, planted)
        self.assertContainsSubset({"sum-cut-short", "part-zeroed"}, {finding.fault, *finding.alternatives})


@pytest.mark.slow
class JointTest(absltest.TestCase):
    def test_four_mistakes_are_named_from_logits_alone(self):
        dump = bench().dump(REAL_CASE)
        findings = bench().diagnose({"logits": dump["logits"]}).findings
        self.assertEqual(len(findings), 4)
        for planted in REAL_CASE:
            self.assertTrue(any(matches(bench(), planted, finding) for finding in findings), planted)


if __name__ == "__main__":
    absltest.main()
