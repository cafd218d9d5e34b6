"""Quantised files of the genuine `apr`: values, payloads, logits and stages; and ours before it.

The recorded files come from $APR_FIXTURES or shared/fixtures beside the checkout, the live `apr` from $APR_BIN.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.formats import casts
from apr_jax.load.load_model import load_model
from apr_jax.model.qwen2 import OPS
from apr_jax.trace import aprt, stages, tolerances
from apr_jax.trace.compare import compare
from apr_jax.trace.inputs import Inputs
from tests import oracle, quantiser_cases
from tests.paths import CHECKPOINTS, cases, checkpoint, fixtures

APR = os.environ.get("APR_BIN")
FIXTURES = fixtures()
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KINDS = ("int8", "int4", "q4k", "fp16")
FILES = [path for kind in KINDS for path in sorted(FIXTURES.glob(f"genuine/*/apr/{kind}.apr"))] if FIXTURES else []
NAMES = [str(path.relative_to(FIXTURES)) for path in FILES if FIXTURES]
QUANTISED = [name for name in NAMES if "fp16" not in name]
DUMPS = [
    str(path.relative_to(FIXTURES))
    for kind in ("q4k", "fp16")
    for path in (sorted(FIXTURES.glob(f"genuine/*/traces/{kind}")) if FIXTURES else [])
]
NO_FIXTURES = "no genuine files: $APR_FIXTURES and shared/fixtures beside the checkout are absent"


def rules(*texts):
    return [CastRule.parse(text) for text in texts]


def quantised_activations(x):
    """Rounds x [..., in] as `apr` 0.72.3 does before it multiplies with Q4_K: blocks of 256 in int8 (GGML's Q8_K)."""
    columns = x.shape[-1]
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % 256)]).reshape(*x.shape[:-1], -1, 256)
    scale = jnp.abs(blocks).max(-1, keepdims=True) / 127
    rounded = jnp.where(scale > 0, jnp.rint(blocks / jnp.where(scale > 0, scale, 1)) * scale, 0)
    return rounded.reshape(*x.shape[:-1], -1)[..., :columns]


AS_APR = dataclasses.replace(
    OPS, linear=lambda ops, x, weight, dtype=None: OPS.linear(ops, quantised_activations(x), weight, dtype)
)
# The products of a layer, and the weights that the engine needs in Q4_K to round the activations before them.
PRODUCTS = {
    "qkv_matmul": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_out": ("mlp.down_proj",),
}


def rounded_products(model_path):
    """Keys of the stages before which `apr` rounds: where the weights are Q4_K; a tied head without data is none."""
    with open_checkpoint(model_path) as opened:
        types = {name: tensor.dtype.name for name, tensor in opened.tensors.items()}
        layers = opened.model_config().num_layers
    keys = {stages.LOGITS} if types.get(HEAD) == "q4_k" else set()
    for layer in range(layers):
        for stage, weights in PRODUCTS.items():
            if {types[f"model.layers.{layer}.{name}.weight"] for name in weights} == {"q4_k"}:
                keys.add(stages.Key.of(layer, stage))
    return keys


def forced(model_path, dump, ops=OPS, inputs=None):
    """Every stage computed from the dump's own inputs, beside the dump."""
    model = load_model(model_path).with_ops(ops)
    inputs, theirs = aprt.read(dump, model.config, inputs)
    force = {key: value for key, value in theirs.items() if key != stages.LOGITS}
    results = compare(model.trace(inputs, force=force), theirs, inputs, lambda key: tolerances.FLOAT32)
    assert [result.key for result in results] == list(stages.trace_keys(model.config.num_layers))
    return results


class DumpTestCase(parameterized.TestCase):
    def assert_agrees(self, what, model, dump, inputs=None):
        """Every stage of `apr` is within 1e-5, its rounding of activations replayed where the weights are Q4_K."""
        rounded = rounded_products(model)
        plain = {result.key: result for result in forced(model, dump, OPS, inputs)}
        replayed = {result.key: result for result in forced(model, dump, AS_APR, inputs)}
        results = [replayed[key] if key in rounded else result for key, result in plain.items()]
        self.assertEqual([result for result in results if not result.within], [])
        # The bar would see what is not replayed: the rounding alone is a thousand times larger.
        products = [plain[key].relative_l2 for key in rounded]
        self.assertGreater(min(products), 1e-3)
        print(
            f"{what}: {len(results)} stages, worst {max(result.relative_l2 for result in results):.1e}; "
            f"{len(products)} products without the rounding of activations {min(products):.1e} .. {max(products):.1e}"
        )


