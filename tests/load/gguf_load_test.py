"""GGUF files as llama.cpp has them: the model, the tokenizer and the chat template that they were made from."""

import json
import pathlib
import shutil

import gguf
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import MissingFileError, RefusedError
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.load.load_model import load_model
from apr_jax.trace.inputs import Inputs
from tests import gguf_files, packers

DATA = pathlib.Path(__file__).parents[1] / "data"
BASE = DATA / "checkpoints" / "gqa_tied_bf16"
_IDS = np.random.default_rng(3).integers(0, 280, (2, 24))


class GgufTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.create_tempdir().full_path)
        self.path = self.root / "model.gguf"

    @parameterized.parameters("Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "F32")
    def test_field_logits_are_those_of_what_gguf_decodes(self, kind):
        """FIELD Forms: a GGUF file of Qwen2 (Q8_0, Q4_0, Q5_1, F16, BF16, F32) -> logits of the decoded weights"""
        values = gguf_files.write(BASE, self.path, kind)
        packers.dense_checkpoint(BASE, self.root / "dense", values)
        with open_checkpoint(self.path) as checkpoint:
            self.assertEqual(set(checkpoint.tensors), set(values))
            for name, tensor in checkpoint.tensors.items():
                np.testing.assert_array_equal(tensor.read().astype("f4"), values[name], name)
        found, wanted = (
            np.asarray(load_model(path, "float32", "cpu").logits(Inputs.of(_IDS)))
            for path in (self.path, self.root / "dense")
        )
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    def test_field_configuration_from_the_metadata(self):
        """FIELD Forms: a GGUF's metadata -> the configuration of the model it was made from"""
        for base in ("gqa_tied_bf16", "gqa_untied_bf16", "mqa_f16", "head_dim_given"):
            path = self.root / f"{base}.gguf"
            gguf_files.write(DATA / "checkpoints" / base, path, "F32")
            with open_checkpoint(path) as made, open_checkpoint(DATA / "checkpoints" / base) as original:
                self.assertEqual(made.model_config(), original.model_config(), base)

    def test_field_the_tokenizer_and_the_template_come_along(self):
        """FIELD Forms: a GGUF's tokenizer -> the ids and chats of the checkpoint it was made from"""
        gguf_files.write(BASE, self.path)
        with open_checkpoint(self.path) as made, open_checkpoint(BASE) as original:
            ours, theirs = Tokenizer.of(made), Tokenizer.of(original)
        for text in (
            "Hello, world!\n\n  12345 don't",
            "日本語 и русский 🙂",
            "<|im_start|>user\nHi<|im_end|>",
            " ",
            "",
        ):
            self.assertEqual(ours.encode(text), theirs.encode(text), text)
            self.assertEqual(ours.decode(ours.encode(text)), theirs.decode(theirs.encode(text)), text)
        self.assertEqual(ours.chat_template, theirs.chat_template)
        messages = [{"role": "user", "content": "Hi"}]
        self.assertEqual(ours.apply_chat_template(messages), theirs.apply_chat_template(messages))

    def test_field_dequantised_into_a_folder(self):
        """FIELD Forms: convert GGUF --to safetensors --dequantise -> a HuggingFace folder, tokenizer included"""
        values = gguf_files.write(BASE, self.path, "Q8_0")
        convert(self.path, self.root / "hf", to="safetensors", dequantise=True)
        for name, tensor in packers.read(self.root / "hf" / "model.safetensors").items():
            np.testing.assert_array_equal(tensor, values[name], name)
        self.assertEqual(json.loads((self.root / "hf" / "config.json").read_text())["model_type"], "qwen2")
        self.assertTrue((self.root / "hf" / "tokenizer.json").exists())
        with self.assertRaisesRegex(RefusedError, "--dequantise"):
            convert(self.path, self.root / "as_it_is", to="safetensors")

    def test_plain_types_are_carried_over_bit_for_bit(self):
        gguf_files.write(BASE, self.path, "BF16")
        convert(self.path, self.root / "m.apr", to="apr")
        base = packers.read(BASE / "model.safetensors")
        with open_checkpoint(self.root / "m.apr") as checkpoint:
            for name, tensor in checkpoint.tensors.items():
                if tensor.dtype.name == "bf16":
                    self.assertEqual(tensor.raw(), base[name].tobytes(), name)
            checkpoint.model_config()

    def test_another_architecture_keeps_its_names_and_is_refused_as_a_model(self):
        gguf_files.write(BASE, self.path, architecture="llama")
        with open_checkpoint(self.path) as checkpoint:
            self.assertIn("blk.0.attn_q.weight", checkpoint.tensors)
            self.assertIn("'llama'", " ".join(checkpoint.warnings))
            with self.assertRaisesRegex(RefusedError, "llama"):
                checkpoint.model_config()

    def test_scaling_and_a_tokenizer_that_is_not_qwen2s_are_said(self):
        def add(writer):
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(64)

        gguf_files.write(BASE, self.path, add=add, pre="llama-bpe")
        with open_checkpoint(self.path) as checkpoint:
            config = json.loads(checkpoint.files["config.json"])
            self.assertEqual(
                config["rope_scaling"], {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
            )
            self.assertIn("the rules 'llama-bpe'", " ".join(checkpoint.warnings))
            self.assertNotIn("tokenizer.json", checkpoint.files)

    def test_special_tokens_are_told_by_their_spelling_where_no_kinds_are_written(self):
        found = []
        for types in (True, False):
            gguf_files.write(BASE, self.path, types=types)
            with open_checkpoint(self.path) as checkpoint:
                found.append(json.loads(checkpoint.files["tokenizer_config.json"])["added_tokens_decoder"])
        self.assertEqual(*found)
        self.assertIn("<|im_start|>", [token["content"] for token in found[0].values()])

    def test_chat_templates_with_names(self):
        named = {"tool_use": "{{ 'tools' }}", "rag": "{{ 'texts' }}"}

        def add(writer):
            writer.add_array("tokenizer.chat_templates", list(named))
            for name, template in named.items():
                writer.add_string(f"tokenizer.chat_template.{name}", template)
            if "tokenizer.chat_template" not in writer.kv_data[0]:
                writer.add_chat_template("{{ 'default' }}")

        gguf_files.write(BASE, self.path, add=add)
        with open_checkpoint(self.path) as checkpoint:
            templates = json.loads(checkpoint.files["tokenizer_config.json"])["chat_template"]
        self.assertEqual([template["name"] for template in templates], ["default", *named])
        self.assertEqual([template["template"] for template in templates[1:]], list(named.values()))

    def test_without_a_chat_template_there_is_none(self):
        base = self.root / "base"
        shutil.copytree(BASE, base)
        config = json.loads((base / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (base / "tokenizer_config.json").write_text(json.dumps(config))
        gguf_files.write(base, self.path)
        with open_checkpoint(self.path) as checkpoint:
            self.assertNotIn("chat_template", json.loads(checkpoint.files["tokenizer_config.json"]))

    def test_a_part_of_a_split_file_is_missed(self):
        values = packers.read(BASE / "model.safetensors")
        paths = [self.root / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
        for number, path in enumerate(paths):
            writer = gguf.GGUFWriter(path, "qwen2")
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            for name in sorted(values)[number::2]:
                writer.add_tensor(gguf_files.gguf_name(name), values[name].astype(np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        for path in paths:
            with open_checkpoint(path) as checkpoint:
                self.assertEqual(set(checkpoint.tensors), set(values))
        paths[1].unlink()
        with self.assertRaisesRegex(MissingFileError, "00002-of"):
            open_checkpoint(paths[0])


if __name__ == "__main__":
    absltest.main()
