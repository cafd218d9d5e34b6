"""Carries a plan out in one pass over the data, and says what that did to the values."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint.decoded import DecodedTensor
from apr_jax.converters.checkpoint.dense import open_dense
from apr_jax.converters.checkpoint.file_names import CHECKPOINT
from apr_jax.converters.checkpoint.naming import Rename
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import HEAD
from apr_jax.converters.convert import resuming, streaming
from apr_jax.converters.convert.plan import CastRule, Plan, PlannedFile, PlannedTensor, make_plan
from apr_jax.converters.errors import RefusedError, counted
from apr_jax.converters.formats import apr_format, casts
from apr_jax.converters.formats.dtypes import Legacy
from apr_jax.converters.storage.interrupts import termination_as_interrupt
from apr_jax.converters.storage.journal import Pieces
from apr_jax.converters.storage.output import FolderKind, OutputFile, atomic_file, atomic_folder, check_target
from apr_jax.converters.storage.temporaries import Notice

if TYPE_CHECKING:
    from apr_jax.converters.convert.recoding import QuantisationError


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a conversion did.

    Attributes:
      seconds: Time taken for the data, from opening the output until it had its name.
      damage: Tensor name -> what its cast did, where it did more than round.
      quantised: Tensor name -> how far its values moved, for those that were quantised.
      footer_checked: Whether the checksum of the source was checked on the way; safetensors has none.
      kept_bytes: Of the source, what an earlier run had converted already.
    """

    seconds: float
    damage: dict[str, casts.Damage]
    quantised: dict[str, QuantisationError]
    footer_checked: bool
    kept_bytes: int = 0


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    cast: Sequence[CastRule] = (),
    allow_overflow: bool = False,
    tied_head: str | None = None,
    max_shard_bytes: int | None = None,
    rename: Sequence[Rename] = (),
    leave_out: Sequence[str] = (),
    as_is: bool = False,
    force: bool = False,
    resume: bool = False,
    lenient: bool = False,
    legacy: Legacy = False,
    follow_links: bool = False,
    dequantise: bool = False,
    adapters: Sequence[str | os.PathLike[str]] = (),
    ignore_config: Iterable[str] = (),
) -> Outcome:
    """Converts a checkpoint.

    Args:
      source: Anything that `open_checkpoint` opens.
      output: A folder (safetensors), a path ending in ".safetensors", or the path of an `.apr`.
      to: "apr" or "safetensors".
      cast, allow_overflow, tied_head, max_shard_bytes, rename, leave_out, as_is: As `make_plan`.
      force, resume: As `run`.
      lenient, legacy, follow_links, ignore_config: As `open_checkpoint`.
      dequantise: Whether what is quantised is written dense.
      adapters: Folders of PEFT adapters to add to the weights; a quantised base is decoded.

    Raises:
      AprJaxError: Any of the family; then there is no output.
    """
    opening: dict[str, Any] = {"lenient": lenient, "legacy": legacy, "follow_links": follow_links}
    opening["ignore_config"] = ignore_config
    dense = dequantise or adapters
    opened = open_dense(source, adapters=adapters, **opening) if dense else open_checkpoint(source, **opening)
    with opened as checkpoint:
        plan = make_plan(
            checkpoint,
            os.fspath(output),
            to=to,
            cast=cast,
            allow_overflow=allow_overflow,
            tied_head=tied_head,
            max_shard_bytes=max_shard_bytes,
            rename=rename,
            leave_out=leave_out,
            as_is=as_is,
            dequantise=dequantise,
        )
        return run(plan, force=force, resume=resume)


def run(
    plan: Plan,
    *,
    force: bool = False,
    resume: bool = False,
    notice: Notice | None = None,
    progress: streaming.Progress | None = None,
) -> Outcome:
    """Carries a plan out. The output appears whole at the end, or not at all.

    Args:
      plan: What to do.
      force: Whether to replace an output that exists.
      resume: Whether to go on where an earlier run with `resume` was killed, if one was. What it has written is checked
        against the checksums that it noted, and written again where they differ; the output is the same, byte for byte.
        An interrupt, or a disk that fails, then leaves what there is for the next run.
      notice: Told about leftovers of earlier runs that were removed.
      progress: Called with numbers of bytes read, from any thread.

    Raises:
      UsageError, MissingFileError, StorageError: See `output`. Code "resume-differs": what is left of an earlier run
        was made from another source, with other options or by another version.
      BrokenContainerError: Code "footer-crc": the checksum of an `.apr` source is wrong.
      RefusedError: Code "cast-overflow" or "cast-non-finite".
    """
    begin = time.perf_counter()
    apr = plan.checkpoint.apr
    has_footer = apr is not None and apr.has_footer
    blocks: list[streaming.Block] = []
    with termination_as_interrupt() as check_interrupted, contextlib.ExitStack() as stack:

        def count(done: int) -> None:
            check_interrupted()
            if progress is not None:
                progress(done)

        arguments: dict[str, Any] = {"force": force, "sources": plan.checkpoint.paths, "notice": notice}
        if resume:
            arguments["resumable"] = resuming.identity(plan)
        if plan.is_folder:
            folder = stack.enter_context(
                atomic_folder(plan.output, plan.bytes_written, kind=_replaceable(plan), **arguments)
            )
            for name, content in plan.side_files.items():
                with folder.create(name, len(content)) as output:
                    output.write_at(content, 0)
            for file in plan.files:
                with folder.create(file.name, file.size) as output:
                    blocks += _write(file, output, has_footer, count)
        else:
            (file,) = plan.files
            output = stack.enter_context(atomic_file(plan.output, file.size, **arguments))
            blocks += _write(file, output, has_footer, count)
        # The output gets its name at the end of this block: what is found wrong until then leaves nothing behind.
        try:
            if apr is not None and has_footer:
                streaming.check_footer(plan.checkpoint.sources[0], apr.data_end, blocks)
        finally:
            # That somebody writes to a source explains a wrong checksum.
            for source in plan.checkpoint.sources:
                source.check_unchanged()
        damage = _damage(blocks)
        if not plan.allow_overflow:
            _refuse_overflow(damage, plan.checkpoint.path)
        check_interrupted()
    kept = sum(block.nbytes for block in blocks if block.kept)
    return Outcome(time.perf_counter() - begin, damage, _quantised(blocks), has_footer, kept)


