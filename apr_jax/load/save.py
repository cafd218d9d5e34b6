"""`save`: a model back into a HuggingFace folder, a safetensors file or an `.apr`, with all that came beside it.

The parameters in memory are dressed up as a checkpoint whose tensors are read from arrays, and `convert` writes that:
the same containers, the same atomic output. Fused parameters are taken apart on the way by where their rows begin.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from apr_jax.converters.checkpoint.checkpoint import Checkpoint, SideFiles
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.convert.apr_metadata import config_json
from apr_jax.converters.convert.plan import make_plan
from apr_jax.converters.convert.run import run
from apr_jax.converters.errors import UsageError
from apr_jax.converters.formats import dtypes
from apr_jax.converters.storage.source import SourceFile
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.origin import Origin
from apr_jax.model.parameters import named, parameter_sources

_CODES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
# Whichever of them a config.json has: transformers 5 writes the first, older ones the second.
_DTYPE_KEYS = ("dtype", "torch_dtype")
_AS_STORED = (
    "The model keeps matrices as they are stored, as load_generator and load_model(as_stored=True) load it on a CPU, "
    "to run and not to be trained; load_model(path) gives it parameters of one dtype"
)


def save(
    model: LanguageModel,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a model: whole, or not at all.

    The tensors have HuggingFace's names and the dtype of the parameters, also those of a fused model. config.json comes
    along with its dtype brought up to date, tokenizer and other side files as they were, and what an `.apr` says of
    itself. A model that was made from no checkpoint gets a config.json and nothing else.

    Args:
      model: What to write: the parameters that `model.module` holds now. On an accelerator they are copied to the host.
      path: FILE.apr, FILE.safetensors, or a folder as HuggingFace has it.
      force: Whether to replace an output that exists; a folder only if it holds nothing but a checkpoint.
      max_shard_bytes: The most tensor bytes in one file of a folder; None writes one file.

    Raises:
      UsageError: There is something at `path`, or the model is no LanguageModel.
      MissingFileError: The folder that is to hold the output does not exist.
      RefusedError: The container has no such dtype, or a parameter has another shape than the configuration says.
      StorageError: The disk.
    """
    if not isinstance(model, LanguageModel):
        raise UsageError(
            "only a LanguageModel can be saved: it knows the tokenizer and what else goes along",
            code="save-model",
            found=type(model).__name__,
            hint="A module that was tuned is saved with the model it came from, a state after "
            "`nnx.update(model.module, state)`",
        )
    path = os.fspath(path)
    try:
        plan = make_plan(
            as_checkpoint(model),
            path,
            to="apr" if path.endswith(".apr") else "safetensors",
            max_shard_bytes=max_shard_bytes,
        )
        run(plan, force=force, notice=warnings.warn)
    except UsageError as error:
        if error.code == "output-exists":
            error.hint = "force=True replaces it"
        raise


class _ArrayFile(SourceFile):
    """An array's bytes, to be read like a file's."""

    def __init__(self, name: str, array: jax.Array):
        self.path = name
        self._bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self.size = len(self._bytes)

    def readinto_at(self, offset: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self._bytes[offset : offset + len(view)]

    def read_at(self, offset: int, nbytes: int) -> bytearray:
        return bytearray(self._bytes[offset : offset + nbytes])

    def check_unchanged(self) -> None:
        """Arrays do not change."""

    def close(self) -> None:
        """Nothing is open."""


def as_checkpoint(model: LanguageModel) -> Checkpoint:
    """Returns the model as a checkpoint of the kind that it came from; arrays are copied to the host.

    Raises:
      UsageError: A parameter has another shape or type than the configuration and the other parameters say.
    """
    origin = model.origin or Origin("model", "safetensors", {CONFIG_NAME: _config(model.config)}, {"format": "pt"})
    tensors = list(_tensors(model))
    files = {
        name: _restated(content, model.dtype) if name == CONFIG_NAME else content
        for name, content in origin.files.items()
    }
    metadata = dict(origin.metadata or {})
    if origin.kind == "apr":
        metadata = _restated_metadata(metadata, tensors, model.dtype)
    checkpoint = Checkpoint(
        origin.path,
        origin.kind,
        tensors=tensors,
        files=SideFiles({name: functools.partial(bytes, content) for name, content in files.items()}),
        metadata=metadata,
        sources=[tensor.source for tensor in tensors],
        warnings=(),
        has_metadata=origin.metadata is not None,
    )
    # Nothing is read from a file any more, so that the one that the model came from may be replaced.
    checkpoint.paths = ()
    return checkpoint


def _tensors(model: LanguageModel) -> Iterator[Tensor]:
    dtype, shapes = dtypes.by_name(_CODES[model.dtype]), model.config.tensor_shapes()
    sources = parameter_sources(model.config, model.fused)
    for path, array in named(model.parameters).items():
        names = sources[path]
        expected = (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
        if array.shape != expected or str(array.dtype) != model.dtype:
            raise UsageError(
                "a parameter is not what the configuration and the other parameters say",
                code="save-parameter",
                tensor=path,
                found=f"{array.dtype} {list(array.shape)}",
                expected=f"{model.dtype} {list(expected)}",
                hint=_AS_STORED if len(set(model.storage)) > 1 else None,
            )
        file, offset = _ArrayFile(path, array), 0
        for name in names:
            nbytes = dtype.encoded_nbytes(shapes[name])
            yield Tensor(name, dtype, shapes[name], nbytes, file, offset)
            offset += nbytes


def _restated(config: bytes, dtype: str) -> bytes:
    """Returns a config.json that names `dtype`; byte for byte the same if it does already."""
    content = json.loads(config)
    given = [key for key in _DTYPE_KEYS if content.get(key) is not None] or ["torch_dtype"]
    if all(content.get(key) == dtype for key in given):
        return config
    return config_json(content | dict.fromkeys(given, dtype))


def _restated_metadata(metadata: Mapping[str, Any], tensors: list[Tensor], dtype: str) -> dict[str, Any]:
    """Returns an `.apr`'s metadata with the counts and the dtype of what is going to be written."""
    counts = {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "param_count": sum(math.prod(tensor.shape) for tensor in tensors),
    }
    restated = dict(metadata) | {key: count for key, count in counts.items() if type(metadata.get(key)) is int}
    if isinstance(config := metadata.get("hf_config"), dict):
        restated["hf_config"] = config | {key: dtype for key in _DTYPE_KEYS if config.get(key) is not None}
    return restated


def _config(config: Qwen2Config) -> bytes:
    """Returns the config.json of a model that has none."""
    return config_json(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
        | config.arithmetic_to_hf()
    )
