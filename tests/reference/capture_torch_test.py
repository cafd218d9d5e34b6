"""PyTorch models of other cuts and names, captured: right ones have no finding, five mistakes are named."""

import contextlib
import functools
import pathlib
import shutil
import sys
import tempfile

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

import torch

from tests.engines import torch_engines as engines
from tests.reference import parity_hf_test as planted

NAME = "gqa_tied_bf16"
EAGER = ("stale theta", "eps of one norm", "no biases", "window", "KV heads tiled", "no attention residual")
SDPA = ("stale theta", "eps of one norm", "no biases", "window", "no attention residual")
load = functools.lru_cache(load_model)


@functools.cache
def tensors(dtype="float32"):
    return hf_reference.load(paths.checkpoint(NAME), dtype).state_dict()


def tokens(batch=1, length=70):
    return torch.tensor(seeded(283, batch, length).input_ids.astype(np.int64))


class CaptureTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(tempfile.mkdtemp()) / "dump"
        self.addCleanup(shutil.rmtree, self.folder.parent)

    def found(self, stages, dtype="float32"):
        """The names of the mistakes in the dump that was written."""
        exact = load(paths.checkpoint(NAME), "float64", "cpu")
        dump = dumps.read(self.folder, exact.config)
        self.assertEqual(dump.dtype, dtype)
        self.assertGreaterEqual(len(dump.values), stages)
        same = load(paths.checkpoint(NAME), dtype or "float32", "cpu")
        findings = diagnose(exact, same, dump.inputs, dump.values, dump.columns).findings
        return {finding.fault for finding in findings}, dump

    def custom(self, mistake=None, dtype="float32"):
        config = load(paths.checkpoint(NAME), "float64", "cpu").config
        model = engines.Custom(config, mistake)
        model.load_state_dict(engines.custom_state(tensors(dtype)))
        return model.to(getattr(torch, dtype)).eval()

    def flat(self, mistake=None):
        config = load(paths.checkpoint(NAME), "float64", "cpu").config
        model = engines.Flat(config, mistake)
        model.load_state_dict(engines.flat_state(tensors()))
        return model.eval()

    @parameterized.parameters(None, *engines.MISTAKES)
    def test_a_model_with_names_of_its_own(self, mistake):
        model = self.custom(mistake)
        with torch.inference_mode(), capture.torch(model, self.folder, names=engines.Custom.NAMES):
            model(tokens())
        found, _ = self.found(stages=35)
        self.assertEqual(found, {engines.MISTAKES[mistake]} if mistake else set())

    @parameterized.parameters("bfloat16", "float16")
    def test_the_dtype_is_kept(self, dtype):
        model = self.custom(dtype=dtype)
        with torch.inference_mode(), capture.torch(model, self.folder, names=engines.Custom.NAMES):
            model(tokens())
        found, _ = self.found(35, dtype)
        self.assertEqual(found, set())

    @parameterized.parameters(None, *engines.MISTAKES)
    def test_fused_projections_and_norms_that_add_as_in_vllm(self, mistake):
        model = self.flat(mistake)
        with torch.inference_mode(), capture.torch(model, self.folder):
            model(tokens()[0], torch.arange(70))
        found, dump = self.found(stages=28)
        self.assertEqual(found, {engines.MISTAKES[mistake]} if mistake else set())
        self.assertContainsSubset(
            {"stage.0.post_ffn_residual", "stage.1.post_ffn_residual", "stage.1.post_attn_residual"}, dump.values
        )

    @parameterized.parameters(None, *EAGER)
    def test_transformers_in_eager_mode(self, case):
        name, plant, expected = planted.CASES[case] if case else (NAME, contextlib.nullcontext, [])
        self.assertEqual(name, NAME)
        inputs = planted.batch()
        ids, mask = (torch.tensor(each.astype(np.int64)) for each in (inputs.input_ids, inputs.attention_mask))
        with plant(), torch.inference_mode():
            model = hf_reference.load(paths.checkpoint(NAME))
            with capture.torch(model, self.folder):
                model(ids, attention_mask=mask)
        found, dump = self.found(stages=20)
        self.assertEqual(found, {fault for fault, _, _ in expected})
        np.testing.assert_array_equal(dump.inputs.attention_mask, inputs.attention_mask)

    @parameterized.parameters(None, *SDPA)
    def test_transformers_with_sdpa_which_shows_neither_scores_nor_shares(self, case):
        _, plant, expected = planted.CASES[case] if case else (NAME, contextlib.nullcontext, [])
        inputs = planted.batch()
        ids, mask = (torch.tensor(each.astype(np.int64)) for each in (inputs.input_ids, inputs.attention_mask))
        with plant(), torch.inference_mode():
            model = hf_reference.load(paths.checkpoint(NAME))
            model.set_attn_implementation("sdpa")
            with capture.torch(model, self.folder):
                model(ids, attention_mask=mask)
        found, dump = self.found(stages=20)
        self.assertEqual(found, {fault for fault, _, _ in expected})
        self.assertEqual([key for key in dump.values if key.endswith(("attn_scores", "attn_softmax"))], [])

    def test_hidden_states_and_attentions_of_transformers(self):
        """As `output_attentions` gives weights and no scores: judged, and a wrong mask is named."""
        with planted.CASES["window"][1](), torch.inference_mode():
            model = hf_reference.load(paths.checkpoint(NAME))
            made = model(tokens(), torch.ones(1, 70), output_attentions=True, output_hidden_states=True)
        arrays = {f"hidden_states.{index}": each.numpy() for index, each in enumerate(made.hidden_states)}
        arrays |= {f"attentions.{index}": each.numpy() for index, each in enumerate(made.attentions)}
        self.folder = self.folder.with_suffix(".npz")
        np.savez(self.folder, input_ids=tokens().numpy(), logits=made.logits.numpy(), **arrays)
        found, _ = self.found(stages=6, dtype=None)
        self.assertIn("mask-window", found)

    @parameterized.parameters(None, "pairs", "eps")
    def test_the_passes_that_sglang_writes(self, mistake):
        model, tensors, batch = self.flat(mistake), {}, "model.forward_batch_info"

        def hook(name):
            def take(_module, _args, output):
                many = output if isinstance(output, tuple) else (output,)
                given = [each.detach().clone() for each in many if each is not None]
                for index, each in enumerate(given):
                    tensors[name if len(given) == 1 else f"{name}.{index}"] = each

            return take

        for name, module in model.named_modules():
            module.register_forward_hook(hook(name))
        with torch.inference_mode():
            model(tokens()[0], torch.arange(70))
        tensors[f"{batch}.input_ids"] = tokens()[0]
        (self.folder / "TP0_PP0_Rank0_pid7").mkdir(parents=True)
        torch.save(tensors, self.folder / "TP0_PP0_Rank0_pid7" / "Pass00000.pt")
        found, _ = self.found(stages=20, dtype=None)
        self.assertEqual(found, {engines.MISTAKES[mistake]} if mistake else set())

    def test_a_prompt_and_its_decoding_steps(self):
        model = hf_reference.load(paths.checkpoint(NAME))
        with torch.inference_mode(), capture.torch(model, self.folder):
            made = model.generate(tokens()[:, :60], max_new_tokens=8, do_sample=False, eos_token_id=None)
        found, dump = self.found(stages=35)
        self.assertEqual((found, dump.columns), (set(), None))
        np.testing.assert_array_equal(dump.inputs.input_ids, made[:, :-1])

    def test_decoding_steps_alone(self):
        model = hf_reference.load(paths.checkpoint(NAME))
        ids = tokens()
        with torch.inference_mode():
            cache = model(ids[:, :64]).past_key_values
            with capture.torch(model, self.folder, input_ids=ids):
                for at in range(64, 70):
                    model(ids[:, at : at + 1], past_key_values=cache)
        found, dump = self.found(stages=35)
        self.assertEqual(found, set())
        np.testing.assert_array_equal(dump.columns, [range(64, 70)])


if __name__ == "__main__":
    absltest.main()