@absltest.skipUnless(FIXTURES, NO_FIXTURES)
class RecordedFilesTest(DumpTestCase):
    @parameterized.parameters(*cases(NAMES))
    def test_values_are_those_of_apr(self, name):
        path = FIXTURES / name
        expected = json.loads(path.with_suffix(".values.json").read_text())
        with open_checkpoint(path) as opened:
            self.assertEqual(set(opened.tensors), set(expected))
            for tensor_name, tensor in opened.tensors.items():
                digest = hashlib.sha256(tensor.read().astype("<f4").tobytes()).hexdigest()
                self.assertEqual(digest, expected[tensor_name]["sha256_of_float32_values"], tensor_name)
                if expected[tensor_name].get("layout") == "rows":
                    self.assertIsNotNone(tensor.dtype.padded_columns(tensor.shape, tensor.nbytes))
        quantised = sum(entry["dtype_id"] in (12, 128, 129) for entry in expected.values())
        self.assertEqual(quantised, 0 if "fp16" in name else 9 if "k256" in name else 16)

    @parameterized.parameters(*cases(QUANTISED))
    def test_our_quantised_file_has_every_payload_of_apr(self, name):
        path = FIXTURES / name
        cast = quantiser_cases.KINDS[path.stem][0]
        with tempfile.TemporaryDirectory() as folder:
            ours = pathlib.Path(folder) / "ours.apr"
            convert(path.parents[1] / "hf", ours, to="apr", cast=rules(cast), tied_head="copy")
            with open_checkpoint(path) as theirs, open_checkpoint(ours) as opened:
                self.assertEqual(list(opened.tensors), list(theirs.tensors))
                for tensor_name, tensor in theirs.tensors.items():
                    found = opened.tensors[tensor_name]
                    self.assertEqual((found.dtype, found.shape), (tensor.dtype, tensor.shape), tensor_name)
                    self.assertEqual(found.raw(), tensor.raw(), tensor_name)

    @parameterized.parameters(*cases(NAMES))
    def test_logits_are_the_oracles_on_the_decoded_weights(self, name):
        path = FIXTURES / name
        with open_checkpoint(path) as opened:
            weights = {key: tensor.read() for key, tensor in opened.tensors.items()}
        config = json.loads((path.parents[1] / "hf" / "config.json").read_text())
        # `apr import --quantize` writes the head of a tied model as a tensor of its own.
        config["tie_word_embeddings"] = HEAD not in weights
        ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 64))
        expected, _ = oracle.forward(weights, config, ids)
        found = np.asarray(load_model(path, dtype="float32")(ids))
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        print(f"{name}: logits against the oracle {error:.1e}")
        self.assertLess(error, 1e-5)
        if path.stem != "fp16":
            # The bar bites: the weights before quantisation are far away.
            original, _ = oracle.forward(*oracle.load(path.parents[1] / "hf"), ids)
            self.assertGreater(np.linalg.norm(original - expected) / np.linalg.norm(expected), 1e-3)

    @parameterized.parameters(*cases(name for name in DUMPS if name.endswith("q4k")))
    def test_recorded_q4k_stages(self, dump):
        model = FIXTURES / pathlib.Path(dump).parents[1] / "apr" / "q4k.apr"
        self.assert_agrees(dump, model, FIXTURES / dump)

    @parameterized.parameters(*cases(name for name in DUMPS if name.endswith("fp16")))
    def test_recorded_fp16_stages(self, dump):
        folder = FIXTURES / pathlib.Path(dump).parents[1]
        with tempfile.TemporaryDirectory() as made:
            model = folder / "apr" / "fp16.apr"
            if not model.exists():
                # Only its dump is among the fixtures; the file is the cast, its head copied.
                model = pathlib.Path(made) / "fp16.apr"
                convert(folder / "hf", model, to="apr", cast=rules("f16"), tied_head="copy")
            results = forced(model, FIXTURES / dump)
        print(f"{dump}: {len(results)} stages, worst {max(result.relative_l2 for result in results):.1e}")
        self.assertEqual([result for result in results if not result.within], [])


