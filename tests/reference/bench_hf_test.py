"""The benchmark's HuggingFace: the same arrays and logits as the model, and a run that sees when they differ."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
from absl.testing import absltest, parameterized

from apr_jax.bench import measure, session
from apr_jax.bench.cases import Case
from apr_jax.bench.ours import Ours, random_parameters, tokens
from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.testing.sample import SAMPLES
from apr_jax.trace import hf_reference, tolerances
from tests import faults, paths


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed")
class HuggingFaceTest(parameterized.TestCase):
    def peers(self, model):
        from apr_jax.bench.huggingface import HuggingFace

        return HuggingFace.over(model)

    @parameterized.product(name=paths.NAMES, fused=[False, True])
    def test_both_compute_the_same_from_the_same_arrays(self, name, fused):
        model = load_model(paths.checkpoint(name), fused=fused)
        apart = measure.agreement(Ours(model), self.peers(model)[0], tokens(model.config, 2, 16))
        self.assertLessEqual(apart, tolerances.FLOAT32)
        self.assertTrue(session.agrees({"dtype": "float32", "relative_l2_to_huggingface": apart}))

    def test_a_wrong_program_is_seen(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16")).with_ops(faults.ADJACENT_PAIRS)
        apart = measure.agreement(Ours(model), self.peers(model)[0], tokens(model.config, 2, 16))
        self.assertFalse(session.agrees({"dtype": "float32", "relative_l2_to_huggingface": apart}))

    def test_nothing_is_copied(self):
        config = SAMPLES["gqa_untied_bf16"].config
        device = jax.devices("cpu")[0]
        model = LanguageModel(config, random_parameters(config, "bfloat16", True, device), device)
        theirs = self.peers(model)[0]._model.get_parameter("model.layers.1.mlp.up_proj.weight")
        whole = model.parameters["model"]["layers"][1]["mlp"]["gate_up_proj"]["weight"]
        self.assertEqual(theirs.data_ptr(), whole.unsafe_buffer_pointer() + whole.nbytes // 2)

    @parameterized.parameters("prefill-2x20", "decode-2x20")
    def test_all_three_are_measured(self, name):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        plan = measure.Plan(rounds=1, seconds=0.0, steps=4, best=True)
        measurement = measure.Measurement(Case.parse(name), plan)
        measurement.prepare([Ours(model), *self.peers(model)])
        measurement.take_turns()
        rows = measurement.rows
        self.assertEqual([row["contestant"] for row in rows], ["apr_jax", "HuggingFace", "HuggingFace compiled"])
        for row in rows:
            self.assertGreater(row["milliseconds"], 0, row)


if __name__ == "__main__":
    absltest.main()
