"""Mistakes planted by the NumPy engine are named; clean dumps have none. The whole battery: make parity-battery."""

import dataclasses
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.parity import rope_fit, search
from apr_jax.parity.diagnose import diagnose
from apr_jax.parity.faults.rope import THETA
from apr_jax.parity.findings import Explanation, gather
from apr_jax.parity.localise import localise
from apr_jax.parity.replay import Replay
from apr_jax.parity.search import Search
from apr_jax.testing import sample
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import compared_positions, complete, position_axis
from tests import oracle
from tests.battery import faulty_forward
from tests.battery.faulty_forward import Planted, at_rows, forward
from tests.battery.parity_battery import REAL_CASE, Bench, matches

GQA = "gqa_tied_bf16"
CASES = {
    "theta_in_one_layer": [Planted("rope-theta", (1,), {"theta": 5e5})],
    "eps": [Planted("rms-norm-eps", None, {"eps": 1e-4})],
    "eps_next_to_none": [Planted("rms-norm-eps", None, {"eps": 1e-12})],
    "eps_that_only_quiet_norms_show": [Planted("rms-norm-eps", None, {"eps": 1e-8})],
    "scale": [Planted("softmax-scale", None, {"scale": 0.2})],
    "scale_next_to_the_right_one": [Planted("softmax-scale", None, {"scale": 0.2501})],
    "window": [Planted("mask-window", None, {"window": 16})],
    "warp": [Planted("softmax-partial-warp")],
    "heads": [Planted("kv-heads-interleaved")],
    "order": [Planted("layer-order", None, {"order": (1, 0)})],
    "shifted": [Planted("logits-shifted", None, {"shift": 7})],
    "gelu": [Planted("activation-gelu")],
    "relu": [Planted("activation-relu", (1,))],
    "on_up": [Planted("activation-on-up")],
    "late_bias": [Planted("bias-after-rope")],
    "quantised": [Planted("weights-quantised", None, {"tensor": "mlp.down_proj.weight", "codec": "int8"})],
    "tf32": [Planted("tf32-dots", None, {"mode": "round"})],
    "real_case": list(REAL_CASE),
}
FUSED = ("attn_norm", "attention", "attn_out", "post_attn_residual", "ffn_norm", "ffn_out", "post_ffn_residual")
"""What an engine with fused attention and fused GLU has at hand."""
SPARSE = ("q_post_rope", "k_post_rope", "attention", "attn_out", "post_attn_residual", "ffn_out", "post_ffn_residual")
"""The same with rotation apart and norms fused into the products behind them."""
UNSEEN = {
    "theta": (FUSED.__contains__, Planted("rope-theta", None, {"theta": 5e5}), "attention"),
    "bias": (FUSED.__contains__, Planted("k-bias-missing"), "attention"),
    "window": (FUSED.__contains__, Planted("mask-window", (1,), {"window": 16}), "attention"),
    "activation": (FUSED.__contains__, Planted("activation-gelu-tanh"), "ffn_out"),
    "scale": (SPARSE.__contains__, Planted("softmax-scale", None, {"scale": 1.0}), "attention"),
    "q_bias": (SPARSE.__contains__, Planted("q-bias-missing"), "q_post_rope"),
    "eps": (SPARSE.__contains__, Planted("rms-norm-eps", (0,), {"eps": 1e-4}), "q_post_rope"),
}


class ExplainTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of(GQA)

    @parameterized.parameters(list(CASES))
    def test_every_planted_mistake_is_named_and_nothing_else(self, case):
        findings = self.bench.diagnose(self.bench.dump(CASES[case])).findings
        for planted in CASES[case]:
            self.assertTrue(any(matches(self.bench, planted, f) for f in findings), [f.sentence for f in findings])
        self.assertLen(findings, len(CASES[case]), [f.sentence for f in findings])
        for finding in findings:
            self.assertEqual(finding.certainty, "certain", finding)

    @parameterized.parameters(
        Planted("softmax-scale", None, {"scale": 128**-0.5}),
        Planted("rope-theta", None, {"theta": 1.5e6}),
        Planted("rms-norm-eps", None, {"eps": 2e-5}),
    )
    def test_the_number_that_is_named_is_the_engines_own_in_every_digit(self, planted):
        fused = {key: value for key, value in self.bench.dump([planted]).items() if key.split(".")[-1] in FUSED}
        for dump in (self.bench.dump([planted]), fused):
            (finding,) = self.bench.diagnose(dump).findings
            self.assertEqual(dict(finding.parameters) | dict(planted.parameters), finding.parameters)

    def test_solved_numbers_are_one_if_they_agree_to_a_hundredth_on_whichever_side_of_an_edge(self):
        dump = self.bench.dump([Planted("rope-theta", None, {"theta": 5e5})])
        sites = [site for site in self.bench.diagnose(dump).localisation.sites if site.wrong]
        for numbers, count in (((10499.0, 10501.0), 1), ((10000.0, 10099.0), 1), ((10000.0, 10102.0), 2)):
            sightings = [
                Explanation(site, (THETA.made(theta=theta),), 1e-7) for site, theta in zip(sites, numbers, strict=False)
            ]
            findings = gather(sightings, 2)
            self.assertEqual([f.parameters["theta"] for f in findings], list(numbers[:count]))

    def test_a_clean_dump_has_no_finding(self):
        self.assertEqual(self.bench.diagnose(self.bench.dump(())).findings, ())

    def noisy(self, dump, key, budgets):
        """The dump with noise of so many of the stage's budgets in it."""
        located = localise(self.bench.exact, self.bench.same, self.bench.inputs, complete(dump, self.bench.inputs))
        (site,) = [site for site in located.sites if site.key == key]
        counted = compared_positions(key, self.bench.inputs, dump[key].shape)
        noise = np.random.default_rng(0).standard_normal(dump[key].shape)
        noise = np.where(counted if counted.ndim == noise.ndim else counted[..., None], noise, 0)
        scaled = noise * (budgets * site.budget / np.linalg.norm(noise))
        return dict(dump) | {key: (dump[key] + scaled).astype(np.float32)}

    @parameterized.parameters((0.8, "logits-shifted"), (2.5, "unknown"), (5.0, "unknown"))
    def test_a_mistake_is_named_only_where_it_leaves_little_more_than_a_right_stage_may_be_off(self, budgets, fault):
        shifted = self.bench.dump([Planted("logits-shifted", None, {"shift": 7})])
        findings = self.bench.diagnose(self.noisy(shifted, "logits", budgets)).findings
        self.assertEqual([finding.fault for finding in findings], [fault])

    @parameterized.parameters("logits", "stage.0.attn_scores", "stage.0.ffn_out")
    def test_what_leaves_as_much_as_was_there_explains_nothing_however_near_the_budget(self, key):
        # A head quantised by some codec, or a mask of another kind, is no farther off than the right values are.
        findings = self.bench.diagnose(self.noisy(self.bench.dump(()), key, 1.25)).findings
        self.assertEqual({finding.fault for finding in findings}, {"unknown"}, [f.sentence for f in findings])
        self.assertEqual(findings[0].stage, key.split(".")[-1])

    @parameterized.parameters((None,), (range(20, 40),))
    def test_the_scene_computes_every_stage_as_the_model_does_in_float64(self, rows):
        trace = self.bench.exact.trace(self.bench.inputs)
        columns = np.arange(80) if rows is None else np.array(rows)
        replay = Replay(self.bench.exact.config, self.bench.exact.parameters, self.bench.inputs, trace, rows=columns)
        for key, value in trace.items():
            axis, counted = position_axis(key), compared_positions(key, self.bench.inputs, value.shape)
            right, counted = (np.take(x, columns, axis) for x in (value, counted))
            difference = (replay.compute(key) - right)[counted]
            self.assertLess(np.linalg.norm(difference), 1e-13 * np.linalg.norm(right[counted]), key)

    def test_a_layout_is_said_and_undone_before_a_mistake_is_looked_for(self):
        dump = self.bench.dump([Planted("layout", None, {"kind": "heads-major"}), Planted("rope-sign")])
        self.assertEqual({f.fault for f in self.bench.diagnose(dump).findings}, {"layout", "rope-sign"})

    def test_not_a_number_is_a_finding_of_its_own(self):
        dump = self.bench.dump(())
        dump["stage.1.ffn_up"][1, 5, 3] = np.nan
        (finding,) = self.bench.diagnose(dump).findings
        self.assertEqual((finding.fault, finding.layers), ("non-finite", (1,)))
        self.assertIn("[1, 5, 3]", finding.sentence)

    def test_what_nothing_explains_is_unknown_and_says_where(self):
        dump = self.bench.dump(())
        dump["stage.0.ffn_out"][1, 40] *= 1 + 0.01 * np.random.default_rng(0).standard_normal(64)
        findings = self.bench.diagnose(dump).findings
        self.assertEqual({f.fault for f in findings}, {"unknown"})
        self.assertIn("row 1 position 40", findings[0].sentence)

    def test_a_constant_stage_is_a_finding_of_its_own(self):
        dump = self.bench.dump(())
        dump["stage.1.ffn_silu"][:] = 0.25
        finding = next(f for f in self.bench.diagnose(dump).findings if f.stage == "ffn_silu")
        self.assertEqual((finding.fault, finding.layers, finding.parameters), ("constant", (1,), {"value": 0.25}))
        self.assertEqual(finding.certainty, "unexplained")

    def test_right_values_at_other_positions_are_a_finding_of_its_own(self):
        dump = self.bench.dump(())
        dump["stage.0.attn_out"][1, [30, 31]] = dump["stage.0.attn_out"][1, [31, 30]]
        (finding,) = [f for f in self.bench.diagnose(dump).findings if f.stage == "attn_out"]
        self.assertEqual(
            (finding.fault, finding.layers, finding.parameters), ("positions-permuted", (0,), {"moved": 2})
        )
        self.assertIn("row 1 position 30 holds 31", finding.sentence)

    def test_positions_of_equal_tokens_are_not_taken_for_moved_ones(self):
        ids = np.tile(np.arange(8), 10)[None]
        inputs = Inputs.of(ids)
        dump = forward(self.bench.weights, self.bench.config, ids)
        wrong = dump["stage.0.qkv_matmul"]
        wrong[0, [33, 34]] = wrong[0, [34, 33]]
        findings = diagnose(self.bench.exact, self.bench.same, inputs, dump).findings
        (finding,) = [f for f in findings if f.stage == "qkv_matmul"]
        self.assertEqual((finding.fault, finding.parameters), ("positions-permuted", {"moved": 2}))

    def test_mistakes_that_cannot_be_told_apart_behind_a_gap_are_named_as_alternatives(self):
        fused = {k: v for k, v in self.bench.dump([Planted("gate-up-swapped")]).items() if k.split(".")[-1] in FUSED}
        (finding,) = self.bench.diagnose(fused).findings
        self.assertEqual((finding.fault, finding.layers, finding.stage), ("gate-up-swapped", "all", "ffn_out"))
        self.assertEqual((finding.alternatives, finding.certainty), (("activation-on-up",), "ambiguous"))

    def test_what_explained_one_layer_is_tried_in_the_others_before_a_search(self):
        dump = self.bench.dump([Planted("rope-theta", None, {"theta": 5e5})])
        with mock.patch.object(Search, "run", autospec=True, side_effect=Search.run) as searched:
            (finding,) = self.bench.diagnose(dump).findings
        self.assertEqual((finding.fault, finding.layers), ("rope-theta", "all"))
        self.assertEqual(
            [call.args[0].site.key for call in searched.call_args_list], ["stage.0.q_post_rope", "stage.0.k_post_rope"]
        )

    def test_a_mistake_before_a_gap_is_named_in_its_own_layer(self):
        dump = self.bench.dump([Planted("mlp-residual-missing", (0,))])
        (finding,) = self.bench.diagnose({k: v for k, v in dump.items() if "post_ffn_residual" not in k}).findings
        self.assertEqual((finding.fault, finding.layers, finding.stage), ("mlp-residual-missing", (0,), "attn_norm"))

    @parameterized.parameters(list(UNSEEN))
    def test_a_mistake_inside_a_fused_kernel_is_named_where_its_result_shows(self, case):
        shown, planted, stage = UNSEEN[case]
        dump = {k: v for k, v in self.bench.dump([planted]).items() if shown(k.split(".")[-1])}
        (finding,) = self.bench.diagnose(dump).findings
        self.assertTrue(matches(self.bench, planted, finding), finding.sentence)
        self.assertEqual((finding.stage, finding.certainty), (stage, "certain"))

    def test_what_two_unseen_mistakes_make_together_is_named(self):
        planted = [Planted("softmax-scale", None, {"scale": 0.2}), Planted("mask-window", None, {"window": 16})]
        dump = {k: v for k, v in self.bench.dump(planted).items() if "attn_s" not in k}
        findings = self.bench.diagnose(dump).findings
        self.assertEqual({f.fault for f in findings}, {"softmax-scale", "mask-window"})

    def test_what_nothing_explains_behind_a_gap_says_what_was_not_dumped(self):
        dump = {k: v for k, v in self.bench.dump(()).items() if "attn_s" not in k}
        dump["stage.0.attention"][1, 40] *= 1 + 0.01 * np.random.default_rng(0).standard_normal(64)
        # Two thousand sets would be tried before it is given up.
        with mock.patch.object(search, "_MOST_STACKS", 50):
            (finding,) = [f for f in self.bench.diagnose(dump).findings if f.stage == "attention"]
        self.assertEqual((finding.fault, finding.certainty), ("unknown", "unexplained"))
        self.assertIn("not dumped before it: attn_scores, attn_softmax", finding.sentence)

    @parameterized.parameters("even", "away")
    def test_tf32_is_named_where_tensor_cores_cut_off_its_sums_over_896_columns(self, ties):
        base = sample.SAMPLES["qwen2_0.5b"]
        config = dataclasses.replace(base.config, num_layers=1, vocab_size=300, intermediate_size=128)
        narrow = dataclasses.replace(base, config=config, tokenizer="small")
        with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(sample.SAMPLES, {"narrow": narrow}):
            folder = pathlib.Path(scratch, "hf")
            sample.write_sample("narrow", folder)
            exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
            bench = Bench("narrow", *oracle.load(folder), seeded(300, 1, 64), exact, same)
        dump = bench.dump([Planted("tf32-dots", None, {"mode": "round", "ties": ties, "sums": "truncated"})])
        (finding,) = bench.diagnose(dump).findings
        self.assertEqual(
            (finding.fault, finding.parameters, finding.alternatives), ("tf32-dots", {"mode": "round"}, ())
        )
        # More than rounded sums leave: it was cut off indeed.
        self.assertGreater(finding.residual_after, 1e-6)

    def test_stages_that_were_not_dumped_are_composed_over(self):
        dump = {k: v for k, v in self.bench.dump(REAL_CASE).items() if "attn_s" not in k and "ffn_silu" not in k}
        findings = diagnose(self.bench.exact, self.bench.same, self.bench.inputs, dump).findings
        self.assertEqual({f.fault for f in findings}, {planted.name for planted in REAL_CASE})


