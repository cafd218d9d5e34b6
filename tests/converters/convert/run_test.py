"""Conversions change nothing that they were not asked to change, and end whole or not at all."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert import streaming
from apr_jax.converters.convert.plan import CastRule, make_plan, parse_size
from apr_jax.converters.convert.run import check_output, convert, run
from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError, UsageError
from apr_jax.converters.formats import apr_format, dtypes
from tests.paths import DATA, NAMES, ROOT, checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, tuple[str, tuple[int, ...], str]]


def tensors(path: os.PathLike[str]) -> Tensors:
    """Name -> type, shape and hash, as the safetensors package (never our reader) finds them."""
    path = pathlib.Path(path)
    found: Tensors = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        for name, value in safetensors.deserialize(file.read_bytes()):
            assert name not in found, name
            digest = hashlib.sha256(bytes(value["data"])).hexdigest()
            found[name] = (value["dtype"], tuple(value["shape"]), digest)
    return found


def header(path: pathlib.Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])


def side_files(folder: pathlib.Path) -> dict[str, bytes]:
    data = (".safetensors", ".safetensors.index.json")
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(data)}


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


LEFT = ("credentials.json", "modeling.py", "notes.txt", "onnx")


def tree_of_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def content(path: pathlib.Path) -> dict[str, bytes] | bytes | None:
    """What stands at a path: a folder's files, a file's bytes, or nothing."""
    return tree(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def save(path: pathlib.Path, values: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    safetensors.numpy.save_file(values, path, metadata)


class ConversionTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name).resolve()

    def convert(self, source: os.PathLike[str], output: str, **arguments) -> pathlib.Path:
        path = self.folder / output
        convert(source, path, to="apr" if output.endswith(".apr") else "safetensors", **arguments)
        return path

    def copy(self, name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(checkpoint(name), self.folder / "source"))

    def values(self, path: os.PathLike[str]) -> dict[str, np.ndarray]:
        with open_checkpoint(path) as opened:
            return {name: tensor.read() for name, tensor in opened.tensors.items()}

    def raises(self, kind: type[AprJaxError], code: str):
        return _Raises(self, kind, code)


class _Raises:
    def __init__(self, test: absltest.TestCase, kind: type[AprJaxError], code: str):
        self._test, self._kind, self._code = test, kind, code

    def __enter__(self) -> "_Raises":
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        self._test.assertIsInstance(error, self._kind)
        self._test.assertEqual(error.code, self._code)
        self.error = error
        return True


class IdentityTest(ConversionTestCase):
    @parameterized.parameters(*NAMES)
    def test_huggingface_to_apr_and_back_gives_every_tensor_string_and_file(self, name):
        source = checkpoint(name)
        apr = self.convert(source, "m.apr")
        back = self.convert(apr, "back")
        expected = tensors(source)
        self.assertGreater(len(expected), 20)
        self.assertEqual(tensors(back), expected)
        self.assertEqual(side_files(back), side_files(source))
        self.assertGreaterEqual(len(side_files(back)), 4)
        source_header = header(next(source.glob("*.safetensors")))
        self.assertEqual(header(back / "model.safetensors").get("__metadata__"), source_header.get("__metadata__"))

    @parameterized.parameters(*NAMES)
    def test_a_second_run_gives_the_same_bytes_and_so_does_the_way_over_shards(self, name):
        source = self.copy(name)
        first = self.convert(source, "a.apr").read_bytes()
        self.assertEqual(self.convert(source, "b.apr").read_bytes(), first)
        shards = self.convert(self.folder / "a.apr", "s", max_shard_bytes=60_000)
        again = self.convert(self.folder / "a.apr", "t", max_shard_bytes=60_000)
        self.assertGreater(len(list(shards.glob("model-*.safetensors"))), 2)
        self.assertEqual(tree(shards), tree(again))
        shutil.rmtree(source)
        shards.rename(source)
        self.assertEqual(self.convert(source, "c.apr").read_bytes(), first)

    @parameterized.parameters(*NAMES)
    def test_the_footer_is_the_crc_of_the_whole_file_and_the_layout_is_by_name(self, name):
        data = self.convert(checkpoint(name), "m.apr").read_bytes()
        self.assertEqual(struct.unpack("<I", data[-4:])[0], zlib.crc32(data[:-4]))
        parsed = apr_format.parse_prologue(data, len(data))
        self.assertEqual(parsed.header.flags, 0x0400)
        names = [entry.name for entry in parsed.entries]
        self.assertEqual(names, sorted(names))
        offsets = [entry.offset for entry in parsed.entries]
        self.assertEqual(offsets, sorted(offsets))
        self.assertEqual([offset % 64 for offset in offsets], [0] * len(offsets))

    def test_data_sections_of_a_16_bit_model_are_the_same_bytes_in_both(self):
        apr = self.convert(checkpoint("gqa_tied_bf16"), "m.apr")
        single = self.convert(apr, "m.safetensors")
        data = apr.read_bytes()
        data_offset = struct.unpack_from("<Q", data, 32)[0]
        tail = single.read_bytes()[8 + struct.unpack_from("<Q", single.read_bytes())[0] :]
        self.assertEqual(data[data_offset:-4], tail)
        with open_checkpoint(apr) as opened:
            planned = make_plan(opened, os.fspath(self.folder / "x"), to="safetensors")
            (file,) = planned.files
            parts = [streaming.Part(t.source.source, t.source.offset, t.nbytes, t.offset, t.name) for t in file.tensors]
            self.assertLen(streaming.coalesce(parts), 1)

    @parameterized.parameters(*NAMES)
    def test_single_file_carries_its_side_files_and_gives_the_folder_back(self, name):
        single = self.convert(checkpoint(name), "m.safetensors")
        self.assertEqual(tensors(single), tensors(checkpoint(name)))
        back = self.convert(single, "back")
        self.assertEqual(side_files(back), side_files(checkpoint(name)))
        self.assertEqual(header(back / "model.safetensors").get("__metadata__"), {"format": "pt"})
        by_apr = self.convert(self.convert(single, "m.apr"), "by_apr")
        self.assertEqual(tree(by_apr), tree(back))

    @parameterized.parameters(*NAMES)
    def test_torch_can_view_every_tensor_in_place(self, name):
        for path in (
            self.convert(checkpoint(name), "hf") / "model.safetensors",
            self.convert(checkpoint(name), "m.safetensors"),
        ):
            fields = header(path)
            start = 8 + struct.unpack_from("<Q", path.read_bytes())[0]
            fields.pop("__metadata__", None)
            widths = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}
            for field in fields.values():
                self.assertEqual((start + field["data_offsets"][0]) % widths[field["dtype"]], 0)

    def test_a_layout_by_name_that_would_leave_a_tensor_unaligned_puts_wide_types_first(self):
        values = {"a": np.arange(3, dtype=np.uint8), "b": np.ones(2, np.float32), "c": np.ones(1, np.float16)}
        save(self.folder / "x.safetensors", values)
        fields = header(self.convert(self.convert(self.folder / "x.safetensors", "x.apr"), "y.safetensors"))
        self.assertEqual(
            {name: fields[name]["data_offsets"] for name in "abc"}, {"b": [0, 8], "c": [8, 10], "a": [10, 13]}
        )

    def test_shards_follow_huggingfaces_names_index_and_size_limit(self):
        folder = self.convert(checkpoint("gqa_untied_bf16"), "s", max_shard_bytes=40_000)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(file.name for file in folder.glob("*.safetensors"))
        count = len(files)
        self.assertEqual(files, [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)])
        self.assertEqual(set(index["weight_map"]), set(tensors(folder)))
        self.assertEqual(index["metadata"]["total_size"], sum(v.nbytes for v in self.values(folder).values()))
        for file in files:
            held = tensors(folder / file)
            self.assertEqual({name for name, shard in index["weight_map"].items() if shard == file}, set(held))
            data = (folder / file).stat().st_size - 8 - struct.unpack_from("<Q", (folder / file).read_bytes())[0]
            self.assertTrue(data <= 40_000 or len(held) == 1, file)

    def test_tensors_that_fill_a_shard_to_its_last_byte_stay_in_it(self):
        save(self.folder / "x.safetensors", {name: np.zeros(10, np.float32) for name in "abcd"})
        for size, files in ((80, 2), (79, 4), (160, 1), (159, 2)):
            folder = self.convert(self.folder / "x.safetensors", f"s{size}", max_shard_bytes=size)
            self.assertLen(list(folder.glob("*.safetensors")), files, size)

    def test_a_side_file_that_is_too_large_is_refused_by_name(self):
        source = self.copy("gqa_tied_bf16")
        os.truncate(source / "merges.txt", (64 << 20) + 1)
        with self.raises(RefusedError, "side-file-size") as caught:
            self.convert(source, "m.apr")
        self.assertIn("merges.txt", str(caught.error))

    def test_side_files_that_are_not_utf8_and_odd_texts_come_back(self):
        source = self.copy("gqa_tied_bf16")
        odd = {
            "README.md": b"\xff\xfe\0binary",
            "LICENSE": "\ufeffé\u2028\r\n\0\x7f😀".encode(),
            "chat_template.jinja": b"",
        }
        for name, content in odd.items():
            (source / name).write_bytes(content)
        back = self.convert(self.convert(source, "m.apr"), "back")
        self.assertEqual({name: (back / name).read_bytes() for name in odd}, odd)
        single = self.convert(source, "m.safetensors")
        self.assertEqual(side_files(self.convert(single, "back2")), side_files(source))

    def test_tensors_of_every_type_that_both_containers_hold(self):
        values = {
            "scalar": np.array(1.5, np.float32),
            "empty": np.zeros((0, 3), np.float16),
            "odd.u8": np.arange(3, dtype=np.uint8),
            "i8": np.arange(-3, 4, dtype=np.int8),
            "i32": np.array([[-(2**31)]], np.int32),
            "i64": np.array([2**63 - 1], np.int64),
            "f64": np.array([np.nan, -0.0, 5e-324]),
            "nans": np.array([0x7F800001, 0xFFC12345], np.uint32).view(np.float32),
        }
        save(self.folder / "x.safetensors", values)
        apr = self.convert(self.folder / "x.safetensors", "x.apr")
        back = self.convert(apr, "y.safetensors")
        self.assertEqual(tensors(back), tensors(self.folder / "x.safetensors"))
        self.assertLen(tensors(back), len(values))

    def test_types_that_apr_lacks_are_refused_all_together(self):
        save(self.folder / "x.safetensors", {"a": np.zeros(2, np.uint16), "b": np.zeros(2, np.bool_), "c": np.zeros(2)})
        with self.raises(RefusedError, "apr-unsupported") as caught:
            self.convert(self.folder / "x.safetensors", "x.apr")
        self.assertIn("a: ", str(caught.error))
        self.assertIn("b: ", str(caught.error))
        self.assertNotIn("c: ", str(caught.error))
        self.assertEqual(caught.error.exit_code, 5)

    def test_quantised_tensors_are_kept_by_apr_and_refused_by_safetensors(self):
        source = DATA / "apr" / "tiny_f32_tied-int8.apr"
        copy = self.convert(source, "copy.apr")
        with open_checkpoint(source) as before, open_checkpoint(copy) as after:
            self.assertEqual(list(before.tensors), list(after.tensors))
            for name, tensor in before.tensors.items():
                self.assertEqual(after.tensors[name].raw(), tensor.raw())
                self.assertIs(after.tensors[name].dtype, tensor.dtype)
            self.assertIn("apr_q8", {tensor.dtype.name for tensor in after.tensors.values()})
        with self.raises(RefusedError, "safetensors-unsupported") as caught:
            self.convert(source, "hf")
        self.assertIn("model.embed_tokens.weight is apr_q8", str(caught.error))
        self.assertIn("--dequantise", caught.error.hint)

    @parameterized.parameters("golden_v2.apr", "golden_v2_skip_none.apr", "tiny_bf16_tied-int4.apr")
    def test_apr_to_apr_keeps_metadata_to_the_byte(self, name):
        def text(path: pathlib.Path) -> bytes:
            data = path.read_bytes()
            return data[64 : 64 + struct.unpack_from("<I", data, 20)[0]]

        self.assertEqual(text(self.convert(DATA / "apr" / name, "copy.apr")), text(DATA / "apr" / name))

    def test_blocks_of_any_size_give_the_same_file(self):
        whole = self.convert(checkpoint("mixed_dtypes"), "a.apr").read_bytes()
        for size in (8, 64, 4096):
            with absltest.mock.patch.multiple(streaming, _BLOCK_BYTES=size * 8, _CHUNK_BYTES=size * 8):
                self.assertEqual(self.convert(checkpoint("mixed_dtypes"), f"{size}.apr").read_bytes(), whole)
                again = self.convert(self.folder / "a.apr", f"again{size}.apr")
            self.assertEqual(again.read_bytes(), whole)


class ForeignAprTest(ConversionTestCase):
    """Files as `apr import` leaves them: no side files, head as placeholder or copy, data in another order."""

    def make(self, name: str, *, head: str, order: str = "name") -> pathlib.Path:
        with open_checkpoint(checkpoint(name)) as opened:
            held = [(tensor.name, tensor.dtype, tensor.shape, tensor.raw()) for tensor in opened.tensors.values()]
        shape = next(shape for known, _, shape, _ in held if known == EMBEDDING)
        data = next(data for known, _, _, data in held if known == EMBEDDING)
        if head == "placeholder":
            held.append((HEAD, dtypes.by_name("f32"), shape, b""))
        elif head == "f32 copy":
            wide = np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float32).tobytes()
            held.append((HEAD, dtypes.by_name("f32"), shape, wide))
        elif head == "f32 other":
            wide = np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float32)
            wide[-1] += 1
            held.append((HEAD, dtypes.by_name("f32"), shape, wide.tobytes()))
        data_order = [known for known, *_ in held]
        if order == "insertion":
            data_order.reverse()
        entries = apr_format.lay_out([(n, d, s, len(b)) for n, d, s, b in held], data_order)
        metadata = {
            "model_type": "Auto",
            "license": None,
            "architecture": "qwen2",
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "vocab_size": 288,
            "intermediate_size": 160,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "tied_embeddings": True,
            "source_metadata": {"format": "pt"},
        }
        prologue = apr_format.serialise_prologue(metadata, entries)
        body = bytearray(max(entry.offset + apr_format.pad(entry.size) for entry in entries))
        contents = {known: content for known, _, _, content in held}
        for entry in entries:
            body[entry.offset : entry.offset + entry.size] = contents[entry.name]
        data = prologue + body
        path = self.folder / "foreign.apr"
        path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
        return path

    @parameterized.product(head=("absent", "placeholder", "f32 copy"), order=("name", "insertion"))
    def test_every_form_of_a_tied_head_gives_the_huggingface_tensors_back(self, head, order):
        folder = self.convert(self.make("gqa_tied_bf16", head=head, order=order), "hf")
        self.assertEqual(tensors(folder), tensors(checkpoint("gqa_tied_bf16")))
        config = json.loads((folder / "config.json").read_text())
        self.assertTrue(config["tie_word_embeddings"])
        self.assertEqual((config["num_attention_heads"], config["rope_theta"]), (4, 1e6))
        self.assertEqual(config["torch_dtype"], "bfloat16")

    def test_a_head_of_other_values_is_kept_whatever_the_metadata_say(self):
        source = self.make("gqa_tied_bf16", head="f32 other")
        for tied_head in (None, "absent", "copy"):
            folder = self.convert(source, f"hf-{tied_head}", tied_head=tied_head)
            self.assertEqual(tensors(folder)[HEAD][0], "F32")
            self.assertFalse(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])

    def test_its_metadata_travel_in_safetensors_and_come_back_to_the_byte(self):
        source = self.make("gqa_tied_bf16", head="placeholder")
        folder = self.convert(source, "hf")
        self.assertEqual(header(folder / "model.safetensors")["__metadata__"]["format"], "pt")
        back = self.convert(folder, "back.apr")
        with open_checkpoint(source) as before, open_checkpoint(back) as after:
            self.assertEqual(json.dumps(after.metadata), json.dumps(before.metadata))

    def test_changed_config_wins_over_the_metadata_that_travelled(self):
        folder = self.convert(self.make("gqa_tied_bf16", head="absent"), "hf")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
        with open_checkpoint(self.convert(folder, "back.apr")) as after:
            self.assertEqual(after.metadata["rope_theta"], 5e5)

    @parameterized.parameters({"num_heads": 7}, {"architecture": "gpt2"}, {"hidden_size": "wide"})
    def test_metadata_that_travelled_and_say_something_else_are_made_anew(self, **change):
        folder = self.convert(self.make("gqa_tied_bf16", head="absent"), "hf")
        with open_checkpoint(self.convert(folder, "before.apr")) as before:
            expected = before.metadata
        path = folder / "model.safetensors"
        data = path.read_bytes()
        start = 8 + struct.unpack_from("<Q", data)[0]
        found = json.loads(data[8:start])
        (key,) = [key for key, value in found["__metadata__"].items() if '"num_heads"' in value]
        found["__metadata__"][key] = json.dumps(json.loads(found["__metadata__"][key]) | change)
        text = json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])
        with open_checkpoint(self.convert(folder, "after.apr")) as after:
            for name in change:
                self.assertEqual(after.metadata[name], expected[name])

    @parameterized.product(order=("name", "insertion"), where=("data", "padding", "metadata", "footer"))
    def test_a_wrong_footer_is_found_while_streaming_and_leaves_nothing(self, order, where):
        source = self.make("gqa_tied_bf16", head="f32 copy", order=order)
        data = bytearray(source.read_bytes())
        index = {
            "data": len(data) // 2,
            "padding": len(data) - 5,
            "metadata": data.index(b"Auto"),
            "footer": len(data) - 1,
        }
        data[index[where]] ^= 1
        source.write_bytes(data)
        for output in ("hf", "copy.apr", "s.safetensors"):
            with self.raises(BrokenContainerError, "footer-crc"):
                self.convert(source, output)
        self.assertEqual(os.listdir(self.folder), ["foreign.apr"])


class TiedHeadTest(ConversionTestCase):
    def with_head(self, dtype: type) -> pathlib.Path:
        source = self.copy("gqa_tied_bf16")
        held = safetensors.numpy.load_file(source / "model.safetensors")
        held[HEAD] = held[EMBEDDING].astype(dtype)
        save(source / "model.safetensors", held, {"format": "pt"})
        return source

    @parameterized.parameters("m.apr", "hf")
    def test_none_is_added_by_default_and_a_copy_is_on_request(self, output):
        self.assertNotIn(HEAD, self.values(self.convert(checkpoint("gqa_tied_bf16"), output)))
        copied = self.values(self.convert(checkpoint("gqa_tied_bf16"), "copy-" + output, tied_head="copy"))
        self.assertEqual(copied[HEAD].tobytes(), copied[EMBEDDING].tobytes())
        self.assertEqual(copied[HEAD].dtype, copied[EMBEDDING].dtype)

    def test_the_footer_of_a_file_with_a_copied_head_is_right_and_checked(self):
        first = self.convert(checkpoint("gqa_tied_bf16"), "a.apr")
        data = self.convert(first, "b.apr", tied_head="copy").read_bytes()
        self.assertEqual(struct.unpack("<I", data[-4:])[0], zlib.crc32(data[:-4]))
        broken = bytearray(first.read_bytes())
        broken[-100] ^= 1
        first.write_bytes(broken)
        with self.raises(BrokenContainerError, "footer-crc"):
            self.convert(first, "c.apr", tied_head="copy")

    @parameterized.parameters(ml_dtypes.bfloat16, np.float32)
    def test_a_copy_that_huggingface_has_is_kept_unless_asked_otherwise(self, dtype):
        source = self.with_head(dtype)
        self.assertEqual(tensors(self.convert(self.convert(source, "a.apr"), "hf")), tensors(source))
        self.assertNotIn(HEAD, self.values(self.convert(source, "b.apr", tied_head="absent")))
        copied = self.values(self.convert(source, "c.apr", tied_head="copy"))
        self.assertEqual(copied[HEAD].dtype, copied[EMBEDDING].dtype)
        self.assertEqual(copied[HEAD].tobytes(), copied[EMBEDDING].tobytes())

    @parameterized.parameters("absent", "copy")
    def test_a_head_that_nobody_can_compare_is_kept(self, tied_head):
        # Nothing here decodes floats of 4 bits.
        header = {
            EMBEDDING: {"dtype": "F4", "shape": [6, 4], "data_offsets": [0, 12]},
            HEAD: {"dtype": "F32", "shape": [6, 4], "data_offsets": [12, 108]},
        }
        text = json.dumps(header).encode()
        source = self.folder / "s.safetensors"
        source.write_bytes(struct.pack("<Q", len(text)) + text + bytes(108))
        found = tensors(self.convert(source, "t.safetensors", tied_head=tied_head))
        self.assertEqual({name: entry[0] for name, entry in found.items()}, {EMBEDDING: "F4", HEAD: "F32"})

    @parameterized.parameters("absent", "copy")
    def test_an_untied_head_is_kept(self, tied_head):
        source = checkpoint("gqa_untied_bf16")
        apr = self.convert(source, "a.apr", tied_head=tied_head)
        self.assertEqual(tensors(self.convert(apr, "hf", tied_head=tied_head)), tensors(source))


class CastTest(ConversionTestCase):
    def rules(self, *texts: str) -> list[CastRule]:
        return [CastRule.parse(text) for text in texts]

    def test_the_last_match_counts_and_the_rest_is_untouched(self):
        source = checkpoint("gqa_tied_bf16")
        out = self.convert(source, "hf", cast=self.rules("*layers.0*=f32", "*norm*=f64", "*layers.0*q_proj.bias=bf16"))
        found, before = self.values(out), self.values(source)
        counts = {"float32": 0, "float64": 0, "bfloat16": 0}
        for name, value in found.items():
            expected = "float64" if "norm" in name else "float32" if "layers.0" in name else "bfloat16"
            if name.endswith("layers.0.self_attn.q_proj.bias"):
                expected = "bfloat16"
            self.assertEqual(value.dtype.name, expected, name)
            self.assertEqual(value.tobytes(), before[name].astype(value.dtype).tobytes())
            counts[expected] += 1
        self.assertNotIn(0, counts.values())

    def test_cast_apr_has_a_right_footer_and_equals_numpy(self):
        source = checkpoint("mha_untied_f32_sharded")
        with absltest.mock.patch.multiple(streaming, _BLOCK_BYTES=4096, _CHUNK_BYTES=512):
            apr = self.convert(source, "a.apr", cast=self.rules("bf16"))
        data = apr.read_bytes()
        self.assertEqual(struct.unpack("<I", data[-4:])[0], zlib.crc32(data[:-4]))
        before = self.values(source)
        for name, value in self.values(apr).items():
            self.assertEqual(value.tobytes(), before[name].astype(ml_dtypes.bfloat16).tobytes(), name)

    def test_casting_an_apr_keeps_its_metadata_but_for_the_size_that_changed(self):
        first = self.convert(checkpoint("gqa_tied_bf16"), "a.apr")
        cast = self.convert(first, "b.apr", cast=self.rules("f32"))
        back = self.convert(cast, "c.apr", cast=self.rules("bf16"))
        self.assertEqual(back.read_bytes(), first.read_bytes())
        with open_checkpoint(first) as before, open_checkpoint(cast) as after:
            expected = dict(before.metadata) | {"total_size": 2 * before.metadata["total_size"]}
            self.assertEqual(json.dumps(after.metadata), json.dumps(expected))

    def test_overflow_is_refused_with_names_and_counts_and_allowed_on_request(self):
        values = {
            "a": np.array([1.0, 1e6, -1e6, np.inf], np.float32),
            "b": np.array([7e4], np.float32),
            "c": np.ones(3, np.float32),
        }
        save(self.folder / "x.safetensors", values)
        for output in ("y.apr", "y.safetensors", "y"):
            with self.raises(RefusedError, "cast-overflow") as caught:
                self.convert(self.folder / "x.safetensors", output, cast=self.rules("f16"))
            self.assertIn("a: 2 values", str(caught.error))
            self.assertIn("b: 1 value.", str(caught.error))
            self.assertNotIn("c: ", str(caught.error))
            self.assertEqual(os.listdir(self.folder), ["x.safetensors"])
        out = self.convert(self.folder / "x.safetensors", "y.apr", cast=self.rules("f16"), allow_overflow=True)
        self.assertEqual(self.values(out)["a"].tolist(), [1.0, np.inf, -np.inf, np.inf])

    def test_a_cast_to_the_type_it_has_already_changes_no_byte_not_even_of_a_nan(self):
        save(self.folder / "x.safetensors", {"a": np.array([0x7F800001], np.uint32).view(np.float32)})
        out = self.convert(self.folder / "x.safetensors", "y.safetensors", cast=self.rules("f32"))
        self.assertEqual(tensors(out), tensors(self.folder / "x.safetensors"))

    def test_a_glob_that_matches_nothing_is_an_error_and_case_counts(self):
        for glob in ("nothing*", "MODEL.*"):
            with self.raises(UsageError, "cast-matches-nothing") as caught:
                self.convert(checkpoint("gqa_tied_bf16"), "a.apr", cast=self.rules(f"{glob}=f32"))
            self.assertIn(glob, str(caught.error))

    def test_tensors_that_are_not_plain_floats_are_refused_by_name(self):
        save(self.folder / "x.safetensors", {"a": np.zeros(2, np.float32), "n": np.zeros(2, np.int64)})
        with self.raises(RefusedError, "cast-source") as caught:
            self.convert(self.folder / "x.safetensors", "y.apr", cast=self.rules("f16"))
        self.assertIn("n is i64", str(caught.error))


class SafetyTest(ConversionTestCase):
    """Nothing of the source is written over, and nothing of the user's is deleted."""

    @parameterized.parameters("config.json", "merges.txt", "model.safetensors.index.json", "README.md")
    def test_no_file_that_the_source_consists_of_can_be_the_output(self, name):
        source = self.convert(self.copy("gqa_tied_bf16"), "s", max_shard_bytes=60_000)
        (source / "README.md").write_text("x")
        before = tree(source)
        self.assertIn(name, before)
        for path in (source, source / "model.safetensors.index.json"):
            with open_checkpoint(path) as opened:
                planned = make_plan(opened, os.fspath(source / name), to="apr")
                with self.raises(UsageError, "same-file"):
                    check_output(planned, force=True)
                with self.raises(UsageError, "same-file"):
                    run(planned, force=True)
        self.assertEqual(tree(source), before)

    @parameterized.parameters("notes.txt", "thesis.md", "results.json", "other.safetensors", "x.safetensors.index.json")
    def test_a_folder_with_files_that_are_no_checkpoints_is_never_replaced(self, name):
        target = self.convert(checkpoint("gqa_tied_bf16"), "hf")
        (target / name).write_bytes(b"mine")
        before = tree(target)
        with self.raises(UsageError, "output-not-replaceable") as caught:
            self.convert(checkpoint("gqa_untied_bf16"), "hf", force=True)
        self.assertIn(name, str(caught.error))
        self.assertEqual(tree(target), before)

    def test_a_folder_that_was_written_here_is_replaced_until_somebody_adds_to_it(self):
        source = self.copy("gqa_tied_bf16")
        (source / ".gitattributes").write_text("*.bin filter=lfs")
        target = self.convert(source, "hf", max_shard_bytes=60_000)
        before = tree(target)
        self.assertEqual(before[".gitattributes"], b"*.bin filter=lfs")
        self.convert(source, "hf", max_shard_bytes=60_000, force=True)
        self.assertEqual(tree(target), before)
        (target / "notes.txt").write_text("mine")
        with self.raises(UsageError, "output-not-replaceable"):
            self.convert(source, "hf", force=True)

    def test_what_a_container_brought_along_is_replaced_as_long_as_it_is_that(self):
        data = self.convert(checkpoint("gqa_tied_bf16"), "m.apr").read_bytes()
        parsed = apr_format.parse_prologue(data, len(data))
        files = parsed.metadata["source_files"] | {"extra.txt": "theirs"}
        file = apr_format.serialise_prologue(parsed.metadata | {"source_files": files}, parsed.entries)
        file += data[parsed.header.data_offset : -4]
        (self.folder / "m.apr").write_bytes(file + struct.pack("<I", zlib.crc32(file)))
        target = self.convert(self.folder / "m.apr", "hf")
        before = tree(target)
        self.assertEqual(before["extra.txt"], b"theirs")
        self.convert(self.folder / "m.apr", "hf", force=True)
        self.assertEqual(tree(target), before)
        for change in (
            lambda extra: extra.write_text("nearer"),
            lambda extra: extra.write_text("another length"),
            lambda extra: (extra.unlink(), extra.symlink_to("nowhere")),
        ):
            change(target / "extra.txt")
            with self.raises(UsageError, "output-not-replaceable"):
                self.convert(self.folder / "m.apr", "hf", force=True)

    @parameterized.parameters(
        ("apr", "x.safetensors"),
        ("apr", "new/"),
        ("apr", "X.SAFETENSORS"),
        ("safetensors", "x.apr"),
        ("safetensors", "x.apr/"),
    )
    def test_a_name_of_another_kind_of_output_is_refused(self, to, name):
        with self.raises(UsageError, "output-name") as caught:
            convert(checkpoint("gqa_tied_bf16"), f"{self.folder}/{name}", to=to)
        self.assertIn("--to", caught.error.hint)
        self.assertEqual(os.listdir(self.folder), [])


