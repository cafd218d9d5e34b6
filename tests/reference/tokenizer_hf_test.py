"""Token ids, texts and chats against live transformers: what `AutoTokenizer` makes of the same files."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.generate.tokenizer import Detokenizer, Tokenizer
from apr_jax.trace import hf_reference
from tests import paths, tokenizer_variants
from tests.tokenizer_variants import CHAT, TEXTS, VARIANTS

if hf_reference.available():
    import transformers


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class VariantsTest(parameterized.TestCase):
    def both(self, files):
        folder = pathlib.Path(self.create_tempdir().full_path)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        os.link(paths.checkpoint(tokenizer_variants.BASE) / "model.safetensors", folder / "model.safetensors")
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


if __name__ == "__main__":
    absltest.main()
