"""An ONNX export of transformers, run by ONNX Runtime and captured in one line: clean, and five mistakes named."""

import contextlib
import functools
import importlib.util
import pathlib
import shutil
import sys
import tempfile
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax import capture
from apr_jax.load.load_model import load_model
from apr_jax.parity import dumps
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace import hf_reference
from apr_jax.trace.inputs import seeded
from tests import paths

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)
if any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime", "onnxscript")):
    pytest.skip("onnx, onnxruntime and onnxscript are not installed", allow_module_level=True)

import torch

from tests.reference import parity_hf_test as planted

NAME = "gqa_tied_bf16"
CASES = (None, "stale theta", "eps of one norm", "no biases", "KV heads tiled", "no attention residual")
load = functools.lru_cache(load_model)


class OnnxTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def exported(self, plant):
        """The model as torch.onnx.export leaves it, with a mistake in it."""
        path, ids = self.folder / "model.onnx", torch.tensor(seeded(283, 1, 64).input_ids.astype(np.int64))
        with plant(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = hf_reference.load(paths.checkpoint(NAME)).eval()
            model.config.use_cache = False
            torch.onnx.export(model, (ids,), path, dynamo=True, input_names=["input_ids"], output_names=["logits"])
        return path, ids.numpy()

    @parameterized.parameters(*CASES)
    def test_an_export_of_transformers(self, case):
        _, plant, expected = planted.CASES[case] if case else (NAME, contextlib.nullcontext, [])
        path, ids = self.exported(plant)
        capture.onnx(path, self.folder / "dump", {"input_ids": ids})
        exact, same = (load(paths.checkpoint(NAME), dtype, "cpu") for dtype in ("float64", "float32"))
        dump = dumps.read(self.folder / "dump", exact.config)
        self.assertEqual(dump.dtype, "float32")
        self.assertGreaterEqual(len(dump.values), 33)
        findings = diagnose(exact, same, dump.inputs, dump.values, dump.columns).findings
        self.assertEqual({finding.fault for finding in findings}, {fault for fault, _, _ in expected})


if __name__ == "__main__":
    absltest.main()
