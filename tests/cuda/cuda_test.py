"""On an NVIDIA GPU: HuggingFace's recorded values in float32, TF32 outside the bar, bfloat16, cache, and the upload."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.model.qwen2 import TF32_OPS
from apr_jax.trace import golden, hf_reference, stages, tolerances
from apr_jax.trace.compare import compare, relative_l2
from apr_jax.trace.inputs import Inputs, seeded
from tests import faults, oracle, paths


def against_golden(name, ops=None):
    model = load_model(paths.checkpoint(name), device="cuda")
    model = model if ops is None else model.with_ops(ops)
    reference = golden.read(paths.golden(name))
    sources = stages.hidden_sources(model.config.num_layers)
    trace = model.trace(reference.inputs, {*sources.values(), stages.LOGITS})
    ours = golden.with_hidden_states(trace, model.config.num_layers)
    results = compare(ours, reference.values, reference.inputs, lambda key: tolerances.FLOAT32)
    assert len(results) == model.config.num_layers + 2
    return results


class CudaTest(parameterized.TestCase):
    @parameterized.parameters(paths.NAMES)
    def test_float32_holds_1e_5_against_huggingfaces_recorded_values(self, name):
        results = against_golden(name)
        print(f"{name}, CUDA float32: " + ", ".join(f"{r.key} {r.relative_l2:.2e}" for r in results))
        for result in results:
            self.assertTrue(result.within, result)
        self.assertEqual([r.logits.top1 for r in results if r.logits], [1.0])

    @parameterized.parameters(paths.NAMES)
    def test_tf32_leaves_the_float32_bar(self, name):
        worst = max(result.relative_l2 for result in against_golden(name, TF32_OPS))
        print(f"{name}, CUDA TF32: worst {worst:.2e}")
        self.assertGreater(worst, tolerances.FLOAT32)

    @parameterized.product(name=paths.NAMES, fault=faults.FAULTS)
    def test_every_planted_fault_leaves_the_bar(self, name, fault):
        model = load_model(paths.checkpoint(name), device="cuda")
        reference = golden.read(paths.golden(name))
        logits = np.asarray(fault.plant(model).logits(reference.inputs))
        tokens = reference.inputs.attention_mask == 1
        error = relative_l2(logits[tokens], reference.values[stages.LOGITS][tokens])
        self.assertEqual(error > tolerances.FLOAT32, fault.visible(model.config), f"{error:.2e}")

    @parameterized.parameters(paths.NAMES)
    def test_float64_equals_the_oracle_to_1e_12(self, name):
        model = load_model(paths.checkpoint(name), "float64", "cuda")
        inputs = seeded(model.config.vocab_size, 2, 48)
        expected, _ = oracle.forward(*oracle.load(paths.checkpoint(name)), inputs.input_ids)
        error = relative_l2(np.asarray(model.logits(inputs)), expected)
        print(f"{name}, CUDA float64: {error:.2e}")
        self.assertLessEqual(error, 1e-12)

    @parameterized.parameters(paths.NAMES)
    @absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed")
    def test_bfloat16_is_within_twice_huggingfaces_own_error(self, name):
        exact = load_model(paths.checkpoint(name), "float64", "cpu")
        inputs = seeded(exact.config.vocab_size, 3, 97)
        reference = np.asarray(exact.logits(inputs))
        ours = relative_l2(np.asarray(load_model(paths.checkpoint(name), "bfloat16", "cuda").logits(inputs)), reference)
        theirs = {}
        for device in ("cuda", "cpu"):
            values = hf_reference.run(paths.checkpoint(name), inputs.input_ids, dtype="bfloat16", device=device)
            theirs[device] = relative_l2(values[stages.LOGITS], reference)
        print(f"{name}, bfloat16 against float64: ours on CUDA {ours:.2e}, HuggingFace {theirs}")
        self.assertLessEqual(ours, 2 * theirs["cuda"])

    @parameterized.product(name=paths.NAMES, dtype=["float32", "bfloat16"])
    def test_cached_steps_equal_the_full_forward(self, name, dtype):
        model = load_model(paths.checkpoint(name), dtype, "cuda")
        exact = load_model(paths.checkpoint(name), "float64", "cpu")
        inputs = seeded(model.config.vocab_size, 2, 40)
        cache, parts = model.empty_cache(2, 48), []
        for start, end in [(0, 30), *((at, at + 1) for at in range(30, 40))]:
            part = Inputs.of(inputs.input_ids[:, start:end], None, inputs.position_ids[:, start:end])
            logits, cache = model.step(part, cache)
            parts.append(np.asarray(logits))
        whole, steps = np.asarray(model.logits(inputs)), np.concatenate(parts, axis=1)
        # bfloat16 rounds differently in every shape of product: both are held against float64 instead.
        reference = np.asarray(exact.logits(inputs))
        bar = 1e-5 if dtype == "float32" else 2 * relative_l2(whole, reference)
        self.assertLessEqual(relative_l2(steps, whole if dtype == "float32" else reference), bar)

    @parameterized.product(name=paths.NAMES, dtype=["float32", "bfloat16"])
    def test_every_parameter_reads_back_bit_for_bit(self, name, dtype):
        there = load_model(paths.checkpoint(name), dtype, "cuda").parameters
        here = load_model(paths.checkpoint(name), dtype, "cpu").parameters
        pairs = list(zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True))
        for uploaded, kept in pairs:
            self.assertEqual(uploaded.devices().pop().platform, "gpu")
            self.assertEqual(np.asarray(uploaded).tobytes(), np.asarray(kept).tobytes())
        self.assertGreater(len(pairs), 25)

    @parameterized.product(name=["gqa_tied_bf16", "mha_untied_f32_sharded"], dtype=["float32", "bfloat16"])
    def test_forcing_with_ones_own_trace_changes_nothing_at_all(self, name, dtype):
        model = load_model(paths.checkpoint(name), dtype, "cuda")
        inputs = seeded(model.config.vocab_size)
        trace = model.trace(inputs)
        for key, value in model.trace(inputs, force=trace).items():
            np.testing.assert_array_equal(value, trace[key], key)


if __name__ == "__main__":
    absltest.main()
