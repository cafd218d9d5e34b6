"""Which module plays which part, and what arrays of other engines become: without any engine."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax import capture
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError, RefusedError, UsageError
from apr_jax.engines.recorder import Recorder, joined, recording
from apr_jax.engines.roles import Part, Role, assign
from apr_jax.parity import dumps
from tests import paths

D, F, V, Q, K = 8, 20, 50, 8, 4
"""Widths of a model in which q, o and the residual stream are alike, as in most: shapes alone do not tell them."""
HUGGINGFACE = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}",
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
META = HUGGINGFACE | {
    "embedding": "tok_embeddings",
    "final_norm": "norm",
    "head": "output",
    "layer": "layers.{}",
    "attn_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "o": "attention.wo",
    "ffn_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
NANOCHAT = HUGGINGFACE | {
    "embedding": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layer": "transformer.h.{}",
    "attn_norm": "ln_1",
    "q": "attn.c_q",
    "k": "attn.c_k",
    "v": "attn.c_v",
    "o": "attn.c_proj",
    "ffn_norm": "ln_2",
    "gate": "mlp.c_gate",
    "up": "mlp.c_up",
    "down": "mlp.c_proj",
}
FUSED = {key: value for key, value in HUGGINGFACE.items() if key not in ("q", "k", "v", "gate", "up")} | {
    "qkv": "self_attn.qkv_proj",
    "gate_up": "mlp.gate_up_proj",
}
FLAX = HUGGINGFACE | {
    "embedding": "embedder",
    "final_norm": "final_norm",
    "head": "unembed",
    "layer": "block_{}",
    "attn_norm": "pre_attention_norm",
    "q": "attn.query",
    "k": "attn.key",
    "v": "attn.value",
    "o": "attn.out",
    "ffn_norm": "pre_ffw_norm",
    "gate": "ffn.gating",
    "up": "ffn.up",
    "down": "ffn.out",
}
SHAPES = {
    "embedding": (V, D),
    "head": (V, D),
    "q": (Q, D),
    "k": (K, D),
    "v": (K, D),
    "qkv": (Q + 2 * K, D),
    "o": (D, Q),
    "gate": (F, D),
    "up": (F, D),
    "gate_up": (2 * F, D),
    "down": (D, F),
}


def tree(names, layers=3):
    """The parts of a model in which everything has the name that it has there."""
    expected = {}
    for part, name in names.items():
        if part in ("embedding", "final_norm", "head"):
            expected[name] = Role(part)
            continue
        for layer in range(layers):
            at = names["layer"].format(layer)
            expected[at if part == "layer" else f"{at}.{name}"] = Role(part, layer)
    parts = []
    for name, role in expected.items():
        kind = "embedding" if role.part == "embedding" else "norm" if "norm" in role.part else "linear"
        shape = () if role.part == "layer" else SHAPES.get(role.part, (D,))
        parts.append(Part(name, "other" if role.part == "layer" else kind, shape))
    return parts, expected


class RolesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("huggingface", HUGGINGFACE),
        ("meta", META),
        ("nanochat", NANOCHAT),
        ("vllm", FUSED),
        ("flax", FLAX),
    )
    def test_parts_are_found_by_name_and_shape(self, names):
        parts, expected = tree(names)
        found = assign(parts)
        self.assertEqual({name: role for name, role in found.items() if role.part != "attention"}, expected)

    def test_around_the_layers_there_may_be_other_lists(self):
        parts, expected = tree(HUGGINGFACE)
        others = [Part(f"model.layers.0.mlp.experts.{i}.proj", "linear", (D, D)) for i in range(3)]
        others += [Part("model.layers.0.self_attn.q_norm", "norm", (2,)), Part("vision.0.norm", "norm", (4,))]
        found = assign([*parts, *others])
        self.assertEqual({name: role for name, role in found.items() if role.part != "attention"}, expected)

    def test_a_mapping_says_what_no_rule_finds(self):
        strange = HUGGINGFACE | {"q": "a.x", "k": "a.y", "v": "a.z", "o": "a.w"}
        parts, expected = tree(strange)
        names = {"q": "a.x", "k": "y", "v": "a.z", "o": "w"}
        found = assign(parts, names)
        self.assertEqual({name: role for name, role in found.items() if role.part != "attention"}, expected)
        for wrong in ({"query": "a.x"}, {"q": "nowhere"}):
            with self.assertRaises(UsageError) as caught:
                assign(parts, wrong)
            self.assertEqual(caught.exception.code, "capture-names")
        with self.assertRaises(RefusedError):
            assign([Part("a.b", "linear", (2, 2))])


class RecorderTest(parameterized.TestCase):
    def test_a_layer_that_runs_twice_is_counted_twice(self):
        recorder, x = Recorder(), np.ones((1, 3, D), np.float32)
        recorder.begin()
        recorder.observe(Role("embedding"), [np.array([[1, 2, 3]])], [x])
        for layer, value in ((0, 1), (1, 2), (1, 3)):
            recorder.enter(layer)
            recorder.observe(Role("attn_norm", layer), [x], [x * value])
            recorder.leave([x])
        _, values, _ = joined(recorder.calls, None)
        self.assertEqual([values[f"stage.{layer}.attn_norm"][0, 0, 0] for layer in range(3)], [1, 2, 3])

    def test_nothing_is_written_over_or_of_nothing(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        with self.assertRaises(RefusedError), recording(folder / "new"):
            pass
        self.assertFalse((folder / "new").exists())
        (folder / "mine.txt").touch()
        for force in (False, True):
            with self.assertRaises(UsageError), recording(folder, force=force):
                self.fail("the model would have run")


class ArraysTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        with open_checkpoint(paths.checkpoint("gqa_tied_bf16")) as checkpoint:
            self.config = checkpoint.model_config()
        self.folder = pathlib.Path(self.create_tempdir().full_path) / "dump"
        self.ids = np.arange(12).reshape(2, 6)

    def test_names_of_nodes_become_stages(self):
        x = np.random.default_rng(0).standard_normal((2, 6, 64)).astype(np.float32)
        values = {f"/model/layers.{n}/norm/Mul_1_output_0": (x * n).astype(ml_dtypes.bfloat16) for n in range(2)}
        values |= {"/model/layers.x/norm/Mul_1_output_0": x, "hidden": x}
        names = {"attn_norm": "/model/layers.{layer}/norm/Mul_1_output_0", "final_norm": "hidden", "logits": "none"}
        capture.arrays(self.folder, self.ids, values, names)
        dump = dumps.read(self.folder, self.config)
        self.assertEqual(set(dump.values), {"stage.0.attn_norm", "stage.1.attn_norm", "stage.final_norm"})
        np.testing.assert_array_equal(dump.values["stage.1.attn_norm"], x.astype(ml_dtypes.bfloat16).astype(np.float32))
        content = json.loads((self.folder / "dump.json").read_text())
        self.assertEqual((content["dtype"], content["input_ids"]), ("bfloat16", self.ids.tolist()))

    def test_rows_of_some_positions(self):
        capture.arrays(self.folder, self.ids, {"stage.final_norm": np.ones((2, 2, 64), np.float16)}, positions=[3, 5])
        dump = dumps.read(self.folder, self.config)
        np.testing.assert_array_equal(dump.columns, [[3, 5], [3, 5]])
        self.assertEqual(dump.dtype, "float16")

    @parameterized.parameters(
        ({"norm": "x"}, "capture-names"), ({"attn_norm": "x"}, "capture-names"), ({"logits": "y"}, "nothing-captured")
    )
    def test_mappings_that_fit_nothing(self, names, code):
        with self.assertRaises(AprJaxError) as caught:
            capture.arrays(self.folder, self.ids, {"x": np.ones((2, 6, 64), np.float32)}, names)
        self.assertEqual(caught.exception.code, code)

    def test_integers_are_no_stage(self):
        with self.assertRaises(RefusedError) as caught:
            capture.arrays(self.folder, self.ids, {"logits": np.ones((2, 6, 288), np.int32)})
        self.assertEqual(caught.exception.code, "dump-dtype")


if __name__ == "__main__":
    absltest.main()
