"""The tokenizer of an `.apr` by `apr import`: what the format drops is recovered by rule; what cannot be is said."""

import json
import pathlib
import struct
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert import apr_tokenizer
from apr_jax.converters.convert.plan import make_plan
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import apr_format
from apr_jax.generate.tokenizer import Tokenizer
from tests import paths

BASE = paths.checkpoint("gqa_tied_bf16")
# As `apr import` 0.72.3 writes them for these added tokens: holes at the end, no word of which are special.
ADDED = ["<tool_call>", "</tool_call>", "<think>"]


def imported(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """An `.apr` with a tokenizer as `apr import` leaves it; `__` in a key stands for a dot, None takes it out."""
    path = folder / "imported.apr"
    convert(BASE, path, to="apr", force=True)
    data = path.read_bytes()
    parsed = apr_format.parse_prologue(data, len(data))
    metadata = dict(parsed.metadata)
    del metadata["source_files"]
    metadata["tokenizer.vocabulary"][283:286] = ADDED
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    file = apr_format.serialise_prologue(metadata, parsed.entries) + data[parsed.header.data_offset : -4]
    path.write_bytes(file + struct.pack("<I", zlib.crc32(file)))
    return path


class AprTokenizerTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def tokenizer(self, **changes: object) -> Tokenizer:
        with open_checkpoint(imported(self.folder, **changes)) as checkpoint:
            return Tokenizer.of(checkpoint)

    def metadata(self, **changes: object) -> dict:
        with open_checkpoint(imported(self.folder, **changes)) as checkpoint:
            return checkpoint.metadata

    @parameterized.parameters(
        ("<tool_call>x", [283, 87]),
        ("<think></tool_call>", [285, 284]),
        ("<|im_start|>a<|im_end|>", [281, 64, 282]),
        ("<unk>", [27, 84, 77, 74, 29]),
    )
    def test_field_what_no_merge_makes_was_added(self, text, ids):
        """FIELD Text: genuine .apr with <tool_call>, <think> added -> single ids, as transformers and apr run"""
        self.assertEqual(self.tokenizer().encode(text), ids)
        self.assertEqual(self.tokenizer().warnings, ())

    @parameterized.parameters("[INST]", "<｜User｜>", "<|fim_prefix|>", "日本", "  ", "ĠĠĠĠ", "<0x41>")
    def test_field_any_spelling_of_an_added_token_is_found(self, token):
        """FIELD Text: genuine .apr with other added tokens ([INST], <|fim_prefix|>, words, blanks) -> single ids"""
        vocabulary = self.metadata()["tokenizer.vocabulary"]
        tokenizer = self.tokenizer(tokenizer__vocabulary=[*vocabulary[:286], token, "<unk>"])
        self.assertEqual(tokenizer.encode(f"a{token}b"), [64, 286, 65])
        self.assertEqual(tokenizer.decode([64, 286, 65]), f"a{token}b" if token != "ĠĠĠĠ" else "a    b")

    def test_special_are_those_spelt_so_and_the_ends_of_texts(self):
        vocabulary = self.metadata()["tokenizer.vocabulary"]
        vocabulary[283:287] = ["<｜end｜>", "<|fim_prefix|>", "<think>", "<|x|>"]
        tokenizer = self.tokenizer(tokenizer__vocabulary=vocabulary, tokenizer__eos_token_id=283)
        self.assertEqual(tokenizer.decode([64, 283, 284, 285, 286, 282, 65]), "a<|fim_prefix|><think>b")
        self.assertEqual(tokenizer.special_tokens["eos_token"], "<｜end｜>")
        metadata = self.metadata(tokenizer__vocabulary=vocabulary, tokenizer__eos_token_id=283)
        config = json.loads(apr_tokenizer.files_of(metadata, [])["tokenizer_config.json"])
        special = [token["content"] for token in config["added_tokens_decoder"].values() if token["special"]]
        self.assertEqual(special, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜end｜>", "<|x|>"])

    def test_an_end_that_is_not_said_or_is_a_hole_is_none(self):
        vocabulary = self.metadata()["tokenizer.vocabulary"]
        self.assertEqual(vocabulary[287], "<unk>")
        changes = {"tokenizer__bos_token_id": None, "tokenizer__eos_token_id": 287}
        self.assertEmpty(self.tokenizer(**changes).special_tokens)
        self.assertIn("eos_token", self.tokenizer(tokenizer__bos_token_id=None).special_tokens)

    def test_of_two_equal_tokens_the_first_is_the_one(self):
        vocabulary = self.metadata()["tokenizer.vocabulary"]
        self.assertEqual(self.tokenizer(tokenizer__vocabulary=[*vocabulary[:286], "a"]).encode("a"), [64])

    def test_types_of_tokens_that_an_import_of_gguf_keeps_go_before_the_rule(self):
        types = [1] * 288
        types[281], types[284] = 3, 4
        tokenizer = self.tokenizer(tokenizer__token_type=types)
        self.assertEqual(tokenizer.encode("<|im_start|></tool_call>"), [281, 284])
        self.assertGreater(len(tokenizer.encode("<tool_call>")), 5)

    def test_a_hole_is_no_token_and_a_lone_unknown_one_at_the_beginning_is(self):
        vocabulary = self.metadata()["tokenizer.vocabulary"]
        self.assertNotIn(287, self.tokenizer(tokenizer__vocabulary=[*vocabulary[:287], "<unk>"]).encode("<unk>"))
        unknown = ["<unk>", *vocabulary[:286]]
        self.assertEqual(self.tokenizer(tokenizer__vocabulary=unknown).encode("<unk>a"), [0, 65])

    def test_a_token_of_the_spelling_of_holes_that_merges_make_is_one(self):
        vocabulary, merges = self.metadata()["tokenizer.vocabulary"], self.metadata()["tokenizer.merges"]
        vocabulary[283:286] = ["<u", "<un", "<unk"]
        made = ["< u", "<u n", "<un k", "<unk >"]
        ours = self.tokenizer(
            tokenizer__vocabulary=[*vocabulary[:286], "<unk>", "<unk>"], tokenizer__merges=[*merges, *made]
        )
        self.assertEqual(ours.decode([64, 286, 287]), "a<unk>")
        self.assertEqual(ours.encode("a<unk>"), [64, 285, 29], "no word of Qwen2's holds both")

    def test_field_merges_are_read_as_pairs_and_as_text(self):
        """FIELD Text: .apr metadata with merges as pairs -> read"""
        as_text = self.metadata()["tokenizer.merges"]
        text = "the quick brown fox sent it in"
        expected = self.tokenizer().encode(text)
        self.assertLess(len(expected), len(text))
        self.assertEqual(
            self.tokenizer(tokenizer__merges=[merge.split(" ") for merge in as_text]).encode(text), expected
        )
        mixed = [merge.split(" ") if number % 2 else merge for number, merge in enumerate(as_text)]
        self.assertEqual(self.tokenizer(tokenizer__merges=mixed).encode(text), expected)

    @parameterized.parameters(
        ({"tokenizer__merges": []}, "has no merges: text becomes a token for each byte"),
        ({"tokenizer__merges": None}, "has no merges"),
        ({"tokenizer__merges": ["q z", "z q"]}, "2 merges of the tokenizer make no token"),
        ({"tokenizer__eos_token_id": 288}, "eos_token_id is 288, which none of the 288 tokens has"),
        ({"tokenizer__eos_token_id": -1}, "eos_token_id is -1"),
        ({"tokenizer__bos_token_id": "1"}, "bos_token_id is '1'"),
        ({"tokenizer__vocabulary": ["a", "b"]}, "has no token for 254 bytes"),
    )
    def test_field_what_cannot_be_meant_is_said(self, changes, message):
        """FIELD Text: .apr metadata with empty merges, an end token beyond the vocabulary, no bytes -> a warning"""
        path = imported(self.folder, **changes)
        with open_checkpoint(path) as checkpoint:
            self.assertIn(message, "\n".join(Tokenizer.of(checkpoint).warnings))
            plan = make_plan(checkpoint, str(self.folder / "out"), to="safetensors")
        self.assertIn(message, "\n".join(plan.warnings))
        self.assertIn("tokenizer.json", plan.side_files)

    @parameterized.parameters(
        ({"tokenizer__merges": ["a"]}, "not a merge.*number 0: 'a'.*--input-ids"),
        ({"tokenizer__merges": [["a", "b", "c"]]}, "not a merge"),
        ({"tokenizer__merges": {"a": "b"}}, "not a list of merges"),
        ({"tokenizer__vocabulary": ["a", 1]}, "not a list of strings"),
        ({"tokenizer__vocabulary": "ab"}, "not a list of strings"),
    )
    def test_what_is_no_tokenizer_is_refused_as_text_and_said_in_a_conversion(self, changes, message):
        path = imported(self.folder, **changes)
        with open_checkpoint(path) as checkpoint:
            self.assertRaisesRegex(RefusedError, message, Tokenizer.of, checkpoint)
            plan = make_plan(checkpoint, str(self.folder / "out"), to="safetensors")
        self.assertIn("no tokenizer.json is written: tokenizer.", "\n".join(plan.warnings))
        self.assertEqual(list(plan.side_files), ["config.json"])

    def test_field_a_folder_made_of_it_has_the_tokenizer_and_becomes_the_same_apr(self):
        """FIELD Text: an .apr of apr import to a folder and back -> with its tokenizer, and the same bytes again"""
        path = imported(self.folder, tokenizer__chat_template="{{ messages[0].content }}{{ eos_token }}")
        convert(path, self.folder / "hf", to="safetensors")
        config = json.loads((self.folder / "hf" / "tokenizer_config.json").read_text())
        self.assertEqual(
            (config["eos_token"], config["added_tokens_decoder"]["283"]["content"]), ("<|endoftext|>", ADDED[0])
        )
        text = "the <tool_call>x</tool_call> <|im_start|>né 漢"
        with open_checkpoint(path) as before, open_checkpoint(self.folder / "hf") as after:
            ours, theirs = Tokenizer.of(before), Tokenizer.of(after)
        self.assertEqual(ours.encode(text), theirs.encode(text))
        self.assertEqual(theirs.apply_chat_template([{"role": "user", "content": "a"}]), "a<|endoftext|>")
        again = self.folder / "again.apr"
        convert(self.folder / "hf", again, to="apr")
        self.assertEqual(again.read_bytes(), path.read_bytes())
        convert(path, self.folder / "one.safetensors", to="safetensors")
        convert(self.folder / "one.safetensors", again, to="apr", force=True)
        self.assertEqual(again.read_bytes(), path.read_bytes())

    def test_a_tokenizer_that_was_changed_in_the_folder_goes_before_the_metadata(self):
        convert(imported(self.folder), self.folder / "hf", to="safetensors")
        changed = (self.folder / "hf" / "tokenizer.json").read_text().replace("<think>", "<thunk>")
        (self.folder / "hf" / "tokenizer.json").write_text(changed)
        with open_checkpoint(self.folder / "hf") as checkpoint:
            plan = make_plan(checkpoint, str(self.folder / "again.apr"), to="apr")
        self.assertIn("were changed since", "\n".join(plan.warnings))

    def test_letters_are_those_of_byte_level_bpe(self):
        letters = apr_tokenizer.byte_letters()
        self.assertLen(set(letters), 256)
        self.assertEqual(
            (letters[32], letters[10], letters[65], letters[0xE9], letters[0xAD]), ("Ġ", "Ċ", "A", "é", "Ń")
        )


if __name__ == "__main__":
    absltest.main()
