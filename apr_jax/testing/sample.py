"""Seeded Qwen2 checkpoints, as HuggingFace publishes them, for tests, demonstrations and benchmarks.

The weights are random, but drawn with the statistics that were reported for Qwen2.5-Coder-0.5B: embedding of standard
deviation 0.0152, a final norm around 7.46, a query bias in layer 0 that reaches 128. Small embeddings and large biases
are what breaks careless numerics: with an embedding of this size, eps 1e-5 in place of 1e-6 shows in the first norm.

Nothing has been learnt, so the loss over any text lies above uniform, by about half the variance of the logits: 18 nats
for the 0.5B shape against 11.9.

Every value comes from integers by IEEE operations that are rounded once, from one stream per tensor, so that a name and
a seed give the same bytes on every machine. Tensors are drawn and written in pieces: memory stays constant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.file_names import CHECKPOINT
from apr_jax.converters.checkpoint.qwen2 import FINAL_NORM, Qwen2Config
from apr_jax.converters.errors import UsageError
from apr_jax.converters.formats import dtypes, safetensors_format
from apr_jax.converters.formats.dtypes import DType
from apr_jax.converters.storage.output import OutputFolder, atomic_folder

_PIECE = 1 << 20  # elements drawn at once

# Standard deviation times sqrt(columns) of the matrices: activations of order one inside a block, and blocks that add a
# few times the embedding to the residual stream, so that a mistake in either of them shows in the logits.
_GAINS = {
    "q_proj": 1.0,
    "k_proj": 1.0,
    "v_proj": 1.0,
    "o_proj": 0.06,
    "gate_proj": 1.2,
    "up_proj": 1.2,
    "down_proj": 0.08,
}
_EMBEDDING_STD = 0.0152
_FINAL_NORM_MEAN, _FINAL_NORM_STD, _FINAL_NORM_EXTREMES = 7.46, 0.84, (17.38, -2.28)
_Q_BIAS_STD, _Q_BIAS_EXTREMES = 7.88, (128.0, -65.5)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A named checkpoint.

    Attributes:
      name: What `make_sample` calls it.
      config: Its sizes.
      matrix_dtype: Element type of the matrices, by its name in the registry.
      vector_dtype: Element type of norms and biases.
      shards: Number of safetensors files.
      spell_head_dim: Whether config.json says head_dim.
      nest_rope: Whether config.json is spelt as transformers 5 does (`rope_parameters`, `dtype`, `layer_types`).
      tokenizer: "small" (a few merges) or "full" (151,643 entries and 22 added tokens).
    """

    name: str
    config: Qwen2Config
    matrix_dtype: str = "bf16"
    vector_dtype: str = "bf16"
    shards: int = 1
    spell_head_dim: bool = False
    nest_rope: bool = False
    tokenizer: str = "small"

    def dtype(self, name: str) -> DType:
        """Returns the element type of one tensor."""
        return dtypes.by_name(self.vector_dtype if _is_vector(name) else self.matrix_dtype)

    def nbytes(self, name: str) -> int:
        """Returns the payload bytes of one tensor."""
        return self.dtype(name).nbytes(self.config.tensor_shapes()[name])


def _config(
    vocab: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    *,
    layers: int = 2,
    head_dim: int | None = None,
    theta: float = 1e6,
    eps: float = 1e-6,
    tied: bool = False,
    positions: int = 4096,
) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        rope_theta=theta,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        max_position_embeddings=positions,
    )


SAMPLES: Mapping[str, Sample] = {
    sample.name: sample
    for sample in (
        Sample("gqa_tied_bf16", _config(288, 64, 160, 4, 2, tied=True)),
        Sample("gqa_untied_bf16", _config(288, 56, 128, 14, 2)),
        Sample("mha_untied_f32_sharded", _config(288, 40, 96, 4, 4), "f32", "f32", shards=3),
        Sample("mqa_f16", _config(288, 64, 128, 8, 1, theta=1e4), "f16", "f16"),
        Sample("mixed_dtypes", _config(288, 48, 112, 6, 2), "bf16", "f32", shards=2, nest_rope=True),
        Sample("odd_sizes", _config(283, 66, 101, 3, 1, theta=5e5, eps=1e-5), spell_head_dim=True),
        Sample(
            "head_dim_given", _config(288, 48, 96, 4, 2, head_dim=32, tied=True), spell_head_dim=True, nest_rope=True
        ),
        Sample(
            "qwen2_0.5b",
            _config(151936, 896, 4864, 14, 2, layers=24, tied=True, positions=32768),
            tokenizer="full",
        ),
        Sample(
            "qwen2_1.5b",
            _config(151936, 1536, 8960, 12, 2, layers=28, tied=True, positions=32768),
            tokenizer="full",
        ),
        Sample(
            "qwen2_7b",
            _config(152064, 3584, 18944, 28, 4, layers=28, positions=32768),
            shards=4,
            tokenizer="full",
        ),
    )
}
TINY = tuple(name for name in SAMPLES if not name.startswith("qwen2_"))


