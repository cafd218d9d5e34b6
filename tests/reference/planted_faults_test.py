"""Every planted fault on every checkpoint leaves the bar of HuggingFace's golden values; the default suite has some."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from tests import faults, paths
from tests.model.language_model_test import PLANTED, within_golden

OTHERS = [(name, fault) for name in paths.NAMES for fault in faults.FAULTS if (name, fault) not in PLANTED]


class PlantedFaultsTest(parameterized.TestCase):
    @parameterized.parameters(OTHERS)
    def test_it_is_seen_where_it_changes_anything(self, name, fault):
        model = load_model(paths.checkpoint(name))
        self.assertEqual(within_golden(fault.plant(model), name), not fault.visible(model.config), fault.name)


if __name__ == "__main__":
    absltest.main()
