"""Text from tokens: no half characters, stop strings found where they end, chat templates in their sandbox."""

import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.generate import chat_template
from apr_jax.generate.tokenizer import Detokenizer, StopStrings, Tokenizer
from tests import paths

USER = [{"role": "user", "content": "Hi"}]


def open_tokenizer(**files: bytes | None) -> Tokenizer | None:
    """The tokenizer of a committed checkpoint, with other side files: `__` stands for a dot."""
    with open_checkpoint(paths.checkpoint("gqa_tied_bf16")) as checkpoint:
        changed = {name.replace("__", "."): data for name, data in files.items()}
        given = {**checkpoint.files, **changed}
        with mock.patch.object(checkpoint, "files", {name: data for name, data in given.items() if data is not None}):
            return Tokenizer.of(checkpoint)


class TextTest(parameterized.TestCase):
    def test_characters_of_several_tokens_appear_whole(self):
        tokenizer = open_tokenizer()
        text = "Über 😀 né 漢字 e\u0301"
        tokens = tokenizer.encode(text)
        self.assertGreater(len(tokens), len(text))
        characters = Detokenizer(tokenizer)
        pieces = [characters.add([token]) for token in tokens]
        self.assertIn("😀", pieces)
        self.assertIn("漢", pieces)
        self.assertEqual(pieces[0], "", "the first of the two tokens of Ü shows nothing")
        self.assertNotIn("\ufffd", "".join(pieces))
        self.assertEqual("".join(pieces) + characters.finish(), tokenizer.decode(tokens))

    def test_a_character_that_is_never_finished_is_replaced_at_the_end(self):
        tokenizer = open_tokenizer()
        tokens = tokenizer.encode("a😀")[:-1]
        characters = Detokenizer(tokenizer)
        self.assertEqual(characters.add(tokens), "a")
        self.assertEqual(characters.finish(), "\ufffd")

    def test_any_tokens_give_the_text_that_the_tokenizers_package_gives(self):
        tokenizer = open_tokenizer()
        random = np.random.default_rng(0)
        for _ in range(300):
            tokens = random.integers(0, 288, int(random.integers(1, 40))).tolist()
            characters = Detokenizer(tokenizer)
            cut = len(tokens) // 2
            text = characters.add(tokens[:cut]) + characters.add(tokens[cut:]) + characters.finish()
            self.assertEqual(text, tokenizer.decode(tokens), tokens)

    def test_special_tokens_are_read_from_text_and_not_shown(self):
        tokenizer = open_tokenizer()
        tokens = tokenizer.encode("<|im_start|>a<|im_end|>")
        self.assertEqual((tokens[0], tokens[-1], len(tokens)), (281, 282, 3))
        self.assertEqual(Detokenizer(tokenizer).add([*tokens, 287]), "a")
        self.assertEqual(tokenizer.token_bytes(282), b"<|im_end|>")

    def test_the_vocabulary_in_an_apr_file_is_the_same_tokenizer(self):
        path = pathlib.Path(self.create_tempdir().full_path) / "model.apr"
        convert(paths.checkpoint("gqa_tied_bf16"), path, to="apr")
        theirs = open_tokenizer()
        with open_checkpoint(path) as checkpoint, mock.patch.object(checkpoint, "files", {}):
            ours = Tokenizer.of(checkpoint)
        for text in (
            "What is 2+2?",
            "  don't  He'll\n\n x1234 e\u0301 é 漢字😀\t!!\r\n ",
            "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
        ):
            tokens = ours.encode(text)
            self.assertEqual(tokens, theirs.encode(text))
            self.assertEqual(Detokenizer(ours).add(tokens), Detokenizer(theirs).add(tokens))
        with self.assertRaisesRegex(RefusedError, "no chat template"):
            ours.apply_chat_template(USER)

    def test_another_kind_of_tokenizer_is_refused_and_none_is_none(self):
        self.assertIsNone(open_tokenizer(tokenizer__json=None, merges__txt=None))
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        with self.assertRaisesRegex(RefusedError, "not byte-level"):
            open_tokenizer(tokenizer__json=words.to_str().encode())
        with self.assertRaisesRegex(RefusedError, "cannot be used"):
            open_tokenizer(tokenizer__json=b'{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}')
        with self.assertRaisesRegex(RefusedError, "--input-ids"):
            open_tokenizer(tokenizer__json=b"{}")
        with self.assertRaisesRegex(UsageError, "not UTF-8"):
            open_tokenizer().encode("\ud800")


