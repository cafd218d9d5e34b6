"""HuggingFace made wrong by monkeypatching transformers: parity names each mistake, and nothing else.

The dumps are those of `hf_reference.run`, so this also shows that it records what HuggingFace computed, and does not
compute a stage anew where a mistake would then be hidden.
"""

import contextlib
import io
import json
import math
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.commands import parity
from apr_jax.load.load_model import load_model
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace import hf_reference
from apr_jax.trace.inputs import Inputs, seeded
from tests import paths

if hf_reference.available():
    import torch
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

GQA, MHA = "gqa_tied_bf16", "mha_untied_f32_sharded"
PADDED = 9


def batch() -> Inputs:
    """2 x 80 tokens, one row padded on the left, as in the battery."""
    mask = np.ones((2, 80), np.int32)
    mask[0, :PADDED] = 0
    return Inputs.of(seeded(283, 2, 80).input_ids, mask)


def changed(change):
    """transformers' model, changed after it was loaded."""
    load = hf_reference.load

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            change(model)
        return model

    return mock.patch.object(hf_reference, "load", loaded)


def each_layer(change, layers=None):
    """The same change in every layer, or in some."""
    return changed(lambda model: [change(x) for i, x in enumerate(model.model.layers) if layers is None or i in layers])


def norm_forward(function):
    """Another forward pass in every RMSNorm: (weight, x in float32, eps) -> result in float32."""

    def forward(self, hidden_states):
        return function(self.weight, hidden_states.float(), self.variance_epsilon).to(hidden_states.dtype)

    return mock.patch.object(qwen2.Qwen2RMSNorm, "forward", forward)


