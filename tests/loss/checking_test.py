"""Every mistake that is known is planted in losses from the oracle's logits, and has to be named with its number."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import RefusedError
from apr_jax.load.load_model import load_model
from apr_jax.loss import scoring
from apr_jax.loss.checking import Run, check
from apr_jax.loss.documents import Document, windows
from tests import oracle, paths

SAMPLE = paths.checkpoint("gqa_untied_bf16")
# Unequal, and padded to one length: each way to compute logits is one program.
LENGTHS = (37, 34, 48, 39, 41)


def log_total(logits):
    top = logits.max(-1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]


def losses(logits, labels):
    return log_total(logits) - np.take_along_axis(logits, labels[:, None], 1)[:, 0]


class CheckingTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.documents = []
        generator = np.random.default_rng(0)
        for length in LENGTHS:
            ids = generator.integers(0, 256, length).astype(np.int32)
            counted = (np.arange(length) > 0) & (generator.random(length) < 0.7)
            cls.documents.append(Document("x", ids, counted))
        cls.logits = [oracle.forward(*oracle.load(SAMPLE), d.ids[None])[0][0] for d in cls.documents]
        model = load_model(SAMPLE)
        cut = list(windows(cls.documents, 64, 32))
        cls.run_of_ours = Run(model, cls.documents, cut, 2, scoring.score(model, cls.documents, cut, 2))

    def each(self, function):
        """Losses of the tokens that count: function(logits before each token, all ids, places of the tokens)."""
        found = []
        for document, logits in zip(self.documents, self.logits, strict=True):
            places = np.flatnonzero(document.counted)
            found.append(function(logits[places - 1], document.ids, places))
        return np.concatenate(found)

    def verdict(self, values=None, mean=None):
        arrays = {} if values is None else {"losses": np.asarray(values, np.float32)}
        if mean is not None:
            arrays["loss"] = np.array([mean], np.float32)
        path = self.create_tempfile().full_path + ".safetensors"
        safetensors.numpy.save_file(arrays, path)
        return check(self.run_of_ours, path)

    def right(self):
        return self.each(lambda logits, ids, at: losses(logits, ids[at]))

    def test_right_losses_agree_in_every_form(self):
        right = self.right()
        self.assertTrue(self.verdict(right, right.mean()).within)
        whole = np.full(sum(LENGTHS), np.nan)
        whole[np.concatenate([d.counted for d in self.documents])] = right
        self.assertTrue(self.verdict(whole).within)
        self.assertTrue(self.verdict(np.delete(whole, np.cumsum((0, *LENGTHS[:-1])))).within)
        self.assertTrue(self.verdict(mean=right.mean()).within)

    def named(self, values):
        verdict = self.verdict(values)
        self.assertLen(verdict.mistakes, 1)
        return verdict.mistakes[0]

    def test_labels_that_stand_elsewhere(self):
        own = self.each(lambda logits, ids, at: losses(logits, ids[at - 1]))
        self.assertEqual(self.named(own).name, "labels-not-shifted")
        twice = self.each(lambda logits, ids, at: losses(logits, np.append(ids, 0)[np.minimum(at + 1, len(ids) - 1)]))
        places = np.concatenate([np.flatnonzero(d.counted) == len(d.ids) - 1 for d in self.documents])
        twice[places] = self.right()[places]
        self.assertEqual(self.named(twice).name, "labels-shifted-twice")
        rolled = self.named(np.roll(self.right(), -1))
        self.assertEqual((rolled.name, rolled.numbers), ("row-off-by-one", {"rows": -1}))

    def test_bits_alone_and_on_top_of_another_mistake(self):
        self.assertEqual(self.named(self.right() / np.log(2)).name, "log2-for-ln")
        own = self.each(lambda logits, ids, at: losses(logits, ids[at - 1])) / np.log(2)
        self.assertEqual(self.named(own).name, "log2-for-ln+labels-not-shifted")

    @parameterized.parameters(0.1, 0.02)
    def test_label_smoothing(self, share):
        def smoothed(logits, ids, at):
            log_p = logits - log_total(logits)[:, None]
            return (1 - share) * losses(logits, ids[at]) - share * log_p.mean(-1)

        found = self.named(self.each(smoothed))
        self.assertEqual(found.name, "label-smoothing")
        self.assertAlmostEqual(found.numbers["smoothing"], share, delta=1e-4)

    def test_a_z_loss(self):
        found = self.named(self.each(lambda logits, ids, at: losses(logits, ids[at]) + 1e-3 * log_total(logits) ** 2))
        self.assertEqual(found.name, "z-loss")
        self.assertAlmostEqual(found.numbers["weight"], 1e-3, delta=1e-6)

    @parameterized.parameters(1, 64)
    def test_a_padded_vocabulary(self, rows):
        def padded(logits, ids, at):
            return losses(np.concatenate([logits, np.zeros((len(logits), rows))], -1), ids[at])

        found = self.named(self.each(padded))
        self.assertEqual((found.name, found.numbers), ("vocabulary-padded", {"rows": rows}))

    @parameterized.parameters(256, 270)
    def test_a_cut_vocabulary(self, rows):
        found = self.named(self.each(lambda logits, ids, at: losses(logits[:, :rows], ids[at])))
        self.assertEqual((found.name, found.numbers), ("vocabulary-cut", {"rows": rows}))

    def test_logits_that_were_rounded(self):
        found = self.named(
            self.each(lambda logits, ids, at: losses(logits.astype(ml_dtypes.bfloat16).astype(float), ids[at]))
        )
        self.assertEqual(found.name, "logits-bfloat16")

    def test_what_nothing_explains_is_unknown_and_what_is_not_finite_is_said(self):
        noise = np.random.default_rng(1).normal(0, 0.1, len(self.right()))
        self.assertEqual(self.named(self.right() + noise).name, "unknown")
        broken = self.right()
        broken[3] = np.nan
        self.assertEqual(self.named(broken).name, "not-finite")

    def test_means_that_are_none(self):
        right, counted = self.right(), [int(d.counted.sum()) for d in self.documents]
        ends = np.cumsum(counted)
        parts = np.split(right, ends[:-1])
        pairs = [np.concatenate(parts[a : a + 2]).mean() for a in (0, 2, 4)]
        for name, mean in {
            "sum-for-mean": right.sum(),
            "log2-for-ln": right.mean() / np.log(2),
            "perplexity": np.exp(right.mean()),
            "mean-over-ignored": right.sum() / (sum(LENGTHS) - len(LENGTHS)),
            "mean-over-padding": right.sum() / (max(LENGTHS) * len(LENGTHS)),
            "mean-of-means": np.mean(pairs),
            "last-batch-dropped": np.concatenate(parts[:4]).mean(),
        }.items():
            for given in (right, None):
                with self.subTest(name, losses=given is not None):
                    (found,) = self.verdict(given, mean).mistakes
                    self.assertIn(name, (found.name, *found.alternatives))
        own = self.each(lambda logits, ids, at: losses(logits, ids[at - 1]))
        self.assertEqual(self.verdict(mean=own.mean()).mistakes[0].name, "labels-not-shifted")
        self.assertEqual(self.verdict(right, right.mean() * 1.37).mistakes[0].name, "unknown")

    def test_losses_of_tokens_that_do_not_count_and_of_padding_in_the_mean(self):
        every = [
            losses(logits[:-1], document.ids[1:]) for document, logits in zip(self.documents, self.logits, strict=True)
        ]
        noise = np.random.default_rng(3)
        for on_left in (False, True):
            padded = np.stack(
                [
                    np.concatenate([part, noise.uniform(3, 9, max(LENGTHS) - 1 - len(part))][:: -1 if on_left else 1])
                    for part in every
                ]
            )
            with self.subTest("padding", on_left=on_left):
                self.assertTrue(self.verdict(padded, self.right().mean()).within)
                (found,) = self.verdict(padded, padded.mean()).mistakes
                self.assertEqual((found.name, found.says), ("mean-over-padding", "losses at padding are in the mean"))
        together = np.concatenate(every)
        for given in (together, self.right(), None):
            with self.subTest("ignored", given=None if given is None else len(given)):
                (found,) = self.verdict(given, together.mean()).mistakes
                said = "losses of tokens that do not count are in the mean"
                self.assertEqual((found.name, found.says), ("mean-over-ignored", said))

    def test_one_loss_for_all_tokens(self):
        self.assertIn("a placeholder", self.named(np.ones(len(self.right()))).says)
        self.assertIn("all logits are alike", self.named(np.full(len(self.right()), np.log(288))).says)
        self.assertEqual(self.verdict(mean=np.log(288)).mistakes[0].name, "uniform-loss")

    def test_a_file_without_losses_or_with_others_is_refused(self):
        for arrays, said in (
            ({"logits": np.zeros(3, np.float32)}, "holds no losses"),
            ({"losses": np.zeros(3, np.float32)}, "number of losses"),
            ({"loss": np.zeros(3, np.float32)}, "one number"),
        ):
            path = self.create_tempfile().full_path + ".safetensors"
            safetensors.numpy.save_file(arrays, path)
            with self.subTest(said), self.assertRaisesRegex(RefusedError, said):
                check(self.run_of_ours, path)


if __name__ == "__main__":
    absltest.main()
