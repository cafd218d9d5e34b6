"""RoPE rules and sliding windows on an NVIDIA GPU: windows hold beside the kernels, float32 gives the CPU's text."""

import functools
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.generate.generator import Generator
from apr_jax.kernels.fastest_ops import ops_for
from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.qwen2 import OPS
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs
from tests import paths

RULES = {
    "windows and YaRN": {
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "dynamic": {"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 8.0}},
}


@functools.cache
def written(name: str) -> pathlib.Path:
    base = paths.checkpoint("gqa_tied_bf16")
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | RULES[name]))
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    return folder


def loaded(name: str, dtype: str, device: str) -> LanguageModel:
    model = load_model(written(name), dtype, device, fused=device == "cuda")
    return model.with_ops(ops_for(model.config, model.dtype, model.device, model.fused))


class RulesCudaTest(parameterized.TestCase):
    def error(self, model: LanguageModel, exact: np.ndarray, ids: np.ndarray, prompt: int) -> float:
        """How far logits of a prompt and of single steps behind it are off."""
        cache, parts = model.empty_cache(len(ids), 512), []
        for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
            positions = np.broadcast_to(np.arange(start, end), (len(ids), end - start))
            logits, cache = model.step(Inputs.of(ids[:, start:end], None, positions), cache)
            parts.append(np.asarray(logits, np.float64))
        return relative_l2(np.concatenate(parts, axis=1), exact)

    @parameterized.product(name=list(RULES)[:1], batch=(1, 3), prompt=(20, 300))
    def test_bfloat16_with_kernels_is_as_near_as_without_in_prompts_and_steps(self, name, batch, prompt):
        ids = np.random.default_rng(batch).integers(0, 280, (batch, prompt + 60))
        exact = np.asarray(load_model(written(name), "float64", "cpu").logits(Inputs.of(ids)))
        model = loaded(name, "bfloat16", "cuda")
        self.assertIsNot(model.ops, OPS)
        kernels, plain = (self.error(m, exact, ids, prompt) for m in (model, model.with_ops(OPS)))
        print(f"{name}, {batch} x {prompt}: relative L2 with kernels {kernels:.2e}, with plain operations {plain:.2e}")
        self.assertLess(kernels, 1.5 * plain)
        base = load_model(paths.checkpoint("gqa_tied_bf16"), "float64", "cpu")
        self.assertGreater(relative_l2(np.asarray(base.logits(Inputs.of(ids))), exact), 3 * plain, "the rules show")

    @parameterized.parameters(list(RULES))
    def test_greedy_tokens_of_unequal_prompts_are_the_cpus(self, name):
        random = np.random.default_rng(0)
        prompts = [random.integers(0, 280, length).tolist() for length in (50, 5, 90)]
        rows = []
        for device in ("cpu", "cuda"):
            made = Generator(loaded(name, "float32", device)).generate(prompts, max_new_tokens=80, eos_token_id=())
            rows.append([row.token_ids for row in made])
        self.assertEqual(*rows)


if __name__ == "__main__":
    absltest.main()
