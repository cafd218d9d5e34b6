"""A prepared checkpoint back into what it was made from: streamed, without Orbax and without JAX."""

from __future__ import annotations

import dataclasses
import functools
import os

from apr_jax.converters.checkpoint.checkpoint import Checkpoint, SideFiles
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.convert.plan import Plan, make_plan
from apr_jax.converters.convert.run import check_output, run
from apr_jax.converters.convert.streaming import Progress
from apr_jax.converters.formats import dtypes, prepared_format
from apr_jax.converters.formats.dtypes import DType
from apr_jax.converters.formats.prepared_format import Description, Parameter
from apr_jax.converters.storage.temporaries import Notice
from apr_jax.converters.storage.workers import Workers


def restore(
    folder: str,
    output: str,
    *,
    force: bool = False,
    max_shard_bytes: int | None = None,
    notice: Notice | None = None,
    progress: Progress | None = None,
) -> tuple[Description, Plan]:
    """Writes the source of a prepared checkpoint again: names, types, bytes and files as they were.

    What was widened to be computed with is narrowed again, which is exact; what was narrowed, decoded or merged stays
    as it was saved. A tied head that the source had as a copy was not saved. Streamed: nothing is loaded.

    Args:
      folder: Its folder.
      output: FILE.apr, FILE.safetensors, or a folder as HuggingFace has it.
      force, notice, progress: As `run.run`.
      max_shard_bytes: The most tensor bytes in one file of a folder; None writes one file.

    Returns:
      What is in it, and what was written.

    Raises:
      BrokenContainerError: Code "prepared-hash": parameters have other bytes than were saved, all named.
      AprJaxError: As `prepared_format.describe`, `open_checkpoint` and `run`.
    """
    description = prepared_format.describe(folder)
    with open_checkpoint(folder) as checkpoint:
        tensors = [_as_in_source(tensor, description) for tensor in checkpoint.tensors.values()]
        to = "apr" if output.endswith(".apr") else "safetensors"
        readers = {name: functools.partial(checkpoint.files.__getitem__, name) for name in checkpoint.files}
        files = SideFiles(readers, left_behind=checkpoint.left_behind)
        restored = checkpoint.replaced(tensors=tensors, files=files, warnings=checkpoint.warnings)
        plan = make_plan(restored, output, to=to, max_shard_bytes=max_shard_bytes)
        check_output(plan, force=force)
        prepared_format.check_sums(folder, description, _stored_sums(checkpoint, description))
        run(plan, force=force, notice=notice, progress=progress)
    return description, plan


@dataclasses.dataclass(frozen=True, eq=False)
class _Restored(Tensor):
    """A tensor that is written in another type than it was saved in."""

    source_type: DType

    @property
    def written_as(self) -> DType:
        return self.source_type


def _as_in_source(tensor: Tensor, description: Description) -> Tensor:
    before = dtypes.TYPES.get(description.types.get(tensor.name, ""))
    if before is None or tensor.dtype.name not in before.exact_casts:
        return tensor
    fields = {field.name: getattr(tensor, field.name) for field in dataclasses.fields(Tensor)}
    return _Restored(**fields, source_type=before)


def _stored_sums(checkpoint: Checkpoint, description: Description) -> dict[str, str]:
    """Returns the checksum of each parameter's bytes as they stand in the files."""

    def of(parameter: Parameter) -> str:
        pieces = (chunk for name in parameter.tensors for chunk in checkpoint.tensors[name].stream())
        return prepared_format.checksum(pieces)

    parameters = description.parameters
    with Workers(min(8, os.cpu_count() or 1)) as workers:
        return dict(zip((each.name for each in parameters), workers.map(of, parameters), strict=True))
