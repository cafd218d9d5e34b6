"""Tokens are drawn from the distribution that the settings ask for."""

import functools
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from apr_jax.generate import sampling
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.sampling import Method, Numbers, row_keys
from apr_jax.load.parameters import computes_float16
from apr_jax.model.parameters import DTYPES

DRAWS, VOCABULARY = 10_000, 300
SETTINGS = {
    "qwen": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
    "top-p alone": {"top_k": 0, "top_p": 0.6},
    "top-k alone": {"top_k": 5, "temperature": 1.5},
    "nothing cut": {"top_k": 0},
}


def logits() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)


def expected(scores, seen, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """The same in float64, by ranks: no code is shared with what is tested."""
    scores = scores.astype(np.float64)
    for token in np.flatnonzero(seen):
        scores[token] = scores[token] / repetition_penalty if scores[token] > 0 else scores[token] * repetition_penalty
    order = np.argsort(-scores)
    weights = np.exp((scores[order] - scores.max()) / temperature)
    if top_k:
        weights[top_k:] = 0
    weights /= weights.sum()
    # The smallest number of likeliest tokens that reaches top_p.
    keep = int(np.searchsorted(np.cumsum(weights), top_p) + 1) if top_p < 1 else len(weights)
    weights[keep:] = 0
    probabilities = np.zeros(len(scores))
    probabilities[order] = weights / weights.sum()
    return probabilities


@functools.cache
def program(method, rows, top_p):
    """Compiled for a method, and for what `sampling._top_p` is just now."""
    del top_p

    @jax.jit
    def drawn(scores, seen, numbers, seed, index):
        batch = jnp.broadcast_to(scores, (rows, VOCABULARY))
        many = jnp.broadcast_to(seen, (rows, VOCABULARY))
        return sampling.pick(batch, row_keys(seed, rows), index, many, numbers, method)

    return drawn


def draw(settings, seed=0, rows=DRAWS, index=0, seen=None):
    """Draws one token in each of many equal rows, on the device."""
    config = GenerationConfig(do_sample=True, **settings)
    method = Method.of(config, VOCABULARY)
    seen = np.zeros(VOCABULARY, bool) if seen is None else seen
    numbers = Numbers.of(config, method)
    drawn = program(method, rows, sampling._top_p)
    return np.asarray(drawn(logits(), seen, numbers, np.uint32(seed), np.int32(index)))


def p_value(tokens, probabilities) -> float:
    """The chance of a deviation as large as this one, if the tokens were drawn with these probabilities."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return 0.0
    often = probabilities * len(tokens) >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(probabilities[often], probabilities[~often].sum()) * len(tokens)
    kept = wanted > 0
    return float(scipy.stats.chisquare(observed[kept], wanted[kept]).pvalue)


class DistributionTest(parameterized.TestCase):
    @parameterized.parameters(list(SETTINGS))
    def test_10000_draws_follow_the_distribution(self, name):
        seen = np.random.default_rng(1).random(VOCABULARY) < 0.5
        tokens = draw(SETTINGS[name], seen=seen)
        self.assertGreater(p_value(tokens, expected(logits(), seen, **SETTINGS[name])), 1e-4)
        self.assertGreater(len(set(tokens.tolist())), 3)

    def test_one_token_too_many_or_too_few_by_top_p_is_noticed(self):
        right = sampling._top_p
        for name, off in (("qwen", 1), ("top-p alone", -1)):
            wanted = expected(logits(), np.zeros(VOCABULARY, bool), **SETTINGS[name])
            self.assertGreater(p_value(draw(SETTINGS[name]), wanted), 1e-4)

            def off_by_one(scores, tail, off=off):
                count = jnp.isfinite(right(scores, tail)).sum(axis=-1, keepdims=True) + off
                return jnp.where(jnp.arange(scores.shape[-1]) < count, scores, -jnp.inf)

            with mock.patch.object(sampling, "_top_p", off_by_one):
                self.assertLess(p_value(draw(SETTINGS[name]), wanted), 1e-4, f"{name}, {off:+d}")

    def test_a_wrong_temperature_and_a_missing_penalty_are_noticed(self):
        seen = np.random.default_rng(1).random(VOCABULARY) < 0.5
        settings = SETTINGS["qwen"]
        wanted = expected(logits(), seen, **settings)
        self.assertLess(p_value(draw({**settings, "temperature": 0.8}, seen=seen), wanted), 1e-4)
        self.assertLess(p_value(draw({**settings, "repetition_penalty": 1.0}, seen=seen), wanted), 1e-4)

    def test_draws_depend_on_seed_row_and_number_of_the_token_and_on_nothing_else(self):
        settings = SETTINGS["qwen"]
        tokens = draw(settings, rows=500)
        np.testing.assert_array_equal(draw(settings, rows=500), tokens)
        np.testing.assert_array_equal(draw(settings, rows=7), tokens[:7], "other rows do not matter")
        for other in (draw(settings, seed=1, rows=500), draw(settings, index=1, rows=500), np.roll(tokens, 1)):
            self.assertLess((other == tokens).mean(), 0.5)


class MethodTest(parameterized.TestCase):
    def test_only_the_amount_of_work_is_compiled_in(self):
        def method(**settings):
            return Method.of(GenerationConfig(do_sample=True, **settings), 150_000)

        self.assertEqual(method(temperature=0.7, top_k=20, top_p=0.8), method(temperature=1.9, top_k=100, top_p=0.1))
        self.assertEqual(method(top_k=101).candidates, 1280)
        self.assertEqual(method(top_k=5000).candidates, 150_000)
        self.assertEqual(method(top_k=0, top_p=0.9).candidates, 150_000)
        self.assertEqual(method(top_k=0).candidates, 0)
        self.assertEqual(Method.of(GenerationConfig(top_k=3, top_p=0.2), 9), Method(False, 0, False))
        self.assertTrue(Method.of(GenerationConfig(repetition_penalty=1.1), 9).penalised)

    def test_tokens_that_tie_with_the_kth_all_stay(self):
        config = GenerationConfig(do_sample=True, top_k=2)
        scores = jnp.asarray([[1.0, 5.0, 3.0, 3.0, 3.0, 0.0]])
        method = Method.of(config, 6)
        warped, tokens = sampling.warp(scores, Numbers.of(config, method), method.candidates)
        kept = np.asarray(tokens)[np.isfinite(np.asarray(warped))]
        self.assertCountEqual(kept.tolist(), [1, 2, 3, 4])

    def test_top_p_cuts_off_what_adds_up_to_exactly_one_minus_p(self):
        # Probabilities 1/2, 1/4, 1/4, whose sums are exact: at 0.75 the first two reach p, as HuggingFace counts.
        config = GenerationConfig(do_sample=True, top_k=0, top_p=0.75)
        scores = jnp.log(jnp.asarray([[0.25, 0.5, 0.25]]))
        method = Method.of(config, 3)
        warped, tokens = sampling.warp(scores, Numbers.of(config, method), method.candidates)
        self.assertEqual(float(jax.nn.softmax(scores)[0, 0]), 0.25)
        self.assertEqual(tokens.tolist(), [[1, 0, 2]])
        self.assertEqual(np.isfinite(np.asarray(warped)).tolist(), [[True, True, False]])

    def test_the_penalty_makes_every_seen_token_less_likely_however_near_to_zero_it_is(self):
        scores = jnp.asarray([[3.0, 0.25, 0.0, -0.25, -3.0, 0.25]])
        seen = jnp.asarray([[True, True, True, True, True, False]])
        penalised = sampling.penalise(scores, seen, np.float32(2.0))
        self.assertEqual(penalised.tolist(), [[1.5, 0.125, 0.0, -0.5, -6.0, 0.25]])

    @parameterized.parameters(*DTYPES)
    def test_the_likeliest_token_is_the_first_of_equals_in_every_dtype_of_a_model(self, dtype):
        if dtype == "float16" and not computes_float16():
            self.skipTest("XLA computes no float16 on this processor")
        method = Method(False, 0, False)
        numbers = Numbers.of(GenerationConfig(), method)
        with jax.enable_x64(dtype == "float64"):
            scores = jnp.asarray([[0.0, 2.0, 2.0], [-1.0, -3.0, -1.0]], dtype)
            self.assertEqual(scores.dtype, dtype)
            tokens = sampling.pick(scores, row_keys(0, 2), jnp.int32(0), None, numbers, method)
        self.assertEqual((tokens.tolist(), tokens.dtype), ([1, 0], jnp.int32))


if __name__ == "__main__":
    absltest.main()