class StopStringsTest(parameterized.TestCase):
    def first_end(self, strings, prompt, text, block=100):
        tokenizer = open_tokenizer()
        stops = StopStrings(tokenizer, strings, tokenizer.encode(prompt))
        tokens = tokenizer.encode(text)
        for begin in range(0, len(tokens), block):
            if count := stops.first_end(tokens[begin : begin + block]):
                return tokenizer.decode(tokens[: begin + count])
        return None

    @parameterized.parameters(1, 2, 100)
    def test_a_string_is_found_wherever_blocks_begin(self, block):
        self.assertEqual(self.first_end(["C D"], "", "A B C D E", block), "A B C D")
        self.assertEqual(self.first_end(["zz", "E", "B C"], "", "A B C D E", block), "A B C")
        self.assertIsNone(self.first_end(["C  D"], "", "A B C D E", block))
        self.assertEqual(self.first_end(["aab"], "", "aaaab", block), "aaaab")

    def test_it_may_begin_in_the_prompt_but_not_end_there(self):
        self.assertEqual(self.first_end(["XYZ"], "..XY", "Z!"), "Z")
        self.assertIsNone(self.first_end(["XY"], "..XY", "Z!"))
        self.assertIsNone(self.first_end(["XYZ"], "..XY", "!Z"))

    def test_it_may_be_part_of_a_character_or_a_special_token(self):
        self.assertEqual(self.first_end(["é"], "", "aéb"), "aé")
        tokenizer = open_tokenizer()
        self.assertEqual(StopStrings(tokenizer, ["im_end"], []).first_end([64, 282, 64]), 2)

    def test_nothing_is_found_across_a_token_that_the_tokenizer_does_not_know(self):
        tokenizer = open_tokenizer()
        a, b = tokenizer.encode("ab")
        self.assertEqual(StopStrings(tokenizer, ["ab"], []).first_end([a, b]), 2)
        self.assertIsNone(StopStrings(tokenizer, ["ab"], []).first_end([a, 287, b]))


class ChatTemplateTest(parameterized.TestCase):
    def test_the_checkpoints_template_is_rendered(self):
        self.assertEqual(
            open_tokenizer().apply_chat_template(USER),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
        )

    def test_a_template_file_goes_before_the_configuration_and_one_of_several_is_called_default(self):
        tokenizer = open_tokenizer(chat_template__jinja=b"[{{ messages[0].content }}{{ eos_token }}]")
        self.assertEqual(tokenizer.apply_chat_template(USER), "[Hi<|im_end|>]")
        several = b'{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}'
        self.assertEqual(open_tokenizer(tokenizer_config__json=several).apply_chat_template(USER), "yes")

    def test_without_a_template_it_is_refused(self):
        with self.assertRaisesRegex(RefusedError, "no chat template"):
            open_tokenizer(tokenizer_config__json=None).apply_chat_template(USER)

    @parameterized.parameters(
        ("{{ raise_exception('roles must alternate') }}", UsageError, "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", RefusedError, "unsafe"),
        ("{% set _ = messages.append(1) %}", RefusedError, "unsafe"),
        ("{{ messages[0].content.format_map }}{{ namespace.__init__.__globals__ }}", RefusedError, "unsafe"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", RefusedError, "does not work"),
        ("{{ 1 / 0 }}", RefusedError, "does not work"),
        ("{{ messages[0].content + 1 }}", RefusedError, "does not work"),
        ("{% if %}", RefusedError, "does not work"),
        ("{% include 'x' %}", RefusedError, "does not work"),
    )
    def test_a_template_that_refuses_breaks_or_breaks_out_is_an_error_in_one_line(self, template, error, message):
        with self.assertRaisesRegex(error, message) as caught:
            open_tokenizer(chat_template__jinja=template.encode()).apply_chat_template(USER)
        self.assertNotIn("\n", str(caught.exception))

    @parameterized.parameters(([],), (["Hi"],), ([{"content": "Hi"}],), ([{"role": "user", "content": {1, 2}}],))
    def test_what_is_no_conversation_is_refused(self, messages):
        with self.assertRaisesRegex(UsageError, "messages are not"):
            open_tokenizer().apply_chat_template(messages)

    def test_without_jinja2_it_says_what_to_install(self):
        # What a child says of its own packages, as the parent gets to hear it.
        with mock.patch.dict(sys.modules, {"jinja2": None}), self.assertRaisesRegex(UsageError, "pip install"):
            chat_template.rendered("", {}, [])
        with mock.patch("jinja2.__version__", "3.1.5"), self.assertRaisesRegex(UsageError, "sandbox"):
            chat_template.rendered("", {}, [])


if __name__ == "__main__":
    absltest.main()
