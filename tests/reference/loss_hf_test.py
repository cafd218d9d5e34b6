"""Losses against transformers': the loop of its guide to perplexity, and its masks of what the assistant said."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.load.load_model import load_model
from apr_jax.loss import scoring
from apr_jax.loss.documents import Document, windows
from tests import paths
from tests.loss.scoring_test import MARKED

SAMPLE = paths.checkpoint("gqa_tied_bf16")
TALK = [
    {"role": "system", "content": "Sei knapp."},
    {"role": "user", "content": "Was ist 2+2? 🙂"},
    {"role": "assistant", "content": "Vier – größer als drei 🙂."},
    {"role": "user", "content": "Sicher?"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": "Ja."},
]


class LossTest(parameterized.TestCase):
    @parameterized.product(name=paths.NAMES, cut=((48, 16), (64, 64), (200, 50)))
    def test_every_token_has_transformers_loss(self, name, cut):
        length, stride = cut
        model = load_model(paths.checkpoint(name))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(paths.checkpoint(name), dtype=torch.float32)
        generator = np.random.default_rng(1)
        documents = []
        for count in (130, 17):
            ids = generator.integers(0, model.config.vocab_size, count).astype(np.int32)
            documents.append(Document("x", ids, np.arange(count) > 0))
        made = scoring.score(model, documents, list(windows(documents, length, stride)), 3)
        for document, scores in zip(documents, made, strict=True):
            expected = self.guide(theirs, document.ids, length, stride)
            np.testing.assert_array_equal(np.isnan(scores.loss), np.isnan(expected))
            np.testing.assert_allclose(scores.loss, expected, rtol=0, atol=1e-5)

    @staticmethod
    def guide(model, ids, length, stride):
        losses, previous = np.full(len(ids), np.nan), 0
        for begin in range(0, len(ids), stride):
            end = min(begin + length, len(ids))
            row = torch.tensor(ids[None, begin:end], dtype=torch.long)
            labels = row.clone()
            labels[:, : -(end - previous)] = -100
            with torch.no_grad():
                logits = model(row).logits.float()
            each = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none").numpy()
            counted = labels[0, 1:].numpy() != -100
            losses[begin + 1 : end][counted] = each[counted]
            previous = end
            if end == len(ids):
                break
        return losses

    def test_what_the_assistant_said_is_what_transformers_masks(self):
        theirs = transformers.AutoTokenizer.from_pretrained(SAMPLE)
        with open_checkpoint(SAMPLE) as checkpoint:
            ours = Tokenizer.of(checkpoint)
        settings = {"chat_template": MARKED, "return_dict": True, "return_assistant_tokens_mask": True}
        for talk in (TALK, TALK[:3], TALK[1:2]):
            expected = theirs.apply_chat_template(talk, tokenize=True, **settings)
            ids, said = ours.encode_marked_chat(talk, chat_template=MARKED)
            self.assertEqual(ids, expected["input_ids"])
            self.assertEqual([int(each) for each in said], expected["assistant_masks"], json.dumps(talk))


if __name__ == "__main__":
    absltest.main()