class SideFilesTest(ConversionTestCase):
    def warnings(self, source: os.PathLike[str], to: str = "apr") -> list[str]:
        with open_checkpoint(source) as opened:
            return make_plan(opened, os.fspath(self.folder / "planned"), to=to).warnings

    def test_well_known_files_go_along_and_the_rest_is_named(self):
        source = self.copy("gqa_tied_bf16")
        (source / "notes.txt").write_text("n")
        (source / "preprocessor_config.json").write_text("{}")
        (source / ".gitattributes").write_text("g")
        (source / "modeling.py").write_text("p")
        (source / "credentials.json").write_text("{}")
        (source / "onnx").mkdir()
        for to in ("apr", "safetensors"):
            self.assertEqual(
                self.warnings(source, to), ["not taken along: credentials.json, modeling.py, notes.txt, onnx/"]
            )
        for file in (self.convert(source, "m.apr"), self.convert(source, "m.safetensors")):
            back = self.convert(file, "back")
            expected = {name: content for name, content in tree_of_files(source).items() if name not in LEFT}
            self.assertEqual(tree(back), expected)
            shutil.rmtree(back)

    def test_in_a_folder_without_a_config_only_well_known_names_go_along(self):
        save(self.folder / "model.safetensors", {"a": np.zeros(2, np.float32)})
        (self.folder / "diary.txt").write_text("mine")
        (self.folder / "README.md").write_text("r")
        with open_checkpoint(self.folder) as opened:
            self.assertEqual(list(opened.files), ["README.md"])
            self.assertEqual(opened.left_behind, ("diary.txt",))

    @parameterized.parameters(("folder", {}), ("shards", {}), ("folder", None), ("shards", None))
    def test_an_empty_metadata_object_stays_apart_from_none(self, kind, metadata):
        source = self.copy("gqa_tied_bf16")
        path = source / "model.safetensors"
        fields, data = header(path), path.read_bytes()
        body = data[8 + struct.unpack_from("<Q", data)[0] :]
        fields.pop("__metadata__")
        text = json.dumps(({} if metadata is None else {"__metadata__": metadata}) | fields).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        if kind == "shards":
            source = self.convert(source, "s", max_shard_bytes=60_000)
        for number, output in enumerate(("hf", "m.apr")):
            back = self.convert(self.convert(source, output), f"back{number}")
            self.assertEqual(header(back / "model.safetensors").get("__metadata__"), metadata)


