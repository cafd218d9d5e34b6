"""Some mistakes of the unknown battery, and its rules."""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from tests.battery import unknown_battery
from tests.battery.unknown_battery import CONFIGS, UNKNOWNS, Bench, judged, run_case, table

pytestmark = pytest.mark.slow

CHOSEN = (
    "a key block of a head is zero",
    "a head is added to the next",
    "a clamp of one head",
    "a key block is added twice",
    "a stale residual of one position",
    "an uninitialised tile",
    "noise on one channel",
)


def number(name: str) -> int:
    """The first mistake of a name."""
    return next(index for index, unknown in enumerate(UNKNOWNS) if unknown.name == name)


class UnknownBatteryTest(parameterized.TestCase):
    @parameterized.parameters(*CHOSEN)
    def test_it_is_described_where_it_was_made(self, name):
        result = run_case(number(name))
        self.assertEqual((result["detected"], result["described"], result["wrong"]), (True, True, []), result)

    def test_a_description_of_another_part_or_place_does_not_count(self):
        unknown = UNKNOWNS[number("noise on one channel")]
        bench = Bench.of(CONFIGS[0])
        findings = bench.diagnose(unknown_battery._Engine(bench, unknown, "float32").run()).findings
        self.assertEqual(judged(unknown, findings), (True, ""))
        for changed in (
            {"channels": (78,)},
            {"channels": None},
            {"positions": (3,)},
            {"stage": "ffn_gate"},
            {"layer": 0},
        ):
            self.assertFalse(judged(dataclasses.replace(unknown, **changed), findings)[0], changed)
        self.assertFalse(judged(dataclasses.replace(unknown, said="2 times"), findings)[0])
        self.assertFalse(judged(unknown, [*findings, *findings])[0])
        self.assertFalse(judged(unknown, [])[0])
        renamed = dataclasses.replace(findings[0], fault="activation-relu")
        self.assertFalse(judged(unknown, [renamed])[0])

    def test_the_table_needs_every_one_detected(self):
        one = {"name": "it", "stage": "1.ffn_up", "detected": True, "described": True, "why": "", "wrong": []}
        one |= {"seconds": 0.0, "processor_seconds": 0.0, "findings": []}
        right = [one] * 60
        self.assertTrue(table(right)[1])
        self.assertFalse(table([])[1])
        self.assertFalse(table([*right, {**one, "detected": False}])[1])
        self.assertFalse(table([*right, *[{**one, "wrong": ["activation-relu"]}] * 2])[1])
        self.assertFalse(table([*right, *[{**one, "described": False}] * 4])[1])


if __name__ == "__main__":
    absltest.main()
