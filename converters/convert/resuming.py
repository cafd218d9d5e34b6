"""Which conversion an unfinished output belongs to, so that `--resume` goes on with no other one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from apr_jax.converters.storage.journal import Identity

if TYPE_CHECKING:
    from apr_jax.converters.convert.plan import Plan


def identity(plan: Plan) -> Identity:
    """Returns what the output of a plan is made of.

    Returns:
      "version" of this package; "source": path -> size, inode and times of modification and of the last change (which
      no program can set back) of each file that is read; "options": a hash of all that the plan says of the output.
    """
    from importlib import metadata

    return {
        "version": metadata.version("apr-jax"),
        "source": {os.path.realpath(path): found for path in plan.checkpoint.paths if (found := _stamp(path))},
        "options": hashlib.sha256(json.dumps(list(_described(plan))).encode()).hexdigest(),
    }


def _stamp(path: str) -> list[int]:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        return []
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _described(plan: Plan) -> Iterator[Any]:
    """Yields what decides every byte of the output, as JSON values."""
    yield [plan.to, plan.is_folder, plan.allow_overflow]
    for name, content in plan.side_files.items():
        yield [name, hashlib.sha256(content).hexdigest()]
    for file in plan.files:
        yield [file.name, file.size, hashlib.sha256(file.prologue).hexdigest()]
        for tensor in file.tensors:
            source = tensor.source
            place = [os.path.realpath(source.source.path), source.offset, source.nbytes, source.dtype.name]
            yield [tensor.name, tensor.offset, tensor.nbytes, tensor.dtype.name, source.name, *place]
