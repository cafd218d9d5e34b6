"""What two checkpoints disagree about beside their tensors, file by file."""

import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import side_files
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.verify.side_files import compare_side_files
from tests.paths import checkpoint


class SideFilesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        self.sides = [self.folder / "a", self.folder / "b"]
        for side in self.sides:
            shutil.copytree(checkpoint("gqa_tied_bf16"), side)

    def write(self, name, *texts):
        for side, text in zip(self.sides, texts, strict=True):
            (side / name).write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())

    def differences(self):
        with open_checkpoint(self.sides[0]) as a, open_checkpoint(self.sides[1]) as b:
            return {found.name: found.sentence for found in compare_side_files(a, b)}

    @parameterized.parameters(
        ("vocab.json", {"a": 0, "b": 1}, {"a": 1, "b": 0}),
        ("added_tokens.json", {"<x>": 5}, {"<x>": 6}),
        ("special_tokens_map.json", {"pad_token": "a"}, {"pad_token": {"content": "b"}}),
        ("merges.txt", b"a b\nc d\n", b"c d\na b\n"),
        ("tokenizer.model", b"\1\2", b"\1\3"),
    )
    def test_a_file_that_says_something_else(self, name, one, two):
        for side in self.sides:
            (side / "tokenizer.json").unlink()
        self.write(name, one, two)
        self.assertEqual(list(self.differences()), [name])
        self.write(name, two, two)
        self.assertEmpty(self.differences())

    def test_what_tokenizer_json_stands_for_is_not_compared_beside_it(self):
        self.write("vocab.json", {"a": 0}, {"b": 0})
        self.write("merges.txt", b"a b\n", b"c d\n")
        self.assertEmpty(self.differences())

    @parameterized.parameters(("tokenizer_config.json", b"{"), ("chat_template.jinja", b"\xff"))
    def test_of_a_template_that_cannot_be_read_that_is_said_and_nothing_else(self, name, broken):
        self.write(name, broken, broken)
        (self.sides[1] / "chat_template.json").write_text('{"chat_template": "x"}')
        self.assertCountEqual(self.differences(), [name])

    def test_a_tokenizer_without_a_model_is_another_one(self):
        self.write("tokenizer.json", {"model": "BPE"}, {"model": {"type": "BPE", "merges": [["a", "b"]]}})
        self.assertIn("tokenizer.json", self.differences())
        self.write("tokenizer.json", {"model": {"merges": ["a b"]}}, {"model": {"merges": [["a", "b"]]}})
        self.assertEmpty(self.differences())


class VocabularyTest(parameterized.TestCase):
    def test_tokens_of_every_file_that_lists_some(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        shutil.copytree(checkpoint("gqa_tied_bf16"), folder, dirs_exist_ok=True)
        tokenizer = {
            "model": {"vocab": [["a", -1.0], ["b", -2.0], 5]},
            "added_tokens": [{"id": 7, "content": "<x>"}, 1],
        }
        decoder = {"8": {"content": "<y>"}, "x": {"content": "no"}, "9": 5}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        (folder / "added_tokens.json").write_text('{"<z>": 10, "odd": "x"}')
        with open_checkpoint(folder) as opened:
            found = side_files.vocabulary(opened)
        self.assertEqual(found, {0: "a", 1: "b", 7: "<x>", 8: "<y>", 10: "<z>"})


class RenamedTest(parameterized.TestCase):
    def test_the_metadata_of_an_apr_follow(self):
        path = pathlib.Path(self.create_tempdir().full_path) / "m.apr"
        convert(checkpoint("gqa_tied_bf16"), path, to="apr")
        with open_checkpoint(path) as opened:
            opened.metadata["source_order"] = ["model.norm.weight", 5]
            opened.metadata["tensor_shapes"] = {"model.norm.weight": [64]}
            other = opened.renamed({"model.norm.weight": "x"})
            self.assertIn("x", other.tensors)
            self.assertEqual(other.metadata["tensor_shapes"], {"x": [64]})
            self.assertEqual(opened.metadata["tensor_shapes"], {"model.norm.weight": [64]})
            self.assertRegex(repr(opened), r"^Checkpoint\('.*m.apr', kind='apr', \d+ tensors\)$")


if __name__ == "__main__":
    absltest.main()
