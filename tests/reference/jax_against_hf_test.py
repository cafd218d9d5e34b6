"""JAX against live HuggingFace on CPU: float32, float64 with its three casts to float32 removed, and bfloat16."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.model import rotary
from apr_jax.trace import golden, hf_reference, stages, tolerances
from apr_jax.trace.compare import compare, relative_l2
from apr_jax.trace.inputs import Inputs, seeded
from tests import faults, paths

FOLDERS = {path.name: path for path in paths.CHECKPOINTS}
if fixtures := paths.fixtures():
    FOLDERS |= {f"genuine/{path.parent.name}": path for path in sorted(fixtures.glob("genuine/*/hf"))}


def batches(vocab_size: int) -> dict[str, Inputs]:
    """3 x 97 tokens; four unequal prompts padded on the left, and on the right."""
    ids = seeded(vocab_size, 4, 97, seed=1).input_ids
    left, right = np.ones(ids.shape, np.int32), np.ones(ids.shape, np.int32)
    for row, length in enumerate((97, 60, 31, 1)):
        left[row, : 97 - length] = 0
        right[row, length:] = 0
    return {
        "3 x 97": seeded(vocab_size, 3, 97),
        "padded left": Inputs.of(ids, left),
        "padded right": Inputs.of(ids, right),
    }


def run_hf(name: str, inputs: Inputs, dtype: str = "float32", **what: bool) -> dict[str, np.ndarray]:
    return hf_reference.run(
        FOLDERS[name], inputs.input_ids, inputs.attention_mask, inputs.position_ids, dtype=dtype, **what
    )


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class AgainstHuggingFaceTest(parameterized.TestCase):
    @parameterized.parameters(list(FOLDERS))
    def test_float32_is_within_1e_5_with_equal_top1_and_at_most_thrice_huggingfaces_error(self, name):
        model, exact = load_model(FOLDERS[name]), load_model(FOLDERS[name], "float64")
        layers = model.config.num_layers
        keys = {*stages.hidden_sources(layers).values(), stages.LOGITS}
        for label, inputs in batches(model.config.vocab_size).items():
            theirs = run_hf(name, inputs, hidden_states=True)
            ours = golden.with_hidden_states(model.trace(inputs, keys), layers)
            results = compare(ours, theirs, inputs, lambda key: tolerances.FLOAT32)
            self.assertLen(results, layers + 2)
            for result in results:
                self.assertTrue(result.within, result)
            (logits,) = (result for result in results if result.key == stages.LOGITS)
            self.assertEqual(logits.logits.top1, 1.0)
            tokens = inputs.attention_mask == 1
            reference = np.asarray(exact.logits(inputs))[tokens]
            error, theirs_error = (relative_l2(side[stages.LOGITS][tokens], reference) for side in (ours, theirs))
            print(
                f"{name}, {label}: against HuggingFace {logits.relative_l2:.2e} (worst stage"
                f" {max(result.relative_l2 for result in results):.2e}); against float64 ours {error:.2e},"
                f" HuggingFace {theirs_error:.2e}"
            )
            self.assertLessEqual(error, 3 * theirs_error)

    @parameterized.parameters(list(FOLDERS))
    def test_float32_at_512_positions_is_within_3e_5(self, name):
        model = load_model(FOLDERS[name])
        inputs = seeded(model.config.vocab_size, 1, 512)
        error = relative_l2(np.asarray(model.logits(inputs)), run_hf(name, inputs)[stages.LOGITS])
        print(f"{name}, 1 x 512: against HuggingFace {error:.2e}")
        self.assertLessEqual(error, 3e-5)

    @parameterized.parameters(list(FOLDERS))
    def test_float64_equals_huggingface_without_its_casts_to_1e_12(self, name):
        model = load_model(FOLDERS[name], "float64")
        inputs = batches(model.config.vocab_size)["padded left"]
        with hf_reference.float64_patched():
            theirs = run_hf(name, inputs, "float64", trace=True)
        results = compare(model.trace(inputs), theirs, inputs, lambda key: 1e-12)
        self.assertLen(results, model.config.num_layers * len(stages.LAYER_STAGES) + 3)
        for result in results:
            self.assertTrue(result.within, result)

    @parameterized.parameters(list(FOLDERS))
    def test_bfloat16_is_within_twice_huggingfaces_own_error(self, name):
        model, exact = load_model(FOLDERS[name], "bfloat16"), load_model(FOLDERS[name], "float64")
        inputs = seeded(model.config.vocab_size, 3, 97)
        reference = np.asarray(exact.logits(inputs))
        ours = relative_l2(np.asarray(model.logits(inputs)), reference)
        theirs = relative_l2(run_hf(name, inputs, "bfloat16")[stages.LOGITS], reference)
        print(f"{name}, bfloat16 against float64: ours {ours:.2e}, HuggingFace {theirs:.2e}")
        self.assertLessEqual(ours, 2 * theirs)

    @parameterized.product(name=list(FOLDERS), fault=faults.FAULTS)
    def test_every_visible_planted_fault_leaves_the_bar(self, name, fault):
        model = load_model(FOLDERS[name])
        inputs = seeded(model.config.vocab_size, 3, 97)
        error = relative_l2(np.asarray(fault.plant(model).logits(inputs)), run_hf(name, inputs)[stages.LOGITS])
        print(f"{name}, {fault.name}: {error:.2e}")
        self.assertEqual(error > tolerances.FLOAT32, fault.visible(model.config))


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class InverseFrequenciesTest(absltest.TestCase):
    def test_bit_equal_to_live_torch_for_every_head_dim_that_is_a_multiple_of_64(self):
        import torch

        compared = 0
        for theta in (1e3, 1e4, 1.5e5, 5e5, 1e6, 8e6, 1e7, 1e9, 12345.678):
            for dim in (64, 128, 192, 256):
                expected = (1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))).numpy()
                np.testing.assert_array_equal(rotary.inverse_frequencies(theta, dim), expected, f"{theta} {dim}")
                compared += dim // 2
        self.assertGreater(compared, 2000)


if __name__ == "__main__":
    absltest.main()
