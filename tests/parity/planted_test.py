"""Every mistake of the table, planted once in all layers, is named with its numbers, and nothing else is."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.parity.faults.table import BACKWARD, FAULTS
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench, expected, matches, singles

GQA = "gqa_tied_bf16"
INVISIBLE = {"norm-weight-before-cast"}
"""What no dump in float32 shows."""
PLANTED = {planted.name: planted for planted in reversed(list(singles(2, 16))) if planted.name not in INVISIBLE}
"""One of the battery's for each name."""
ASKED_FOR = {"mask-without-window", "rope-unscaled"}
"""What needs a configuration that asks for a window, or for a rule for RoPE: planted in windows_test.py."""
FUSED = ("attn_norm", "attention", "attn_out", "post_attn_residual", "ffn_norm", "ffn_out", "post_ffn_residual")


@pytest.mark.slow
class PlantedTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of(GQA)

    def test_all_that_the_table_explains_are_here(self):
        made = {name for name, fault in FAULTS.items() if not fault.unexplained and name not in BACKWARD}
        self.assertEqual(set(PLANTED), made - {"upload", "rank-order", "all-reduce-missing", "ranks-apart"} - ASKED_FOR)

    @parameterized.parameters(sorted(PLANTED))
    def test_it_is_named_with_its_numbers_and_nothing_else_is(self, name):
        planted = PLANTED[name]
        (finding,) = self.bench.diagnose(self.bench.dump([planted])).findings
        self.assertTrue(matches(self.bench, planted, finding), finding.sentence)
        self.assertLessEqual(set(expected(self.bench, planted)[2]) - {"tensor"}, set(finding.parameters))
        self.assertEqual((finding.certainty, finding.alternatives), ("certain", ()))

    def test_a_base_is_found_behind_a_gap_wherever_between_its_neighbours_it_lies(self):
        for theta in (2e4, 4e4, 5e4, 8e4):
            dump = self.bench.dump([Planted("rope-theta", None, {"theta": theta})])
            shown = {key: value for key, value in dump.items() if key.split(".")[-1] in FUSED}
            (finding,) = self.bench.diagnose(shown).findings
            self.assertEqual((finding.fault, finding.layers), ("rope-theta", "all"), finding.sentence)
            self.assertAlmostEqual(finding.parameters["theta"] / theta, 1, places=4)


if __name__ == "__main__":
    absltest.main()
