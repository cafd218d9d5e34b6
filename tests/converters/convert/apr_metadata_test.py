"""What an `.apr` says about its model: keys, order, spelling, tokenizer."""

import base64
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.convert import apr_metadata
from apr_jax.converters.errors import BrokenContainerError
from apr_jax.converters.formats import strict_json

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": [6, 5],
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "added_tokens": [{"id": 5, "content": "<|endoftext|>"}, {"id": 6, "content": "<|im_end|>"}],
}
# The order of apr-v2-format section 3.1.
ORDER = """model_type name license data_source data_license original_format total_size param_count architecture
hf_architecture hf_model_type hidden_size num_layers num_heads num_kv_heads vocab_size intermediate_size
max_position_embeddings rope_theta rope_type rms_norm_eps head_dim""".split()
# Spellings that the engine takes for another name of a typed key (section 3.4).
ALIASES = """hidden_dim d_model n_embd n_layers num_hidden_layers n_layer n_heads num_attention_heads n_head n_kv_heads
num_key_value_heads n_vocab ffn_dim intermediate_dim n_inner max_seq_len context_length n_ctx layer_norm_eps
norm_eps""".split()


def build(config=CONFIG, files=None, source_metadata=None, warnings=None):
    model = None if config is None else Qwen2Config.from_hf(config)
    return apr_metadata.from_huggingface(
        config,
        model,
        {"tokenizer.json": json.dumps(TOKENIZER).encode()} if files is None else files,
        source_metadata or {},
        name="tiny",
        param_count=123,
        total_size=246,
        warnings=[] if warnings is None else warnings,
    )


