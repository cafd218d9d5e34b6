"""The model against its witnesses: HuggingFace's recorded float32 values and the NumPy float64 oracle."""

import dataclasses
import functools
import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from apr_jax.converters.errors import UsageError
from apr_jax.load.load_model import load_model
from apr_jax.model import qwen2
from apr_jax.model.language_model import LanguageModel, model_graph
from apr_jax.model.qwen2 import OPS
from apr_jax.trace import golden, stages, tolerances
from apr_jax.trace.compare import compare, relative_l2
from apr_jax.trace.inputs import Inputs, seeded
from tests import faults, oracle, paths

# Nearly all that these tests take is compilation: where the shape is not the point, it is that of the golden files.
BATCH, LENGTH = 2, 64
CHANGING_PROGRAMS = {"rope-adjacent-pairs", "rope-theta", "rms-norm-eps", "mask-not-causal", "kv-heads-interleaved"}
"""Faults that are no change of weights: each needs programs of its own."""
PLANTED = [
    (name, fault)
    for name in paths.NAMES
    for fault in faults.FAULTS
    # In these two each of them is seen once and, but for the base, invisible once; the others: tests/reference.
    if fault.name not in CHANGING_PROGRAMS or name in ("gqa_tied_bf16", "odd_sizes")
]


def padded(vocab_size: int) -> Inputs:
    """Two rows: padded on the left, padded on the right."""
    mask = np.ones((BATCH, LENGTH), np.int32)
    mask[0, :7], mask[1, 50:] = 0, 0
    return Inputs.of(seeded(vocab_size, BATCH, LENGTH).input_ids, mask)


