"""PEFT adapters: what a LoRA adds to the weights of a checkpoint, and the checkpoint with it added.

A matrix W with adapter matrices A [rank, in] and B [out, rank] becomes W + scale * B A, where the scale is alpha / rank
(alpha / sqrt(rank) with `use_rslora`). With `use_dora` each row is then brought to the length that the adapter stores.
Modules that were trained whole (`modules_to_save`, biases, grown embeddings) take the place of the old ones.

Sums are computed in float32 and rounded once, to the type of what they replace, where they are written.

Source: `peft/tuners/lora/layer.py` (`get_delta_weight`, `merge`), `dora.py`, `utils/save_and_load.py` of PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint.checkpoint import Checkpoint, SideFiles
from apr_jax.converters.checkpoint.decoded import ADAPTER, DecodedTensor, DecoderCache, Form
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.hub import located
from apr_jax.converters.checkpoint.incomplete import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD, TIED
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.checkpoint.tied_heads import is_tied
from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError, counted
from apr_jax.converters.formats import dtypes, strict_json
from apr_jax.converters.storage.isolation import Isolated
from apr_jax.converters.storage.source import SourceFile, exists

if TYPE_CHECKING:
    from apr_jax.converters.formats.packed_codecs import Decoder

_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 16 << 20
_SHOWN = 20
# Matrices and magnitudes of an adapter; some files keep its name between these parts.
_LORA = re.compile(
    r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(?!weight$|bias$)\w+)?(\.weight|\.bias)?"
)
# What changes the function that an adapter computes, and is not computed here.
_UNSUPPORTED = (
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "monteclora_config",
)
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def with_adapter(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> Checkpoint:
    """Returns the checkpoint with an adapter added to its weights, which are computed when they are read.

    Args:
      checkpoint: A dense one (`packed_forms.dense_view`).
      folder: Holds adapter_config.json and adapter_model.safetensors; or a repository of the Hub that does (`hub`).

    Returns:
      A checkpoint over the files of both; closing it closes them. Where a tied head and the embedding become two
      matrices, the configuration says so; a grown embedding changes its `vocab_size`.

    Raises:
      MissingFileError: One of the two files is not there.
      RefusedError: Code "adapter-unsupported": another kind than LoRA, or an option that nothing here computes;
        "adapter-tensors": tensors that belong to nothing in the checkpoint, or do not fit it.
      BrokenContainerError: A file is broken.
    """
    adapter = _Adapter.open(located(folder))
    try:
        merged = _Merge(checkpoint, adapter).tensors()
    except BaseException:
        adapter.opened.close()
        raise
    config = _config_changes(checkpoint, merged)
    warnings = [*checkpoint.warnings, *adapter.warnings]
    if TIED in config:
        warnings.append("the adapter changes the embedding or the head, not both: the head is no longer tied")
    return checkpoint.replaced(
        tensors=merged.values(),
        files=_configured(checkpoint.files, config),
        warnings=warnings,
        beside=adapter.opened,
    )


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a weight [out, in]: scale times b a.

    Attributes:
      a: float32 [r, in].
      b: float32 [out, r].
      scale: alpha / r, or alpha / sqrt(r).
    """

    a: Any
    b: Any
    scale: float


def low_rank_parts(folder: str | os.PathLike[str]) -> dict[str, LowRank]:
    """Returns name of a weight -> what a plain LoRA adapter adds to it; modules with more than A and B are left out.

    Raises:
      AprJaxError: As `with_adapter`.
    """
    adapter = _Adapter.open(located(folder))
    try:
        sides: dict[str, dict[str, Tensor]] = {}
        for name, tensor in adapter.opened.tensors.items():
            match = _LORA.fullmatch(name.removeprefix(_PREFIX))
            # B's bias is added to the module's bias.
            if match is not None and match[3] != ".bias":
                sides.setdefault(match[1], {})[match[2]] = tensor
        return {
            f"{module}.weight": LowRank(_f32(held["A"]), _f32(held["B"]), adapter.scale(module))
            for module, held in sides.items()
            if held.keys() == {"A", "B"}
        }
    finally:
        adapter.opened.close()


