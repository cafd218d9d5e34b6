"""A model with sliding windows and a RoPE rule: right engines are right, and a window that is left out is named."""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax import load_model
from apr_jax.parity.replay import Replay
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from tests import oracle, paths
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench

WINDOW = 24
RULES = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@functools.cache
def bench() -> Bench:
    base = paths.checkpoint("gqa_tied_bf16")
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | RULES))
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
    mask = np.ones((2, 80), np.int32)
    mask[0, :13] = 0
    inputs = Inputs.of(np.random.default_rng(7).integers(0, 280, mask.shape), mask)
    return Bench("windows", *oracle.load(folder), inputs, exact, same)


class WindowsTest(parameterized.TestCase):
    def test_replay_computes_every_stage_as_the_float64_model(self):
        exact, inputs = bench().exact, bench().inputs
        trace = exact.trace(inputs)
        replay = Replay(exact.config, exact.parameters, inputs, trace)
        tokens = inputs.attention_mask == 1
        for key, value in trace.items():
            found, axis = replay.compute(key), 2 if stages.Key(key).per_pair else 1
            for row in range(2):
                theirs, ours = (np.take(x[row], np.flatnonzero(tokens[row]), axis=axis - 1) for x in (found, value))
                if axis == 2:
                    theirs, ours = (x[..., tokens[row]] for x in (theirs, ours))
                np.testing.assert_allclose(theirs, ours, rtol=1e-9, atol=1e-9, err_msg=key)

    @parameterized.parameters(
        ((), []),
        ((Planted("mask-without-window"),), [("mask-without-window", (1,))]),
        ((Planted("mask-window", (1,), {"window": 12}),), [("mask-window", (1,))]),
        ((Planted("mask-window", (0,), {"window": WINDOW}),), [("mask-window", (0,))]),
        ((Planted("rope-unscaled"),), [("rope-unscaled", "all")]),
        ((Planted("rope-scaling", None, {"rule": "linear", "factor": 4.0}),), [("rope-scaling", "all")]),
        ((Planted("rope-theta", None, {"theta": 1e4}),), [("rope-theta", "all")]),
    )
    def test_what_an_engine_makes_of_the_window_is_named(self, planted, expected):
        findings = bench().diagnose(bench().dump(planted)).findings
        self.assertEqual([(finding.fault, finding.layers) for finding in findings], expected)

    def test_without_a_window_there_is_none_to_leave_out(self):
        plain = Bench.of("gqa_tied_bf16")
        for key, value in plain.dump((Planted("mask-without-window"),)).items():
            np.testing.assert_array_equal(value, plain.dump(())[key], key)
        self.assertEqual(dataclasses.replace(plain.exact.config).window_layers, ())


if __name__ == "__main__":
    absltest.main()
