"""Folders, names and side files as people hold them: what convert and verify make of them, and what they say."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import struct
import sys
import tempfile
import zlib
from typing import ClassVar

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes  # noqa: F401, gives numpy the name bfloat16
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import folders
from apr_jax.converters.checkpoint.naming import for_model
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.commands import cli, convert, show, verify
from apr_jax.converters.errors import AprJaxError, MissingFileError
from tests.paths import DATA, checkpoint

TIED, UNTIED, SHARDED = checkpoint("gqa_tied_bf16"), checkpoint("gqa_untied_bf16"), checkpoint("mha_untied_f32_sharded")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 660\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"


class FieldTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def run_command(self, command, *arguments: object, code: int) -> str:
        """Runs a command in this process; returns everything that it printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                found = command.main(command.parse(["apr-jax", *map(str, arguments)]))
            except AprJaxError as error:
                found = cli.report(error, as_json=False)
        self.assertEqual(found, code, out.getvalue())
        return out.getvalue()

    def verify(self, *arguments: object, code: int = 0) -> str:
        return self.run_command(verify, *arguments, code=code)

    def verify_json(self, *arguments: object, code: int = 0) -> dict:
        return json.loads(self.verify(*arguments, "--json", code=code))

    def convert(self, source: pathlib.Path, *options: object, to: str = "apr", code: int = 0) -> str:
        output = self.folder / ("out.apr" if to == "apr" else "out")
        return self.run_command(convert, source, "-o", output, "--to", to, "--force", *options, code=code)

    def copy(self, source: pathlib.Path = TIED) -> pathlib.Path:
        target = self.folder / f"copy{len(list(self.folder.iterdir()))}"
        shutil.copytree(source, target)
        return target

    def renamed(self, source: pathlib.Path, rename) -> pathlib.Path:
        target = self.copy(source)
        tensors = safetensors.numpy.load_file(target / "model.safetensors")
        renamed = {rename(name): values for name, values in tensors.items()}
        self.assertNotEqual(list(renamed), list(tensors))
        safetensors.numpy.save_file(renamed, target / "model.safetensors", {"format": "pt"})
        return target

    def edit(self, folder: pathlib.Path, name: str, **changes: object) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))


def bare(name: str) -> str:
    return name.removeprefix("model.")


# Name of the case -> what the wrapper makes of a name, and the words that say so.
PREFIXES = {
    "torch_compile": (lambda name: f"_orig_mod.{name}", "has '_orig_mod.' in front"),
    "data_parallel": (lambda name: f"module.{name}", "has 'module.' in front"),
    "both": (lambda name: f"module._orig_mod.{name}", "has 'module._orig_mod.' in front"),
    "peft": (lambda name: f"base_model.model.{name}", "has 'base_model.model.' in front"),
    "multimodal": (
        lambda name: name if name.startswith("lm_head") else f"model.language_model.{bare(name)}",
        "'model.language_model.' in place of 'model.'",
    ),
    "multimodal_outside": (lambda name: f"language_model.{name}", "has 'language_model.' in front"),
    "compiled_layers": (
        lambda name: re.sub(r"layers\.(\d+)", r"layers.\1._orig_mod", name),
        "'model.layers.*._orig_mod.'",
    ),
    "bare_model_in_ddp": (lambda name: f"module.{bare(name)}", "'module.' in place of 'model.'"),
    "bare_model_in_peft": (lambda name: f"base_model.model.{bare(name)}", "'base_model."),
    "sentence_transformers": (lambda name: f"0.auto_model.{bare(name)}", "'0.auto_model.' in place of 'model.'"),
}


