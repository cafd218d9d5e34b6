"""Published configurations against live HuggingFace: what opens computes the same, RoPE rules and windows included."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from apr_jax import load_model
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.generate.generator import Generator
from apr_jax.model import rotary
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace import hf_reference, stages
from apr_jax.trace.compare import compare, relative_l2
from apr_jax.trace.inputs import Inputs
from tests.published_configurations import CONFIGURATIONS, Published, scaled

OPENED = [published for published in CONFIGURATIONS if published.refused is None]
BY_NAME = {published.name: published for published in CONFIGURATIONS}
BITE = (
    "Qwen2.5-7B-Instruct with YaRN",
    "LLaMA-Factory, dynamic",
    "LLaMA-Factory, llama3",
    "LongRoPE",
    "windows in every other layer",
    "windows and YaRN",
)
"""In which a rule or a window bites at 97 tokens, one of each kind."""
LONG = ["LLaMA-Factory, dynamic", "LongRoPE", "windows and YaRN"]
"""In which it depends on the length what happens."""


def batch() -> Inputs:
    """Two rows of 97 and 70 tokens, the shorter one padded on the left."""
    ids = np.random.default_rng(5).integers(0, 280, (2, 97))
    mask = np.ones(ids.shape, int)
    mask[1, :27] = 0
    return Inputs.of(ids, mask)


def write(folder: pathlib.Path, config: dict) -> pathlib.Path:
    """Writes a checkpoint of random weights, large enough for attention to depend on where tokens stand."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    tensors = {}
    for name, shape in Qwen2Config.from_hf(config).tensor_shapes().items():
        scale = 0.2 if name.endswith("bias") else 2 / np.sqrt(shape[-1]) if "self_attn" in name else 0.1
        tensors[name] = (random.normal(size=shape) * scale + name.endswith("norm.weight")).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class AgainstHuggingFaceTest(parameterized.TestCase):
    def folder(self, published: Published) -> pathlib.Path:
        return write(pathlib.Path(self.create_tempdir().full_path), scaled(published.config))

    def huggingface(self, folder: pathlib.Path, inputs: Inputs, **what) -> dict[str, np.ndarray]:
        return hf_reference.run(folder, inputs.input_ids, inputs.attention_mask, inputs.position_ids, **what)

    def test_every_configuration_that_opens_gives_huggingfaces_logits(self):
        inputs, worst, computed = batch(), 0.0, {}
        tokens = inputs.attention_mask == 1
        for published in OPENED:
            folder = self.folder(published)
            with open_checkpoint(folder) as checkpoint:
                config = checkpoint.model_config()
            if config not in computed:
                # Operation by operation: compiling thirty programs would take most of a minute.
                module = load_model(folder).module
                computed[config] = np.asarray(module(inputs.input_ids, attention_mask=inputs.attention_mask))[tokens]
            if published.name == "nulls":
                # transformers 5 refuses null there; absent is its default.
                spoken = {key: value for key, value in scaled(published.config).items() if value is not None}
                (folder / "config.json").write_text(json.dumps(spoken))
            theirs = self.huggingface(folder, inputs)[stages.LOGITS][tokens]
            error = relative_l2(computed[config], theirs)
            self.assertLess(error, 1e-5, published.name)
            worst = max(worst, error)
        self.assertGreaterEqual(len(OPENED), 60)
        self.assertGreater(len(computed), 15)
        print(f"{len(OPENED)} configurations, {len(computed)} different models: worst relative L2 {worst:.2e}")
        # Each rule and each window makes another model of the same weights.
        plain = computed[Qwen2Config.from_hf(scaled(BY_NAME["Qwen2.5-7B"].config))]
        for name in BITE:
            config = Qwen2Config.from_hf(scaled(BY_NAME[name].config))
            if config.num_layers == 2 and not config.tie_word_embeddings:
                self.assertGreater(relative_l2(computed[config], plain), 1e-2, name)

    @parameterized.parameters(LONG)
    def test_every_stage_is_huggingfaces_and_parity_finds_nothing(self, name):
        folder, inputs = self.folder(BY_NAME[name]), batch()
        theirs = self.huggingface(folder, inputs, trace=True)
        model, exact = load_model(folder), load_model(folder, "float64")
        results = compare(model.trace(inputs), theirs, inputs, lambda key: 1e-5, config=model.config)
        self.assertLen(results, len(list(stages.trace_keys(model.config.num_layers))))
        self.assertEmpty([result for result in results if not result.within])
        self.assertEqual(diagnose(exact, model, inputs, theirs).findings, ())
        with hf_reference.float64_patched():
            wide = self.huggingface(folder, inputs, dtype="float64")[stages.LOGITS]
        tokens = inputs.attention_mask == 1
        self.assertLess(relative_l2(np.asarray(exact.logits(inputs))[tokens], wide[tokens]), 1e-12)

    @parameterized.parameters(LONG)
    def test_generated_tokens_are_huggingfaces_across_the_lengths_at_which_rules_and_windows_bite(self, name):
        import torch

        folder = self.folder(BY_NAME[name])
        random, lengths = np.random.default_rng(2), (50, 30)
        prompts = [random.integers(0, 280, length).tolist() for length in lengths]
        longest = max(lengths)
        ids = np.array([[280] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        theirs = hf_reference.load(folder).generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=36,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=280,
        )
        # A first chunk and later ones, and a cache that is longer than the window.
        generator = Generator(load_model(folder), prefill_chunk=32)
        ours = generator.generate(prompts, max_new_tokens=36, eos_token_id=())
        for row, text in enumerate(ours):
            self.assertEqual(list(text.token_ids), theirs[row, longest:].tolist())

    def test_inverse_frequencies_and_attention_factors_are_bit_equal_to_transformers(self):
        import torch
        from transformers import Qwen2Config as Theirs
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        compared = 0
        for published in OPENED:
            config = Qwen2Config.from_hf(published.config)
            if config.rope_scaling is None or config.head_dim % 64:
                continue
            made = Theirs(**json.loads(json.dumps(published.config)))
            for length in (1, 40_000, 140_000):
                embedding = Qwen2RotaryEmbedding(made)
                embedding(torch.zeros(1), torch.tensor([[length - 1]]))
                ours, factor = rotary.frequencies(config, length)
                np.testing.assert_array_equal(ours, embedding.inv_freq.numpy(), f"{published.name} {length}")
                self.assertEqual(factor, embedding.attention_scaling)
                compared += 1
        self.assertGreater(compared, 25)


if __name__ == "__main__":
    absltest.main()