def tokens(inputs: Inputs, values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[inputs.attention_mask == 1]


def within_golden(model: LanguageModel, name: str) -> bool:
    """Whether logits and hidden states are within the float32 bar of HuggingFace's, top-1 included."""
    reference = golden.read(paths.golden(name))
    sources = stages.hidden_sources(model.config.num_layers)
    trace = model.trace(reference.inputs, {*sources.values(), stages.LOGITS})
    ours = golden.with_hidden_states(trace, model.config.num_layers)
    results = compare(ours, reference.values, reference.inputs, lambda key: tolerances.FLOAT32)
    compared = {result.key for result in results}
    assert compared == {*sources, stages.LOGITS}, compared
    return all(result.within and (result.logits is None or result.logits.top1 == 1.0) for result in results)


class AgainstHuggingFaceTest(parameterized.TestCase):
    @parameterized.parameters(paths.NAMES)
    def test_float32_logits_and_hidden_states_are_within_the_bar_with_equal_top1(self, name):
        self.assertTrue(within_golden(load_model(paths.checkpoint(name)), name))

    @parameterized.parameters(paths.NAMES)
    def test_float32_error_is_at_most_three_times_huggingfaces(self, name):
        reference = golden.read(paths.golden(name))
        inputs = reference.inputs
        exact = tokens(inputs, load_model(paths.checkpoint(name), "float64").logits(inputs))
        ours = relative_l2(tokens(inputs, load_model(paths.checkpoint(name)).logits(inputs)), exact)
        theirs = relative_l2(tokens(inputs, reference.values[stages.LOGITS]), exact)
        print(f"{name}: relative L2 against float64: ours {ours:.2e}, HuggingFace {theirs:.2e}")
        self.assertLessEqual(ours, 3 * theirs)
        self.assertGreater(ours, 0)

    @parameterized.parameters(PLANTED)
    def test_every_planted_fault_leaves_the_bar(self, name, fault):
        model = load_model(paths.checkpoint(name))
        if fault.visible(model.config):
            self.assertFalse(within_golden(fault.plant(model), name), fault.name)
        else:
            self.assertTrue(within_golden(fault.plant(model), name), f"{fault.name} should be invisible here")


class AgainstOracleTest(parameterized.TestCase):
    @parameterized.parameters(paths.NAMES)
    def test_float64_equals_the_oracle_at_every_stage_to_1e_12(self, name):
        model = load_model(paths.checkpoint(name), "float64")
        inputs = padded(model.config.vocab_size)
        logits, expected = oracle.forward(
            *oracle.load(paths.checkpoint(name)), inputs.input_ids, inputs.attention_mask, inputs.position_ids
        )
        reference = {f"stage.{key}": value for key, value in expected.items()} | {stages.LOGITS: logits}
        trace = model.trace(inputs)
        self.assertEqual(set(trace), set(reference))
        for result in compare(trace, reference, inputs, lambda key: 1e-12):
            self.assertTrue(result.within, result)
        whole = relative_l2(tokens(inputs, model.logits(inputs)), tokens(inputs, logits))
        self.assertLessEqual(whole, 1e-12)
        self.assertEqual(trace[stages.LOGITS].dtype, np.float64)

    def test_an_oracle_that_is_wrong_by_one_part_in_a_billion_is_seen(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), "float64")
        inputs = padded(model.config.vocab_size)
        weights, config = oracle.load(paths.checkpoint("gqa_tied_bf16"))
        weights["model.layers.1.mlp.down_proj.weight"] *= 1 + 1e-9
        logits, _ = oracle.forward(weights, config, inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        self.assertGreater(relative_l2(tokens(inputs, model.logits(inputs)), tokens(inputs, logits)), 1e-12)


class CacheTest(parameterized.TestCase):
    @parameterized.parameters(
        ("gqa_tied_bf16", (0, 50, 60)),
        ("head_dim_given", (0, 60)),
        ("mha_untied_f32_sharded", (0, 60)),
        ("odd_sizes", (0, 60)),
    )
    def test_prompt_then_single_steps_equal_the_full_forward(self, name, edges):
        model = load_model(paths.checkpoint(name))
        inputs = seeded(model.config.vocab_size, BATCH, LENGTH)
        cache, parts = model.empty_cache(BATCH, LENGTH), []
        for start, end in itertools.pairwise((*edges, *range(61, LENGTH + 1))):
            part = Inputs.of(inputs.input_ids[:, start:end], None, inputs.position_ids[:, start:end])
            logits, cache = model.step(part, cache)
            parts.append(np.asarray(logits))
        self.assertLessEqual(relative_l2(np.concatenate(parts, 1), np.asarray(model.logits(inputs))), 1e-5)

    @parameterized.parameters(False, True)
    def test_the_last_layer_goes_on_with_the_tokens_that_are_kept_alone(self, first):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        network = nnx.merge(model_graph(model.config, model.dtype, model.fused), model.parameters)
        inputs, cos, sin = seeded(model.config.vocab_size, 3, 10), *model.rotary_tables(16)
        ids, positions = inputs.input_ids, inputs.positions()
        lengths = []

        def glu(ops, x, weights, tap):
            lengths.append(x.shape[1])
            return qwen2.glu(ops, x, weights, tap)

        counting = dataclasses.replace(OPS, glu=glu)
        run = functools.partial(network.hidden, ids, positions, cos, sin, model.empty_cache(3, 16), counting)
        whole, filled = run(first=first)
        kept, same = run(first=first, kept=np.array([9, 0, 4]))
        self.assertEqual(lengths, [10] * (model.config.num_layers * 2 - 1) + [1])
        self.assertLessEqual(relative_l2(np.asarray(kept)[:, 0], np.asarray(whole)[[0, 1, 2], [9, 0, 4]]), 1e-6)
        for one, other in zip(jax.tree.leaves(filled), jax.tree.leaves(same), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_unequal_prompts_continue_each_from_its_own_end(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
        inputs, cache = Inputs.of(prompts), model.empty_cache(2, 8)
        _, cache = model.step(inputs, cache)
        lengths = inputs.attention_mask.sum(axis=1, keepdims=True)
        logits, cache = model.step(Inputs.of([[33], [44]], None, lengths), cache)
        for row, prompt in enumerate(prompts):
            alone = np.asarray(model([[*prompt, (33, 44)[row]]]))[0, -1]
            self.assertLessEqual(relative_l2(np.asarray(logits)[row, 0], alone), 1e-5)
        self.assertEqual(int(cache.length), 8)

    def test_a_step_that_does_not_go_on_from_the_cache_is_refused(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        _, cache = model.step(Inputs.of([[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]), model.empty_cache(2, 8))
        with self.assertRaisesRegex(ValueError, "row 0 goes on at position 0, but its cache has reached 6"):
            model.step(Inputs.of([[8], [8]]), cache)
        with self.assertRaisesRegex(ValueError, "2 rows, not 1"):
            model.step(Inputs.of([[8]], None, [[7]]), cache)

    def test_a_step_at_the_position_reached_last_is_refused_and_at_the_next_one_taken(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        _, cache = model.step(Inputs.of([[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]), model.empty_cache(2, 8))
        with self.assertRaisesRegex(ValueError, "row 1 goes on at position 2, but its cache has reached 2"):
            model.step(Inputs.of([[8], [8]], None, [[7], [2]]), cache)
        _, cache = model.step(Inputs.of([[8], [8]], None, [[7], [3]]), cache)
        self.assertEqual(int(cache.length), 8)

    def test_a_full_cache_is_refused(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        with self.assertRaisesRegex(ValueError, "no room for 5 more"):
            model.step(Inputs.of([[1, 2, 3, 4, 5]]), model.empty_cache(1, 4))


class PaddingTest(parameterized.TestCase):
    @parameterized.parameters("left", "right")
    def test_padded_rows_give_the_logits_of_rows_alone(self, side):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        rows = [list(range(3, 3 + length)) for length in (60, 1)]
        ids, mask = np.full((BATCH, LENGTH), 7), np.zeros((BATCH, LENGTH), int)
        for index, row in enumerate(rows):
            place = slice(LENGTH - len(row), LENGTH) if side == "left" else slice(0, len(row))
            ids[index, place], mask[index, place] = row, 1
        logits = np.asarray(model(ids, mask))
        for index, row in enumerate(rows):
            alone = np.asarray(model([row]))[0]
            self.assertLessEqual(relative_l2(logits[index][mask[index] == 1], alone), 1e-5)
        self.assertTrue(np.isfinite(logits).all(), "padding must not turn into NaN, which would spread through values")


class TraceTest(parameterized.TestCase):
    @parameterized.parameters("float32", "bfloat16")
    def test_forcing_with_ones_own_trace_changes_nothing_at_all(self, dtype):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), dtype)
        inputs = padded(model.config.vocab_size)
        trace = model.trace(inputs)
        forced = model.trace(inputs, force=trace)
        self.assertLen(trace, 2 * len(stages.LAYER_STAGES) + 3)
        for key, value in trace.items():
            np.testing.assert_array_equal(forced[key], value, key)

    @parameterized.named_parameters(
        ("rope", faults.ADJACENT_PAIRS, {"q_post_rope", "k_post_rope"}),
        ("mask", faults.NOT_CAUSAL, {"attn_softmax"}),
        ("kv_heads", faults.INTERLEAVED, {"attn_scores", "attention"}),
    )
    def test_a_fault_in_one_layer_shows_at_its_stages_only_when_forced(self, ops, wrong):
        right = load_model(paths.checkpoint("gqa_tied_bf16"))
        inputs = padded(right.config.vocab_size)
        theirs = right.with_ops(right.ops, {1: ops}).trace(inputs)
        ours = right.trace(inputs, force=theirs)
        differing = {r.key for r in compare(ours, theirs, inputs, lambda key: 1e-6) if not r.within}
        self.assertEqual(differing, {stages.Key.of(1, stage) for stage in wrong})
        unforced = {r.key for r in compare(right.trace(inputs), theirs, inputs, lambda key: 1e-6) if not r.within}
        self.assertIn(stages.LOGITS, unforced)

    def test_a_stage_missing_from_the_forced_values_is_composed_over(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        inputs = padded(model.config.vocab_size)
        trace = model.trace(inputs)
        partial = {key: trace[key] for key in trace if stages.Key(key).stage in ("attn_norm", "ffn_up")}
        for key, value in model.trace(inputs, force=partial).items():
            np.testing.assert_array_equal(value, trace[key], key)

    def test_a_trace_gives_the_logits_of_the_plain_forward(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        inputs = seeded(model.config.vocab_size, BATCH, LENGTH)
        self.assertLessEqual(relative_l2(model.trace(inputs)[stages.LOGITS], np.asarray(model.logits(inputs))), 1e-6)

    def test_shapes_are_those_of_the_stage_table(self):
        model = load_model(paths.checkpoint("head_dim_given"), "float64")
        inputs = padded(model.config.vocab_size)
        for key, value in model.trace(inputs).items():
            self.assertEqual(value.shape, (BATCH, *stages.shape(model.config, stages.Key(key).stage, LENGTH)), key)

    def test_only_what_is_asked_for_is_returned_and_unknown_stages_are_errors(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        inputs = padded(model.config.vocab_size)
        self.assertEqual(list(model.trace(inputs, ["stage.1.ffn_up"])), ["stage.1.ffn_up"])
        with self.assertRaisesRegex(ValueError, r"stage\.9\.ffn_up"):
            model.trace(inputs, force={"stage.9.ffn_up": np.zeros(1)})
        with self.assertRaisesRegex(ValueError, r"hidden\.0"):
            model.trace(inputs, ["hidden.0"])
        with self.assertRaisesRegex(ValueError, "expected \\(2, 64, 160\\)"):
            model.trace(inputs, force={"stage.0.ffn_up": np.zeros((BATCH, 160, LENGTH))})

    def test_a_token_beyond_the_vocabulary_is_refused_wherever_it_is_asked_for(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        beyond = Inputs.of([[5, model.config.vocab_size]])
        for ask in (model.logits, model.trace, lambda inputs: model.step(inputs, model.empty_cache(1, 4))):
            with self.assertRaisesRegex(UsageError, "vocabulary"):
                ask(beyond)

    def test_scores_that_the_mask_hides_are_zero(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        scores = model.trace(padded(model.config.vocab_size), ["stage.0.attn_scores"])["stage.0.attn_scores"]
        self.assertFalse(np.triu(scores, 1).any())
        self.assertFalse(scores[0, :, :, :7].any(), "padded keys")
        self.assertTrue(scores[1][:, *np.tril_indices(50)].all())

    def test_tables_of_single_layers_count_in_every_kind_of_run(self):
        right = load_model(paths.checkpoint("gqa_tied_bf16"))
        wrong = right.with_ops(right.ops, {1: faults.ADJACENT_PAIRS})
        inputs = seeded(right.config.vocab_size)
        expected = wrong.trace(inputs)[stages.LOGITS]
        self.assertGreater(relative_l2(expected, right.trace(inputs)[stages.LOGITS]), 1e-3)
        np.testing.assert_allclose(np.asarray(wrong.logits(inputs)), expected, rtol=1e-4, atol=1e-4)
        stepped, _ = wrong.step(inputs, wrong.empty_cache(2, 64))
        np.testing.assert_allclose(np.asarray(stepped), expected, rtol=1e-4, atol=1e-4)


class FusedTest(parameterized.TestCase):
    @parameterized.parameters("gqa_tied_bf16", "mha_untied_f32_sharded", "mqa_f16", "odd_sizes")
    def test_fused_parameters_are_the_rows_of_the_separate_ones(self, name):
        separate, fused = (load_model(paths.checkpoint(name), fused=fused).parameters for fused in (False, True))
        one, other = separate["model"]["layers"][1], fused["model"]["layers"][1]
        for leaf in ("weight", "bias"):
            rows = np.concatenate([one["self_attn"][part][leaf] for part in ("q_proj", "k_proj", "v_proj")])
            np.testing.assert_array_equal(other["self_attn"]["qkv_proj"][leaf], rows)
        rows = np.concatenate([one["mlp"][part]["weight"] for part in ("gate_proj", "up_proj")])
        np.testing.assert_array_equal(other["mlp"]["gate_up_proj"]["weight"], rows)
        self.assertEqual(*(sum(x.size for x in jax.tree.leaves(tree)) for tree in (separate, fused)))
        self.assertLen(jax.tree.leaves(separate), len(jax.tree.leaves(fused)) + 5 * len(separate["model"]["layers"]))

    @parameterized.parameters(
        ("mha_untied_f32_sharded", "float32"), ("gqa_tied_bf16", "bfloat16"), ("gqa_tied_bf16", "float64")
    )
    def test_a_fused_model_computes_the_same_stages(self, name, dtype):
        separate, fused = (load_model(paths.checkpoint(name), dtype, fused=fused) for fused in (False, True))
        inputs = padded(separate.config.vocab_size)
        theirs = fused.trace(inputs)
        bound = {"float32": 1e-6, "bfloat16": 2e-3, "float64": 1e-14}[dtype]
        for key, ours in separate.trace(inputs, force=theirs).items():
            # Which sums a product of other width is cut into is the backend's choice, a rounding here and there.
            self.assertLessEqual(relative_l2(*(x.astype(np.float64) for x in (theirs[key], ours))), bound, key)

    @parameterized.parameters("float32", "bfloat16")
    def test_a_fused_model_steps_as_it_forwards(self, dtype):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), dtype, fused=True)
        inputs = seeded(model.config.vocab_size, BATCH, LENGTH)
        whole = model.logits(inputs)
        parts, cache = [], model.empty_cache(BATCH, LENGTH)
        for start, end in ((0, 62), (62, 63), (63, 64)):
            part = Inputs.of(inputs.input_ids[:, start:end], position_ids=inputs.positions()[:, start:end])
            logits, cache = model.step(part, cache)
            parts.append(np.asarray(logits, np.float64))
        bound = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
        self.assertLessEqual(relative_l2(np.concatenate(parts, axis=1), np.asarray(whole, np.float64)), bound)


class ModelTest(parameterized.TestCase):
    def test_a_bias_is_added_before_bfloat16_rounds(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), "bfloat16")
        keys = ("stage.0.qkv_matmul", "stage.0.qkv_bias")
        trace = model.trace(seeded(model.config.vocab_size, BATCH, LENGTH))
        product, biased = (trace[key] for key in keys)
        attention = model.parameters["model"]["layers"][0]["self_attn"]
        bias = np.concatenate([attention[part]["bias"] for part in ("q_proj", "k_proj", "v_proj")]).astype(np.float32)
        self.assertEqual(product.dtype, np.float32)
        np.testing.assert_array_equal(biased, (product + bias).astype(biased.dtype))
        self.assertTrue((biased != product.astype(biased.dtype) + bias.astype(biased.dtype)).any())

    @parameterized.parameters("float32", "bfloat16", "float64")
    def test_parameters_and_logits_have_the_dtype_asked_for(self, dtype):
        model = load_model(paths.checkpoint("mixed_dtypes"), dtype)
        self.assertEqual({str(x.dtype) for x in jax.tree.leaves(model.parameters)}, {dtype})
        self.assertEqual(str(model.logits(seeded(model.config.vocab_size, BATCH, LENGTH)).dtype), dtype)

    def test_float64_leaves_no_trace_in_the_process(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), "float64")
        model.logits(seeded(model.config.vocab_size, BATCH, LENGTH))
        self.assertEqual(str(jax.numpy.asarray(1.5).dtype), "float32")

    def test_calls_of_one_shape_compile_once(self):
        model = load_model(paths.checkpoint("odd_sizes"))
        model.logits(seeded(model.config.vocab_size, BATCH, LENGTH))
        with jax.log_compiles(), self.assertNoLogs("jax", "WARNING"):
            model.logits(seeded(model.config.vocab_size, BATCH, LENGTH, seed=1))
            again = load_model(paths.checkpoint("odd_sizes"))
            again.logits(seeded(model.config.vocab_size, BATCH, LENGTH, seed=2))

    def test_bad_requests_are_usage_errors(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"))
        for ids in ([[model.config.vocab_size]], [[-1]], [], [[]], [[1.5]]):
            with self.assertRaises(UsageError, msg=str(ids)):
                model(ids)
        with self.assertRaises(UsageError):
            load_model(paths.checkpoint("gqa_tied_bf16"), "int8")
        with self.assertRaises(UsageError):
            load_model(paths.checkpoint("gqa_tied_bf16"), device="no-such-device")
        with self.assertRaises(UsageError):
            model([[1, 2]], None, [[1, 0]])


if __name__ == "__main__":
    absltest.main()
