"""Every file that the genuine `apr` wrote: structure, bytes and values, against the HuggingFace folder beside it.

The files are not part of the repository. Their folder (with `genuine/`, `container/`) comes from the environment
variable APR_FIXTURES, or is `shared/fixtures` beside the repository; without it these tests are skipped.
"""

import hashlib
import json
import os
import pathlib
import zlib

import numpy as np
import safetensors
from absl.testing import absltest

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError
from apr_jax.converters.formats import apr_format

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = pathlib.Path(os.environ.get("APR_FIXTURES") or ROOT.parent / "shared" / "fixtures")
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def huggingface_tensors(folder):
    """Name -> (dtype code, shape, bytes), as the safetensors package reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def as_float32(dtype, data):
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


@absltest.skipUnless((FIXTURES / "genuine").is_dir(), f"no genuine files in {FIXTURES}; set APR_FIXTURES")
class GenuineFixturesTest(absltest.TestCase):
    def genuine(self):
        files = sorted((FIXTURES / "genuine").glob("*/apr/*.apr"))
        self.assertNotEmpty(files)
        return files

    def test_parse_and_serialise_give_every_file_byte_for_byte(self):
        files = [*self.genuine(), *(FIXTURES / "container").glob("golden_v2*.apr")]
        orders = set()
        for path in files:
            with self.subTest(path.relative_to(FIXTURES)):
                file = path.read_bytes()
                header = apr_format.parse_header(file[:64], len(file))
                parsed = apr_format.parse_prologue(file[: header.data_offset], len(file))
                in_data = sorted(parsed.entries, key=lambda entry: (entry.offset, entry.size))
                orders.add(in_data == list(parsed.entries))
                entries = apr_format.lay_out(
                    ((entry.name, entry.dtype, entry.shape, entry.size) for entry in parsed.entries),
                    [entry.name for entry in in_data],
                )
                written = bytearray(apr_format.serialise_prologue(parsed.metadata, entries, flags=header.flags))
                for entry in in_data:
                    start = header.data_offset + entry.offset
                    self.assertEqual(len(written), start)
                    written += file[start : start + entry.size] + bytes(-entry.size % 64)
                written += apr_format.footer(zlib.crc32(written))
                self.assertEqual(bytes(written), file)
                self.assertEmpty(parsed.warnings)
                self.assertTrue(parsed.has_footer)
        self.assertGreaterEqual(len(files), 20)
        self.assertEqual(orders, {True, False}, "data in name order and in insertion order")

    def test_files_of_other_formats_are_refused(self):
        files = [FIXTURES / "container" / "golden_v1.apr", *(FIXTURES / "third_party").glob("*.apr")]
        for path in files:
            with self.assertRaises(AprJaxError) as caught:
                open_checkpoint(path).close()
            self.assertEqual(caught.exception.code, "foreign-format")
            self.assertIn("tsp" if "tsp" in path.name else "APRN", caught.exception.message)
        self.assertGreaterEqual(len(files), 5)

    def test_unquantised_files_hold_the_bytes_of_the_huggingface_folder(self):
        files = tensors = heads = 0
        for path in self.genuine():
            if path.stem != "plain":
                continue
            files += 1
            expected = huggingface_tensors(path.parents[1] / "hf")
            with open_checkpoint(path) as ours, open_checkpoint(path.parents[1] / "hf") as folder:
                self.assertEqual(set(folder.tensors), set(expected))
                for name, (dtype, shape, data) in expected.items():
                    for tensor in (ours.tensors[name], folder.tensors[name]):
                        self.assertEqual((tensor.dtype.safetensors, tensor.shape), (dtype, shape), name)
                        self.assertEqual(tensor.raw(), data, name)
                        self.assertEqual(tensor.read().tobytes(), data, name)
                        tensors += 1
                # What an import adds is a head for tied models, and an untied head is always there.
                self.assertLessEqual(set(ours.tensors) - set(expected), {HEAD})
                self.assertEqual(folder.config["tie_word_embeddings"], HEAD not in expected)
                if HEAD in ours.tensors and HEAD not in expected:
                    heads += 1
                    dtype, _, data = expected[EMBEDDING]
                    self.assertEqual(ours.tensors[HEAD].read().tobytes(), as_float32(dtype, data).tobytes())
                elif HEAD not in ours.tensors:
                    self.assertEqual(ours.placeholders[HEAD], expected[EMBEDDING][1])
        self.assertEqual((files, heads), (6, 2))
        self.assertGreaterEqual(tensors, 2 * 6 * 14)

    def test_payloads_and_values_are_those_recorded(self):
        files = payloads = values = 0
        for path in self.genuine():
            recorded = json.loads(path.with_suffix(".values.json").read_text())
            files += 1
            with open_checkpoint(path) as opened:
                self.assertEqual(set(opened.tensors) | set(opened.placeholders), set(recorded))
                ids = {entry.name: entry.dtype_id for entry in opened.apr.entries}
                for name, expected in recorded.items():
                    self.assertEqual(ids[name], expected["dtype_id"])
                    if name in opened.placeholders:
                        self.assertEqual((list(opened.placeholders[name]), 0), (expected["shape"], expected["bytes"]))
                        continue
                    tensor = opened.tensors[name]
                    self.assertEqual((list(tensor.shape), tensor.nbytes), (expected["shape"], expected["bytes"]))
                    self.assertEqual(hashlib.sha256(tensor.raw()).hexdigest(), expected["sha256_of_payload"])
                    payloads += 1
                    if not tensor.dtype.is_block:
                        floats = tensor.read().astype(np.float32)
                        self.assertEqual(
                            hashlib.sha256(floats.tobytes()).hexdigest(), expected["sha256_of_float32_values"]
                        )
                        values += 1
        self.assertGreaterEqual(files, 18)
        self.assertGreaterEqual(payloads, 18 * 14)
        self.assertGreaterEqual(values, 100)

    def test_every_file_has_a_configuration_that_is_that_of_the_folder(self):
        compared = 0
        for path in self.genuine():
            with open_checkpoint(path) as ours, open_checkpoint(path.parents[1] / "hf") as folder:
                expected, found = folder.model_config(), ours.model_config()
                for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
                    self.assertEqual(getattr(found, field), getattr(expected, field), (path, field))
                self.assertEqual(np.float32(found.rope_theta), np.float32(expected.rope_theta))
                self.assertEqual(np.float32(found.rms_norm_eps), np.float32(expected.rms_norm_eps))
                self.assertEqual(type(found).from_hf(ours.config), found)
                compared += 1
        self.assertGreaterEqual(compared, 18)


if __name__ == "__main__":
    absltest.main()
