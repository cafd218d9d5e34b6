"""What a search answers where several mistakes come near."""

import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.parity.faults.record import Fault
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.localise import localise
from apr_jax.trace.positions import complete
from tests.battery.parity_battery import Bench


class AlternativesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of("gqa_tied_bf16")

    @parameterized.parameters((0.8, ("norm-more-than-folded",)), (0.3, ()))
    def test_what_leaves_up_to_twice_as_much_is_an_alternative(self, noise, alternatives):
        key = "stage.final_norm"
        dump = {name: value for name, value in self.bench.dump(()).items() if name != "logits"}
        located = localise(self.bench.exact, self.bench.same, self.bench.inputs, complete(dump, self.bench.inputs))
        (site,) = [site for site in located.sites if site.key == key]
        right, tokens = located.reference[key], (self.bench.inputs.attention_mask == 1)[..., None]
        random = np.where(tokens, np.random.default_rng(0).standard_normal(right.shape), 0)
        random *= noise * site.budget / np.linalg.norm(random)
        factors = {"norm-folded": 2.0, "norm-more-than-folded": 2 + 0.75 * site.budget / site.norm}
        faults = {
            name: Fault(name, "n", ("final_norm",), {"normed": lambda y, at, by=factor: by * np.abs(y)})
            for name, factor in factors.items()
        }
        with mock.patch.dict(FAULTS, faults):
            (finding,) = self.bench.diagnose(dump | {key: (2 * np.abs(right) + random).astype(np.float32)}).findings
        self.assertEqual((finding.fault, finding.alternatives), ("norm-folded", alternatives))


if __name__ == "__main__":
    absltest.main()