class NamesTest(FieldTestCase):
    @parameterized.named_parameters((name, *case) for name, case in PREFIXES.items())
    def test_field_prefixes(self, rename, words):
        """FIELD Configurations: names with a prefix in front or within -> one line says it, --rename takes it away"""
        for original in (TIED, UNTIED):
            source = self.renamed(original, rename)
            said = self.verify(source, code=1)
            self.assertIn(words, said)
            self.assertNotIn("missing", said)
            said = self.convert(source, code=5)
            self.assertIn(words, said)
            self.assertLen(said.splitlines(), 1)
            # What the message advises is what gets past it.
            options = re.findall(r"--rename (\S+)", said)
            self.assertNotEmpty(options)
            arguments = [argument for option in options for argument in ("--rename", option.strip("'`"))]
            self.convert(source, *arguments)
            self.assertIn("identical", self.verify(original, self.folder / "out.apr"))

    @parameterized.named_parameters((name, *case) for name, case in PREFIXES.items())
    def test_field_a_comparison_goes_on_over_names_that_match(self, rename, words):
        """FIELD Configurations: verify A B where B's names have a prefix -> one line, and every tensor is compared"""
        other = self.renamed(UNTIED, rename)
        found = self.verify_json(UNTIED, other, code=1)
        self.assertEqual((found["compared"]["tensors"], found["only_in_a"], found["only_in_b"]), (27, [], []))
        self.assertEqual((found["verdict"], found["weights"]), ("different", "identical"))
        self.assertEqual(found["answers_differ_by"], ["names"])
        self.assertIn(words, found["names"]["sentence"])
        # The other way round B has the names that programs look for.
        self.assertEqual(self.verify_json(other, UNTIED)["verdict"], "identical")

    @parameterized.parameters(TIED, UNTIED)
    def test_field_without_model_in_front(self, original):
        """FIELD Configurations: names without `model.` -> loads, converts and compares, and says it"""
        source = self.renamed(original, bare)
        self.assertIn("transformers finds them all the same", self.verify(source))
        self.assertIn("lack", self.verify(original, source))
        said = self.convert(source)
        self.assertIn("--rename =model.", said)
        self.assertIn("identical", self.verify(source, self.folder / "out.apr"))
        self.convert(source, "--rename", "=model.", *(["--rename", "lm_head.=lm_head."] if original == UNTIED else []))
        self.assertEqual(self.verify_json(original, self.folder / "out.apr")["names"], None)

    def test_field_a_language_model_among_other_tensors(self):
        """FIELD Configurations: model.language_model. beside more tensors of a vision tower -> the names are found"""
        source = self.renamed(TIED, PREFIXES["multimodal"][0])
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        tensors |= {f"model.visual.blocks.{n}.mlp.weight": np.ones(3, np.float32) for n in range(100)}
        safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
        self.assertIn("26 of 126 tensors' names begin with 'model.language_model.'", self.convert(source, code=5))
        rename = ("--rename", "model.language_model.=model.")
        self.assertIn("--leave-out", self.convert(source, *rename, code=5))
        self.convert(source, *rename, "--leave-out", "model.visual.*")
        self.assertIn("identical", self.verify(TIED, self.folder / "out.apr"))

    @parameterized.parameters(
        ("x.=", "begins with"), ("model.layers.*.=model.", "several tensors"), ("a", "not a renaming")
    )
    def test_renamings_that_cannot_be_are_refused(self, rule, words):
        self.assertIn(words, self.convert(TIED, "--rename", rule, code=2))

    def test_tensors_that_are_in_other_places_are_no_prefix(self):
        shifted = self.renamed(TIED, lambda name: name.replace("layers.1.", "layers.2."))
        self.assertIn("missing", self.verify(shifted, code=1))
        self.assertNotIn("in front", self.verify(shifted, code=1))


class IndexTest(FieldTestCase):
    def sharded(self, **config: object) -> pathlib.Path:
        source = self.folder / "sharded"
        self.run_command(convert, TIED, "-o", source, "--to", "safetensors", "--max-shard-size", "80KB", code=0)
        self.edit(source, "config.json", **config)
        return source

    @parameterized.parameters(
        "lm_head.weight", "language_model.lm_head.weight", "_orig_mod.lm_head.weight", "module.lm_head.weight"
    )
    def test_field_an_index_that_lists_a_tied_head(self, name):
        """FIELD Configurations: index.json that lists a tied lm_head.weight that no shard holds -> a warning"""
        source = self.sharded()
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = max(index["weight_map"].values())
        path.write_text(json.dumps(index))
        words = f"the index lists {name}, which no shard holds"
        self.assertIn(words, self.verify(source))
        self.assertIn(words, self.convert(source))
        self.assertIn("identical", self.verify(TIED, path))

    def test_field_an_index_that_lists_tables_of_rope(self):
        """FIELD Configurations: index.json that lists rotary_emb.inv_freq that no shard holds -> opens"""
        source = self.sharded()
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = min(index["weight_map"].values())
        path.write_text(json.dumps(index))
        self.assertIn("identical", self.verify(TIED, path))

    def test_a_head_that_is_not_tied_or_another_tensor_is_still_missing(self):
        for name, tied in (("lm_head.weight", False), ("model.norm.bias", True)):
            source = self.sharded(tie_word_embeddings=tied)
            path = source / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            index["weight_map"][name] = max(index["weight_map"].values())
            path.write_text(json.dumps(index))
            self.assertIn(f"{name}: not in", self.verify(source, code=4))
            shutil.rmtree(source)


BROKEN = {
    "cut": (lambda content: content[:200], "not valid JSON"),
    "empty": (lambda content: b"", "is empty"),
    "blank": (lambda content: b"\n \n", "nothing but blanks"),
    "git_lfs_pointer": (lambda content: LFS, "Git-LFS pointer"),
    "html": (lambda content: HTML, "HTML page"),
    "list": (lambda content: b"[" + content + b"]", "a list in place of an object"),
    "text": (lambda content: b'"' + b"x" * 20 + b'"', "a text in place of an object"),
    "byte_order_mark": (lambda content: b"\xef\xbb\xbf" + content, "byte-order mark"),
    "nan": (lambda content: content.replace(b"{", b'{"x": NaN,', 1), "NaN"),
    "utf16": (lambda content: content.decode().encode("utf-16"), "not UTF-8"),
    "single_quotes": (lambda content: content.replace(b'"', b"'"), "not valid JSON"),
}


