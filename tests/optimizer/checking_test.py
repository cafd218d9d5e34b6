"""AdamW's mistakes, planted by a NumPy engine in float32, are named from parameters alone; right steps are not."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import DumpError
from apr_jax.optimizer.mistakes import MISTAKES
from apr_jax.optimizer.settings import Layout
from tests import paths, tool
from tests.battery import faulty_adamw
from tests.battery.optimizer_battery import FOUR, ONE, Bench, bench, outcome

pytestmark = pytest.mark.slow

SAMPLE = "mha_untied_f32_sharded"
# What four steps tell; the whole table is tests/battery/optimizer_battery.py.
NAMED = (
    "adamw-bias-correction",
    "adamw-step-off-by-one",
    "adamw-betas-swapped",
    "adamw-eps-in-root",
    "adamw-eps",
    "adamw-momentum-only",
    "adamw-lr",
    "adamw-schedule-off-by-one",
    "adamw-decay-in-moment",
    "adamw-decay-on-norms",
    "adamw-decay-unscaled",
    "adamw-gradient-accumulated",
)


class CheckingTest(parameterized.TestCase):
    def test_right_steps_of_optax_and_of_numpy_are_right(self):
        for rates in (ONE, FOUR):
            place = bench(SAMPLE, rates)
            for parameters in (place.optax(), place.planted("")):
                verdict = place.judge(parameters)
                self.assertTrue(verdict.within, verdict)
                self.assertEqual((verdict.parameters, verdict.elements), (27, 59320))
                self.assertLess(verdict.right.worst, 1.5)

    @parameterized.parameters(*NAMED)
    def test_a_mistake_is_named_with_its_number(self, mistake):
        place = bench(SAMPLE, FOUR)
        verdict = place.judge(place.planted(mistake))
        self.assertEqual(outcome(verdict, mistake), "exact", verdict)

    def test_two_mistakes_at_once(self):
        place = bench(SAMPLE, ONE)
        planted = place.planted("adamw-eps-in-root")
        planted["model.norm.weight"] = place.start["model.norm.weight"]
        verdict = place.judge(planted)
        self.assertEqual({each.name for each in verdict.mistakes}, {"adamw-eps-in-root", "adamw-not-moved"})

    def test_what_no_record_explains_is_unknown(self):
        place = bench(SAMPLE, ONE)
        planted = place.planted("")
        planted["model.layers.1.mlp.up_proj.weight"] += np.float32(3e-4) * np.random.default_rng(0).normal(
            size=planted["model.layers.1.mlp.up_proj.weight"].shape
        ).astype(np.float32)
        verdict = place.judge(planted)
        self.assertEqual(([each.name for each in verdict.mistakes], verdict.right.where),
                         (["unknown"], "model.layers.1.mlp.up_proj.weight"))  # fmt: skip

    def test_what_is_not_finite_is_said(self):
        place = bench(SAMPLE, ONE)
        planted = place.planted("")
        planted["model.norm.weight"] = planted["model.norm.weight"] * np.float32(np.nan)
        (found,) = place.judge(planted).mistakes
        self.assertEqual((found.name, found.numbers), ("not-finite", {"elements": 40}))

    def test_parameters_of_another_model_are_refused(self):
        place = bench(SAMPLE, ONE)
        planted = dict(place.start)
        del planted["model.norm.weight"]
        with self.assertRaisesRegex(DumpError, r"model\.norm\.weight.*1 of 27 do not fit"):
            place.judge(planted)

    def test_every_record_is_planted_somewhere(self):
        planted = {name.split(" ")[0] for name in faulty_adamw.MISTAKES}
        self.assertEqual({mistake.name for mistake in MISTAKES} - planted, {"adamw-gradient-not-clipped"})


class ClippedTest(absltest.TestCase):
    def test_clipping_that_was_asked_for_and_is_not_done(self):
        # So far below the norm that eps shows.
        place = Bench(SAMPLE, FOUR, clip_norm=1e-3)
        self.assertTrue(place.judge(place.optax()).within)
        self.assertTrue(place.judge(place.planted("adamw-gradient-clipped")).within)
        verdict = place.judge(place.planted(""))
        self.assertEqual([each.name for each in verdict.mistakes], ["adamw-gradient-not-clipped"])


class CommandTest(absltest.TestCase):
    def test_what_is_written_is_a_checkpoint_that_checks(self):
        folder, model = pathlib.Path(self.create_tempdir().full_path), paths.checkpoint(SAMPLE)
        after, asked = (
            folder / "after.safetensors",
            ("--optimizer", "adamw", "--lr", "2e-4,4e-4", "--decay", "matrices"),
        )
        done = tool.ran(self, "golden", model, *asked, "-o", after)
        self.assertIn("27 parameters after 2 steps of AdamW", done.stdout)
        self.assertIn("loss before step 2", done.stdout)
        with open_checkpoint(after) as written, open_checkpoint(model) as before:
            self.assertEqual(list(written.tensors), list(before.tensors))
            self.assertIn('"rates": [0.0002, 0.0004]', written.metadata["settings"])
            arrays = {name: tensor.read() for name, tensor in written.tensors.items()}
        done = tool.ran(self, "golden", model, *asked, "--check", after)
        self.assertIn("agree", done.stdout)
        done = tool.ran(self, "golden", model, *asked[:-2], "--check", after, code=1)
        self.assertIn("weight decay acts on matrices; it was asked for on matrices, norms, biases", done.stdout)
        save_file({name: array for name, array in arrays.items() if "norm" in name}, folder / "norms.safetensors")
        done = tool.ran(self, "golden", model, *asked, "--check", folder / "norms.safetensors", code=5)
        self.assertIn("the parameters after the steps are not the model's", done.stderr)

    def test_options_that_do_not_go_together(self):
        model = paths.checkpoint(SAMPLE)
        for options, said in (
            (("--lr", "1e-3", "-o", "x"), "add --optimizer adamw"),
            (("--optimizer", "adamw", "--steps", "3", "--lr", "1,2", "-o", "x"), "one for each step"),
            (("--optimizer", "adamw", "--betas", "0.9", "-o", "x"), "two numbers"),
            (("--optimizer", "adamw", "--trace", "-o", "x"), "leave --export-inputs, --trace"),
            (("--optimizer", "adamw", "--dtype", "bfloat16", "--check", "x"), "float32 or float64"),
            (("--optimizer", "adamw", "--eps", "-1", "-o", "x"), "--eps is not a setting"),
        ):
            with self.subTest(said):
                self.assertIn(said, tool.ran(self, "golden", model, *options, code=2).stderr)


class LayoutTest(absltest.TestCase):
    def test_a_tied_head_is_no_parameter_of_its_own(self):
        with open_checkpoint(paths.checkpoint("gqa_tied_bf16")) as checkpoint:
            layout = Layout.of(checkpoint.model_config())
        self.assertNotIn("lm_head.weight", layout.shapes)
        self.assertLen(layout.shapes, 26)


if __name__ == "__main__":
    absltest.main()
