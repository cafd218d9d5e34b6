"""A GGUF file as the HuggingFace folder that it was made from: tensors under HuggingFace's names, config.json,
tokenizer.json and chat template from its metadata.

llama.cpp permutes nothing of a Qwen2: rows of q and k stand as in HuggingFace's checkpoints. Blocks stay as they are
(`dtypes` has GGML's types), and are decoded where values are asked for.

Sources: `convert_hf_to_gguf.py` and gguf-py's `constants.py` and `tensor_mapping.py` of ggml-org/llama.cpp.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from apr_jax.converters.checkpoint.checkpoint import Checkpoint, SideFiles
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, FINAL_NORM, HEAD
from apr_jax.converters.checkpoint.qwen2_tokenizer import added_token, tokenizer_json
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError
from apr_jax.converters.formats import gguf_format
from apr_jax.converters.storage.source import SourceFile, exists

ARCHITECTURE = "qwen2"
_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MAX_SPLITS = 4096

# llama.cpp's names of pre-tokenizers that are Qwen2's.
_QWEN2_PRE = ("qwen2", "deepseek-r1-qwen")
# Kinds of tokens: those of added ones, and of what fills the vocabulary up to the rows of the embedding.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def open_gguf(path: str, source: SourceFile) -> Checkpoint:
    """Opens a GGUF file, or all of a split one.

    Args:
      path: As it was given.
      source: The file, open; the checkpoint closes it.

    Raises:
      MissingFileError: Another part of a split file is missing.
      BrokenContainerError, RefusedError: As `gguf_format.read_header`; or parts that do not belong together.
    """
    with ExitStack() as opened:
        header = gguf_format.read_header(source)
        parts = [(source, header)]
        for other in _others(path, header.metadata):
            part = opened.enter_context(SourceFile(other))
            parts.append((part, gguf_format.read_header(part)))
        parts.sort(key=lambda part: part[1].metadata.get("split.no", 0))
        metadata = parts[0][1].metadata
        tensors = _tensors(parts, metadata)
        checkpoint = Checkpoint(
            path,
            "gguf",
            tensors=tensors.values(),
            files=_files(metadata, tensors),
            metadata={},
            sources=[part for part, _ in parts],
            warnings=_warnings(metadata),
            has_metadata=False,
        )
        opened.pop_all()
        return checkpoint


def _others(path: str, metadata: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the other parts of a split file."""
    count, match = metadata.get("split.count", 0), _SPLIT.fullmatch(os.path.basename(path))
    if type(count) is not int or count <= 1:
        return []
    if match is None or int(match[3]) != count or count > _MAX_SPLITS:
        raise RefusedError(
            f"this is one of {count} parts, and its name does not say what the others are called",
            code="one-of-several",
            file=path,
            expected=f"NAME-00001-of-{count:05d}.gguf",
            hint="Name all parts as llama-gguf-split does, or join them: `llama-gguf-split --merge FIRST OUT`",
        )
    folder = os.path.dirname(path)
    names = [f"{match[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    paths = [os.path.join(folder, name) for name in names if name != os.path.basename(path)]
    missing = [other for other in paths if not exists(other)]
    if missing:
        listed = ", ".join(map(os.path.basename, missing[:20]))
        raise MissingFileError(
            f"of {count} parts these are missing: {listed}",
            code="shard-missing",
            file=missing[0],
            hint="Download them into the same folder: no part is a model of its own",
        )
    return paths


def _tensors(
    parts: Sequence[tuple[SourceFile, gguf_format.GgufHeader]], metadata: Mapping[str, Any]
) -> dict[str, Tensor]:
    renamed = metadata.get("general.architecture") == ARCHITECTURE
    tensors: dict[str, Tensor] = {}
    for source, header in parts:
        for entry in header.entries:
            name = _huggingface_name(entry.name) if renamed else entry.name
            if name in tensors:
                raise BrokenContainerError(
                    "two parts hold the same tensor", code="tensor-in-two-shards", file=source.path, tensor=name[:300]
                )
            tensors[name] = Tensor(name, entry.dtype, entry.shape, entry.nbytes, source, entry.offset)
    return tensors


def _huggingface_name(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return _NAMES.get(name, name)
    return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _warnings(metadata: Mapping[str, Any]) -> list[str]:
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        return [f"the file holds a model of the architecture {str(architecture)[:80]!r}: its names stay GGUF's"]
    if _is_byte_level(metadata) and metadata.get("tokenizer.ggml.pre") not in _QWEN2_PRE:
        pre = str(metadata.get("tokenizer.ggml.pre"))[:80]
        return [f"the tokenizer splits texts by the rules {pre!r}, not by Qwen2's: there is no tokenizer.json"]
    return []


# --- side files


def _files(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SideFiles:
    makers: dict[str, Callable[[], Any]] = {CONFIG_NAME: functools.partial(_config, metadata, tensors)}
    if _is_byte_level(metadata) and metadata.get("tokenizer.ggml.pre") in _QWEN2_PRE:
        makers["tokenizer.json"] = functools.partial(_tokenizer, metadata)
        makers["tokenizer_config.json"] = functools.partial(_tokenizer_config, metadata)

    def reader(make: Callable[[], Any]) -> Callable[[], bytes]:
        return lambda: (json.dumps(make(), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")

    return SideFiles({name: reader(make) for name, make in makers.items()})


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns config.json; what the metadata do not say is left out, and missed where a model is asked for."""
    architecture = metadata.get("general.architecture")

    def given(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    embedding = tensors.get(EMBEDDING)
    heads, hidden, head_dim = given("attention.head_count"), given("embedding_length"), given("attention.key_length")
    config = {
        "architectures": ["Qwen2ForCausalLM"] if architecture == ARCHITECTURE else None,
        "model_type": architecture,
        "hidden_act": "silu" if architecture == ARCHITECTURE else None,
        "vocab_size": embedding.shape[0] if embedding is not None and embedding.shape else given("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": given("feed_forward_length"),
        "num_hidden_layers": given("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": given("attention.head_count_kv"),
        "max_position_embeddings": given("context_length"),
        # What llama.cpp takes where the key is missing.
        "rope_theta": given("rope.freq_base") or 10000.0,
        "rms_norm_eps": given("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": _torch_dtype(tensors),
    }
    if head_dim is not None and head_dim * (heads or 0) != hidden:
        config["head_dim"] = head_dim
    scaling = given("rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": given("rope.scaling.factor"),
            "original_max_position_embeddings": given("rope.scaling.original_context_length"),
        }
        config["rope_scaling"] = {key: value for key, value in config["rope_scaling"].items() if value is not None}
    return {key: value for key, value in config.items() if value is not None}


def _torch_dtype(tensors: Mapping[str, Tensor]) -> str:
    """What the matrices are, where they are plain; what decoding gives else."""
    plain = {tensor.dtype.name: tensor.dtype.torch for tensor in tensors.values() if len(tensor.shape) > 1}
    return str(next(iter(plain.values()))) if len(plain) == 1 and set(plain) <= {"bf16", "f16", "f32"} else "float32"


def _is_byte_level(metadata: Mapping[str, Any]) -> bool:
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    return (
        metadata.get("tokenizer.ggml.model") == "gpt2"
        and all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in (tokens, merges))
        and bool(tokens)
    )


def _kinds(metadata: Mapping[str, Any]) -> list[int]:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        # Written before kinds were: special tokens are spelt so.
        return [_CONTROL if token.startswith("<|") and token.endswith("|>") else 1 for token in tokens]
    return kinds


def _added_tokens(metadata: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        number: added_token(tokens[number], special=kind == _CONTROL)
        for number, kind in enumerate(_kinds(metadata))
        if kind in (_CONTROL, _USER_DEFINED)
    }


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns tokenizer.json, as Qwen2's own is but for what GGUF does not keep."""
    tokens, kinds, added = metadata["tokenizer.ggml.tokens"], _kinds(metadata), _added_tokens(metadata)
    left_out = added.keys() | {number for number, kind in enumerate(kinds) if kind == _UNUSED}
    vocabulary = {token: number for number, token in enumerate(tokens) if number not in left_out}
    return tokenizer_json(vocabulary, metadata["tokenizer.ggml.merges"], added)


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token") is True,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): token for number, token in _added_tokens(metadata).items()},
        "tokenizer_class": "Qwen2Tokenizer",
    }
    for name, short in _NAMED_TOKENS.items():
        number = metadata.get(f"tokenizer.ggml.{short}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            config[name] = tokens[number]
    template, more = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.chat_templates")
    named = (
        {name: metadata.get(f"tokenizer.chat_template.{name}") for name in more if isinstance(name, str)}
        if (isinstance(more, list))
        else {}
    )
    if named and isinstance(template, str):
        named = {"default": template} | named
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items() if text]
    elif isinstance(template, str):
        config["chat_template"] = template
    return config
