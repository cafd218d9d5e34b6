"""K-quants of llama.cpp in an engine's weights: the values that ggml makes, to the bit, and their names in parity."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.formats import dtypes
from apr_jax.load.load_model import load_model
from apr_jax.parity import k_quants, narrow
from apr_jax.trace.inputs import Inputs
from tests import k_quant_values, paths
from tests.battery.parity_battery import Bench

K = "self_attn.k_proj.weight"
CONFIG = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def by_ggml(label: str, name: str) -> np.ndarray:
    """Returns what the recorded bytes decode to, float32."""
    kind = name.split()[0]
    values = getattr(k_quant_values, label)()
    out = np.empty(values.size, np.float32)
    dtypes.by_name(kind).codec.decode(np.load(paths.DATA / "k_quants.npz")[f"{label}.{kind}"].tobytes(), out)
    return out.reshape(values.shape)


class ValuesTest(parameterized.TestCase):
    @parameterized.product(name=k_quants.NAMES, label=("weight", "hard"))
    def test_values_are_ggmls_bit_for_bit(self, name, label):
        values = getattr(k_quant_values, label)()
        found = k_quants.quantised(values, name)
        np.testing.assert_array_equal(found, by_ggml(label, name))
        np.testing.assert_array_equal(narrow.CODECS[name](values.astype(np.float64)), found)

    def test_all_that_ggml_has_are_there(self):
        self.assertEqual([name.split()[0] for name in k_quants.NAMES], list(k_quant_values.BLOCK_BYTES))
        self.assertTrue(narrow.fits("q6_k", 512) and narrow.fits("q8_0", 576))
        self.assertFalse(narrow.fits("q6_k", 576))


@pytest.mark.slow
class NamedTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        random = np.random.default_rng(0)
        layer = {
            "input_layernorm.weight": (256,), "post_attention_layernorm.weight": (256,), K: (64, 256),
            "self_attn.q_proj.weight": (256, 256), "self_attn.v_proj.weight": (64, 256),
            "self_attn.o_proj.weight": (256, 256), "self_attn.q_proj.bias": (256,), "self_attn.k_proj.bias": (64,),
            "self_attn.v_proj.bias": (64,), "mlp.gate_proj.weight": (64, 256), "mlp.up_proj.weight": (64, 256),
            "mlp.down_proj.weight": (256, 64),
        }  # fmt: skip
        shapes = {"model.embed_tokens.weight": (96, 256), "model.norm.weight": (256,)}
        shapes |= {f"model.layers.{at}.{name}": shape for at in range(2) for name, shape in layer.items()}
        cls.weights = {
            name: (random.normal(0, 0.06, shape) + ("norm" in name)).astype("f4") for name, shape in shapes.items()
        }
        cls.weights |= {f"model.layers.{at}.{K}": k_quant_values.weight() for at in range(2)}

    @parameterized.parameters(*k_quants.NAMES)
    def test_field_a_weight_in_k_quants(self, name):
        """FIELD parity: llama.cpp's K-quants (q2_k to q6_k) in an engine's weights -> weights-quantised by which"""
        folder = pathlib.Path(self.create_tempdir().full_path)
        safetensors.numpy.save_file(self.weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        inputs = Inputs.of(np.random.default_rng(1).integers(0, 96, (1, 40)))
        theirs = self.weights | {f"model.layers.{at}.{K}": by_ggml("weight", name) for at in range(2)}
        bench = Bench("k-quants", theirs, CONFIG, inputs, exact, same)
        (finding,) = bench.diagnose(bench.dump(())).findings
        self.assertEqual((finding.fault, finding.layers), ("weights-quantised", "all"), finding.sentence)
        self.assertEqual(dict(finding.parameters), {"tensor": K, "codec": name})


if __name__ == "__main__":
    absltest.main()