# --- the adapter's own files


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An open adapter.

    Attributes:
      config: adapter_config.json.
      opened: Its tensors.
      path: The folder.
    """

    config: Mapping[str, Any]
    opened: Checkpoint
    path: str

    @classmethod
    def open(cls, folder: str) -> _Adapter:
        config_path, path = (os.path.join(folder, name) for name in (ADAPTER_CONFIG_NAME, ADAPTER_NAME))
        if not exists(config_path):
            raise MissingFileError(f"the adapter has no {ADAPTER_CONFIG_NAME}", code="adapter-missing", file=folder)
        with SourceFile(config_path) as source:
            text = source.read_at(0, min(source.size, _MAX_CONFIG_BYTES + 1))
        config = strict_json.loads(text, what=ADAPTER_CONFIG_NAME, max_bytes=_MAX_CONFIG_BYTES, file=folder)
        if not isinstance(config, dict):
            raise BrokenContainerError(
                f"{ADAPTER_CONFIG_NAME} is not a JSON object",
                code="config-type",
                file=folder,
                found=type(config).__name__,
            )
        if not exists(path):
            pickled = exists(os.path.join(folder, "adapter_model.bin"))
            raise MissingFileError(
                f"the adapter has no {ADAPTER_NAME}",
                code="adapter-missing",
                file=folder,
                hint="adapter_model.bin is a pickle: load and save the adapter with PEFT" if pickled else None,
            )
        _check_supported(config, folder)
        return cls(config, open_checkpoint(path), folder)

    @property
    def warnings(self) -> list[str]:
        start = str(self.config.get("init_lora_weights")).lower()
        if start.startswith(_RESIDUAL):
            return [f"the adapter began as {start}: it belongs to the base that was saved with it, without its part"]
        return []

    def number(self, key: str, module: str) -> float:
        """Returns `r` or `lora_alpha` for a module: what a pattern says, else what holds for all."""
        patterns = self.config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key])
        value: Any = self.config.get(key)
        for pattern, given in (patterns if isinstance(patterns, dict) else {}).items():
            try:
                found = _matches(pattern, module)
            except RefusedError as error:
                error.file, error.found = self.path, pattern[:80]
                raise
            if found:
                value = given
                break
        if type(value) not in (int, float) or (key == "r" and value < 1):
            raise RefusedError(
                f"{key} is not a positive number",
                code="adapter-unsupported",
                file=self.path,
                found=repr(value)[:80],
                hint="PEFT's merge_and_unload makes a plain checkpoint of it",
            )
        return float(value)

    def scale(self, module: str) -> float:
        rank = self.number("r", module)
        return self.number("lora_alpha", module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


# Without repetition and alternatives an expression ends soon.
_PATTERN_SECONDS = 0.1
_PLAIN_PATTERN = re.compile(r"[\w.\\^$-]*")


@functools.cache
def _matches(pattern: str, module: str) -> bool:
    """Whether a module is meant by a pattern of an adapter's configuration: a regular expression of whoever wrote it.

    Raises:
      RefusedError: Code "not-bounded": it does not end.
    """
    if _PLAIN_PATTERN.fullmatch(pattern):
        return matched(pattern, module)
    return bool(_expressions().call("matched", pattern, module))


@functools.cache
def _expressions() -> Isolated:
    return Isolated(__name__, "a pattern of the adapter's configuration", seconds=_PATTERN_SECONDS)


def matched(pattern: str, module: str) -> bool:
    """Is PEFT's rule; called in a child where a pattern may not end."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _check_supported(config: Mapping[str, Any], path: str) -> None:
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise RefusedError(
            f"the adapter is {config.get('peft_type')!r}",
            code="adapter-unsupported",
            file=path,
            expected="'LORA'",
            hint="PEFT's merge_and_unload makes a plain checkpoint of it",
        )
    asked = [key for key in _UNSUPPORTED if config.get(key)]
    if asked:
        raise RefusedError(
            f"the adapter needs {', '.join(asked)}, which apr_jax does not compute",
            code="adapter-unsupported",
            file=path,
            hint="PEFT's merge_and_unload makes a plain checkpoint of it, if it can be merged",
        )


