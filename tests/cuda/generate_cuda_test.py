"""Generation on an NVIDIA GPU: the CPU's tokens in float32, and a cache that is neither copied nor doubled."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.generate.generator import Generator, load_generator
from apr_jax.kernels.fastest_ops import ops_for
from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from tests import paths

GREEDY = {"do_sample": False, "eos_token_id": (), "max_new_tokens": 100}


def prompts(vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length).tolist() for length in (10, 1, 40)]


def on_cuda(name: str, dtype: str, fused: bool) -> LanguageModel:
    model = load_model(paths.checkpoint(name), dtype, "cuda", fused=fused)
    return model.with_ops(ops_for(model.config, model.dtype, model.device, model.fused))


class GenerateCudaTest(parameterized.TestCase):
    @parameterized.parameters(
        ("gqa_tied_bf16", True), ("gqa_untied_bf16", False), ("mqa_f16", True), ("head_dim_given", False)
    )
    def test_100_greedy_tokens_of_unequal_prompts_are_the_cpus(self, name, fused):
        rows = []
        for model in (load_model(paths.checkpoint(name), device="cpu"), on_cuda(name, "float32", fused)):
            made = Generator(model).generate(prompts(model.config.vocab_size), **GREEDY)
            rows.append([row.token_ids for row in made])
        self.assertEqual(*rows)

    def test_a_seed_draws_the_cpus_tokens(self):
        rows = [
            load_generator(paths.checkpoint("gqa_tied_bf16"), device=device).generate(
                "What is 2+2?", seed=5, max_new_tokens=50, eos_token_id=()
            )
            for device in ("cpu", "cuda")
        ]
        self.assertEqual(rows[0][0].token_ids, rows[1][0].token_ids)

    @parameterized.parameters("float32", "bfloat16")
    def test_the_decode_loop_never_copies_the_cache(self, dtype):
        generator = load_generator(paths.checkpoint("gqa_tied_bf16"), dtype, "cuda")
        generator.generate([[1, 2, 3]], do_sample=False, max_new_tokens=10)
        compiled = generator.programs._compiled
        text = next(program for key, program in compiled.items() if key[0] == "decode").as_text()
        cache = {"float32": "f32", "bfloat16": "bf16"}[dtype] + r"\[1,64,2,16\]"
        self.assertNotEmpty(re.findall(cache, text))
        self.assertEmpty(re.findall(rf"= {cache}\S* copy\(", text))

    def test_memory_is_given_back_and_the_cache_is_there_once(self):
        generator = load_generator(paths.checkpoint("mha_untied_f32_sharded"), device="cuda")
        long = [np.zeros(3000, np.int64).tolist()]
        generator.generate(long, do_sample=False, max_new_tokens=1000)
        before, arrays = generator.model.device.memory_stats()["bytes_in_use"], len(jax.live_arrays())
        for _ in range(3):
            generator.generate(long, do_sample=False, max_new_tokens=1000)
        self.assertLen(jax.live_arrays(), arrays)
        # The allocator's smallest blocks (256 bytes) are given back when a stream comes to it; a cache is a megabyte.
        self.assertLess(generator.model.device.memory_stats()["bytes_in_use"], before + 4096)


if __name__ == "__main__":
    absltest.main()