class SideFilesTest(FieldTestCase):
    @parameterized.named_parameters((name, *case) for name, case in BROKEN.items())
    def test_field_broken_side_files(self, damage, words):
        """FIELD Configurations: config.json or another side file cut, empty, LFS pointer, HTML, list, BOM -> fails"""
        others = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
        for name in ("config.json", others[len(words) % len(others)]):
            source = self.copy()
            (source / name).write_bytes(damage((source / name).read_bytes()))
            said = self.verify(source, code=1)
            self.assertRegex(said, rf"failure +side-files: {name} .*{words}")
            found = self.verify_json(TIED, source, code=1)
            self.assertEqual((found["verdict"], found["weights"]), ("different", "identical"))
            self.assertIn(name, found["answers_differ_by"])
            # In both it is no less broken.
            self.assertIn(f"{name} ", self.verify(source, source, code=1))
            if name == "config.json":
                self.assertIn("--as-is", self.convert(source, code=4))
            self.assertRegex(self.convert(source, "--as-is"), f"warning: .*{name} .*{words}")
            self.convert(self.folder / "out.apr", to="safetensors")
            self.assertEqual((self.folder / "out" / name).read_bytes(), (source / name).read_bytes())

    @parameterized.parameters(
        ("merges.txt", b""), ("merges.txt", LFS), ("chat_template.jinja", b"\xff\xfe"), ("tokenizer.model", LFS)
    )
    def test_field_broken_texts(self, name, content):
        """FIELD Configurations: merges.txt, template, tokenizer model that is an LFS pointer or no text -> fails"""
        source = self.copy()
        (source / name).write_bytes(content)
        self.assertRegex(self.verify(source, code=1), f"failure +side-files: {name}")

    @parameterized.parameters("added_tokens.json", "tokenizer.json", "tokenizer.json, vocab", "tokenizer_config.json")
    def test_field_a_vocabulary_larger_than_the_embedding(self, place):
        """FIELD Text: vocabulary of the tokenizer larger than the embedding -> verify says it"""
        source, name = self.copy(), place.partition(",")[0]
        content = json.loads((source / name).read_text()) if (source / name).exists() else {}
        if name == "added_tokens.json":
            content["<|far|>"] = 288
        elif place.endswith("vocab"):
            content["model"]["vocab"]["<|far|>"] = 288
        elif name == "tokenizer.json":
            content["added_tokens"].append({"id": 288, "content": "<|far|>", "special": True})
        else:
            content["added_tokens_decoder"]["288"] = {"content": "<|far|>"}
        (source / name).write_text(json.dumps(content))
        self.assertRegex(self.verify(source, code=1), r"failure +vocabulary: .*288 \('<\|far\|>'\).* 288 rows")


class AnswersTest(FieldTestCase):
    """Equal weights that answer otherwise, and differences that change nothing."""

    def differ_by(self, name: str, change: dict[str, object]) -> dict:
        other = self.copy()
        self.edit(other, name, **change)
        found = self.verify_json(TIED, other, code=1)
        self.assertEqual((found["verdict"], found["weights"]), ("different", "identical"))
        self.assertIn("the weights are identical, but not", self.verify(TIED, other, code=1).splitlines()[0])
        return found

    @parameterized.parameters(
        {"rope_theta": 1e4}, {"rms_norm_eps": 1e-5}, {"num_attention_heads": 7}, {"num_key_value_heads": 1}
    )
    def test_field_another_configuration(self, **change):
        """FIELD Configurations: rope_theta (eps, heads) changed beside equal weights -> not rc 0, named"""
        found = self.differ_by("config.json", change)
        self.assertEqual(found["answers_differ_by"], ["configuration"])

    @parameterized.parameters(
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "chat template"),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}, "tokenizer_config.json"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "tokenizer_config.json"),
        ("generation_config.json", {"eos_token_id": 281}, "generation_config.json"),
        ("generation_config.json", {"temperature": 1.3}, "generation_config.json"),
        ("generation_config.json", {"do_sample": False}, "generation_config.json"),
        ("generation_config.json", {"repetition_penalty": 1.0}, "generation_config.json"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "tokenizer.json"),
        ("tokenizer.json", {"added_tokens": []}, "tokenizer.json"),
    )
    def test_field_another_tokenizer_template_or_setting(self, name, change, said):
        """FIELD Configurations: chat template, end token, tokenizer changed beside equal weights -> named, not rc 0"""
        found = self.differ_by(name, change)
        self.assertEqual(found["answers_differ_by"], [said])
        (difference,) = found["side_files"]
        self.assertTrue(difference["changes_answer"])
        self.assertIn(difference["sentence"].split(":")[0].split(" ")[0], said + " the")

    @parameterized.parameters(
        ("config.json", {"transformers_version": "5.1.0", "torch_dtype": "float16", "use_cache": False}),
        ("config.json", {"_name_or_path": "/home/me/run", "architectures": None}),
        ("generation_config.json", {"transformers_version": "5.1.0", "pad_token_id": [280]}),
        ("tokenizer.json", {"truncation": {"max_length": 8}, "padding": {"pad_id": 3}}),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": {"content": "<|im_end|>"}}),
    )
    def test_field_differences_that_change_nothing(self, name, change):
        """FIELD Configurations: bookkeeping or spelling differs beside equal weights -> identical, rc 0"""
        other = self.copy()
        self.edit(other, name, **change)
        self.assertEqual(self.verify_json(TIED, other)["verdict"], "identical")

    def test_field_end_tokens_of_the_configuration_count_where_nothing_else_says_them(self):
        """FIELD Configurations: eos_token_id of config.json, without generation_config.json -> named, not rc 0"""
        one, other = self.copy(), self.copy()
        self.edit(other, "config.json", eos_token_id=281)
        self.assertEqual(self.verify_json(one, other)["verdict"], "identical")
        for folder in (one, other):
            (folder / "generation_config.json").unlink()
        found = self.verify_json(one, other, code=1)
        self.assertEqual(found["answers_differ_by"], ["config.json"])
        self.assertIn("eos_token_id 280 in A, 281 in B", found["side_files"][0]["sentence"])

    def test_field_the_vocabulary_of_an_apr(self):
        """FIELD Configurations: another vocabulary in the metadata of an .apr of `apr import` -> named, not rc 0"""
        genuine = next(path for path in sorted((DATA / "apr").glob("*.apr")) if self.has_vocabulary(path))
        with open_checkpoint(genuine) as opened:
            metadata = dict(opened.metadata)
            tensors = {name: tensor.read().astype(np.float32) for name, tensor in opened.tensors.items()}
        paths = [self.folder / "a.apr", self.folder / "b.apr"]
        for path, token in zip(paths, (metadata["tokenizer.vocabulary"][7], "other"), strict=True):
            metadata["tokenizer.vocabulary"][7] = token
            path.write_bytes(apr_file(tensors, metadata))
        self.assertEqual(self.verify_json(paths[0], paths[0])["verdict"], "identical")
        found = self.verify_json(*paths, code=1)
        self.assertEqual(found["answers_differ_by"], ["vocabulary"])
        self.assertIn("7 is", found["side_files"][0]["sentence"])

    def has_vocabulary(self, path: pathlib.Path) -> bool:
        with contextlib.suppress(AprJaxError), open_checkpoint(path) as opened:
            return bool(opened.tensors) and "tokenizer.vocabulary" in opened.metadata
        return False

    def test_field_a_template_in_another_place_is_the_same_template(self):
        """FIELD Configurations: chat template moved to chat_template.jinja -> identical, rc 0"""
        other = self.copy()
        settings = json.loads((other / "tokenizer_config.json").read_text())
        (other / "chat_template.jinja").write_text(settings.pop("chat_template"))
        (other / "tokenizer_config.json").write_text(json.dumps(settings))
        self.assertEqual(self.verify_json(TIED, other)["verdict"], "identical")
        (other / "chat_template.jinja").write_text("{{ messages }}")
        self.assertEqual(self.verify_json(TIED, other, code=1)["answers_differ_by"], ["chat template"])

    def test_files_that_one_side_lacks_are_named_and_count_for_nothing(self):
        other = self.copy()
        (other / "generation_config.json").unlink()
        found = self.verify_json(TIED, other)
        self.assertEqual([difference["only_in"] for difference in found["side_files"]], ["A"])
        self.assertIn("generation_config.json is only in A", self.verify(TIED, other))
        shutil.copy(TIED / "model.safetensors", self.folder / "lone.safetensors")
        self.assertEqual(self.verify_json(TIED, self.folder / "lone.safetensors")["side_files"], [])


