"""Tokenizer files as people hold them: ids, texts and chats are those that transformers was recorded with."""

import json
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import tokenizers
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError, RefusedError
from apr_jax.generate import tokenizer_files
from apr_jax.generate.tokenizer import Detokenizer, Tokenizer
from tests import paths
from tests.tokenizer_variants import (
    ADDED,
    AROUND,
    BASE,
    CHAT,
    CUT_AND_PADDED,
    LEGACY,
    OVERRIDDEN,
    RECORDED,
    SLOW,
    TEXTS,
    VARIANTS,
    base_files,
)

OUTCOMES = json.loads(RECORDED.read_text())


def tokenizer_of(files: dict[str, bytes]) -> Tokenizer | None:
    """The tokenizer of the base checkpoint with other side files."""
    with open_checkpoint(paths.checkpoint(BASE)) as checkpoint, mock.patch.object(checkpoint, "files", files):
        return Tokenizer.of(checkpoint)


class VariantsTest(parameterized.TestCase):
    def test_every_variant_is_recorded(self):
        self.assertEqual(list(OUTCOMES["variants"]), list(VARIANTS))
        self.assertGreater(len(OUTCOMES["outcomes"]), 20)

    @parameterized.parameters(*CUT_AND_PADDED)
    def test_field_what_cuts_and_pads_has_no_effect(self, name):
        """FIELD Text: tokenizer.json with truncation, padding; either side, fixed, longest, multiples -> no effect"""
        self.check(name)

    @parameterized.parameters(*AROUND)
    def test_field_a_text_gets_what_the_post_processor_adds_and_a_chat_does_not(self, name):
        """FIELD Text: a post-processor with BOS, EOS, both, of BERT, of RoBERTa, in a Sequence -> texts, not chats"""
        self.check(name)

    @parameterized.parameters(*ADDED)
    def test_field_added_tokens_come_from_every_place(self, name):
        """FIELD Text: tokens added by added_tokens_decoder, special ones, roles, objects, gaps -> transformers' ids"""
        self.check(name)

    @parameterized.parameters(*SLOW)
    def test_field_vocabulary_and_merges_are_enough(self, name):
        """FIELD Text: vocab.json and merges.txt, no tokenizer.json -> built as transformers builds it"""
        self.check(name)

    @parameterized.parameters(*LEGACY)
    def test_field_older_files_count_where_transformers_reads_them(self, name):
        """FIELD Text: special_tokens_map.json, roles left out, split_special_tokens -> as transformers reads them"""
        self.check(name)

    @parameterized.parameters(*OVERRIDDEN)
    def test_field_qwen2s_own_parts_go_before_those_of_the_file(self, name):
        """FIELD Text: decoder in a Sequence, other words or class, R1-Distill's, code beside -> AutoTokenizer's ids"""
        self.check(name)

    def check(self, name: str) -> None:
        tokenizer = tokenizer_of(VARIANTS[name]())
        expected = OUTCOMES["outcomes"][OUTCOMES["variants"][name]]
        self.assertEqual([tokenizer.encode(text) for text in TEXTS], expected["ids"])
        self.assertEqual([tokenizer.encode(text, special_tokens=False) for text in TEXTS], expected["plain"])
        self.assertEqual(tokenizer.special_tokens, expected["named"])
        for ids, shown in zip(expected["ids"], expected["shown"], strict=True):
            self.assertEqual(tokenizer.decode(ids), shown)
            characters = Detokenizer(tokenizer)
            self.assertEqual("".join(characters.add([token]) for token in ids) + characters.finish(), shown)
        if expected["chat"] is None:
            self.assertRaisesRegex(RefusedError, "no chat template", tokenizer.encode_chat, CHAT)
        else:
            self.assertEqual(tokenizer.encode_chat(CHAT), expected["chat"])

    def test_field_the_figures_of_the_reports_hold(self):
        """FIELD Text: cut to 8, padded to 32, BOS by template and post-processor -> all tokens, no padding, one BOS"""
        text = "The quick brown fox jumps over the lazy dog. "
        whole = tokenizer_of(base_files()).encode(text)
        self.assertGreater(len(whole), 32)
        for name in ("truncation on the right", "padding to 32 on the left", "truncation and padding"):
            self.assertEqual(tokenizer_of(VARIANTS[name]()).encode(text), whole)
        chat = tokenizer_of(VARIANTS["BOS in front"]()).encode_chat(CHAT)
        self.assertEqual((chat[:2], chat.count(280)), ([280, 281], 1))
        self.assertEqual(
            tokenizer_of(VARIANTS["EOS at the end"]()).encode_chat(CHAT)[-1], 198, "the template's newline"
        )

    def test_ids_that_transformers_gives_against_the_files_are_said(self):
        warned = tokenizer_of(VARIANTS["added_tokens_decoder with gaps"]()).warnings
        self.assertIn("<new> 290 -> 283, <other> 286 -> 282", warned[0])
        self.assertEqual(tokenizer_of(base_files()).warnings, ())

    def test_another_decoder_is_refused_where_the_file_counts_whole(self):
        files = VARIANTS["code beside another class"]()
        whole = json.loads(files["tokenizer.json"]) | {"decoder": {"type": "ByteFallback"}}
        with self.assertRaisesRegex(RefusedError, "not byte-level.*ByteFallback.*--input-ids"):
            tokenizer_of(files | {"tokenizer.json": json.dumps(whole).encode()})

    @parameterized.parameters(
        ({"tokenizer_config.json": b'{"eos_token": 5}'}, "a special token is 5"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"280": {"contents": "a"}}}'}, "cannot be used"),
        ({"tokenizer_config.json": b"[]"}, "is not an object"),
        ({"tokenizer_config.json": b'{"eos'}, "JSON.*--input-ids"),
        ({"added_tokens.json": b'{"a": "b"}', "tokenizer_config.json": b"{}"}, "cannot be used"),
        ({"tokenizer.json": b"version https://git-lfs.github.com/spec/v1"}, "JSON.*--input-ids"),
        ({"tokenizer.json": b'{"model": {"type": "Unigram", "vocab": []}}'}, "not byte-level BPE.*--input-ids"),
        (
            {"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": ["a"]}}'},
            "not a merge.*number 0: 'a'.*--input-ids",
        ),
        ({"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}'}, "cannot be used.*--input-ids"),
    )
    def test_a_file_that_is_broken_is_named_with_what_works_without_it(self, files, message):
        with self.assertRaisesRegex(AprJaxError, message):
            tokenizer_of(base_files() | files)


def split(pattern: str) -> dict:
    by = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [by, {"type": "ByteLevel", "add_prefix_space": False}]}


