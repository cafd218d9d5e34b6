"""Writes the seeds: small files of each kind that are as they should be, from which the search starts."""

from __future__ import annotations

import io
import json
import pathlib
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from tests import gguf_files, paths
from tests.hostile.checkpoint_cases import DESCRIBED

SEEDS = pathlib.Path(__file__).resolve().parent / "seeds"
MODEL = paths.checkpoint("gqa_tied_bf16")


def _pad(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 64) * 64, b"\0")


def apr(metadata: bytes, tensors: list[tuple[str, int, tuple[int, ...], bytes]], magic: bytes = b"APR\0") -> bytes:
    """Returns an `.apr` file, written without the project's own writer."""
    index, body = b"", b""
    for name, dtype, shape, data in sorted(tensors):
        raw = name.encode()
        index += struct.pack(
            f"<H{len(raw)}sBB{len(shape)}QQQ", len(raw), raw, dtype, len(shape), *shape, len(body), len(data)
        )
        body += _pad(data)
    index_at = 64 + len(_pad(metadata))
    first = struct.pack(
        "<4sBBHIQIQQ", magic, 2, 0, 0x400, len(tensors), 64, len(metadata), index_at, index_at + len(_pad(index))
    )
    whole = (
        first
        + struct.pack("<I", zlib.crc32(bytes(20), zlib.crc32(first)))
        + bytes(20)
        + _pad(metadata)
        + _pad(index)
        + body
    )
    return whole + struct.pack("<I", zlib.crc32(whole))


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _apr_files() -> Iterator[tuple[str, bytes]]:
    yield "empty", apr(b"{}", [])
    yield (
        "types",
        apr(
            b'{"architecture":"qwen2"}',
            [
                ("a", 0, (2, 3), bytes(24)),
                ("b", 1, (2,), bytes(4)),
                ("c", 30, (4,), bytes(8)),
                ("d", 8, (32,), bytes(34)),
                ("e", 12, (1, 256), bytes(144)),
                ("lm_head.weight", 0, (2, 3), b""),
                ("s", 0, (), bytes(4)),
            ],
        ),
    )
    yield "old", apr(b'{"a":1.50}', [("a", 2, (2,), bytes(4)), ("b", 9, (32,), bytes(36))], b"APR2")
    files = {"source_files": {"config.json": "{}", "tokenizer.json": "{}", "b": {"base64": "AAAA"}}}
    yield "files", apr(json.dumps(files).encode(), [("model.norm.weight", 0, (1,), bytes(4))])
    for file in sorted((paths.DATA / "apr").glob("golden_v2*.apr")):
        yield file.stem, file.read_bytes()


