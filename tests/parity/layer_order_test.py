"""Layers that ran in another order, twice, or not at all are named."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.parity.diagnose import diagnose
from apr_jax.parity.layer_order import execution_order
from apr_jax.trace.inputs import Inputs, seeded
from tests.battery.faulty_forward import Planted, forward
from tests.battery.parity_battery import Bench


class LayerOrderTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of("gqa_tied_bf16")

    @parameterized.parameters(
        ("layer-repeated", {"layer": 0}, [0, 0, 1]),
        ("layer-repeated", {"layer": 1}, [0, 1, 1]),
        ("layer-skipped", {"layer": 0}, [1]),
        ("layer-skipped", {"layer": 1}, [0]),
        ("layer-order", {"order": (1, 0)}, [1, 0]),
    )
    def test_what_ran_is_told_and_has_a_name(self, name, parameters, ran):
        dump = self.bench.dump([Planted(name, None, parameters)])
        order, mistake = execution_order(self.bench.exact, self.bench.inputs, dump)
        self.assertEqual((order, mistake.name, mistake.parameters), (ran, name, parameters))

    def test_the_right_order_has_no_name(self):
        self.assertEqual(execution_order(self.bench.exact, self.bench.inputs, self.bench.dump(())), ([0, 1], None))

    def test_the_order_of_layers_is_told_by_a_single_token_behind_padding(self):
        mask = np.array([[0] * 7 + [1]], np.int32)
        inputs = Inputs.of(seeded(288, 1, 8).input_ids, mask)
        faults = [Planted("layer-order", None, {"order": (1, 0)})]
        dump = forward(self.bench.weights, self.bench.config, inputs.input_ids, mask, None, faults)
        findings = diagnose(self.bench.exact, self.bench.same, inputs, dump).findings
        self.assertEqual([(f.fault, f.parameters) for f in findings], [("layer-order", {"order": [1, 0]})])


if __name__ == "__main__":
    absltest.main()
