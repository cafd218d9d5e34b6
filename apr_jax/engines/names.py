"""What engines call the values of a forward pass, in our keys.

stage.0.attn_norm, logits              ours (docs/dumps.md)
hidden.0, hidden_states.0, _0, [0]     the input of layer 0; as many as there are layers: the final norm, as in
                                       HuggingFace's `hidden_states`, whose last entry is normed
attentions.0                           HuggingFace's attention weights
present.0.key, k_cache.0               the keys of a layer's cache, which are its k_post_rope
grad.stage.0.attn_norm, stage_grad.0.attn_norm, grad.model.norm.weight, model.norm.weight
                                       gradients of stages, and of parameters as torch names them
attn_norm-0, l_out-0, result_output    llama.cpp's names of a graph's tensors, as its eval-callback shows them
"""

from __future__ import annotations

import re

from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, Qwen2Config
from apr_jax.trace import stages
from apr_jax.trace.stages import GRADIENT, Key

UNSCALED = "unscaled"
"""Stands for scores before they are multiplied by 1/sqrt(head_dim)."""

_HIDDEN = re.compile(r"hidden(?:[._]?states?)?[._\[-]?(\d{1,6})\]?")
_LAYER_OUTPUT = re.compile(r"layers?[._-]?(\d{1,6})(?:[._-](?:outputs?|out|hidden))?")
_ATTENTIONS = re.compile(r"attentions?(?:[._]weights)?[._\[-]?(\d{1,6})\]?")
_OUTER = {
    stages.EMBEDDING: stages.EMBEDDING,
    stages.FINAL_NORM: stages.FINAL_NORM,
    "embedding": stages.EMBEDDING,
    "embeddings": stages.EMBEDDING,
    "inputs_embeds": stages.EMBEDDING,
    "inp_embd": stages.EMBEDDING,
    "embd": stages.EMBEDDING,
    "final_norm": stages.FINAL_NORM,
    "hidden.final_norm": stages.FINAL_NORM,
    "last_hidden_state": stages.FINAL_NORM,
    "result_norm": stages.FINAL_NORM,
    "logits": stages.LOGITS,
    "result_output": stages.LOGITS,
    "lm_head": stages.LOGITS,
}
_LLAMA = re.compile(r"(?:\d+[_-])?([A-Za-z_]+)-(\d{1,6})(?: \(.*\))?")
_LLAMA_NAMES = {
    "attn_norm": "attn_norm",
    "Qcur": "q_post_rope",
    "Qcur_rope": "q_post_rope",
    "Kcur": "k_post_rope",
    "Kcur_rope": "k_post_rope",
    "kq": UNSCALED,
    "kq_soft_max": "attn_softmax",
    "kq_soft_max_ext": "attn_softmax",
    "kqv_out": "attention",
    "kqv_merged": "attention",
    "kqv_merged_cont": "attention",
    "kqv_wo": "attn_out",
    "attn_out": "attn_out",
    "ffn_inp": "post_attn_residual",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_silu": "ffn_silu",
    "ffn_gate_par": "ffn_swigl",
    "ffn_swiglu": "ffn_swigl",
    "ffn_down": "ffn_out",
    "ffn_out": "ffn_out",
    "l_out": "post_ffn_residual",
}
_KEYS = (
    re.compile(r"(?:past_key_values|present|cache|kv_cache)[._](\d{1,6})[._](?:k|key|keys)"),
    re.compile(r"(?:k|key)_cache[._-](\d{1,6})"),
)
INPUTS = ("input_ids", "attention_mask", "position_ids")


def key_of(name: str, num_layers: int, merged: bool = False) -> str | None:
    """Returns the trace key of an engine's name; None if it is none that is known.

    Args:
      name: The name, without a file's ending.
      num_layers: Of the model: the hidden state of that number is the final norm's.
      merged: Whether llama.cpp's dump has `kqv_merged` too: its `kqv_out` is then what o_proj made of it, as in older
        versions.
    """
    if name in _OUTER:
        return _OUTER[name]
    if (key := Key(name)).is_inner and key.stage in stages.LAYER_STAGES and key == Key.of(key.layer, key.stage):
        return name  # of whatever layer: one that the model lacks is said where keys are checked
    if match := _HIDDEN.fullmatch(name):
        return _hidden(int(match[1]), num_layers)
    if match := _ATTENTIONS.fullmatch(name):
        return Key.of(int(match[1]), "attn_softmax")
    if match := _LAYER_OUTPUT.fullmatch(name):
        return Key.of(int(match[1]), "post_ffn_residual")
    if (match := _LLAMA.fullmatch(name)) and match[1] in _LLAMA_NAMES:
        stage = "attn_out" if match[1] == "kqv_out" and merged else _LLAMA_NAMES[match[1]]
        return Key.of(int(match[2]), stage)
    return None


_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
_LORA = re.compile(r"(.+)\.(?:weight\.)?lora_([AB])(?:\.[\w-]+)?(?:\.weight)?(?:\.grad)?")
_PARTS = {"grad_part.embedding.": ".as_embedding", "grad_part.head.": ".as_head"}


def gradient_of(name: str, config: Qwen2Config) -> str | None:
    """Returns the key of the gradient that an array of this name is; None if it is none."""
    for prefix, suffix in _PARTS.items():
        if name == prefix + EMBEDDING:
            return GRADIENT + EMBEDDING + suffix
    if name.startswith("stage_grad."):
        stage = name.removeprefix("stage_grad.")
        name = GRADIENT + (stage if stage == stages.LOGITS else f"stage.{stage}")
    bare = name.removeprefix(GRADIENT)
    if name != bare and bare in set(stages.trace_keys(config.num_layers)):
        return name
    if match := _LORA.fullmatch(bare):
        weight = gradient_of(f"{match[1]}.weight", config)
        return None if weight is None else f"{weight}.lora_{match[2]}"
    whole = bare.removesuffix(".grad").removesuffix(".as_embedding").removesuffix(".as_head")
    for wrapper in _WRAPPERS:
        whole, bare = whole.removeprefix(wrapper), bare.removeprefix(wrapper)
    return GRADIENT + bare.removesuffix(".grad") if whole in config.tensor_shapes() else None


def cached_keys(name: str) -> str | None:
    """Returns the key of `k_post_rope` if a name is that of the keys in a layer's cache, [B, K, slots, H]."""
    match = next((match for pattern in _KEYS if (match := pattern.fullmatch(name))), None)
    return None if match is None else Key.of(int(match[1]), "k_post_rope")


def _hidden(index: int, num_layers: int) -> str | None:
    sources = stages.hidden_sources(num_layers)
    return stages.FINAL_NORM if index == num_layers else sources.get(Key.of(index, "hidden"))