@pytest.mark.slow
class DecodingStepsTest(absltest.TestCase):
    """Eight rows of a long run; what was cached before them was not dumped."""

    def setUp(self):
        super().setUp()
        self.bench = Bench.of(GQA)

    def diagnose(self, length, faults=()):
        ids, steps = seeded(288, 1, length), np.arange(length - 8, length)
        dump = forward(self.bench.weights, self.bench.config, ids.input_ids, faults=faults)
        return diagnose(self.bench.exact, self.bench.same, ids, at_rows(dump, steps), steps[None])

    def test_what_the_error_of_a_solved_number_explains_behind_it_is_no_finding(self):
        measured = rope_fit.candidates

        def less_precisely(*args):
            return [dataclasses.replace(turn, theta=turn.theta and turn.theta * (1 + 3e-6)) for turn in measured(*args)]

        for length in (80, 120):
            with mock.patch.object(rope_fit, "candidates", less_precisely):
                findings = self.diagnose(length, [Planted("rope-theta", None, {"theta": 82684.6})]).findings
            self.assertEqual([finding.fault for finding in findings], ["rope-theta"], [f.sentence for f in findings])
            self.assertBetween(findings[0].residual_after, 5e-7, 1e-5)

    def test_an_engine_whose_pow_differs_in_the_last_bit_is_right_over_a_cache_that_was_not_dumped_too(self):
        ours = faulty_forward.rope
        for seed in range(2):
            up = np.random.default_rng(seed).random(8) < 0.5

            def theirs(*args, up=up):
                frequencies, factor = ours(*args)
                moved = np.nextafter(frequencies, np.where(up, 2, 0).astype(frequencies.dtype))
                return np.where(np.arange(len(moved)) == 0, frequencies, moved), factor

            with mock.patch.object(faulty_forward, "rope", theirs):
                diagnosis = self.diagnose(400)
            self.assertEqual(diagnosis.findings, ())
            self.assertLess(max(site.share for site in diagnosis.localisation.sites), 0.7)


if __name__ == "__main__":
    absltest.main()
