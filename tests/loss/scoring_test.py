"""Losses of tokens against a NumPy forward pass in float64, over every kind of document and window."""

import json
import pathlib
import sys
import types

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.load.load_model import load_model
from apr_jax.loss import scoring
from apr_jax.loss.documents import Document, Window, of_lines, of_texts, windows
from tests import oracle, paths

SAMPLE = paths.checkpoint("gqa_tied_bf16")
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def document(length: int, seed: int) -> Document:
    ids = np.random.default_rng(seed).integers(0, 280, length).astype(np.int32)
    return Document("x", ids, np.arange(length) > 0)


def expected(ids: np.ndarray, length: int, stride: int) -> np.ndarray:
    """The loop of transformers' guide to perplexity, over the oracle's logits."""
    losses, done = np.full(len(ids), np.nan), 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        logits, _ = oracle.forward(*oracle.load(SAMPLE), ids[None, begin:end])
        shifted = logits[0, :-1] - logits[0, :-1].max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        for at in range(max(done, begin + 1), end):
            losses[at] = -log_p[at - begin - 1, ids[at]]
        done = end
        if end == len(ids):
            break
    return losses


class ScoringTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = load_model(SAMPLE)

    @parameterized.parameters((40, 20, 1), (40, 40, 3), (64, 7, 4))
    def test_each_tokens_loss_is_the_oracles_whatever_window_stride_and_batch(self, length, stride, batch):
        documents = [document(90, 0), document(1, 1), document(33, 2), document(40, 3)]
        scores = scoring.score(self.model, documents, list(windows(documents, length, stride)), batch)
        for each, made in zip(documents, scores, strict=True):
            np.testing.assert_allclose(made.loss, expected(each.ids, length, stride), rtol=0, atol=1e-5)

    def test_chunks_of_the_head_meet_without_a_seam(self):
        long = [document(scoring._CHUNK * 2 + 37, 4)]
        (made,) = scoring.score(self.model, long, [Window(0, 0, len(long[0].ids), 1)], 1)
        np.testing.assert_allclose(made.loss, expected(long[0].ids, len(long[0].ids), 9999), rtol=0, atol=1e-5)

    def test_what_is_kept_for_other_labels_and_vocabularies(self):
        documents = [document(24, 5)]
        cut = [Window(0, 0, 24, 1)]
        ids = documents[0].ids
        logits = oracle.forward(*oracle.load(SAMPLE), ids[None])[0][0]
        (made,) = scoring.score(self.model, documents, cut, 1)
        np.testing.assert_allclose(made.labels[0, 1:], logits[np.arange(23), ids[:-1]], atol=1e-4)
        np.testing.assert_allclose(made.labels[2, 1:-1], logits[np.arange(22), ids[2:]], atol=1e-4)
        self.assertTrue(np.isnan(made.labels[2, -1]))
        np.testing.assert_allclose(made.mean[1:], logits[:-1].mean(-1), atol=1e-4)
        (few,) = scoring.score(self.model, documents, cut, 1, scoring.Variant(vocabulary=281))
        np.testing.assert_allclose(few.log_total[1:], np.log(np.exp(logits[:-1, :281]).sum(-1)), atol=1e-4)
        np.testing.assert_allclose(
            scoring.logits_before(self.model, documents[0], cut[0], [3, 9]), logits[[2, 8]], atol=1e-4
        )


class InTurnTest(parameterized.TestCase):
    @parameterized.parameters(("cpu", "abc", "AaBbCc"), ("gpu", "abc", "ABaCbc"), ("gpu", "a", "Aa"), ("gpu", "", ""))
    def test_an_accelerator_has_the_next_batch_before_the_last_is_waited_for(self, platform, groups, order):
        """A capital letter is a batch given to the device, a small one its scores that arrive."""
        events = []

        def scored(model, documents, group, batch, variant):
            del model, documents, batch, variant
            events.append(group.upper())
            return tuple(np.full(3, ord(group)) for _ in scoring.Scores._fields)

        model = types.SimpleNamespace(device=types.SimpleNamespace(platform=platform))
        with mock.patch.object(scoring, "_scored", scored):
            for group, found in scoring._in_turn(model, [], iter(groups), 1, scoring.RIGHT):
                self.assertEqual([int(part[0]) for part in found], [ord(group)] * 3)
                events.append(group)
        self.assertEqual("".join(events), order)


class DocumentsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        with open_checkpoint(SAMPLE) as checkpoint:
            self.tokenizer = Tokenizer.of(checkpoint)

    def file(self, content: str | bytes) -> str:
        mode = "wb" if isinstance(content, bytes) else "w"
        return self.create_tempfile(content=content, mode=mode).full_path

    def test_what_the_template_marks_is_what_counts_to_the_character(self):
        talk = [
            {"role": "user", "content": "Was ist 2+2?"},
            {"role": "assistant", "content": "Vier – größer als drei."},
            {"role": "user", "content": "Sicher?"},
            {"role": "assistant", "content": "Ja."},
        ]
        (found,) = of_lines(self.file(json.dumps({"messages": talk}) + "\n\n"), self.tokenizer, MARKED)
        ids, said = found.ids.tolist(), found.counted
        runs = np.flatnonzero(np.diff(np.concatenate([[0], said, [0]])))
        texts = [self.tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in runs.reshape(-1, 2)]
        self.assertEqual(texts, ["Vier – größer als drei.<|im_end|>", "Ja.<|im_end|>"])

    def test_a_template_without_marks_is_refused_and_the_way_past_it_is_said(self):
        line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        with self.assertRaisesRegex(RefusedError, "--chat-template"):
            of_lines(self.file(line), self.tokenizer, None)

    def test_labels_that_are_ignored_do_not_count_and_others_are_the_tokens(self):
        (found,) = of_lines(self.file('{"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]}'), None)
        self.assertEqual(found.counted.tolist(), [False, False, True, True])
        for line, said in (
            ('{"input_ids": [5, 6], "labels": [6, -100]}', "shifts them itself"),
            ('{"input_ids": [5, 6], "labels": [5]}', "number of labels"),
            ('{"input_ids": [5, true]}', "not integers"),
            ('{"prompt": "a"}', "holds nothing that"),
            ('["a"]', "holds nothing that"),
        ):
            with self.subTest(line), self.assertRaisesRegex(BrokenContainerError, said):
                of_lines(self.file(line), None)

    def test_a_text_has_its_bytes_and_one_that_is_not_utf8_says_where(self):
        (found,) = of_texts([self.file("größer")], self.tokenizer)
        self.assertEqual(found.size, 8)
        self.assertEqual(self.tokenizer.decode(found.ids), "größer")
        with self.assertRaises(BrokenContainerError) as caught:
            of_texts([self.file(b"ab\xff")], self.tokenizer)
        self.assertEqual(caught.exception.offset, 2)


if __name__ == "__main__":
    absltest.main()