class TypedFieldsTest(parameterized.TestCase):
    def test_text_is_aprs_order_and_spelling(self):
        text = strict_json.dumps(build(CONFIG | {"head_dim": 4}, source_metadata={"format": "pt"})).decode()
        self.assertStartsWith(
            text,
            '{"model_type":"Qwen2","name":"tiny","license":null,"data_source":null,"data_license":null,'
            '"original_format":"safetensors","total_size":246,"param_count":123,"architecture":"qwen2",'
            '"hf_architecture":"Qwen2ForCausalLM","hf_model_type":"qwen2","hidden_size":8,"num_layers":1,"num_heads":2,'
            '"num_kv_heads":1,"vocab_size":8,"intermediate_size":12,"max_position_embeddings":64,'
            '"rope_theta":1000000.0,"rope_type":2,"rms_norm_eps":0.000001,"head_dim":4,"source_metadata":{"format":"pt"},',
        )

    def test_head_dim_stands_only_where_config_has_it(self):
        self.assertEqual(list(build())[: len(ORDER) - 1], ORDER[:-1])
        self.assertNotIn("head_dim", build())

    def test_no_alias_of_a_typed_key_stands_at_top_level(self):
        self.assertEqual(set(build(CONFIG | {"head_dim": 4})) & set(ALIASES), set())

    def test_rope_theta_comes_from_the_nested_spelling_too(self):
        config = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
        nested = build(config | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
        self.assertEqual(nested["rope_theta"], 5e5)

    def test_untied_heads_are_not_called_tied(self):
        self.assertTrue(build()["tied_embeddings"])
        self.assertNotIn("tied_embeddings", build(CONFIG | {"tie_word_embeddings": False}))

    def test_without_config_there_is_no_architecture(self):
        found = build(None)
        self.assertEqual(found["model_type"], "")
        self.assertNotIn("architecture", found)
        self.assertNotIn("tokenizer.vocabulary", found)


class TokenizerTest(parameterized.TestCase):
    def test_vocabulary_is_by_id_with_added_tokens_and_holes_filled(self):
        found = build()
        self.assertEqual(
            found["tokenizer.vocabulary"], ["a", "b", "ab", "<unk>", "<unk>", "<|endoftext|>", "<|im_end|>", "<unk>"]
        )
        self.assertEqual(found["tokenizer.vocab_size"], 8)
        self.assertEqual(found["tokenizer.merges"], ["a b"])
        self.assertEqual(found["tokenizer.model_type"], "BPE")

    def test_of_several_ends_the_first_is_written(self):
        self.assertEqual(build()["tokenizer.eos_token_id"], 6)
        self.assertEqual(build()["tokenizer.bos_token_id"], 5)
        self.assertNotIn("tokenizer.bos_token_id", build(CONFIG | {"bos_token_id": None}))

    def test_a_vocabulary_larger_than_the_embedding_is_kept_whole(self):
        tokenizer = TOKENIZER | {"added_tokens": [{"id": 11, "content": "x"}]}
        self.assertLen(build(files={"tokenizer.json": json.dumps(tokenizer).encode()})["tokenizer.vocabulary"], 12)

    def test_merges_may_be_pairs(self):
        tokenizer = TOKENIZER | {"model": TOKENIZER["model"] | {"merges": [["a", "b"]]}}
        self.assertEqual(build(files={"tokenizer.json": json.dumps(tokenizer).encode()})["tokenizer.merges"], ["a b"])

    def test_vocab_json_and_merges_txt_serve_where_there_is_no_tokenizer_json(self):
        files = {
            "vocab.json": b'{"a":0,"b":1,"ab":2}',
            "merges.txt": b"#version: 0.2\na b\n",
            "added_tokens.json": b'{"<|endoftext|>":5,"<|im_end|>":6}',
        }
        expected, found = build(), build(files=files)
        for key in ("tokenizer.vocabulary", "tokenizer.merges", "tokenizer.eos_token_id"):
            self.assertEqual(found[key], expected[key])
        del files["added_tokens.json"]
        self.assertEqual(build(files=files)["tokenizer.vocabulary"][:3], ["a", "b", "ab"])

    def test_field_added_tokens_that_the_configuration_alone_names_are_in_the_list_for_apr(self):
        """FIELD Text: added tokens only in tokenizer_config.json -> in the .apr's vocabulary too, where ids are free"""
        bare = {"tokenizer.json": json.dumps(TOKENIZER | {"added_tokens": []}).encode()}
        decoder = {"5": "<|endoftext|>", "6": "<|im_end|>", "1": "taken", "9": "ab", "-1": "none"}
        config = {"added_tokens_decoder": {number: {"content": token} for number, token in decoder.items()}}
        found = build(files=bare | {"tokenizer_config.json": json.dumps(config).encode()})
        self.assertEqual(found["tokenizer.vocabulary"], build()["tokenizer.vocabulary"])
        for broken in (b"{", b"[]", b'{"added_tokens_decoder": {"x": {}}}', b'{"added_tokens_decoder": [1]}'):
            found = build(files=bare | {"tokenizer_config.json": broken})
            self.assertEqual(found["tokenizer.vocabulary"][5:], ["<unk>"] * 3)

    @parameterized.parameters(
        b"{",
        b"[]",
        b'{"model":{"type":"Unigram","vocab":[]}}',
        b'{"model":{"type":"BPE","vocab":{"a":-1}}}',
        b'{"model":{"type":"BPE","vocab":{"a":99999999999}}}',
        b'{"model":{"type":"BPE","vocab":{"a":0},"merges":[["a"]]}}',
        b'{"model":{"type":"BPE","vocab":{"a":0}},"added_tokens":[7]}',
        b'{"model":{"type":"BPE","vocab":{"a":0}},"added_tokens":5}',
        b'{"model":{"type":"BPE","vocab":{"a":0}},"added_tokens":{}}',
        b'{"model":{"type":"BPE","vocab":{"a":0},"merges":5}}',
        b'{"model":{"type":"BPE","vocab":{"a":0},"merges":{"a b":1}}}',
        b'{"model":{"type":"BPE","vocab":{"a":0},"merges":"a b"}}',
        b'{"model":{"type":"BPE","vocab":{"a":4000000}}}',
        b'{"model":5}',
        b"\xff",
    )
    def test_a_tokenizer_that_is_not_understood_travels_with_a_warning(self, content):
        warnings = []
        found = build(files={"tokenizer.json": content}, warnings=warnings)
        self.assertNotIn("tokenizer.vocabulary", found)
        self.assertIn("tokenizer.json", found["source_files"])
        self.assertLen(warnings, 1)

    @parameterized.parameters(
        ("merges.txt", b"\xff\xfe"),
        ("added_tokens.json", b"[1,2]"),
        ("added_tokens.json", b'{"a":"b"}'),
        ("added_tokens.json", b"\xff"),
        ("vocab.json", b"[1]"),
        ("vocab.json", b'{"a":4000000}'),
    )
    def test_parts_of_a_tokenizer_that_are_not_understood_travel_with_a_warning(self, name, content):
        files = {"vocab.json": b'{"a":0}', "merges.txt": b"", "added_tokens.json": b"{}"}
        self.assertIn("tokenizer.vocabulary", build(files=files))
        warnings = []
        found = build(files=files | {name: content}, warnings=warnings)
        self.assertNotIn("tokenizer.vocabulary", found)
        self.assertCountEqual(found["source_files"], files)
        self.assertLen(warnings, 1)
        self.assertIn("not understood", warnings[0])


class FilesTest(absltest.TestCase):
    def test_text_stays_text_and_the_rest_is_base64(self):
        encoded = apr_metadata.encode_files({"b": "é\n".encode(), "a": b"\xff\0"})
        self.assertEqual(list(encoded.items()), [("a", {"base64": base64.b64encode(b"\xff\0").decode()}), ("b", "é\n")])

    def test_metadata_of_another_writer_come_back_with_their_spelling(self):
        text = b'{"model_type":"Auto","rms_norm_eps":0.000001,"big":1e30,"nested":{"z":1,"a":[null]}}'
        parsed = strict_json.loads(text, what="x", max_bytes=1000)
        strings = apr_metadata.foreign_to_safetensors(parsed)
        self.assertEqual(strict_json.dumps(apr_metadata.foreign_from_safetensors(strings)), text)
        self.assertEqual(strings["format"], "pt")
        self.assertIsNone(apr_metadata.foreign_from_safetensors({"format": "pt"}))
        with self.assertRaises(BrokenContainerError):
            apr_metadata.foreign_from_safetensors({"apr_metadata": "[]"})


if __name__ == "__main__":
    absltest.main()
