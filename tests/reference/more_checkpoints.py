"""Six checkpoints beside the committed ones: RoPE rules and sliding windows, and other sizes, with seeded weights.

Lengths are such that each rule and each window bites within 20 tokens.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config


def _config(heads: int, kv_heads: int, hidden: int = 32, **others: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": 120,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    } | others


def _rule(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **numbers}}


_EIGHT = {"original_max_position_embeddings": 8}
_WINDOW = {"use_sliding_window": True, "sliding_window": 5}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "windows, MHA, tied": _config(4, 4, tie_word_embeddings=True, max_window_layers=0, **_WINDOW),
    "YaRN and windows from layer 1 on, GQA": _config(
        6, 2, 48, max_window_layers=1, **_WINDOW, **_rule("yarn", factor=4.0, **_EIGHT)
    ),
    "dynamic, MQA": _config(4, 1, **_rule("dynamic", factor=2.0), max_position_embeddings=8),
    "longrope, GQA, tied": _config(
        4,
        2,
        tie_word_embeddings=True,
        **_rule("longrope", short_factor=[1.0] * 4, long_factor=[1.5, 2.0, 3.0, 4.0], factor=8.0, **_EIGHT),
    ),
    "llama3, MQA, head_dim given": _config(
        4, 1, head_dim=16, **_rule("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **_EIGHT)
    ),
    "linear, MHA, layer_types": _config(
        2,
        2,
        **_rule("linear", factor=3.0),
        layer_types=["sliding_attention", "full_attention"],
        **_WINDOW,
    ),
}


def write(name: str, folder: pathlib.Path, seed: int = 3) -> pathlib.Path:
    """Writes one of them as a HuggingFace folder; attention depends on where tokens stand."""
    config, random, tensors = CONFIGURATIONS[name], np.random.default_rng(seed), {}
    for key, shape in Qwen2Config.from_hf(config).tensor_shapes().items():
        scale = 0.2 if key.endswith("bias") else 2 / np.sqrt(shape[-1]) if "self_attn" in key else 0.2
        tensors[key] = (random.normal(size=shape) * scale + key.endswith("norm.weight")).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
