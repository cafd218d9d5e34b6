"""Which table of operations a model gets, and what the CUDA table makes of a program, without a GPU.

That the kernels compute the right thing is shown on a GPU, in tests/cuda/variants_test.py.
"""

import dataclasses
import pathlib
import re
import sys
import types
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.cuda import custom_call, decode_layers, nvrtc
from apr_jax.kernels import fastest_ops
from apr_jax.kernels.cpu_ops import CPU_OPS
from apr_jax.load.load_model import load_model
from apr_jax.model import qwen2
from apr_jax.model.language_model import model_graph
from apr_jax.model.qwen2 import OPS, Cache, Qwen2ForCausalLM
from tests import paths

HALF_BILLION = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64, 1e6, 1e-6, True)
ONE_AND_A_HALF = Qwen2Config(151936, 1536, 8960, 28, 12, 2, 128, 1e6, 1e-6, True)
SEVEN = Qwen2Config(152064, 3584, 18944, 28, 28, 4, 128, 1e6, 1e-6, False)
TINY = Qwen2Config(288, 64, 160, 2, 4, 2, 16, 1e6, 1e-6, True)
H200 = types.SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
ADJACENT_PAIRS = "x[d] * cos[d / 2] + (d % 2 ? x[d - 1] : -x[d + 1]) * sin[d / 2]"


