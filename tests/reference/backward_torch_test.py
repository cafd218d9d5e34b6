"""Backward parity beside torch: the NumPy engine is autograd's equal, captured gradients are right."""

import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax import capture
from apr_jax.converters.errors import RefusedError
from apr_jax.load.load_model import load_model
from apr_jax.parity import dumps
from apr_jax.parity.backward.diagnose import diagnose_backward, undumped_values
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace import hf_reference
from apr_jax.trace.inputs import seeded
from tests import oracle, paths
from tests.battery.backward_engine import backward

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)

import torch
from transformers.models.qwen2 import modeling_qwen2 as qwen2

NAME = "gqa_tied_bf16"


class EngineTest(parameterized.TestCase):
    @parameterized.parameters(NAME, "mha_untied_f32_sharded")
    def test_the_numpy_engine_is_torchs_autograd_in_float64(self, name):
        ids = np.array(seeded(283, 2, 40).input_ids)
        mask = np.ones_like(ids)
        mask[0, :6] = 0
        dump = backward(*oracle.load(paths.checkpoint(name)), ids, mask, None, (), "float64")
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        predicted = (mask[:, :-1] & mask[:, 1:]).astype(bool)
        with hf_reference.float64_patched():
            found = hf_reference.gradients(str(paths.checkpoint(name)), ids, mask, positions, predicted, "float64")[1]
        self.assertGreater(len(found), 25)
        for key, value in found.items():
            np.testing.assert_allclose(
                dump[f"grad.{key}"], value, rtol=0, atol=1e-10 * np.abs(value).max(), err_msg=key
            )


class Rope(torch.autograd.Function):
    """RoPE whose backward pass rotates forwards once more, or not at all."""

    @staticmethod
    def forward(ctx, x, cos, sin, back):
        ctx.tables, ctx.back = (cos, sin), back
        return x * cos + qwen2.rotate_half(x) * sin

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.tables
        return (g * cos + qwen2.rotate_half(g) * sin if ctx.back == "forwards" else g), None, None, None


class CapturedTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(tempfile.mkdtemp()) / "dump"
        self.addCleanup(shutil.rmtree, self.folder.parent)

    def model(self):
        return hf_reference.load(str(paths.checkpoint(NAME)), "float32")

    def captured(self, model, **more):
        ids = torch.tensor(seeded(283, 2, 64).input_ids.astype(np.int64))
        labels = ids.clone()
        labels[1, :9] = -100
        with capture.torch(model, self.folder, gradients=True):
            model(ids, labels=labels, use_cache=False, **more).loss.backward()
        exact = load_model(paths.checkpoint(NAME), "float64", "cpu")
        same = load_model(paths.checkpoint(NAME), "float32", "cpu")
        dump = dumps.read(self.folder, exact.config, backward=True)
        before = diagnose(exact, same, dump.inputs, dump.values)
        rounded = undumped_values(same, before.replay)
        counted = dump.labels >= 0
        self.assertEqual(int(counted.sum()), 2 * 64 - 9)
        back = diagnose_backward(before.replay, before.explained, dump.gradients, counted, "float32", rounded)
        return before.findings, back

    @parameterized.parameters(False, True)
    def test_a_right_model_has_no_finding(self, checkpointed):
        model = self.model()
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        forward, back = self.captured(model)
        self.assertEqual((forward, back.findings, dict(back.unexamined)), ((), (), {}))
        self.assertGreater(len(back.sites), 55)

    @parameterized.parameters(("forwards", "backward-rope-direction"), ("not", "backward-rope-missing"))
    def test_an_autograd_function_that_is_wrong_is_named(self, back, name):
        def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
            cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            return Rope.apply(q, cos, sin, back), Rope.apply(k, cos, sin, back)

        right = qwen2.apply_rotary_pos_emb
        qwen2.apply_rotary_pos_emb = apply_rotary_pos_emb
        self.addCleanup(setattr, qwen2, "apply_rotary_pos_emb", right)
        forward, found = self.captured(self.model())
        self.assertEqual(forward, ())
        (finding,) = found.findings
        self.assertEqual((finding.fault, finding.layers), (name, "all"))
        self.assertEqual(finding.parameters["of"], "q and k")

    def test_a_block_without_a_backward_pass_is_refused(self):
        ids = torch.tensor([[1, 2, 3]])
        model = self.model()
        refused = self.assertRaisesRegex(RefusedError, "no gradient was captured")
        with refused, torch.no_grad(), capture.torch(model, self.folder, gradients=True):
            model(ids)


if __name__ == "__main__":
    absltest.main()
