"""A checkpoint as a model takes it: what is packed decoded, adapters added."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from apr_jax.converters.checkpoint.adapters import with_adapter
from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.decoded import DecodedTensor
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.packed_forms import dense_view


def open_dense(
    path: str | os.PathLike[str], *, adapters: Sequence[str | os.PathLike[str]] = (), **opening: Any
) -> Checkpoint:
    """Opens a checkpoint as `open_checkpoint` does, decodes what is packed in it and adds adapters.

    Args:
      path: As `open_checkpoint`.
      adapters: Folders of PEFT adapters, added one after the other.
      opening: Further arguments of `open_checkpoint`.

    Returns:
      The checkpoint, to be closed or used as a context manager.

    Raises:
      AprJaxError: As `open_checkpoint`, `packed_forms.dense_view` and `adapters.with_adapter`.
    """
    with contextlib.ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(path, **opening))
        checkpoint = _dense(checkpoint, adapters, opened)
        opened.pop_all()
        return checkpoint


@contextlib.contextmanager
def as_dense(checkpoint: Checkpoint, adapters: Sequence[str | os.PathLike[str]] = ()) -> Iterator[Checkpoint]:
    """Gives an open checkpoint so, and leaves it open behind the block."""
    with contextlib.ExitStack() as opened:
        yield _dense(checkpoint, adapters, opened)


def is_computed(checkpoint: Checkpoint) -> bool:
    """Whether some of the tensors stand in no file as such."""
    return any(isinstance(tensor, DecodedTensor) for tensor in checkpoint.tensors.values())


def _dense(
    checkpoint: Checkpoint, adapters: Sequence[str | os.PathLike[str]], opened: contextlib.ExitStack
) -> Checkpoint:
    view = dense_view(checkpoint)
    for adapter in adapters:
        before = view.sources
        view = with_adapter(view, adapter)
        for source in view.sources[len(before) :]:
            opened.enter_context(source)
    return view
