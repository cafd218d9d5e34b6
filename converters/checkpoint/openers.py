"""One way into every kind of checkpoint: a HuggingFace folder, one safetensors file, a sharded index, an `.apr`, a
folder that `checkpoint save` prepared.

Opening reads headers only. Tensors come as bytes in a stream, as rows, or as numpy arrays, each from the file that was
opened at the beginning; side files (config.json, tokenizer) are read when they are asked for.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from apr_jax.converters.checkpoint import file_names, folders, hub
from apr_jax.converters.checkpoint.checkpoint import (
    SAFETENSORS_SOURCE_FILES_KEY,
    SOURCE_FILES_KEY,
    Checkpoint,
    SideFiles,
)
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME, INDEX_NAME, INDEX_SUFFIX, SINGLE_NAME
from apr_jax.converters.checkpoint.gguf import open_gguf
from apr_jax.converters.checkpoint.incomplete import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    SHARD,
    recognise,
    recognise_apr,
    training_state,
)
from apr_jax.converters.checkpoint.qwen2 import HEAD, RECOMPUTED, TIED
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
    StorageError,
    counted,
)
from apr_jax.converters.formats import apr_format, gguf_format, prepared_format, safetensors_format, strict_json
from apr_jax.converters.formats.dtypes import Legacy
from apr_jax.converters.formats.foreign import refuse_foreign
from apr_jax.converters.formats.prepared_format import PREPARED_NAME
from apr_jax.converters.storage.source import SourceFile, exists, is_folder, is_plain_name

_MAX_SIDE_FILE_BYTES = 64 << 20
_MAX_SHARDS = 4096
_REPAIR = "Take the index away: shards whose names count them are read without one"


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    lenient: bool = False,
    legacy: Legacy = False,
    follow_links: bool = False,
    ignore_config: Iterable[str] = (),
) -> Checkpoint:
    """Opens a checkpoint and reads its headers.

    Args:
      path: A HuggingFace folder, a safetensors file, a `*.safetensors.index.json`, an `.apr` file, a GGUF file, or a
        prepared checkpoint (`prepared_format`); or a repository of the Hub (`hub`). The content decides what a file is.
      lenient: Whether to let oddities of `.apr` files pass with a warning: no footer, unaligned or unsorted parts, the
        magic of 2025, reserved bytes, unknown flags.
      legacy: Whether to read dtype ids of an `.apr` as older and other writers meant them, where the size leaves one
        type; or {id: "type"} to say besides what an id means.
      follow_links: Whether to open links that lead out of a folder; those into HuggingFace's cache are opened anyway.
      ignore_config: Keys of its configuration that change nothing and are left out where the model is asked for, as if
        they were not there; "rope_scaling.factor" is one within an object.

    Returns:
      The checkpoint, to be closed or used as a context manager.

    Raises:
      UsageError, MissingFileError: There is no such file, or a shard is missing; or as `hub.located`.
      BrokenContainerError: A file is not what it should be.
      RefusedError: It is, and cannot be handled rightly.
      StorageError: The system cannot read it.
    """
    checkpoint = _open(hub.located(path), lenient, legacy, follow_links)
    checkpoint.ignored = frozenset(ignore_config)
    return checkpoint


def _open(path: str, lenient: bool, legacy: Legacy, follow: bool) -> Checkpoint:
    if is_folder(path):
        return _open_folder(path, follow)
    if path.endswith(".json"):
        with SourceFile(path) as source:
            index = _parse_index(source)
        return _open_sharded(index, path, follow)
    with _closing_on_error() as opened:
        source = opened.enter_context(SourceFile(path))
        first = source.read_at(0, min(source.size, apr_format.HEADER_BYTES))
        if not _looks_like_safetensors(first, source.size):
            if first[: len(gguf_format.MAGIC)] == gguf_format.MAGIC:
                return open_gguf(path, source)
            if first[:3] == b"APR" or path.endswith(".apr"):
                return _open_apr(path, source, first, lenient, legacy)
            refuse_foreign(first, wanted="safetensors, a GGUF file or an .apr container", file=path)
        folder = os.path.dirname(path) or os.curdir
        in_huggingface_folder = os.path.basename(path) == SINGLE_NAME and exists(os.path.join(folder, CONFIG_NAME))
        in_huggingface_folder |= os.path.basename(path) == ADAPTER_NAME
        return _open_single(
            path, source, _side_files(folder, follow=follow) if in_huggingface_folder else SideFiles({})
        )


@contextlib.contextmanager
def _closing_on_error() -> Iterator[contextlib.ExitStack]:
    """Closes what was entered if the opening fails; else leaves it to the checkpoint."""
    with contextlib.ExitStack() as opened:
        yield opened
        opened.pop_all()


# --- .apr


def _open_apr(path: str, source: SourceFile, first: bytearray, lenient: bool, legacy: Legacy) -> Checkpoint:
    header = apr_format.parse_header(first, source.size, file=path, lenient=lenient)
    data = source.read_at(0, header.data_offset)
    prologue = apr_format.parse_prologue(data, source.size, file=path, lenient=lenient, legacy=legacy)
    tensors = [
        Tensor(entry.name, entry.dtype, entry.shape, entry.size, source, header.data_offset + entry.offset)
        for entry in prologue.entries
        if not entry.is_placeholder
    ]
    files = _embedded_files(prologue.metadata.get(SOURCE_FILES_KEY), path)
    names = [tensor.name for tensor in tensors]
    incomplete = recognise_apr(prologue.metadata, names, files.get(ADAPTER_CONFIG_NAME))
    state = None if incomplete else training_state(prologue.metadata, names)
    return Checkpoint(
        path,
        "apr",
        tensors=tensors,
        placeholders={entry.name: entry.shape for entry in prologue.entries if entry.is_placeholder},
        files=files,
        metadata=prologue.metadata,
        sources=(source,),
        warnings=[*([f"this is {state}"] if state else []), *prologue.warnings],
        apr=prologue,
        incomplete=incomplete,
    )


def _embedded_files(encoded: Any, path: str) -> SideFiles:
    """Returns the files that a container carries as text; each is checked now and decoded again when asked for."""
    if encoded is None:
        return SideFiles({})
    if not isinstance(encoded, dict):
        raise BrokenContainerError(
            "the embedded side files are not an object", code="source-files", file=path, found=type(encoded).__name__
        )

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: _embedded_file(name, encoded[name], path)

    for name in encoded:
        if not file_names.can_go_along(name):
            raise BrokenContainerError(
                "no embedded side file can have this name", code="source-files", file=path, found=repr(name)[:300]
            )
        _embedded_file(name, encoded[name], path)
    return SideFiles({name: reader(name) for name in encoded})


def _embedded_file(name: str, content: Any, path: str) -> bytes:
    if isinstance(content, str):
        return content.encode()
    try:
        if list(content) != ["base64"]:
            raise ValueError
        return base64.b64decode(content["base64"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise BrokenContainerError(
            "an embedded side file is neither text nor base64", code="source-files", file=path, found=repr(name)[:300]
        ) from None


# --- safetensors


def _looks_like_safetensors(first: bytearray, size: int) -> bool:
    """Whether a length and an object stand at the beginning; then two bytes of a foreign magic are a coincidence."""
    prefix = safetensors_format.PREFIX_BYTES
    return int.from_bytes(first[:prefix], "little") <= size - prefix and first[prefix : prefix + 1] == b"{"


def _header(source: SourceFile) -> safetensors_format.SafetensorsHeader:
    prefix = safetensors_format.PREFIX_BYTES
    first = source.read_at(0, min(source.size, apr_format.HEADER_BYTES))
    if not _looks_like_safetensors(first, source.size):
        refuse_foreign(first, wanted="safetensors", file=source.path)
    length = safetensors_format.parse_header_length(first, source.size, file=source.path)
    return safetensors_format.parse_header(source.read_at(prefix, length), source.size, file=source.path)


def _tensors(source: SourceFile, header: safetensors_format.SafetensorsHeader) -> Iterator[Tensor]:
    for entry in header.entries:
        yield Tensor(
            entry.name, entry.dtype, entry.shape, entry.end - entry.begin, source, header.data_start + entry.begin
        )


def _open_single(path: str, source: SourceFile, side_files: SideFiles, warnings: Iterable[str] = ()) -> Checkpoint:
    header = _header(source)
    metadata = header.metadata or {}
    # What the file itself carries was written with it; what lies beside it may have come there otherwise.
    embedded = metadata.get(SAFETENSORS_SOURCE_FILES_KEY)
    if embedded is not None:
        limit = safetensors_format.MAX_HEADER_BYTES
        decoded = strict_json.loads(
            embedded.encode(), what="the list of side files", max_bytes=limit, wide=True, file=path
        )
        side_files = _embedded_files(decoded, path)
    tensors = list(_tensors(source, header))
    incomplete = recognise(
        os.path.basename(source.path),
        [tensor.name for tensor in tensors],
        side_files.get(ADAPTER_CONFIG_NAME),
    )
    return Checkpoint(
        path,
        "safetensors",
        tensors=tensors,
        files=side_files,
        metadata=dict(metadata),
        sources=(source,),
        warnings=[*warnings, *header.warnings],
        has_metadata=header.metadata is not None,
        incomplete=incomplete,
    )


def _open_folder(path: str, follow: bool) -> Checkpoint:
    present = _listed(path)
    if PREPARED_NAME in present:
        return _open_prepared(path)
    shards = [name for name in present if name.endswith(".safetensors")]
    indices = [name for name in present if name.endswith(INDEX_SUFFIX)]
    if SINGLE_NAME in shards or (len(shards) == 1 and not indices):
        # With both present transformers takes the single file.
        name = SINGLE_NAME if SINGLE_NAME in shards else shards[0]
        left = [other for other in (*shards, *indices) if other != name]
        warnings = (
            [f"{name} is read; {', '.join(left)} beside it {'is' if len(left) == 1 else 'are'} not"] if left else []
        )
        with _closing_on_error() as opened:
            source = opened.enter_context(_inside(path, name, warnings, follow))
            return _open_single(path, source, _side_files(path, follow=follow), warnings)
    if len(indices) == 1 or INDEX_NAME in indices:
        name = INDEX_NAME if INDEX_NAME in indices else indices[0]
        with _inside(path, name, [], follow) as source:
            index = _parse_index(source)
        return _open_sharded(index, path, follow)
    prepared_format.refuse_orbax(path, present)
    missing = None if indices else _missing_of_series(shards)
    if missing is not None:
        _refuse_missing(missing, len(shards) + len(missing), path)
        return _open_sharded(_index_of(path, shards, follow), path, follow)
    if ADAPTER_CONFIG_NAME in present and not shards:
        files = _side_files(path, follow=follow)
        pickled = recognise(ADAPTER_NAME, (), files.get(ADAPTER_CONFIG_NAME))
        if pickled is not None:
            raise pickled.error(path, "Its weights are no safetensors: save_pretrained of peft writes them")
    what, hint = folders.what_else(path)
    raise MissingFileError(
        f"the folder holds {what}" if what else "the folder holds no checkpoint that can be recognised",
        code="no-checkpoint",
        file=path,
        found=", ".join((*indices, *folders.tensor_files(present)))[:300] or None,
        expected=f"{SINGLE_NAME} or {INDEX_NAME}",
        hint=hint,
    )


def _open_prepared(path: str) -> Checkpoint:
    description = prepared_format.read(path)
    tensors = []
    with _closing_on_error() as opened:
        for parameter in description.parameters:
            source = opened.enter_context(prepared_format.open_parameter(path, description, parameter))
            begin = 0
            for name, shape in parameter.tensors.items():
                nbytes = description.stored.nbytes(shape)
                tensors.append(Tensor(name, description.stored, shape, nbytes, source, begin))
                begin += nbytes
        files = _side_files(path)
        # Orbax's own files describe the parameters.
        files.paths += tuple(os.path.join(place, name) for place, _, names in os.walk(path) for name in names)
        return Checkpoint(
            path,
            "prepared",
            tensors=tensors,
            files=files,
            metadata=dict(description.metadata or {}),
            sources=dict.fromkeys(tensor.source for tensor in tensors),
            warnings=(),
            has_metadata=description.metadata is not None,
        )


# --- shards


@dataclasses.dataclass(frozen=True)
class _ShardIndex:
    """Which shard holds which tensor.

    Attributes:
      path: Of the index.
      weight_map: Tensor's name -> shard's.
      total_size: What it says of all tensors' bytes.
      on_disk: Whether there is such a file; else the shards themselves say what they hold.
    """

    path: str
    weight_map: dict[str, str]
    total_size: Any
    on_disk: bool = True

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path) or os.curdir

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def _missing_of_series(shards: Sequence[str]) -> list[str] | None:
    """Returns the shards that lack of one model, by the names of the others; None if they are not of one model."""
    series = [match for name in shards if (match := SHARD.fullmatch(name))]
    if not series or len(series) != len(shards) or len({(match[1], match[3]) for match in series}) != 1:
        return None
    first, width = series[0], len(series[0][2])
    count = min(int(first[3]), _MAX_SHARDS + 1)
    expected = (f"{first[1]}-{number:0{width}d}-of-{first[3]}.safetensors" for number in range(1, count + 1))
    return [name for name in expected if name not in shards]


def _index_of(folder: str, shards: Sequence[str], follow: bool) -> _ShardIndex:
    weight_map: dict[str, str] = {}
    total = 0
    for name in shards:
        with _inside(folder, name, [], follow) as source:
            for tensor in _tensors(source, _header(source)):
                weight_map[tensor.name] = name
                total += tensor.nbytes
    return _ShardIndex(os.path.join(folder, INDEX_NAME), weight_map, total, on_disk=False)


def _open_sharded(index: _ShardIndex, path: str, follow: bool) -> Checkpoint:
    """Opens the shards that an index names; `path` is what the user gave."""
    warnings = _shard_warnings(index)
    if not index.on_disk:
        warnings.append(f"there is no {INDEX_NAME}; the {len(index.shards)} shards that are there are all of them")
    with _closing_on_error() as opened:
        sources = []
        held: dict[str, list[Tensor]] = {}
        metadata: dict[str, str] = {}
        has_metadata = False
        for name in _present_shards(index):
            source = opened.enter_context(_inside(index.folder, name, warnings, follow))
            header = _header(source)
            sources.append(source)
            warnings += header.warnings
            has_metadata = has_metadata or header.metadata is not None
            for key, value in (header.metadata or {}).items():
                if metadata.setdefault(key, value) != value:
                    warnings.append(f"the shards disagree about {key!r} in {safetensors_format.METADATA_KEY}")
            for tensor in _tensors(source, header):
                held.setdefault(tensor.name, []).append(tensor)
        files = _side_files(index.folder, index.path if index.on_disk else None, follow)
        _check_weight_map(_without_needless(index, held, files, warnings), held)
        tensors = [tensor for (tensor,) in held.values()]
        total = sum(tensor.nbytes for tensor in tensors)
        if type(index.total_size) is not int or index.total_size != total:
            warnings.append(f"the index says total_size {index.total_size!r}; the tensors have {total} bytes")
        return Checkpoint(
            path,
            "safetensors",
            tensors=tensors,
            files=files,
            metadata=dict(metadata),
            sources=sources,
            warnings=warnings,
            has_metadata=has_metadata,
        )


def _parse_index(source: SourceFile) -> _ShardIndex:
    path, limit = source.path, safetensors_format.MAX_HEADER_BYTES
    if source.size > limit:
        raise BrokenContainerError("the index is too large", code="index-size", file=path, found=source.size)
    text = source.read_at(0, source.size)
    refuse_foreign(text, wanted="the index of a sharded checkpoint", file=path)
    value = strict_json.loads(text, what="the index", max_bytes=limit, max_depth=8, file=path)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenContainerError(
            "the index has no weight_map from tensor names to file names",
            code="index-weight-map",
            file=path,
            found=repr(value)[:80],
            hint="Give the folder, or the path of an index of shards",
        )
    if not weight_map:
        raise BrokenContainerError(
            "the index lists no tensors", code="index-weight-map", file=path, found="weight_map {}", hint=_REPAIR
        )
    metadata = value.get("metadata")
    index = _ShardIndex(path, weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None)
    _check_shard_names(index)
    return index


def _check_shard_names(index: _ShardIndex) -> None:
    shards = index.shards
    for name in shards:
        if not is_plain_name(name):
            raise RefusedError(
                "the index names a shard that is not a plain file name in its folder",
                code="path-escapes",
                file=index.path,
                found=repr(name)[:300],
                hint=_REPAIR,
            )
        if not name.endswith(".safetensors"):
            raise RefusedError(
                "the index names a shard that is not a safetensors file",
                code="shard-extension",
                file=index.path,
                found=repr(name)[:300],
                hint=_REPAIR,
            )
    folded = Counter(map(str.casefold, shards))
    if alike := [name for name in shards if folded[name.casefold()] > 1]:
        raise RefusedError(
            "the index names shards that differ in upper and lower case only",
            code="shard-case",
            file=index.path,
            found=", ".join(alike)[:300],
            hint=_REPAIR,
        )
    if len(shards) > _MAX_SHARDS:
        raise RefusedError(
            "too many shards",
            code="shard-count",
            file=index.path,
            found=len(shards),
            expected=f"at most {_MAX_SHARDS}",
            hint="Convert its shards one by one, with --as-is",
        )


def _present_shards(index: _ShardIndex) -> list[str]:
    """Returns the names of the shards, if there is a file for each."""
    missing = [name for name in index.shards if not exists(os.path.join(index.folder, name))]
    _refuse_missing(missing, len(index.shards), index.folder)
    return index.shards


def _refuse_missing(missing: Sequence[str], count: int, folder: str) -> None:
    if missing:
        raise MissingFileError(
            f"of {counted(count, 'shard')} these are missing: {', '.join(missing[:20])}",
            code="shard-missing",
            file=os.path.join(folder, missing[0]),
            hint="Download them again; `convert --as-is` takes one shard alone, given its path",
        )


def _shard_warnings(index: _ShardIndex) -> list[str]:
    warnings = []
    present = [name for name in _listed(index.folder) if name.endswith(".safetensors")]
    extra = sorted(set(present) - set(index.shards))
    if extra:
        warnings.append(f"not in the index and not read: {', '.join(extra)}")
    counts = {int(match[3]) for name in index.shards if (match := SHARD.fullmatch(name))}
    if counts and counts != {len(index.shards)}:
        warnings.append(f"the index names {counted(len(index.shards), 'shard')}, the names say {sorted(counts)}")
    return warnings


def _without_needless(
    index: _ShardIndex, held: Mapping[str, Sequence[Tensor]], files: SideFiles, warnings: list[str]
) -> _ShardIndex:
    """Returns an index without what no shard holds and no model needs: a head that is the embedding, RoPE's tables.

    Writers that list a model's parameters list them, and those that write tensors leave them out; transformers never
    looks.
    """
    unheld = [name for name in index.weight_map if name not in held]
    heads = [name for name in unheld if f".{name}".endswith(f".{HEAD}")]
    needless = [name for name in unheld if name.endswith(RECOMPUTED)]
    if heads and _says_tied(files):
        needless += heads
        warnings.append(
            f"the index lists {', '.join(heads)}, which no shard holds; {CONFIG_NAME} says that it is the embedding"
        )
    return dataclasses.replace(
        index, weight_map={name: shard for name, shard in index.weight_map.items() if name not in needless}
    )


def _says_tied(files: SideFiles) -> bool:
    try:
        config = strict_json.loads(files[CONFIG_NAME], what=CONFIG_NAME, max_bytes=_MAX_SIDE_FILE_BYTES)
    except (KeyError, AprJaxError):
        return False
    return isinstance(config, dict) and config.get(TIED) is True


def _check_weight_map(index: _ShardIndex, held: Mapping[str, Sequence[Tensor]]) -> None:
    """Checks that every tensor is in exactly the shard in which the index says that it is."""
    twice, elsewhere, unlisted = [], [], []
    for name, tensors in held.items():
        shards = [os.path.basename(tensor.source.path) for tensor in tensors]
        if len(shards) > 1:
            twice.append(f"{name}: in {' and in '.join(shards)}")
        elif name not in index.weight_map:
            unlisted.append(f"{name}: in {shards[0]}, but not in the index")
        elif shards != [index.weight_map[name]]:
            elsewhere.append(f"{name}: in {shards[0]}, the index says {index.weight_map[name]}")
    lacking = [f"{name}: not in {shard}" for name, shard in index.weight_map.items() if name not in held]
    kinds = (
        ("tensor-in-two-shards", twice),
        ("tensor-not-in-shard", lacking + elsewhere),
        ("tensor-not-in-index", unlisted),
    )
    problems = [problem for _, listed in kinds for problem in listed]
    if problems:
        raise BrokenContainerError(
            f"index and shards contradict each other, {counted(len(problems), 'tensor')}:\n  "
            + "\n  ".join(problems[:100]),
            code=next(code for code, listed in kinds if listed),
            file=index.path,
            tensor=problems[0].partition(": ")[0] if len(problems) == 1 else None,
        )


# --- folders


def _side_files(folder: str, index: str | None = None, follow: bool = False) -> SideFiles:
    """Returns the files that belong to a checkpoint beside its tensors, by their well-known names.

    Anything else is left behind, and said to be: an unknown text may be a note, a result or somebody's credentials.
    """
    listed = _listed(folder)

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: _read_side_file(folder, name, follow)

    def belongs(name: str) -> bool:
        return file_names.is_side_file(name) and not is_folder(os.path.join(folder, name))

    templates = file_names.CHAT_TEMPLATES_FOLDER
    if templates.rstrip("/") in listed and is_folder(os.path.join(folder, templates)):
        listed.remove(templates.rstrip("/"))
        listed += [templates + name for name in _listed(os.path.join(folder, templates))]
    names = [name for name in listed if belongs(name)]
    others = (name for name in listed if not file_names.is_tensors(name) and name not in set(names))
    return SideFiles(
        {name: reader(name) for name in names},
        paths=[*(os.path.join(folder, name) for name in names), folder, *([index] if index else [])],
        left_behind=[f"{name}/" if os.path.isdir(os.path.join(folder, name)) else name for name in others],
    )


def _read_side_file(folder: str, name: str, follow: bool) -> bytes:
    with _inside(folder, name, [], follow) as source:
        if source.size > _MAX_SIDE_FILE_BYTES:
            raise RefusedError(
                "the file is too large for what stands beside a checkpoint",
                code="side-file-size",
                file=source.path,
                found=f"{source.size} bytes",
                expected=f"at most {_MAX_SIDE_FILE_BYTES}",
                hint="Move it out of the folder if it is something else",
            )
        return bytes(source.read_at(0, source.size))


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise StorageError(error.strerror or str(error), code="open-failed", file=folder) from error


def _inside(folder: str, name: str, warnings: list[str], follow: bool) -> SourceFile:
    """Opens a file of a folder, unless it is a link that leads out of it and is not to be followed.

    HuggingFace's cache is made of such links, of one shape: models--X/snapshots/REVISION/FILE -> ../../blobs/HASH. So
    are folders that old versions of its downloader wrote: FILE -> ~/.cache/huggingface/hub/models--X/blobs/HASH.

    Raises:
      RefusedError: Code "path-escapes".
    """
    path = os.path.join(folder, name)
    if not follow and not _stays_inside(folder, path) and not folders.is_blob(os.path.realpath(path)):
        raise RefusedError(
            "this is a link that leads out of its folder",
            code="path-escapes",
            file=path,
            found=os.path.realpath(path),
            hint="--follow-links opens it all the same; or copy it here",
        )
    if os.path.islink(path) and not exists(path):
        raise MissingFileError(
            "this is a link to a file that is gone",
            code="file-missing",
            file=path,
            found=os.path.realpath(path),
            hint="Download it again; copies in place of links survive when a cache is cleaned",
        )
    source = SourceFile(path)
    if source.links > 1 and name.endswith(".safetensors"):
        warnings.append(f"{name} is one of {source.links} hard links to its content")
    return source


def _stays_inside(folder: str, path: str) -> bool:
    root = os.path.realpath(folder)
    snapshots = os.path.dirname(root)
    allowed = [root, os.path.join(root, file_names.CHAT_TEMPLATES_FOLDER.rstrip("/"))]
    if os.path.basename(snapshots) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    return os.path.dirname(os.path.realpath(path)) in allowed
