"""The command as a user runs it: what it prints, writes and returns."""

import json
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest

from apr_jax.loss import summary
from tests import oracle, paths, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")


class LossCommandTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        (self.folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n")
        (self.folder / "b.py").write_text("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n")

    def ran(self, *args, code=0):
        return tool.ran(self, "loss", SAMPLE, *args, code=code, cwd=self.folder)

    def test_each_file_and_all_beside_uniform_and_what_is_written_checks(self):
        done = self.ran("--text", "a.txt", "b.py", "--json", "--per-token", "l.safetensors")
        result = json.loads(done.stdout)
        written = safetensors.numpy.load_file(self.folder / "l.safetensors")
        ids, at = written["input_ids"], written["document"]
        taken = []
        for number in (0, 1):
            row = ids[at == number]
            logits = oracle.forward(*oracle.load(SAMPLE), row[None])[0][0, :-1]
            expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, row[1:, None], 1)[:, 0]
            np.testing.assert_allclose(written["losses"][at == number][1:], expected, atol=1e-5)
            self.assertAlmostEqual(result["documents"][number]["loss_nats"], expected.mean(), delta=1e-5)
            taken.append(expected)
        mean = np.concatenate(taken).mean()
        size = sum((self.folder / name).stat().st_size for name in ("a.txt", "b.py"))
        self.assertAlmostEqual(result["loss_nats"], mean, delta=1e-5)
        self.assertAlmostEqual(result["perplexity"], math.exp(mean), delta=1e-2)
        self.assertAlmostEqual(result["bits_per_byte"], sum(map(np.sum, taken)) / math.log(2) / size, delta=1e-5)
        self.assertAlmostEqual(result["uniform_bits"], math.log2(288))
        shown = self.ran("--text", "a.txt", "b.py", "--check", "l.safetensors")
        self.assertIn("8.1699", shown.stdout, "uniform in bits")
        self.assertIn("agree", shown.stdout)
        self.assertIn("above uniform", shown.stderr, "this checkpoint was never trained")

    def test_another_engines_mistake_is_named_and_ends_with_1(self):
        self.ran("--text", "a.txt", "--per-token", "l.safetensors")
        losses = safetensors.numpy.load_file(self.folder / "l.safetensors")["losses"][1:]
        safetensors.numpy.save_file({"losses": losses / np.float32(math.log(2))}, self.folder / "bits.safetensors")
        done = self.ran("--text", "a.txt", "--check", "bits.safetensors", code=1)
        self.assertIn("log2-for-ln", done.stdout)
        found = json.loads(self.ran("--text", "a.txt", "--check", "bits.safetensors", "--json", code=1).stdout)
        self.assertEqual([mistake["name"] for mistake in found["check"]["mistakes"]], ["log2-for-ln"])
        self.assertFalse(found["check"]["within"])

    def test_corpora_that_say_nothing_are_said(self):
        (self.folder / "same.json").write_text(json.dumps([[7] * 60 + [8]]))
        self.assertIn("nearly constant", self.ran("--input-ids", "same.json").stderr)
        corpus = summary.Corpus(unknown=0.4, distinct=3, never_seen=0.9, most_frequent=1, its_share=0.4)
        (said,) = summary.oddities(summary.Loss(10, 9, 9.0, None), corpus, 288)
        self.assertIn("40.00% of the tokens are the tokenizer's unknown token", said)

    def test_token_ids_need_no_tokenizer_that_works_and_text_does(self):
        for file in SAMPLE.iterdir():
            (self.folder / "hf" / file.name).parent.mkdir(exist_ok=True)
            (self.folder / "hf" / file.name).write_bytes(file.read_bytes())
        (self.folder / "hf" / "tokenizer.json").write_text("{")
        (self.folder / "ids.json").write_text("[[5, 6, 7]]")
        (self.folder / "ids.jsonl").write_text('{"input_ids": [5, 6, 7]}')
        for args in (("--input-ids", "ids.json"), ("--jsonl", "ids.jsonl")):
            done = tool.ran(self, "loss", "hf", *args, cwd=self.folder)
            self.assertIn("warning: there is no text, token ids alone", done.stderr)
        tool.ran(self, "loss", "hf", "--text", "a.txt", code=4, cwd=self.folder)

    def test_mistakes_are_one_line_with_their_exit_code(self):
        (self.folder / "empty.txt").write_text("")
        (self.folder / "out.json").write_text("[[5, 288]]")
        (self.folder / "l.safetensors").write_bytes(b"mine")
        for args, code, said in (
            ((), 2, "required"),
            (("--text", "a.txt", "--window", 1), 2, "at least 2"),
            (("--text", "a.txt", "--window", 8, "--stride", 9), 2, "left out"),
            (("--text", "empty.txt"), 2, "nothing to compute a loss over"),
            (("--text", "none.txt"), 3, "no such file"),
            (("--input-ids", "out.json"), 2, "beyond the vocabulary"),
            (("--text", "a.txt", "--per-token", "l.safetensors"), 2, "output exists"),
            (("--text", "a.txt", "--chat-template", "x"), 2, "--jsonl"),
            (("--text", "a.txt", "--dtype", "int8"), 2, "dtype"),
        ):
            with self.subTest(said):
                lines = self.ran(*args, code=code).stderr.strip().splitlines()
                self.assertIn(said, lines[-1])
        self.assertEqual((self.folder / "l.safetensors").read_bytes(), b"mine")


if __name__ == "__main__":
    absltest.main()
