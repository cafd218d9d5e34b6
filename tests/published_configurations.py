"""Configurations of model_type qwen2 as they were published, or as trainers, mergers and exporters write them.

Each has its name, where it is from, and what becomes of it: it opens, or it is refused, and for which key. Sizes are
listed once and taken by several; `scaled` makes a tiny model of one that keeps every key and every rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}


def _sizes(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int = 151936, tied: bool = False, full: int = 28
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_window_layers": full,
    }


def _positions(most: int) -> dict[str, Any]:
    return {"max_position_embeddings": most, "sliding_window": most}


S05 = _sizes(896, 4864, 24, 14, 2, tied=True, full=24)
S15 = _sizes(1536, 8960, 28, 12, 2, tied=True)
S3 = _sizes(2048, 11008, 36, 16, 2, tied=True, full=36)
S7 = _sizes(3584, 18944, 28, 28, 4, 152064)
S14 = _sizes(5120, 13824, 48, 40, 8, 152064, full=48) | {"rms_norm_eps": 1e-05}
S32 = _sizes(5120, 27648, 64, 40, 8, 152064, full=64) | {"rms_norm_eps": 1e-05}
S72 = _sizes(8192, 29568, 80, 64, 8, 152064, full=80) | {"rms_norm_eps": 1e-05}
V437, V440 = {"transformers_version": "4.37.0"}, {"transformers_version": "4.40.1"}
INSTRUCT = {"eos_token_id": 151645, "transformers_version": "4.43.1"}
MROPE = {"use_mrope": False}
MILLION = {
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
    "rope_theta": 10000000.0,
    **_positions(1010000),
}
README_YARN = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
R1 = {
    **MROPE,
    "bos_token_id": 151646,
    "max_position_embeddings": 131072,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.44.0",
}
UNSLOTH = {
    "_name_or_path": "unsloth/Qwen2.5",
    "pad_token_id": 151654,
    "rope_scaling": None,
    "transformers_version": "4.47.1",
    "unsloth_fixed": True,
}


def _five(sizes: Mapping[str, Any], theta: float = 1e6, **rule: Any) -> dict[str, Any]:
    """As transformers 5 spells a configuration."""
    return {
        "dtype": "bfloat16",
        "torch_dtype": ...,
        "rope_theta": ...,
        "layer_types": ["full_attention"] * sizes["num_hidden_layers"],
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"} | rule,
        "sliding_window": None,
        "pad_token_id": None,
        "transformers_version": "5.0.0",
    }


@dataclasses.dataclass(frozen=True)
class Published:
    """A configuration.

    Attributes:
      name: Whose.
      source: Where it is from.
      config: The content of config.json.
      refused: The key that it is refused for; None where it opens.
      warned: A part of what is said when it opens.
    """

    name: str
    source: str
    config: dict[str, Any]
    refused: str | None = None
    warned: str | None = None


def _published(
    name: str, source: str, *parts: Mapping[str, Any], refused: str | None = None, warned: str | None = None
) -> Published:
    config = dict(_COMMON)
    for part in parts:
        config |= part
    return Published(name, source, {key: value for key, value in config.items() if value is not ...}, refused, warned)


_HUB = "config.json in its repository on the Hub"
_LONG, _SHORT = _positions(131072), _positions(32768)
# The numbers of LongRoPE for a head of 64: made up, as no Qwen2 is published with it.
LONG_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [1.5 + i * i for i in range(32)]}

CONFIGURATIONS = (
    # Qwen1.5, of the same model_type
    _published("Qwen1.5-0.5B", _HUB, _sizes(1024, 2816, 24, 16, 16, tied=True, full=21), _SHORT, V437),
    _published("Qwen1.5-1.8B", _HUB, _sizes(2048, 5504, 24, 16, 16, full=21), _SHORT, V437),
    _published("Qwen1.5-4B", _HUB, _sizes(2560, 6912, 40, 20, 20, full=21), _SHORT, V437),
    _published("Qwen1.5-7B-Chat", _HUB, _sizes(4096, 11008, 32, 32, 32), _SHORT, V437),
    _published("Qwen1.5-14B", _HUB, _sizes(5120, 13696, 40, 40, 40, 152064, full=35), _SHORT, V437),
    _published("Qwen1.5-32B", _HUB, _sizes(5120, 27392, 64, 40, 8, 152064, full=35), _SHORT, V437),
    _published("Qwen1.5-72B", _HUB, _sizes(8192, 24576, 80, 64, 64, 152064, full=70), _SHORT, V437),
    _published("Qwen1.5-110B", _HUB, _sizes(8192, 49152, 80, 64, 8, 152064, full=70), _SHORT, V437),
    _published(
        "CodeQwen1.5-7B", _HUB, _sizes(4096, 13440, 32, 32, 4, 92416), _positions(65536), {"rms_norm_eps": 1e-05}
    ),
    # Qwen2
    _published("Qwen2-0.5B", _HUB, S05, _LONG, V440),
    _published("Qwen2-0.5B-Instruct", _HUB, S05, _SHORT, INSTRUCT),
    _published("Qwen2-1.5B", _HUB, S15, _LONG, V440),
    _published("Qwen2-7B", _HUB, S7, _LONG, V440),
    _published("Qwen2-7B-Instruct", _HUB, S7, _positions(32768), {"sliding_window": 131072}, INSTRUCT),
    _published("Qwen2-72B", _HUB, S72, _LONG, V440),
    _published("Qwen2-Math-7B", _HUB, S7, _positions(4096), {"rope_theta": 10000}, INSTRUCT),
    # Qwen2.5
    _published("Qwen2.5-0.5B", _HUB, S05, _SHORT, MROPE, V440),
    _published("Qwen2.5-0.5B-Instruct", _HUB, S05, _SHORT, INSTRUCT, {"max_window_layers": 21}),
    _published("Qwen2.5-1.5B", _HUB, S15, _LONG, MROPE, V440),
    _published("Qwen2.5-3B-Instruct", _HUB, S3, _SHORT, INSTRUCT, {"max_window_layers": 70}),
    _published("Qwen2.5-7B", _HUB, S7, _LONG, MROPE, V440),
    _published("Qwen2.5-14B-Instruct", _HUB, S14, _SHORT, INSTRUCT, {"max_window_layers": 70}),
    _published("Qwen2.5-32B", _HUB, S32, _LONG, V440),
    _published("Qwen2.5-72B-Instruct", _HUB, S72, _SHORT, INSTRUCT, {"max_window_layers": 70}),
    _published("Qwen2.5-Coder-0.5B", _HUB, S05, _SHORT, MROPE, V440),
    _published("Qwen2.5-Coder-7B-Instruct", _HUB, S7, _SHORT, INSTRUCT, {"sliding_window": 131072}),
    _published("Qwen2.5-Coder-32B-Instruct", _HUB, S32, _SHORT, INSTRUCT, {"max_window_layers": 70}),
    _published("Qwen2.5-Math-1.5B", _HUB, S15, _positions(4096), {"rope_theta": 10000, "max_window_layers": 21}),
    _published("Qwen2.5-Math-72B-Instruct", _HUB, S72, _positions(4096), {"rope_theta": 10000.0}, INSTRUCT),
    _published("Qwen2.5-7B-Instruct-1M", _HUB, S7, MILLION, INSTRUCT, warned="dual chunk attention"),
    _published("Qwen2.5-14B-Instruct-1M", _HUB, S14, MILLION, INSTRUCT, warned="dual chunk attention"),
    _published("QwQ-32B-Preview", _HUB, S32, _SHORT, INSTRUCT),
    _published("QwQ-32B", _HUB, S32, {"max_position_embeddings": 40960, "sliding_window": 32768}, INSTRUCT),
    # Others' models of this type
    _published("DeepSeek-R1-Distill-Qwen-1.5B", _HUB, S15, R1, {"max_window_layers": 21}),
    _published("DeepSeek-R1-Distill-Qwen-7B", _HUB, S7, R1),
    _published("DeepSeek-R1-Distill-Qwen-14B", _HUB, S14, R1, {"rope_theta": 1e6, "sliding_window": 131072}),
    _published("DeepSeek-R1-Distill-Qwen-32B", _HUB, S32, R1, {"rope_theta": 1e6, "sliding_window": 131072}),
    # YaRN, as Qwen's READMEs tell users to add it
    _published("Qwen2.5-7B-Instruct with YaRN", "README: Processing Long Texts", S7, _SHORT, README_YARN, INSTRUCT),
    _published("Qwen2-72B-Instruct with YaRN", "README: Processing Long Texts", S72, _SHORT, README_YARN, INSTRUCT),
    _published("Qwen2.5-Coder-14B-Instruct with YaRN", "its README", S14, _SHORT, README_YARN, INSTRUCT),
    _published(
        "QwQ-32B with YaRN and its length",
        "its README",
        S32,
        _positions(131072),
        README_YARN,
        {"sliding_window": 32768},
    ),
    # transformers' own spellings of one thing
    _published(
        "saved by transformers 4.55",
        "save_pretrained",
        S05,
        _SHORT,
        INSTRUCT,
        {
            "dtype": "bfloat16",
            "torch_dtype": ...,
            "layer_types": ["full_attention"] * 24,
            "sliding_window": None,
            "rope_scaling": None,
            "transformers_version": "4.55.0",
        },
    ),
    _published("saved by transformers 5", "save_pretrained", S7, _SHORT, _five(S7)),
    _published(
        "saved by transformers 5, YaRN",
        "save_pretrained",
        S7,
        _SHORT,
        _five(
            S7,
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=32768,
            attention_factor=None,
            beta_fast=None,
            beta_slow=None,
            mscale=None,
            mscale_all_dim=None,
        ),
    ),
    _published(
        "saved by transformers 4.48",
        "save_pretrained",
        S15,
        _LONG,
        MROPE,
        {"_attn_implementation_autoset": True, "rope_scaling": None, "transformers_version": "4.48.0"},
    ),
    _published(
        "to_dict, every key",
        "PretrainedConfig.to_dict of 4.46",
        S05,
        _SHORT,
        {
            "return_dict": True,
            "output_hidden_states": False,
            "output_attentions": False,
            "torchscript": False,
            "use_bfloat16": False,
            "tf_legacy_loss": False,
            "pruned_heads": {},
            "chunk_size_feed_forward": 0,
            "is_encoder_decoder": False,
            "is_decoder": False,
            "cross_attention_hidden_size": None,
            "add_cross_attention": False,
            "tie_encoder_decoder": False,
            "max_length": 20,
            "min_length": 0,
            "do_sample": False,
            "early_stopping": False,
            "num_beams": 1,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "bad_words_ids": None,
            "num_return_sequences": 1,
            "finetuning_task": None,
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
            "label2id": {"LABEL_0": 0, "LABEL_1": 1},
            "tokenizer_class": None,
            "prefix": None,
            "sep_token_id": None,
            "decoder_start_token_id": None,
            "task_specific_params": None,
            "problem_type": None,
            "_name_or_path": "",
            "attn_implementation": None,
        },
    ),
    # Trainers, mergers, exporters
    _published("unsloth/Qwen2.5-0.5B", _HUB, S05, _SHORT, UNSLOTH),
    _published(
        "unsloth, after training",
        "save_pretrained_merged",
        S15,
        _SHORT,
        UNSLOTH,
        {"unsloth_version": "2025.1.5", "use_cache": False},
    ),
    _published(
        "axolotl",
        "a full fine-tune",
        S7,
        _LONG,
        {
            "_name_or_path": "Qwen/Qwen2.5-7B",
            "_attn_implementation_autoset": True,
            "use_cache": False,
            "pretraining_tp": 1,
            "attention_bias": True,
            "transformers_version": "4.47.0",
        },
    ),
    _published(
        "TRL, SFT with classification keys",
        "SFTTrainer, RewardTrainer",
        S05,
        _SHORT,
        {
            "pad_token_id": 151643,
            "gradient_checkpointing": True,
            "classifier_dropout": 0.1,
            "keys_to_ignore_at_inference": ["past_key_values"],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        },
    ),
    _published(
        "LLaMA-Factory, linear",
        "rope_scaling: linear",
        S7,
        _positions(65536),
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    _published(
        "LLaMA-Factory, dynamic",
        "rope_scaling: dynamic",
        S7,
        _SHORT,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    _published(
        "LLaMA-Factory, yarn",
        "rope_scaling: yarn",
        S7,
        _LONG,
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    _published(
        "LLaMA-Factory, llama3",
        "rope_scaling: llama3",
        S7,
        _LONG,
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32768,
            }
        },
    ),
    _published(
        "LongRoPE",
        "rope_scaling as Phi's",
        S05,
        _LONG,
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32768, **LONG_FACTORS}},
    ),
    _published(
        "mergekit, a passthrough merge",
        "mergekit-yaml",
        S05,
        _SHORT,
        {"_name_or_path": "Qwen/Qwen2.5-0.5B", "num_hidden_layers": 32, "tie_word_embeddings": False},
    ),
    _published(
        "a LLaMA turned into a Qwen2",
        "conversion scripts",
        S05,
        _SHORT,
        {"attention_bias": True, "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None, "head_dim": 64},
    ),
    _published(
        "a Qwen2 with LLaMA's keys",
        "conversion scripts",
        S05,
        _SHORT,
        {"attention_bias": False, "qkv_bias": True, "use_flash_attn": True, "partial_rotary_factor": 1.0},
    ),
    _published(
        "FastChat, LLaVA",
        "training scripts",
        S7,
        _SHORT,
        {
            "tokenizer_model_max_length": 32768,
            "tokenizer_padding_side": "right",
            "use_flash_attn": True,
            "model_max_length": 32768,
        },
    ),
    _published("null KV heads", "hand-written", S7, _SHORT, {"num_key_value_heads": None}),
    _published(
        "nulls",
        "hand-written, and of older scripts",
        S05,
        _SHORT,
        {
            "hidden_act": None,
            "rms_norm_eps": None,
            "max_position_embeddings": None,
            "use_sliding_window": None,
            "rope_theta": None,
            "head_dim": None,
            "layer_types": None,
            "max_window_layers": None,
        },
    ),
    _published("linear by 1", "hand-written", S05, _SHORT, {"rope_scaling": {"type": "linear", "factor": 1.0}}),
    # Sliding windows
    _published("windows behind all layers", "Qwen2's technical report", S7, _SHORT, {"use_sliding_window": True}),
    _published(
        "windows from layer 21 on",
        "transformers 4.37 to 4.52",
        S7,
        _LONG,
        {"use_sliding_window": True, "max_window_layers": 21, "sliding_window": 4096},
    ),
    _published(
        "windows everywhere",
        "a long-context fine-tune",
        S05,
        _LONG,
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8192},
    ),
    _published(
        "windows in every other layer",
        "transformers 5",
        S7,
        _LONG,
        _five(S7),
        {
            "use_sliding_window": True,
            "sliding_window": 4096,
            "layer_types": ["sliding_attention", "full_attention"] * 14,
        },
    ),
    _published(
        "windows of null",
        "transformers 4.55",
        S05,
        _SHORT,
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ),
    _published(
        "windows and YaRN",
        "both at once",
        S7,
        _LONG,
        README_YARN,
        {"use_sliding_window": True, "max_window_layers": 14, "sliding_window": 4096},
    ),
    # Refused
    _published("Qwen2-MoE's expert keys", "not this model", S7, _SHORT, {"num_experts": 60}, refused="num_experts"),
    _published(
        "MLX, 4 bits",
        "mlx_lm.convert -q",
        S05,
        _SHORT,
        {"quantization": {"group_size": 64, "bits": 4}},
        refused="quantization",
    ),
    _published(
        "LongLoRA", "LLaMA-Factory: shift_attn", S7, _SHORT, {"group_size_ratio": 0.25}, refused="group_size_ratio"
    ),
    _published(
        "mRoPE",
        "Qwen2-VL's text part",
        S7,
        _SHORT,
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        refused="rope_scaling",
    ),
    _published("bidirectional", "an embedding model", S7, _SHORT, {"is_causal": False}, refused="is_causal"),
    _published(
        "a merge with stale layer types",
        "mergekit behind transformers 4.55",
        S05,
        _SHORT,
        {"num_hidden_layers": 32, "layer_types": ["full_attention"] * 24},
        refused="layer_types",
    ),
    _published(
        "YaRN added to a configuration of transformers 5",
        "the README's lines pasted",
        S7,
        _SHORT,
        _five(S7),
        README_YARN,
        refused="rope_parameters",
    ),
    _published(
        "soft-capped", "Gemma's keys", S7, _SHORT, {"final_logit_softcapping": 30.0}, refused="final_logit_softcapping"
    ),
)


def scaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tiny configuration with the same keys: lengths are cut so that rules and windows bite at 97 tokens."""
    heads, kv = config["num_attention_heads"], config.get("num_key_value_heads")
    layers = config["num_hidden_layers"]
    few = 4 if config.get("use_sliding_window") else 2
    small = dict(config) | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": few,
        "num_attention_heads": 4,
        "num_key_value_heads": None if kv is None else max(1, round(4 * kv / heads)),
        "vocab_size": 288,
    }
    small |= {key: 280 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    if config.get("head_dim"):
        small["head_dim"] = 16
    if isinstance(types := config.get("layer_types"), list):
        small["layer_types"] = types[: few + len(types) - layers]
    if isinstance(full := config.get("max_window_layers"), int):
        small["max_window_layers"] = full * few // layers
    for key in ("max_position_embeddings", "sliding_window"):
        if config.get(key):
            small[key] = max(16, config[key] // 512)
    for key in ("rope_scaling", "rope_parameters"):
        rule = config.get(key) or {}
        if "original_max_position_embeddings" in rule:
            small[key] = rule | {"original_max_position_embeddings": rule["original_max_position_embeddings"] // 512}
        if "short_factor" in rule:
            small[key] |= {name: rule[name][:8] for name in ("short_factor", "long_factor")}
    return small