# --- what it does to the weights


@dataclasses.dataclass
class _Parts:
    """What an adapter holds for one module, by kind ("A", "embedding_B", "magnitude_vector", "B.bias", ...)."""

    module: str
    held: dict[str, Tensor]


class _Merge:
    def __init__(self, checkpoint: Checkpoint, adapter: _Adapter):
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._cache = DecoderCache()
        self._problems: list[str] = []

    def tensors(self) -> dict[str, Tensor]:
        """Returns name -> tensor of the checkpoint with the adapter."""
        merged = dict(self._checkpoint.tensors)
        modules: dict[str, _Parts] = {}
        for name, tensor in self._adapter.opened.tensors.items():
            plain = name.removeprefix(_PREFIX)
            match = _LORA.fullmatch(plain)
            if match is None:
                self._replace(merged, plain.replace(".base_layer.", ".").replace(".modules_to_save.", "."), tensor)
            else:
                parts = modules.setdefault(match[1], _Parts(match[1], {}))
                parts.held[match[2] + (".bias" if match[3] == ".bias" else "")] = tensor
        for parts in modules.values():
            self._add(merged, parts)
        if not self._adapter.opened.tensors:
            self._problems.append("it holds no tensors")
        if self._problems:
            listed = self._problems[:_SHOWN]
            more = [f"... and {len(self._problems) - _SHOWN} more"] if len(self._problems) > _SHOWN else []
            raise RefusedError(
                f"the adapter does not fit the checkpoint, {counted(len(self._problems), 'tensor')}:\n  "
                + "\n  ".join(listed + more),
                code="adapter-tensors",
                file=self._adapter.path,
                hint="Is this the model that it was trained on?",
            )
        return _untied(self._checkpoint, merged, bool(self._adapter.config.get("ensure_weight_tying")))

    def _replace(self, merged: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        """A module that was trained whole takes the place of the old one; a vocabulary may have grown."""
        old = self._checkpoint.tensors.get(name)
        if old is None and name == HEAD:
            old = self._checkpoint.tensors.get(EMBEDDING)
        rows = slice(1, None) if name in (EMBEDDING, HEAD) else slice(None)
        if old is None or not tensor.dtype.is_float:
            self._problems.append(f"{name}: nothing of this name is in the checkpoint")
        elif old.shape[rows] != tensor.shape[rows] or len(old.shape) != len(tensor.shape):
            self._problems.append(f"{name}: {list(tensor.shape)}, the checkpoint has {list(old.shape)}")
        else:
            merged[name] = dataclasses.replace(tensor, name=name)

    def _add(self, merged: dict[str, Tensor], parts: _Parts) -> None:
        name, held = f"{parts.module}.weight", dict(parts.held)
        # A tied head has no tensor of its own.
        base = merged.get(name) or (merged.get(EMBEDDING) if name == HEAD else None)
        is_embedding = "embedding_A" in held
        a, b = (held.pop(f"embedding_{side}" if is_embedding else side, None) for side in "AB")
        magnitude, bias = held.pop("magnitude_vector", None), held.pop("B.bias", None)
        if base is None or a is None or b is None or held or (is_embedding and magnitude is not None):
            lacks = "nothing of this name is in the checkpoint" if base is None else f"holds {', '.join(parts.held)}"
            self._problems.append(f"{parts.module}: {lacks}")
            return
        problem = self._misfit(parts.module, base, a, b, magnitude, is_embedding)
        if problem:
            self._problems.append(f"{parts.module}: {problem}")
            return
        scale = self._adapter.scale(parts.module)
        form = Form(ADAPTER, (("rank", a.shape[0]),))
        needed = [part for part in (base, a, b, magnitude) if part is not None]

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs

            lower, upper = (_f32(part) for part in (a, b))
            if is_embedding:
                lower, upper = upper.T, lower.T
            lengths = None if magnitude is None else _f32(magnitude).reshape(-1)
            return packed_codecs.Sum(_f32(base), lower, upper, scale, lengths)

        merged[name] = self._decoded(name, base, form, needed, make)
        if bias is not None:
            self._add_bias(merged, parts.module, bias, scale, form)

    def _add_bias(self, merged: dict[str, Tensor], module: str, bias: Tensor, scale: float, form: Form) -> None:
        name = f"{module}.bias"
        base = merged.get(name)
        if base is None or base.shape != bias.shape:
            self._problems.append(f"{module}: a bias that does not fit")
            return

        def make() -> Decoder:
            import numpy as np

            from apr_jax.converters.formats import packed_codecs

            one = np.ones((1, 1), np.float32)
            return packed_codecs.Sum(_f32(base)[None], _f32(bias)[None], one, scale)

        merged[name] = self._decoded(name, base, form, [base, bias], make)

    def _decoded(
        self, name: str, base: Tensor, form: Form, parts: Iterable[Tensor], make: Callable[[], Decoder]
    ) -> DecodedTensor:
        tensor = DecodedTensor.of(name, dtypes.by_name("f32"), base.shape, form, tuple(parts), make, self._cache)
        return dataclasses.replace(tensor, written_type=base.written_as)

    def _misfit(
        self, module: str, base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, is_embedding: bool
    ) -> str | None:
        rows, columns = base.shape if len(base.shape) == 2 else (0, 0)
        if is_embedding:
            rows, columns = columns, rows
        rank = int(self._adapter.number("r", module))
        wanted = {"A": (a, (rank, columns)), "B": (b, (rows, rank))}
        for label, (tensor, shape) in wanted.items():
            if tensor.shape != shape or not tensor.dtype.is_float:
                return f"{label} is {tensor.dtype.name} {list(tensor.shape)}, rank and weight need {list(shape)}"
        if magnitude is not None and (dtypes.element_count(magnitude.shape) != rows or not magnitude.dtype.is_float):
            return f"the magnitudes are {list(magnitude.shape)}, the weight has {rows} rows"
        return None


def _f32(tensor: Tensor) -> Any:
    return tensor.read().astype("f4", copy=False)


# --- what it does to the configuration


def _untied(checkpoint: Checkpoint, merged: dict[str, Tensor], keep_tied: bool) -> dict[str, Tensor]:
    """Gives a tied model a head of its own where only one of head and embedding was changed."""
    before = checkpoint.tensors
    if EMBEDDING not in before or HEAD in before or not is_tied(checkpoint):
        return merged
    changed = merged[EMBEDDING] is not before[EMBEDDING]
    if changed and HEAD not in merged and not keep_tied:
        if merged[EMBEDDING].shape != before[EMBEDDING].shape:
            # A vocabulary that has grown: the head has to grow with it.
            return merged
        merged[HEAD] = dataclasses.replace(before[EMBEDDING], name=HEAD)
    return merged


def _config_changes(checkpoint: Checkpoint, merged: Mapping[str, Tensor]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if HEAD in merged and HEAD not in checkpoint.tensors and is_tied(checkpoint):
        changes[TIED] = False
    before, after = checkpoint.tensors.get(EMBEDDING), merged.get(EMBEDDING)
    if before is not None and after is not None and before.shape != after.shape:
        changes["vocab_size"] = after.shape[0]
    return changes


def _configured(files: Mapping[str, bytes], changes: Mapping[str, Any]) -> SideFiles:
    def reader(name: str) -> Callable[[], bytes]:
        def read() -> bytes:
            if name != CONFIG_NAME or not changes:
                return files[name]
            config = json.loads(files[name]) | changes
            return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

        return read

    return SideFiles(
        {name: reader(name) for name in files},
        paths=getattr(files, "paths", ()),
        left_behind=getattr(files, "left_behind", ()),
    )
