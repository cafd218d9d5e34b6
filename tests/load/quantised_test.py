"""`load_model` on quantised files: the logits of the NumPy oracle on the decoded weights."""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.load.load_model import load_model
from apr_jax.load.parameters import read_as
from tests import oracle
from tests.paths import DATA, checkpoint


class QuantisedTest(parameterized.TestCase):
    def assert_logits_are_the_oracles(self, path):
        with open_checkpoint(path) as opened:
            weights = {name: tensor.read() for name, tensor in opened.tensors.items()}
            blocks = sum(tensor.dtype.is_block for tensor in opened.tensors.values())
            config = opened.config | {"tie_word_embeddings": "lm_head.weight" not in weights}
        self.assertGreaterEqual(blocks, 12)
        ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 64))
        expected, _ = oracle.forward(weights, config, ids)
        found = np.asarray(load_model(path, dtype="float32")(ids))
        self.assertLess(np.linalg.norm(found - expected) / np.linalg.norm(expected), 1e-5)

    @parameterized.parameters("tiny_bf16_tied-int4.apr", "tiny_f32_tied-int4.apr", "tiny_f32_tied-int8.apr")
    def test_genuine_files(self, name):
        self.assert_logits_are_the_oracles(DATA / "apr" / name)

    @parameterized.product(source=("odd_sizes", "gqa_tied_bf16"), cast=("q8", "q4", "q4k"))
    def test_our_files(self, source, cast):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "q.apr"
            convert(checkpoint(source), path, to="apr", cast=[CastRule.parse(cast)])
            self.assert_logits_are_the_oracles(path)

    @parameterized.parameters("float32", "bfloat16", "float64")
    def test_weights_are_decoded_into_every_dtype(self, dtype):
        with open_checkpoint(DATA / "apr" / "tiny_f32_tied-int8.apr") as opened:
            for tensor in opened.tensors.values():
                found = read_as([tensor], dtype)
                self.assertEqual(found.dtype.name, dtype)
                np.testing.assert_array_equal(found, tensor.read().astype(found.dtype))


if __name__ == "__main__":
    absltest.main()
