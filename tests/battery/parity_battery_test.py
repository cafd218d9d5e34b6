"""The battery's own rules, and mistakes in an engine that declares bfloat16."""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from tests import oracle, paths
from tests.battery import parity_battery
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench, matches

ENLARGED = 40.0
CASES = {
    "relabelled": Planted(
        "weights-relabelled", None, {"tensor": "self_attn.v_proj.weight", "direction": "f16-as-bf16"}
    ),
    "other_layer": Planted("weights-from-another-layer", (0,), {"tensor": "self_attn.k_proj.weight", "layer": 1}),
    "cache": Planted("cache-position", None, {"shift": -1, "prefill": 40, "side": "read"}),
    "eps": Planted("rms-norm-eps", None, {"eps": 1e-4}),
    # What these pairs are turned by is less than the rounding of any value.
    "slow_pairs": Planted("rope-not-on-k", None, {"pairs": (6, 7)}),
    # Adjacent pairs in one channel come as near as single values tell.
    "slow_pairs_of_q": Planted("rope-not-on-q", None, {"pairs": (6, 7)}),
    # A base of 2.2e6 comes nearly as near, within what single values may be off.
    "ntk": Planted("rope-scaling", None, {"rule": "ntk", "factor": 2.0}),
    # bfloat16 first, then 8 bits: two roundings.
    "float8_scores": Planted("scores-precision", None, {"dtype": "float8_e5m2"}),
}


@dataclasses.dataclass
class Found:
    """What `matches` looks at of a finding."""

    fault: str
    layers: tuple[int, ...] | str
    parameters: dict[str, float]
    alternatives: tuple[str, ...] = ()


class Bfloat16Test(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of("gqa_tied_bf16", "bfloat16")

    @parameterized.parameters(list(CASES))
    def test_a_mistake_is_named_and_the_rounding_of_results_to_bfloat16_is_none(self, case):
        findings = self.bench.diagnose(self.bench.dump([CASES[case]])).findings
        sentences = [finding.sentence for finding in findings]
        self.assertEqual([finding.fault for finding in findings], [CASES[case].name], sentences)
        self.assertTrue(matches(self.bench, CASES[case], findings[0]), sentences)

    @pytest.mark.slow
    def test_of_two_that_are_as_near_the_one_without_a_value_beyond_its_budget_is_named(self):
        # Frequencies of llama3's rule are 0.3 % farther off, and turn single values four times as far as they may be.
        planted = Planted("rope-not-on-k", (1,), {"pairs": (3, 4)})
        bench = Bench.of("mha_untied_f32_sharded", "bfloat16")
        (finding,) = bench.diagnose(bench.dump([planted])).findings
        self.assertTrue(matches(bench, planted, finding), finding.sentence)

    def test_it_has_to_be_named_in_the_layers_where_it_counts_and_in_none_where_it_is_not(self):
        everywhere = Planted("rms-norm-eps", None, {"eps": 1e-4})
        effects = parity_battery.local_effects(self.bench, everywhere)
        self.assertGreater(effects[0], parity_battery.COUNTS)
        self.assertLess(effects[1], parity_battery.COUNTS)
        for planted, layers, expected in (
            (everywhere, "all", True),
            (everywhere, (0,), True),
            (everywhere, (1,), False),
            (Planted("rms-norm-eps", (0,), {"eps": 1e-4}), "all", False),
        ):
            found = Found("rms-norm-eps", layers, {"eps": 1e-4})
            self.assertEqual(matches(self.bench, planted, found), expected, (planted, layers))

    def test_an_alternative_counts_in_bfloat16_and_layers_and_names_are_strict_in_float32(self):
        planted = Planted("activation-gelu-tanh")
        either = Found("activation-gelu", "all", {}, alternatives=("activation-gelu-tanh",))
        self.assertTrue(matches(self.bench, planted, either))
        self.assertFalse(matches(self.bench, Planted("activation-relu"), either))
        exact = Bench.of("gqa_tied_bf16")
        self.assertFalse(matches(exact, planted, either))
        self.assertTrue(matches(exact, planted, Found("activation-gelu-tanh", "all", {})))
        self.assertFalse(matches(exact, planted, Found("activation-gelu-tanh", (0,), {})))


class Float16Test(parameterized.TestCase):
    """q and k so large that some of their products pass 65504, though no score that is scaled does."""

    def test_an_overflow_of_the_products_before_their_scale_is_named_and_other_infinities_are_not(self):
        weights, config = oracle.load(paths.checkpoint("gqa_tied_bf16"))
        enlarged = (".q_proj.", ".k_proj.")
        times = {name: ENLARGED if any(part in name for part in enlarged) else 1 for name in weights}
        weights = {name: value * times[name] for name, value in weights.items()}
        folder = pathlib.Path(self.create_tempdir().full_path)
        (folder / "config.json").write_text(json.dumps(config))
        halves = {name: value.astype(np.float16) for name, value in weights.items()}
        safetensors.numpy.save_file(halves, folder / "model.safetensors")
        bench = Bench.at(folder, "enlarged", "float16", 24)
        dump = {key: value for key, value in bench.dump(()).items() if key.startswith("stage.0.")}
        dump = {key: dump[key] for key in list(dump)[:6]}
        scores = dump["stage.0.attn_scores"]
        finite = scores[np.isfinite(scores)]
        self.assertGreater(np.isinf(scores).sum(), 10)
        self.assertLessEqual(np.abs(finite).max(), 65504 / 4)
        (finding,) = bench.diagnose(dump).findings
        self.assertEqual((finding.fault, finding.layers, finding.stage), ("float16-overflow", (0,), "attn_scores"))
        self.assertIn("65504", finding.sentence)
        elsewhere = np.where(np.isinf(scores), 1.0, scores).astype(np.float32)
        elsewhere[:, :, -1, -1] = np.inf
        (finding,) = bench.diagnose({**dump, "stage.0.attn_scores": elsewhere}).findings
        self.assertEqual(finding.fault, "non-finite")


if __name__ == "__main__":
    absltest.main()
