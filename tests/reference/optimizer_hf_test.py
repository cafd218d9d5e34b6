"""Steps of torch.optim.AdamW have no finding; mistakes of AdamW beside torch's gradients are named."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.trace import hf_reference
from tests import paths
from tests.battery.faulty_adamw import is_vector
from tests.battery.optimizer_battery import FOUR, ONE, bench, outcome

if not hf_reference.available():
    pytest.skip("torch and transformers are not installed", allow_module_level=True)
import torch

PLANTED = (
    "adamw-bias-correction",
    "adamw-step-off-by-one",
    "adamw-betas-swapped",
    "adamw-beta second",
    "adamw-eps-in-root",
    "adamw-eps",
    "adamw-momentum-only",
    "adamw-lr",
    "adamw-schedule-off-by-one",
    "adamw-decay-in-moment",
    "adamw-decay-on-norms",
    "adamw-decay-unscaled",
    "adamw-weight-decay",
    "adamw-gradient-accumulated",
)


class Torch:
    """transformers' model of a checkpoint, float32."""

    def __init__(self, name, inputs):
        self.model = hf_reference.load(paths.checkpoint(name))
        self.ids = torch.tensor(inputs.input_ids.astype(np.int64))

    def backward(self):
        logits = self.model(self.ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), self.ids[:, 1:].reshape(-1))
        self.model.zero_grad()
        loss.backward()

    def gradients(self, parameters):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.tensor(parameters[name]))
        self.backward()
        return {name: parameter.grad.numpy().copy() for name, parameter in self.model.named_parameters()}

    def parameters(self):
        return {name: parameter.detach().numpy().copy() for name, parameter in self.model.named_parameters()}


class OptimizerTest(parameterized.TestCase):
    @parameterized.product(name=paths.NAMES, rates=(ONE, FOUR), fused=(False, True))
    def test_right_steps_of_torch_have_no_finding(self, name, rates, fused):
        place = bench(name, rates)
        theirs = Torch(name, place.inputs)
        groups = [
            {"params": [p for name, p in theirs.model.named_parameters() if is_vector(name)], "weight_decay": 0.0},
            {"params": [p for name, p in theirs.model.named_parameters() if not is_vector(name)], "weight_decay": 0.1},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.0, fused=fused)
        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            theirs.backward()
            optimizer.step()
        verdict = place.judge(theirs.parameters())
        how = f"{len(rates)} steps{', fused' if fused else ''}"
        print(f"{name}, {how}: {verdict.right.worst:.2f} times what rounding may do")
        self.assertTrue(verdict.within, verdict)

    @parameterized.parameters(*PLANTED)
    def test_a_mistake_beside_torchs_gradients_is_named(self, mistake):
        place = bench("mha_untied_f32_sharded", FOUR)
        theirs = Torch("mha_untied_f32_sharded", place.inputs)
        verdict = place.judge(place.planted(mistake, theirs.gradients))
        self.assertEqual(outcome(verdict, mistake), "exact", verdict)


if __name__ == "__main__":
    absltest.main()