def write_sample(
    name: str, folder: str | os.PathLike[str], *, seed: int = 0, tokenizer: str | None = None, force: bool = False
) -> dict[str, int]:
    """Writes one sample checkpoint as a HuggingFace folder.

    Args:
      name: One of `SAMPLES`.
      folder: Where to; the folder that is to hold it exists. It appears as a whole, or not at all.
      seed: Of the weights; the tokenizer does not depend on it.
      tokenizer: "small" or "full"; None takes the sample's own.
      force: Replace a checkpoint that is there.

    Returns:
      File name -> size in bytes.

    Raises:
      UsageError: Unknown name, a full tokenizer that does not fit the vocabulary, or an output that exists.
      StorageError: The disk.
    """
    if name not in SAMPLES:
        raise UsageError(f"no sample is called {name!r}", code="sample-unknown", expected=", ".join(SAMPLES))
    sample = SAMPLES[name]
    shards = _shards(sample)
    texts = side_files(sample, tokenizer or sample.tokenizer)
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = _index(sample, shards)
    headers = {file: _header(sample, names) for file, names in shards.items()}
    sizes = {file: len(text.encode()) for file, text in texts.items()}
    for file, names in shards.items():
        sizes[file] = len(headers[file]) + sum(map(sample.nbytes, names))
    with atomic_folder(os.fspath(folder), sum(sizes.values()), kind=CHECKPOINT, force=force) as output:
        for file, text in texts.items():
            with output.create(file, sizes[file]) as side_file:
                side_file.write_at(text.encode(), 0)
        for file, names in shards.items():
            _write_shard(output, file, headers[file], sample, names, seed)
    return dict(sorted(sizes.items()))


# Weights