@absltest.skipUnless(APR, "APR_BIN does not name the genuine apr")
class LiveTest(DumpTestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def apr(self, *arguments):
        done = subprocess.run([APR, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def imported(self, source, kind):
        path = self.folder / f"{kind}.apr"
        self.apr("import", source, "-o", path, "--quantize", kind)
        return path

    @parameterized.product(source=[path.name for path in CHECKPOINTS], kind=list(quantiser_cases.KINDS))
    def test_apr_import_gives_the_payloads_that_our_cast_gives(self, source, kind):
        ours = self.folder / "ours.apr"
        cast = quantiser_cases.KINDS[kind][0]
        convert(checkpoint(source), ours, to="apr", cast=rules(cast), tied_head="copy")
        with open_checkpoint(self.imported(checkpoint(source), kind)) as theirs, open_checkpoint(ours) as opened:
            self.assertEqual(list(opened.tensors), list(theirs.tensors))
            for name, tensor in theirs.tensors.items():
                self.assertEqual(opened.tensors[name].dtype, tensor.dtype, name)
                self.assertEqual(opened.tensors[name].raw(), tensor.raw(), name)
            if source == "odd_sizes":
                payloads = b"".join(tensor.raw() for tensor in theirs.tensors.values() if tensor.dtype.is_block)
                self.assertEqual(hashlib.sha256(payloads).hexdigest(), quantiser_cases.ODD_SIZES_SHA256[kind])

    @parameterized.parameters(*quantiser_cases.KINDS)
    def test_apr_import_of_hard_values_is_what_the_default_suite_expects(self, kind):
        source = pathlib.Path(shutil.copytree(checkpoint("odd_sizes"), self.folder / "source"))
        with open_checkpoint(source) as opened:
            values = {name: tensor.read().astype(np.float32) for name, tensor in opened.tensors.items()}
        values[EMBEDDING] = quantiser_cases.hard_values(values[EMBEDDING].shape)
        safetensors.numpy.save_file(values, source / "model.safetensors")
        with open_checkpoint(self.imported(source, kind)) as opened:
            payload = opened.tensors[EMBEDDING].raw()
        self.assertEqual(hashlib.sha256(payload).hexdigest(), quantiser_cases.HARD_SHA256[kind])
        expected = casts.quantise(values[EMBEDDING], quantiser_cases.KINDS[kind][1], values[EMBEDDING].shape)
        self.assertEqual(payload, expected)

    def trace(self, model, layers):
        dump = self.folder / "dump"
        arguments = ("--save-tensor", "all", "--save-tensor-layers", f"0..{layers}", "--save-tensor-dir", dump)
        shown = self.apr("trace", "--payload", model, *arguments)
        return dump, Inputs.of([json.loads(re.search(r"Token ids: *(\[.*?\])", shown)[1])])

    @parameterized.parameters(*cases(name for name in QUANTISED if name.endswith("q4k.apr")))
    def test_apr_trace_of_its_q4k_files(self, name):
        layers = json.loads((FIXTURES / name).parents[1].joinpath("hf", "config.json").read_text())["num_hidden_layers"]
        dump, inputs = self.trace(FIXTURES / name, layers)
        self.assert_agrees(name, FIXTURES / name, dump, inputs)

    @parameterized.product(
        source=[path.name for path in CHECKPOINTS if path.name != "head_dim_given"], tied_head=["absent", "copy"]
    )
    def test_apr_trace_of_our_q4k_files(self, source, tied_head):
        ours = self.folder / "ours.apr"
        convert(checkpoint(source), ours, to="apr", cast=rules("q4k"), tied_head=tied_head)
        with open_checkpoint(ours) as opened:
            layers = opened.model_config().num_layers
            self.assertGreater(sum(math.prod(t.shape) for t in opened.tensors.values() if t.dtype.is_block), 50_000)
        dump, inputs = self.trace(ours, layers)
        self.assert_agrees(f"{source}, head {tied_head}", ours, dump, inputs)
        self.assertIn("Output:", self.apr("run", ours, "--prompt", "a b", "--max-tokens", "2", "--temperature", "0"))


if __name__ == "__main__":
    absltest.main()