def check_output(plan: Plan, *, force: bool) -> None:
    """Raises what `run` would raise because of what is at the output's path already."""
    kind = _replaceable(plan) if plan.is_folder else None
    check_target(plan.output, folder=kind, force=force, sources=plan.checkpoint.paths)


def _replaceable(plan: Plan) -> FolderKind:
    """Returns what a folder that is replaced may hold: nothing is lost either of what comes back as it is."""

    def holds(name: str) -> bool:
        return CHECKPOINT.holds(name) or (name in plan.side_files and _holds(plan, name))

    return dataclasses.replace(CHECKPOINT, holds=holds)


def _holds(plan: Plan, name: str) -> bool:
    content, path = plan.side_files[name], os.path.join(plan.output, name)
    with contextlib.suppress(OSError):
        if os.path.getsize(path) == len(content):
            with open(path, "rb") as file:
                return file.read() == content
    return False


def _write(
    file: PlannedFile, output: OutputFile, source_summed: bool, progress: streaming.Progress
) -> list[streaming.Block]:
    output.write_at(file.prologue, 0)
    parts = []
    for tensor in file.tensors:
        again = tensor.name == HEAD and tensor.source.name != HEAD
        part = streaming.Part(
            tensor.source.source,
            tensor.source.offset,
            tensor.source.nbytes,
            tensor.offset,
            tensor.name,
            tensor.cast,
            again,
        )
        parts.append(_recoded(part, tensor) if _is_computed(tensor) else part)
    done = None if output.journal is None else Pieces(output.journal, file.name)
    blocks = streaming.move(
        streaming.coalesce(parts), output, summed=source_summed or file.has_footer, progress=progress, done=done
    )
    if file.has_footer:
        end = file.size - apr_format.FOOTER_BYTES
        output.write_at(apr_format.footer(streaming.output_crc(file.prologue, blocks, end)), end)
    return blocks


def _is_computed(tensor: PlannedTensor) -> bool:
    """Whether its bytes come from values, not from bytes one by one."""
    quantised = tensor.dtype.is_block or tensor.source.dtype.is_block
    return isinstance(tensor.source, DecodedTensor) or (tensor.cast is not None and quantised)


def _recoded(part: streaming.Part, tensor: PlannedTensor) -> streaming.Part:
    from apr_jax.converters.convert.recoding import Recoding

    return dataclasses.replace(part, cast=None, recoding=Recoding(tensor.source, tensor.dtype))


def _quantised(blocks: Iterable[streaming.Block]) -> dict[str, QuantisationError]:
    errors: dict[str, QuantisationError] = {}
    for block in blocks:
        if block.error is not None:
            name = block.part.tensor
            errors[name] = errors[name] + block.error if name in errors else block.error
    return errors


def _damage(blocks: Iterable[streaming.Block]) -> dict[str, casts.Damage]:
    damage: dict[str, casts.Damage] = {}
    for block in blocks:
        if block.damage != casts.Damage():
            damage[block.part.tensor] = damage.get(block.part.tensor, casts.Damage()) + block.damage
    return damage


def _refuse_overflow(damage: Mapping[str, casts.Damage], path: str) -> None:
    problems = [f"{name}: {counted(found.overflowed, 'value')}" for name, found in damage.items() if found.overflowed]
    if problems:
        raise RefusedError(
            f"the cast would turn finite values into infinities, in {counted(len(problems), 'tensor')}:\n  "
            + "\n  ".join(problems),
            code="cast-overflow",
            file=path,
            hint="--allow-overflow lets them become infinite; bf16 has the range of f32",
        )
