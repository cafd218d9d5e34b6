"""RoPE rules and sliding windows: frequencies against torch's bits and the papers' formulas, the model against the
float64 oracle, with and without a cache."""

import dataclasses
import functools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax import load_model
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.generate.generator import Generator
from apr_jax.kernels.cpu_ops import CPU_OPS
from apr_jax.model import qwen2, rotary
from apr_jax.trace import stages
from apr_jax.trace.compare import compare, relative_l2
from apr_jax.trace.inputs import Inputs
from tests import oracle, paths
from tests.published_configurations import CONFIGURATIONS, scaled

BY_NAME = {published.name: published for published in CONFIGURATIONS}
RULED = [p for p in CONFIGURATIONS if p.refused is None and Qwen2Config.from_hf(p.config).rope_scaling]
RECORDED = json.loads((paths.DATA / "torch_inverse_frequencies.json").read_text())["rules"]


@functools.cache
def written(name: str) -> pathlib.Path:
    """Writes the committed checkpoint whose sizes `scaled` has, with the rule and the windows of a configuration."""
    import tempfile

    base = json.loads((paths.checkpoint("gqa_tied_bf16") / "config.json").read_text())
    rules = {
        key: value
        for key, value in scaled(BY_NAME[name].config).items()
        if key.startswith("rope_") or key in ("max_position_embeddings", "use_sliding_window", "sliding_window")
    }
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(base | {"max_window_layers": 1} | rules))
    weights = (paths.checkpoint("gqa_tied_bf16") / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@functools.cache
def model_of(name: str, dtype: str = "float32"):
    return load_model(written(name), dtype, "cpu")


def batch(vocab_size: int = 280) -> Inputs:
    """Two rows of 97 and 70 tokens, the shorter one padded on the left."""
    mask = np.ones((2, 97), int)
    mask[1, :27] = 0
    return Inputs.of(np.random.default_rng(5).integers(0, vocab_size, mask.shape), mask)


class FrequenciesTest(parameterized.TestCase):
    @parameterized.named_parameters((case["config"]["rope_scaling"]["rope_type"], case) for case in RECORDED)
    def test_a_rules_frequencies_are_bit_equal_to_transformers(self, case):
        config = Qwen2Config.from_hf(case["config"] | {"model_type": "qwen2"})
        for length, bits in case["bits"].items():
            found, factor = rotary.frequencies(config, int(length))
            self.assertEqual(found.view(np.uint32).tolist(), bits, length)
            self.assertEqual(factor, case["attention_factor"])

    def test_they_are_those_of_the_papers(self):
        for published in RULED:
            config = Qwen2Config.from_hf(published.config)
            for length in (1, 40_000, 140_000):
                found, factor = rotary.frequencies(config, length)
                expected, expected_factor = oracle.rope(published.config, config.head_dim, length)
                np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=published.name)
                self.assertAlmostEqual(factor, expected_factor, delta=1e-12)
        self.assertGreater(len(RULED), 9)

    @parameterized.parameters("LLaMA-Factory, dynamic", "LongRoPE")
    def test_a_token_that_is_made_is_turned_by_what_the_longest_row_has_become(self, name):
        config = Qwen2Config.from_hf(scaled(BY_NAME[name].config))
        cos, sin = rotary.step_tables(config, 200, np.array([0, 20]))
        for row, lag in enumerate((0, 20)):
            for position in (3, 63 - lag, 64 - lag, 150):
                expected = rotary.tables(config, 200, position + 1 + lag)
                np.testing.assert_array_equal(cos[row, position], expected[0][position])
                np.testing.assert_array_equal(sin[row, position], expected[1][position])
        self.assertGreater(np.abs(cos[0, 150] - rotary.tables(config, 200, 1)[0][150]).max(), 0.1)
        for length in (1, 64, 65, 199):
            relevant = rotary.relevant_length(config, length)
            np.testing.assert_array_equal(
                rotary.frequencies(config, length)[0], rotary.frequencies(config, relevant)[0]
            )


