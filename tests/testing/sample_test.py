"""The sample checkpoints: same bytes from the same seed, the statistics they claim, complete, working tokenizers."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import safetensors
import tokenizers
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from apr_jax.commands import make_sample  # noqa: E402
from apr_jax.converters.checkpoint import qwen2  # noqa: E402
from apr_jax.converters.checkpoint.openers import open_checkpoint  # noqa: E402
from apr_jax.converters.errors import UsageError  # noqa: E402
from apr_jax.testing import sample  # noqa: E402

CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"
HALF = sample.SAMPLES["qwen2_0.5b"]


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _drawn(entry: sample.Sample, name: str, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(sample.draw(entry, name, seed)))


class SampleTest(parameterized.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.scratch = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    @parameterized.parameters(*sample.TINY)
    def test_the_committed_folder_is_byte_for_byte_what_the_generator_writes(self, name: str) -> None:
        sizes = sample.write_sample(name, self.scratch / name)
        written, committed = _files(self.scratch / name), _files(CHECKPOINTS / name)
        self.assertEqual(list(written), list(committed))
        for file, content in committed.items():
            self.assertEqual(written[file], content, file)
        self.assertEqual(sizes, {file: len(content) for file, content in committed.items()})
        self.assertLess(sum(sizes.values()), 300_000)

    def test_another_seed_changes_every_tensor_and_no_side_file(self) -> None:
        first, second = self.scratch / "0", self.scratch / "1"
        for seed, folder in enumerate((first, second)):
            sample.write_sample("gqa_tied_bf16", folder, seed=seed)
        for file in _files(first):
            same = (first / file).read_bytes() == (second / file).read_bytes()
            self.assertEqual(same, file != "model.safetensors", file)
        with open_checkpoint(first) as a, open_checkpoint(second) as b:
            for name in a.tensors:
                self.assertNotEqual(a.tensors[name].raw(), b.tensors[name].raw(), name)

    def test_values_do_not_depend_on_the_size_of_the_pieces(self) -> None:
        entry = sample.SAMPLES["odd_sizes"]
        name = "model.layers.1.self_attn.k_proj.weight"
        whole = _drawn(entry, name)
        with mock.patch.object(sample, "_PIECE", 3 * entry.config.hidden_size + 5):
            pieces = list(sample.draw(entry, name))
        self.assertLen(pieces, 8)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)

    @parameterized.parameters(*sample.TINY)
    def test_tensors_are_those_of_the_configuration_in_the_declared_dtypes(self, name: str) -> None:
        entry = sample.SAMPLES[name]
        config = qwen2.Qwen2Config.from_hf(json.loads((CHECKPOINTS / name / "config.json").read_text()))
        self.assertEqual(config, entry.config)
        found = {}
        for path in sorted((CHECKPOINTS / name).glob("*.safetensors")):
            for tensor, content in safetensors.deserialize(path.read_bytes()):
                self.assertNotIn(tensor, found)
                found[tensor] = (tuple(content["shape"]), content["dtype"].lower())
        shapes = config.tensor_shapes()
        self.assertEqual(found, {tensor: (shape, entry.dtype(tensor).name) for tensor, shape in shapes.items()})
        self.assertLen(list((CHECKPOINTS / name).glob("*.safetensors")), entry.shards)

    @parameterized.parameters(*sample.TINY)
    def test_the_stored_values_are_the_drawn_ones_rounded_once(self, name: str) -> None:
        with open_checkpoint(CHECKPOINTS / name) as checkpoint:
            for tensor, stored in checkpoint.tensors.items():
                drawn = _drawn(sample.SAMPLES[name], tensor)
                np.testing.assert_array_equal(stored.read(), drawn.astype(stored.dtype.numpy), tensor)

    def test_every_committed_checkpoint_differs_from_the_others_in_something_that_matters(self) -> None:
        entries = [sample.SAMPLES[name] for name in sample.TINY]
        self.assertLen({(e.config.num_heads, e.config.num_kv_heads, e.config.head_dim) for e in entries}, len(entries))
        self.assertEqual({e.matrix_dtype for e in entries}, {"bf16", "f16", "f32"})
        self.assertEqual({e.shards for e in entries}, {1, 2, 3})
        self.assertEqual({e.config.tie_word_embeddings for e in entries}, {True, False})
        self.assertEqual({e.config.rms_norm_eps for e in entries}, {1e-5, 1e-6})
        self.assertGreater(len({e.config.rope_theta for e in entries}), 2)

    @parameterized.parameters(
        ("qwen2_0.5b", 290, 494_032_768), ("qwen2_1.5b", 338, 1_543_714_304), ("qwen2_7b", 339, 7_615_616_512)
    )
    def test_the_published_shapes_have_the_published_counts(self, name: str, tensors: int, parameters: int) -> None:
        shapes = sample.SAMPLES[name].config.tensor_shapes()
        self.assertLen(shapes, tensors)
        self.assertEqual(sum(int(np.prod(shape)) for shape in shapes.values()), parameters)

    def test_large_tensors_come_in_small_pieces(self) -> None:
        for piece in itertools.islice(sample.draw(sample.SAMPLES["qwen2_7b"], qwen2.EMBEDDING), 3):
            self.assertLessEqual(piece.nbytes, 4 << 20)
            self.assertEqual(piece.shape[1], 3584)


class StatisticsTest(parameterized.TestCase):
    """What was reported for Qwen2.5-Coder-0.5B, on the 0.5B shape."""

    def test_embedding(self) -> None:
        rows = np.concatenate(list(itertools.islice(sample.draw(HALF, qwen2.EMBEDDING), 4)))
        self.assertAlmostEqual(float(rows.std()), 0.0152, delta=1e-4)
        self.assertAlmostEqual(float(rows.mean()), 0.0, delta=1e-4)

    def test_final_norm(self) -> None:
        values = _drawn(HALF, qwen2.FINAL_NORM)
        self.assertAlmostEqual(float(values.mean()), 7.46, delta=0.1)
        self.assertAlmostEqual(float(values.std()), 0.84, delta=0.05)
        self.assertAlmostEqual(float(values.min()), -2.28, places=5)
        self.assertAlmostEqual(float(values.max()), 17.38, places=5)

    def test_query_bias_of_layer_0(self) -> None:
        values = _drawn(HALF, "model.layers.0.self_attn.q_proj.bias")
        self.assertAlmostEqual(float(values.std()), 7.88, delta=0.4)
        self.assertEqual((values.min(), values.max()), (-65.5, 128.0))

    @parameterized.parameters(*sample.TINY)
    def test_the_tiny_ones_have_the_large_bias_and_norm_too(self, name: str) -> None:
        entry = sample.SAMPLES[name]
        bias = _drawn(entry, "model.layers.0.self_attn.q_proj.bias")
        self.assertEqual((bias.min(), bias.max()), (-65.5, 128.0))
        norm = _drawn(entry, qwen2.FINAL_NORM)
        self.assertBetween(float(norm.mean()), 7.1, 7.8)
        self.assertAlmostEqual(float(_drawn(entry, qwen2.EMBEDDING).std()), 0.0152, delta=4e-4)

    def test_the_unit_values_are_nearly_normal(self) -> None:
        values = sample._normal(sample._stream("x", 0), 1_000_000).astype(np.float64)
        self.assertAlmostEqual(values.mean(), 0.0, delta=5e-3)
        self.assertAlmostEqual(values.std(), 1.0, delta=2e-3)
        self.assertAlmostEqual((values**4).mean(), 2.7, delta=0.02)
        self.assertLess(abs(values).max(), np.sqrt(12.0) + 1e-6)

    def test_no_key_dimension_meets_a_large_query_bias_at_full_strength(self) -> None:
        config = sample.SAMPLES["gqa_tied_bf16"].config
        name = "model.layers.0.self_attn.k_proj.weight"
        bias = _drawn(sample.SAMPLES["gqa_tied_bf16"], "model.layers.0.self_attn.q_proj.bias")
        scale = sample._key_scale(config, name, 0).reshape(config.num_kv_heads, config.head_dim)
        heads = abs(bias).reshape(config.num_heads, config.head_dim)
        for head in range(config.num_heads):
            product = heads[head] * scale[head // (config.num_heads // config.num_kv_heads)]
            self.assertLessEqual(float(product.max()), 4.0 + 1e-5)
        self.assertLess(scale.min(), 4.1 / 128)


class TokenizerTest(parameterized.TestCase):
    TEXT = "The tea, häße 漢字 🙂 12345\n\tdon't   stop\r\n\0\x7f"

    def _check(self, texts: dict[str, str], entries: int, added: int) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(texts["tokenizer.json"])
        self.assertEqual(tokenizer.get_vocab_size(with_added_tokens=False), entries)
        self.assertEqual(tokenizer.get_vocab_size(), entries + added)
        self.assertEqual(sorted(tokenizer.get_vocab().values()), list(range(entries + added)))
        self.assertEqual(json.loads(texts["vocab.json"]), tokenizer.get_vocab(with_added_tokens=False))
        merges = texts["merges.txt"].splitlines()[1:]
        self.assertEqual(merges, json.loads(texts["tokenizer.json"])["model"]["merges"])
        self.assertLen(merges, entries - 256)
        ids = tokenizer.encode(self.TEXT).ids
        self.assertEqual(tokenizer.decode(ids, skip_special_tokens=False), self.TEXT)
        self.assertLess(len(tokenizer.encode("the tea the tea the tea").ids), 18)  # merges apply
        end = tokenizer.token_to_id("<|im_end|>")
        self.assertEqual(tokenizer.encode("<|im_end|>").ids, [end])
        generation = json.loads(texts["generation_config.json"])
        self.assertEqual(generation["eos_token_id"], [end, tokenizer.token_to_id("<|endoftext|>")])
        decoder = json.loads(texts["tokenizer_config.json"])["added_tokens_decoder"]
        self.assertEqual(
            {int(i): t["content"] for i, t in decoder.items()},
            {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()},
        )
        return tokenizer

    @parameterized.parameters(*sample.TINY)
    def test_small_tokenizer_round_trips_and_fits_the_vocabulary(self, name: str) -> None:
        texts = {
            path.name: path.read_text() for path in (CHECKPOINTS / name).iterdir() if path.suffix != ".safetensors"
        }
        tokenizer = self._check(texts, 280, 3)
        self.assertLessEqual(tokenizer.get_vocab_size(), sample.SAMPLES[name].config.vocab_size)

    def test_full_tokenizer_has_the_published_numbers_and_round_trips(self) -> None:
        texts = sample.side_files(HALF, "full")
        tokenizer = self._check(texts, 151643, 22)
        self.assertEqual(tokenizer.token_to_id("<|endoftext|>"), 151643)
        self.assertEqual(json.loads(texts["config.json"])["eos_token_id"], 151643)

    def test_chat_template_puts_each_message_between_its_marks(self) -> None:
        try:
            import jinja2
        except ImportError:
            self.skipTest("jinja2 is not installed")
        config = json.loads((CHECKPOINTS / "gqa_tied_bf16" / "tokenizer_config.json").read_text())
        text = jinja2.Template(config["chat_template"]).render(
            messages=[{"role": "user", "content": "the tea"}], add_generation_prompt=True
        )
        self.assertEqual(
            text,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nthe tea<|im_end|>\n<|im_start|>assistant\n",
        )


class RefusalTest(absltest.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.scratch = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with self.assertRaisesRegex(UsageError, "qwen2_0.5b") as caught:
            sample.write_sample("qwen3", self.scratch / "x")
        self.assertEqual(caught.exception.code, "sample-unknown")

    def test_a_tokenizer_that_does_not_fit_is_refused_and_nothing_is_written(self) -> None:
        with self.assertRaises(UsageError) as caught:
            sample.write_sample("odd_sizes", self.scratch / "x", tokenizer="full")
        self.assertEqual(caught.exception.code, "tokenizer-too-large")
        self.assertEmpty(list(self.scratch.iterdir()))

    def test_an_existing_output_is_refused_and_force_replaces_it_whole(self) -> None:
        sample.write_sample("mixed_dtypes", self.scratch / "x")
        with self.assertRaises(UsageError):
            sample.write_sample("mqa_f16", self.scratch / "x")
        self.assertEqual(_files(self.scratch / "x"), _files(CHECKPOINTS / "mixed_dtypes"))
        sample.write_sample("mqa_f16", self.scratch / "x", force=True)
        self.assertEqual(_files(self.scratch / "x"), _files(CHECKPOINTS / "mqa_f16"))

    def test_the_script_writes_from_any_folder_and_overwrites_nothing(self) -> None:
        command = [sys.executable, str(ROOT / "tools" / "make_sample.py"), "odd_sizes", "-o", "here", "--json"]
        done = subprocess.run(command, cwd=self.scratch, capture_output=True, text=True, check=True)
        sizes = {file: len(content) for file, content in _files(self.scratch / "here").items()}
        self.assertEqual(json.loads(done.stdout)["files"], sizes)
        self.assertEqual(_files(self.scratch / "here"), _files(CHECKPOINTS / "odd_sizes"))
        again = subprocess.run(command, cwd=self.scratch, capture_output=True, text=True)
        self.assertEqual(again.returncode, 2)
        self.assertNotIn("Traceback", again.stderr)
        self.assertEqual(json.loads(again.stdout)["error"]["code"], "output-exists")

    def test_list_names_every_sample(self) -> None:
        with mock.patch("sys.stdout", io.StringIO()) as printed:
            self.assertEqual(make_sample.main(make_sample.parse(["make_sample", "--list"])), 0)
        self.assertEqual([line.split()[0] for line in printed.getvalue().splitlines()], ["name", *sample.SAMPLES])


if __name__ == "__main__":
    absltest.main()
