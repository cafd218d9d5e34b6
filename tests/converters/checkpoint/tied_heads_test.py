"""What a checkpoint says of its head is understood alike wherever it is asked, and what a copy of the embedding is."""

import json
import pathlib
import sys
import tempfile
import zlib
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import tied_heads
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.convert.plan import make_plan
from apr_jax.converters.formats import apr_format
from apr_jax.converters.formats.dtypes import by_name
from apr_jax.converters.inspect.checks import inspect
from apr_jax.converters.verify.configurations import compare_configurations
from tests.paths import DATA

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
}
METADATA = {
    "architecture": "qwen2",
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
}
TIED, UNTIED = CONFIG | {"tie_word_embeddings": True}, CONFIG | {"tie_word_embeddings": False}


def config_json(config: dict) -> dict:
    return {"source_files": {"config.json": json.dumps(config)}}


def apr_file(path: pathlib.Path, metadata: dict, *, own_head: bool) -> pathlib.Path:
    """Writes an `.apr` with an embedding and, if asked to, a head of other values."""
    values = {EMBEDDING: np.arange(24, dtype=np.float32)} | ({HEAD: np.ones(24, np.float32)} if own_head else {})
    entries = apr_format.lay_out((name, by_name("f32"), (6, 4), 96) for name in sorted(values))
    data = b"".join(values[entry.name].tobytes() + bytes(-96 % 64) for entry in entries)
    content = apr_format.serialise_prologue(METADATA | metadata, entries) + data
    path.write_bytes(content + apr_format.footer(zlib.crc32(content)))
    return path


