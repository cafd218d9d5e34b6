"""The planted-damage battery, shortened: every variant once in each element type, without couples."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from tests.battery import damage_battery

pytestmark = pytest.mark.slow


class DamageBatteryTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        self.workshop = damage_battery.Workshop(self.folder)

    def test_every_damage_is_detected_and_named_exactly(self):
        # The bar of the battery is 97 %. As long as all of them are named, one variant less is a regression.
        quick = tuple(variant for variant in damage_battery.VARIANTS if variant.quick)
        scores = damage_battery.run(self.workshop, quick, first_only=True)
        self.assertGreaterEqual(len(scores), 120)
        misses = [f"{name}, {miss}" for name, score in scores.items() for miss in score.misses]
        self.assertEqual(misses, [])
        self.assertEqual([name for name, score in scores.items() if score.detected < score.cases], [])

    def test_undamaged_pairs_have_nothing_but_exact_casts(self):
        count, wrong = damage_battery.clean_pairs(self.workshop, self.folder)
        self.assertGreaterEqual(count, 20)
        self.assertEqual(wrong, [])

    def test_a_model_has_one_story(self):
        count, wrong = damage_battery.stories(self.workshop, self.folder)
        self.assertGreaterEqual(count, 30)
        self.assertEqual(wrong, [])


if __name__ == "__main__":
    absltest.main()
