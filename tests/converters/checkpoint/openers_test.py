"""Opening checkpoints of every kind: what is read, what is refused and named, and what opening costs."""

import itertools
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from unittest import mock

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import tensor as tensor_module
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
    StorageError,
)
from apr_jax.converters.formats import apr_format, casts, dtypes

ROOT = pathlib.Path(__file__).resolve().parents[3]
DATA = ROOT / "tests" / "data" / "apr"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def arrays(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "a.weight": generator.normal(size=(5, 3)).astype(np.float32),
        "b.bias": generator.normal(size=(7,)).astype(np.float16),
        "c": np.arange(11, dtype=np.uint8),
        "d": generator.integers(-9, 9, size=(2, 3, 4)),
        "e.scalar": np.array(2.5, np.float64),
        "f.empty": np.zeros((0, 3), np.int16),
        "g.flag": np.array([True, False]),
    }


def pad(data):
    return data + bytes(-len(data) % 64)


def apr_file(tensors, metadata):
    """An `.apr` of name -> (type, shape, bytes), checked against hand-made bytes in apr_format_test."""
    entries = apr_format.lay_out(
        (name, dtypes.by_name(kind), shape, len(data)) for name, (kind, shape, data) in tensors.items()
    )
    file = apr_format.serialise_prologue(metadata, entries) + b"".join(pad(tensors[e.name][2]) for e in entries)
    return file + struct.pack("<I", zlib.crc32(file))


class CheckpointTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write_json(self, name, value):
        (self.folder / name).write_text(json.dumps(value))

    def write_shards(self, *shards, weight_map=None, total=None, metadata=None):
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        for name, tensors in zip(names, shards, strict=True):
            safetensors.numpy.save_file(tensors, self.folder / name, metadata)
        found = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        index = {"metadata": {"total_size": size if total is None else total}}
        self.write_json("model.safetensors.index.json", index | {"weight_map": weight_map or found})
        return names

    def assert_refused(self, path, code, kind=AprJaxError, **options):
        before = os.listdir("/proc/self/fd")
        with self.assertRaises(kind) as caught:
            open_checkpoint(path, **options).close()
        self.assertEqual(caught.exception.code, code, str(caught.exception))
        self.assertLen(os.listdir("/proc/self/fd"), len(before), "a file was left open")
        return caught.exception

    def assert_holds(self, opened, expected):
        self.assertEqual(list(opened.tensors), sorted(expected, key=str.encode))
        for name, array in expected.items():
            tensor = opened.tensors[name]
            self.assertEqual((tensor.name, tensor.shape, tensor.nbytes), (name, array.shape, array.nbytes))
            self.assertEqual(tensor.raw(), array.tobytes())
            values = tensor.read()
            self.assertEqual(values.dtype, array.dtype)
            np.testing.assert_array_equal(values, array)
        self.assertNotEmpty(expected)


