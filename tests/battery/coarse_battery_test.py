"""The coarse battery's own rules; a few of its cases are in tests/parity/coarse_test.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from tests.battery import coarse_battery
from tests.battery.coarse_battery import SHOWN, Case, _judged, table
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench

pytestmark = pytest.mark.slow


def result(shown: str, **changed):
    """One visible mistake, named."""
    fine = {"kind": "single", "shown": shown, "label": "it", "effect": 50.0, "findings": ["said"], "exact": True}
    return {**fine, "wrong": 0, "seconds": 0.0, "processor_seconds": 0.0, **changed}


class CoarseBatteryTest(absltest.TestCase):
    def test_what_is_right_passes_and_each_kind_of_failure_does_not(self):
        right = [result(shown) for shown in SHOWN for _ in range(100)]
        self.assertTrue(table(right)[1])
        self.assertFalse(table([])[1])
        for bad in (
            {"findings": [], "exact": False},
            {"kind": "clean"},
            {"effect": 0.5, "wrong": 1},
            {"kind": "four-fold", "named": 2, "wrong": 0},
            {"kind": "four-fold", "named": 4, "wrong": 1},
        ):
            self.assertFalse(table([*right, result("logits", **bad)])[1], bad)

    def test_shares_are_needed_and_wrong_names_are_bounded(self):
        for shown, unnamed in (("layer outputs", 16), ("logits", 31)):
            made = [result(other) for other in SHOWN for _ in range(100)]
            missed = [result(shown, exact=False) for _ in range(unnamed)]
            kept = [r for r in made if r["shown"] != shown] + [result(shown) for _ in range(100 - unnamed)]
            self.assertFalse(table([*kept, *missed])[1])
            self.assertTrue(table([*kept, *missed[1:], result(shown)])[1])
            self.assertFalse(table([*made, *(result(shown, wrong=1) for _ in range(3))])[1])

    def test_another_mistake_is_a_wrong_name_and_an_alternative_has_to_give_the_same_dump(self):
        bench = Bench.of("gqa_tied_bf16")
        case = Case("single", bench.name, "layer outputs", (Planted("activation-relu"),))
        (found,) = bench.diagnose(coarse_battery.cut(bench.dump(case.planted), case.shown)).findings
        self.assertEqual(_judged(bench, case, [found])["exact"], True)
        other = Case("single", bench.name, "layer outputs", (Planted("gate-up-swapped"),))
        self.assertEqual(_judged(bench, other, [found])["wrong"], 1)
        (swapped,) = bench.diagnose(coarse_battery.cut(bench.dump(other.planted), case.shown)).findings
        self.assertIn("activation-on-up", {swapped.fault, *swapped.alternatives})
        on_up = Case("single", bench.name, "layer outputs", (Planted("activation-on-up"),))
        self.assertTrue(_judged(bench, on_up, [swapped])["exact"], swapped.sentence)

    def test_all_four_mistakes_are_planted_where_all_are_mistakes(self):
        made = {case.bench for case in coarse_battery.cases() if case.kind == "four-fold"}
        self.assertEqual(made, {*coarse_battery.BENCHES} - {"three layers, MQA"})


if __name__ == "__main__":
    absltest.main()
