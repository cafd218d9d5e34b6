"""The HuggingFace witness against the float64 oracle, stage by stage, and that it takes genuine values only."""

from __future__ import annotations

import pathlib
import shutil
import sys
import tempfile
from typing import Any
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from apr_jax.converters.errors import MissingFileError, RefusedError, UsageError  # noqa: E402
from apr_jax.trace import hf_reference  # noqa: E402
from tests import oracle  # noqa: E402

CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
STAGES = 2 + 17 * 2  # embedding, final norm, and 17 in each of two layers

# Relative L2 of any stage, 3 x 97 tokens with padding. Measured: float32 up to 1.3e-6, bfloat16 up to 3.2e-2 and at
# least 1e-2 in the logits, patched float64 up to 3e-15.
FLOAT32, FLOAT64, BFLOAT16 = 3e-6, 1e-12, (5e-3, 6e-2)


def _inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns 3 x 97 tokens, the first row padded on the left, the second on the right."""
    ids = np.random.default_rng(11).integers(0, config["vocab_size"], (3, 97))
    mask = np.ones_like(ids)
    mask[0, :17] = 0
    mask[1, -23:] = 0
    return ids, mask


def _errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, float]:
    """Returns key -> relative L2 over the positions that are not padding."""
    errors = {}
    for key, value in expected.items():
        assert found[key].shape == value.shape, (key, found[key].shape, value.shape)
        real = mask[:, None, :] if value.ndim == 4 else mask
        real = np.broadcast_to(real[..., None] != 0, value.shape)
        errors[key] = float(np.linalg.norm((found[key] - value)[real]) / np.linalg.norm(value[real]))
    return errors


@absltest.skipUnless(hf_reference.available(), "torch and transformers (the reference extra) are not installed")
class HfReferenceTest(parameterized.TestCase):
    def _oracle(self, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        weights, config = oracle.load(CHECKPOINTS / name)
        ids, mask = _inputs(config)
        logits, stages = oracle.forward(weights, config, ids, mask)
        return ids, mask, {"logits": logits} | {f"stage.{key}": value for key, value in stages.items()}

    @parameterized.parameters(*NAMES)
    def test_float32_agrees_with_the_oracle_at_every_stage(self, name: str) -> None:
        ids, mask, expected = self._oracle(name)
        found = hf_reference.run(CHECKPOINTS / name, ids, mask, trace=True)
        errors = _errors(found, expected, mask)
        self.assertLen(errors, STAGES + 1)
        self.assertEqual(set(found), set(expected))
        self.assertTrue(all(value.dtype == np.float32 for value in found.values()))
        self.assertLess(max(errors.values()), FLOAT32, errors)
        self.assertEqual(errors["stage.embedding"], 0.0)
        print(f"{name}: float32 logits {errors['logits']:.1e}, worst stage {max(errors.values()):.1e}")

    @parameterized.parameters(*NAMES)
    def test_patched_float64_equals_the_oracle_at_every_stage(self, name: str) -> None:
        ids, mask, expected = self._oracle(name)
        with hf_reference.float64_patched():
            found = hf_reference.run(CHECKPOINTS / name, ids, mask, dtype="float64", trace=True)
        errors = _errors(found, expected, mask)
        self.assertLen(errors, STAGES + 1)
        self.assertTrue(all(value.dtype == np.float64 for value in found.values()))
        self.assertLess(max(errors.values()), FLOAT64, errors)

    @parameterized.parameters(*NAMES)
    def test_bfloat16_is_really_bfloat16(self, name: str) -> None:
        ids, mask, expected = self._oracle(name)
        found = hf_reference.run(CHECKPOINTS / name, ids, mask, dtype="bfloat16", trace=True)
        errors = _errors(found, expected, mask)
        self.assertBetween(errors["logits"], *BFLOAT16)
        self.assertLess(max(errors.values()), BFLOAT16[1], errors)
        for key, value in found.items():
            self.assertTrue((value.view(np.uint32) & 0xFFFF == 0).all(), f"{key} holds more than bfloat16")
        print(f"{name}: bfloat16 logits {errors['logits']:.1e}, worst stage {max(errors.values()):.1e}")

    def test_hidden_states_are_the_inputs_of_the_layers_and_come_only_when_asked_for(self) -> None:
        ids, mask, expected = self._oracle("gqa_tied_bf16")
        folder = CHECKPOINTS / "gqa_tied_bf16"
        self.assertEqual(list(hf_reference.run(folder, ids, mask)), ["logits"])
        found = hf_reference.run(folder, ids, mask, hidden_states=True)
        wanted = {
            "hidden.0": expected["stage.embedding"],
            "hidden.1": expected["stage.0.post_ffn_residual"],
            "hidden.final_norm": expected["stage.final_norm"],
        }
        self.assertEqual(set(found), {"logits", *wanted})
        self.assertLess(max(_errors(found, wanted, mask).values()), FLOAT32)

    def test_tracing_does_not_change_the_logits(self) -> None:
        folder = CHECKPOINTS / "mqa_f16"
        ids, mask = _inputs({"vocab_size": 288})
        plain = hf_reference.run(folder, ids, mask)["logits"]
        traced = hf_reference.run(folder, ids, mask, trace=True, hidden_states=True)["logits"]
        np.testing.assert_array_equal(plain, traced)

    def test_the_patches_end_with_the_context_and_are_what_makes_float64_exact(self) -> None:
        weights, config = oracle.load(CHECKPOINTS / "mqa_f16")
        ids, _ = _inputs(config)
        expected = {"logits": oracle.forward(weights, config, ids)[0]}
        mask = np.ones_like(ids)
        with hf_reference.float64_patched():
            hf_reference.run(CHECKPOINTS / "mqa_f16", ids, dtype="float64", trace=True)
        found = hf_reference.run(CHECKPOINTS / "mqa_f16", ids, dtype="float64")
        self.assertBetween(_errors(found, expected, mask)["logits"], 1e-9, 3e-6)

    def test_everything_wrapped_is_restored_also_after_an_error(self) -> None:
        import torch
        from transformers.models.qwen2 import modeling_qwen2 as qwen2

        functions = (qwen2.apply_rotary_pos_emb, qwen2.eager_attention_forward, torch.nn.functional.softmax)
        norm = qwen2.Qwen2RMSNorm.forward
        with self.assertRaises(IndexError), hf_reference.float64_patched():
            hf_reference.run(CHECKPOINTS / "mqa_f16", [[10**6]], trace=True)
        self.assertIs(norm, qwen2.Qwen2RMSNorm.forward)
        self.assertEqual(
            functions, (qwen2.apply_rotary_pos_emb, qwen2.eager_attention_forward, torch.nn.functional.softmax)
        )

    @parameterized.parameters(
        ("rope-adjacent-pairs", "stage.0.q_post_rope"),
        ("rms-norm-eps", "stage.0.attn_norm"),
        ("kv-heads-interleaved", "stage.0.attn_scores"),
    )
    def test_a_fault_planted_in_transformers_shows_at_its_stage_and_in_the_logits(self, fault: str, stage: str) -> None:
        import torch
        from transformers.models.qwen2 import modeling_qwen2 as qwen2

        def adjacent(x: Any) -> Any:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)

        def eps(self: Any, x: Any) -> Any:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

        def interleaved(x: Any, count: int) -> Any:
            return x.repeat(1, count, 1, 1)

        planted = {
            "rope-adjacent-pairs": mock.patch.object(qwen2, "rotate_half", adjacent),
            "rms-norm-eps": mock.patch.object(qwen2.Qwen2RMSNorm, "forward", eps),
            "kv-heads-interleaved": mock.patch.object(qwen2, "repeat_kv", interleaved),
        }[fault]
        ids, mask, expected = self._oracle("gqa_tied_bf16")
        with planted:
            errors = _errors(hf_reference.run(CHECKPOINTS / "gqa_tied_bf16", ids, mask, trace=True), expected, mask)
        wrong = [key for key in expected if errors[key] > FLOAT32]
        self.assertGreater(errors["logits"], 1e-3)
        # The first stage beyond the bar, in order of execution, is the one at fault.
        order = [key for key in expected if key != "logits"]
        self.assertEqual(min(order.index(key) for key in wrong if key != "logits"), order.index(stage))

    def test_a_missing_tensor_is_refused_rather_than_invented(self) -> None:
        from safetensors.torch import load_file, save_file

        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch) / "model"
            shutil.copytree(CHECKPOINTS / "mqa_f16", folder)
            tensors = load_file(folder / "model.safetensors")
            del tensors["model.layers.1.self_attn.q_proj.bias"]
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            with self.assertRaisesRegex(RefusedError, "layers.1.self_attn.q_proj.bias"):
                hf_reference.run(folder, [[1, 2, 3]])

    def test_a_name_that_is_no_folder_is_never_looked_up_elsewhere(self) -> None:
        with self.assertRaises(MissingFileError):
            hf_reference.run("Qwen/Qwen2.5-0.5B", [[1, 2, 3]])

    def test_an_unknown_dtype_is_refused(self) -> None:
        with self.assertRaisesRegex(UsageError, "int8"):
            hf_reference.run(CHECKPOINTS / "mqa_f16", [[1]], dtype="int8")  # type: ignore[arg-type]

    @parameterized.parameters(*NAMES)
    def test_the_tokenizer_and_its_chat_template_work_in_transformers(self, name: str) -> None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINTS / name)
        text = "The tea, häße 漢字\n 12345"
        self.assertEqual(tokenizer.decode(tokenizer(text)["input_ids"]), text)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "tea"}], add_generation_prompt=True, tokenize=False
        )
        self.assertEndsWith(chat, "<|im_start|>user\ntea<|im_end|>\n<|im_start|>assistant\n")
        self.assertEqual((tokenizer.eos_token_id, tokenizer.pad_token_id), (282, 280))


class WithoutTorchTest(absltest.TestCase):
    def test_missing_packages_are_named_with_the_command_that_installs_them(self) -> None:
        with (
            mock.patch.dict(sys.modules, {"torch": None}),
            self.assertRaisesRegex(UsageError, r"pip install '\S+\[reference\]'"),
        ):
            hf_reference.run(CHECKPOINTS / "mqa_f16", [[1]])


if __name__ == "__main__":
    absltest.main()
