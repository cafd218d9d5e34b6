"""The CPU's table of operations against HuggingFace's recorded values, the plain table and planted mistakes."""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.kernels.cpu_ops import CPU_OPS, attention, linear
from apr_jax.load.load_model import load_model
from apr_jax.model import qwen2
from apr_jax.trace import golden, stages, tolerances
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs, seeded
from tests import faults, paths

# Three blocks of queries, the last one short, and more rows than the weight goes on the left for.
LONG = 150


def tokens(inputs: Inputs, values: np.ndarray) -> np.ndarray:
    return np.asarray(values)[inputs.attention_mask == 1]


def padded(vocab_size: int) -> Inputs:
    """Padded on the left over more than a block, padded on the right, full."""
    mask = np.ones((3, LONG), np.int32)
    mask[0, :70], mask[1, 100:] = 0, 0
    return Inputs.of(seeded(vocab_size, 3, LONG).input_ids, mask)


def golden_error(name, ops, dtype="float32", fused=False):
    reference = golden.read(paths.golden(name))
    model = load_model(paths.checkpoint(name), dtype, "cpu", ops, fused)
    logits = model.logits(reference.inputs)
    return relative_l2(tokens(reference.inputs, logits), tokens(reference.inputs, reference.values[stages.LOGITS]))


@pytest.mark.slow
class CpuOpsTest(parameterized.TestCase):
    @parameterized.parameters(paths.NAMES)
    def test_float32_logits_are_within_the_bar_of_huggingfaces(self, name):
        self.assertLessEqual(golden_error(name, CPU_OPS), tolerances.FLOAT32)

    def test_fused_parameters_are_within_the_bar_of_huggingfaces(self):
        self.assertLessEqual(golden_error("gqa_untied_bf16", CPU_OPS, fused=True), tolerances.FLOAT32)

    @parameterized.parameters("odd_sizes", "head_dim_given")
    def test_float64_equals_the_plain_table_for_short_and_for_long_padded_prompts(self, name):
        model = load_model(paths.checkpoint(name), "float64", "cpu")
        for inputs in (seeded(model.config.vocab_size, 2, 9), padded(model.config.vocab_size)):
            plain, ours = model.logits(inputs), model.with_ops(CPU_OPS).logits(inputs)
            self.assertLessEqual(relative_l2(tokens(inputs, ours), tokens(inputs, plain)), 1e-12)

    def test_bfloat16_is_as_near_to_float64_as_the_plain_table(self):
        exact = load_model(paths.checkpoint("head_dim_given"), "float64", "cpu")
        model = load_model(paths.checkpoint("head_dim_given"), "bfloat16", "cpu")
        inputs = padded(model.config.vocab_size)
        reference = tokens(inputs, exact.logits(inputs))
        plain, ours = (
            relative_l2(tokens(inputs, each.logits(inputs)), reference) for each in (model, model.with_ops(CPU_OPS))
        )
        self.assertLessEqual(ours, 1.1 * plain)

    def test_cached_steps_equal_the_full_forward(self):
        model = load_model(paths.checkpoint("mqa_f16"), "float32", "cpu", CPU_OPS)
        inputs = seeded(model.config.vocab_size, 2, LONG)
        cache, parts = model.empty_cache(2, LONG), []
        for start, end in [(0, 130), (130, 147), *((at, at + 1) for at in range(147, LONG))]:
            part = Inputs.of(inputs.input_ids[:, start:end], None, inputs.position_ids[:, start:end])
            logits, cache = model.step(part, cache)
            parts.append(np.asarray(logits))
        self.assertLessEqual(relative_l2(np.concatenate(parts, 1), np.asarray(model.logits(inputs))), 1e-5)

    @parameterized.parameters(*faults.OPERATIONS.items())
    def test_a_fault_planted_in_the_table_leaves_the_bar(self, operation, fault):
        faulty = dataclasses.replace(CPU_OPS, **{operation: fault})
        self.assertGreater(golden_error("gqa_tied_bf16", faulty), tolerances.FLOAT32)

    def test_a_trace_records_whole_attention_scores(self):
        model = load_model(paths.checkpoint("gqa_tied_bf16"), "float32", "cpu", CPU_OPS)
        inputs = padded(model.config.vocab_size)
        key = stages.Key.of(0, "attn_scores")
        heads = model.config.num_heads
        self.assertEqual(model.trace(inputs, {key})[key].shape, (3, heads, LONG, LONG))


@pytest.mark.slow
class WhatXlaIsAskedForTest(absltest.TestCase):
    """The speed comes from the form of the program, which values do not show."""

    def operands(self, rows: int) -> str:
        x, weight = jnp.zeros((1, rows, 96)), jnp.zeros((160, 96))
        compiled = jax.jit(lambda x, weight: linear(CPU_OPS, x, weight)).lower(x, weight).compile().as_text()
        return next(line for line in compiled.splitlines() if " dot(" in line)

    def test_few_rows_are_multiplied_with_the_weight_on_the_left_and_many_on_the_right(self):
        self.assertIn("f32[160,4]", self.operands(4))
        self.assertIn("f32[512,160]", self.operands(512))

    def test_a_long_prompt_computes_no_scores_of_keys_behind_a_block(self):
        q, k = jnp.zeros((1, 512, 4, 8)), jnp.zeros((1, 512, 2, 8))
        positions = jnp.arange(512)[None]
        text = str(jax.make_jaxpr(lambda q, k: attention(CPU_OPS, q, k, k, positions, positions, qwen2.pass_on))(q, k))
        self.assertIn("f32[1,4,128,256]", text)
        self.assertNotIn("512,512]", text)


if __name__ == "__main__":
    absltest.main()
