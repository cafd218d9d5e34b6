"""transformers opens the folders that we write, and computes the same logits from them bit for bit."""

import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.naming import recognise
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import make_plan
from apr_jax.converters.convert.run import convert
from tests.paths import CHECKPOINTS, fixtures

FIXTURES = fixtures()
SOURCES = {path.name: path for path in CHECKPOINTS}
if FIXTURES is not None:
    SOURCES |= {path.name: path / "hf" for path in sorted((FIXTURES / "genuine").iterdir())}


def limit_for_three(path: pathlib.Path) -> int:
    """The size limit that cuts a checkpoint's tensors into three shards."""
    with open_checkpoint(path) as checkpoint:
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        for limit in range(total // 3, total, max(1, total // 100)):
            if len(make_plan(checkpoint, "unused", to="safetensors", max_shard_bytes=limit).files) == 3:
                return limit
    raise AssertionError(f"no limit cuts {path} into three")


class TransformersFolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                self.skipTest(f"{package} is not installed")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def logits(self, path: pathlib.Path):
        import torch
        import transformers

        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            self.assertEmpty(report[kind], kind)
        ids = torch.arange(2 * 70).reshape(2, 70) * 7 % model.config.vocab_size
        with torch.no_grad():
            return model.eval()(ids).logits

    def test_transformers_opens_an_index_that_lists_what_no_shard_holds_as_we_do(self):
        import torch

        source = SOURCES["gqa_tied_bf16"]
        convert(source, self.folder / "sharded", to="safetensors", max_shard_bytes=limit_for_three(source))
        path = self.folder / "sharded" / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        last = max(index["weight_map"].values())
        needless = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
        index["weight_map"] |= dict.fromkeys(needless, last)
        path.write_text(json.dumps(index))
        with open_checkpoint(self.folder / "sharded") as opened:
            self.assertEqual(len(opened.tensors), len(index["weight_map"]) - len(needless))
        self.assertTrue(torch.equal(self.logits(self.folder / "sharded"), self.logits(source)))

    def test_transformers_finds_the_names_that_we_say_it_finds_and_no_others(self):
        import safetensors.torch
        import transformers

        source = SOURCES["gqa_untied_bf16"]
        tensors = safetensors.torch.load_file(source / "model.safetensors")
        found = {}
        for prefix in ("", "model.", "_orig_mod.", "module.", "base_model.model.", "model.language_model."):
            for bare in (False, True):
                names = {name: prefix + (name.removeprefix("model.") if bare else name) for name in tensors}
                folder = self.folder / f"{prefix}{bare}"
                shutil.copytree(source, folder)
                renamed = {names[name]: tensor for name, tensor in tensors.items()}
                safetensors.torch.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
                naming = recognise(list(renamed), list(tensors))
                known = naming is None or naming.known_to_transformers
                _, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
                self.assertEqual(known, not report["missing_keys"] and not report["unexpected_keys"], folder.name)
                found[folder.name] = known
        self.assertEqual(set(found.values()), {False, True}, found)

    @parameterized.parameters(*sorted(SOURCES))
    def test_single_file_to_apr_to_three_shards_gives_the_same_logits(self, name):
        import torch

        convert(SOURCES[name], self.folder / "single", to="safetensors")
        convert(self.folder / "single", self.folder / "m.apr", to="apr")
        limit = limit_for_three(self.folder / "m.apr")
        convert(self.folder / "m.apr", self.folder / "shards", to="safetensors", max_shard_bytes=limit)
        self.assertLen(list((self.folder / "shards").glob("model-0000?-of-00003.safetensors")), 3)
        expected = self.logits(SOURCES[name])
        self.assertEqual(tuple(expected.shape[:2]), (2, 70))
        self.assertGreater(float(expected.std()), 0)
        self.assertTrue(torch.equal(self.logits(self.folder / "shards"), expected))
        self.assertTrue(torch.equal(self.logits(self.folder / "single"), expected))

    @parameterized.parameters("gqa_tied_bf16", "mha_untied_f32_sharded")
    def test_the_tokenizer_of_the_folder_is_the_sources(self, name):
        import transformers

        convert(SOURCES[name], self.folder / "m.apr", to="apr")
        convert(self.folder / "m.apr", self.folder / "hf", to="safetensors")
        text = "the quick brown fox é"
        ours = transformers.AutoTokenizer.from_pretrained(self.folder / "hf")
        theirs = transformers.AutoTokenizer.from_pretrained(SOURCES[name])
        self.assertEqual(ours(text)["input_ids"], theirs(text)["input_ids"])
        self.assertNotEmpty(ours(text)["input_ids"])
        chat = [{"role": "user", "content": text}]
        self.assertEqual(
            ours.apply_chat_template(chat, tokenize=False), theirs.apply_chat_template(chat, tokenize=False)
        )


if __name__ == "__main__":
    absltest.main()
