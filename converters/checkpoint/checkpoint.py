"""An open checkpoint, whatever kind of file or folder it came from: tensors, side files, metadata, configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.incomplete import Incomplete
from apr_jax.converters.checkpoint.qwen2 import HEAD, Qwen2Config
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.formats import apr_format, strict_json
from apr_jax.converters.formats.dtypes import DType
from apr_jax.converters.storage.source import SourceFile

# Where side files travel inside a container: a metadata key of `.apr`, and, since a lone .safetensors has no folder of
# its own, a string of its `__metadata__`. Both hold an object: name -> text, or {"base64": text} where it is not UTF-8.
SOURCE_FILES_KEY = "source_files"
SAFETENSORS_SOURCE_FILES_KEY = "apr_jax.source_files"
# Where an `.apr` keeps the order of the data in the safetensors file that it was made from, if it is unusual.
SOURCE_ORDER_KEY = "source_order"

# A larger one that only its ending makes a side file is more likely data that lie in the folder.
_MAX_CONFIG_BYTES = 16 << 20


class Checkpoint:
    """An open checkpoint; a context manager.

    Attributes:
      path: As it was given.
      kind: "apr", "safetensors" or "prepared".
      tensors: Name -> tensor, sorted by the names' UTF-8 bytes.
      placeholders: Name -> shape of heads that an `.apr` lists without data: the embedding stands for them.
      files: Side files by name, read when asked for.
      left_behind: Names of what else lies in the folder and does not go along; "NAME/" for folders.
      metadata: The metadata object of an `.apr`, in its order, or the `__metadata__` of safetensors.
      has_metadata: Whether there is any; safetensors may have an empty one, or none.
      sources: The files that hold the tensors.
      paths: Of every file that is read, index and side files included, and of the folder.
      warnings: What was let through and is worth saying.
      incomplete: Why it is no model of its own; None if it may be one.
      apr: The header of an `.apr`, with metadata and index as they stand there; None for safetensors.
      ignored: Keys of the configuration that `model_config` leaves out, since somebody said that they change nothing.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        *,
        tensors: Iterable[Tensor],
        files: SideFiles,
        metadata: dict[str, Any],
        sources: Iterable[SourceFile],
        warnings: Iterable[str],
        placeholders: Mapping[str, tuple[int, ...]] | None = None,
        apr: apr_format.AprPrologue | None = None,
        has_metadata: bool = True,
        incomplete: Incomplete | None = None,
    ):
        self.path = path
        self.kind = kind
        self.tensors: Mapping[str, Tensor] = _by_name(tensors)
        self.placeholders: Mapping[str, tuple[int, ...]] = MappingProxyType(dict(placeholders or {}))
        self.files: Mapping[str, bytes] = files
        self.left_behind = files.left_behind
        self.metadata = metadata
        self.has_metadata = has_metadata
        self.sources = tuple(sources)
        self.paths = tuple(dict.fromkeys((*(source.path for source in self.sources), *files.paths, path)))
        self.incomplete = incomplete
        self.warnings = [*([incomplete.sentence] if incomplete else []), *warnings]
        self.apr = apr
        self.ignored: frozenset[str] = frozenset()

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json; for an `.apr` without one, its `hf_config`, else one made from its metadata.

        Raises:
          RefusedError: Code "config-missing"; or that of what is no model of its own.
          BrokenContainerError: It is not a JSON object.
        """
        return self.config_for((tensor.name, tensor.dtype) for tensor in self.tensors.values())

    def config_for(self, tensors: Iterable[tuple[str, DType]]) -> dict[str, Any]:
        """Returns `config`; one that has to be made says of these tensors (name, type) what they are.

        Raises:
          RefusedError, BrokenContainerError: As `config`.
        """
        config = self._json_file(CONFIG_NAME)
        if config is not None:
            return config
        if self.kind == "apr":
            given = self.metadata.get("hf_config")
            if isinstance(given, dict):
                return given
            if self.metadata.get("architecture") is not None:
                return _made_config(self.model_config(), self.metadata, tensors)
        if self.incomplete is not None:
            raise self.incomplete.error(self.path)
        raise RefusedError(
            "there is no config.json",
            code="config-missing",
            file=self.path,
            hint="Name the folder that has it, or put the model's own beside the tensors.",
        )

    @property
    def has_config(self) -> bool:
        """Whether it holds a configuration of HuggingFace's; in its place an `.apr` has keys of its own."""
        return CONFIG_NAME in self.files or (self.kind == "apr" and isinstance(self.metadata.get("hf_config"), dict))

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The content of generation_config.json, or None.

        Raises:
          BrokenContainerError: It is not a JSON object.
        """
        return self._json_file("generation_config.json")

    def model_config(self) -> Qwen2Config:
        """Returns the configuration of the model, through its allow-list; what it opens with a word joins `warnings`.

        Raises:
          RefusedError: There is none, or it is not supported; or the checkpoint is no model of its own.
        """
        if self.incomplete is not None:
            raise self.incomplete.error(self.path)
        if self.kind == "apr" and not self.has_config:
            tied = HEAD not in self.tensors
            return Qwen2Config.from_apr(self.metadata, tied, self.path, self.ignored)
        said: list[str] = []
        try:
            return Qwen2Config.from_hf(self.config, self.path, self.ignored, said)
        finally:
            self.warnings += [warning for warning in said if warning not in self.warnings]

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Returns the same checkpoint, open files shared, with tensors under other names; missing ones keep theirs."""
        other = copy.copy(self)
        other.tensors = _by_name(
            dataclasses.replace(tensor, name=names.get(name, name)) for name, tensor in self.tensors.items()
        )
        other.placeholders = MappingProxyType({names.get(name, name): s for name, s in self.placeholders.items()})
        if self.kind == "apr":
            other.metadata = _with_names(self.metadata, names)
        return other

    def without(self, names: Iterable[str]) -> Checkpoint:
        """Returns the same checkpoint, open files shared, without the tensors of these names."""
        left = set(names)
        if not left:
            return self
        other = copy.copy(self)
        other.tensors = _by_name(tensor for name, tensor in self.tensors.items() if name not in left)
        other.placeholders = MappingProxyType({n: shape for n, shape in self.placeholders.items() if n not in left})
        return other

    def replaced(
        self,
        *,
        tensors: Iterable[Tensor],
        files: SideFiles,
        warnings: Iterable[str],
        metadata: dict[str, Any] | None = None,
        beside: Checkpoint | None = None,
    ) -> Checkpoint:
        """Returns a checkpoint of other tensors over the same files and those of `beside`; closing it closes both."""
        other = copy.copy(self)
        other.tensors = _by_name(tensors)
        other.files, other.left_behind = files, files.left_behind
        other.warnings = list(warnings)
        if beside is not None:
            other.sources = (*self.sources, *beside.sources)
            other.paths = tuple(dict.fromkeys((*self.paths, *beside.paths)))
        if metadata is not None:
            other.metadata = metadata
        return other

    def close(self) -> None:
        """Closes the files; tensors cannot be read afterwards."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, kind={self.kind!r}, {len(self.tensors)} tensors)"

    def _json_file(self, name: str) -> dict[str, Any] | None:
        if name not in self.files:
            return None
        value = strict_json.loads(self.files[name], what=name, max_bytes=_MAX_CONFIG_BYTES, file=self.path)
        if not isinstance(value, dict):
            raise BrokenContainerError(
                f"{name} is not a JSON object", code="config-type", file=self.path, found=type(value).__name__
            )
        return value


class SideFiles(Mapping[str, bytes]):
    """Files by name, each read when it is asked for: a tokenizer has megabytes, and few need it.

    Attributes:
      paths: Of the files, where they are files of their own, and of the index beside them.
      left_behind: As `Checkpoint`.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], bytes]],
        *,
        paths: Iterable[str] = (),
        left_behind: Iterable[str] = (),
    ):
        self._readers = dict(sorted(readers.items()))
        self.paths = tuple(paths)
        self.left_behind = tuple(left_behind)

    def __getitem__(self, name: str) -> bytes:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _by_name(tensors: Iterable[Tensor]) -> Mapping[str, Tensor]:
    ordered = sorted(tensors, key=lambda tensor: tensor.name.encode())
    return MappingProxyType({tensor.name: tensor for tensor in ordered})