class PartsTest(FieldTestCase):
    """Files of tensors that are no model of their own."""

    def sharded(self) -> pathlib.Path:
        source = self.folder / "sharded"
        self.run_command(convert, TIED, "-o", source, "--to", "safetensors", "--max-shard-size", "80KB", code=0)
        self.assertLen(list(source.glob("model-*-of-00003.safetensors")), 3)
        return source

    @parameterized.parameters("alone", "beside_its_index", "in_a_folder", "under_another_name")
    def test_field_one_shard_of_several(self, where):
        """FIELD Configurations: model-00001-of-00003.safetensors alone -> says what it is, refused unless --as-is"""
        shard = self.sharded() / "model-00002-of-00003.safetensors"
        if where == "alone":
            shard = shutil.move(shard, self.folder / shard.name)
        elif where == "under_another_name":
            shard = shutil.copy(shard, self.folder / "pytorch_model-2-of-3.safetensors")
        elif where == "in_a_folder":
            for other in (*shard.parent.glob("*.index.json"), *shard.parent.glob("*-0000[13]-*")):
                other.unlink()
            shard = shard.parent
        said = self.convert(shard, code=5)
        self.assertIn("this is shard 2 of 3 of a model", said)
        self.assertIn("--as-is", said)
        self.convert(shard, "--as-is")
        self.assertIn("shard 2 of 3", self.verify(shard, code=1 if where == "in_a_folder" else 0))

    def test_field_shards_without_an_index(self):
        """FIELD Configurations: all shards of a model without an index -> opened; one missing -> names it"""
        source = self.sharded()
        (source / "model.safetensors.index.json").unlink()
        self.assertIn("there is no model.safetensors.index.json", self.verify(source))
        self.assertIn("identical", self.verify(TIED, source))
        (source / "model-00002-of-00003.safetensors").unlink()
        said = self.convert(source, code=3)
        self.assertIn("model-00002-of-00003.safetensors", said)
        self.assertNotIn("path of the file itself", said)

    def adapter(
        self, names=("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",), **config
    ) -> pathlib.Path:
        folder = self.folder / "adapter"
        folder.mkdir()
        tensors = {name: np.ones((8, 56), np.float32) for name in names}
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        if config:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    @parameterized.named_parameters(
        ("lora", {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}, ("LORA", "rank 8", "for q_proj")),
        ("ia3", {"peft_type": "IA3"}, ("IA3",)),
        ("prompts", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}, ("PROMPT_TUNING",)),
    )
    def test_field_an_adapter_alone(self, config, words):
        """FIELD Configurations: a PEFT adapter alone -> said to be one, of what base; --adapter and --as-is named"""
        folder = self.adapter(**config, base_model_name_or_path="Qwen/Qwen2.5-0.5B")
        for path in (folder, folder / "adapter_model.safetensors"):
            said = self.convert(path, code=5)
            for word in (*words, "PEFT adapter", "of Qwen/Qwen2.5-0.5B", "--adapter", "--as-is"):
                self.assertIn(word, said)
            self.assertIn("PEFT adapter", self.verify(path))
            self.assertIn("PEFT adapter", self.verify(TIED, path, code=1))
            with open_checkpoint(path) as opened:
                for asked in (opened.model_config, lambda opened=opened: opened.config):
                    with self.assertRaises(AprJaxError) as caught:
                        asked()
                    self.assertEqual(caught.exception.code, "adapter")
        self.convert(folder, "--as-is")

    def test_field_an_adapter_whose_weights_are_a_pickle(self):
        """FIELD Configurations: adapter_config.json beside adapter_model.bin -> said to be an adapter"""
        folder = self.adapter(peft_type="LORA", base_model_name_or_path="Qwen/Qwen2.5-0.5B")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        said = self.convert(folder, code=5)
        self.assertIn("PEFT adapter, LORA of Qwen/Qwen2.5-0.5B", said)
        self.assertIn("save_pretrained", said)

    @parameterized.parameters("model.layers.0.self_attn.q_proj.lora_a", "layers.1.mlp.up_proj.lora_embedding_B.default")
    def test_field_an_adapter_without_its_configuration(self, name):
        """FIELD Configurations: adapter tensors without adapter_config.json, MLX's too -> said to be an adapter"""
        folder = self.adapter(names=(name,))
        self.assertIn("does not say of which model", self.convert(folder, code=5))