def kernels_of(config, batch, length, slots, ops=None, layer_ops=qwen2.NO_OVERRIDES, first=False):
    """Lowers a step for CUDA; returns the names of its kernels in order, their sources, and how many arrays alias."""
    graph = model_graph(config, "bfloat16", True)
    state = nnx.state(nnx.eval_shape(lambda: Qwen2ForCausalLM(config, jnp.bfloat16, True)))
    parameters = nnx.to_pure_dict(state)
    cache = jax.eval_shape(lambda: Cache.empty(config, batch, slots, jnp.bfloat16)) if slots else None
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    angles = jax.ShapeDtypeStruct((max(slots, length), config.head_dim // 2), jnp.float32)
    table = fastest_ops.cuda_ops(132) if ops is None else ops

    def step(parameters, ids, positions, cos, sin, cache):
        model = nnx.merge(graph, parameters)
        return model.hidden(ids, positions, cos, sin, cache, table, layer_ops, first)

    sources = []
    with mock.patch.object(nvrtc, "ptx", lambda text: sources.append(text) or "PTX"):
        traced = jax.jit(step, donate_argnums=5).trace(parameters, tokens, tokens, angles, angles, cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if custom_call.TARGET in line]
    names = [re.search(r'name = "(\w+)"', line)[1] for line in calls]
    return names, sources, [line.count("output_operand_alias<") for line in calls]


class ChoiceTest(parameterized.TestCase):
    def choose(self, config=HALF_BILLION, dtype="bfloat16", fused=True, library="NVRTC", **changes):
        device = types.SimpleNamespace(**{**vars(H200), **changes})
        with mock.patch.object(nvrtc, "library", return_value=library):
            return fastest_ops.ops_for(config, dtype, device, fused)

    @parameterized.parameters(HALF_BILLION, ONE_AND_A_HALF, SEVEN, TINY)
    def test_bfloat16_fused_on_an_h200_takes_the_kernels(self, config):
        self.assertIs(self.choose(config), fastest_ops.cuda_ops(132))

    @parameterized.parameters(
        {"dtype": "float32"},
        {"dtype": "float64"},
        {"fused": False},
        {"library": None},
        {"compute_capability": "8.0"},
        {"compute_capability": "10.0"},
        {"platform": "tpu"},
        {"config": dataclasses.replace(TINY, head_dim=10)},
        {"config": dataclasses.replace(TINY, head_dim=24)},
        {"config": dataclasses.replace(TINY, head_dim=256)},
        {"config": dataclasses.replace(TINY, hidden_size=66)},
    )
    def test_everything_else_takes_the_plain_operations(self, **changes):
        self.assertIs(self.choose(**changes), OPS)

    def test_a_cpu_takes_its_own_table(self):
        self.assertIs(fastest_ops.ops_for(TINY, "float32", jax.devices("cpu")[0], fused=True), CPU_OPS)

    @parameterized.parameters(
        (HALF_BILLION, 132, 1, True),
        (HALF_BILLION, 132, 8, True),
        (HALF_BILLION, 132, 9, False),
        (HALF_BILLION, 114, 1, False),
        (ONE_AND_A_HALF, 132, 1, False),
        (ONE_AND_A_HALF, 132, 2, False),
        (SEVEN, 132, 1, False),
        (SEVEN, 132, 8, False),
        (TINY, 132, 1, True),
        (TINY, 132, 3, True),
        (dataclasses.replace(TINY, head_dim=4), 132, 1, False),
    )
    def test_the_whole_token_kernels_take_what_fits_their_registers(self, config, multiprocessors, rows, fits):
        self.assertEqual(decode_layers.supports(config, multiprocessors, rows), fits)


class ProgramTest(parameterized.TestCase):
    def test_a_token_of_one_row_is_one_kernel_that_writes_every_cache_in_place(self):
        names, sources, aliases = kernels_of(HALF_BILLION, 1, 1, 256)
        self.assertEqual(names, ["decode"])
        self.assertEqual(aliases, [1 + 2 * HALF_BILLION.num_layers])
        self.assertIn("#define GRID 132\n", sources[0])

    @parameterized.parameters(2, 8)
    def test_a_token_of_up_to_eight_rows_is_one_kernel_too(self, rows):
        names, sources, aliases = kernels_of(HALF_BILLION, rows, 1, 256)
        self.assertEqual((names, aliases), (["decode_rows"], [1 + 2 * HALF_BILLION.num_layers]))
        self.assertIn(f"#define ROWS {rows}\n", sources[0])

    def test_a_token_of_more_rows_has_one_attention_kernel_a_layer(self):
        names, _, aliases = kernels_of(TINY, 9, 1, 64)
        self.assertEqual((names, aliases), (["attention"] * 2, [2, 2]))

    def test_a_token_of_a_large_model_multiplies_long_rows_in_a_kernel(self):
        config = dataclasses.replace(TINY, intermediate_size=8192)
        self.assertEqual(kernels_of(config, 1, 1, 64)[0], ["attention", "matvec"] * 2)
        self.assertEqual(kernels_of(config, 2, 1, 64)[0], ["attention"] * 2)

    def test_long_caches_of_few_heads_stay_with_xla(self):
        config = dataclasses.replace(TINY, intermediate_size=8192)
        self.assertEqual(kernels_of(config, 1, 1, 2048)[0], ["matvec"] * 2)

    def test_a_long_prompt_adds_and_norms_in_one_kernel(self):
        names, _, _ = kernels_of(TINY, 3, 96, 0)
        self.assertEqual(names, ["add_norm", "swiglu", "add_norm", "add_norm", "swiglu"])

    def test_a_model_of_one_layer_takes_the_kernels_too(self):
        config = dataclasses.replace(TINY, num_layers=1)
        self.assertEqual(kernels_of(config, 1, 1, 64)[0], ["decode"])
        self.assertEqual(kernels_of(config, 3, 96, 0)[0], ["add_norm", "swiglu"])

    def test_shapes_that_the_activation_kernel_does_not_take_stay_with_xla(self):
        self.assertNotIn("swiglu", kernels_of(dataclasses.replace(TINY, intermediate_size=164), 3, 96, 0)[0])
        self.assertIn("swiglu", kernels_of(TINY, 65_535, 4, 0)[0])
        self.assertNotIn("swiglu", kernels_of(TINY, 65_536, 4, 0)[0])

    def test_windows_are_kept_from_kernels_that_know_none_where_they_bite(self):
        config = dataclasses.replace(TINY, sliding_window=48, window_layers=(1,))
        self.assertEqual(kernels_of(config, 1, 1, 48)[0], ["decode"])
        self.assertEqual(kernels_of(config, 1, 1, 64)[0], ["attention"])
        self.assertEqual(kernels_of(config, 3, 1, 48)[0], ["decode_rows"])
        self.assertEqual(kernels_of(config, 9, 1, 48)[0], ["attention"] * 2)
        self.assertEqual(kernels_of(config, 3, 1, 64)[0], ["attention"])

    def test_flash_attention_takes_no_layer_with_a_window(self):
        q, k, v = (jnp.zeros((1, 64, heads, 16), jnp.bfloat16) for heads in (4, 2, 2))
        positions = jnp.arange(64)[None]
        for window, expected in ((None, True), (48, False)):
            with mock.patch.object(jax.nn, "dot_product_attention", return_value=q) as flash:
                fastest_ops.causal_attention(OPS, q, k, v, positions, positions, qwen2.pass_on, window)
            self.assertEqual(flash.called, expected)
        windowed = dataclasses.replace(TINY, sliding_window=48, window_layers=(1,))
        table = fastest_ops.cuda_ops(132)
        self.assertTrue(fastest_ops.prompts_keep_no_scores(TINY, table))
        self.assertFalse(fastest_ops.prompts_keep_no_scores(windowed, table))

    def test_a_short_prompt_stays_with_xla(self):
        self.assertEqual(kernels_of(TINY, 2, 16, 64, first=True)[0], [])

    def test_tables_of_single_layers_are_obeyed(self):
        names, _, _ = kernels_of(TINY, 1, 1, 64, layer_ops={1: OPS})
        self.assertEqual(names, [])

    @parameterized.parameters((1, 1), (3, 1), (9, 2))
    def test_another_rotation_reaches_the_kernels(self, batch, calls):
        _, sources, _ = kernels_of(TINY, batch, 1, 64, fastest_ops.cuda_ops(132, ADJACENT_PAIRS))
        self.assertLen(sources, calls)
        for source in sources:
            self.assertIn(f"#define ROTATE {ADJACENT_PAIRS}\n", source)

    @parameterized.parameters(*paths.NAMES)
    def test_the_projection_with_its_bias_equals_the_plain_one_to_a_rounding(self, name):
        model = load_model(paths.checkpoint(name), "bfloat16", "cpu", fused=True)
        attention = nnx.merge(model_graph(model.config, "bfloat16", True), model.parameters).model.layers[0].self_attn
        x = np.random.default_rng(0).standard_normal((2, 5, model.config.hidden_size)).astype(jnp.bfloat16)
        ours = fastest_ops.qkv(OPS, x, attention, qwen2.pass_on)
        plain = qwen2.qkv(OPS, x, attention, qwen2.pass_on)
        for got, expected in zip(ours, plain, strict=True):
            np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=2**-7, atol=2**-7)

    @absltest.skipUnless(nvrtc.library(), "NVRTC is not installed")
    def test_every_kernel_compiles(self):
        for config, batch, length, slots in [
            (TINY, 1, 1, 64),
            (HALF_BILLION, 1, 1, 256),
            (HALF_BILLION, 8, 1, 256),
            (TINY, 3, 1, 64),
            (TINY, 9, 1, 64),
            (TINY, 3, 96, 0),
        ]:
            for source in set(kernels_of(config, batch, length, slots)[1]):
                self.assertIn(".entry", nvrtc.ptx(source))

    @absltest.skipUnless(nvrtc.library(), "NVRTC is not installed")
    def test_a_source_that_does_not_compile_is_an_error_with_the_log(self):
        with self.assertRaisesRegex(nvrtc.CompileError, "undefined"):
            nvrtc.ptx('extern "C" __global__ void kernel() { missing(); }')

    def test_what_was_compiled_is_kept_beside_jaxs_programs(self):
        folder = self.create_tempdir().full_path
        self.addCleanup(jax.config.update, "jax_compilation_cache_dir", jax.config.values["jax_compilation_cache_dir"])
        jax.config.update("jax_compilation_cache_dir", folder)
        library = mock.Mock(nvrtcVersion=mock.Mock(return_value=0))
        with (
            mock.patch.object(nvrtc, "library", return_value=library),
            mock.patch.object(nvrtc, "_compile", side_effect=["first", "second", "third"]),
        ):
            compiled = [nvrtc.ptx.__wrapped__(source) for source in ("a", "a", "b", "a")]
        self.assertEqual(compiled, ["first", "first", "second", "first"])
        self.assertLen(list(pathlib.Path(folder).iterdir()), 2)

    def test_without_nvrtc_a_kernel_is_an_error(self):
        with (
            mock.patch.object(nvrtc, "library", return_value=None),
            self.assertRaisesRegex(nvrtc.CompileError, "installed"),
        ):
            nvrtc.ptx.__wrapped__("text")


if __name__ == "__main__":
    absltest.main()