class ForwardTest(parameterized.TestCase):
    @parameterized.parameters("windows and YaRN", "LLaMA-Factory, dynamic", "LongRoPE", "LLaMA-Factory, llama3")
    def test_logits_are_the_oracles(self, name):
        inputs, model = batch(), model_of(name)
        weights, config = oracle.load(written(name))
        expected, _ = oracle.forward(weights, config, inputs.input_ids, inputs.attention_mask)
        tokens = inputs.attention_mask == 1
        self.assertLess(relative_l2(np.asarray(model.logits(inputs))[tokens], expected[tokens]), 1e-5)
        plain = {key: value for key, value in config.items() if key not in ("rope_scaling", "use_sliding_window")}
        other, _ = oracle.forward(weights, plain, inputs.input_ids, inputs.attention_mask)
        self.assertGreater(relative_l2(other[tokens], expected[tokens]), 1e-3, "the rule shows at this length")

    def test_every_stage_of_a_layer_with_a_window_is_the_oracles_and_can_be_forced(self):
        inputs, model = batch(), model_of("windows and YaRN", "float64")
        logits, expected = oracle.forward(
            *oracle.load(written("windows and YaRN")), inputs.input_ids, inputs.attention_mask
        )
        reference = {f"stage.{key}": value for key, value in expected.items()} | {stages.LOGITS: logits}
        trace = model.trace(inputs)
        results = compare(trace, reference, inputs, lambda key: 1e-6, config=model.config)
        self.assertLen(results, len(reference))
        self.assertEmpty([result for result in results if not result.within])
        self.assertEqual(model.config.window_layers, (1,))
        behind = np.arange(97)[:, None] - np.arange(97) >= model.config.sliding_window
        self.assertTrue((trace["stage.1.attn_scores"][0][:, behind] == 0).all())
        self.assertGreater(np.abs(trace["stage.0.attn_scores"][0][:, np.tril(behind)]).min(), 0)
        forced = model.trace(inputs, force={key: trace[key] for key in trace if key != stages.LOGITS})
        for key, value in trace.items():
            np.testing.assert_array_equal(forced[key], value, key)

    def test_prompts_in_parts_and_single_steps_see_the_window_too(self):
        model = model_of("windows and YaRN")
        inputs = Inputs.of(np.random.default_rng(1).integers(0, 280, (2, 60)))
        cache, parts = model.empty_cache(2, 64), []
        for start, end in [(0, 40), (40, 50), *((at, at + 1) for at in range(50, 60))]:
            part = Inputs.of(inputs.input_ids[:, start:end], None, inputs.position_ids[:, start:end])
            logits, cache = model.step(part, cache)
            parts.append(np.asarray(logits))
        self.assertLessEqual(relative_l2(np.concatenate(parts, 1), np.asarray(model.logits(inputs))), 1e-5)

    def test_the_table_for_cpus_sees_the_window_in_its_blocks(self):
        model, inputs = model_of("windows and YaRN"), batch()
        ours = np.asarray(model.with_ops(CPU_OPS).logits(inputs))
        tokens = inputs.attention_mask == 1
        self.assertLessEqual(relative_l2(ours[tokens], np.asarray(model.logits(inputs))[tokens]), 1e-5)

    def test_generated_tokens_of_unequal_prompts_are_the_most_likely_of_a_whole_pass_under_the_window(self):
        model = model_of("windows and YaRN")
        random = np.random.default_rng(2)
        prompts = [random.integers(0, 280, length).tolist() for length in (50, 30)]
        made = Generator(model.with_ops(CPU_OPS), prefill_chunk=32).generate(
            prompts, max_new_tokens=24, eos_token_id=()
        )
        whole = [[*text.prompt_ids, *text.token_ids] for text in made]
        most_likely = np.asarray(model(whole)).argmax(axis=-1)
        for row, (prompt, text) in enumerate(zip(prompts, made, strict=True)):
            begin = len(prompt) - 1
            self.assertEqual(most_likely[row, begin : begin + 24].tolist(), list(text.token_ids))


class ModuleTest(parameterized.TestCase):
    def test_a_traced_mask_is_as_good_as_a_known_one(self):
        inputs, model = batch(), model_of("LongRoPE")
        # One row, so that only a mask tells how long it is: 70 tokens are long, 60 are short.
        for hidden in (27, 40):
            ids, mask = inputs.input_ids[:1], np.ones((1, 97), int)
            mask[0, :hidden] = 0
            known = np.asarray(model.module(ids, attention_mask=mask))
            traced = jax.jit(lambda mask, ids=ids: model.module(ids, attention_mask=mask))(jnp.asarray(mask))
            self.assertLess(relative_l2(np.asarray(traced)[0, hidden:], known[0, hidden:]), 1e-5)

    def test_a_length_that_is_traced_cannot_pick_a_dynamic_base(self):
        inputs, model = batch(), model_of("LLaMA-Factory, dynamic")
        with self.assertRaisesRegex(ValueError, "dynamic"):
            jax.jit(lambda mask: model.module(inputs.input_ids, attention_mask=mask))(inputs.attention_mask)

    def test_a_table_of_operations_that_knows_no_window_is_an_error_and_not_ignored(self):
        model = model_of("windows and YaRN")
        plain = lambda ops, q, k, v, q_positions, kv_positions, tap: q.reshape(*q.shape[:2], -1)  # noqa: E731
        with self.assertRaises(TypeError):
            model.with_ops(dataclasses.replace(qwen2.OPS, attention=plain)).logits(batch())


if __name__ == "__main__":
    absltest.main()
