"""What was flushed to the disk, and when: whether an output would outlive a power cut that comes right after it.

What stands on the disk cannot be looked at without cutting the power; that os.fsync was called for it can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from unittest import mock


@dataclasses.dataclass(frozen=True)
class Flush:
    """One call of os.fsync.

    Attributes:
      inode: What was flushed.
      content: What it held then: the bytes of a file, the names in a folder.
      names: What stood in the folder of the output then, name -> inode.
    """

    inode: int
    content: bytes | frozenset[str]
    names: Mapping[str, int]


def _content(fd: int) -> bytes | frozenset[str]:
    found = os.fstat(fd)
    return frozenset(os.listdir(fd)) if stat.S_ISDIR(found.st_mode) else os.pread(fd, found.st_size, 0)


@contextlib.contextmanager
def recorded(folder: pathlib.Path) -> Iterator[list[Flush]]:
    """Records every flush within the block; `folder` is where the output appears."""
    flushes: list[Flush] = []
    fsync = os.fsync

    def recording(fd: int) -> None:
        fsync(fd)
        names = {entry.name: entry.inode() for entry in os.scandir(folder)}
        flushes.append(Flush(os.fstat(fd).st_ino, _content(fd), names))

    with mock.patch.object(os, "fsync", recording):
        yield flushes


def lacking(flushes: list[Flush], output: pathlib.Path) -> list[str]:
    """Returns what a power cut could take of an output: files and folders that were not flushed, with what they hold
    now, before the output had its name; and "its name" if the folder around it was not flushed after that."""
    inode = output.stat().st_ino
    before = {(flush.inode, flush.content) for flush in flushes if flush.names.get(output.name) != inode}
    after = {flush.inode for flush in flushes if flush.names.get(output.name) == inode}
    found = []
    for path in (output, *output.rglob("*")):
        content = frozenset(os.listdir(path)) if path.is_dir() else path.read_bytes()
        if (path.stat().st_ino, content) not in before:
            found.append(os.path.relpath(path, output.parent))
    return found + ["its name"] * (output.parent.stat().st_ino not in after)