def apr_file(tensors: dict[str, np.ndarray], metadata: dict[str, object]) -> bytes:
    """An `.apr` of float32 tensors, written by the description of the format."""

    def padded(part: bytes) -> bytes:
        return part + bytes(-len(part) % 64)

    text, index, data = json.dumps(metadata).encode(), b"", b""
    for name in sorted(tensors):
        values = tensors[name]
        index += struct.pack(f"<H{len(name)}sBB", len(name), name.encode(), 0, values.ndim)
        index += struct.pack(f"<{values.ndim + 2}Q", *values.shape, len(data), values.nbytes)
        data += padded(values.tobytes())
    index_at = 64 + len(padded(text))
    places = 64, len(text), index_at, index_at + len(padded(index))
    header = struct.pack("<4sBBHIQIQQ", b"APR\0", 2, 0, 0x400, len(tensors), *places)
    header += struct.pack("<I", zlib.crc32(header + bytes(20))) + bytes(20)
    whole = header + padded(text) + padded(index) + data
    return whole + struct.pack("<I", zlib.crc32(whole))


class AprenderTest(FieldTestCase):
    """What aprender's trainer writes, by its "APR Checkpoint Specification" 1.3.0."""

    ADAPTER = ("lora.0.q_proj.lora_a", "lora.0.q_proj.lora_b", "classifier.weight", "classifier.bias")
    STATE = ("__training__.optim.lora.0.q_proj.lora_a.exp_avg", "__training__.optim.lora.0.q_proj.lora_a.exp_avg_sq")
    BASE = "hf://Qwen/Qwen2.5-Coder-0.5B"

    def write(self, names, metadata: dict[str, object], name: str) -> pathlib.Path:
        path = self.folder / name
        # As a run begins: half of the adapter and all sums are zero.
        zero = tuple(key for key in names if key.endswith(("lora_b", "exp_avg", "exp_avg_sq")))
        path.write_bytes(apr_file({key: np.full((4, 8), key not in zero, np.float32) for key in names}, metadata))
        return path

    @parameterized.named_parameters(
        (
            "nested",
            {"__checkpoint__": {"schema_version": 1, "type": "adapter"}, "adapter_type": "lora"},
            {"adapter_config": {"rank": 16, "target_modules": ["v_proj", "q_proj"]}},
            ("rank 16", "for q_proj, v_proj"),
        ),
        ("flat", {"__checkpoint__.schema_version": "1.3.0", "model_type": "adapter"}, {"lora_rank": 8}, ("rank 8",)),
        ("by_names_alone", {}, {}, ("adapter of aprender",)),
    )
    def test_field_an_adapter_of_aprender(self, kind, details, words):
        """FIELD Configurations: an .adapter.apr -> shown, verified, said to be an adapter and of what base"""
        metadata = {**kind, **details, "architecture": "qwen2", "base_model_source": self.BASE}
        path = self.write(self.ADAPTER, metadata, "best.adapter.apr")
        for said in (
            self.convert(path, code=5, to="safetensors"),
            self.verify(path),
            self.run_command(show, path, code=0),
        ):
            for word in (*words, self.BASE, "adapter of aprender"):
                self.assertIn(word, said)
        self.assertIn("--as-is", self.convert(path, code=5, to="safetensors"))
        self.convert(path, "--as-is", to="safetensors")

    @parameterized.parameters(
        {"__checkpoint__": {"type": "training"}, "__training__": {"epoch": 1, "global_step": 535}},
        {"__checkpoint__.type": "training", "epoch": 1, "global_step": 535},
    )
    def test_field_a_training_checkpoint_of_aprender(self, **metadata):
        """FIELD Configurations: a .ckpt.apr -> shown, verified, said to be a training checkpoint, with its epoch"""
        path = self.write(self.ADAPTER + self.STATE, metadata, "epoch-1.ckpt.apr")
        for said in (self.verify(path), self.run_command(show, path, code=0)):
            self.assertIn("a training checkpoint of aprender (epoch 1, step 535), 2 of 6 tensors the state", said)

    def test_field_a_training_checkpoint_that_holds_a_model(self):
        """FIELD Configurations: a .ckpt.apr with a whole model in it -> the model is verified and loads, state left"""
        path = self.folder / "m.ckpt.apr"
        with open_checkpoint(SHARDED) as opened:
            tensors = {name: tensor.read() for name, tensor in opened.tensors.items()}
            config = opened.config
        tensors["__training__.optim.model.norm.weight.exp_avg"] = np.zeros(60, np.float32)
        files = {"source_files": {"config.json": json.dumps(config)}}
        path.write_bytes(apr_file(tensors, {"architecture": "qwen2", "__training__": {"epoch": 3}, **files}))
        said = self.verify(path, code=1)
        self.assertIn("this is a training checkpoint of aprender (epoch 3), 1 of", said)
        self.assertRegex(said, "ok +tensor-set")
        with open_checkpoint(path) as opened:
            loaded = for_model(opened, opened.model_config())
            self.assertEqual(set(tensors) - set(loaded.tensors), {"__training__.optim.model.norm.weight.exp_avg"})

    def test_field_the_last_four_bytes_missing(self):
        """FIELD Configurations: an .apr that ends where its padded data end, without footer -> opened with a warning"""
        self.convert(TIED)
        whole = (self.folder / "out.apr").read_bytes()
        path = self.folder / "cut.apr"
        path.write_bytes(whole[:-4])
        self.assertRegex(self.verify(path), "note +warning: there is no footer")
        self.assertIn("identical", self.verify(TIED, path))
        for cut in (1, 3, 5, 64):
            path.write_bytes(whole[:-cut])
            self.verify(path, code=4)


