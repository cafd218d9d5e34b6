"""What people's configurations become: known keys, nulls, RoPE rules and windows open; the rest names its way past."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import RefusedError
from tests.published_configurations import CONFIGURATIONS, S05, S7

BASE = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    **S05,
}
PLAIN = Qwen2Config.from_hf(BASE)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


class PublishedTest(parameterized.TestCase):
    @parameterized.named_parameters((published.name, published) for published in CONFIGURATIONS)
    def test_it_opens_or_is_refused_by_name_with_the_option_that_gets_past(self, published):
        warnings: list[str] = []
        if published.refused is None:
            Qwen2Config.from_hf(published.config, warnings=warnings)
        else:
            with self.assertRaises(RefusedError) as caught:
                Qwen2Config.from_hf(published.config)
            self.assertIn(f"\n  {published.refused}", caught.exception.message)
            self.assertIn(f"--ignore-config {published.refused} ", str(caught.exception))
            Qwen2Config.from_hf(published.config, ignored=[published.refused])
        self.assertEqual([published.warned] if published.warned else [], [warning[:20] for warning in warnings])

    def test_there_are_sixty_and_each_kind_of_rule_and_window(self):
        opened = [Qwen2Config.from_hf(p.config) for p in CONFIGURATIONS if p.refused is None]
        self.assertGreaterEqual(len(opened), 60)
        rules = {config.rope_scaling.rule for config in opened if config.rope_scaling}
        self.assertEqual(rules, {"linear", "dynamic", "yarn", "llama3", "longrope"})
        layers = {config.window_layers for config in opened}
        self.assertTrue({(), tuple(range(21, 28)), tuple(range(24)), tuple(range(0, 28, 2))} <= layers)
        self.assertLen({published.name for published in CONFIGURATIONS}, len(CONFIGURATIONS))


class KnownKeysTest(parameterized.TestCase):
    @parameterized.parameters(
        {"unsloth_fixed": True, "unsloth_version": "2024.9"},
        {"attention_bias": True, "mlp_bias": False, "pretraining_tp": 1},
        {"attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True, "use_flash_attn": True},
        {"tokenizer_model_max_length": 32768, "tokenizer_padding_side": "right"},
        {"classifier_dropout": 0.1, "gradient_checkpointing": True, "keys_to_ignore_at_inference": ["past_key_values"]},
        {
            "_commit_hash": "abc",
            "xla_device": True,
            "cross_attention_hidden_size": None,
            "_experts_implementation": "a",
        },
        {"peft_config": {"r": 8}, "merge_config": {"a": 1}, "use_fast_tokenizer": True, "neftune_alpha": 5},
        {"max_model_len": 4096, "kv_cache_dtype": "auto", "tensor_parallel_size": 1, "gguf_file": "x.gguf"},
        {"normalize_reward": False, "mean": 0, "std": 1, "value_head_prefix": "score"},
        {"transformers.js_config": {"dtype": "q4"}, "sentence_transformers": {"version": "5"}, "neuron": {}},
        {"unheard_of": None, "base_model_tp_plan": {"layers.*": "colwise"}, "min_p": 0.1, "cls_token_id": 3},
    )
    def test_field_bookkeeping_of_trainers_and_exporters(self, **keys):
        """FIELD Configurations: keys of unsloth, axolotl, TRL, LLaMA-Factory, transformers -> opens, the same model."""
        self.assertEqual(Qwen2Config.from_hf(BASE | keys), PLAIN)

    @parameterized.parameters(
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {}},
        {"rope_scaling": False},
        {"rope_scaling": {"rope_type": None}},
        {"is_causal": True},
        {"lm_head_bias": False, "use_rmsnorm": True, "num_experts_per_tok": 0},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]}},
        {"num_experts": 0, "use_qk_norm": False, "logit_scale": 1.0, "pruned_heads": []},
        {"original_max_position_embeddings": 8192},
        {"use_sliding_window": True, "max_window_layers": 24},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"layer_types": ["full_attention"] * 24, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": "what is not used is not judged", "max_window_layers": -1.5},
    )
    def test_field_values_that_equal_the_default(self, **keys):
        """FIELD Configurations: a rope factor of 1, windows that no layer has, is_causal true -> the same model."""
        self.assertEqual(Qwen2Config.from_hf(BASE | keys), PLAIN)

    @parameterized.parameters(
        ({"hidden_size": 64.0}, "say hidden_size, head_dim", ()),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            "",
            ("rope_scaling", "rope_scaling.mrope_section"),
        ),
        ({"rms_norm_eps": "1e-06"}, "", ("rms_norm_eps",)),
        ({"text_config": {"model_type": "qwen2"}}, "make it config.json of a folder", ("text_config",)),
    )
    def test_field_the_options_of_a_refusal_get_past_it(self, keys, words, options):
        """FIELD Configurations: a size as a float, mrope, text_config -> what mends it is named"""
        with self.assertRaises(RefusedError) as caught:
            Qwen2Config.from_hf(BASE | keys)
        said = caught.exception.text()
        self.assertIn(words, said)
        self.assertEqual(tuple(re.findall(r"--ignore-config (\S+)", said)), options)
        if options:
            self.assertEqual(Qwen2Config.from_hf(BASE | keys, ignored=options), PLAIN)

    @parameterized.parameters(
        ({"is_causal": False},),
        ({"num_experts": 8},),
        ({"partial_rotary_factor": 0.5},),
        ({"use_qk_norm": 1},),
        ({"per_layer_config": {"1": {"sliding_window": 4}}},),
        ({"unheard_of": False},),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},),
    )
    def test_field_what_may_change_the_arithmetic(self, keys):
        """FIELD Configurations: a key that may change something -> refused by name, with --ignore-config."""
        with self.assertRaises(RefusedError) as caught:
            Qwen2Config.from_hf(BASE | keys)
        key = next(iter(keys))
        self.assertIn(f"--ignore-config {key} ", str(caught.exception))
        self.assertIn(f"ignore_config=['{key}']", str(caught.exception))
        self.assertEqual(Qwen2Config.from_hf(BASE | keys, ignored=[key]), PLAIN)

    @parameterized.parameters(
        ({"rope_type": "dynamic", "factor": 2.0}, {"head_dim": 2}, "a head_dim above 2"),
        (
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 32, "long_factor": [1.0] * 32,
             "original_max_position_embeddings": 1},
            {"head_dim": 64}, "more than 1 with longrope",
        ),
    )  # fmt: skip
    def test_rules_that_cannot_be_computed(self, rule, keys, words):
        with self.assertRaisesRegex(RefusedError, words):
            Qwen2Config.from_hf(BASE | keys | {"rope_scaling": rule})

    @parameterized.parameters(
        (None, 32768, ""),
        ({"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5}, 65536,
         "proportional (factor 2, partial_rotary_factor 0.5)"),
        ({"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
          "original_max_position_embeddings": 32768}, 131072, "long_factor of 32 numbers"),
    )  # fmt: skip
    def test_how_long_a_text_may_be_and_what_the_rule_is_called(self, rule, length, words):
        found = Qwen2Config.from_hf(
            BASE | {"max_position_embeddings": 32768, "head_dim": 64} | ({"rope_scaling": rule} if rule else {})
        )
        self.assertEqual(found.context_length, length)
        self.assertIn(words, str(found.rope_scaling))

    @parameterized.parameters((0.0, "positive"), ("half", "positive"))
    def test_a_share_that_proportional_cannot_turn(self, share, words):
        rule = {"rope_type": "proportional", "partial_rotary_factor": share}
        with self.assertRaisesRegex(RefusedError, f"partial_rotary_factor is .*{words}"):
            Qwen2Config.from_hf(BASE | {"rope_scaling": rule})

    def test_one_setting_of_an_object_can_be_left_out(self):
        config = BASE | {"rope_scaling": YARN | {"unheard_of": 1}}
        with self.assertRaisesRegex(RefusedError, "--ignore-config rope_scaling.unheard_of"):
            Qwen2Config.from_hf(config)
        found = Qwen2Config.from_hf(config, ignored=["rope_scaling.unheard_of"])
        self.assertEqual(found, Qwen2Config.from_hf(BASE | {"rope_scaling": YARN}))


class NullTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"num_key_value_heads": None}, {"num_kv_heads": 14}),
        ({"rope_theta": None}, {"rope_theta": 1e4}),
        ({"max_position_embeddings": None, "rms_norm_eps": None}, {}),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": False}),
        ({"hidden_act": None, "use_sliding_window": None, "layer_types": None, "rope_scaling": None}, {}),
        ({"head_dim": None, "max_window_layers": None, "sliding_window": None}, {}),
    )
    def test_field_null_is_the_default_of_transformers(self, keys, expected):
        """FIELD Configurations: null, anywhere -> what transformers takes for it (num_key_value_heads: one a head)."""
        found = Qwen2Config.from_hf(BASE | keys)
        self.assertEqual({name: getattr(found, name) for name in expected}, expected)
        changed = {f for f in PLAIN.__dict__ if getattr(found, f) != getattr(PLAIN, f)}
        self.assertEqual(changed, set(expected))

    def test_an_absent_size_is_what_transformers_assumes_and_is_said(self):
        warnings: list[str] = []
        config = {key: value for key, value in (BASE | S7).items() if key != "num_key_value_heads"}
        config |= {"num_attention_heads": 32, "hidden_size": 4096}
        self.assertEqual(Qwen2Config.from_hf(config, warnings=warnings).num_kv_heads, 32)
        self.assertEqual(
            warnings, ["config.json does not say num_key_value_heads (32): taken as transformers takes it"]
        )


class RopeTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"rope_scaling": YARN},),
        ({"rope_scaling": {**YARN, "rope_type": "yarn"}},),
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_theta": ...},),
        ({"rope_parameters": YARN, "rope_scaling": YARN},),
        ({"rope_scaling": YARN | {"attention_factor": None, "beta_fast": None, "beta_slow": 0, "finetuned": True}},),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32768},),
        ({"rope_scaling": {"type": "yarn", "factor": 4}},),
        ({"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 1.0, "truncate": True, "attn_factor": 1}},),
    )
    def test_field_yarn_in_every_spelling_is_one_rule(self, changes):
        """FIELD Configurations: YaRN as Qwen's README tells users to add it, 4.x and 5.x -> opens, one rule."""
        config = {key: value for key, value in (BASE | changes).items() if value is not ...}
        found = Qwen2Config.from_hf(config)
        self.assertEqual(found, Qwen2Config.from_hf(BASE | {"rope_scaling": YARN}))
        self.assertEqual(found.rope_scaling.attention_factor, 0.1 * 1.3862943611198906 + 1)
        self.assertEqual(found.context_length, 131072)
        self.assertIn("yarn (factor 4", str(found.rope_scaling))

    def test_what_is_written_of_a_rule_or_a_window_is_read_as_the_same(self):
        for published in CONFIGURATIONS:
            if published.refused is None:
                config = Qwen2Config.from_hf(published.config)
                sizes = {key: value for key, value in published.config.items() if not key.startswith("rope_")}
                for key in ("use_sliding_window", "sliding_window", "layer_types"):
                    sizes.pop(key, None)
                again = sizes | {"rope_theta": config.rope_theta} | config.arithmetic_to_hf()
                self.assertEqual(Qwen2Config.from_hf(again), config, published.name)

    def test_metadata_of_apr_may_hold_a_rule_under_huggingfaces_name(self):
        metadata = {"architecture": "qwen2", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
        metadata |= {"intermediate_size": 160, "max_position_embeddings": 32768}
        found = Qwen2Config.from_apr(metadata | {"rope_scaling": YARN}, tied=True)
        self.assertEqual(found.rope_scaling, Qwen2Config.from_hf(BASE | {"rope_scaling": YARN}).rope_scaling)


class WindowTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"max_window_layers": 21, "sliding_window": 4096}, 4096, (21, 22, 23)),
        ({"max_window_layers": 23}, 4096, (23,)),
        ({"max_window_layers": 0, "sliding_window": 7}, 7, tuple(range(24))),
        ({"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, 4096, (23,)),
        (
            {"layer_types": ["attention", "sliding_attention"] * 12, "max_window_layers": 0},
            4096,
            tuple(range(1, 24, 2)),
        ),
        ({"max_window_layers": 28}, None, ()),
    )
    def test_field_windows_stand_where_transformers_puts_them(self, keys, window, layers):
        """FIELD Configurations: use_sliding_window with max_window_layers or layer_types -> those layers, or none."""
        found = Qwen2Config.from_hf(BASE | {"use_sliding_window": True} | keys)
        self.assertEqual((found.sliding_window, found.window_layers), (window, layers))
        self.assertEqual([found.window_of(layer) for layer in layers], [window] * len(layers))
        self.assertIsNone(found.window_of(None))


if __name__ == "__main__":
    absltest.main()