def _safetensors_files() -> Iterator[tuple[str, bytes]]:
    yield "empty", safetensors({})
    entries = {}
    at = 0
    for code, width in (("F64", 8), ("F32", 4), ("BF16", 2), ("F8_E4M3", 1), ("BOOL", 1), ("U8", 1), ("I64", 8)):
        entries[code] = {"dtype": code, "shape": [2, 1], "data_offsets": [at, at + 2 * width]}
        at += 2 * width
    yield "types", safetensors(entries, bytes(at))
    yield "nibbles", safetensors({"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}, bytes(4))
    yield "scalar", safetensors({"a": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, bytes(2))
    yield "nothing", safetensors({"a": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}})
    embedded = {"__metadata__": {"format": "pt", "apr_jax.source_files": '{"config.json":"{}"}'}}
    yield "metadata", safetensors({**embedded, "ä": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x")
    packed = {
        name: {"dtype": "I32", "shape": [4, 4], "data_offsets": [64 * n, 64 * n + 64]}
        for n, name in enumerate(("l.qweight", "l.qzeros", "l.scales", "l.g_idx"))
    }
    yield "packed", safetensors(packed, bytes(256))
    lora = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight": {
            "dtype": "F32",
            "shape": [2, 2],
            "data_offsets": [16 * n, 16 * n + 16],
        }
        for n, half in enumerate("AB")
    }
    yield "adapter", safetensors(lora, bytes(32))


def _indices() -> Iterator[tuple[str, bytes]]:
    whole = {"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    yield "two", json.dumps(whole).encode()
    yield "one", json.dumps({"weight_map": {"a": "a.safetensors"}}).encode()
    yield "names", json.dumps({"weight_map": {"a": "../a.safetensors", "b": "A.safetensors", "c": "x.bin"}}).encode()


def _gguf_files() -> Iterator[tuple[str, bytes]]:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen2"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("y"),
        text("a.nested") + struct.pack("<IIQIQ2f", 9, 9, 1, 6, 2, 1e-6, 0.5),
        text("a.true") + struct.pack("<IB", 7, 1),
        text("a.wide") + struct.pack("<Iq", 11, -1),
    ]
    tensors = [
        text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 1, 8, 0),
        text("x") + struct.pack("<IQIQ", 1, 2, 0, 64),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    head += bytes(-len(head) % 32)
    yield "small", head + bytes(64) + bytes(8)
    yield "empty", b"GGUF" + struct.pack("<IQQ", 2, 0, 0) + bytes(8)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.gguf"
        gguf_files.write(MODEL, path)
        # Its header is what is parsed; a model's tensors would be most of the file.
        yield "header", path.read_bytes()[: 16 << 10]


def _prepared_files() -> Iterator[tuple[str, bytes]]:
    yield "one", json.dumps(DESCRIBED).encode()


def _json_texts() -> Iterator[tuple[str, bytes]]:
    yield "all", b'{"a":[1,-2.50,1e-7,true,false,null,"\\u00e9\\ud83d\\ude00\\n"],"b":{},"c":[],"\\"":"\xc3\xa4"}'
    yield "number", b"-0"
    yield "blanks", b' [ 1 , { "x" : "y" } ]\n'
    yield "deep", b"[" * 60 + b"]" * 60


def _configs() -> Iterator[tuple[str, bytes]]:
    plain = json.loads((MODEL / "config.json").read_bytes())
    yield "plain", json.dumps(plain).encode()
    for kind, more in (
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
        ("dynamic", {"factor": 2.0}),
        (
            "llama3",
            {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}),
    ):
        yield kind, json.dumps({**plain, "rope_scaling": {"rope_type": kind, **more}}).encode()
    window = {
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "layer_types": ["full_attention"],
    }
    yield "window", json.dumps({**plain, **window}).encode()
    yield (
        "generation",
        b'{"temperature":0.7,"top_k":20,"top_p":0.8,"eos_token_id":[1,2],"repetition_penalty":1.1,"do_sample":true}',
    )
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    yield "gptq", json.dumps({**plain, "quantization_config": quantised}).encode()


def _adapters() -> Iterator[tuple[str, bytes]]:
    for folder in sorted((paths.DATA / "adapters").iterdir()):
        if folder.is_dir():
            yield folder.name, (folder / "adapter_config.json").read_bytes()


def _tokenizers() -> Iterator[tuple[str, bytes]]:
    letters = {chr(code): n for n, code in enumerate(range(ord("a"), ord("k")))}
    model = {"type": "BPE", "vocab": letters | {"ab": 10}, "merges": ["a b"]}
    whole = {"version": "1.0", "added_tokens": [{"id": 11, "content": "<x>", "special": True}], "model": model}
    chat = {"eos_token": "<x>", "chat_template": "{{ messages }}", "added_tokens_decoder": {"11": {"content": "<x>"}}}
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }

    def files(**named: Any) -> bytes:
        return b"".join(
            b"=== %s\n" % name.replace("__", ".").encode()
            + (text.encode() if isinstance(text, str) else json.dumps(text).encode())
            + b"\n"
            for name, text in named.items()
        )

    yield "qwen2", files(tokenizer__json=whole, tokenizer_config__json=chat, qwen2="")
    yield "processor", files(tokenizer__json=whole | {"post_processor": template}, qwen2="")
    yield (
        "lists",
        files(vocab__json=letters | {"ab": 10}, merges__txt="#version: 0.2\na b\n", added_tokens__json={"<y>": 12}),
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    strange = whole | {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "decoder": byte_level,
        "truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
    }
    yield "strange", files(tokenizer__json=strange, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"})


def _apr_tokenizers() -> Iterator[tuple[str, bytes]]:
    yield (
        "small",
        json.dumps(
            {
                "tokenizer.vocabulary": ["a", "b", "ab", "<|im_end|>"],
                "tokenizer.merges": ["a b"],
                "tokenizer.model_type": "BPE",
                "tokenizer.eos_token_id": 3,
                "tokenizer.bos_token_id": None,
                "tokenizer.vocab_size": 4,
                "chat_template": "{{ x }}",
            }
        ).encode(),
    )
    yield (
        "model",
        json.dumps(
            {
                "architecture": "qwen2",
                "hidden_size": 8,
                "num_layers": 1,
                "num_heads": 2,
                "num_kv_heads": 1,
                "vocab_size": 4,
                "intermediate_size": 8,
                "max_position_embeddings": 16,
                "rope_theta": 10000.0,
                "rope_type": 2,
                "rms_norm_eps": 1e-6,
            }
        ).encode(),
    )


def _templates() -> Iterator[tuple[str, bytes]]:
    yield (
        "chatml",
        (
            b"{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
            b"{% if add_generation_prompt %}{{- 'x' }}{% endif %}"
        ),
    )
    yield (
        "parts",
        (
            b"{%- set ns = namespace(a=1) %}"
            b"{% macro f(x, y=2) %}{{ x|tojson }}{% endmacro %}{{ f(messages[0].content) }}"
            b"{% if tools is defined and not loop %}{{ raise_exception('no') }}{% endif %}{% set ns.a = ns.a + 1 %}"
        ),
    )
    yield "filters", b"{{ messages | map(attribute='role') | join(',') | upper | center(20) }}{{ '%s' | format(1) }}"


def _aprts() -> Iterator[tuple[str, bytes]]:
    hidden = json.loads((MODEL / "config.json").read_bytes())["hidden_size"]
    values = np.zeros(4 * hidden, "<f4").tobytes()
    yield "stage", b"APRT" + struct.pack("<II", 0, 4 * hidden) + values
    yield "one", b"APRT" + struct.pack("<IIf", 0, 1, 1.0)


def _dump_maps() -> Iterator[tuple[str, bytes]]:
    yield "npy", b'{"stages":{"stage.0.attn_norm":{"file":"a.npy"}},"input_ids":[[1,2,3,4]],"dtype":"float32"}'
    yield "raw", b'{"stages":{"stage.0.attn_norm":{"file":"b.bin","dtype":"float32","layout":"btd"}}}'
    yield "numbers", b'{"stages":{"stage.0.attn_norm":{"min":-1,"max":1,"mean":0.5,"l2":3}},"positions":[3]}'
    yield (
        "msprobe",
        b'{"data":{"Module.model.layers.0.mlp.down_proj.Linear.forward.0":{"output":[{"Max":1,"Norm":2}]}}}',
    )


def _inputs() -> Iterator[tuple[str, bytes]]:
    yield "list", b"[1,2,3]"
    yield "rows", b"[[1,2,3],[4]]"
    yield "all", b'{"input_ids":[[1,2]],"attention_mask":[[0,1]],"position_ids":[[0,5]]}'


def _npys() -> Iterator[tuple[str, bytes]]:
    for name, array in (
        ("f4", np.zeros((2, 3), "f4")),
        ("f8", np.zeros(2, ">f8")),
        ("i8", np.asfortranarray(np.zeros((2, 2), "i8"))),
    ):
        file = io.BytesIO()
        np.save(file, array)
        yield name, file.getvalue()


def _npzs() -> Iterator[tuple[str, bytes]]:
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        file = io.BytesIO()
        save(file, input_ids=np.array([[1, 2, 3, 4]]), logits=np.zeros((1, 4, 2), "f4"))
        yield name, file.getvalue()


def _lines() -> Iterator[tuple[str, bytes]]:
    vocabulary = json.loads((MODEL / "config.json").read_bytes())["vocab_size"]
    yield "one", json.dumps({"tokens": [1], "logits": [[0] * vocabulary]}).encode() + b"\n"
    yield "small", b'{"tokens":[1,2],"logits":[[1.0],[2.0]]}\n\n{"prompt_tokens":[3],"logits":[]}'


def _logs() -> Iterator[tuple[str, bytes]]:
    yield "one", b"l_out-0 = (f32) ADD(a{1}, b{1}) = {64, 4, 1, 1}\n  [ ... ]\n  sum = -12.345678\n"
    yield (
        "norm",
        b"ggml_debug: attn_norm-0 = (f32) MUL(x{64, 4, 1, 1}) = {64, 4, 1, 1}\nsum = nan\n"
        b"result_output = (f32) MUL_MAT() = {9}\n sum = 1e9\n",
    )


KINDS = {
    "apr": _apr_files,
    "safetensors": _safetensors_files,
    "index": _indices,
    "gguf": _gguf_files,
    "prepared": _prepared_files,
    "json": _json_texts,
    "config": _configs,
    "adapter": _adapters,
    "tokenizer": _tokenizers,
    "apr-tokenizer": _apr_tokenizers,
    "template": _templates,
    "aprt": _aprts,
    "dump-map": _dump_maps,
    "inputs": _inputs,
    "npy": _npys,
    "npz": _npzs,
    "jsonl": _lines,
    "log": _logs,
}


def main() -> None:
    for kind, seeds in KINDS.items():
        folder = SEEDS / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
