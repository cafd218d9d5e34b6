"""What a conversion is going to write, decided and laid out before any data is touched: files, tensors, types, offsets.

By default no payload byte changes. Tensors are laid out in name order in both containers, so that the data sections of
a 16-bit Qwen2 model are the same bytes in both, and a conversion is a new prologue and one long copy. Everything that
came beside the tensors goes along: config, tokenizer and other side files, `__metadata__`, the metadata of an `.apr`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from apr_jax.converters.checkpoint.checkpoint import (
    SAFETENSORS_SOURCE_FILES_KEY,
    SOURCE_FILES_KEY,
    SOURCE_ORDER_KEY,
    Checkpoint,
)
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, shard_name
from apr_jax.converters.checkpoint.naming import Rename, check_names, renamed
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD, Qwen2Config, check_tensors
from apr_jax.converters.checkpoint.side_files import broken
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.checkpoint.tied_heads import is_tied, same_values
from apr_jax.converters.convert import apr_metadata, apr_tokenizer
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    FindingError,
    RefusedError,
    UsageError,
    printable,
)
from apr_jax.converters.formats import apr_format, casts, dtypes, safetensors_format, strict_json
from apr_jax.converters.formats.dtypes import DType
from apr_jax.converters.storage.source import SourceFile, is_folder

_SHOWN_NAMES = 10
_LOOKED_AT_BYTES = 1 << 20
_ALL_THE_SAME = "--as-is converts it all the same"


@dataclasses.dataclass(frozen=True)
class CastRule:
    """A request to cast: `[GLOB=]TYPE`.

    Attributes:
      glob: Which tensors, by name, upper and lower case distinct.
      target: The type to cast to; if it is quantised, what `apr` leaves in float32 becomes or stays float32.
    """

    glob: str
    target: DType

    @classmethod
    def parse(cls, text: str) -> CastRule:
        """Reads "GLOB=TYPE", or "TYPE" for all tensors.

        Raises:
          UsageError, RefusedError: As `casts.target_type`.
        """
        glob, _, name = text.rpartition("=")
        return cls(glob or "*", casts.target_type(name))


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
      name: Its name.
      shape: Its dimensions, outermost first.
      source: The tensor whose bytes it gets; the embedding, for a head that is written as a copy.
      dtype: Its type in the output.
      nbytes: Its bytes in the output.
      file: The output file that holds it; "" if the output is a single file.
      offset: Where in that file it begins.
    """

    name: str
    shape: tuple[int, ...]
    source: Tensor
    dtype: DType
    nbytes: int
    file: str
    offset: int

    @property
    def cast(self) -> tuple[str, str] | None:
        """Names of the types to cast from and to, or None for a copy."""
        return None if self.source.dtype is self.dtype else (self.source.dtype.name, self.dtype.name)


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """One output file that holds tensors.

    Attributes:
      name: Its name in the output folder; "" if the output is a single file.
      prologue: The bytes before the data.
      size: Its bytes.
      tensors: What it holds, in the order of the data.
      has_footer: Whether it ends with a CRC-32.
    """

    name: str
    prologue: bytes
    size: int
    tensors: tuple[PlannedTensor, ...]
    has_footer: bool


