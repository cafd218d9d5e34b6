"""Models from published quantised forms: their logits are those of the dense model of the decoded weights."""

import pathlib

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.model.parameters import named
from apr_jax.trace.inputs import Inputs
from tests import packers

BASE = pathlib.Path(__file__).parents[1] / "data" / "checkpoints" / "gqa_tied_bf16"
_IDS = np.random.default_rng(3).integers(0, 280, (2, 24))


class LoadTest(parameterized.TestCase):
    @parameterized.parameters(
        "gptq_int4_act_order", "gptq_int8_whole_row_bf16", "awq_32", "fp8_block_128", "bnb_nf4_128_nested_bf16",
        "bnb_int8", "ct_int4_asymmetric_16", "ct_fp8_tensor",
    )  # fmt: skip
    def test_field_logits_are_those_of_the_dense_model(self, name):
        """FIELD Forms: a model in each published form -> the logits of the dense model of its decoded weights, 1e-5"""
        root = pathlib.Path(self.create_tempdir().full_path)
        packer, config = packers.MEMBERS[name]
        dense = packers.pack_checkpoint(BASE, root / "packed", packer, config, ignored=("layers.0.mlp.down_proj",))
        packers.dense_checkpoint(BASE, root / "dense", dense)
        found, wanted, base = (self._logits(path) for path in (root / "packed", root / "dense", BASE))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        self.assertGreater(np.abs(found - base).max(), 1e-3 * np.abs(wanted).max())

    def test_fused_parameters_in_bfloat16_are_rounded_once(self):
        root = pathlib.Path(self.create_tempdir().full_path)
        packer, config = packers.MEMBERS["awq_32"]
        dense = packers.pack_checkpoint(BASE, root / "packed", packer, config)
        model = load_model(root / "packed", "bfloat16", "cpu", fused=True)
        (found,) = (
            value for name, value in named(model.parameters).items() if "layers.0" in name and "gate_up" in name
        )
        wanted = np.concatenate([dense[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
        np.testing.assert_array_equal(np.asarray(found), wanted.astype(jnp.bfloat16))

    def _logits(self, folder: pathlib.Path) -> np.ndarray:
        model = load_model(folder, "float32", "cpu")
        return np.asarray(model.logits(Inputs.of(_IDS)))


if __name__ == "__main__":
    absltest.main()
