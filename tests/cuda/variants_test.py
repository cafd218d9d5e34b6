"""On an NVIDIA GPU of compute capability 9.0: the CUDA kernels against float64, and mistakes planted in them.

The bar is that of any bfloat16 pass: twice the error that the plain operations have in bfloat16 on the same device.
"""

import functools
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.cuda import decode_layers, kernels
from apr_jax.cuda.custom_call import SPLIT_HALVES
from apr_jax.generate.programs import Programs
from apr_jax.kernels import fastest_ops
from apr_jax.load.load_model import load_model
from apr_jax.model.qwen2 import OPS, rms_norm, silu
from apr_jax.trace import stages, tolerances
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs, seeded
from tests import paths

# Of the committed checkpoints, those with a head size of 8, 16 or 32.
NAMES = ("gqa_tied_bf16", "head_dim_given", "mixed_dtypes", "mqa_f16")
ADJACENT_PAIRS = "x[d] * cos[d / 2] + (d % 2 ? x[d - 1] : -x[d + 1]) * sin[d / 2]"
# Mistakes in the kernel that takes tokens of several rows through all layers: what is replaced in its text, by what.
MISTAKES = {
    "no_bias": ("* scale_of(b, token) + bias", "* scale_of(b, token)"),
    "eps": ("squares / D + EPS", "squares / D + 100 * EPS"),
    "norm_of_the_other_half": ("(board + BOARD_MIDDLE), layer.post_norm", "(board + BOARD_MIDDLE), layer.input_norm"),
    "token_not_cached": ("if (vector && owner", "if (vector == 1 && owner"),
    "padding_seen": ("seen[i] = position >= 0 && position <= token.position", "seen[i] = true"),
    "cache_of_another_row": ("= (size_t)row * b.s.slots", "= (size_t)(row / 2) * b.s.slots"),
    "position_of_another_row": ("b.s.cos[row],      b.s.sin[row]", "b.s.cos[0], b.s.sin[0]"),
    "scale_of_another_row": ("const float scale = scale_of(b, token)", "const float scale = scale_of(b, 0)"),
}
# Two bfloat16 roundings of random values: 2.3e-3; one: 1.7e-3.
ROUNDED_TWICE = 4e-3


@functools.cache
def loaded(name, dtype, device):
    return load_model(paths.checkpoint(name), dtype, device, fused=dtype == "bfloat16")


@functools.cache
def case(name, batch, prompt, steps):
    """Token ids, mask and positions of rows of unequal prompts, padded behind, and their logits in float64."""
    exact = loaded(name, "float64", "cpu")
    ids = seeded(exact.config.vocab_size, batch, prompt + steps).input_ids
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, prompt - min(7, (prompt - 1) // batch) * row : prompt] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = [np.asarray(exact.logits(Inputs.of(ids[row : row + 1, mask[row] == 1])))[0] for row in range(batch)]
    return ids, mask, positions, np.concatenate(expected)


def prompt_then_steps(model, name, batch, prompt, steps):
    """Logits of a prompt and of single tokens behind it, over a cache; at padding none."""
    ids, mask, positions, _ = case(name, batch, prompt, steps)
    cache, parts = model.empty_cache(batch, 64 if prompt < 50 else 1024), []
    for begin, end in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + steps))]:
        part = (ids[:, begin:end], mask[:, begin:end], positions[:, begin:end])
        logits, cache = model.step(Inputs.of(*part), cache)
        parts.append(np.asarray(logits, np.float64))
    return np.concatenate(parts, axis=1)[mask == 1]


class VariantsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        capability = float(jax.devices("cuda")[0].compute_capability)
        if capability != fastest_ops.COMPUTE_CAPABILITY:
            raise absltest.SkipTest(f"the kernels are for {fastest_ops.COMPUTE_CAPABILITY}, this GPU has {capability}")

    def assert_within_bar(self, run, name, expected):
        model = loaded(name, "bfloat16", "cuda")
        own = relative_l2(run(model.with_ops(OPS)), expected)
        error = relative_l2(run(model.with_ops(self.table(model))), expected)
        print(f"{self.id().rpartition('.')[2]}: kernels {error:.2e}, plain {own:.2e}")
        self.assertLessEqual(error, tolerances.bfloat16(own))

    def table(self, model):
        table = fastest_ops.ops_for(model.config, model.dtype, model.device, fused=True)
        self.assertIs(table, fastest_ops.cuda_ops(model.device.core_count))
        return table

    @parameterized.product(name=NAMES, batch=(1, 3, 8, 9))
    def test_decode_steps_hold_the_bar_against_float64(self, name, batch):
        shape = (name, batch, 30, 10)
        self.assert_within_bar(lambda model: prompt_then_steps(model, *shape), name, case(*shape)[3])

    @parameterized.parameters(*NAMES)
    def test_prompt_through_cudnn_holds_the_bar_against_float64(self, name):
        shape = (name, 3, 96, 2)
        self.assert_within_bar(lambda model: prompt_then_steps(model, *shape), name, case(*shape)[3])

    @parameterized.parameters(*NAMES)
    def test_whole_forward_with_padding_on_either_side_holds_the_bar_against_float64(self, name):
        ids, mask, positions, expected = case(name, 3, 96, 2)

        def run(model, order):
            inputs = Inputs.of(ids[:, order], mask[:, order], positions[:, order])
            return np.asarray(model.logits(inputs), np.float64)[mask[:, order] == 1]

        behind = np.arange(ids.shape[1])
        self.assert_within_bar(lambda model: run(model, behind), name, expected)
        # Rows whose padding stands in front: the tokens behind it, rolled to the end.
        front = Inputs.of(np.roll(ids, 14, axis=1), np.roll(mask, 14, axis=1) * (np.arange(98) >= 14))
        exact = np.asarray(loaded(name, "float64", "cpu").logits(front))[front.attention_mask == 1]
        self.assert_within_bar(
            lambda model: np.asarray(model.logits(front), np.float64)[front.attention_mask == 1], name, exact
        )

    @parameterized.product(name=NAMES, lengths=((100, 91, 300), (64, 200, 513)))
    def test_last_tokens_of_prompts_hold_the_bar_through_the_programs_of_generation(self, name, lengths):
        exact, chunk = loaded(name, "float64", "cpu"), 320
        ids = seeded(exact.config.vocab_size, 3, max(lengths)).input_ids
        inputs = Inputs.of(ids, (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32))
        at = np.arange(3), np.array(lengths) - 1
        expected = exact.trace(inputs, {stages.FINAL_NORM})[stages.FINAL_NORM][at]

        def run(model):
            programs = Programs(model.config, model.dtype, True, model.ops, (), model.device)
            tables, left, after = model.rotary_tables(640), at[1].astype(np.int32), ()
            for begin in range(0, max(lengths), chunk):
                part = slice(begin, begin + chunk)
                last = np.where((left >= begin) & (left < begin + chunk), left - begin, -1).astype(np.int32)
                program = programs.later_prefill if after else programs.first_prefill
                tokens = (ids[:, part], inputs.positions()[:, part], last)
                after = program(model.parameters, *tokens, tables, *(after or (640,)))
            return np.asarray(after[1], np.float64)

        self.assert_within_bar(run, name, expected)

    def test_a_prompt_padded_in_front_into_an_empty_cache_holds_the_bar(self):
        name = "gqa_tied_bf16"
        exact = loaded(name, "float64", "cpu")
        ids = seeded(exact.config.vocab_size, 3, 100).input_ids
        mask = (np.arange(100) >= np.array([[0], [9], [20]])).astype(np.int32)
        inputs = Inputs.of(ids, mask)
        expected = np.asarray(exact.logits(inputs))[mask == 1]

        def run(model):
            return np.asarray(model.step(inputs, model.empty_cache(3, 128))[0], np.float64)[mask == 1]

        self.assert_within_bar(run, name, expected)

    @parameterized.parameters(1, 3)
    def test_one_head_split_over_blocks_holds_the_bar(self, batch):
        shape = ("gqa_tied_bf16", batch, 700, 5)
        self.assert_within_bar(lambda model: prompt_then_steps(model, *shape)[-5:], shape[0], case(*shape)[3][-5:])

    @parameterized.product(mistake=tuple(MISTAKES), batch=(3, 8))
    def test_a_mistake_in_the_kernel_of_several_rows_leaves_the_bar(self, mistake, batch):
        right, wrong = MISTAKES[mistake]
        name, source = "gqa_tied_bf16", decode_layers.source

        def planted(files, names):
            self.assertIn(right, text := source(files, names))
            return text.replace(right, wrong)

        model = loaded(name, "bfloat16", "cuda")
        expected = case(name, batch, 30, 10)[3]
        own = relative_l2(prompt_then_steps(model.with_ops(OPS), name, batch, 30, 10), expected)
        # A table of its own, so that its programs are: the comment changes nothing.
        table = fastest_ops.cuda_ops(model.device.core_count, f"{SPLIT_HALVES} /* {mistake} */")
        with mock.patch.object(decode_layers, "source", planted):
            error = relative_l2(prompt_then_steps(model.with_ops(table), name, batch, 30, 10), expected)
        print(f"{mistake}, batch {batch}: {error:.2e}, plain {own:.2e}")
        self.assertGreater(error, tolerances.bfloat16(own))

    @parameterized.product(name=NAMES, batch=(1, 3, 8, 9))
    def test_adjacent_pair_rope_in_the_kernels_leaves_the_bar(self, name, batch):
        model = loaded(name, "bfloat16", "cuda")
        expected = case(name, batch, 30, 10)[3]
        own = relative_l2(prompt_then_steps(model.with_ops(OPS), name, batch, 30, 10), expected)
        planted = fastest_ops.cuda_ops(model.device.core_count, ADJACENT_PAIRS)
        error = relative_l2(prompt_then_steps(model.with_ops(planted), name, batch, 30, 10), expected)
        self.assertGreater(error, tolerances.bfloat16(own))

    @parameterized.parameters(1, 2, 8)
    def test_decode_repeats_bit_for_bit(self, batch):
        model = loaded("gqa_tied_bf16", "bfloat16", "cuda")
        model = model.with_ops(self.table(model))
        self.assertTrue(decode_layers.supports(model.config, model.device.core_count, batch))
        first = prompt_then_steps(model, "gqa_tied_bf16", batch, 30, 10)
        for _ in range(5):
            np.testing.assert_array_equal(prompt_then_steps(model, "gqa_tied_bf16", batch, 30, 10), first)

    @parameterized.parameters((1, 48), (300, 896), (97, 1536), (33, 3584), (5, 8192))
    def test_residual_with_norm_equals_the_separate_operations_but_for_a_rounding(self, count, width):
        x, update = (normal(seed, 1, count, width) for seed in (1, 2))
        weight = normal(3, width) + jnp.ones((width,), jnp.bfloat16)
        total, normed = jax.jit(lambda *arrays: kernels.add_norm(*arrays, 1e-6))(x, update, weight)
        np.testing.assert_array_equal(np.asarray(total), np.asarray(x + update))
        self.assertLessEqual(relative_l2(wide(normed), wide(rms_norm(x + update, weight, 1e-6))), 1e-3)

    @parameterized.parameters((1, 96), (301, 4864), (6, 18944))
    def test_swiglu_equals_float64_to_two_roundings(self, count, width):
        gate_up = normal(4, 1, count, 2 * width)
        gate, up = np.split(wide(gate_up), 2, axis=-1)
        got = wide(jax.jit(kernels.swiglu)(gate_up))
        self.assertLessEqual(relative_l2(got, gate / (1 + np.exp(-gate)) * up), ROUNDED_TWICE)
        self.assertLessEqual(relative_l2(got, wide(silu(gate_up[..., :width]) * gate_up[..., width:])), 1e-3)

    @parameterized.parameters((48, 96), (896, 4864), (3584, 18944))
    def test_matvec_equals_float64_to_one_rounding(self, count, width):
        weight, x = normal(5, count, width), normal(6, 1, 1, width)
        got = wide(jax.jit(kernels.matvec)(weight, x))
        self.assertLessEqual(relative_l2(got[0, 0], wide(weight) @ wide(x)[0, 0]), ROUNDED_TWICE / 2)


def normal(seed, *shape):
    device = jax.devices("cuda")[0]
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(jnp.bfloat16), device)


def wide(x):
    return np.asarray(x, np.float64)


if __name__ == "__main__":
    absltest.main()