@dataclasses.dataclass
class Plan:
    """Everything that a conversion is going to do, decided before any data is touched.

    Attributes:
      checkpoint: The source.
      output: The path to write.
      to: "apr" or "safetensors".
      is_folder: Whether the output is a folder.
      files: Files with tensors.
      side_files: Other files of an output folder, name -> content.
      carried: Names of the side files that travel inside the output file, or lie beside it.
      dropped: Tensors of the source that the output leaves out, with the reason.
      allow_overflow: Whether a cast may turn finite values into infinities.
      warnings: What is worth saying.
    """

    checkpoint: Checkpoint
    output: str
    to: str
    is_folder: bool
    files: tuple[PlannedFile, ...]
    side_files: dict[str, bytes]
    carried: tuple[str, ...]
    dropped: dict[str, str]
    allow_overflow: bool
    warnings: list[str]

    @property
    def tensors(self) -> list[PlannedTensor]:
        """The tensors of all files."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that are read."""
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        """Bytes of all files that are written."""
        return sum(file.size for file in self.files) + sum(map(len, self.side_files.values()))

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values."""
        return {
            "source": self.checkpoint.path,
            "source_kind": self.checkpoint.kind,
            "output": self.output,
            "to": self.to,
            "files": [
                {"name": file.name or os.path.basename(self.output), "bytes": file.size, "tensors": len(file.tensors)}
                for file in self.files
            ],
            "side_files": list(self.carried),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "source": tensor.source.name,
                    "source_dtype": tensor.source.dtype.name,
                    "dtype": tensor.dtype.name,
                    "bytes": tensor.nbytes,
                    "file": tensor.file or os.path.basename(self.output),
                    "offset": tensor.offset,
                }
                for tensor in self.tensors
            ],
            "dropped": self.dropped,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "warnings": self.warnings,
        }


def make_plan(
    checkpoint: Checkpoint,
    output: str,
    *,
    to: str,
    cast: Sequence[CastRule] = (),
    allow_overflow: bool = False,
    tied_head: str | None = None,
    max_shard_bytes: int | None = None,
    rename: Sequence[Rename] = (),
    leave_out: Sequence[str] = (),
    as_is: bool = False,
    dequantise: bool = False,
) -> Plan:
    """Decides what a conversion is going to write.

    Args:
      checkpoint: The source.
      output: The path to write: for safetensors a folder, or a single file if it ends in ".safetensors".
      to: "apr" or "safetensors".
      cast: Casts asked for; of several that match a name the last one counts.
      allow_overflow: Whether a cast may turn finite values into infinities.
      tied_head: "absent": a head whose values are the embedding's is left out. "copy": a tied head is written as a copy
        of the embedding, in its type. None: a head is written if the source has one, whatever its values, except that a
        copy of the embedding which another writer put into an `.apr` is left out of safetensors. A head of other values
        is always written, a head without data (a placeholder) never.
      max_shard_bytes: Largest data section of one file of a folder, unless a single tensor is larger. None: one file.
      rename: Rules for the names of tensors; casts and everything else go by the new names.
      leave_out: Globs of tensors, by their new names, that the output is not to have.
      as_is: Whether to convert what is not what the configuration asks for, or only a part of a model.
      dequantise: Whether quantised blocks become float32 where no cast says otherwise. Published forms of several
        tensors are decoded by `dense.open_dense`, which gives a dense checkpoint.

    Raises:
      UsageError: Code "output-name", "shards-need-folder", "cast-matches-nothing", "leave-out-matches-nothing"; or as
        `naming.renamed`.
      BrokenContainerError: Code "source-metadata": an `.apr` of ours keeps something else than strings there.
      RefusedError: A tensor that cannot be cast or held by the target, a configuration or tensors that do not fit
        (see `qwen2`).
    """
    _check_output_name(output, to)
    is_folder = to == "safetensors" and not output.endswith(".safetensors")
    if max_shard_bytes is not None and not is_folder:
        raise UsageError(
            "shards need a folder as output",
            code="shards-need-folder",
            file=output,
            hint="Name a folder, or leave --max-shard-size out",
        )
    if checkpoint.incomplete is not None and not as_is:
        raise checkpoint.incomplete.error(checkpoint.path, "--as-is converts these tensors alone")
    if rename:
        checkpoint = checkpoint.renamed(renamed([*checkpoint.tensors, *checkpoint.placeholders], rename))
    warnings = list(checkpoint.warnings)
    dropped = dict.fromkeys(_matched(checkpoint, leave_out), "it was asked for")
    checkpoint = checkpoint.without(dropped)
    chosen = _choose_types(_choose_tensors(checkpoint, to, tied_head, dropped), cast, checkpoint.path, dequantise)
    if to == "apr":
        files = [_plan_apr(checkpoint, chosen, warnings, as_is)]
        side_files: dict[str, bytes] = {}
        carried = tuple(checkpoint.files)
    else:
        metadata, side_files = _safetensors_metadata(checkpoint, chosen, warnings)
        carried = tuple(sorted(side_files))
        if not is_folder and side_files:
            encoded = strict_json.dumps(apr_metadata.encode_files(side_files)).decode()
            metadata = (metadata or {}) | {SAFETENSORS_SOURCE_FILES_KEY: encoded}
            side_files = {}
        order = _source_order(checkpoint)
        files = list(_plan_safetensors(chosen, metadata, is_folder, max_shard_bytes, order))
        if len(files) > 1:
            side_files[INDEX_NAME] = _index_json(files)
        warnings += _contradictions(checkpoint, chosen)
    for error in _doubts(checkpoint, chosen):
        if not as_is:
            raise error
        warnings.append(error.message)
    warnings += _broken(checkpoint)
    if checkpoint.left_behind:
        warnings.append(_left_behind(checkpoint.left_behind))
    if cast and CONFIG_NAME in checkpoint.files:
        warnings.append("config.json is kept as it is, so the type that it names may differ from that of the tensors")
    return Plan(
        checkpoint=checkpoint,
        output=output,
        to=to,
        is_folder=is_folder,
        files=tuple(files),
        side_files=side_files,
        carried=carried,
        dropped=dropped,
        allow_overflow=allow_overflow,
        warnings=warnings,
    )


def parse_size(text: str) -> int:
    """Returns the bytes that "5GB", "500MB", "1GiB" or "1048576" stand for.

    Raises:
      UsageError: Code "size".
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    digits = text.strip().rstrip("BbGgIiKkMmTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"'{text}' is not a size", code="size", expected="a number with a unit, as 5GB, 500MB or 2GiB")
    return size


def _check_output_name(output: str, to: str) -> None:
    """Refuses a path that looks like another kind of output than the one that would appear there."""
    name = output.rstrip("/").lower()
    if to == "apr" and (output.endswith("/") or name.endswith(".safetensors")):
        raise UsageError(
            "an .apr is one file, and this cannot be the name of one",
            code="output-name",
            file=output,
            hint="Name it FILE.apr, or ask for --to safetensors",
        )
    if to == "safetensors" and name.endswith(".apr"):
        raise UsageError(
            "this cannot be the name of a folder or of a safetensors file",
            code="output-name",
            file=output,
            hint="Name a folder or FILE.safetensors, or ask for --to apr",
        )


def _broken(checkpoint: Checkpoint) -> Iterator[str]:
    """Yields what is wrong with side files that go along; of a large tokenizer.json who reads it tells."""
    small = {name: content for name, content in checkpoint.files.items() if len(content) <= _LOOKED_AT_BYTES}
    for name, problem in broken(small).items():
        yield f"{name} {problem}: it goes along as it is"


def _left_behind(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"not taken along: {', '.join(map(printable, names[:_SHOWN_NAMES]))}{more}"


# --- which tensors, and of which type


_Chosen = list[tuple[str, Tensor, DType]]


def _choose_tensors(
    checkpoint: Checkpoint, to: str, tied_head: str | None, dropped: dict[str, str]
) -> dict[str, Tensor]:
    """Returns output name -> source tensor, by name; `make_plan` says how the head is treated."""
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.placeholders:
        dropped[name] = "a head without data stands for the embedding"
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if embedding is None:
        return tensors
    if head is not None:
        foreign = checkpoint.kind == "apr" and SOURCE_FILES_KEY not in checkpoint.metadata
        wanted = tied_head or ("absent" if foreign and to == "safetensors" else None)
        # Already a copy in the embedding's type, or a head of its own: nothing to do either way.
        needless = wanted is None or (wanted == "copy" and head.dtype is embedding.dtype)
        if not needless and _is_copy(head, embedding):
            if wanted == "absent":
                dropped[HEAD] = "its values are the embedding's"
                del tensors[HEAD]
            else:
                tensors[HEAD] = embedding
    elif tied_head == "copy" and is_tied(checkpoint):
        dropped.pop(HEAD, None)
        tensors[HEAD] = embedding
    return dict(sorted(tensors.items(), key=lambda item: item[0].encode()))


def _matched(checkpoint: Checkpoint, globs: Sequence[str]) -> list[str]:
    """Returns the tensors whose names match one of the globs; each has to match one."""
    names = [*checkpoint.tensors, *checkpoint.placeholders]
    matched = {glob: fnmatch.filter(names, glob) for glob in globs}
    idle = [glob for glob, found in matched.items() if not found]
    if idle:
        raise UsageError(
            f"no tensor's name matches {', '.join(idle)}",
            code="leave-out-matches-nothing",
            file=checkpoint.path,
            found=idle,
            hint="`show MODEL` lists the names; * stands for anything",
        )
    return sorted({name for found in matched.values() for name in found})


def _is_copy(head: Tensor, embedding: Tensor) -> bool:
    try:
        return same_values(embedding, head)
    except RefusedError:
        # Nobody knows, and nothing is thrown away.
        return False


def _choose_types(tensors: Mapping[str, Tensor], rules: Sequence[CastRule], path: str, dequantise: bool) -> _Chosen:
    unmatched: list[str] = []
    targets: dict[str, DType] = {}
    for rule in rules:
        matched = [name for name in tensors if fnmatch.fnmatchcase(name, rule.glob)]
        if not matched:
            unmatched.append(rule.glob)
        targets |= {name: _target(tensors[name], name, rule.target) for name in matched}
    if unmatched:
        raise UsageError(
            f"no tensor's name matches {', '.join(unmatched)}",
            code="cast-matches-nothing",
            file=path,
            found=unmatched,
            hint="`show MODEL` lists the names; * stands for anything",
        )
    castable = (*casts.FLOATS, *(dtype.name for dtype in dtypes.TYPES.values() if dtype.codec_name))
    problems = [
        f"{name} is {tensors[name].dtype.name}"
        for name, target in targets.items()
        if tensors[name].dtype is not target and tensors[name].dtype.name not in castable
    ]
    if problems:
        raise RefusedError(
            "only floating-point and quantised tensors can be cast; neither, or of a type that nothing here decodes, "
            f"are {len(problems)} in all:\n  " + "\n  ".join(problems),
            code="cast-source",
            file=path,
            expected=f"one of {', '.join(castable)}",
            hint="--cast GLOB=TYPE names those that can be; what no rule names stays as it is",
        )
    f32 = dtypes.by_name("f32")

    def usual(tensor: Tensor) -> DType:
        return f32 if dequantise and tensor.dtype.is_block else tensor.written_as

    return [(name, tensor, targets.get(name) or usual(tensor)) for name, tensor in tensors.items()]


def _target(tensor: Tensor, name: str, wanted: DType) -> DType:
    """Returns the type that a tensor gets if `wanted` is asked for: small and sensitive ones are not quantised."""
    if not wanted.is_block or tensor.dtype is wanted:
        return wanted
    from apr_jax.converters.formats import codecs

    return dtypes.by_name("f32") if codecs.stays_float(name, dtypes.element_count(tensor.shape)) else wanted


def _nbytes(tensor: Tensor, dtype: DType) -> int:
    # A type that stays keeps its size too: K-quants have two layouts of different size.
    return tensor.nbytes if tensor.dtype is dtype else dtype.encoded_nbytes(tensor.shape)


# --- the containers


def _plan_apr(checkpoint: Checkpoint, chosen: _Chosen, warnings: list[str], as_is: bool) -> PlannedFile:
    sizes = [(name, dtype, tensor.shape, _nbytes(tensor, dtype)) for name, tensor, dtype in chosen]
    try:
        entries = apr_format.lay_out(sizes)
    except AprJaxError as error:
        error.file = error.file or checkpoint.path
        raise
    metadata = _apr_metadata(checkpoint, chosen, warnings, as_is)
    prologue = apr_format.serialise_prologue(metadata, entries)
    end = len(prologue)
    tensors = []
    for (name, tensor, dtype), entry in zip(chosen, entries, strict=True):
        offset = len(prologue) + entry.offset
        tensors.append(PlannedTensor(name, tensor.shape, tensor, dtype, entry.size, "", offset))
        end = max(end, offset + apr_format.pad(entry.size))
    return PlannedFile("", prologue, end + apr_format.FOOTER_BYTES, tuple(tensors), has_footer=True)


def _apr_metadata(checkpoint: Checkpoint, chosen: _Chosen, warnings: list[str], as_is: bool) -> Mapping[str, Any]:
    if checkpoint.kind == "apr":
        return _restated(checkpoint, chosen)
    config, model = _checked_configuration(checkpoint, chosen, warnings, as_is)
    strings = _strings(checkpoint)
    foreign = apr_metadata.foreign_from_safetensors(strings or {})
    if foreign is not None:
        if _says_the_same(foreign, model, checkpoint):
            return foreign
        warnings.append(
            f"config or side files were changed since they were an .apr: '{apr_metadata.FOREIGN_METADATA}' is not used"
        )
    if config is None:
        warnings.append("there is no config.json: `apr` cannot run the file without an architecture")
    order = None if _is_cast(chosen) else _source_order(checkpoint)
    if order is not None:
        tensors = ((name, tensor.dtype) for name, tensor in checkpoint.tensors.items())
        order = None if order == safetensors_format.data_order(tensors) else order
    return apr_metadata.from_huggingface(
        config,
        model,
        checkpoint.files,
        strings,
        order=order,
        name=_model_name(checkpoint.path),
        **_counts(chosen),
        warnings=warnings,
    )


def _checked_configuration(
    checkpoint: Checkpoint, chosen: _Chosen, warnings: list[str], as_is: bool
) -> tuple[dict[str, Any] | None, Qwen2Config | None]:
    """Returns the content of config.json, and the same checked where it is a model that is computed here.

    Nothing is computed from what is converted, so that any configuration will do; but tensors that are not the
    configuration's are worth asking.
    """
    if CONFIG_NAME not in checkpoint.files:
        return None, None
    config = model = None
    try:
        config = checkpoint.config
        model = checkpoint.model_config()
        naming = check_names(checkpoint.path, model, {name: tensor.shape for name, tensor, _ in chosen})
        if naming is not None:
            warnings.append(f"{naming.sentence}: `apr` does not find them; {naming.options} names them for it")
    except RefusedError as error:
        if error.code == "config-unsupported":
            lines = error.message.partition("\n  ")[2] or error.message
            warnings.append(
                "converted as it is; this configuration is not computed here, so that names and shapes were not held "
                "against it: " + lines.replace("\n  ", ", ")
            )
        elif as_is:
            warnings.append(f"{CONFIG_NAME}: {error.message}")
        else:
            error.hint = ". ".join(filter(None, (error.hint, "--as-is converts them all the same")))
            raise
    except BrokenContainerError as error:
        if not as_is:
            error.hint = f"--as-is converts the tensors, and takes {CONFIG_NAME} along as it is"
            raise
        warnings.append(error.message)
    return config, model


def _counts(chosen: _Chosen) -> dict[str, int]:
    return {
        "total_size": sum(_nbytes(tensor, dtype) for _, tensor, dtype in chosen),
        "param_count": sum(dtypes.element_count(tensor.shape) for _, tensor, _ in chosen),
    }


def _restated(checkpoint: Checkpoint, chosen: _Chosen) -> dict[str, Any]:
    """Returns an `.apr`'s metadata as they are, with counts that were right before a cast made right again."""
    before = _counts([(tensor.name, tensor, tensor.dtype) for tensor in checkpoint.tensors.values()])
    after = _counts(chosen)
    metadata = dict(checkpoint.metadata)
    if _is_cast(chosen):
        metadata.pop(SOURCE_ORDER_KEY, None)
    return metadata | {
        key: after[key] for key in after if type(metadata.get(key)) is int and metadata[key] == before[key]
    }


def _says_the_same(metadata: Mapping[str, Any], model: Qwen2Config | None, checkpoint: Checkpoint) -> bool:
    """Whether an `.apr`'s own metadata still describe the checkpoint that was made from it."""
    others = {name: content for name, content in checkpoint.files.items() if name != CONFIG_NAME}
    try:
        # Folders that earlier versions wrote have no tokenizer.
        if others and others != apr_tokenizer.files_of(metadata, []):
            return False
        return model is None or Qwen2Config.from_apr(metadata, tied=model.tie_word_embeddings) == model
    except RefusedError:
        return False


def _model_name(path: str) -> str:
    """Returns a name made from the source's path: the same source gives the same bytes wherever they are written."""
    real = os.path.realpath(path)
    folder, name = (real, "") if is_folder(real) else os.path.split(real)
    if name and name not in (SINGLE_NAME, INDEX_NAME):
        return os.path.splitext(name)[0]
    parent, here = os.path.split(folder)
    # HuggingFace's cache: models--Qwen--Qwen2.5-0.5B/snapshots/<commit>.
    owner = os.path.basename(os.path.dirname(parent))
    if os.path.basename(parent) == "snapshots" and owner.startswith("models--"):
        return owner.rpartition("--")[2]
    return here


def _strings(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Returns the `__metadata__` of a safetensors source, without the side files that may travel there; or None."""
    strings = {key: text for key, text in checkpoint.metadata.items() if key != SAFETENSORS_SOURCE_FILES_KEY}
    # Present but empty is told from absent, except beside side files, where nothing shows what there was.
    present = checkpoint.has_metadata and len(strings) == len(checkpoint.metadata)
    return strings if strings or present else None


def _safetensors_metadata(
    checkpoint: Checkpoint, chosen: _Chosen, warnings: list[str]
) -> tuple[dict[str, str] | None, dict[str, bytes]]:
    """Returns the strings for `__metadata__`, and the side files."""
    if checkpoint.kind != "apr":
        return _strings(checkpoint), dict(checkpoint.files)
    if SOURCE_FILES_KEY in checkpoint.metadata:
        return _kept_strings(checkpoint), dict(checkpoint.files)
    files = {}
    try:
        config = checkpoint.config_for((name, dtype) for name, _, dtype in chosen)
        files[CONFIG_NAME] = apr_metadata.config_json(config)
    except RefusedError as error:
        warnings.append(f"no config.json is written: {error.message}")
    try:
        files |= apr_tokenizer.files_of(checkpoint.metadata, warnings)
    except RefusedError as error:
        warnings.append(f"no tokenizer.json is written: {error.message}")
    return apr_metadata.foreign_to_safetensors(checkpoint.metadata), files


def _kept_strings(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Returns the `__metadata__` that one of our `.apr` keeps."""
    kept = checkpoint.metadata.get(apr_metadata.SOURCE_METADATA)
    if kept is None or (isinstance(kept, dict) and all(isinstance(text, str) for text in kept.values())):
        return kept
    raise BrokenContainerError(
        f"'{apr_metadata.SOURCE_METADATA}' is not an object of strings", code="source-metadata", file=checkpoint.path
    )


def _doubts(checkpoint: Checkpoint, chosen: _Chosen) -> Iterator[AprJaxError]:
    """Yields why an `.apr` may not be what its writer made: hidden bytes, metadata that no such model can have."""
    if checkpoint.apr is None:
        return
    hidden = _hidden(checkpoint.apr, checkpoint.sources[0])
    if hidden is not None:
        yield BrokenContainerError(
            "data is hidden in the padding between or behind the tensors, and would be lost",
            code="padding",
            file=checkpoint.path,
            offset=hidden,
            found=f"{checkpoint.sources[0].read_at(hidden, 1)[0]:#04x}",
            expected="0x00",
            hint=_ALL_THE_SAME,
        )
    wrong = [*apr_metadata.malformed(checkpoint.metadata), *_misshapen(checkpoint, chosen)]
    if wrong:
        yield RefusedError(
            "the metadata does not match the model:\n  " + "\n  ".join(wrong[:20]),
            code="metadata-values",
            file=checkpoint.path,
            hint=_ALL_THE_SAME,
        )


def _hidden(apr: apr_format.AprPrologue, source: SourceFile) -> int | None:
    """Returns where the first byte of padding between and behind the tensors is that is not zero."""
    begin = apr.header.data_offset
    held = sorted((begin + entry.offset, begin + entry.offset + entry.size) for entry in apr.entries if entry.size)
    position = begin
    for following, end in (*held, (min(apr.data_end, source.size), 0)):
        gap = source.read_at(position, max(0, following - position))
        if any(gap):
            return position + len(gap) - len(gap.lstrip(b"\0"))
        position = end
    return None


def _misshapen(checkpoint: Checkpoint, chosen: _Chosen) -> Iterator[str]:
    """Yields which tensors have another shape than the numbers in the metadata of an `.apr` say."""
    try:
        expected = Qwen2Config.from_apr(checkpoint.metadata, tied=False).tensor_shapes()
    except FindingError:
        # Of another architecture, or not supported: nothing says what the shapes should be.
        return
    for name, tensor, _ in chosen:
        if tuple(expected.get(name, tensor.shape)) != tuple(tensor.shape):
            yield f"{name} has the shape {list(tensor.shape)}, they say {list(expected[name])}"


def _contradictions(checkpoint: Checkpoint, chosen: _Chosen) -> Iterator[str]:
    """Yields what the tensors have against the configurations that go along with them."""
    shapes = {name: tensor.shape for name, tensor, _ in chosen}
    found: dict[str, str] = {}
    for what in ("config.json", "the metadata of the .apr"):
        try:
            if what == "config.json" and checkpoint.has_config:
                check_names(checkpoint.path, checkpoint.model_config(), shapes)
            elif what != "config.json" and checkpoint.kind == "apr":
                # As `apr` and the config.json made from it will have it: the tensors say whether the head is tied.
                check_tensors(Qwen2Config.from_apr(checkpoint.metadata, tied=HEAD not in shapes), shapes)
        except FindingError as error:
            # Another code: no configuration of Qwen2, and safetensors hold any model.
            if error.code in ("tensors-mismatch", "names-prefixed"):
                found.setdefault(error.message + (f". {error.hint}" if error.hint else ""), what)
    for message, what in found.items():
        yield f"{what}: {message}"


def _plan_safetensors(
    chosen: _Chosen,
    metadata: dict[str, str] | None,
    is_folder: bool,
    max_shard_bytes: int | None,
    order: Sequence[str] | None,
) -> Iterator[PlannedFile]:
    unfit = [f"{name} is {dtype.name}" for name, _, dtype in chosen if dtype.safetensors is None]
    if unfit:
        decoded = all(
            tensor.dtype is dtype and dtype.codec_name for _, tensor, dtype in chosen if not dtype.safetensors
        )
        raise RefusedError(
            f"safetensors cannot hold these tensors, {len(unfit)} in all:\n  " + "\n  ".join(unfit),
            code="safetensors-unsupported",
            hint="--dequantise decodes them; --cast bf16 beside it narrows them"
            if decoded
            else "Quantised types need --to apr",
        )
    shards = list(_cut_shards(chosen, max_shard_bytes))
    for number, shard in enumerate(shards, 1):
        name = "" if not is_folder else SINGLE_NAME
        if len(shards) > 1:
            name = shard_name(number, len(shards))
        ordered = _ordered(shard, order)
        prologue = safetensors_format.serialise_header(
            ((name, dtype, tensor.shape) for name, tensor, dtype in ordered), metadata
        )
        position = len(prologue)
        tensors = []
        for tensor_name, tensor, dtype in ordered:
            nbytes = _nbytes(tensor, dtype)
            tensors.append(PlannedTensor(tensor_name, tensor.shape, tensor, dtype, nbytes, name, position))
            position += nbytes
        yield PlannedFile(name, prologue, position, tuple(tensors), has_footer=False)


def _cut_shards(chosen: _Chosen, max_bytes: int | None) -> Iterator[_Chosen]:
    shard: _Chosen = []
    held = 0
    for item in chosen:
        nbytes = _nbytes(item[1], item[2])
        if shard and max_bytes is not None and held + nbytes > max_bytes:
            yield shard
            shard, held = [], 0
        shard.append(item)
        held += nbytes
    yield shard


def _ordered(shard: _Chosen, order: Sequence[str] | None) -> _Chosen:
    """Returns the tensors in the order of the source, if it is known and the same bytes are written; else in the usual.

    The usual order, that of the safetensors package, leaves none unaligned: unaligned data are legal, but cannot be
    viewed in place.
    """
    by_name = {item[0]: item for item in shard}
    order = [name for name in order or () if name in by_name]
    if _is_cast(shard) or len(order) != len(by_name):
        order = safetensors_format.data_order((name, dtype) for name, _, dtype in shard)
    return [by_name[name] for name in order]


def _is_cast(chosen: _Chosen) -> bool:
    return any(tensor.dtype is not dtype for _, tensor, dtype in chosen)


def _source_order(checkpoint: Checkpoint) -> list[str] | None:
    """Returns the names in the order in which a safetensors file holds, or held, their data; None if nobody knows."""
    if checkpoint.kind == "apr":
        order = checkpoint.metadata.get(SOURCE_ORDER_KEY)
        return order if isinstance(order, list) and all(isinstance(name, str) for name in order) else None
    if checkpoint.kind != "safetensors" or len(checkpoint.sources) != 1:
        return None
    # Of tensors without bytes, which share an offset, the usual order.
    tensors = checkpoint.tensors
    usual = safetensors_format.data_order((name, tensor.dtype) for name, tensor in tensors.items())
    return sorted(usual, key=lambda name: tensors[name].offset)


def _index_json(files: Iterable[PlannedFile]) -> bytes:
    import json

    placed = {tensor.name: tensor for file in files for tensor in file.tensors}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in placed.values())},
        "weight_map": {name: placed[name].file for name in sorted(placed)},
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
