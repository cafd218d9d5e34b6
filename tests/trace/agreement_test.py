"""The statistics of logits against their definitions, computed by hand, by loops and by SciPy."""

import math

import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from apr_jax.trace.agreement import LIMITS, PERFECT, agreement


def by_hand(judged, reference):
    """The numbers of one position, from their definitions, one element after the other."""
    differences = [abs(a - b) for a, b in zip(judged, reference, strict=True)]
    rms = math.sqrt(sum(d * d for d in differences) / len(differences))
    mean = sum(differences) / len(differences)
    p, q = (np.exp(side) / math.fsum(np.exp(side)) for side in (reference, judged))
    return {
        "cosine": math.fsum(judged * reference) / math.sqrt(math.fsum(judged**2) * math.fsum(reference**2)),
        "kl": math.fsum(p * np.log(p / q)),
        "sigma": 1 / rms,
        "cpk": (1 - mean) / (3 * rms),
        "max_abs": max(differences),
    }


class AgreementTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        random = np.random.default_rng(3)
        self.reference = 3 * random.standard_normal((70, 200))  # more positions than are computed at a time
        self.judged = self.reference + 0.2 * random.standard_normal((70, 200))

    def test_the_numbers_of_apr_parity_are_what_their_definitions_give(self):
        found = agreement(self.judged, self.reference)
        each = [by_hand(*rows) for rows in zip(self.judged, self.reference, strict=True)]
        for name in ("cosine", "sigma", "cpk"):
            values = [one[name] for one in each]
            self.assertAlmostEqual(getattr(found, f"{name}_min"), min(values), places=12)
            self.assertAlmostEqual(getattr(found, f"{name}_mean"), sum(values) / 70, places=12)
        self.assertAlmostEqual(found.kl_max, max(one["kl"] for one in each), places=12)
        self.assertAlmostEqual(found.kl_mean, sum(one["kl"] for one in each) / 70, places=12)
        self.assertAlmostEqual(found.max_abs, max(one["max_abs"] for one in each), places=12)

    @parameterized.parameters(1, 5, 10)
    def test_the_most_likely_tokens_in_common(self, count):
        shares = []
        for judged, reference in zip(self.judged, self.reference, strict=True):
            sets = [set(np.argsort(-side)[:count]) for side in (judged, reference)]
            shares.append(len(sets[0] & sets[1]) / count)
        self.assertAlmostEqual(getattr(agreement(self.judged, self.reference), f"top{count}"), np.mean(shares))

    def test_rank_agreement_is_scipys_ties_included(self):
        coarse = np.round(self.judged)
        found, taus, rhos = agreement(coarse, self.reference), [], []
        for judged, reference in zip(coarse, self.reference, strict=True):
            likely = np.argsort(-reference, kind="stable")[:50]
            taus.append(scipy.stats.kendalltau(reference[likely], judged[likely]).statistic)
            rhos.append(scipy.stats.spearmanr(reference[likely], judged[likely]).statistic)
        self.assertAlmostEqual(found.kendall_mean, np.mean(taus), places=12)
        self.assertAlmostEqual(found.kendall_min, min(taus), places=12)
        self.assertAlmostEqual(found.spearman_mean, np.mean(rhos), places=12)
        self.assertAlmostEqual(found.spearman_min, min(rhos), places=12)

    def test_the_reverse_order_is_minus_one_and_no_order_is_nothing(self):
        found = agreement(-self.reference, self.reference)
        self.assertAlmostEqual(found.kendall_mean, -1.0)
        self.assertAlmostEqual(found.spearman_mean, -1.0)
        found = agreement(np.zeros((1, 9)), self.reference[:1, :9])
        self.assertEqual((found.kendall_mean, found.spearman_mean, found.cosine_min), (0.0, 0.0, 0.0))

    def test_the_worst_token_is_named(self):
        self.judged[41, 17] = self.reference[41, 17] + 9
        found = agreement(self.judged, self.reference)
        self.assertEqual((found.worst_position, found.worst_token), (41, 17))
        self.assertEqual((found.worst_judged, found.worst_reference), (self.judged[41, 17], self.reference[41, 17]))
        self.assertAlmostEqual(found.max_abs, 9.0)

    def test_equal_logits_keep_to_every_limit(self):
        found = agreement(self.reference, self.reference)
        self.assertTrue(found.all_within)
        self.assertEqual((found.sigma_min, found.cpk_min, found.kl_max, found.top10), (PERFECT, PERFECT, 0.0, 1.0))

    @parameterized.parameters(list(LIMITS))
    def test_each_limit_turns_red(self, name):
        wrong = {
            "cosine_min": self.reference + 0.2 * np.roll(self.reference, 1, axis=1),
            "kl_max": self.reference * 1.4,
            "max_abs": self.reference + 1.01 * (np.arange(200) == 5),
            "sigma_min": self.reference + 0.34 * np.sign(self.judged),
            "cpk_min": self.reference + 0.21 * np.sign(self.judged),
        }[name]
        self.assertFalse(agreement(wrong, self.reference).within(name))
        self.assertFalse(agreement(wrong, self.reference).to_json()["limits"][name]["within"])

    @parameterized.parameters(np.nan, np.inf)
    def test_what_is_not_finite_keeps_to_no_limit(self, value):
        self.judged[3, 4] = value
        found = agreement(self.judged, self.reference)
        self.assertEqual((found.positions, found.not_finite), (69, 1))
        self.assertFalse(any(map(found.within, LIMITS)))
        self.judged[:] = value
        self.assertFalse(agreement(self.judged, self.reference).all_within)


if __name__ == "__main__":
    absltest.main()