class StatementTest(parameterized.TestCase):
    """One answer for convert, inspect, verify and the model."""

    # What the metadata hold -> what they say; whether the head of the model is the embedding, without and with a head
    # of its own in the file.
    @parameterized.named_parameters(
        ("nothing", {}, None, True, False),
        ("tied_embeddings_true", {"tied_embeddings": True}, True, True, False),
        ("tied_embeddings_false", {"tied_embeddings": False}, False, True, False),
        ("hf_config_true", {"hf_config": TIED}, True, True, True),
        ("hf_config_false", {"hf_config": UNTIED}, False, False, False),
        ("hf_config_without_the_key", {"hf_config": CONFIG}, False, False, False),
        ("config_json_true", config_json(TIED), True, True, True),
        ("config_json_false", config_json(UNTIED), False, False, False),
        ("config_json_without_the_key", config_json(CONFIG), False, False, False),
        ("config_json_beside_another_hf_config", config_json(UNTIED) | {"hf_config": TIED}, False, False, False),
        ("contradictory", config_json(UNTIED) | {"tied_embeddings": True}, True, False, False),
        ("contradictory_the_other_way", config_json(TIED) | {"tied_embeddings": False}, True, True, True),
    )
    def test_every_reader_takes_it_for_the_same(self, metadata, said, without_head, with_head):
        folder = pathlib.Path(self.create_tempdir().full_path)
        with (
            open_checkpoint(apr_file(folder / "without.apr", metadata, own_head=False)) as without,
            open_checkpoint(apr_file(folder / "with.apr", metadata, own_head=True)) as own,
        ):
            for opened, tied in ((without, without_head), (own, with_head)):
                statement = tied_heads.stated(opened)
                self.assertEqual(None if statement is None else statement.tied, said)
                self.assertEqual(tied_heads.is_tied(opened), tied)
                self.assertEqual(opened.model_config().tie_word_embeddings, tied, "the model that is loaded")
            planned = make_plan(without, str(folder / "copy.apr"), to="apr", tied_head="copy")
            self.assertEqual(HEAD in [tensor.name for tensor in planned.tensors], without_head, "convert")
            failed = [check.name for check in inspect(own) if check.passed is False]
            self.assertEqual("falsely-tied" in failed, bool(said), "inspect")
            differences = [found for found in compare_configurations(own, own) if found.attribute == tied_heads.TIED]
            self.assertEqual([found.a for found in differences], [True, True] if said else [], "verify")

    def test_of_another_model_a_head_without_data_tells(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        metadata = {"hf_config": TIED | {"model_type": "other"}}
        for own_head in (False, True):
            with open_checkpoint(apr_file(folder / "m.apr", metadata, own_head=own_head)) as opened:
                self.assertFalse(tied_heads.is_tied(opened))
                opened.placeholders = {HEAD: (6, 4)}
                self.assertTrue(tied_heads.is_tied(opened))

    def test_the_key_of_a_config_json_beside_safetensors_counts_too(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        safetensors.numpy.save_file({EMBEDDING: np.ones((6, 4), np.float32)}, folder / "model.safetensors")
        for config, said in ((TIED, True), (UNTIED, False), (CONFIG, False), (None, None), ([], None)):
            (folder / "config.json").unlink(missing_ok=True)
            if config is not None:
                (folder / "config.json").write_text(json.dumps(config))
            with open_checkpoint(folder) as opened:
                statement = tied_heads.stated(opened)
                self.assertEqual(None if statement is None else statement.tied, said, config)


VALUES = np.array([[0.5, -2.0, 0.0], [1.0, np.inf, 3.0]], np.float32)


class SameValuesTest(parameterized.TestCase):
    def same(self, a: np.ndarray, b: np.ndarray) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "x.safetensors"
            safetensors.numpy.save_file({"a": a, "b": b}, path)
            with open_checkpoint(path) as opened:
                found = [tied_heads.same_values(opened.tensors[x], opened.tensors[y]) for x, y in ("ab", "ba")]
        self.assertEqual(found[0], found[1])
        return found[0]

    @parameterized.product(
        a=[np.float32, np.float16, ml_dtypes.bfloat16, np.float64], b=[np.float32, np.float16, ml_dtypes.bfloat16]
    )
    def test_values_that_both_types_hold_are_the_same(self, a, b):
        self.assertTrue(self.same(VALUES.astype(a), VALUES.astype(b)))
        other = VALUES.copy()
        other[-1, -1] = 4
        self.assertFalse(self.same(VALUES.astype(a), other.astype(b)))

    def test_rounding_signs_of_zero_and_nan(self):
        self.assertFalse(self.same(np.array([1.001], np.float32), np.array([1.001], np.float16)))
        self.assertFalse(self.same(np.array([0.0], np.float32), np.array([-0.0], np.float16)))
        self.assertTrue(self.same(np.array([np.nan], np.float32), np.array([np.nan], np.float16)))
        self.assertFalse(self.same(np.array([np.nan], np.float32), np.array([-np.nan], np.float16)))

    def test_shape_and_kind_count(self):
        self.assertFalse(self.same(VALUES, VALUES.reshape(3, 2)))
        self.assertFalse(self.same(VALUES, VALUES.reshape(3, 2).astype(np.float16)))
        self.assertFalse(self.same(np.ones(2, np.int32), np.ones(2, np.float32)))
        self.assertTrue(self.same(np.ones(2, np.int32), np.ones(2, np.int32)))
        for shape in ((), (0, 3), (3, 0)):
            self.assertTrue(self.same(np.ones(shape, np.float32), np.ones(shape, np.float16)))

    def test_a_difference_beyond_the_first_part_is_found_and_one_in_it_ends_the_reading(self):
        a = np.arange(4096, dtype=np.float64).reshape(1024, 4) % 64
        late, early = a.astype(np.float16), a.astype(np.float16)
        late[-1, -1] += 1
        early[0, 0] += 1
        with mock.patch.object(tied_heads, "_COMPARED_BYTES", 8192):
            self.assertTrue(self.same(a, a.astype(np.float16)))
            self.assertFalse(self.same(a, late))
            with mock.patch.object(Tensor, "read", autospec=True, side_effect=Tensor.read) as read:
                self.assertFalse(self.same(a, early))
            self.assertEqual(read.call_count, 4)

    def test_quantised_values_are_compared_as_they_decode(self):
        with open_checkpoint(DATA / "apr" / "tiny_f32_tied-int8.apr") as opened:
            name, tensor = next((n, t) for n, t in opened.tensors.items() if t.dtype.name == "apr_q8")
            decoded = tensor.read()
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "x.safetensors"
                other = decoded.copy()
                other.reshape(-1)[-1] += 1
                safetensors.numpy.save_file({name: decoded, "other": other}, path)
                with open_checkpoint(path) as plain:
                    self.assertTrue(tied_heads.same_values(tensor, plain.tensors[name]))
                    self.assertFalse(tied_heads.same_values(tensor, plain.tensors["other"]))


if __name__ == "__main__":
    absltest.main()