class ContradictionTest(ConversionTestCase):
    """What the metadata say of the tensors and is not so is said; shapes that no such model has need --as-is."""

    def warnings(self, source: os.PathLike[str], **settings: bool) -> str:
        with open_checkpoint(source) as opened:
            plan = make_plan(opened, os.fspath(self.folder / "planned"), to="safetensors", **settings)
        return "\n".join(plan.warnings)

    def change(self, change: dict[str, object], *, foreign: bool) -> pathlib.Path:
        path = self.convert(checkpoint("gqa_tied_bf16"), "m.apr")
        data = path.read_bytes()
        parsed = apr_format.parse_prologue(data, len(data))
        metadata = dict(parsed.metadata) | change
        if foreign:
            del metadata["source_files"]
        file = apr_format.serialise_prologue(metadata, parsed.entries) + data[parsed.header.data_offset : -4]
        path.write_bytes(file + struct.pack("<I", zlib.crc32(file)))
        return path

    @parameterized.product(
        case=[({"num_layers": 5}, "missing: model.layers.4."), ({"vocab_size": 5}, "shape: model.embed_tokens"),
              ({"head_dim": 8}, "shape: model.layers.0.self_attn.q_proj")],
        foreign=[True, False],
    )  # fmt: skip
    def test_metadata_of_an_apr_against_its_tensors(self, case, foreign):
        change, offender = case
        source = self.change(change, foreign=foreign)
        self.assertIn(offender, self.warnings(source, as_is=True))
        if offender.startswith("shape"):
            with self.raises(RefusedError, "metadata-values"):
                self.warnings(source)
        else:
            self.assertIn(offender, self.warnings(source))

    @parameterized.parameters(True, False)
    def test_right_metadata_are_not_warned_about(self, foreign):
        self.assertEqual(self.warnings(self.change({}, foreign=foreign)), "")

    def test_a_folder_with_a_missing_tensor(self):
        source = self.copy("gqa_tied_bf16")
        held = safetensors.numpy.load_file(source / "model.safetensors")
        del held["model.norm.weight"]
        save(source / "model.safetensors", held)
        self.assertIn("config.json: the tensors do not match", self.warnings(source))
        self.assertIn("missing: model.norm.weight", self.warnings(source))
        self.assertLen(tensors(self.convert(source, "hf")), len(held))

    @parameterized.parameters((5,), ("abc",), ([["a", "b"]],), ({"a": 5},))
    def test_source_metadata_of_another_type_are_broken(self, value):
        source = self.change({"source_metadata": value}, foreign=False)
        for output in ("hf", "x.safetensors"):
            with self.raises(BrokenContainerError, "source-metadata"):
                self.convert(source, output)
        self.assertEqual(os.listdir(self.folder), ["m.apr"])

    @parameterized.parameters(
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "a:b.json", ".bashrc"
    )
    def test_side_files_that_would_stand_in_for_tensors_are_broken(self, name):
        with self.raises(BrokenContainerError, "source-files"):
            self.convert(self.change({"source_files": {name: "{}"}}, foreign=False), "hf", max_shard_bytes=60_000)


