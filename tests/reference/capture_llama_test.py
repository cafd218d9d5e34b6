"""llama.cpp with an eval callback, saved as docs/dumps.md says: the right run is clean, five mistakes are named."""

import functools
import json
import multiprocessing
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax import open_checkpoint
from apr_jax.load.load_model import load_model
from apr_jax.parity import dumps
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace.inputs import seeded
from tests import paths
from tests.reference import llama_cpp

if llama_cpp.library() is None:
    pytest.skip("xllamacpp, a wheel with llama.cpp, is not installed", allow_module_level=True)

NAME = "gqa_tied_bf16"
CASES = {
    "right": {},
    "rope-theta": {"theta": 5e5},
    "rms-norm-eps": {"eps": 1e-3},
    "rope-scaling": {"rope_freq_scale": 0.5},
    "qkv-bias-missing": {},
    "gate-up-swapped": {},
}
load = functools.lru_cache(load_model)


def tensors(case):
    with open_checkpoint(paths.checkpoint(NAME)) as checkpoint:
        found = {name: tensor.read().astype(np.float32) for name, tensor in checkpoint.tensors.items()}
    if case == "qkv-bias-missing":
        found = {name: value * 0 if name.endswith("bias") else value for name, value in found.items()}
    if case == "gate-up-swapped":
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        found = {
            next((name.replace(a, b) for a, b in other.items() if f".{a}." in name), name): value
            for name, value in found.items()
        }
    return found


def engine(case, config, ids, folder):
    numbers = CASES[case]
    llama_cpp.write_gguf(folder / "model.gguf", config, tensors(case), **numbers)
    params = {name: value for name, value in numbers.items() if name.startswith("rope_freq")}
    llama_cpp.run(folder / "model.gguf", ids, folder / "dump", **params)


class LlamaTest(parameterized.TestCase):
    @parameterized.parameters(*CASES)
    def test_llama_cpp(self, case):
        folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        (folder / "dump").mkdir()
        exact, same = (load(paths.checkpoint(NAME), dtype, "cpu") for dtype in ("float64", "float32"))
        ids = seeded(283, 1, 64).input_ids[0]
        # A process of its own: the library ends it where it does not like a file.
        run = multiprocessing.get_context("spawn").Process(target=engine, args=(case, exact.config, ids, folder))
        run.start()
        run.join()
        self.assertEqual(run.exitcode, 0)
        (folder / "dump" / "token_ids.json").write_text(json.dumps(ids.tolist()))
        dump = dumps.read(folder / "dump", exact.config)
        self.assertGreaterEqual(len(dump.values), 25)
        found = diagnose(exact, same, dump.inputs, dump.values, dump.columns).findings
        self.assertEqual({finding.fault for finding in found}, set() if case == "right" else {case}, found)


if __name__ == "__main__":
    absltest.main()