def template(*pieces: dict, **special: dict) -> dict:
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


def model(**changes: object) -> dict:
    return json.loads(base_files()["tokenizer.json"])["model"] | changes


TEXT, X = ({kind: {"id": name, "type_id": 0}} for kind, name in (("Sequence", "A"), ("SpecialToken", "X")))
OTHER = {"Sequence": {"id": "B", "type_id": 0}}
REPEATED = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}
PADDED = {
    "strategy": {"Fixed": 2**31}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "a",
}  # fmt: skip
# What of tokenizer.json panics, aborts, multiplies or does not end; for Qwen2Tokenizer only post-processors count.
HOSTILE = {
    "a prefix longer than tokens": {"model": model(continuing_subword_prefix="abcdefgh")},
    "a bad table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "an unknown token": {"post_processor": template(X)},
    "a second text": {"post_processor": template(OTHER)},
    "words that backtrack": {"pre_tokenizer": split("(.*a){25}b")},
    "words that overlap": {"pre_tokenizer": split("(a|aa)+$")},
    "words of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "letters that multiply": {"normalizer": {"type": "Sequence", "normalizers": [REPEATED] * 6}},
}
ONLY_QWEN2 = {
    "texts that multiply": template(*[TEXT] * 20_000),
    "texts within texts": {"type": "Sequence", "processors": [template(TEXT, TEXT)] * 60},
    "an unknown token, inside": {"type": "Sequence", "processors": [template(TEXT, X)]},
}
HARMLESS = {"cut past its end": {"truncation": CUT}, "padded to gigabytes": {"padding": PADDED}}
STRANGE = {"auto_map": {"AutoTokenizer": ["x", "y"]}, "tokenizer_class": "Own"}


class HostileTest(parameterized.TestCase):
    def tokenizer(self, changes: dict, config: dict) -> Tokenizer:
        files = base_files()
        for name, given in (("tokenizer.json", changes), ("tokenizer_config.json", config)):
            files[name] = json.dumps(json.loads(files[name]) | given).encode()
        return tokenizer_of(files)

    @parameterized.parameters(*HOSTILE)
    def test_native_code_that_fails_or_does_not_end_is_an_error_in_one_line(self, name):
        with self.assertRaisesRegex(RefusedError, "token.*--input-ids") as caught:
            self.tokenizer(HOSTILE[name], STRANGE).encode("a" * 40 + " hello")
        self.assertEqual(caught.exception.exit_code, 5)
        self.assertLen(str(caught.exception).splitlines(), 1)
        self.assertLen(self.tokenizer({}, STRANGE).encode("hello"), len(self.tokenizer({}, {}).encode("hello")))

    @parameterized.parameters(*HARMLESS)
    def test_what_transformers_leaves_out_has_no_effect(self, name):
        expected = self.tokenizer({}, {}).encode("hello world")
        self.assertEqual(self.tokenizer(HARMLESS[name], STRANGE).encode("hello world"), expected)
        self.assertEqual(self.tokenizer(HARMLESS[name], {}).encode("hello world"), expected)

    @parameterized.parameters(*ONLY_QWEN2, "an unknown token", "a second text")
    def test_post_processors_of_qwen2_are_looked_at_before(self, name):
        with self.assertRaisesRegex(RefusedError, "post-processor"):
            self.tokenizer({"post_processor": ONLY_QWEN2.get(name) or HOSTILE[name]["post_processor"]}, {})

    def test_a_panic_is_an_error_wherever_it_comes_from(self):
        tokenizer = self.tokenizer({}, {})
        tokenizer._backend.post_processor = processors_that_panic()
        with self.assertRaisesRegex(RefusedError, "cannot be used.*--input-ids"):
            tokenizer.encode("hello")

    def test_millions_of_tokens_are_refused_before_they_are_added(self):
        many = {str(number): {"content": f"t{number}"} for number in range(100_001)}
        with self.assertRaisesRegex(RefusedError, "too many added tokens"):
            self.tokenizer({}, {"added_tokens_decoder": many})
        with (
            self.assertRaisesRegex(RefusedError, "too large"),
            mock.patch.object(tokenizer_files, "_MAX_VOCABULARY", 9),
        ):
            self.tokenizer({}, {})


def processors_that_panic() -> object:
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": template(X)}
    return tokenizers.Tokenizer.from_str(json.dumps(empty)).post_processor


if __name__ == "__main__":
    absltest.main()