class RefusalTest(ConversionTestCase):
    def test_missing_unexpected_and_misshaped_tensors_are_named_together(self):
        source = self.copy("gqa_tied_bf16")
        held = safetensors.numpy.load_file(source / "model.safetensors")
        del held["model.norm.weight"]
        held["model.extra"] = np.zeros(3, np.float32)
        held["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
        save(source / "model.safetensors", held)
        with self.raises(RefusedError, "tensors-mismatch") as caught:
            self.convert(source, "a.apr")
        for part in ("missing: model.norm.weight", "unexpected: model.extra", "q_proj.bias is [3]"):
            self.assertIn(part, str(caught.error))
        self.assertEqual(os.listdir(self.folder), ["source"])

    @parameterized.parameters(
        {"hidden_act": "gelu"},
        {"model_type": "llama"},
        {"num_experts": 8},
    )
    def test_a_config_that_is_not_computed_here_is_a_warning_and_converts_bit_for_bit(self, **change):
        source = self.copy("gqa_tied_bf16")
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | change))
        with open_checkpoint(source) as opened:
            planned = make_plan(opened, os.fspath(self.folder / "a.apr"), to="apr")
            run(planned)
        self.assertTrue(any(next(iter(change)) in warning for warning in planned.warnings), planned.warnings)
        self.convert(self.folder / "a.apr", "back")
        for name in ("model.safetensors", "config.json"):
            self.assertEqual((self.folder / "back" / name).read_bytes(), (source / name).read_bytes())

    def test_a_source_that_changes_while_it_is_read_is_refused(self):
        source = self.copy("gqa_tied_bf16")

        def touch(done: int) -> None:
            os.utime(source / "model.safetensors", ns=(1, 1))

        with open_checkpoint(source) as opened:
            planned = make_plan(opened, os.fspath(self.folder / "a.apr"), to="apr")
            with self.assertRaises(AprJaxError) as caught:
                run(planned, progress=touch)
        self.assertEqual(caught.exception.code, "source-changed")
        self.assertEqual(os.listdir(self.folder), ["source"])

    @parameterized.parameters(("5GB", 5 * 10**9), ("1.5kb", 1500), ("2GiB", 2 << 30), ("77", 77), (" 3 MB ", 3 * 10**6))
    def test_sizes(self, text, expected):
        self.assertEqual(parse_size(text), expected)

    @parameterized.parameters("", "GB", "-1", "0", "1e", "5 apples", "nan", "inf", "1PB")
    def test_what_is_no_size(self, text):
        with self.raises(UsageError, "size"):
            parse_size(text)

    def test_the_plan_is_what_is_written(self):
        with open_checkpoint(checkpoint("mixed_dtypes")) as opened:
            planned = make_plan(opened, os.fspath(self.folder / "a.apr"), to="apr")
            self.assertTrue(dataclasses.is_dataclass(planned))
            described = json.loads(json.dumps(planned.to_json()))
            run(planned)
        self.assertEqual(described["bytes_written"], (self.folder / "a.apr").stat().st_size)
        with open_checkpoint(self.folder / "a.apr") as opened:
            found = [(t.name, t.dtype.name, list(t.shape), t.nbytes, t.offset) for t in opened.tensors.values()]
        self.assertEqual(
            [(t["name"], t["dtype"], t["shape"], t["bytes"], t["offset"]) for t in described["tensors"]], found
        )