class PlacesTest(FieldTestCase):
    """Folders of trainers and of HuggingFace's cache."""

    def cache(self, name: str = "models--Qwen--Qwen2.5-0.5B") -> pathlib.Path:
        """Returns a cache as huggingface_hub lays it out, with the tied sample in it."""
        repository = self.folder / "hub" / name
        snapshot = repository / "snapshots" / ("c" * 40)
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True)
        for file in TIED.iterdir():
            blob = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, repository / "blobs" / blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
        (repository / "refs" / "main").write_text("c" * 40)
        return repository

    def test_field_a_snapshot_and_the_cache_folder(self):
        """FIELD Configurations: HF cache snapshot of symlinks; the folder models--X--Y -> opened, by refs/main"""
        repository = self.cache()
        (repository / "snapshots" / ("d" * 40)).mkdir()
        for path in (repository, repository / "snapshots" / ("c" * 40)):
            self.assertIn("identical", self.verify(TIED, path))
        (repository / "refs" / "main").write_text("e" * 40)
        said = self.verify(TIED, repository, code=3)
        self.assertIn(str(repository / "snapshots" / ("c" * 40)), said)
        # Of several repositories none is the one that is meant.
        self.assertIn(str(repository), self.verify(repository.parent, code=3))

    def test_a_cache_without_refs_is_opened_where_it_has_one_snapshot(self):
        repository = self.cache()
        shutil.rmtree(repository / "refs")
        self.assertIn("identical", self.verify(TIED, repository))
        (repository / "snapshots" / ("d" * 40)).mkdir()
        self.assertIn("c" * 40, self.verify(TIED, repository, code=3))
        for revision in ("../snapshots", "x/../main", ""):
            with self.assertRaises(MissingFileError):
                folders.snapshot(os.fspath(repository), revision)

    @parameterized.parameters("../../x", "/etc", "", "..", "c\0")
    def test_field_a_cache_whose_main_is_no_revision(self, main):
        """FIELD Configurations: refs/main that leads elsewhere -> refused, naming the snapshots that are there"""
        repository = self.cache()
        (repository / "snapshots" / ("d" * 40)).mkdir()
        (repository / "refs" / "main").write_text(main)
        self.assertIn("c" * 40, self.verify(repository, code=3))

    def test_field_links_into_the_cache(self):
        """FIELD Configurations: files of an old --local-dir download are links into the cache's blobs -> opened"""
        repository = self.cache()
        folder = self.folder / "local"
        folder.mkdir()
        for file in (repository / "snapshots" / ("c" * 40)).iterdir():
            (folder / file.name).symlink_to(file.resolve())
        self.assertIn("identical", self.verify(TIED, folder))

    def test_field_links_into_a_cache_that_was_cleaned(self):
        """FIELD Configurations: links whose blobs are gone -> said, not "no such file" """
        folder = self.copy()
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(self.folder / "models--a--b" / "blobs" / ("a" * 64))
        self.assertIn("a link to a file that is gone", self.convert(folder, code=3))

    @parameterized.parameters("model.safetensors", "config.json", "tokenizer.json")
    def test_field_links_that_lead_elsewhere(self, name):
        """FIELD Configurations: a link out of the folder -> refused, and --follow-links opens it"""
        folder = self.copy()
        target = shutil.move(folder / name, self.folder / f"elsewhere_{name}")
        (folder / name).symlink_to(target)
        said = self.verify(TIED, folder, code=5 if name == "model.safetensors" else 1)
        self.assertIn("link that leads out of its folder", said)
        self.assertIn("--follow-links", self.convert(folder, code=5))
        self.assertIn("identical", self.verify(TIED, folder, "--follow-links"))
        self.convert(folder, "--follow-links")

    @parameterized.parameters(
        "blobs/secret", "models--a--b/blobs/id_rsa", "models--a--b/blobs/../../secret", f"other/blobs/{'a' * 64}"
    )
    def test_links_that_only_look_like_the_cache_are_refused(self, target):
        folder = self.copy()
        path = self.folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "config.json", path)
        (folder / "config.json").symlink_to(path)
        self.assertIn("--follow-links", self.convert(folder, code=5))

    def test_field_a_trainers_checkpoint(self):
        """FIELD Configurations: checkpoint-500/ with optimizer.pt and the like -> the model opened, the rest named"""
        folder = self.copy()
        rest = (
            "optimizer.pt",
            "rng_state.pth",
            "scheduler.pt",
            "trainer_state.json",
            "training_args.bin",
            "global_step5",
        )
        for name in rest:
            (folder / name).write_bytes(b"PK\x03\x04")
        said = self.convert(folder)
        for name in rest:
            self.assertIn(name, said)
        self.assertIn("identical", self.verify(TIED, folder))

    def test_field_a_run_folder(self):
        """FIELD Configurations: a folder that only holds checkpoint-*/ -> says so and names the last of them"""
        run = self.folder / "run"
        run.mkdir()
        for name in ("checkpoint-90", "checkpoint-1000", "checkpoint-500"):
            shutil.copytree(TIED, run / name)
        said = self.convert(run, code=3)
        self.assertIn(f"3 checkpoints of a training run; the last is {run / 'checkpoint-1000'}", said)
        (run / "checkpoint-2000").mkdir()
        self.assertIn("checkpoint-1000", self.convert(run, code=3))

    @parameterized.parameters(("final",), ("epoch_1", "epoch_2"), ("hf", "gguf"))
    def test_field_a_folder_of_folders(self, *names):
        """FIELD Configurations: a folder whose checkpoints lie one further down -> names them"""
        for name in names:
            shutil.copytree(TIED, self.folder / "out" / name)
        said = self.verify(self.folder / "out", code=3)
        for name in names:
            self.assertIn(str(self.folder / "out" / name), said)