class FolderTest(CheckpointTestCase):
    def test_folder_and_single_file_hold_what_the_package_saved(self):
        safetensors.numpy.save_file(arrays(), self.folder / "model.safetensors", {"format": "pt"})
        side_files = {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer.json": b'{"a":1}',
            "tokenizer.model": b"\xff\0",
            "merges.txt": b"a b\n",
            "LICENSE": b"x",
            "chat_template.jinja": b"{{ x }}",
        }
        for name, content in side_files.items():
            (self.folder / name).write_bytes(content)
        (self.folder / "optimizer.pt").write_bytes(b"no")
        (self.folder / "tokenizer_folder").mkdir()
        for path in (self.folder, str(self.folder), self.folder / "model.safetensors"):
            with open_checkpoint(path) as opened:
                self.assert_holds(opened, arrays())
                self.assertEqual(opened.kind, "safetensors")
                self.assertEqual(opened.path, os.fspath(path))
                self.assertEqual(opened.metadata, {"format": "pt"})
                self.assertEqual(dict(opened.files), side_files)
                self.assertEqual(opened.config, CONFIG)
                self.assertIsNone(opened.generation_config)
                self.assertEqual(opened.model_config().num_layers, 1)
                self.assertEmpty(opened.warnings)
                self.assertEmpty(opened.placeholders)

    def test_every_small_checkpoint_of_the_repository_opens_as_the_package_reads_it(self):
        compared = 0
        for config in sorted((ROOT / "tests" / "data" / "checkpoints").glob("*/config.json")):
            with open_checkpoint(config.parent) as opened:
                for source in opened.sources:
                    raw = dict(safetensors.deserialize(pathlib.Path(source.path).read_bytes()))
                    for name, theirs in raw.items():
                        self.assertEqual(opened.tensors[name].raw(), theirs["data"])
                        self.assertEqual(list(opened.tensors[name].shape), theirs["shape"])
                        compared += 1
                self.assertEqual(opened.files["config.json"], config.read_bytes())
                opened.model_config()
        self.assertGreater(compared, 20)

    def test_one_file_of_another_name_is_enough(self):
        safetensors.numpy.save_file(arrays(), self.folder / "weights.safetensors")
        with open_checkpoint(self.folder) as opened:
            self.assertLen(opened.tensors, 7)

    def test_a_single_file_goes_before_an_index(self):
        self.write_shards(arrays())
        safetensors.numpy.save_file({"only": np.zeros(1)}, self.folder / "model.safetensors")
        with open_checkpoint(self.folder) as opened:
            self.assertEqual(list(opened.tensors), ["only"])
            self.assertIn("model.safetensors.index.json", opened.warnings[0])

    def test_folders_that_hold_no_checkpoint_say_what_they_hold(self):
        error = self.assert_refused(self.folder, "no-checkpoint", MissingFileError)
        self.assertIn("model.safetensors", str(error))
        for name in ("a.safetensors", "b.safetensors", "pytorch_model.bin"):
            (self.folder / name).write_bytes(b"")
        error = self.assert_refused(self.folder, "no-checkpoint", MissingFileError)
        self.assertIn("pytorch_model.bin", str(error))

    def test_what_has_the_name_of_an_adapters_configuration_and_is_no_file_makes_no_adapter(self):
        (self.folder / "adapter_config.json").mkdir()
        self.assert_refused(self.folder, "no-checkpoint", MissingFileError)
        (self.folder / "adapter_config.json").rmdir()
        self.write_json("adapter_config.json", {"peft_type": "LORA"})
        self.assert_refused(self.folder, "adapter", RefusedError)

    def test_a_folder_that_cannot_be_listed(self):
        failing = mock.patch.object(os, "listdir", side_effect=PermissionError(13, "Permission denied"))
        with failing, self.assertRaises(StorageError) as caught:
            open_checkpoint(self.folder)
        self.assertEqual((caught.exception.code, caught.exception.file), ("open-failed", str(self.folder)))

    def test_missing_paths(self):
        for name in ("none", "none.apr", "none.safetensors", "none.safetensors.index.json"):
            self.assert_refused(self.folder / name, "file-missing", MissingFileError)

    def test_side_files_are_read_when_asked_for(self):
        safetensors.numpy.save_file(arrays(), self.folder / "model.safetensors")
        (self.folder / "tokenizer.json").write_text("before")
        with open_checkpoint(self.folder) as opened:
            (self.folder / "tokenizer.json").write_text("after")
            self.assertEqual(opened.files["tokenizer.json"], b"after")
            self.assertNotIn("config.json", opened.files)
            with self.assertRaises(KeyError):
                opened.files["config.json"]
            with self.assertRaises(RefusedError) as caught:
                _ = opened.config
            self.assertEqual(caught.exception.code, "config-missing")

    def test_malformed_config_is_named(self):
        safetensors.numpy.save_file(arrays(), self.folder / "model.safetensors")
        for text, code in (("[]", "config-type"), ("{", "json-syntax"), ('{"a":1,"a":2}', "json-duplicate")):
            (self.folder / "config.json").write_text(text)
            with open_checkpoint(self.folder) as opened, self.assertRaises(BrokenContainerError) as caught:
                _ = opened.config
            self.assertEqual(caught.exception.code, code)
            self.assertIn("config.json", str(caught.exception))

    def test_opening_reads_headers_only(self):
        big = {"big": np.zeros(1_000_000, np.float32)}
        self.write_shards(big, {"other": np.zeros(500_000, np.float32)})
        (self.folder / "tokenizer.json").write_bytes(bytes(1_000_000))
        read = []
        real = os.preadv

        def counting(fd, views, offset):
            read.append(real(fd, views, offset))
            return read[-1]

        with mock.patch.object(os, "preadv", counting):
            open_checkpoint(self.folder).close()
        self.assertLess(sum(read), 2_000)
        self.assertNotEmpty(read)

    def test_opening_needs_neither_numpy_nor_jax(self):
        safetensors.numpy.save_file(arrays(), self.folder / "model.safetensors")
        script = (
            "import sys; from apr_jax.converters.checkpoint.openers import open_checkpoint;"
            "opened = open_checkpoint(sys.argv[1]);"
            "[bytes(part) for tensor in opened.tensors.values() for part in tensor.stream()];"
            "print(sorted({'numpy', 'ml_dtypes', 'rich', 'jax', 'flax', 'torch'} & set(sys.modules)));"
            "opened.tensors['c'].read(); print('numpy' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(self.folder)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        self.assertEqual(done.stdout.split("\n")[:2], ["[]", "True"])


class LinksTest(CheckpointTestCase):
    def test_the_cache_of_huggingface_is_read_through_its_links(self):
        repository = self.folder / "models--a--b"
        snapshot = repository / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        files = {"model.safetensors": safetensors.numpy.save(arrays()), "config.json": json.dumps(CONFIG).encode()}
        for name, content in files.items():
            (repository / "blobs" / f"hash-of-{name}").write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
        with open_checkpoint(snapshot) as opened:
            self.assert_holds(opened, arrays())
            self.assertEqual(opened.config, CONFIG)

    def test_a_link_within_the_folder_and_a_linked_folder_are_fine(self):
        inner = self.folder / "inner"
        inner.mkdir()
        safetensors.numpy.save_file(arrays(), inner / "real.bin")
        (inner / "model.safetensors").symlink_to("real.bin")
        (self.folder / "link").symlink_to("inner")
        with open_checkpoint(self.folder / "link") as opened:
            self.assertLen(opened.tensors, 7)

    def test_links_that_leave_the_folder_are_refused(self):
        inner = self.folder / "inner"
        inner.mkdir()
        safetensors.numpy.save_file(arrays(), self.folder / "outside.safetensors")
        (self.folder / "secret").write_text("{}")
        link = inner / "model.safetensors"
        link.symlink_to("../outside.safetensors")
        error = self.assert_refused(inner, "path-escapes", RefusedError)
        self.assertEqual(error.file, str(link))
        # Who names the link itself means it.
        open_checkpoint(link).close()
        link.unlink()
        safetensors.numpy.save_file(arrays(), link)
        (inner / "config.json").symlink_to("../secret")
        with open_checkpoint(inner) as opened, self.assertRaises(RefusedError) as caught:
            opened.files["config.json"]
        self.assertEqual(caught.exception.code, "path-escapes")

    def test_a_shard_that_is_a_link_out_is_refused(self):
        inner = self.folder / "inner"
        inner.mkdir()
        safetensors.numpy.save_file(arrays(), self.folder / "outside.safetensors")
        (inner / "a.safetensors").symlink_to("../outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(arrays(), "a.safetensors")}
        (inner / "model.safetensors.index.json").write_text(json.dumps(index))
        (inner / "b.safetensors").write_bytes(b"")
        self.assert_refused(inner, "path-escapes", RefusedError)

    def test_an_index_that_is_a_link_out_is_refused(self):
        inner = self.folder / "inner"
        inner.mkdir()
        (self.folder / "outside.json").write_text('{"weight_map":{}}')
        (inner / "model.safetensors.index.json").symlink_to("../outside.json")
        self.assert_refused(inner, "path-escapes", RefusedError)

    def test_a_hard_link_is_a_warning(self):
        safetensors.numpy.save_file(arrays(), self.folder / "model.safetensors")
        os.link(self.folder / "model.safetensors", self.folder / "twin")
        with open_checkpoint(self.folder) as opened:
            self.assertIn("hard links", opened.warnings[0])


class ShardsTest(CheckpointTestCase):
    def halves(self):
        items = list(arrays().items())
        return dict(items[:3]), dict(items[3:])

    def test_shards_hold_what_the_single_file_held(self):
        self.write_shards(*self.halves(), metadata={"format": "pt"})
        for path in (self.folder, self.folder / "model.safetensors.index.json"):
            with open_checkpoint(path) as opened:
                self.assert_holds(opened, arrays())
                self.assertLen(opened.sources, 2)
                self.assertEqual(opened.metadata, {"format": "pt"})
                self.assertEmpty(opened.warnings)
                self.assertEqual(opened.path, os.fspath(path))

    def test_an_index_of_another_name_is_found(self):
        self.write_shards(*self.halves())
        (self.folder / "model.safetensors.index.json").rename(self.folder / "other.safetensors.index.json")
        with open_checkpoint(self.folder) as opened:
            self.assertLen(opened.tensors, 7)

    def test_every_missing_shard_is_named(self):
        names = self.write_shards(*[{name: array} for name, array in arrays().items()])
        for name in names[2:4]:
            (self.folder / name).unlink()
        error = self.assert_refused(self.folder, "shard-missing", MissingFileError)
        self.assertEqual(error.exit_code, 3)
        for name in names:
            self.assertEqual(name in str(error), name in names[2:4])

    @parameterized.parameters((None, False), ("{", False), ("[]", False), ('{"tie_word_embeddings": true}', True))
    def test_a_head_that_no_shard_holds_is_needless_only_where_it_is_tied(self, config, tied):
        names = self.write_shards({"a": np.ones(2, np.float32)}, {EMBEDDING: np.ones((2, 2), np.float32)})
        weight_map = {"a": names[0], EMBEDDING: names[1], HEAD: names[1]}
        self.write_json("model.safetensors.index.json", {"weight_map": weight_map})
        if config is not None:
            (self.folder / "config.json").write_text(config)
        if tied:
            with open_checkpoint(self.folder) as opened:
                self.assertEqual(list(opened.tensors), ["a", EMBEDDING])
        else:
            self.assert_refused(self.folder, "tensor-not-in-shard", BrokenContainerError)

    def test_a_tensor_in_two_shards_is_named(self):
        first, second = self.halves()
        self.write_shards(first, second | {"c": first["c"]})
        error = self.assert_refused(self.folder, "tensor-in-two-shards", BrokenContainerError)
        self.assertIn("c: in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors", str(error))

    def test_a_tensor_that_its_shard_lacks_is_named(self):
        names = self.write_shards(*self.halves())
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        for moved in ({"ghost": names[1]}, {"c": names[1]}):
            self.write_json("model.safetensors.index.json", index | {"weight_map": index["weight_map"] | moved})
            error = self.assert_refused(self.folder, "tensor-not-in-shard", BrokenContainerError)
            self.assertIn(*moved, str(error))
            self.assertIn(names[1], str(error))

    def test_a_tensor_that_the_index_lacks_is_named(self):
        names = self.write_shards(*self.halves())
        weight_map = {"a.weight": names[0], "d": names[1]}
        self.write_json("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        error = self.assert_refused(self.folder, "tensor-not-in-index", BrokenContainerError)
        self.assertIn("5 tensors", str(error))
        for name in arrays():
            self.assertEqual(f"  {name}: " in str(error), name not in weight_map)

    @parameterized.parameters(
        "/etc/passwd.safetensors",
        "../x.safetensors",
        "a/../../b.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "\\\\server\\x.safetensors",
        "file://x.safetensors",
        "",
        ".",
        "..",
        "x.safetensors ",
        "x.safetensors.",
        "x\0.safetensors",
        "x\n.safetensors",
    )
    def test_shard_names_with_a_path_in_them(self, name):
        self.write_json("model.safetensors.index.json", {"weight_map": {"a": name}})
        error = self.assert_refused(self.folder, "path-escapes", RefusedError)
        self.assertNotIn("\n", str(error))
        self.assertNotIn("\0", str(error))

    def test_other_shards_that_cannot_be(self):
        for weight_map, code in (
            ({"a": "pytorch_model.bin"}, "shard-extension"),
            ({"a": "x.safetensors", "b": "X.safetensors"}, "shard-case"),
            ({str(number): f"{number}.safetensors" for number in range(5000)}, "shard-count"),
        ):
            self.write_json("model.safetensors.index.json", {"weight_map": weight_map})
            self.assert_refused(self.folder, code, RefusedError)

    @parameterized.parameters(
        ("[]", "index-weight-map"),
        ("{}", "index-weight-map"),
        ('{"weight_map":[]}', "index-weight-map"),
        ('{"weight_map":{"a":1}}', "index-weight-map"),
        ('{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "json-duplicate"),
        ('{"weight_map":' + "[" * 1000, "json-depth"),
        ("", "json-syntax"),
        ("<!DOCTYPE html>", "foreign-format"),
        ("version https://git-lfs.github.com/spec/v1", "foreign-format"),
    )
    def test_malformed_index(self, text, code):
        (self.folder / "model.safetensors.index.json").write_text(text)
        error = self.assert_refused(self.folder, code, BrokenContainerError)
        self.assertEndsWith(error.file, "index.json")

    def test_a_huge_index_is_refused_by_its_size(self):
        path = self.folder / "model.safetensors.index.json"
        path.write_bytes(b"")
        os.truncate(path, 1 << 30)
        self.assert_refused(self.folder, "index-size", BrokenContainerError)

    def test_what_is_odd_but_harmless_is_a_warning(self):
        names = self.write_shards(*self.halves(), total="12")
        safetensors.numpy.save_file({"x": np.zeros(1)}, self.folder / "extra.safetensors", {"a": "1"})
        safetensors.numpy.save_file(self.halves()[1], self.folder / names[1], {"format": "np"})
        safetensors.numpy.save_file(self.halves()[0], self.folder / names[0], {"format": "pt"})
        with open_checkpoint(self.folder) as opened:
            warnings = "\n".join(opened.warnings)
            self.assertNotIn("x", opened.tensors)
        for words in ("extra.safetensors", "total_size '12'", "disagree about 'format'"):
            self.assertIn(words, warnings)

    def test_shard_names_that_count_wrongly_are_a_warning(self):
        safetensors.numpy.save_file(arrays(), self.folder / "model-00001-of-00003.safetensors")
        weight_map = dict.fromkeys(arrays(), "model-00001-of-00003.safetensors")
        self.write_json("model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
        with open_checkpoint(self.folder / "model.safetensors.index.json") as opened:
            self.assertIn("names 1 shard, the names say [3]", opened.warnings[0])

    def test_a_broken_shard_is_named_and_nothing_stays_open(self):
        names = self.write_shards(*self.halves())
        (self.folder / names[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
        error = self.assert_refused(self.folder, "foreign-format", BrokenContainerError)
        self.assertEndsWith(error.file, names[1])

    def test_a_shard_that_is_a_fifo_does_not_hang(self):
        names = self.write_shards(*self.halves())
        (self.folder / names[1]).unlink()
        os.mkfifo(self.folder / names[1])
        self.assert_refused(self.folder, "not-a-regular-file", RefusedError)


class FilesTest(CheckpointTestCase):
    def test_content_decides_what_a_file_is(self):
        (self.folder / "a.bin").write_bytes((DATA / "golden_v2.apr").read_bytes())
        (self.folder / "b.apr").write_bytes(safetensors.numpy.save(arrays()))
        with open_checkpoint(self.folder / "a.bin") as opened:
            self.assertEqual(opened.kind, "apr")
        with open_checkpoint(self.folder / "b.apr") as opened:
            self.assertEqual(opened.kind, "safetensors")

    def test_a_header_whose_length_looks_like_a_pickle_is_read(self):
        for length in (0x0280, 0x0480):
            text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
            (self.folder / "x.safetensors").write_bytes(struct.pack("<Q", length) + text + b"\7")
            with open_checkpoint(self.folder / "x.safetensors") as opened:
                self.assertEqual(opened.tensors["a"].raw(), b"\7")

    @parameterized.parameters(
        (b"PK\3\4" + bytes(100), "ZIP"),
        (b"\x80\2}q" + bytes(100), "pickle"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"\x93NUMPY" + bytes(100), "NumPy"),
        (b"<html>" + bytes(100), "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS"),
        (b"APRN" + bytes(100), "APRN"),
    )
    def test_foreign_formats_are_named_whatever_the_extension(self, content, words):
        for name in ("x.safetensors", "x.apr", "x"):
            (self.folder / name).write_bytes(content)
            error = self.assert_refused(self.folder / name, "foreign-format", BrokenContainerError)
            self.assertIn(words, str(error))

    def test_empty_and_tiny_files(self):
        for name in ("x.safetensors", "x.apr", "x"):
            for size in (0, 1, 7):
                (self.folder / name).write_bytes(bytes(size))
                self.assert_refused(self.folder / name, "file-too-short", BrokenContainerError)

    def test_devices_and_fifos_are_refused(self):
        os.mkfifo(self.folder / "fifo.apr")
        for path in (self.folder / "fifo.apr", "/dev/zero"):
            self.assert_refused(path, "not-a-regular-file", RefusedError)

    def test_side_files_in_a_lone_file_go_before_those_beside_it(self):
        embedded = {"config.json": json.dumps(CONFIG), "tokenizer.model": {"base64": "/wA="}}
        path = self.folder / "model.safetensors"
        safetensors.numpy.save_file(arrays(), path, {"apr_jax.source_files": json.dumps(embedded)})
        (self.folder / "config.json").write_text("{}")
        with open_checkpoint(path) as opened:
            self.assertEqual(opened.config, CONFIG)
            self.assertEqual(opened.files["tokenizer.model"], b"\xff\0")
            self.assertLen(opened.files, 2)

    def test_files_beside_a_lone_file_are_not_its_own(self):
        safetensors.numpy.save_file(arrays(), self.folder / "other.safetensors")
        (self.folder / "config.json").write_text("{}")
        with open_checkpoint(self.folder / "other.safetensors") as opened:
            self.assertEmpty(opened.files)


class AprTest(CheckpointTestCase):
    def open_apr(self, tensors, metadata, **options):
        (self.folder / "x.apr").write_bytes(apr_file(tensors, metadata))
        opened = open_checkpoint(self.folder / "x.apr", **options)
        self.addCleanup(opened.close)
        return opened

    def plain(self):
        values = np.arange(24, dtype=np.float32).reshape(6, 4).astype(ml_dtypes.bfloat16)
        return {EMBEDDING: ("bf16", (6, 4), values.tobytes())}, values

    def test_tensors_of_a_genuine_file(self):
        with open_checkpoint(DATA / "golden_v2.apr") as opened:
            np.testing.assert_array_equal(opened.tensors["weights"].read(), [1, 2, 0.5, -0.5, 4, -2, 0.25, 8])
            np.testing.assert_array_equal(opened.tensors["bias"].read(), [0.125])
            self.assertEqual(opened.metadata["name"], "golden-v2")
            self.assertEqual(opened.apr.header.tensor_count, 2)
            with self.assertRaises(RefusedError) as caught:
                _ = opened.config
            self.assertEqual(caught.exception.code, "config-missing")

    def test_quantised_tensors_give_their_bytes_and_their_values(self):
        compared = 0
        for name in ("tiny_bf16_tied-int4.apr", "tiny_f32_tied-int8.apr"):
            file = (DATA / name).read_bytes()
            with open_checkpoint(DATA / name) as opened:
                for tensor in opened.tensors.values():
                    expected = file[tensor.offset : tensor.offset + tensor.nbytes]
                    self.assertEqual(tensor.raw(), expected)
                    self.assertEqual(b"".join(map(bytes, tensor.stream(1000))), expected)
                    if tensor.dtype.is_block:
                        compared += 1
                        values = np.empty(tensor.shape, np.float32)
                        tensor.dtype.codec.decode(expected, values.reshape(-1))
                        self.assert_every_way_of_reading_gives(tensor, values)
        self.assertGreater(compared, 10)

    def assert_every_way_of_reading_gives(self, tensor, values):
        whole = tensor.read()
        self.assertEqual((whole.dtype, whole.shape), (values.dtype, values.shape))
        np.testing.assert_array_equal(whole, values)
        rows, columns = values.shape
        for part in ((slice(0, 1),), (slice(3, rows - 2),), (slice(rows - 1, None), slice(5, None))):
            np.testing.assert_array_equal(tensor.read(part), values[part])
        np.testing.assert_array_equal(tensor.read((slice(None), slice(1, columns - 1))), values[:, 1:-1])
        for elements in (97, 1000, values.size):
            np.testing.assert_array_equal(np.concatenate(list(tensor.values(elements))), values.reshape(-1))

    def test_row_padded_k_quants_are_decoded_row_by_row(self):
        for shape in ((7, 300), (4, 64), (2, 250), (1, 500)):
            dtype = dtypes.by_name("q4_k")
            data = np.random.default_rng(0).integers(0, 120, dtype.encoded_nbytes(shape), np.uint8).tobytes()
            padded = np.empty((shape[0], len(data) // shape[0] // 144 * 256), np.float32)
            dtype.codec.decode(data, padded.reshape(-1))
            opened = self.open_apr({"a": ("q4_k", shape, data)}, {})
            tensor = opened.tensors["a"]
            np.testing.assert_array_equal(tensor.read(), padded[:, : shape[1]])
            np.testing.assert_array_equal(tensor.read((slice(0, 1), slice(3, 60))), padded[:1, 3:60])
            np.testing.assert_array_equal(np.concatenate(list(tensor.values(1))), padded[:, : shape[1]].reshape(-1))

    def test_flat_k_quants_of_the_same_shape_are_told_apart_by_size(self):
        dtype = dtypes.by_name("q6_k")
        data = np.random.default_rng(0).integers(0, 120, dtype.nbytes((7, 300)), np.uint8).tobytes()
        values = np.empty((7, 300), np.float32)
        dtype.codec.decode(data, values.reshape(-1))
        self.assert_every_way_of_reading_gives(self.open_apr({"a": ("q6_k", (7, 300), data)}, {}).tensors["a"], values)

    def test_decoding_in_parts_takes_little_memory(self):
        shape = (4000, 1000)
        data = casts.quantise(np.tile(np.float32([-1, 1]), (4000, 500)), "q4_k", shape)
        tensor = self.open_apr({"a": ("q4_k", shape, data)}, {}).tensors["a"]
        del data
        tracemalloc.start()
        total = sum(float(np.abs(part).sum()) for part in tensor.values())
        for row in range(0, 4000, 100):
            total += float(np.abs(tensor.read((slice(row, row + 100), slice(0, 10)))).sum())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertAlmostEqual(total / 4_040_000, 1.0, delta=0.01)
        self.assertLess(peak, 10 << 20)

    def test_a_placeholder_is_no_tensor(self):
        tensors, values = self.plain()
        opened = self.open_apr(tensors | {HEAD: ("f32", (6, 4), b"")}, {})
        self.assertEqual(dict(opened.placeholders), {HEAD: (6, 4)})
        self.assertEqual(list(opened.tensors), [EMBEDDING])
        np.testing.assert_array_equal(opened.tensors[EMBEDDING].read(), values)

    def apr_metadata(self):
        return {
            "architecture": "qwen2",
            "hidden_size": 4,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "vocab_size": 6,
            "intermediate_size": 8,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "tokenizer.eos_token_id": 2,
        }

    def test_every_form_of_a_tied_head_is_readable(self):
        tensors, values = self.plain()
        copies = {
            "absent": ({}, True),
            "placeholder": ({HEAD: ("f32", (6, 4), b"")}, True),
            "same type": ({HEAD: tensors[EMBEDDING]}, False),
            "f32 copy": ({HEAD: ("f32", (6, 4), values.astype(np.float32).tobytes())}, False),
        }
        for form, (head, tied) in copies.items():
            with self.subTest(form):
                opened = self.open_apr(tensors | head, self.apr_metadata() | {"tied_embeddings": True})
                self.assertEqual(opened.model_config().tie_word_embeddings, tied)
                self.assertEqual(HEAD in opened.tensors, not tied)
                if not tied:
                    np.testing.assert_array_equal(opened.tensors[HEAD].read().astype(np.float32), values)

    def test_config_comes_from_the_best_source_there_is(self):
        tensors, _ = self.plain()
        metadata = self.apr_metadata()
        rebuilt = self.open_apr(tensors, metadata)
        self.assertEqual(rebuilt.config["num_hidden_layers"], 1)
        self.assertEqual(rebuilt.config["eos_token_id"], 2)
        self.assertEqual(rebuilt.config["torch_dtype"], "bfloat16")
        self.assertNotIn("head_dim", rebuilt.config)
        self.assertEqual(rebuilt.model_config(), type(rebuilt.model_config()).from_hf(rebuilt.config))
        metadata["hf_config"] = CONFIG | {"intermediate_size": 9}
        self.assertEqual(self.open_apr(tensors, metadata).config, metadata["hf_config"])
        self.assertEqual(self.open_apr(tensors, metadata).model_config().intermediate_size, 9)
        metadata["source_files"] = {"config.json": json.dumps(CONFIG | {"intermediate_size": 10})}
        self.assertEqual(self.open_apr(tensors, metadata).model_config().intermediate_size, 10)

    def test_side_files_of_both_encodings(self):
        tensors, _ = self.plain()
        text = "{é\r\n}"
        opened = self.open_apr(tensors, {"source_files": {"z.txt": text, "a.bin": {"base64": "/wAB"}}})
        self.assertEqual(dict(opened.files), {"z.txt": text.encode(), "a.bin": b"\xff\0\1"})
        self.assertEqual(list(opened.files), ["a.bin", "z.txt"])

    @parameterized.parameters(
        ([],),
        ({"a": 1},),
        ({"a": None},),
        ({"a": {"base64": "!"}},),
        ({"a": {"base64": 1}},),
        ({"a": {"base64": "", "x": ""}},),
        ({"a": {"hex": "00"}},),
        ({"../a": "x"},),
        ({"/a": "x"},),
        ({"a/b": "x"},),
        ({"a\\b": "x"},),
        ({"": "x"},),
        ({".": "x"},),
        ({"..": "x"},),
        ({".bashrc": "x"},),
        ({"a\nb": "x"},),
        ({"a\0": "x"},),
    )
    def test_hostile_side_files_are_refused_at_opening(self, encoded):
        (self.folder / "x.apr").write_bytes(apr_file({}, {"source_files": encoded}))
        self.assert_refused(self.folder / "x.apr", "source-files", BrokenContainerError)

    def test_leniency_reaches_the_container(self):
        tensors, _ = self.plain()
        path = self.folder / "x.apr"
        path.write_bytes(apr_file(tensors, {})[:-5])
        self.assert_refused(path, "footer-missing", BrokenContainerError)
        with open_checkpoint(path, lenient=True) as opened:
            self.assertLen(opened.warnings, 1)
            self.assertLen(opened.tensors, 1)

    def test_rows_of_row_padded_k_quants_are_addressable(self):
        data = random.Random(0).randbytes(3 * 144)
        opened = self.open_apr({"a": ("q4_k", (3, 64), data)}, {})
        self.assertEqual(opened.tensors["a"].raw(slice(1, 3)), data[144:])

    def test_rows_that_share_blocks_are_not(self):
        tensors = {
            "a": ("q4_k", (3, 64), bytes(144)),
            "b": ("apr_q8", (2, 3), bytes(10)),
            "c": ("apr_q4", (3, 11), bytes(36)),
        }
        opened = self.open_apr(tensors, {})
        for name in tensors:
            with self.assertRaises(RefusedError) as caught:
                opened.tensors[name].raw(slice(0, 1))
            self.assertEqual((caught.exception.code, caught.exception.tensor), ("rows-not-addressable", name))


class TensorTest(CheckpointTestCase):
    def open_arrays(self, tensors, **metadata):
        path = self.folder / "x.safetensors"
        path.write_bytes(safetensors.numpy.save(tensors, metadata or None))
        opened = open_checkpoint(path)
        self.addCleanup(opened.close)
        return opened

    def test_every_type_with_an_array_type_is_read_bit_for_bit(self):
        compared = 0
        for dtype in dtypes.TYPES.values():
            if dtype.numpy_name is None:
                continue
            data = bytes(range(256)) * 3 if dtype.name != "bool" else bytes([0, 1] * 384)
            count = len(data) // dtype.block_bytes
            header = json.dumps({"x": {"dtype": dtype.safetensors, "shape": [3, count // 3], "data_offsets": [0, 768]}})
            # An odd header: then the data are not aligned in the file.
            text = header.encode().ljust(len(header) + 1 + len(header) % 2)
            path = self.folder / f"{dtype.name}.safetensors"
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
            with open_checkpoint(path) as opened:
                self.assertEqual(opened.tensors["x"].offset % 2, 1)
                values = opened.tensors["x"].read()
                self.assertEqual(values.tobytes(), data)
                self.assertEqual(values.dtype, dtype.numpy)
                self.assertEqual(opened.tensors["x"].read((slice(1, 2),)).tobytes(), data[256:512])
                compared += 1
        self.assertEqual(compared, 19)

    def test_arrays_have_memory_of_their_own_aligned_to_64_bytes(self):
        opened = self.open_arrays(arrays())
        for tensor in opened.tensors.values():
            first, second = tensor.read(), tensor.read()
            for values in (first, second):
                self.assertTrue(values.ctypes.data % 64 == 0 or not values.size)
                self.assertTrue(values.flags.c_contiguous)
                self.assertTrue(values.flags.writeable)
            self.assertFalse(np.shares_memory(first, second))

    def test_any_slices_are_those_of_numpy(self):
        generator = np.random.default_rng(0)
        tensors = {
            "matrix": generator.normal(size=(13, 9)).astype(np.float32),
            "cube": generator.integers(0, 99, size=(4, 5, 6)).astype(np.int16),
            "vector": np.arange(17, dtype=np.uint8),
            "empty": np.zeros((0, 3), np.float32),
        }
        opened = self.open_arrays(tensors)
        parts = [slice(None), slice(2, 4), slice(0, 1), slice(3, 3), slice(-2, None), slice(1, 100), slice(4, 2)]
        compared = 0
        for part_bytes in (1, 100, 1 << 20):
            with mock.patch.object(tensor_module, "_PART_BYTES", part_bytes):
                for name, array in tensors.items():
                    for rank in range(array.ndim + 1):
                        for slices in itertools.product(parts, repeat=rank):
                            values = opened.tensors[name].read(slices)
                            self.assertEqual(values.tobytes(), array[slices].tobytes())
                            self.assertEqual(values.shape, array[slices].shape)
                            compared += 1
        self.assertGreater(compared, 1000)

    def test_whole_rows_are_read_without_the_rows_around_them(self):
        opened = self.open_arrays({"x": np.arange(3000, dtype=np.int32).reshape(1000, 3)})
        real, read = os.preadv, []

        def counting(fd, views, offset):
            read.append(real(fd, views, offset))
            return read[-1]

        with mock.patch.object(os, "preadv", counting):
            opened.tensors["x"].read((slice(10, 20),))
            opened.tensors["x"].raw(slice(10, 20))
        self.assertEqual(read, [120, 120])

    def test_rows(self):
        opened = self.open_arrays(arrays())
        for name in ("a.weight", "b.bias", "d", "f.empty"):
            for rows in (slice(1, 2), slice(None), slice(-2, None), slice(5, 1)):
                self.assertEqual(opened.tensors[name].raw(rows), arrays()[name][rows].tobytes())

    def test_stream_gives_every_byte_once_in_chunks_of_the_size_asked_for(self):
        opened = self.open_arrays(arrays())
        for tensor in opened.tensors.values():
            for size in (1, 7, 60, 1 << 20):
                chunks = [bytes(chunk) for chunk in tensor.stream(size)]
                self.assertEqual(b"".join(chunks), arrays()[tensor.name].tobytes())
                self.assertTrue(all(len(chunk) == size for chunk in chunks[:-1]))

    def test_readinto_fills_a_buffer_of_the_right_size_only(self):
        tensor = self.open_arrays(arrays()).tensors["d"]
        array = np.zeros((2, 3, 4), np.int64)
        tensor.readinto(memoryview(array))
        np.testing.assert_array_equal(array, arrays()["d"])
        for size in (0, 191, 193):
            with self.assertRaises(ValueError):
                tensor.readinto(bytearray(size))

    def test_mistakes_of_the_caller(self):
        opened = self.open_arrays(arrays())
        matrix, scalar = opened.tensors["a.weight"], opened.tensors["e.scalar"]
        for call in (
            lambda: matrix.read((slice(0, 4, 2),)),
            lambda: matrix.read((slice(None),) * 3),
            lambda: matrix.raw(slice(None, None, -1)),
            lambda: scalar.raw(slice(0, 1)),
            lambda: scalar.read((slice(0, 1),)),
        ):
            with self.assertRaises(ValueError):
                call()

    def test_a_bool_that_is_neither_is_refused(self):
        opened = self.open_arrays(arrays())
        with open(opened.path, "r+b") as file:
            file.seek(opened.tensors["g.flag"].offset)
            file.write(b"\2")
        with self.assertRaises(BrokenContainerError) as caught:
            opened.tensors["g.flag"].read()
        self.assertEqual((caught.exception.code, caught.exception.tensor), ("bool-value", "g.flag"))

    def test_a_file_that_shrinks_is_an_error_naming_file_and_tensor(self):
        opened = self.open_arrays(arrays())
        os.truncate(opened.path, opened.sources[0].size - 1)
        last = max(opened.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
        for read in (last.read, last.raw, lambda: list(last.stream())):
            with self.assertRaises(StorageError) as caught:
                read()
            self.assertEqual((caught.exception.tensor, caught.exception.file), (last.name, opened.path))

    def test_closing_ends_reading(self):
        opened = self.open_arrays(arrays())
        opened.close()
        with self.assertRaises(StorageError):
            opened.tensors["c"].raw()


if __name__ == "__main__":
    absltest.main()