# A conversion in many small writes, each announced before it happens and lasting a moment.
_SLOW = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.convert import streaming
from apr_jax.converters.commands import cli, convert
streaming._CHUNK_BYTES, streaming._BLOCK_BYTES = 4096, 16384
write = streaming.OutputFile.write_at
def slow(self, data, offset):
    os.write(1, b"w")
    time.sleep(0.001)
    write(self, data, offset)
streaming.OutputFile.write_at = slow
cli.start("apr_jax.converters.commands.convert", ["convert", *sys.argv[2:]])
"""


@pytest.mark.slow
class KilledTest(ConversionTestCase):
    def start(self, source: pathlib.Path, output: str, writes: int) -> subprocess.Popen[bytes]:
        """Starts a conversion and returns when it has begun its write number `writes`."""
        to = "apr" if output.endswith(".apr") else "safetensors"
        command = [sys.executable, "-c", _SLOW, ROOT, source, "--to", to, "-o", self.folder / output, "--force"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        assert process.stderr is not None
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        for _ in range(writes):
            self.assertEqual(process.stdout.read(1), b"w")
        return process

    @parameterized.parameters("m.apr", "hf")
    def test_kill_9_at_ten_moments_each(self, output):
        source = self.copy("gqa_tied_bf16")
        before = tree(source)
        complete = content(self.convert(source, "expected" + pathlib.Path(output).suffix))
        target = self.folder / output
        left: list[str] = []
        hits = 0
        # The conversion has about 58 writes; the last kills fall on flushing and renaming.
        for moment, writes in enumerate((0, 1, 2, 5, 10, 20, 30, 40, 50, 55)):
            # In turn with nothing there and with a complete older output that is being replaced.
            if moment % 2:
                self.convert(checkpoint("gqa_untied_bf16"), output, force=True)
            elif target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            older = content(target)
            process = self.start(source, output, writes)
            process.kill()
            process.wait()
            self.assertIn(content(target), (older, complete), f"partial after {writes} writes")
            left = [name for name in os.listdir(self.folder) if ".apr-jax-" in name]
            self.assertTrue(all(name.startswith(f".{output}.apr-jax-tmp.") for name in left), left)
            hits += bool(left)
            self.assertEqual(tree(source), before)
        self.assertGreater(hits, 5, "the kills did not hit the conversion while it wrote")
        command = [sys.executable, ROOT / "tools" / "convert.py", source, "-o", target, "--force"]
        command += ["--to", "apr" if output == "m.apr" else "safetensors"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self.assertEqual(content(target), complete)
        self.assertEqual([name for name in os.listdir(self.folder) if ".apr-jax-" in name], [])
        self.assertEqual(done.stderr.count("removed '."), len(left))

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_a_signal_cleans_up_and_exits_130_without_traceback(self, number):
        source = self.copy("gqa_tied_bf16")
        process = self.start(source, "m.apr", 5)
        self.assertLen(os.listdir(self.folder), 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130, errors)
        self.assertNotIn(b"Traceback", errors)
        self.assertEqual(os.listdir(self.folder), ["source"])


# Runs conversions in a fresh process and prints what it imported and its peak memory, from the kernel.
_MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.commands import convert
for to, source, out in zip(sys.argv[2::3], sys.argv[3::3], sys.argv[4::3]):
    convert.main(convert.parse(["convert", source, "-o", out, "--to", to]))
print(sorted({"numpy", "rich", "ml_dtypes", "jax", "flax", "torch"} & set(sys.modules)))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
_BARE = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


class FootprintTest(ConversionTestCase):
    def run_child(self, code: str, *arguments: object) -> list[str]:
        command = [sys.executable, "-c", code, ROOT, *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def test_identity_imports_neither_numpy_nor_rich_nor_jax(self):
        lines = self.run_child(
            _MEASURED, "apr", checkpoint("gqa_tied_bf16"), "a.apr", "safetensors", "a.apr", "hf", "apr", "hf", "b.apr"
        )
        self.assertEqual(lines[-2], "[]")

    def test_memory_does_not_grow_with_the_data(self):
        # 64 MB of zeros in each of 4 tensors, which take no disk in the source.
        size = 64 << 20
        fields = {
            f"t{number}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [size * number, size * (number + 1)]}
            for number in range(4)
        }
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8)
        with open(self.folder / "x.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 4 * size)
        peak = int(self.run_child(_MEASURED, "apr", "x.safetensors", "x.apr")[-1])
        self.assertGreater((self.folder / "x.apr").stat().st_size, 4 * size)
        bare = int(self.run_child(_BARE)[-1])
        self.assertLess(peak - bare, 32 << 10, f"{peak} and {bare} KiB")


if __name__ == "__main__":
    absltest.main()