def safetensors_file(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file with its data in the order of the dict, as the format's description has it."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[values.dtype.name]
        end = len(data) + values.nbytes
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": [len(data), end]}
        data += values.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


ORDERS = {
    "wide_first": lambda names: sorted(names, key=lambda name: (not name.endswith("norm.weight"), name)),
    "by_name": sorted,
    "backwards": lambda names: sorted(names, reverse=True),
    "by_execution": lambda names: sorted(names, key=lambda name: ("norm" in name, len(name), name)),
}


class LayoutTest(FieldTestCase):
    @parameterized.product(order=list(ORDERS), norms=("float32", "float16"))
    def test_field_mixed_types(self, order, norms):
        """FIELD Configurations: f32 (f16) norms beside bf16 -> the same file after .apr and back, byte for byte"""
        source = self.copy()
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name] = tensors[name].astype(norms)
        content = safetensors_file({name: tensors[name] for name in ORDERS[order](tensors)})
        (source / "model.safetensors").write_bytes(content)
        self.convert(source)
        self.convert(self.folder / "out.apr", to="safetensors")
        self.assertEqual((self.folder / "out" / "model.safetensors").read_bytes(), content)
        self.convert(source, to="safetensors")
        self.assertEqual((self.folder / "out" / "model.safetensors").read_bytes(), content)

    def test_a_cast_goes_back_to_the_usual_order(self):
        source = self.copy()
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        backwards = safetensors_file({name: tensors[name] for name in sorted(tensors, reverse=True)})
        (source / "model.safetensors").write_bytes(backwards)
        self.convert(source, "--cast", "*norm*=f32")
        self.convert(self.folder / "out.apr", to="safetensors")
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].astype(np.float32)
        expected = safetensors.numpy.save(tensors, {"format": "pt"})
        self.assertEqual((self.folder / "out" / "model.safetensors").read_bytes(), expected)


class AnyArchitectureTest(FieldTestCase):
    @parameterized.parameters(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "frobnicator", "architectures": [], "depth": {"of": ["it"]}},
        {"model_type": None},
        {"hidden_act": "gelu"},
        {"num_hidden_layers": "two", "rope_theta": "many"},
    )
    def test_field_any_configuration_converts(self, **change):
        """FIELD Configurations: config.json of any architecture -> converts bit for bit, with a warning"""
        source = self.copy()
        self.edit(source, "config.json", **change)
        said = self.convert(source)
        self.assertIn("converted as it is", said)
        self.convert(self.folder / "out.apr", to="safetensors")
        for name in ("config.json", "model.safetensors"):
            self.assertEqual((self.folder / "out" / name).read_bytes(), (source / name).read_bytes(), name)
        self.assertIn("identical", self.verify(source, self.folder / "out.apr"))

    @parameterized.parameters("llama", "mistral", "frobnicator")
    def test_field_an_architecture_that_is_not_computed_here_is_no_failure(self, kind):
        """FIELD Configurations: verify of a file whose architecture is not computed here -> passes, and says it"""
        source = self.copy()
        self.edit(source, "config.json", model_type=kind)
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        kept = {name: values for name, values in tensors.items() if not name.endswith("proj.bias")}
        safetensors.numpy.save_file(kept, source / "model.safetensors", {"format": "pt"})
        self.assertIn(kind, self.verify(source))

    @parameterized.parameters(
        {"hidden_act": "gelu"},
        {"num_experts": 8},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"rope_scaling": {"rope_type": "unheard-of"}},
    )
    def test_field_what_the_model_could_not_run_is_no_failure(self, **change):
        """FIELD Configurations: verify of a Qwen2 with what is not computed here -> passes, and says it"""
        source = self.copy()
        self.edit(source, "config.json", **change)
        self.assertRegex(self.verify(source), f"skipped +configuration: .*{next(iter(change))}")
        self.edit(source, "config.json", hidden_size="wide")
        self.assertRegex(self.verify(source, code=1), "failure +configuration: .*hidden_size")

    def test_a_llama_with_biases_is_no_qwen2_if_its_configuration_asks_for_them(self):
        source = self.copy()
        self.edit(source, "config.json", model_type="llama")
        self.assertRegex(self.verify(source, code=1), "failure +architecture")
        self.edit(source, "config.json", attention_bias=True)
        self.verify(source)

    def test_tensors_that_are_not_the_configurations_convert_where_it_is_asked_for(self):
        source = self.copy()
        tensors = safetensors.numpy.load_file(source / "model.safetensors")
        tensors["score.weight"] = tensors.pop("model.norm.weight")
        safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
        self.assertIn("--as-is", self.convert(source, code=5))
        self.assertIn("unexpected: score.weight", self.convert(source, "--as-is"))
        self.assertIn("no tensor's name matches", self.convert(source, "--leave-out", "nothing.*", code=2))
        self.assertIn("identical", self.verify(source, self.folder / "out.apr"))


