"""Losses of a text of 100,000 tokens against transformers', token by token, whatever window, batch and padding.

At a few tokens the model itself is ill-conditioned (queries of length 148 meet keys that are nearly as good as each
other): there float32 in another order of summation may be off by more than the bound. What the same code makes of them
in float64 says how much, and a mistake of ours, which float64 has too, is none of that.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.load.load_model import load_model
from apr_jax.loss import scoring
from apr_jax.loss.documents import Document, windows
from apr_jax.model.language_model import LanguageModel
from apr_jax.trace import hf_reference
from tests import paths

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)
import torch

SAMPLE = paths.checkpoint("gqa_tied_bf16")
TOKENS, BOUND = 100_000, 1e-5
MOST_BEYOND = 10
"""Tokens that may be off by more, each by no more than twice our own error in float32."""
AT_ONCE = 16  # windows, on transformers' side


def text() -> str:
    """This repository's own pages and sources, as many as are needed."""
    files = [paths.ROOT / "README.md", *sorted((paths.ROOT / "docs").glob("*.md"))]
    return "\n".join(path.read_text() for path in [*files, *sorted((paths.ROOT / "apr_jax").glob("*/*.py"))])


class LongTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with open_checkpoint(SAMPLE) as checkpoint:
            ids = Tokenizer.of(checkpoint).encode(text()[: 3 * TOKENS])
        cls.ids = np.asarray(ids[:TOKENS], np.int32)
        assert len(cls.ids) == TOKENS
        cls.model, cls.theirs = load_model(SAMPLE), hf_reference.load(SAMPLE)

    def torchs(self, ids: np.ndarray, length: int, stride: int) -> np.ndarray:
        """The guide's windows, those of one length at once; [N], NaN where no window predicts a token."""
        losses, done, rows = np.full(len(ids), np.nan, np.float32), 0, []
        for begin in range(0, len(ids), stride):
            end = min(begin + length, len(ids))
            rows.append((begin, end, max(done, begin + 1)))
            done = end
            if end == len(ids):
                break
        whole = [row for row in rows if row[1] - row[0] == length]
        groups = [whole[at : at + AT_ONCE] for at in range(0, len(whole), AT_ONCE)]
        for group in [*groups, *([row] for row in rows if row not in whole)]:
            batch = torch.tensor(np.stack([ids[begin:end] for begin, end, _ in group]).astype(np.int64))
            with torch.inference_mode():
                logits = self.theirs(batch, use_cache=False).logits.float()
            each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
            for row, (begin, end, first) in zip(each.numpy(), group, strict=True):
                losses[first:end] = row[first - begin - 1 :]
        return losses

    @parameterized.parameters((256, 128, 16), (256, 256, 7), (512, 384, 3))
    def test_one_document(self, length, stride, batch):
        documents = [Document("x", self.ids, np.arange(TOKENS) > 0)]
        expected = self.torchs(self.ids, length, stride)
        self.equal(documents, (length, stride, batch), expected, f"window {length}, stride {stride}, batch {batch}")

    def test_many_documents_in_padded_batches(self):
        ends = np.sort(np.random.default_rng(0).choice(np.arange(1, TOKENS), 300, replace=False))
        parts = np.split(self.ids, ends)
        documents = [Document("x", part, np.arange(len(part)) > 0) for part in parts]
        expected = np.concatenate([self.torchs(part, 256, 128) for part in parts])
        self.equal(documents, (256, 128, 12), expected, f"{len(parts)} documents, padded")

    def equal(self, documents: list[Document], how: tuple[int, int, int], theirs: np.ndarray, what: str) -> None:
        length, stride, batch = how

        def losses(model: LanguageModel) -> np.ndarray:
            made = scoring.score(model, documents, list(windows(documents, length, stride)), batch)
            return np.concatenate([each.loss for each in made])

        ours = losses(self.model)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        scored = ~np.isnan(theirs)
        self.assertGreater(scored.sum(), 0.99 * TOKENS)
        off = np.where(scored, np.abs(ours - theirs), 0)
        beyond = np.flatnonzero(off > BOUND)
        print(
            f"{what}: {scored.sum()} losses, mean {np.mean(theirs[scored]):.4f}, largest difference {off.max():.1e},",
            end=" ",
        )
        print(f"{len(beyond)} beyond {BOUND}")
        self.assertLessEqual(len(beyond), MOST_BEYOND)
        if len(beyond):
            own = np.abs(ours - losses(load_model(SAMPLE, "float64")))[beyond]
            print(
                *(
                    f"token {at}: off by {off[at]:.1e}, ours from float64 {each:.1e}"
                    for at, each in zip(beyond, own, strict=True)
                )
            )
            self.assertTrue((off[beyond] <= 2 * own).all())


if __name__ == "__main__":
    absltest.main()
