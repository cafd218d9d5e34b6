"""llama.cpp through ctypes: a GGUF file of ours, run with a `cb_eval` that keeps what docs/dumps.md says to save.

The library is the one inside the wheel `xllamacpp` 2026.10; the layouts of structs are its llama.h's.
"""

from __future__ import annotations

import ctypes as c
import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.bench import llama

NAMES = (
    *("inp_embd", "attn_norm", "Qcur", "Kcur", "kq", "kq_soft_max", "kqv_out", "ffn_inp", "ffn_norm", "ffn_gate"),
    *("ffn_up", "ffn_silu", "ffn_swiglu", "ffn_gate_par", "ffn_out", "l_out", "result_norm", "result_output"),
)


class ModelParams(c.Structure):
    _fields_ = [
        *((name, c.c_void_p) for name in ("devices", "overrides")),
        *((name, c.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "main_gpu", "fifth")),
        *((name, c.c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, c.c_bool) for name in ("vocab_only", "check", "extra_bufts", "no_host", "no_alloc", "load_mtp")),
    ]


class ContextParams(c.Structure):
    _fields_ = [
        *((name, c.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs")),
        ("n_outputs_seq", c.c_uint32),
        *((name, c.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling", "pooling")),
        *((name, c.c_int32) for name in ("attention", "flash_attn")),
        *((name, c.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext", "yarn_attn", "yarn_fast")),
        *(("yarn_slow", c.c_float), ("yarn_orig_ctx", c.c_uint32), ("defrag", c.c_float)),
        *((name, c.c_void_p) for name in ("cb_eval", "cb_eval_data")),
        *((name, c.c_int32) for name in ("type_k", "type_v")),
        *((name, c.c_void_p) for name in ("abort", "abort_data")),
        *((name, c.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "unified")),
        *(("samplers", c.c_void_p), ("n_samplers", c.c_size_t), ("other", c.c_void_p)),
    ]


class Batch(c.Structure):
    _fields_ = [("n_tokens", c.c_int32), *((n, c.c_void_p) for n in ("token", "embd", "pos", "n_seq", "seq", "logits"))]


class Tensor(c.Structure):
    _fields_ = [
        *(("type", c.c_int32), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4)),
        *(("op", c.c_int32), ("op_params", c.c_int32 * 16), ("flags", c.c_int32), ("src", c.c_void_p * 10)),
        *(("view_src", c.c_void_p), ("view_offs", c.c_size_t), ("data", c.c_void_p), ("name", c.c_char * 64)),
    ]


def library() -> str | None:
    """Where the library is; None if the wheel is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    return (
        None if found is None or found.origin is None else str(pathlib.Path(found.origin).parent / "xllamacpp.abi3.so")
    )


def write_gguf(path: pathlib.Path, config: Any, tensors: Mapping[str, np.ndarray], **other: float) -> None:
    """Writes HuggingFace's tensors as float32 GGUF, as convert_hf_to_gguf does; `other` are wrong numbers."""
    numbers = {
        "rope_theta": other.get("theta", config.rope_theta),
        "rms_norm_eps": other.get("eps", config.rms_norm_eps),
    }
    writer, names = llama.writer_of(str(path), dataclasses.replace(config, **numbers))
    for name, value in tensors.items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(value, np.float32))
    llama.finish(writer)


def run(path: pathlib.Path, ids: np.ndarray, folder: pathlib.Path, **params: Any) -> None:
    """Runs one prompt, and saves what the callback sees as docs/dumps.md says."""
    lib = c.CDLL(library() or "")
    lib.llama_model_default_params.restype, lib.llama_context_default_params.restype = ModelParams, ContextParams
    lib.llama_model_load_from_file.argtypes = [c.c_char_p, ModelParams]
    lib.llama_init_from_model.argtypes = [c.c_void_p, ContextParams]
    lib.llama_decode.argtypes = [c.c_void_p, Batch]
    lib.ggml_backend_tensor_get.argtypes = [c.c_void_p, c.c_void_p, c.c_size_t, c.c_size_t]
    for name in ("llama_model_load_from_file", "llama_init_from_model"):
        getattr(lib, name).restype = c.c_void_p
    log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
    lib.llama_log_set(log, None)
    lib.llama_backend_init()

    @c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)
    def save(address: int, ask: bool, _: int) -> bool:
        tensor = Tensor.from_address(address)
        name = tensor.name.decode()
        if name.partition("-")[0] in NAMES and " " not in name and tensor.type == 0 and not ask:
            shape = list(tensor.ne)[::-1]
            raw = np.empty(max(sum((n - 1) * b for n, b in zip(tensor.ne, tensor.nb, strict=True)) // 4 + 1, 1), "f4")
            lib.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
            strides = list(tensor.nb)[::-1]
            np.save(folder / f"{name}.npy", np.lib.stride_tricks.as_strided(raw, shape, strides))
        return True

    given, settings = np.ascontiguousarray(ids, np.int32), lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), settings)
    asked = lib.llama_context_default_params()
    assert asked.n_batch == 2048, "llama.h has another layout in this wheel"
    asked.n_ctx, asked.n_threads, asked.n_threads_batch, asked.flash_attn = 256, 1, 1, 0
    asked.type_k = asked.type_v = 0  # float32
    asked.cb_eval = c.cast(save, c.c_void_p).value
    for name, value in params.items():
        setattr(asked, name, value)
    context = lib.llama_init_from_model(model, asked)
    every = np.ones(len(given), np.int8)
    places, counts, zero = np.arange(len(given), dtype=np.int32), np.ones(len(given), np.int32), (c.c_int32 * 1)(0)
    rows = (c.c_void_p * len(given))(*[c.addressof(zero)] * len(given))
    pointers = (given.ctypes.data, None, places.ctypes.data, counts.ctypes.data, c.addressof(rows), every.ctypes.data)
    failed = lib.llama_decode(context, Batch(len(given), *pointers))
    assert not failed, failed