class OtherProgramsTest(FieldTestCase):
    """Folders that other programs wrote, alone: nothing of them is read, and what makes a checkpoint of it is said."""

    FOLDERS: ClassVar = {
        "deepspeed": (
            ("zero_to_fp32.py", "latest", "global_step500/mp_rank_00_model_states.pt", "training_args.bin"),
            "DeepSpeed",
            "python zero_to_fp32.py . OUT --safe_serialization",
        ),
        "accelerate_fsdp": (
            ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"),
            "FSDP",
            "accelerate merge-weights",
        ),
        "torchtitan": ((".metadata", "__0_0.distcp", "__1_0.distcp"), "FSDP", "accelerate merge-weights"),
        "megatron": (
            ("latest_checkpointed_iteration.txt", "iter_0000500/mp_rank_00/model_optim_rng.pt"),
            "Megatron",
            "export it to HuggingFace's format",
        ),
        "flax": (("flax_model.msgpack",), "Flax or TensorFlow", "transformers before version 5"),
        "tensorflow": (("tf_model.h5",), "Flax or TensorFlow", "transformers before version 5"),
        "mlx_npz": (("weights.npz",), "MLX", "mlx_lm.convert"),
        "pickles": (("pytorch_model.bin", "training_args.bin"), "pickles", "save_pretrained of transformers"),
        "sharded_pickles": (
            ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
            "pickles",
            "save_pre",
        ),
        "onnx": (("onnx/model.onnx", "onnx/model.onnx_data"), "exported", "the checkpoint that it was made from"),
        "openvino": (("openvino_model.xml", "openvino_model.bin"), "", "made from"),
        "gguf_beside": (("a-q4_0.gguf", "a-q8_0.gguf"), "", "Give the path of the file itself"),
        "only_the_state_of_a_run": (
            ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"),
            "",
            "spelling",
        ),
    }

    @parameterized.named_parameters((name, *case) for name, case in FOLDERS.items())
    def test_field_folders_of_other_programs(self, names, what, way):
        """FIELD Configurations: DeepSpeed, FSDP, Megatron, Flax, TF, MLX, pickles, ONNX -> named, with the way out"""
        source = self.copy()
        (source / "model.safetensors").unlink()
        for name in names:
            (source / name).parent.mkdir(exist_ok=True, parents=True)
            (source / name).write_bytes(b"x")
        for said in (
            self.convert(source, code=3),
            self.verify(source, code=3),
            self.run_command(show, source, code=3),
        ):
            self.assertIn(what, said)
            self.assertIn(way, said)
            self.assertLen(said.splitlines(), 1)

    @parameterized.parameters(
        (b"PK\3\4" + bytes(60), "save_pretrained"),
        (b"\x80\2}q\0" + bytes(60), "save_pretrained"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "transformers before version 5"),
        (b"\x1f\x8b\x08" + bytes(60), "Unpack it first"),
        (b"\x93NUMPY" + bytes(60), "safetensors.numpy"),
        (HTML, "Download it again"),
        (LFS, "git lfs pull"),
        (bytes(range(1, 65)), "Download it again"),
    )
    def test_field_files_of_other_programs(self, content, way):
        """FIELD Configurations: a pickle, HDF5, gzip, .npy, HTML, LFS pointer as model.safetensors -> the way out"""
        source = self.copy()
        (source / "model.safetensors").write_bytes(content)
        self.assertIn(way, self.convert(source, code=4))

    def test_field_a_peft_model_saved_whole(self):
        """FIELD Configurations: base_layer and lora_A of a PEFT model that was not merged -> said, with the way out"""
        source = self.renamed(TIED, lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."))
        said = self.convert(source, code=5)
        self.assertIn("the adapter in this model is not merged", said)
        self.assertIn("merge_and_unload", said)
        self.convert(source, "--as-is")
        with open_checkpoint(source) as opened, self.assertRaisesRegex(AprJaxError, "merge_and_unload"):
            for_model(opened, opened.model_config())


if __name__ == "__main__":
    absltest.main()