def unit(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def decoder_forward(attention_residual, mlp_residual):
    """Decoder layers whose residual connections are there or not."""

    def forward(self, hidden_states, **kwargs):
        update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + update if attention_residual else update
        update = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + update if mlp_residual else update

    return mock.patch.object(qwen2.Qwen2DecoderLayer, "forward", forward)


def adjacent_pairs():
    """As GPT-J rotates: pairs (2i, 2i + 1)."""

    def rotate(x, cos, sin):
        half = cos.shape[-1] // 2
        cos, sin = (table[..., :half].repeat_interleave(2, -1).unsqueeze(1) for table in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * cos + turned * sin

    def apply(q, k, cos, sin, unsqueeze_dim=1):
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return mock.patch.object(qwen2, "apply_rotary_pos_emb", apply)


def base(theta):
    """Inverse frequencies of another base, as a cache keyed without it leaves them."""

    def stale(model):
        buffer = model.model.rotary_emb.inv_freq
        dim = 2 * len(buffer)
        buffer.copy_(1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    return changed(stale)


def positions(move):
    """RoPE at other positions."""
    forward = qwen2.Qwen2RotaryEmbedding.forward
    return mock.patch.object(
        qwen2.Qwen2RotaryEmbedding, "forward", lambda self, x, position_ids: forward(self, x, move(position_ids))
    )


def masked(visible):
    """Another mask: visible(query, key) -> bool; padding stays hidden but from itself."""

    def mask(config, inputs_embeds, attention_mask, **_):
        length = inputs_embeds.shape[1]
        query, key = torch.arange(length)[:, None], torch.arange(length)
        seen = visible(query, key) & (attention_mask[:, None, :].bool() | (query == key))
        hidden = torch.finfo(inputs_embeds.dtype).min
        return torch.where(seen, 0.0, hidden).to(inputs_embeds.dtype)[:, None]

    return mock.patch.object(qwen2, "create_causal_mask", mask)


def without_bias(*names):
    def change(layer):
        for name in names:
            getattr(layer.self_attn, name).bias = None

    return change


def swap_gate_and_up(layer):
    layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def activation_on_up(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def next_row(model):
    table = model.model.embed_tokens
    table.forward = lambda ids: torch.nn.functional.embedding((ids + 1) % table.num_embeddings, table.weight)


def tf32():
    """Products of projections, MLP and head with inputs of 10 bits, as tensor cores take float32."""
    linear = torch.nn.functional.linear

    def cut(x):
        return (x.view(torch.int32) & -0x2000).view(torch.float32)

    return mock.patch.object(torch.nn.functional, "linear", lambda x, w, bias=None: linear(cut(x), cut(w), bias))


def reversed_layers(model):
    model.model.layers = torch.nn.ModuleList(reversed(list(model.model.layers)))


def skipped_layer(model):
    del model.model.layers[0]


def keys_with_the_weight_of_layer_1(model):
    """The mistake is in the call: the module's own weight stays right."""
    first, second = (layer.self_attn.k_proj for layer in model.model.layers)
    first.forward = lambda x: torch.nn.functional.linear(x, second.weight, first.bias)


def half_bits(x):
    """The 16 bits of a bfloat16 value read as float16."""
    return x.to(torch.bfloat16).view(torch.float16).float()


def setting(name, **values):
    """Sets attributes of one module of a layer, e.g. setting("self_attn", scaling=1.0)."""
    return lambda layer: [setattr(layer.get_submodule(name), key, value) for key, value in values.items()]


def both(*contexts):
    stack = contextlib.ExitStack()
    for make in contexts:
        stack.enter_context(make())
    return stack


# name of the case -> checkpoint, what is planted, and the findings: fault, layers, parameters.
CASES = {
    "adjacent pairs": (GQA, adjacent_pairs, [("rope-adjacent-pairs", "all", {})]),
    "stale theta": (GQA, lambda: base(1e4), [("rope-theta", "all", {"theta": 1e4})]),
    "positions shifted": (MHA, lambda: positions(lambda p: p + 3), [("rope-position", "all", {"shift": 3})]),
    "positions restart": (GQA, lambda: positions(lambda p: p % 32), [("rope-position", "all", {"restart": 32})]),
    "eps": (
        GQA,
        lambda: norm_forward(lambda w, x, eps: w * unit(x, 1e-5)),
        [("rms-norm-eps", "all", {"eps": 1e-5})],
    ),
    "eps of one norm": (
        GQA,
        lambda: each_layer(setting("post_attention_layernorm", variance_epsilon=1e-4), layers=[1]),
        [("rms-norm-eps", (1,), {"eps": 1e-4, "norms": ["post_attention_layernorm"]})],
    ),
    "norm weight plus one": (
        MHA,
        lambda: norm_forward(lambda w, x, eps: (1 + w) * unit(x, eps)),
        [("norm-weight-plus-one", "all", {})],
    ),
    "LayerNorm's mean": (
        GQA,
        lambda: norm_forward(lambda w, x, eps: w * unit(x - x.mean(-1, keepdim=True), eps)),
        [("norm-mean-subtracted", "all", {})],
    ),
    "no final norm": (
        GQA,
        lambda: changed(lambda model: setattr(model.model.norm, "forward", lambda x: x)),
        [("final-norm-missing", (), {})],
    ),
    "no biases": (
        GQA,
        lambda: each_layer(without_bias("q_proj", "k_proj", "v_proj")),
        [("qkv-bias-missing", "all", {})],
    ),
    "no key bias in one layer": (
        MHA,
        lambda: each_layer(without_bias("k_proj"), layers=[0]),
        [("k-bias-missing", (0,), {})],
    ),
    "softmax scale": (
        GQA,
        lambda: each_layer(setting("self_attn", scaling=0.2)),
        [("softmax-scale", "all", {"scale": 0.2})],
    ),
    "softmax without scale in one layer": (
        MHA,
        lambda: each_layer(setting("self_attn", scaling=1.0), layers=[1]),
        [("softmax-scale", (1,), {"scale": 1.0})],
    ),
    "not causal": (GQA, lambda: masked(lambda i, j: j <= j.max()), [("mask-not-causal", "all", {})]),
    "one key too many": (
        GQA,
        lambda: masked(lambda i, j: j <= i + 1),
        [("mask-off-by-one", "all", {"last": 1})],
    ),
    "window": (GQA, lambda: masked(lambda i, j: (j <= i) & (j > i - 16)), [("mask-window", "all", {"window": 16})]),
    "KV heads tiled": (
        GQA,
        lambda: mock.patch.object(qwen2, "repeat_kv", lambda x, count: x.repeat(1, count, 1, 1)),
        [("kv-heads-interleaved", "all", {})],
    ),
    "o_proj transposed": (
        GQA,
        lambda: each_layer(lambda layer: layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight.T.clone())),
        [("o-proj-transposed", "all", {})],
    ),
    "no attention residual": (
        GQA,
        lambda: decoder_forward(attention_residual=False, mlp_residual=True),
        [("attention-residual-missing", "all", {})],
    ),
    "no MLP residual": (
        MHA,
        lambda: decoder_forward(attention_residual=True, mlp_residual=False),
        [("mlp-residual-missing", "all", {})],
    ),
    "gate and up swapped": (GQA, lambda: each_layer(swap_gate_and_up), [("gate-up-swapped", "all", {})]),
    "activation on up": (
        GQA,
        lambda: mock.patch.object(qwen2.Qwen2MLP, "forward", activation_on_up),
        [("activation-on-up", "all", {})],
    ),
    "gelu in one layer": (
        MHA,
        lambda: each_layer(lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()), layers=[1]),
        [("activation-gelu", (1,), {})],
    ),
    "embedding row off by one": (GQA, lambda: changed(next_row), [("embedding-row-off-by-one", (), {})]),
    "layers reversed": (GQA, lambda: changed(reversed_layers), [("layer-order", (), {"order": [1, 0]})]),
    "layer skipped": (MHA, lambda: changed(skipped_layer), [("layer-skipped", (), {"layer": 0})]),
    "key weight of another layer": (
        GQA,
        lambda: changed(keys_with_the_weight_of_layer_1),
        [("weights-from-another-layer", (0,), {"layer": 1, "tensor": "self_attn.k_proj.weight"})],
    ),
    "query weight relabelled": (
        GQA,
        lambda: each_layer(lambda layer: layer.self_attn.q_proj.weight.copy_(half_bits(layer.self_attn.q_proj.weight))),
        [("weights-relabelled", "all", {"direction": "bf16-as-f16", "tensor": "self_attn.q_proj.weight"})],
    ),
    "TF32": (MHA, tf32, [("tf32-dots", "all", {"mode": "truncate"})]),
    "the real case": (
        GQA,
        lambda: both(
            lambda: norm_forward(lambda w, x, eps: w * unit(x, 1e-5)),
            adjacent_pairs,
            lambda: base(1e4),
            lambda: each_layer(without_bias("q_proj", "k_proj", "v_proj")),
        ),
        [
            ("rms-norm-eps", "all", {"eps": 1e-5}),
            ("rope-adjacent-pairs", "all", {}),
            ("rope-theta", "all", {"theta": 1e4}),
            ("qkv-bias-missing", "all", {}),
        ],
    ),
}


def same(expected, found) -> bool:
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(expected, found, rel_tol=0.01)
    return expected == found


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class PatchedHuggingFaceTest(parameterized.TestCase):
    @parameterized.parameters(list(CASES))
    def test_the_mistake_is_named_with_layers_and_parameters_and_nothing_beside_it(self, case):
        checkpoint, planted, expected = CASES[case]
        folder, inputs = paths.checkpoint(checkpoint), batch()
        with planted():
            dump = hf_reference.run(folder, inputs.input_ids, inputs.attention_mask, trace=True)
        exact, model = load_model(folder, "float64", "cpu"), load_model(folder, "float32", "cpu")
        findings = diagnose(exact, model, inputs, dump).findings
        sentences = [finding.sentence for finding in findings]
        print(f"{case}: {sentences}")
        by_name = {finding.fault: finding for finding in findings}
        self.assertEqual(sorted(f.fault for f in findings), sorted(name for name, _, _ in expected), sentences)
        for name, layers, parameters in expected:
            finding = by_name[name]
            self.assertEqual((finding.layers, finding.certainty), (layers, "certain"), finding)
            for key, value in parameters.items():
                self.assertTrue(same(value, finding.parameters[key]), finding)

    def test_unpatched_there_is_no_finding(self):
        for checkpoint in (GQA, MHA):
            folder, inputs = paths.checkpoint(checkpoint), batch()
            dump = hf_reference.run(folder, inputs.input_ids, inputs.attention_mask, trace=True)
            exact, model = load_model(folder, "float64", "cpu"), load_model(folder, "float32", "cpu")
            self.assertEqual(diagnose(exact, model, inputs, dump).findings, ())

    def test_the_command_names_it_too(self):
        argv = ["parity.py", str(paths.checkpoint(GQA)), "--right", "hf", "--json"]
        printed = io.StringIO()
        with adjacent_pairs(), contextlib.redirect_stdout(printed):
            code = parity.main(parity.parse(argv))
        report = json.loads(printed.getvalue())
        self.assertEqual(code, 1)
        self.assertEqual((report["verdict"], report["unexamined"]), ("mistake", []))
        self.assertEqual([(f["fault"], f["layers"]) for f in report["findings"]], [("rope-adjacent-pairs", "all")])


if __name__ == "__main__":
    absltest.main()
