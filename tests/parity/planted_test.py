"""Every mistake of the table, planted once in all layers, is named with its numbers, and nothing else is."""

import dataclasses
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.model.qwen2 import OPS
from apr_jax.parity.diagnose import diagnose
from apr_jax.parity.faults.record import Fault
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.localise import localise
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import complete
from tests.battery.faulty_forward import Planted, forward
from tests.battery.parity_battery import Bench, matches, singles

GQA = "gqa_tied_bf16"
INVISIBLE = {"norm-weight-before-cast"}
"""What no dump in float32 shows."""
PLANTED = {planted.name: planted for planted in reversed(list(singles(2, 16))) if planted.name not in INVISIBLE}
"""One of the battery's for each name."""
FUSED = ("attn_norm", "attention", "attn_out", "post_attn_residual", "ffn_norm", "ffn_out", "post_ffn_residual")


def q8_k(x):
    """Rounds the last axis as GGML's Q8_K does: for each 256 values the largest magnitude is 127 steps."""
    parts = []
    for start in range(0, x.shape[-1], 256):
        part = x[..., start : start + 256]
        step = jnp.max(jnp.abs(part), axis=-1, keepdims=True) / 127
        parts.append(jnp.where(step > 0, jnp.round(part / step) * step, 0))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class PlantedTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of(GQA)

    def test_all_that_the_table_explains_are_here(self):
        made = {name for name, fault in FAULTS.items() if not fault.unexplained}
        self.assertEqual(set(PLANTED), made - {"upload", "activations-quantised"})

    @parameterized.parameters(sorted(PLANTED))
    def test_it_is_named_with_its_numbers_and_nothing_else_is(self, name):
        planted = PLANTED[name]
        (finding,) = self.bench.diagnose(self.bench.dump([planted])).findings
        self.assertTrue(matches(self.bench, planted, finding), finding.sentence)
        self.assertLessEqual(set(planted.parameters) - {"tensor"}, set(finding.parameters))
        self.assertEqual((finding.certainty, finding.alternatives), ("certain", ()))

    def test_activations_in_int8_are_named_with_their_codec(self):
        def linear(ops, x, weight, *dtype):
            return OPS.linear(ops, q8_k(x), weight, *dtype)

        trace = self.bench.same.with_ops(dataclasses.replace(OPS, linear=linear)).trace(self.bench.inputs)
        findings = self.bench.diagnose({key: np.asarray(value) for key, value in trace.items()}).findings
        found = [(finding.fault, finding.layers, finding.parameters) for finding in findings]
        self.assertEqual(found, [("activations-quantised", "all", {"codec": "q8_k"})])

    def test_a_base_is_found_behind_a_gap_wherever_between_its_neighbours_it_lies(self):
        for theta in (2e4, 4e4, 5e4, 8e4):
            dump = self.bench.dump([Planted("rope-theta", None, {"theta": theta})])
            shown = {key: value for key, value in dump.items() if key.split(".")[-1] in FUSED}
            (finding,) = self.bench.diagnose(shown).findings
            self.assertEqual((finding.fault, finding.layers), ("rope-theta", "all"), finding.sentence)
            self.assertAlmostEqual(finding.parameters["theta"] / theta, 1, places=4)

    def test_the_order_of_layers_is_told_by_a_single_token_behind_padding(self):
        mask = np.array([[0] * 7 + [1]], np.int32)
        inputs = Inputs.of(seeded(288, 1, 8).input_ids, mask)
        faults = [Planted("layer-order", None, {"order": (1, 0)})]
        dump = forward(self.bench.weights, self.bench.config, inputs.input_ids, mask, None, faults)
        findings = diagnose(self.bench.exact, self.bench.same, inputs, dump).findings
        self.assertEqual([(f.fault, f.parameters) for f in findings], [("layer-order", {"order": [1, 0]})])

    @parameterized.parameters((0.8, ("norm-more-than-doubled",)), (0.3, ()))
    def test_what_leaves_up_to_twice_as_much_is_an_alternative(self, noise, alternatives):
        key = "stage.final_norm"
        dump = {name: value for name, value in self.bench.dump(()).items() if name != "logits"}
        located = localise(self.bench.exact, self.bench.same, self.bench.inputs, complete(dump, self.bench.inputs))
        (site,) = [site for site in located.sites if site.key == key]
        right, tokens = located.reference[key], (self.bench.inputs.attention_mask == 1)[..., None]
        random = np.where(tokens, np.random.default_rng(0).standard_normal(right.shape), 0)
        random *= noise * site.budget / np.linalg.norm(random)
        factors = {"norm-doubled": 2.0, "norm-more-than-doubled": 2 + 0.75 * site.budget / site.norm}
        faults = {
            name: Fault(name, "n", ("final_norm",), {"normed": lambda y, at, by=factor: by * y})
            for name, factor in factors.items()
        }
        with mock.patch.dict(FAULTS, faults):
            (finding,) = self.bench.diagnose(dump | {key: (2 * right + random).astype(np.float32)}).findings
        self.assertEqual((finding.fault, finding.alternatives), ("norm-doubled", alternatives))


if __name__ == "__main__":
    absltest.main()
