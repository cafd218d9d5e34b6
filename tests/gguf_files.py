"""GGUF files of a checkpoint, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import gguf
import numpy as np
from gguf.quants import quantize

from tests import packers

_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole or name == "lm_head.weight":
        return whole.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    stem, end = rest.rsplit(".", 1)
    return f"blk.{layer}.{_NAMES[stem]}.{end}"


def write(
    base: pathlib.Path,
    path: pathlib.Path,
    kind: str = "Q8_0",
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **changed: object,
) -> dict[str, np.ndarray]:
    """Writes the checkpoint `base` with matrices of one GGML type.

    Args:
      base, path, kind: From where, to where, and the GGML type's name.
      add: Adds more metadata.
      changed: Other values for "architecture", "pre" (of the tokenizer) and "types" (of its tokens, whether to write).

    Returns:
      HuggingFace's names -> the values that gguf decodes.
    """
    config = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(path, str(changed.get("architecture", "qwen2")))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(
        config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
    )
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, base, config, changed)
    add(writer)
    wanted = gguf.GGMLQuantizationType[kind]
    values = {}
    for name, tensor in packers.read(base / "model.safetensors").items():
        target = wanted if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = quantize(tensor.astype(np.float32), target)
        writer.add_tensor(gguf_name(name), data, raw_dtype=target)
        values[name] = gguf.dequantize(data, target).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _add_tokenizer(writer: gguf.GGUFWriter, base: pathlib.Path, config: dict, changed: dict[str, object]) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokens = {number: (token, 1) for token, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = (token["content"], 3 if token["special"] else 4)
    listed = [tokens.get(number, (f"[PAD{number}]", 5)) for number in range(config["vocab_size"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(changed.get("pre", "qwen2")))
    writer.add_token_list([token for token, _ in listed])
    if changed.get("types", True):
        writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    given = json.loads((base / "tokenizer_config.json").read_text())
    if "chat_template" in given:
        writer.add_chat_template(given["chat_template"])