def _with_names(metadata: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns an `.apr`'s metadata with other names wherever they list tensors."""
    changed = dict(metadata)
    order, shapes = metadata.get(SOURCE_ORDER_KEY), metadata.get("tensor_shapes")
    if isinstance(order, list):
        changed[SOURCE_ORDER_KEY] = [names.get(name, name) if isinstance(name, str) else name for name in order]
    if isinstance(shapes, dict):
        changed["tensor_shapes"] = {names.get(name, name): shape for name, shape in shapes.items()}
    return changed


def _made_config(
    model: Qwen2Config, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, DType]]
) -> dict[str, Any]:
    """Returns a config.json for tensors that come from an `.apr` without one."""
    held = dict(tensors)
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": float(model.rope_theta),
        "rms_norm_eps": float(model.rms_norm_eps),
        "tie_word_embeddings": HEAD not in held,
    } | model.arithmetic_to_hf()
    if model.head_dim * model.num_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    for key in ("bos_token_id", "eos_token_id"):
        if type(metadata.get("tokenizer." + key)) is int:
            config[key] = metadata["tokenizer." + key]
    # Types of 8 bits hold weights, never the numbers that a model computes with.
    found = Counter(dtype.torch for dtype in held.values() if dtype.is_float and (dtype.bits or 0) >= 16)
    if found:
        config["torch_dtype"] = found.most_common(1)[0][0]
    return config
