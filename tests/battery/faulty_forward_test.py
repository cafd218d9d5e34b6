"""The faulty NumPy forward pass: right without a fault, and with one as wrong as its name says and nothing beyond."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import pathlib
import struct
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# The products are small: several threads lose more time over them than they gain.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.trace import aprt, stages
from tests import oracle, paths
from tests.battery import faulty_forward
from tests.battery.faulty_forward import FAULTS, Planted, effect, forward

GQA, MHA, MQA = "gqa_tied_bf16", "mha_untied_f32_sharded", "mqa_f16"
Arrays = dict[str, np.ndarray]

# Parameters for the faults that have no default for them.
EXAMPLES: dict[str, dict[str, Any]] = {
    "rope-position": {"restart": 16},
    "layer-order": {"order": (1, 0)},
    "layer-skipped": {"layer": 0},
    "layer-repeated": {"layer": 0},
    "weights-relabelled": {"tensor": "mlp.down_proj.weight"},
    "weights-from-another-layer": {"tensor": "self_attn.o_proj.weight", "layer": 0},
    "weights-quantised": {"tensor": "mlp.gate_proj.weight", "codec": "q4_k"},
    "weights-permuted": {"tensor": "self_attn.q_proj.weight"},
    "weights-interleaved": {"tensor": "mlp.gate_proj.weight"},
    "part-scaled": {"stage": "ffn_out", "channels": (17,)},
    "part-zeroed": {"stage": "attention", "heads": (1, 2)},
    "part-exchanged": {"stage": "attn_scores", "heads": (0, 3)},
    "norm-part-of-width": {"columns": 56},
    "sum-cut-short": {"product": "mlp.down_proj.weight", "first": 150, "last": 159},
    "stage-scaled": {"stage": "ffn_up"},
    "layout": {"kind": "transposed"},
}

# What each stage of a layer is computed from; "in" is the layer's input, "q", "k", "v" are the parts of qkv_bias.
READS = {
    "attn_norm": ("in",),
    "qkv_matmul": ("attn_norm",),
    "q": ("qkv_matmul",),
    "k": ("qkv_matmul",),
    "v": ("qkv_matmul",),
    "qkv_bias": ("q", "k", "v"),
    "q_post_rope": ("q",),
    "k_post_rope": ("k",),
    "attn_scores": ("q_post_rope", "k_post_rope"),
    "attn_softmax": ("attn_scores",),
    "attention": ("attn_softmax", "v"),
    "attn_out": ("attention",),
    "post_attn_residual": ("in", "attn_out"),
    "ffn_norm": ("post_attn_residual",),
    "ffn_gate": ("ffn_norm",),
    "ffn_up": ("ffn_norm",),
    "ffn_silu": ("ffn_gate",),
    "ffn_swigl": ("ffn_silu", "ffn_up"),
    "ffn_out": ("ffn_swigl",),
    "post_ffn_residual": ("post_attn_residual", "ffn_out"),
}

# Where a fault acts: the stages that differ although what they read does not.
ACTS_AT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("rope-adjacent-pairs", "rope-theta", "rope-position", "rope-half-dims", "rope-sign"),
        ("q_post_rope", "k_post_rope"),
    ),
    **dict.fromkeys(("rope-scaling", "rope-precision"), ("q_post_rope", "k_post_rope")),
    **dict.fromkeys(("softmax-soft-cap", "scores-precision", "cache-precision", "part-exchanged"), ("attn_scores",)),
    **{f"{name}-bias-twice": (name,) for name in "qkv"},
    "qkv-bias-twice": ("q", "k", "v"),
    "weights-interleaved": ("ffn_gate",),
    "rope-part-dims": ("q_post_rope", "k_post_rope"),
    "norm-part-of-width": ("attn_norm", "ffn_norm"),
    "norm-before-residual": ("attn_norm", "ffn_norm"),
    **dict.fromkeys(("residual-twice", "residual-behind-norm"), ("post_attn_residual", "post_ffn_residual")),
    "softmax-precision": ("attn_softmax",),
    "sum-cut-short": ("ffn_out",),
    "stage-scaled": ("ffn_up",),
    "activations-quantised": ("qkv_matmul",),
    "part-scaled": ("ffn_out",),
    "part-zeroed": ("attention",),
    "rope-not-on-q": ("q_post_rope",),
    "rope-not-on-k": ("k_post_rope",),
    **dict.fromkeys(
        ("rms-norm-eps", "norm-weight-missing", "norm-weight-plus-one", "norm-mean-subtracted"),
        ("attn_norm", "ffn_norm"),
    ),
    "qkv-bias-missing": ("q", "k", "v"),
    "q-bias-missing": ("q",),
    "k-bias-missing": ("k",),
    "v-bias-missing": ("v",),
    "bias-after-rope": ("q", "k"),
    "mask-not-causal": ("attn_softmax",),
    "mask-off-by-one": ("attn_scores", "attn_softmax"),
    "mask-window": ("attn_scores", "attn_softmax"),
    "mask-chunk": ("attn_scores", "attn_softmax"),
    "softmax-scale": ("attn_scores",),
    "softmax-partial-warp": ("attn_softmax",),
    "kv-heads-interleaved": ("attn_scores", "attention"),
    "v-heads-swapped": ("attention",),
    "o-proj-transposed": ("attn_out",),
    "down-proj-transposed": ("ffn_out",),
    "attention-residual-missing": ("post_attn_residual",),
    "mlp-residual-missing": ("post_ffn_residual",),
    "gate-up-swapped": ("ffn_gate", "ffn_up"),
    **dict.fromkeys(
        ("activation-on-up", "activation-gelu", "activation-gelu-tanh", "activation-relu"), ("ffn_silu", "ffn_swigl")
    ),
    "weights-relabelled": ("ffn_out",),
    "weights-from-another-layer": ("attn_out",),
    "weights-quantised": ("ffn_gate",),
    **dict.fromkeys(("tf32-dots", "bf16-accumulation"), ("qkv_matmul",)),
    "cache-position": ("attn_scores", "attn_softmax", "attention"),
    "padding-attended": ("attn_softmax",),
}
OUTSIDE = {
    "final-norm-missing": {"stage.final_norm", "logits"},
    "head-transposed": {"logits"},
    "head-missing": {"logits"},
    "logits-shifted": {"logits"},
    **{name: {"logits"} for name in ("logits-position", "logits-temperature", "logits-soft-cap")},
}


def planted(name: str, layers: tuple[int, ...] | None = None, **parameters: Any) -> Planted:
    return Planted(name, layers, {**EXAMPLES.get(name, {}), **parameters})


def inputs(config: dict[str, Any], length: int = 80, padding: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """Two rows, the second left-padded; the last id of the vocabulary is not among them."""
    ids = np.random.default_rng(11).integers(0, config["vocab_size"] - 1, (2, length))
    mask = np.ones(ids.shape, int)
    mask[1, :padding] = 0
    return ids, mask


def downstream(sources: tuple[str, ...]) -> set[str]:
    """The stages of a layer that differ if `sources` do."""
    changed = set(sources)
    for stage, reads in READS.items():
        if changed & set(reads):
            changed.add(stage)
    return changed & set(stages.LAYER_STAGES)


def heads_of(config: dict[str, Any]) -> tuple[int, int, int]:
    n_q = config["num_attention_heads"]
    return n_q, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // n_q


class Case(parameterized.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.weights, self.config = oracle.load(paths.checkpoint(GQA))
        self.ids, self.mask = inputs(self.config)

    def dump(self, *faults: Planted, dtype: str = "float64", **changes: Any) -> Arrays:
        return forward(self.weights, self.config, self.ids, self.mask, faults=faults, dtype=dtype, **changes)

    def effect(self, *faults: Planted, dtype: str = "float64") -> dict[str, float]:
        return effect(self.weights, self.config, self.ids, self.mask, planted=faults, dtype=dtype)

    def switch(self, name: str, **lengths: int) -> None:
        self.weights, self.config = oracle.load(paths.checkpoint(name))
        self.ids, self.mask = inputs(self.config, **lengths)

    def assert_close(self, found: np.ndarray, expected: np.ndarray, bound: float = 1e-12) -> None:
        self.assertEqual(found.shape, expected.shape)
        self.assertLess(np.abs(found - expected).max(), bound * np.abs(expected).max())


class RightTest(Case):
    @parameterized.parameters(*paths.NAMES)
    def test_float64_without_a_fault_is_the_oracle_at_every_stage(self, name: str) -> None:
        self.switch(name)
        logits, expected = oracle.forward(self.weights, self.config, self.ids, self.mask)
        dump = self.dump()
        self.assertEqual(list(dump), list(stages.trace_keys(self.config["num_hidden_layers"])))
        self.assert_close(dump.pop("logits"), logits)
        for key, value in dump.items():
            self.assert_close(value, expected[key.removeprefix("stage.")])

    @parameterized.parameters(*paths.NAMES)
    def test_float32_without_a_fault_is_the_committed_huggingface_golden(self, name: str) -> None:
        self.switch(name)
        golden = safetensors.numpy.load_file(paths.golden(name))
        mask = golden["attention_mask"]
        ids, positions = golden["input_ids"], golden["position_ids"]
        dump = forward(self.weights, self.config, ids, mask, positions)
        sources = stages.hidden_sources(self.config["num_hidden_layers"])
        for key in ("logits", *sources):
            found, expected = dump[sources.get(key, key)][mask == 1], golden[key][mask == 1]
            self.assertLess(np.linalg.norm(found - expected), 1e-5 * np.linalg.norm(expected), key)

    def test_bfloat16_stages_hold_bfloat16_values_that_are_near(self) -> None:
        dump, exact = self.dump(dtype="bfloat16"), self.dump()
        for key, value in dump.items():
            np.testing.assert_array_equal(value.astype(ml_dtypes.bfloat16).astype(np.float32), value, key)
            self.assertLess(np.linalg.norm(value - exact[key]), 0.05 * np.linalg.norm(exact[key]), key)

    def test_bfloat16_rounds_where_huggingface_does(self) -> None:
        def cast(x: Any) -> np.ndarray:
            return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16)

        dump = {key: cast(value) for key, value in self.dump(dtype="bfloat16").items()}
        x = dump["stage.embedding"].astype(np.float32)
        unit = cast(x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-6)))
        weight = cast(self.weights["model.layers.0.input_layernorm.weight"])
        different = (weight * unit != dump["stage.0.attn_norm"]).mean()
        self.assertLess(different, 1e-3, "ml_dtypes multiplies in float32 and rounds once, as the engine")
        gate = dump["stage.0.ffn_gate"].astype(np.float32)
        np.testing.assert_array_equal(cast(gate / (1 + np.exp(-gate))), dump["stage.0.ffn_silu"])
        np.testing.assert_array_equal(dump["stage.0.ffn_silu"] * dump["stage.0.ffn_up"], dump["stage.0.ffn_swigl"])
        total = dump["stage.embedding"] + dump["stage.0.attn_out"]
        np.testing.assert_array_equal(total, dump["stage.0.post_attn_residual"])

    def test_bfloat16_products_are_rounded_before_scale_and_after_bias(self) -> None:
        self.switch(MHA)  # its scale is no power of two
        exact = self.dump(dtype="bfloat16")
        n_q, _, dim = heads_of(self.config)
        q, k = (exact[f"stage.0.{name}_post_rope"].reshape(2, 80, n_q, dim).swapaxes(1, 2) for name in "qk")
        products = (q @ k.swapaxes(2, 3)).astype(ml_dtypes.bfloat16).astype(np.float32)
        scores = (products * np.float32(dim**-0.5)).astype(ml_dtypes.bfloat16).astype(np.float32)
        scores = scores * np.tril(np.ones((80, 80), np.float32))
        self.assertLess((scores[0] != exact["stage.0.attn_scores"][0]).mean(), 1e-3)
        weights = [self.weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
        biases = [self.weights[f"model.layers.0.self_attn.{name}_proj.bias"] for name in "qkv"]
        weight, bias = (faulty_forward.to_bfloat16(np.concatenate(parts)) for parts in (weights, biases))
        once = faulty_forward.to_bfloat16(exact["stage.0.attn_norm"] @ weight.T + bias)
        self.assertLess((once != exact["stage.0.qkv_bias"]).mean(), 1e-3)
        twice = faulty_forward.to_bfloat16(exact["stage.0.qkv_matmul"] + bias)
        self.assertGreater((twice != once).mean(), 0.05)

    def test_shares_no_code_with_the_model(self) -> None:
        tree = ast.parse(pathlib.Path(faulty_forward.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        outside = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
        self.assertEqual(outside, {"numpy", "tests.battery.quantisers", "tests.oracle"})


class WhereTest(Case):
    """A fault changes what lies downstream of where it acts, and nothing else."""

    @parameterized.parameters(*sorted(ACTS_AT))
    def test_in_the_last_layer_only_its_stages_differ(self, name: str) -> None:
        effects = self.effect(planted(name, (1,)))
        changed = {key for key, value in effects.items() if value}
        expected = {f"stage.1.{stage}" for stage in downstream(ACTS_AT[name])} | {"stage.final_norm", "logits"}
        self.assertEqual(changed, expected)
        self.assertGreater(effects["logits"], 1e-7)

    @parameterized.parameters(*sorted(ACTS_AT))
    def test_in_all_layers_the_first_is_as_if_it_were_there_alone(self, name: str) -> None:
        everywhere, first = self.dump(planted(name)), self.dump(planted(name, (0,)))
        for stage in stages.LAYER_STAGES:
            key = f"stage.0.{stage}"
            np.testing.assert_array_equal(everywhere[key], first[key])
        if name != "weights-from-another-layer":  # layer 0 reads its own
            self.assertTrue((everywhere["stage.1.post_ffn_residual"] != first["stage.1.post_ffn_residual"]).any())

    @parameterized.parameters(*sorted(OUTSIDE))
    def test_outside_the_layers_only_what_follows_differs(self, name: str) -> None:
        self.assertEqual({key for key, value in self.effect(planted(name)).items() if value}, OUTSIDE[name])

    def test_the_embedding_differs_and_all_that_follows(self) -> None:
        self.assertGreater(min(self.effect(planted("embedding-row-off-by-one")).values()), 1e-3)

    def test_a_fault_of_norms_can_be_planted_in_some_of_them(self) -> None:
        def first(norms: list[str], layers: tuple[int, ...] | None = None) -> str:
            effects = self.effect(planted("rms-norm-eps", layers, norms=norms))
            return next(key for key, value in effects.items() if value)

        self.assertEqual(first(["input_layernorm"]), "stage.0.attn_norm")
        self.assertEqual(first(["post_attention_layernorm"], (1,)), "stage.1.ffn_norm")
        self.assertEqual(first(["norm"]), "stage.final_norm")
        self.assertEqual(first(["norm"], (0,)), "stage.final_norm")
        x, weight = self.dump(planted("rms-norm-eps", (0,))), self.weights["model.norm.weight"]
        last = x["stage.1.post_ffn_residual"]
        right = last / np.sqrt((last * last).mean(-1, keepdims=True) + 1e-6) * weight
        self.assert_close(x["stage.final_norm"], right)

    @parameterized.product(name=sorted(FAULTS), dtype=("float32", "bfloat16", "float64"))
    def test_every_fault_runs_in_every_dtype_with_standard_shapes(self, name: str, dtype: str) -> None:
        dump = self.dump(planted(name), dtype=dtype)
        layers = len({key.split(".")[1] for key in dump if key.count(".") == 2})
        self.assertEqual(list(dump), list(stages.trace_keys(layers)))
        self.assertEqual(layers, {"layer-skipped": 1, "layer-repeated": 3}.get(name, 2))
        config = Qwen2Config.from_hf(self.config)
        for key, value in dump.items():
            self.assertEqual(value.shape[1:], stages.shape(config, stages.Key(key).stage, 80))
            self.assertEqual(value.dtype, "float64" if dtype == "float64" else "float32", key)
            self.assertTrue(np.isfinite(value).all(), key)


class SameAsTest(Case):
    """Faults that are nothing but other weights, configurations or inputs, against the oracle with those."""

    def assert_oracle(self, faults: tuple[Planted, ...], **changes: Any) -> None:
        weights, config = changes.get("weights", self.weights), {**self.config, **changes.get("config", {})}
        ids, mask = changes.get("ids", self.ids), changes.get("mask", self.mask)
        logits, expected = oracle.forward(weights, config, ids, mask, changes.get("positions"))
        dump = self.dump(*faults)
        self.assertEqual(len(dump), len(expected) + 1)
        for key, value in {"logits": logits, **{f"stage.{key}": value for key, value in expected.items()}}.items():
            self.assert_close(
                dump[key][self.mask == 1] if value.ndim == 3 else dump[key],
                value[self.mask == 1] if value.ndim == 3 else value,
            )

    def changed(
        self, suffix: str, change: Callable[[np.ndarray], np.ndarray], layers: tuple[int, ...] = (0, 1)
    ) -> Arrays:
        names = [f"model.layers.{layer}.{suffix}" for layer in layers]
        return {**self.weights, **{name: change(self.weights[name]) for name in names}}

    @parameterized.parameters("q", "k", "v")
    def test_a_missing_bias_is_a_zero_bias(self, name: str) -> None:
        weights = self.changed(f"self_attn.{name}_proj.bias", np.zeros_like)
        self.assert_oracle((planted(f"{name}-bias-missing"),), weights=weights)

    def test_no_bias_at_all(self) -> None:
        weights = {name: value * (0 if name.endswith("bias") else 1) for name, value in self.weights.items()}
        self.assert_oracle((planted("qkv-bias-missing"),), weights=weights)

    @parameterized.parameters(1e4, 5e5)
    def test_another_theta(self, theta: float) -> None:
        self.assert_oracle((planted("rope-theta", theta=theta),), config={"rope_theta": theta})

    @parameterized.parameters(1e-5, 1e-4)
    def test_another_eps(self, eps: float) -> None:
        self.assert_oracle((planted("rms-norm-eps", eps=eps),), config={"rms_norm_eps": eps})

    def test_other_positions(self) -> None:
        right = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
        self.assert_oracle((planted("rope-position", restart=None, shift=5),), positions=right + 5)
        self.assert_oracle((planted("rope-position", restart=7),), positions=right % 7)

    def test_norm_weights(self) -> None:
        norms = [name for name in self.weights if "norm" in name]
        ones = {**self.weights, **{name: np.ones_like(self.weights[name]) for name in norms}}
        self.assert_oracle((planted("norm-weight-missing"),), weights=ones)
        self.assert_oracle(
            (planted("norm-weight-plus-one"),),
            weights={**self.weights, **{name: 1 + self.weights[name] for name in norms}},
        )

    def test_layers_in_another_order(self) -> None:
        def files(*order: int) -> Arrays:
            moved = {name: value for name, value in self.weights.items() if ".layers." not in name}
            for position, layer in enumerate(order):
                for name, value in self.weights.items():
                    if name.startswith(f"model.layers.{layer}."):
                        moved[name.replace(f".{layer}.", f".{position}.", 1)] = value
            return moved

        self.assert_oracle((planted("layer-order"),), weights=files(1, 0))
        self.assert_oracle((planted("layer-skipped"),), weights=files(1), config={"num_hidden_layers": 1})
        self.assert_oracle(
            (planted("layer-repeated", layer=1),), weights=files(0, 1, 1), config={"num_hidden_layers": 3}
        )

    def test_a_tensor_of_another_layer(self) -> None:
        weights = self.changed(
            "self_attn.o_proj.weight", lambda _: self.weights["model.layers.0.self_attn.o_proj.weight"]
        )
        self.assert_oracle((planted("weights-from-another-layer", (1,)),), weights=weights)

    def test_the_next_row_of_the_embedding(self) -> None:
        self.assert_oracle((planted("embedding-row-off-by-one"),), ids=self.ids + 1)
        self.ids = self.ids * 0 + self.config["vocab_size"] - 1
        first = self.weights["model.embed_tokens.weight"][0]
        self.assert_close(self.dump(planted("embedding-row-off-by-one"))["stage.embedding"][0, 5], first)

    def test_gate_and_up_change_places(self) -> None:
        weights = dict(self.weights)
        for layer in (0, 1):
            gate, up = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
            weights[gate], weights[up] = weights[up], weights[gate]
        self.assert_oracle((planted("gate-up-swapped"),), weights=weights)

    def test_padding_that_is_attended_is_no_padding_at_the_same_positions(self) -> None:
        positions = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
        self.assert_oracle((planted("padding-attended"),), mask=np.ones_like(self.mask), positions=positions)

    def test_transposed_buffers(self) -> None:
        square = self.changed("self_attn.o_proj.weight", np.transpose)
        self.assert_oracle((planted("o-proj-transposed"),), weights=square)
        self.assert_oracle((planted("o-proj-transposed", buffer="file"),), weights=square)

        def element_by_element(weight: np.ndarray) -> np.ndarray:
            rows, columns = weight.shape
            buffer = [weight[row, column] for column in range(columns) for row in range(rows)]
            return np.array([[buffer[row * columns + column] for column in range(columns)] for row in range(rows)])

        down = self.changed("mlp.down_proj.weight", element_by_element)
        self.assert_oracle((planted("down-proj-transposed"),), weights=down)
        dump = self.dump(planted("head-transposed"))
        flat, x = self.weights["model.embed_tokens.weight"].ravel(), dump["stage.final_norm"][0, 9]
        for token in (0, 1, 200):
            expected = sum(x[d] * flat[d * self.config["vocab_size"] + token] for d in range(len(x)))
            self.assertAlmostEqual(dump["logits"][0, 9, token], expected, places=9)

    @parameterized.parameters("bf16-as-f16", "f16-as-bf16")
    def test_relabelled_bytes_by_struct(self, direction: str) -> None:
        def read(value: float) -> float:
            if direction == "bf16-as-f16":
                return struct.unpack("<e", struct.pack("<f", value)[2:])[0]
            return struct.unpack("<f", b"\0\0" + struct.pack("<e", value))[0]

        suffix = "mlp.down_proj.weight"
        weights = self.changed(suffix, np.vectorize(read, otypes=[np.float64]), (1,))
        fault = planted("weights-relabelled", (1,), tensor=suffix, direction=direction)
        found = faulty_forward.relabel(self.weights["model.layers.1." + suffix], direction)
        np.testing.assert_array_equal(found, weights["model.layers.1." + suffix])
        if direction == "bf16-as-f16":  # the other way some weights are 1e38
            self.assert_oracle((fault,), weights=weights)

    def test_the_real_case_of_four_is_the_oracle_with_permuted_rows(self) -> None:
        """Adjacent pairs on q and k are split halves on rows in another order, which no score can see."""
        n_q, n_kv, dim = heads_of(self.config)
        weights = {name: value * (0 if name.endswith("bias") else 1) for name, value in self.weights.items()}
        for layer in (0, 1):
            for name, heads in (("q", n_q), ("k", n_kv)):
                key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
                rows = weights[key].reshape(heads, dim, -1)
                weights[key] = np.concatenate([rows[:, 0::2], rows[:, 1::2]], 1).reshape(weights[key].shape)
        config = {**self.config, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
        logits, expected = oracle.forward(weights, config, self.ids, self.mask)
        names = ("qkv-bias-missing", "rms-norm-eps", "rope-theta", "rope-adjacent-pairs")
        dump = self.dump(*map(planted, names))
        self.assert_close(dump["logits"], logits)
        for stage in ("attn_scores", "attn_softmax", "post_ffn_residual"):
            self.assert_close(dump[f"stage.1.{stage}"], expected[f"1.{stage}"])


class DefinitionTest(Case):
    """Faults against formulas written once more, by loops and by hand, on the values that the dump itself holds."""

    def parts(self, dump: Arrays, layer: int = 0) -> list[np.ndarray]:
        """q and k before RoPE, and v: [B, T, heads, D]."""
        n_q, n_kv, dim = heads_of(self.config)
        cut = [n_q * dim, (n_q + n_kv) * dim]
        return [x.reshape(*x.shape[:2], -1, dim) for x in np.split(dump[f"stage.{layer}.qkv_bias"], cut, -1)]

    def turns(self, width: int, theta: float = 1e6) -> np.ndarray:
        positions = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
        return np.exp(1j * positions[..., None] * theta ** (-np.arange(0, width, 2) / width))[:, :, None]

    def test_adjacent_pairs_are_complex_numbers(self) -> None:
        dump = self.dump(planted("rope-adjacent-pairs"))
        for x, stage in zip(self.parts(dump), ("q_post_rope", "k_post_rope"), strict=False):
            turned = np.ascontiguousarray(x).view(np.complex128) * self.turns(x.shape[-1])
            self.assert_close(dump[f"stage.0.{stage}"], turned.view(np.float64).reshape(2, 80, -1), 1e-5)

    def test_half_dims_turn_a_smaller_head(self) -> None:
        dump = self.dump(planted("rope-half-dims"))
        q = self.parts(dump)[0]
        half, quarter = q.shape[-1] // 2, q.shape[-1] // 4
        turned = (q[..., :quarter] + 1j * q[..., quarter:half]) * self.turns(half)
        expected = np.concatenate([turned.real, turned.imag, q[..., half:]], -1)
        self.assert_close(dump["stage.0.q_post_rope"], expected.reshape(2, 80, -1), 1e-5)

    def test_the_sign_turns_the_other_way(self) -> None:
        dump = self.dump(planted("rope-sign"))
        k = self.parts(dump)[1]
        half = k.shape[-1] // 2
        turned = (k[..., :half] + 1j * k[..., half:]) * self.turns(k.shape[-1]).conj()
        expected = np.concatenate([turned.real, turned.imag], -1)
        self.assert_close(dump["stage.0.k_post_rope"], expected.reshape(2, 80, -1), 1e-5)

    def test_not_on_q_and_not_on_k_leave_that_one_alone(self) -> None:
        for index, name in enumerate("qk"):
            dump = self.dump(planted(f"rope-not-on-{name}"))
            self.assert_close(dump[f"stage.0.{name}_post_rope"], self.parts(dump)[index].reshape(2, 80, -1))

    def test_a_bias_after_rope_is_added_to_turned_values(self) -> None:
        dump, without = self.dump(planted("bias-after-rope")), self.dump(planted("qkv-bias-missing"))
        right = self.dump()
        for name in "qk":
            bias = self.weights[f"model.layers.0.self_attn.{name}_proj.bias"]
            self.assert_close(dump[f"stage.0.{name}_post_rope"], without[f"stage.0.{name}_post_rope"] + bias)
        self.assert_close(self.parts(dump)[0], self.parts(without)[0])
        self.assert_close(self.parts(dump)[2], self.parts(right)[2])

    def attend(self, dump: Arrays, seen: Callable[[int, int], bool], summed: Callable[[int], bool]) -> None:
        """Checks softmax and attention of layer 0, row 1 (padded), by loops over queries, heads and keys."""
        n_q, n_kv, dim = heads_of(self.config)
        q, k = (dump[f"stage.0.{name}_post_rope"].reshape(2, 80, -1, dim)[1] for name in "qk")
        v = self.parts(dump)[2][1]
        for query in (13, 14, 15, 40, 79):
            for head in range(n_q):
                kv = head * n_kv // n_q
                scores = {key: q[query, head] @ k[key, kv] / math.sqrt(dim) for key in range(80) if seen(query, key)}
                total = sum(math.exp(score) for key, score in scores.items() if summed(key))
                shares = {key: math.exp(score) / total for key, score in scores.items()}
                row = dump["stage.0.attn_softmax"][1, head, query]
                np.testing.assert_allclose(row, [shares.get(key, 0) for key in range(80)], rtol=1e-9, atol=1e-15)
                expected = sum(share * v[key, kv] for key, share in shares.items())
                found = dump["stage.0.attention"][1, query].reshape(n_q, dim)[head]
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
                shown = [scores.get(key, 0) for key in range(80)]
                np.testing.assert_allclose(dump["stage.0.attn_scores"][1, head, query], shown, rtol=1e-9, atol=1e-12)

    def test_masks_by_loops(self) -> None:
        every = lambda key: True  # noqa: E731
        self.attend(self.dump(), lambda i, j: 13 <= j <= i, every)
        self.attend(self.dump(planted("mask-not-causal")), lambda i, j: j >= 13, every)
        self.attend(self.dump(planted("mask-off-by-one", last=1)), lambda i, j: 13 <= j <= i + 1, every)
        self.attend(self.dump(planted("mask-window", window=2)), lambda i, j: 13 <= j <= i and i - j < 2, every)
        self.attend(self.dump(planted("mask-chunk", size=5)), lambda i, j: max(13, i // 5 * 5) <= j <= i, every)
        self.attend(self.dump(planted("padding-attended")), lambda i, j: j <= i, every)
        stack = (planted("mask-not-causal"), planted("mask-window", window=20), planted("padding-attended"))
        self.attend(self.dump(*stack), lambda i, j: i - j < 20, every)

    def test_a_partial_warp_by_loops(self) -> None:
        dump = self.dump(planted("softmax-partial-warp"))
        self.attend(dump, lambda i, j: 13 <= j <= i, lambda key: key % 64 < 32)
        self.assertGreater(dump["stage.0.attn_softmax"].sum(-1).max(), 1 + 1e-3)
        self.switch(GQA, padding=40)
        sums = self.dump(planted("softmax-partial-warp"))["stage.0.attn_softmax"][1].sum(-1)
        np.testing.assert_allclose(sums[:, 40:64], 1, rtol=1e-12, err_msg="no key in the first half of the warp")
        self.assertGreater(np.abs(sums[:, 64:] - 1).max(), 1e-3)

    @parameterized.parameters("uniform", "self", "zero")
    def test_the_first_query_sees_nothing_where_the_last_key_is_the_one_before(self, empty: str) -> None:
        dump = self.dump(planted("mask-off-by-one", last=-1, empty=empty))
        rows = dump["stage.0.attn_softmax"]
        for row, first in ((0, 0), (1, 13)):
            expected = {"uniform": np.full(80, 1 / 80), "self": np.eye(80)[first], "zero": np.zeros(80)}[empty]
            np.testing.assert_allclose(rows[row, :, first], np.tile(expected, (rows.shape[1], 1)), rtol=1e-15)
            second = np.eye(80)[first]  # the second token sees the first one only
            np.testing.assert_array_equal(rows[row, :, first + 1], np.tile(second, (rows.shape[1], 1)))
        self.assertFalse(np.diagonal(dump["stage.0.attn_scores"], axis1=2, axis2=3).any())

    def test_scores_of_all_pairs_are_dumped_where_asked_for(self) -> None:
        own, everywhere = (self.dump(planted("mask-window", scores=which)) for which in ("own", "all"))
        self.assertTrue(everywhere["stage.0.attn_scores"].all())
        shown = own["stage.0.attn_scores"] != 0
        np.testing.assert_array_equal(everywhere["stage.0.attn_scores"][shown], own["stage.0.attn_scores"][shown])
        np.testing.assert_array_equal(everywhere["logits"], own["logits"])

    def test_another_scale(self) -> None:
        dump, right = self.dump(planted("softmax-scale", scale=0.5)), self.dump()
        self.assert_close(dump["stage.0.attn_scores"], right["stage.0.attn_scores"] * 0.5 * math.sqrt(16))

    def test_heads_by_loops(self) -> None:
        n_q, n_kv, dim = heads_of(self.config)
        for name, reads in (
            ("kv-heads-interleaved", lambda h: h % n_kv),
            ("v-heads-swapped", lambda h: h * n_kv // n_q),
        ):
            dump = self.dump(planted(name))
            q, k = (dump[f"stage.0.{part}_post_rope"][0].reshape(80, -1, dim) for part in "qk")
            v = self.parts(dump)[2][0]
            for head in range(n_q):
                self.assertAlmostEqual(
                    dump["stage.0.attn_scores"][0, head, 30, 20], q[30, head] @ k[20, reads(head)] / math.sqrt(dim)
                )
                value = v[:, reads(head)] if name == "kv-heads-interleaved" else v[:, n_kv - 1 - reads(head)]
                expected = dump["stage.0.attn_softmax"][0, head, 30] @ value
                np.testing.assert_allclose(
                    dump["stage.0.attention"][0, 30].reshape(n_q, dim)[head], expected, rtol=1e-9
                )

    def test_norms(self) -> None:
        x, weight = self.dump()["stage.embedding"], self.weights["model.layers.0.input_layernorm.weight"]
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight
        self.assert_close(self.dump(planted("norm-mean-subtracted"))["stage.0.attn_norm"], expected)
        unit = np.float32(x) / np.sqrt(np.mean(np.float32(x) ** 2, -1, keepdims=True) + np.float32(1e-6))
        once = (unit * np.float32(weight)).astype(ml_dtypes.bfloat16).astype(np.float32)
        found = self.dump(planted("norm-weight-before-cast"), dtype="bfloat16")["stage.0.attn_norm"]
        self.assertLess((found != once).mean(), 1e-3)
        right = self.dump(dtype="bfloat16")["stage.0.attn_norm"]
        self.assertGreater((right != once).mean(), 0.05)
        missing = self.dump(planted("final-norm-missing"))
        np.testing.assert_array_equal(missing["stage.final_norm"], missing["stage.1.post_ffn_residual"])

    def test_residuals(self) -> None:
        dump = self.dump(planted("attention-residual-missing"))
        np.testing.assert_array_equal(dump["stage.1.post_attn_residual"], dump["stage.1.attn_out"])
        dump = self.dump(planted("mlp-residual-missing"))
        np.testing.assert_array_equal(dump["stage.1.post_ffn_residual"], dump["stage.1.ffn_out"])

    def test_parts_of_heads_norms_and_sums_by_loops(self) -> None:
        def turned(cut: str) -> tuple[np.ndarray, np.ndarray]:
            dump = self.dump(planted("rope-part-dims", share=0.5, cut=cut))
            return self.parts(dump)[0][0, 40, 1], dump["stage.0.q_post_rope"][0, 40].reshape(-1, 16)[1]

        angle = {"own": lambda d: 1e6 ** (-2 * (d % 4) / 8), "head": lambda d: 1e6 ** (-2 * (d % 4) / 16)}
        angle["sliced"] = lambda d: 1e6 ** (-2 * (d % 8) / 16)  # torch.cat([freqs, freqs])[:8]
        for cut, frequency in angle.items():
            q, found = turned(cut)
            for d in range(16):
                half, cos, sin = (q[d + 4] * -1 if d < 4 else q[d - 4]) if d < 8 else 0, 1.0, 0.0
                if d < 8:
                    cos, sin = math.cos(40 * frequency(d)), math.sin(40 * frequency(d))
                self.assertAlmostEqual(found[d], q[d] * cos + half * sin, delta=1e-5 * np.abs(q).max(), msg=(cut, d))
        x, weight = self.dump()["stage.embedding"], self.weights["model.layers.0.input_layernorm.weight"]
        for divisor, count in (("those", 56), ("all", 64)):
            found = self.dump(planted("norm-part-of-width", divisor=divisor))["stage.0.attn_norm"]
            square = np.sum(x[..., :56] ** 2, -1, keepdims=True) / count
            self.assert_close(found, x / np.sqrt(square + 1e-6) * weight)
        dump = self.dump(planted("sum-cut-short"))
        down = self.weights["model.layers.0.mlp.down_proj.weight"]
        self.assert_close(dump["stage.0.ffn_out"], dump["stage.0.ffn_swigl"][..., :150] @ down[:, :150].T)

    def test_residuals_and_logits_in_the_wrong_place(self) -> None:
        dump = self.dump(planted("residual-twice", blocks=("mlp",)))
        expected = 2 * dump["stage.0.post_attn_residual"] + dump["stage.0.ffn_out"]
        self.assert_close(dump["stage.0.post_ffn_residual"], expected)
        dump = self.dump(planted("residual-behind-norm"))
        self.assert_close(dump["stage.1.post_attn_residual"], dump["stage.1.attn_norm"] + dump["stage.1.attn_out"])
        dump = self.dump(planted("norm-before-residual"))
        x, weight = dump["stage.0.ffn_out"], self.weights["model.layers.1.input_layernorm.weight"]
        expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
        self.assert_close(dump["stage.1.attn_norm"], expected)
        right = self.dump()["logits"]
        self.assert_close(self.dump(planted("logits-position", shift=-2))["logits"][:, 2:], right[:, :-2])
        self.assert_close(self.dump(planted("logits-position", last=True))["logits"][0, 5], right[0, -1])
        self.assert_close(self.dump(planted("logits-temperature", temperature=0.5))["logits"], 2 * right)
        self.assertLess(np.abs(self.dump(planted("logits-soft-cap", cap=3.0))["logits"]).max(), 3.0)

    def test_activations(self) -> None:
        formulas = {
            "activation-gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
            "activation-gelu-tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
            "activation-relu": lambda x: max(x, 0.0),
        }
        for name, formula in formulas.items():
            dump = self.dump(planted(name))
            gate = dump["stage.0.ffn_gate"][0, :4]
            self.assert_close(dump["stage.0.ffn_silu"][0, :4], np.vectorize(formula)(gate))
        dump = self.dump(planted("activation-on-up"))
        up, gate = dump["stage.0.ffn_up"], dump["stage.0.ffn_gate"]
        self.assert_close(dump["stage.0.ffn_swigl"], up / (1 + np.exp(-up)) * gate)

    def test_logits(self) -> None:
        right = self.dump()["logits"]
        self.assertFalse(self.dump(planted("head-missing"))["logits"].any())
        flat = right.ravel().tolist()
        for shift in (1, 7, -3):
            found = self.dump(planted("logits-shifted", shift=shift))["logits"].ravel().tolist()
            self.assertEqual([found[i] for i in (5, 1000)], [flat[5 - shift], flat[1000 - shift]])

    @parameterized.product(shift=(1, 2, -1, -3), side=("write", "read"))
    def test_a_decode_with_the_cache_shifted_token_by_token(self, shift: int, side: str) -> None:
        n_q, n_kv, dim = heads_of(self.config)
        dump = self.dump(planted("cache-position", shift=shift, side=side, prefill=60))
        q, k = (dump[f"stage.0.{part}_post_rope"][1].reshape(80, -1, dim) for part in "qk")
        v = self.parts(dump)[2][1]
        keys, values = np.zeros((100, n_kv, dim)), np.zeros((100, n_kv, dim))
        keys[10:70], values[10:70] = k[:60], v[:60]  # slot 0 is at 10: there is room on both sides
        for token in range(60, 80):
            slot = 10 + token + (shift if side == "write" else 0)
            if 10 <= slot < 90:  # what is written outside of the cache is lost
                keys[slot], values[slot] = k[token], v[token]
            at = np.arange(13, token + 1) + 10 + (shift if side == "read" else 0)
            for head in range(n_q):
                kv = head * n_kv // n_q
                scores = keys[at, kv] @ q[token, head] / math.sqrt(dim)
                shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                row = dump["stage.0.attn_softmax"][1, head, token]
                np.testing.assert_allclose(row[13 : token + 1], shares, rtol=1e-9, atol=1e-15)
                found = dump["stage.0.attention"][1, token].reshape(n_q, dim)[head]
                np.testing.assert_allclose(found, shares @ values[at, kv], rtol=1e-9, atol=1e-12)
        effects = np.abs(dump["logits"] - self.dump()["logits"]).max((0, 2)) > 1e-9
        self.assertEqual(effects.tolist(), [False] * 60 + [True] * 20)


class PrecisionTest(Case):
    def test_bfloat16_rounds_to_nearest_even(self) -> None:
        values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
        special = np.array([0x3F81C000, 0x3F808000, 0x3F818000, 0xFF800000, 0x80000000], np.uint32).view(np.float32)
        for x in (values, values * 1e-38, special):
            np.testing.assert_array_equal(
                faulty_forward.to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32)
            )
        self.assertTrue(np.isnan(faulty_forward.to_bfloat16(np.array([0x7F800001], np.uint32).view(np.float32))))

    @parameterized.parameters(np.float32, np.float64)
    def test_tf32_keeps_ten_bits(self, dtype: type) -> None:
        ulp = 2.0**-10
        x = np.array(
            [1 + ulp / 2, 1 + ulp * 1.5, 1 + ulp * 0.49, -1 - ulp * 0.75, 2 - ulp / 4, 3 * 2.0**-20, np.inf, 0], dtype
        )
        even, cut = (faulty_forward.to_tf32(x, mode).tolist() for mode in ("round", "truncate"))
        away = faulty_forward.to_tf32(x, "round", "away").tolist()
        self.assertEqual(even, [1, 1 + 2 * ulp, 1, -1 - ulp, 2, 3 * 2.0**-20, math.inf, 0])
        self.assertEqual(away, [1 + ulp, 1 + 2 * ulp, 1, -1 - ulp, 2, 3 * 2.0**-20, math.inf, 0])
        self.assertEqual(cut, [1, 1 + ulp, 1, -1, 2 - ulp, 3 * 2.0**-20, math.inf, 0])

    def test_tf32_rounds_the_inputs_of_products_and_nothing_else(self) -> None:
        for mode in ("round", "truncate"):
            dump = self.dump(planted("tf32-dots", mode=mode))
            x = faulty_forward.to_tf32(dump["stage.0.ffn_norm"], mode)
            weight = self.weights["model.layers.0.mlp.up_proj.weight"]  # bfloat16 values: TF32 holds them
            self.assert_close(dump["stage.0.ffn_up"], x @ weight.T)
            scores = self.effect(planted("tf32-dots", (0,), mode=mode))
            self.assertBetween(scores["stage.0.qkv_matmul"], 1e-5, 1e-3)

    def test_sums_in_bfloat16_by_a_loop(self) -> None:
        dump = self.dump(planted("bf16-accumulation", chunk=16), dtype="float32")
        x, weight = (
            dump["stage.0.ffn_norm"][0, 3],
            self.weights["model.layers.0.mlp.gate_proj.weight"].astype(np.float32),
        )
        for row in range(20):
            total = np.float32(0)
            for start in range(0, 64, 16):
                part = x[start : start + 16].astype(np.float64) @ weight[row, start : start + 16].astype(np.float64)
                total = np.float32(ml_dtypes.bfloat16(np.float32(total + part)))
            self.assertAlmostEqual(dump["stage.0.ffn_gate"][0, 3, row], total, delta=abs(total) / 128)
        self.assertBetween(self.effect(planted("bf16-accumulation"))["stage.0.qkv_matmul"], 1e-4, 1e-2)

    @parameterized.parameters(("int8", 0.011), ("int4", 0.12), ("q4_k", 0.085))
    def test_codecs_are_as_coarse_as_they_should_be(self, codec: str, bound: float) -> None:
        x = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)
        found = faulty_forward.quantise(x, codec)
        self.assertEqual((found.shape, found.dtype), (x.shape, np.float32))
        error = np.linalg.norm(found - x) / np.linalg.norm(x)
        self.assertBetween(error, bound / 2, bound)

    def test_int4_by_hand(self) -> None:
        x = np.linspace(-1.4, 0.93, 32, dtype=np.float32)
        scale = struct.unpack("<e", struct.pack("<e", float(np.float32(1.4) / np.float32(7))))[0]
        expected = [max(-8, min(7, math.floor(abs(v) / 0.2 + 0.5) * (1 if v > 0 else -1))) * scale for v in x.tolist()]
        np.testing.assert_allclose(faulty_forward.quantise(x, "int4"), expected, rtol=1e-7)
        self.assertFalse(faulty_forward.quantise(np.zeros((2, 40), np.float32), "int4").any())

    def test_int8_by_hand(self) -> None:
        found = faulty_forward.quantise(np.array([[-2.54, 1.0], [0.011, 0.009]], np.float32), "int8")
        np.testing.assert_allclose(found, [[-2.54, 1.0], [0.02, 0.0]], rtol=1e-6)
        self.assertFalse(faulty_forward.quantise(np.zeros(5, np.float32), "int8").any())

    def test_q4_k_by_a_loop_over_one_block(self) -> None:
        x = np.random.default_rng(4).standard_normal(256).astype(np.float32) + np.float32(0.3)
        subs = [x[start : start + 32].astype(np.float64) for start in range(0, 256, 32)]
        scales, minima = [(s.max() - s.min()) / 15 for s in subs], [max(0.0, -s.min()) for s in subs]
        d, dmin = max(scales) / 63, max(minima) / 63
        expected = []
        for sub, scale, minimum in zip(subs, scales, minima, strict=True):
            sc, m = math.floor(scale / d + 0.5), math.floor(minimum / dmin + 0.5)
            for value in sub:
                q = min(15, max(0, math.floor((value + dmin * m) / (d * sc) + 0.5)))
                expected.append(float(np.float16(d)) * sc * q - float(np.float16(dmin)) * m)
        np.testing.assert_allclose(faulty_forward.quantise(x, "q4_k"), expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters("int8", "int4", "q4k")
    def test_codecs_give_the_values_that_apr_wrote(self, codec: str) -> None:
        fixtures = paths.fixtures()
        if fixtures is None:
            self.skipTest("no genuine files; set APR_FIXTURES")
        for name in ("tiny_bf16_tied", "tiny_f32_tied", "k256_bf16_tied"):
            weights, _ = oracle.load(fixtures / "genuine" / name / "hf")
            path = fixtures / "genuine" / name / "apr" / f"{codec}.values.json"
            if not path.exists():
                continue
            known = json.loads(path.read_text())
            compared = 0
            for tensor, facts in known.items():
                if tensor in weights and facts["dtype_id"] not in (0, 1, 30):
                    values = faulty_forward.quantise(weights[tensor], codec.replace("q4k", "q4_k"))
                    digest = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
                    self.assertEqual(digest, facts["sha256_of_float32_values"], f"{name} {tensor}")
                    compared += 1
            self.assertGreater(compared, 5)

    def test_all_weights_quantised_leaves_biases_and_norms(self) -> None:
        dump = self.dump(planted("weights-quantised", tensor="all", codec="int8"))
        weights = {
            name: faulty_forward.quantise(value, "int8") if value.size >= 1024 else value
            for name, value in self.weights.items()
        }
        logits, _ = oracle.forward(weights, self.config, self.ids, self.mask)
        self.assert_close(dump["logits"], logits)


class InvisibleTest(Case):
    """The cases that the table says have no effect by construction."""

    def assert_invisible(self, *faults: Planted, dtype: str = "float64") -> None:
        self.assertLess(max(self.effect(*faults, dtype=dtype).values()), 1e-14, "not more than another order of a sum")

    def test_at_position_0_alone(self) -> None:
        self.switch(GQA, length=1, padding=0)
        for name in ("rope-adjacent-pairs", "rope-theta", "rope-sign", "rope-half-dims", "rope-not-on-q"):
            self.assert_invisible(planted(name))
        for name in ("mask-not-causal", "mask-window", "softmax-partial-warp", "cache-position"):
            self.assert_invisible(planted(name))

    def test_what_the_configuration_does_not_ask_for_cannot_be_left_out(self) -> None:
        for name in ("mask-without-window", "rope-unscaled"):
            self.assert_invisible(planted(name))

    def test_short_sequences(self) -> None:
        self.assert_invisible(planted("mask-window", window=80))
        self.assert_invisible(planted("rope-position", restart=80))
        self.assert_invisible(planted("cache-position", prefill=80))
        self.switch(GQA, length=32)
        self.assert_invisible(planted("softmax-partial-warp"))

    def test_heads_that_are_alone_or_all(self) -> None:
        self.switch(MHA)
        self.assert_invisible(planted("kv-heads-interleaved"))
        self.assertGreater(self.effect(planted("v-heads-swapped"))["logits"], 1e-3)
        self.switch(MQA)
        self.assert_invisible(planted("kv-heads-interleaved"), planted("v-heads-swapped"))

    def test_no_padding_and_right_padding(self) -> None:
        self.switch(GQA, padding=0)
        self.assert_invisible(planted("padding-attended"))
        self.mask[1, 60:] = 0
        self.assert_invisible(planted("padding-attended"))

    def test_equal_parameters_and_dtypes_without_a_cast(self) -> None:
        self.assert_invisible(planted("rms-norm-eps", eps=1e-6))
        self.assert_invisible(planted("rope-theta", theta=1e6))
        self.assert_invisible(planted("softmax-scale", scale=16**-0.5))
        self.assert_invisible(planted("norm-weight-before-cast"))
        self.assert_invisible(planted("norm-weight-before-cast"), dtype="float32")
        self.assert_invisible(planted("tf32-dots"), dtype="bfloat16")

    def test_a_constant_shift_is_seen_in_q_and_k_only(self) -> None:
        effects = self.effect(planted("rope-position", restart=None, shift=3))
        self.assertGreater(effects["stage.0.q_post_rope"], 0.1)
        self.assertLess(max(effects["stage.0.attn_scores"], effects["logits"]), 1e-5)

    def test_a_k_bias_after_rope_is_none_to_the_attention(self) -> None:
        late, none = (
            self.dump(planted("bias-after-rope")),
            self.dump(planted("bias-after-rope"), planted("k-bias-missing")),
        )
        self.assertTrue((late["stage.0.attn_scores"] != none["stage.0.attn_scores"]).any())
        for key in ("stage.0.attn_softmax", "stage.1.attention", "logits"):
            self.assert_close(late[key], none[key], 1e-10)

    def test_swapped_gate_and_up_is_activation_on_up_beyond_the_mlp(self) -> None:
        swapped, on_up = self.dump(planted("gate-up-swapped")), self.dump(planted("activation-on-up"))
        for key in ("stage.0.ffn_silu", "stage.0.ffn_swigl", "stage.1.ffn_out", "logits"):
            self.assert_close(swapped[key], on_up[key])


class StackTest(Case):
    def test_random_stacks_change_the_union_of_what_their_members_change(self) -> None:
        names = sorted(ACTS_AT.keys() - {"bf16-accumulation", "tf32-dots"})
        generator = np.random.default_rng(5)
        for _ in range(20):
            stack = [
                planted(str(name), (1,)) for name in generator.choice(names, generator.integers(2, 5), replace=False)
            ]
            sources = {stage for fault in stack for stage in ACTS_AT[fault.name]}
            effects = self.effect(*stack)
            changed = {key for key, value in effects.items() if value}
            expected = {f"stage.1.{stage}" for stage in downstream(tuple(sources))} | {"stage.final_norm", "logits"}
            self.assertEqual(changed, expected, stack)

    def test_faults_of_two_layers_do_not_meet(self) -> None:
        both = self.dump(planted("rope-sign", (0,)), planted("down-proj-transposed", (1,)))
        first, second = self.dump(planted("rope-sign", (0,))), self.dump(planted("down-proj-transposed", (1,)))
        for stage in stages.LAYER_STAGES:
            np.testing.assert_array_equal(both[f"stage.0.{stage}"], first[f"stage.0.{stage}"])
        np.testing.assert_array_equal(both["stage.1.ffn_swigl"], first["stage.1.ffn_swigl"])
        self.assertTrue((both["stage.1.ffn_out"] != second["stage.1.ffn_out"]).any())

    def test_one_name_with_two_parameters(self) -> None:
        two = self.dump(planted("rope-theta", (0,), theta=1e4), planted("rope-theta", (1,), theta=5e5))
        one = self.dump(planted("rope-theta", theta=1e4))
        np.testing.assert_array_equal(two["stage.0.q_post_rope"], one["stage.0.q_post_rope"])
        self.assertTrue((two["stage.1.q_post_rope"] != one["stage.1.q_post_rope"]).any())

    def test_layers_are_positions_in_execution(self) -> None:
        dump = self.dump(planted("layer-order"), planted("q-bias-missing", (0,)))
        n_q, _, dim = heads_of(self.config)
        np.testing.assert_array_equal(
            dump["stage.0.qkv_bias"][..., : n_q * dim], dump["stage.0.qkv_matmul"][..., : n_q * dim]
        )
        self.assertTrue((dump["stage.1.qkv_bias"] != dump["stage.1.qkv_matmul"]).any())


class DumpTest(Case):
    def test_layouts_hold_the_same_values_elsewhere(self) -> None:
        right, (n_q, n_kv, dim) = self.dump(), heads_of(self.config)
        major = self.dump(planted("layout", kind="heads-major"))
        q = right["stage.1.q_post_rope"]
        flat = major["stage.1.q_post_rope"][1].ravel()
        for head, position, d in ((0, 0, 1), (1, 5, 3), (n_q - 1, 79, dim - 1)):
            self.assertEqual(flat[(head * 80 + position) * dim + d], q[1, position, head * dim + d])
        np.testing.assert_array_equal(major["stage.1.qkv_bias"], right["stage.1.qkv_bias"])
        mixed = self.dump(planted("layout", (1,), kind="qk-interleaved"))
        for stage, heads in (("q_post_rope", n_q), ("qkv_bias", n_q + n_kv), ("k_post_rope", n_kv)):
            found, expected = mixed[f"stage.1.{stage}"], right[f"stage.1.{stage}"]
            for head in range(heads):
                part = found[..., head * dim : (head + 1) * dim]
                halves = expected[..., head * dim : (head + 1) * dim]
                np.testing.assert_array_equal(part[..., 0::2], halves[..., : dim // 2])
                np.testing.assert_array_equal(part[..., 1::2], halves[..., dim // 2 :])
        v = slice((n_q + n_kv) * dim, None)
        np.testing.assert_array_equal(mixed["stage.1.qkv_bias"][..., v], right["stage.1.qkv_bias"][..., v])
        np.testing.assert_array_equal(mixed["stage.0.q_post_rope"], right["stage.0.q_post_rope"])
        turned = self.dump(planted("layout"))["stage.0.ffn_up"]
        np.testing.assert_array_equal(turned[0].ravel(), right["stage.0.ffn_up"][0].T.ravel())
        np.testing.assert_array_equal(turned.shape, right["stage.0.ffn_up"].shape)

    def test_interleaved_q_and_k_are_adjacent_pairs_of_permuted_weights(self) -> None:
        """That is why the layout is met: q and k of an engine that has permuted the rows to turn adjacent pairs."""
        dump = self.dump(planted("layout", kind="qk-interleaved"))
        x = np.ascontiguousarray(dump["stage.0.qkv_bias"][..., :64]).reshape(2, 80, -1, 16)
        positions = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
        turns = np.exp(1j * positions[..., None] * 1e6 ** (-np.arange(0, 16, 2) / 16))[:, :, None]
        turned = (x.view(np.complex128) * turns).view(np.float64).reshape(2, 80, -1)
        self.assert_close(dump["stage.0.q_post_rope"], turned, 1e-5)

    @parameterized.parameters((0, False), (1, False), (1, True))
    def test_aprt_files_are_read_back_by_the_tools_reader(self, row: int, all_logits: bool) -> None:
        dump = self.dump(planted("rope-theta"), dtype="float32")
        tokens = self.mask[row] == 1
        with tempfile.TemporaryDirectory() as folder:
            faulty_forward.write_aprt(folder, dump, self.ids, self.mask, row, all_logits)
            read, trace = aprt.read(folder, Qwen2Config.from_hf(self.config))
        np.testing.assert_array_equal(read.input_ids[0], self.ids[row, tokens])
        self.assertEqual(list(trace), list(dump))
        for key, value in trace.items():
            expected = dump[key][row]
            expected = expected[:, tokens][:, :, tokens] if "attn_s" in key else expected[tokens]
            expected = expected[-1:] if key == "logits" and not all_logits else expected
            np.testing.assert_array_equal(value[0], expected, key)

    def test_rows_of_queries_keep_all_keys(self) -> None:
        dump = self.dump()
        part = faulty_forward.at_rows(dump, slice(60, None))
        self.assertEqual(part["stage.0.attn_softmax"].shape, (2, 4, 20, 80))
        np.testing.assert_array_equal(part["stage.0.attn_softmax"], dump["stage.0.attn_softmax"][:, :, 60:])
        np.testing.assert_array_equal(part["logits"], dump["logits"][:, 60:])

    def test_mistakes_in_planting_are_refused(self) -> None:
        for name, layers, parameters in (
            ("rope-thetas", None, {}),
            ("rope-theta", None, {"eps": 1}),
            ("head-missing", (0,), {}),
            ("layer-order", None, {}),
            ("rope-position", None, {}),
            ("rope-position", None, {"shift": 1, "restart": 2}),
            ("weights-relabelled", None, {"tensor": "model.layers.0.mlp.up_proj.weight"}),
        ):
            with self.assertRaises(ValueError):
                Planted(name, layers, parameters)
        for fault in (planted("rope-sign", (2,)), planted("weights-relabelled", tensor="mlp.up.weight")):
            with self.assertRaises(ValueError):
                self.dump(fault)


if __name__ == "__main__":
    absltest.main()
