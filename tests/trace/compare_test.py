"""The comparison itself: what it measures, what it leaves out, and that it cannot pass on nothing."""

import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import RefusedError
from apr_jax.trace import tolerances
from apr_jax.trace.compare import compare, loss_nats, relative_l2
from apr_jax.trace.inputs import Inputs

INPUTS = Inputs.of([[1, 2, 3, 4], [5, 6, 7, 8]], [[0, 1, 1, 1], [1, 1, 1, 0]])
KEY = "stage.0.ffn_out"


def one(left, right, key=KEY, inputs=INPUTS, bar=1e-5):
    (result,) = compare({key: left}, {key: right}, inputs, lambda _: bar)
    return result


class CompareTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.values = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)

    def test_equal_values_are_within_every_bar(self):
        result = one(self.values, self.values.copy(), bar=0.0)
        self.assertTrue(result.within)
        self.assertEqual((result.elements, result.max_abs, result.relative_l2), (36, 0.0, 0.0))
        self.assertAlmostEqual(result.cosine, 1.0)

    def test_one_element_off_is_measured(self):
        other = self.values.copy()
        other[0, 1, 0] += 0.5
        result = one(other, self.values)
        self.assertAlmostEqual(result.max_abs, 0.5, places=6)
        expected = 0.5 / np.linalg.norm(self.values[INPUTS.attention_mask == 1])
        self.assertAlmostEqual(result.relative_l2, expected, places=6)
        self.assertFalse(result.within)

    def test_padding_is_not_compared(self):
        other = self.values.copy()
        other[0, 0], other[1, 3] = np.nan, 1e9
        self.assertTrue(one(other, self.values).within)

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_what_is_not_finite_passes_no_bar_on_either_side(self, value):
        other = self.values.copy()
        other[0, 1, 0] = value
        with np.errstate(invalid="ignore"):
            for left, right in ((other, self.values), (self.values, other), (other, other)):
                result = one(left, right, bar=math.inf)
                self.assertFalse(result.within, (left is other, right is other))
                self.assertIn("not finite", result.note)
                self.assertIn("within", result.to_json())

    def test_a_reference_of_zeros_is_named_and_fails(self):
        result = one(self.values, np.zeros_like(self.values))
        self.assertEqual((result.relative_l2, result.note, result.within), (math.inf, "right: all zero", False))
        self.assertTrue(one(np.zeros_like(self.values), np.zeros_like(self.values)).within)

    def test_hidden_keys_of_attention_scores_are_not_compared(self):
        scores = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
        other = scores.copy()
        other[:, :, 0, 1:] = 99.0
        other[0, :, 0], other[0, :, :, 0], other[1, :, 3] = 99.0, 99.0, 99.0
        result = one(other, scores, key="stage.0.attn_scores")
        self.assertTrue(result.within)
        self.assertEqual(result.elements, 3 * (6 + 6))
        other[1, 0, 2, 1] += 1
        self.assertFalse(one(other, scores, key="stage.0.attn_scores").within)

    def test_logits_of_the_last_position_are_held_against_each_rows_last_token(self):
        right = np.stack([self.values[0, 3], self.values[1, 2]])[:, None]
        self.assertTrue(one(self.values, right, key="logits").within)
        self.assertFalse(one(self.values, self.values[:, 3:], key="logits").within)

    def test_kl_and_agreement_of_logits(self):
        right = np.log(np.array([[[0.7, 0.2, 0.05, 0.03, 0.01, 0.01]]]))
        left = np.log(np.array([[[0.2, 0.7, 0.05, 0.03, 0.005, 0.015]]]))
        result = one(left, right, key="logits", inputs=Inputs.of([[1]]))
        p, q = np.exp(right), np.exp(left)
        self.assertAlmostEqual(result.logits.kl_max, float((p * np.log(p / q)).sum()), places=12)
        self.assertEqual((result.logits.top1, result.logits.top5), (0.0, 0.8))

    def test_the_worst_positions_kl_counts(self):
        right = np.zeros((1, 2, 3))
        left = np.stack([np.zeros(3), np.log([0.8, 0.1, 0.1])])[None]
        result = one(left, right, key="logits", inputs=Inputs.of([[1, 2]]))
        self.assertAlmostEqual(
            result.logits.kl_max, float(np.log(np.array([1 / 3] * 3) / [0.8, 0.1, 0.1]).mean()), places=12
        )

    def test_a_tensor_that_only_the_reference_has_is_an_error(self):
        with self.assertRaises(RefusedError) as caught:
            compare({KEY: self.values}, {KEY: self.values, "stage.9.ffn_out": self.values}, INPUTS, lambda _: 1.0)
        self.assertEqual(caught.exception.code, "reference-unknown")
        self.assertIn("stage.9.ffn_out", str(caught.exception))

    def test_logits_of_another_shape_are_not_broadcast(self):
        for shape in ((1, 1, 6), (2, 1, 1), (2, 1, 5), (1, 1, 1), (2, 1), (6,), ()):
            with self.assertRaises(RefusedError, msg=str(shape)):
                one(self.values, np.ones(shape, np.float32), key="logits")

    def test_nothing_in_common_and_other_shapes_are_errors(self):
        with self.assertRaises(RefusedError) as caught:
            compare({"a": self.values}, {"b": self.values}, INPUTS, lambda _: 1.0)
        self.assertEqual(caught.exception.code, "nothing-compared")
        with self.assertRaises(RefusedError):
            compare({}, {}, INPUTS, lambda _: 1.0)
        with self.assertRaises(RefusedError) as caught:
            one(self.values[:, :, :5], self.values)
        self.assertEqual(caught.exception.code, "shape-differs")


class LossTest(absltest.TestCase):
    def test_uniform_logits_lose_the_logarithm_of_the_vocabulary(self):
        self.assertAlmostEqual(loss_nats(np.zeros((2, 4, 1000), np.float32), INPUTS), math.log(1000), places=12)

    def test_only_pairs_of_tokens_count(self):
        logits = np.zeros((2, 4, 10), np.float32)
        for row, position in ((0, 1), (0, 2), (1, 0), (1, 1)):
            logits[row, position, INPUTS.input_ids[row, position + 1]] = 100.0
        self.assertAlmostEqual(loss_nats(logits, INPUTS), 0.0, places=12)

    def test_one_token_predicts_nothing(self):
        with self.assertRaises(RefusedError):
            loss_nats(np.zeros((1, 1, 10)), Inputs.of([[1]]))


class BarsTest(absltest.TestCase):
    def test_the_coarser_dtype_and_the_length_decide(self):
        self.assertEqual(tolerances.relative_l2("float32", 97), 1e-5)
        self.assertAlmostEqual(tolerances.relative_l2("float32", 510), 3e-5)
        self.assertEqual(tolerances.relative_l2("float64", 97), 1e-11)
        self.assertEqual(tolerances.bfloat16(0.03), 0.06)
        self.assertEqual(tolerances.bfloat16(5.0), 0.2)

    def test_relative_l2_of_nothing_against_nothing(self):
        self.assertEqual(relative_l2(np.zeros(3), np.zeros(3)), 0.0)


if __name__ == "__main__":
    absltest.main()