def draw(sample: Sample, name: str, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields one tensor in pieces of whole rows: float32 values, before they are rounded to the tensor's dtype.

    Args:
      sample: The checkpoint.
      name: The tensor's name.
      seed: Of the checkpoint.

    Yields:
      float32 [rows, columns] of a matrix, [length] of a vector.
    """
    shape = sample.config.tensor_shapes()[name]
    if _is_vector(name):
        yield _vector(sample.config, name, seed)
        return
    rows, columns = shape
    kind = name.split(".")[-2]
    std = _GAINS[kind] / math.sqrt(columns) if kind in _GAINS else _EMBEDDING_STD
    scale = np.full(rows, std, np.float32)
    if kind == "k_proj":
        scale *= _key_scale(sample.config, name, seed)
    stream = _stream(name, seed)
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = scale[start : start + step]
        yield _normal(stream, piece.size * columns).reshape(-1, columns) * piece[:, None]


def _is_vector(name: str) -> bool:
    return name.endswith((".bias", "norm.weight"))


def _stream(name: str, seed: int) -> np.random.PCG64:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little"))


def _normal(stream: np.random.PCG64, count: int) -> np.ndarray:
    """Returns nearly normal float32 values of mean 0 and variance 1: sums of four 16-bit integers.

    NumPy's own normal values pass through logarithms of the C library; these are the same bits everywhere.
    """
    parts = stream.random_raw(count).astype("<u8", copy=False).view("<u2")
    total = parts[0::4].astype(np.int32)
    for part in (parts[1::4], parts[2::4], parts[3::4]):
        total += part
    total *= 2
    total -= 4 * 65535
    # The variance of 2 * (sum of four) is 4 * 4 * (2^32 - 1) / 12.
    return total.astype(np.float32) * np.float32(math.sqrt(3 / 4 / (2**32 - 1)))


def _vector(config: Qwen2Config, name: str, seed: int) -> np.ndarray:
    size = config.tensor_shapes()[name][0]
    values = _normal(_stream(name, seed), size)
    if name == FINAL_NORM:
        at = (size // 3, size // 2)
        return _with_extremes(values, np.float32(_FINAL_NORM_MEAN), _FINAL_NORM_STD, _FINAL_NORM_EXTREMES, at)
    if name.endswith("norm.weight"):
        return np.abs(np.float32(1.0) + np.float32(0.45) * values) + np.float32(0.05)
    if name.endswith("q_proj.bias"):
        if not name.startswith("model.layers.0."):
            return values * np.float32(3.0)
        # In the slowest pair of dimensions, where such biases sit in trained models too: a constant part of the score.
        at = (config.head_dim // 2 - 1, size - 1)
        return _with_extremes(values, np.float32(0.0), _Q_BIAS_STD, _Q_BIAS_EXTREMES, at, least_std=3.0)
    if name.endswith("k_proj.bias"):
        return values * np.float32(1.5) * _key_scale(config, name, seed)
    return values * np.float32(0.33)


def _with_extremes(
    values: np.ndarray,
    mean: np.float32,
    std: float,
    extremes: Sequence[float],
    at: Sequence[int],
    least_std: float = 0.0,
) -> np.ndarray:
    """Returns mean + values scaled so that, with the extremes planted, the whole has about the given deviation.

    Where the extremes alone exceed it (short vectors), the others get `least_std`; if that is 0, the extremes are left
    out.
    """
    rest = std**2 * values.size - sum((x - float(mean)) ** 2 for x in extremes)
    planted = rest > 0 or least_std > 0
    other_std = math.sqrt(max(rest / values.size, least_std**2)) if planted else std
    result = mean + values * np.float32(other_std)
    if planted:
        result[list(at)] = extremes
    return result


def _key_scale(config: Qwen2Config, name: str, seed: int) -> np.ndarray:
    """Returns, per row of k_proj, a factor that keeps query bias times key moderate, as a trained model does.

    Without it a query bias of 128 makes every softmax one-hot, and scores so large that float32 is no reference.
    """
    bias = _vector(config, name.rsplit(".", 2)[0] + ".q_proj.bias", seed)
    pairs = np.abs(bias).reshape(config.num_kv_heads, -1, 2, config.head_dim // 2).max((1, 2))
    return np.tile(np.minimum(np.float32(1.0), np.float32(4.0) / pairs), 2).reshape(-1)


def _shards(sample: Sample) -> dict[str, list[str]]:
    """Cuts the tensors, in order of execution, into files of about equal bytes; returns file -> names as stored."""
    names = list(sample.config.tensor_shapes())
    total = sum(map(sample.nbytes, names))
    groups: list[list[str]] = [[] for _ in range(sample.shards)]
    done = 0
    for name in names:
        groups[done * sample.shards // total].append(name)
        done += sample.nbytes(name)
    files = [f"model-{i + 1:05d}-of-{sample.shards:05d}.safetensors" for i in range(sample.shards)]
    return {
        file: safetensors_format.data_order((name, sample.dtype(name)) for name in group)
        for file, group in zip(files if sample.shards > 1 else ["model.safetensors"], groups, strict=True)
    }


def _index(sample: Sample, shards: Mapping[str, Sequence[str]]) -> str:
    where = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": sum(map(sample.nbytes, where))}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(index, indent=2) + "\n"


def _header(sample: Sample, names: Sequence[str]) -> bytes:
    shapes = sample.config.tensor_shapes()
    return safetensors_format.serialise_header(
        ((name, sample.dtype(name), shapes[name]) for name in names), {"format": "pt"}
    )


def _write_shard(
    output: OutputFolder, file: str, header: bytes, sample: Sample, names: Sequence[str], seed: int
) -> None:
    with output.create(file, len(header) + sum(map(sample.nbytes, names))) as shard:
        shard.write_at(header, 0)
        position = len(header)
        for name in names:
            dtype = sample.dtype(name).numpy
            for values in draw(sample, name, seed):
                data = values.astype(dtype).tobytes()
                shard.write_at(data, position)
                position += len(data)


# Side files

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_FULL_ENTRIES = 151643
_SMALL_MERGES = 24
_SMALL_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_FULL_ADDED = (
    *_SMALL_ADDED,
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")),
    *(f"<|vision_{name}|>" for name in ("start", "end", "pad")),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>"),
    *(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad")),
    *("<|repo_name|>", "<|file_sep|>"),
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def side_files(sample: Sample, tokenizer: str) -> dict[str, str]:
    """Returns file name -> text of everything but the weights.

    Args:
      sample: The checkpoint.
      tokenizer: "small" or "full".

    Raises:
      UsageError: The tokenizer has more entries than the embedding has rows.
    """
    full = tokenizer == "full"
    merges = list(itertools.islice(_merges(), _FULL_ENTRIES - 256 if full else _SMALL_MERGES))
    vocabulary = {token: i for i, token in enumerate([*_byte_symbols(), *("".join(pair) for pair in merges)])}
    added = {token: len(vocabulary) + i for i, token in enumerate(_FULL_ADDED if full else _SMALL_ADDED)}
    if len(vocabulary) + len(added) > sample.config.vocab_size:
        raise UsageError(
            f"a {tokenizer} tokenizer does not fit {sample.name}",
            code="tokenizer-too-large",
            expected=f"at most {sample.config.vocab_size} entries",
            found=len(vocabulary) + len(added),
        )
    joined = [" ".join(pair) for pair in merges]
    objects: dict[str, Any] = {
        "config.json": _hf_config(sample, added["<|endoftext|>"]),
        "generation_config.json": {
            "bos_token_id": added["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [added["<|im_end|>"], added["<|endoftext|>"]],
            "pad_token_id": added["<|endoftext|>"],
            "repetition_penalty": 1.1,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "transformers_version": "4.45.0",
        },
        "tokenizer.json": _tokenizer(vocabulary, joined, added),
        "tokenizer_config.json": _tokenizer_config(sample, added),
    }
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in objects.items()}
    texts["vocab.json"] = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    texts["merges.txt"] = "\n".join(["#version: 0.2", *joined]) + "\n"
    return texts


def _byte_symbols() -> list[str]:
    """Returns the printable characters that stand for the 256 bytes in byte-level BPE, in GPT-2's order of ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _merges() -> Iterator[tuple[str, str]]:
    """Yields merges by rule, no result twice: pairs of letters, then four letters, then six, common letters first."""
    firsts = ["\u0120", *_LETTERS]  # U+0120 stands for the space before a word
    order = sorted(itertools.product(range(len(firsts)), range(len(_LETTERS))), key=lambda ij: (sum(ij), ij))
    pairs = [firsts[i] + _LETTERS[j] for i, j in order]
    inner = [pair for pair in pairs if pair[0] != firsts[0]]
    yield from ((firsts[i], _LETTERS[j]) for i, j in order)
    fours = [(first, second) for first in pairs[:250] for second in inner[:200]]
    yield from fours
    yield from (("".join(four), last) for four in fours[:2000] for last in inner[:60])


def _hf_config(sample: Sample, end_of_text: int) -> dict[str, Any]:
    config = sample.config
    values: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if sample.spell_head_dim:
        values["head_dim"] = config.head_dim
    if sample.nest_rope:
        values |= {
            "dtype": dtypes.by_name(sample.matrix_dtype).torch,
            "layer_types": ["full_attention"] * config.num_layers,
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            "sliding_window": None,
            "transformers_version": "5.0.0",
        }
    else:
        values |= {
            "rope_theta": config.rope_theta,
            "sliding_window": config.max_position_embeddings,
            "torch_dtype": dtypes.by_name(sample.matrix_dtype).torch,
            "transformers_version": "4.45.0",
            "use_mrope": False,
        }
    return dict(sorted(values.items()))


def _added_token(content: str) -> dict[str, Any]:
    special = content.startswith("<|") and "fim" not in content and content not in ("<|repo_name|>", "<|file_sep|>")
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _tokenizer(vocabulary: Mapping[str, int], merges: Sequence[str], added: Mapping[str, int]) -> dict[str, Any]:
    def byte_level(trim_offsets: bool) -> dict[str, Any]:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": False}

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | _added_token(token) for token, i in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level(trim_offsets=False),
            ],
        },
        "post_processor": byte_level(trim_offsets=False),
        "decoder": byte_level(trim_offsets=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _tokenizer_config(sample: Sample, added: Mapping[str, int]) -> dict[str, Any]:
    tokens = {str(i): _added_token(token) for token, i in added.items()}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": tokens,
        "additional_special_tokens": [t["content"] for t in tokens.values() if t["special"]][1:],
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": sample.config.max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
