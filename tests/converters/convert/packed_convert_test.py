"""Conversion of published quantised forms: bit for bit as they are, or dense."""

import json
import pathlib

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.packed_forms import packed_forms
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import RefusedError
from tests import packers

BASE = pathlib.Path(__file__).parents[2] / "data" / "checkpoints" / "gqa_tied_bf16"
Q = "model.layers.0.self_attn.q_proj.weight"


class PackedConvertTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.create_tempdir().full_path)

    def _pack(self, member: str) -> dict[str, np.ndarray]:
        return packers.pack_checkpoint(BASE, self.root / "packed", *packers.MEMBERS[member])

    @parameterized.parameters("gptq_int4_act_order", "awq_32", "fp8_block_128", "bnb_nf4_128_nested_bf16", "ct_nvfp4")
    def test_field_as_it_is_bit_for_bit(self, member):
        """FIELD Forms: convert a quantised folder -> every part and config.json bit for bit"""
        self._pack(member)
        convert(self.root / "packed", self.root / "out", to="safetensors")
        before, after = (packers.read(self.root / name / "model.safetensors") for name in ("packed", "out"))
        self.assertEqual({k: v.tobytes() for k, v in before.items()}, {k: v.tobytes() for k, v in after.items()})
        self.assertEqual(
            (self.root / "packed" / "config.json").read_bytes(), (self.root / "out" / "config.json").read_bytes()
        )

    def test_by_way_of_an_apr_and_back(self):
        self._pack("gptq_int4_32")
        convert(self.root / "packed", self.root / "m.apr", to="apr")
        convert(self.root / "m.apr", self.root / "out", to="safetensors")
        before, after = (packers.read(self.root / name / "model.safetensors") for name in ("packed", "out"))
        self.assertEqual({k: v.tobytes() for k, v in before.items()}, {k: v.tobytes() for k, v in after.items()})
        with open_checkpoint(self.root / "m.apr") as checkpoint:
            self.assertEqual(packed_forms(checkpoint), {"gptq int4, group 32": 14})
        convert(self.root / "m.apr", self.root / "dense.apr", to="apr", dequantise=True)
        with open_checkpoint(self.root / "dense.apr") as checkpoint:
            self.assertNotIn("quantization_config", checkpoint.config)
            self.assertEqual(checkpoint.model_config().num_layers, 2)

    @parameterized.parameters("gptq_int4_32", "awq_16_bf16", "fp8_block_128", "bnb_nf4_64", "bnb_int8", "ct_int4_32")
    def test_field_dequantised(self, member):
        """FIELD Forms: convert --dequantise -> a dense checkpoint of the decoded values, its configuration plain"""
        dense = self._pack(member)
        convert(self.root / "packed", self.root / "out", to="safetensors", dequantise=True)
        after = packers.read(self.root / "out" / "model.safetensors")
        self.assertEqual(set(after), set(dense))
        for name, values in dense.items():
            np.testing.assert_allclose(after[name].astype("f4"), values.astype("f4"), rtol=3e-7, atol=0, err_msg=name)
        config = json.loads((self.root / "out" / "config.json").read_text())
        self.assertEqual(config, json.loads((BASE / "config.json").read_text()))

    def test_dequantised_and_cast(self):
        dense = self._pack("fp8_row")
        rules = [CastRule.parse("bf16")]
        convert(self.root / "packed", self.root / "out", to="safetensors", dequantise=True, cast=rules)
        found = packers.read(self.root / "out" / "model.safetensors")[Q]
        np.testing.assert_array_equal(found, dense[Q].astype(ml_dtypes.bfloat16))
        convert(self.root / "packed", self.root / "q.apr", to="apr", dequantise=True, cast=[CastRule.parse("q8")])
        with open_checkpoint(self.root / "q.apr") as checkpoint:
            self.assertEqual(checkpoint.tensors[Q].dtype.name, "apr_q8")
            largest = np.abs(dense[Q]).max()
            np.testing.assert_allclose(checkpoint.tensors[Q].read(), dense[Q], rtol=0, atol=largest / 127)

    def test_what_an_apr_cannot_hold_names_the_option(self):
        self._pack("fp8_row")
        with self.assertRaisesRegex(RefusedError, "--dequantise"):
            convert(self.root / "packed", self.root / "m.apr", to="apr")


if __name__ == "__main__":
    absltest.main()
