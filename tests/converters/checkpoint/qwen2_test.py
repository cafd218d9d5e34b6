"""The configuration's allow-list, from config.json and from `.apr` metadata, and the tensor table."""

import json
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config, check_tensors
from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import apr_format
from apr_jax.converters.formats.dtypes import by_name
from tests import paths

PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
METADATA = {
    "architecture": "qwen2",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 300,
    "intermediate_size": 160,
    "rope_theta": 5e5,
    "rope_type": 2,
    "license": None,
}


class MadeConfigTest(parameterized.TestCase):
    """What is said of an `.apr` without a configuration of HuggingFace's, as the engine writes it."""

    def opened(self, metadata):
        folder = pathlib.Path(self.create_tempdir().full_path)
        content = apr_format.serialise_prologue(metadata, [])
        (folder / "m.apr").write_bytes(content + apr_format.footer(zlib.crc32(content)))
        return self.enterContext(open_checkpoint(folder / "m.apr"))

    @parameterized.parameters((("q8_0", "f8_e4m3"), None), (("q8_0", "f32", "f16", "f16"), "float16"))
    def test_the_type_is_that_of_most_numbers_it_computes_with(self, types, expected):
        config = self.opened(METADATA).config_for((str(i), by_name(name)) for i, name in enumerate(types))
        self.assertEqual(config.get("torch_dtype"), expected)

    @parameterized.parameters((None, None), (16, None), (32, 32))
    def test_the_size_of_heads_stands_only_where_it_does_not_follow(self, given, said):
        config = self.opened(METADATA | ({"head_dim": given} if given else {})).config_for([])
        self.assertEqual(config.get("head_dim"), said)

    @parameterized.parameters(
        ({}, {}),
        ({"tensor_shapes": {"a": [2], "b": [3]}}, {"tensor_shapes": {"x": [2], "b": [3]}}),
        ({"source_order": ["b", "a", 1]}, {"source_order": ["b", "x", 1]}),
    )
    def test_where_metadata_list_tensors_they_are_renamed_too(self, metadata, expected):
        renamed = self.opened(METADATA | metadata).renamed({"a": "x"})
        self.assertEqual(renamed.metadata, self.opened(METADATA | expected).metadata)


