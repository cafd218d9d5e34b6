"""Token ids, texts and chats against live transformers: what `AutoTokenizer` makes of the same files."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.generate.tokenizer import Detokenizer, Tokenizer
from apr_jax.trace import hf_reference
from tests import paths, tokenizer_variants
from tests.tokenizer_variants import CHAT, TEXTS, VARIANTS

APR = os.environ.get("APR_BIN")

if hf_reference.available():
    import transformers


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class VariantsTest(parameterized.TestCase):
    def both(self, files):
        folder = pathlib.Path(self.create_tempdir().full_path)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        shutil.copy(paths.checkpoint(tokenizer_variants.BASE) / "model.safetensors", folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with open_checkpoint(folder) as checkpoint:
            return theirs, Tokenizer.of(checkpoint)

    @parameterized.named_parameters(*VARIANTS.items())
    def test_ids_texts_and_chats_are_transformers(self, make_files):
        theirs, ours = self.both(make_files())
        for text in TEXTS:
            for special in (True, False):
                ids = theirs(text, add_special_tokens=special)["input_ids"]
                self.assertEqual(ours.encode(text, special_tokens=special), ids, (text, special))
                shown = theirs.decode(ids, skip_special_tokens=True)
                self.assertEqual(ours.decode(ids), shown)
                self.assertEqual(ours.decode(ids, skip_special_tokens=False), theirs.decode(ids))
                characters = Detokenizer(ours)
                self.assertEqual("".join(characters.add([i]) for i in ids) + characters.finish(), shown)
        self.assertEqual(ours.special_tokens, theirs.special_tokens_map)
        if theirs.chat_template is not None:
            ids = theirs.apply_chat_template(list(CHAT), add_generation_prompt=True, return_dict=False)
            self.assertEqual(ours.encode_chat(CHAT), ids)


@absltest.skipUnless(APR, "APR_BIN does not name the genuine apr")
@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class ImportedByAprTest(parameterized.TestCase):
    TEXTS = ("{0}x{1}", "a {0}{2} é<|im_start|>b", "don't {1} 漢字 <unk> 12", "<|im_end|>\n{2}\n")

    @parameterized.parameters(
        (("<tool_call>", "</tool_call>", "<think>"), True),
        (("[INST]", "<|user|>", "日本"), False),
        (("<｜Assistant｜>", "  ", "né"), False),
    )
    def test_what_apr_import_drops_is_recovered(self, added, beside_apr):
        folder = pathlib.Path(self.create_tempdir().full_path)
        tokens = {
            str(283 + number): {"content": token, "special": False, "normalized": False}
            for number, token in enumerate(added)
        }

        def change(content):
            content["added_tokens_decoder"] |= tokens

        def add(content):
            content["added_tokens"] += [{"id": int(number), **token, **FLAGS} for number, token in tokens.items()]

        files = tokenizer_variants.changed("tokenizer_config.json", change)
        files = tokenizer_variants.changed("tokenizer.json", add, files)
        (folder / "hf").mkdir()
        for name, content in files.items():
            (folder / "hf" / name).write_bytes(content)
        shutil.copy(
            paths.checkpoint(tokenizer_variants.BASE) / "model.safetensors", folder / "hf" / "model.safetensors"
        )
        subprocess.run([APR, "import", folder / "hf", "-o", folder / "m.apr"], capture_output=True, check=True)
        convert(folder / "m.apr", folder / "back", to="safetensors")
        theirs, back = (transformers.AutoTokenizer.from_pretrained(folder / name) for name in ("hf", "back"))
        with open_checkpoint(folder / "m.apr") as checkpoint:
            ours = Tokenizer.of(checkpoint)
        self.assertEmpty(ours.warnings)
        for pattern in self.TEXTS:
            text = pattern.format(*added)
            ids = theirs(text)["input_ids"]
            self.assertEqual((ours.encode(text), back(text)["input_ids"]), (ids, ids))
        if beside_apr:
            text = self.TEXTS[0].format(*added)
            settings = ["--temperature", "0", "--offline", "--no-gpu", "--json"]
            command = [APR, "run", folder / "m.apr", "-p", text, "-n", "1", *settings]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            self.assertEqual(json.loads(run.stdout)["prompt_tokens"], len(ours.encode(text)))


if __name__ == "__main__":
    absltest.main()
