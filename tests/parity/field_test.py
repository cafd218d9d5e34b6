"""What people report of engines, rebuilt with the NumPy engine: each mistake gets its true name, with its numbers."""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.parity.localise import infer_dtype
from apr_jax.trace import stages
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench

GQA = "gqa_tied_bf16"


def everywhere(name, **parameters):
    return Planted(name, None, parameters)


def rope_precision(*cases):
    return [(dtype, {"what": what, "dtype": to, "besides": besides}) for dtype, what, to, *besides in cases]


def permuted(order, *tensors):
    return [everywhere("weights-permuted", tensor=f"self_attn.{tensor}", order=order) for tensor in tensors]


@pytest.mark.slow
class FieldTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.benches = {}

    def bench(self, dtype="float32", name=GQA):
        if (name, dtype) not in self.benches:
            self.benches[name, dtype] = Bench.of(name, dtype)
        return self.benches[name, dtype]

    def found(self, *faults, dtype="float32", name=GQA, shown=lambda key: True):
        bench = self.bench(dtype, name)
        dump = bench.dump(faults)
        return bench.diagnose({key: value for key, value in dump.items() if shown(key)}).findings

    def assert_named(self, findings, fault, sentence="", **parameters):
        (finding,) = findings
        self.assertEqual((finding.fault, finding.layers), (fault, "all"), finding.sentence)
        for parameter, value in parameters.items():
            self.assertEqual(finding.parameters[parameter], value, finding.sentence)
        self.assertIn(sentence, finding.sentence)

    @parameterized.parameters(
        rope_precision(
            ("bfloat16", "inv_freq", "bfloat16"),
            ("bfloat16", "angles", "bfloat16"),
            ("bfloat16", "angles", "bfloat16", "inv_freq", "positions"),
            ("float16", "inv_freq", "bfloat16"),
            ("float32", "inv_freq", "float16"),
            ("float32", "angles", "bfloat16"),
            ("float32", "angles", "float16", "tables"),
            ("float32", "tables", "bfloat16"),
        )
    )
    def test_field_rotation_less_precise(self, dtype, parameters):
        """FIELD parity: RoPE angles, inv_freq, tables in 16 bits, 80 positions -> rope-precision, what and in which"""
        findings = self.found(everywhere("rope-precision", **parameters), dtype=dtype)
        self.assert_named(findings, "rope-precision", what=parameters["what"], dtype=parameters["dtype"])

    @parameterized.parameters("float32", "bfloat16", "float16")
    def test_field_a_right_engine(self, dtype):
        """FIELD parity: a right engine in float32, bfloat16, float16 -> clean, dtype inferred"""
        self.assertEqual(self.found(dtype=dtype), ())
        self.assertEqual(infer_dtype(self.bench(dtype).dump(())), dtype)

    @parameterized.parameters(
        everywhere("rope-adjacent-pairs"),
        everywhere("o-proj-transposed"),
        everywhere("softmax-scale", scale=1.0),
        everywhere("rms-norm-eps", eps=1e-3),
    )
    def test_field_mistakes_in_float16(self, planted):
        """FIELD parity: known mistakes in a float16 engine -> named as in float32"""
        self.assert_named(self.found(planted, dtype="float16"), planted.name)

    @parameterized.parameters(
        ("float32", "q", (1, 2, 3), "heads 1-3 of 4 are not rotated"),
        ("float32", "k", (0,), "head 0 of 2 is not rotated"),
        ("bfloat16", "q", (0, 2), "heads 0, 2 of 4 are not rotated"),
        ("float16", "q", (3,), "head 3 of 4 is not rotated"),
    )
    def test_field_heads_that_are_not_rotated(self, dtype, part, heads, sentence):
        """FIELD parity: only some heads of q or k rotated -> which heads are not"""
        findings = self.found(everywhere(f"rope-not-on-{part}", heads=heads), dtype=dtype)
        self.assert_named(findings, f"rope-not-on-{part}", sentence, heads=heads)

    @parameterized.parameters(
        ("float32", {"stage": "ffn_out", "channels": (17,), "factor": 0.85}, "channel 17 of 64 scaled by 0.85"),
        ("float16", {"stage": "ffn_out", "channels": (17,), "factor": 0.85}, "channel 17 of 64 scaled by 0.85"),
        ("bfloat16", {"stage": "ffn_gate", "channels": (3, 4, 5), "factor": 0.5}, "channels 3-5 of 160 scaled by 0.5"),
        ("float32", {"stage": "attention", "heads": (1, 2), "factor": -1.0}, "heads 1-2 of 4 scaled by -1"),
        ("float32", {"stage": "attn_scores", "heads": (3,), "factor": 1.25}, "head 3 of 4 scaled by 1.25"),
        ("float32", {"stage": "logits", "channels": (5,), "factor": 2.0}, "channel 5 of 288 scaled by 2"),
        ("float32", {"stage": "attn_norm", "positions": (70,), "factor": 0.9}, "position 70 scaled by 0.9"),
    )
    def test_field_a_part_is_scaled(self, dtype, parameters, sentence):
        """FIELD parity: some channels, heads or positions of a stage times a number -> which, and the number"""
        (finding, *others) = self.found(everywhere("part-scaled", **parameters), dtype=dtype)
        self.assertEqual((finding.fault, others), ("part-scaled", []), finding.sentence)
        self.assertIn(sentence, finding.sentence)

    def test_field_a_part_is_zero_or_exchanged(self):
        """FIELD parity: channels of a stage zero, heads in each other's place -> which, and that they are"""
        zeroed = everywhere("part-zeroed", stage="qkv_bias", channels=(8, 9))
        self.assert_named(self.found(zeroed), "part-zeroed", "channels 8-9 of 128 are zero")
        # sin of slow pairs is subnormal in float16: beside a zero it is all that is left.
        half = self.found(everywhere("part-zeroed", stage="qkv_bias", channels=(6, 7)), dtype="float16")
        self.assert_named(half, "part-zeroed", "channels 6-7 of 128 are zero")
        exchanged = everywhere("part-exchanged", stage="attention", heads=(0, 3))
        self.assert_named(self.found(exchanged), "part-exchanged", "heads 0, 3 of 4 are exchanged", those=(3, 0))
        exchanged = everywhere("part-exchanged", stage="ffn_out", channels=(2, 40))
        self.assert_named(self.found(exchanged), "part-exchanged", "channels 2, 40 of 64", those=(40, 2))

    @parameterized.parameters(
        ("adjacent", ("q_proj.weight", "k_proj.weight")),
        ("adjacent", ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")),
        ("halves", ("q_proj.weight", "k_proj.weight")),
    )
    def test_field_rows_of_q_and_k_permuted(self, order, tensors):
        """FIELD parity: q and k rows in the other pairing's order, with and without biases -> weights-permuted"""
        said = {"adjacent": "pairs (2i, 2i + 1)", "halves": "split halves (i, i + d/2)"}[order]
        findings = self.found(*permuted(order, *tensors))
        self.assert_named(findings, "weights-permuted", order=said)
        named = findings[0].parameters["tensor"]
        self.assertEqual(set([named] if isinstance(named, str) else named), {f"self_attn.{name}" for name in tensors})

    def test_field_rows_permuted_and_biases_forgotten(self):
        """FIELD parity: an adjacent-pair engine permutes q and k weights, not their biases -> the biases are named"""
        faults = [*permuted("adjacent", "q_proj.weight", "k_proj.weight"), everywhere("rope-adjacent-pairs")]
        findings = [finding for finding in self.found(*faults) if finding.fault != "layout"]
        self.assert_named(findings, "weights-permuted", tensor=["self_attn.k_proj.bias", "self_attn.q_proj.bias"])

    @parameterized.parameters(
        ("mlp.gate_proj.weight", 32, "adjacent", "the halves are interleaved"),
        ("mlp.down_proj.weight", 32, "halves", "even and odd columns became halves"),
        ("self_attn.o_proj.weight", 64, "adjacent", "the halves are interleaved"),
        ("self_attn.v_proj.weight", 16, "adjacent", "the halves are interleaved"),
    )
    def test_field_blocks_interleaved(self, tensor, block, order, said):
        """FIELD parity: halves of blocks of a weight's columns interleaved (Q5 order) -> weights-interleaved"""
        findings = self.found(everywhere("weights-interleaved", tensor=tensor, block=block, order=order))
        self.assert_named(findings, "weights-interleaved", said, tensor=tensor, block=block)

    @parameterized.product(buffer=("file", "transposed"), dtype=("float32", "bfloat16"))
    def test_field_embedding_with_the_other_stride(self, buffer, dtype):
        """FIELD parity: embedding read with the other stride -> embedding-transposed"""
        (finding,) = self.found(everywhere("embedding-transposed", buffer=buffer), dtype=dtype)
        self.assertEqual((finding.fault, finding.layers, finding.stage), ("embedding-transposed", (), "embedding"))

    @parameterized.parameters(
        ("float32", "linear", 4.0, 32768),
        ("float32", "yarn", 4.0, 32768),
        ("float32", "linear", 2.5, 32768),
        ("float32", "llama3", 8.0, 8192),
        ("float32", "ntk", 4.0, 32768),
        ("bfloat16", "yarn", 4.0, 32768),
    )
    def test_field_rotation_scaled(self, dtype, rule, factor, original):
        """FIELD parity: RoPE scaling that was not asked for -> rope-scaling, rule and factor"""
        planted = everywhere("rope-scaling", rule=rule, factor=factor, original=original)
        (finding,) = self.found(planted, dtype=dtype)
        self.assertEqual((finding.fault, finding.layers), ("rope-scaling", "all"), finding.sentence)
        self.assertEqual(finding.parameters["rule"], rule)
        # A factor that was read off 16-bit values is known to some digits.
        self.assertAlmostEqual(finding.parameters["factor"] / factor, 1, places=6 if dtype == "float32" else 1)

    @parameterized.parameters(
        ("float32", "qkv"),
        ("bfloat16", "qkv"),
        ("float32", "q"),
        ("float32", "v"),
        ("bfloat16", "k"),
    )
    def test_field_biases_twice(self, dtype, parts):
        """FIELD parity: q, k, v biases added twice -> named"""
        self.assert_named(self.found(everywhere(f"{parts}-bias-twice"), dtype=dtype), f"{parts}-bias-twice")

    @parameterized.parameters(
        ("float16", "scores"), ("float16", "product"), ("bfloat16", "scores"), ("bfloat16", "product")
    )
    def test_field_scores_less_precise(self, dtype, steps):
        """FIELD parity: scores in f16 or bf16 in a float32 engine -> scores-precision"""
        findings = self.found(everywhere("scores-precision", dtype=dtype, steps=steps))
        self.assert_named(findings, "scores-precision", dtype=dtype)

    @parameterized.parameters("float16", "bfloat16", "float8_e4m3", "float8_e5m2", "q8_0")
    def test_field_cache_less_precise(self, dtype):
        """FIELD parity: KV cache in f16, bf16, f8 or q8_0 in a float32 engine -> cache-precision"""
        planted = [everywhere("cache-precision", part=part, dtype=dtype) for part in "kv"]
        self.assert_named(self.found(*planted), "cache-precision", "k, v", dtype=dtype)

    @parameterized.parameters(50.0, 30.0, 20.0, 500.0)
    def test_field_soft_cap(self, cap):
        """FIELD parity: score soft-cap left on -> softmax-soft-cap and its bound"""
        self.assert_named(self.found(everywhere("softmax-soft-cap", cap=cap)), "softmax-soft-cap", cap=cap)

    @parameterized.parameters("int8 by row", "q8_0", "fp8_e4m3", "fp8_e4m3 by row")
    def test_field_activations_quantised(self, codec):
        """FIELD parity: int8 or float8 rows into down_proj -> activations-quantised by what"""
        findings = self.found(everywhere("activations-quantised", module="mlp.down_proj", codec=codec))
        # Rows of 160 are no longer than a block of Q8_K, which is the same then.
        named = "int8 by row or q8_k" if codec == "int8 by row" else codec
        self.assert_named(findings, "activations-quantised", codec=named)

    @parameterized.parameters(
        *("q8_0", "q4_1", "int8 by row", "int4 with zero points by 32", "fp8_e4m3", "fp8_e4m3 by row"),
    )
    def test_field_weights_quantised(self, codec):
        """FIELD parity: Q8_0, float8 and other codecs in an engine's weights -> weights-quantised by that codec"""
        findings = self.found(everywhere("weights-quantised", tensor="mlp.up_proj.weight", codec=codec))
        self.assert_named(findings, "weights-quantised", tensor="mlp.up_proj.weight", codec=codec)

    @parameterized.parameters(
        everywhere("mask-window", window=16),
        everywhere("mask-off-by-one", last=-1),
        everywhere("padding-attended"),
        everywhere("cache-position", shift=1, prefill=40, side="write"),
    )
    def test_field_a_mask_where_only_softmax_was_dumped(self, planted):
        """FIELD parity: attn_softmax dumped without attn_scores, wrong masks -> named, no traceback"""
        findings = self.found(planted, shown=lambda key: stages.Key(key).stage != "attn_scores")
        self.assert_named(findings, planted.name)

    def with_weights(self, changed):
        """The bench with some tensors in place of its own."""
        bench = self.bench()
        weights = bench.weights | changed
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            safetensors.numpy.save_file(weights, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(bench.config))
            exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        return Bench("loud", weights, bench.config, bench.inputs, exact, same)

    def test_field_activations_quantised_beside_a_large_one(self):
        """FIELD parity: int8 rows into down_proj, one activation far larger than the rest -> activations-quantised"""
        changed = {}
        for name, values in self.bench().weights.items():
            if name.endswith("mlp.up_proj.weight"):
                changed[name] = np.where(np.arange(len(values))[:, None] == 5, 60 * values, values).astype("f4")
            if name.endswith("mlp.down_proj.weight"):
                changed[name] = np.where(np.arange(values.shape[1]) == 5, values / 60, values).astype("f4")
        loud = self.with_weights(changed)
        planted = everywhere("activations-quantised", module="mlp.down_proj", codec="int8 by row")
        self.assert_named(loud.diagnose(loud.dump([planted])).findings, planted.name, codec="int8 by row or q8_k")

    def test_field_layers_that_cannot_show_an_eps(self):
        """FIELD parity: eps where later activations are large -> no number from noise, and which layers cannot tell"""
        suffixes = ("mlp.down_proj.weight", "self_attn.o_proj.weight")
        names = [f"model.layers.0.{suffix}" for suffix in suffixes]
        loud = self.with_weights({name: 1000 * self.bench().weights[name] for name in names})
        (finding,) = loud.diagnose(loud.dump([everywhere("rms-norm-eps", eps=1e-5)])).findings
        self.assertEqual((finding.fault, finding.layers, finding.parameters["eps"]), ("rms-norm-eps", (0,), 1e-5))
        self.assertIn("layer 1 and final_norm cannot show it", finding.sentence)
        self.assertIn("stage.1.ffn_norm", finding.cannot_show)

    def test_field_what_it_takes_to_be_rounding(self):
        """FIELD parity: one channel half a percent off in bfloat16, five in float16 -> rounding; its factor"""
        planted = everywhere("part-scaled", stage="ffn_out", channels=(17,), factor=0.995)
        self.assertEqual(self.found(planted, dtype="bfloat16"), ())
        findings = self.found(everywhere("part-scaled", stage="ffn_out", channels=(17,), factor=0.95), dtype="float16")
        self.assert_named(findings, "part-scaled", "channel 17")
        self.assertAlmostEqual(float(np.float64(findings[0].parameters["factor"])), 0.95, places=2)


if __name__ == "__main__":
    absltest.main()