class FromHfTest(parameterized.TestCase):
    def problems(self, **changes):
        config = {key: value for key, value in (PUBLISHED | changes).items() if value is not ...}
        with self.assertRaises(RefusedError) as caught:
            Qwen2Config.from_hf(config, "m/config.json")
        self.assertEqual((caught.exception.exit_code, caught.exception.file), (5, "m/config.json"))
        return str(caught.exception)

    def test_the_published_half_billion_model_has_290_tensors_and_its_parameters(self):
        shapes = Qwen2Config.from_hf(PUBLISHED).tensor_shapes()
        self.assertLen(shapes, 290)
        count = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values())
        self.assertEqual(count, 494_032_768)

    def test_the_published_7b_model_has_339_tensors_and_its_parameters(self):
        config = PUBLISHED | {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        }
        shapes = Qwen2Config.from_hf(config).tensor_shapes()
        self.assertLen(shapes, 339)
        count = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values())
        self.assertEqual(count, 7_615_616_512)

    @parameterized.parameters(
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},),
        ({"rope_theta": ..., "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},),
        ({"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},),
    )
    def test_the_base_is_found_wherever_it_stands(self, changes):
        config = {key: value for key, value in (PUBLISHED | changes).items() if value is not ...}
        self.assertEqual(Qwen2Config.from_hf(config).rope_theta, 5e5)

    def test_an_absent_base_is_what_huggingface_takes(self):
        config = {key: value for key, value in PUBLISHED.items() if key != "rope_theta"}
        self.assertEqual(Qwen2Config.from_hf(config).rope_theta, 1e4)

    @parameterized.parameters(
        ({"rope_parameters": {"rope_theta": 5e5}}, "contradict"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 5e5}}, "contradict"),
        (
            {"rope_parameters": {"type": "yarn", "factor": 4.0}, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "yarn",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_type": "linear"}}, "'yarn' and rope_type is 'linear'"),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_scaling.type is 'su'"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 4.0}}, "rope_scaling.type is ['yarn']"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is '4'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": -1}}, "rope_scaling.beta_fast is -1"),
        ({"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "rope_scaling.factor is inf"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "unheard_of": 1}}, "--ignore-config rope_scaling.unheard_of"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}}, "more than"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": None}}, "of 32 frequencies"),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_theta is 1.0, expected more than 1",
        ),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": [1]}, "expected an object"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        ({"use_sliding_window": True, "max_window_layers": 2.5}, "max_window_layers is 2.5"),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0}, "sliding_window is 0"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types asks for sliding windows"),
        ({"layer_types": ["full_attention"] * 23}, "names 23 layers, num_hidden_layers 24"),
        ({"layer_types": ["linear_attention"] * 24}, "layer_types holds 'linear_attention'"),
        ({"layer_types": [["full_attention"]] * 24}, "layer_types holds ['full_attention']"),
        ({"layer_types": "full_attention"}, "expected a list"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"pruned_heads": {"0": [1]}}, "pruned"),
        ({"num_key_value_heads": ...}, "num_key_value_heads is 32, expected a divisor of num_attention_heads 14"),
        ({"num_key_value_heads": 3}, "divisor"),
        ({"hidden_size": 900}, "no multiple"),
        ({"head_dim": 63}, "even"),
        ({"vocab_size": "151936"}, "vocab_size is '151936'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 10**9}, "at most 10000"),
        ({"rms_norm_eps": 1e-50}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    )
    def test_what_would_change_the_arithmetic_or_makes_no_sense_is_refused_by_name(self, changes, part):
        self.assertIn(part, self.problems(**changes))

    @parameterized.product(
        size=[0, -1, 2**31],
        name=[
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ],
    )
    def test_a_size_that_is_not_positive_or_needs_more_than_31_bits_is_refused_by_name(self, name, size):
        self.assertIn(f"{name} is {size}, expected a positive integer", self.problems(**{"head_dim": 64, name: size}))

    def test_everything_wrong_is_said_at_once(self):
        text = self.problems(use_sliding_window=1, hidden_act="gelu", unheard_of=1)
        for key in ("use_sliding_window", "hidden_act", "unheard_of"):
            self.assertIn(f"{key} ", text)
            self.assertIn(f"--ignore-config {key}", text)

    @parameterized.parameters(paths.NAMES)
    def test_every_committed_checkpoint_is_read(self, name):
        config = json.loads((paths.checkpoint(name) / "config.json").read_text())
        self.assertEqual(Qwen2Config.from_hf(config).num_layers, config["num_hidden_layers"])


class FromAprTest(parameterized.TestCase):
    def test_metadata_of_apr_is_read_null_and_absent_alike(self):
        config = Qwen2Config.from_apr(METADATA | {"rms_norm_eps": None}, tied=True)
        self.assertEqual((config.head_dim, config.rms_norm_eps, config.rope_theta), (16, 1e-6, 5e5))
        self.assertTrue(config.tie_word_embeddings)

    def test_the_engines_own_default_base_is_taken_where_none_is_given(self):
        self.assertEqual(Qwen2Config.from_apr(METADATA | {"rope_theta": None}, tied=True).rope_theta, 1e6)

    @parameterized.parameters(
        ({"architecture": "llama"}, "llama"),
        ({"rope_type": 0}, "rope_type"),
        ({"rope_scaling": {"type": "mrope", "factor": 4}}, "mrope"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "contradict"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": 1}, "sliding"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"n_embd": 65}, "contradict"),
        ({"hidden_size": None}, "hidden_size is missing"),
    )
    def test_what_would_change_the_arithmetic_is_refused_by_name(self, changes, part):
        with self.assertRaises(RefusedError) as caught:
            Qwen2Config.from_apr(METADATA | changes, tied=True)
        self.assertIn(part, str(caught.exception))


class TensorsTest(absltest.TestCase):
    def test_a_long_list_of_offenders_is_cut(self):
        with self.assertRaises(RefusedError) as caught:
            check_tensors(Qwen2Config.from_hf(PUBLISHED), {})
        self.assertIn("290 of them", str(caught.exception))
        self.assertIn("and 250 more", str(caught.exception))

    def test_what_is_there_is_named_beside_all_that_is_missing(self):
        with self.assertRaises(RefusedError) as caught:
            check_tensors(Qwen2Config.from_hf(PUBLISHED), {"transformer.h.0.attn.c_attn.weight": (3, 3)})
        self.assertIn("missing: model.embed_tokens.weight", str(caught.exception))
        self.assertIn("unexpected: transformer.h.0.attn.c_attn.weight", str(caught.exception))


if __name__ == "__main__":
    absltest.main()
