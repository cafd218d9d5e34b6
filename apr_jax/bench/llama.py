"""llama.cpp as a contestant, by llama-cpp-python: the same weights in a GGUF file, one row, on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from apr_jax.bench.cases import PREFILL, Case
from apr_jax.bench.ours import tokens
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import named

BFLOAT16, Q4_K = "bf16", "Q4_K_M"
_FTYPES = {Q4_K: 15}


def available() -> bool:
    """Whether llama-cpp-python, and gguf to write its files, are installed."""
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


class LlamaCpp:
    """llama.cpp with as many threads as there are processors; cases of one row.

    Attributes:
      name: In tables.
    """

    def __init__(self, model: LanguageModel, form: str, folder: str | None):
        """Writes the model's weights, has llama.cpp quantise them where `form` is no float, and loads the file.

        The file is written to `folder`, None being the system's for temporary ones, and gone afterwards.
        """
        import llama_cpp

        self.name = f"llama.cpp {form} (llama-cpp-python {llama_cpp.__version__})"
        self._config, self._library, self._context = model.config, llama_cpp, None
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = os.path.join(scratch, "model.gguf")
            write(model, path)
            if form in _FTYPES:
                settings = llama_cpp.llama_model_quantize_default_params()
                settings.ftype = _FTYPES[form]
                whole, path = path, os.path.join(scratch, "quantised.gguf")
                if llama_cpp.llama_model_quantize(whole.encode(), path.encode(), ctypes.byref(settings)):
                    raise RuntimeError("llama.cpp could not quantise the model")
            self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model")

    def prepare(self, case: Case, steps: int) -> tuple[Callable[[int], float], dict[str, Any]]:
        """As `Ours.prepare`."""
        if case.batch != 1:
            raise ValueError("one row is measured")
        self._open(case.length + steps)
        prompt, token = tokens(self._config, 1, case.length)[0], tokens(self._config, 1, 1)[0]
        self._decode(prompt)

        def calls(count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                if case.kind == PREFILL:
                    self._forget(0)
                    self._decode(prompt).argmax()
                    continue
                self._forget(case.length)
                following = token
                for _ in range(steps):
                    following = np.array([self._decode(following).argmax()], np.int32)
            return time.perf_counter() - begun

        return calls, {}

    def last_logits(self, ids: np.ndarray) -> np.ndarray:
        """As `Ours.last_logits`."""
        self._open(ids.shape[1])
        found = []
        for row in ids:
            self._forget(0)
            found.append(self._decode(row).copy())
        return np.stack(found)

    def _open(self, capacity: int) -> None:
        library = self._library
        if self._context:
            library.llama_free(self._context)
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = capacity
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = library.llama_init_from_model(self._model, settings)

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        """Runs tokens behind those before; returns logits [V] of the last, which the next call overwrites."""
        ids = np.ascontiguousarray(ids, np.int32)
        given = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(given, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._config.vocab_size,))

    def _forget(self, kept: int) -> None:
        self._library.llama_memory_seq_rm(self._library.llama_get_memory(self._context), 0, kept, -1)


def write(model: LanguageModel, path: str) -> None:
    """Writes a model's weights as GGUF without a vocabulary: matrices in bfloat16, all else in float32."""
    import gguf
    import jax.numpy as jnp

    writer, names = writer_of(path, model.config)
    for name, array in named(model.parameters).items():
        stored = names.get_name(name, (".weight", ".bias"))
        if array.ndim == 2:
            data = np.asarray(array.astype(jnp.bfloat16)).view(np.uint8)
            writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(stored, np.asarray(array.astype(jnp.float32)))
    finish(writer)


def writer_of(path: str, config: Qwen2Config) -> tuple[Any, Any]:
    """Returns gguf's writer with what llama.cpp asks of a Qwen2 model, and gguf's map of tensor names."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    return writer, gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_layers)


def finish(writer: Any) -> None:
    """Writes the file of a `writer_of`."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
