"""A journal beside an unfinished output: what it is going to be, and what is done of it.

A line for each note, with its own CRC-32, so that one that a kill or a power cut has torn is not believed. The first
says what the output is made of: whoever makes the very same goes on where a killed process stopped. What a note says of
the output's content is for its reader to check: after a power cut a line may be there whose data are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from apr_jax.converters.storage.crc import crc32
from apr_jax.converters.storage.temporaries import as_storage_error, close_quietly

Identity = Mapping[str, Any]
"""What an output is made of, as JSON values by what they are called in messages ("source")."""


class Journal:
    """An open journal.

    Attributes:
      path: Where it is.
      notes: What processes before this one have noted, in their order.
    """

    def __init__(self, fd: int, path: str):
        """Takes the descriptor over, which holds the lock, and closes it on an error; reads what is there already.

        Raises:
          StorageError: That cannot be read.
        """
        self.path = path
        self._fd = fd
        self._lock = threading.Lock()
        try:
            with as_storage_error(path):
                self._size = os.fstat(fd).st_size
                text = os.pread(fd, self._size, 0)
        except BaseException:
            close_quietly(fd)
            raise
        lines = [_parsed(line) for line in text.split(b"\n")]
        self._first = lines[0]
        self.notes = [note for note in lines[1:] if note is not None]
        # What a torn line has left is an end of one.
        self._gap = b"" if text.endswith(b"\n") or not text else b"\n"

    @property
    def identity(self) -> Identity | None:
        """What its first line says; None if it says nothing that can be read."""
        return self._first if isinstance(self._first, dict) else None

    def begin(self, identity: Identity) -> None:
        """Writes the first line."""
        self.note(identity)

    def note(self, value: Any) -> None:
        """Adds a line, from any thread.

        Raises:
          StorageError: The operating system refused.
        """
        text = json.dumps(value, sort_keys=True).encode()
        with self._lock, as_storage_error(self.path):
            line = self._gap + b"%08x %s\n" % (crc32(text), text)
            self._gap = b"\n"
            while line:
                written = os.pwrite(self._fd, line, self._size)
                self._size += written
                line = line[written:]
            self._gap = b""

    def rename(self, path: str) -> None:
        """Gives it another name."""
        os.rename(self.path, path)
        self.path = path

    def remove(self) -> None:
        """Removes it; an open one stays locked until it is closed."""
        os.unlink(self.path)

    def close(self) -> None:
        """Closes it, and so gives up its lock."""
        close_quietly(self._fd)


class Pieces:
    """What a journal notes of one file: which pieces of it are written, and their CRC-32."""

    def __init__(self, journal: Journal, name: str):
        """Takes the journal, and the file's name in the output."""
        self._journal = journal
        self._name = name
        notes = (note for note in journal.notes if note["file"] == name)
        self._noted = {(note["at"], note["bytes"]): note for note in notes}

    def noted(self, at: int, nbytes: int) -> Mapping[str, Any] | None:
        """Returns what was noted of a piece, "crc" and what else `note` was given; None if it was not written."""
        return self._noted.get((at, nbytes))

    def note(self, at: int, nbytes: int, crc: int, **more: Any) -> None:
        """Notes that a piece is written.

        Raises:
          StorageError: The journal cannot be written.
        """
        self._journal.note({"file": self._name, "at": at, "bytes": nbytes, "crc": crc, **more})


def differing(identity: Identity, other: Identity) -> Iterator[str]:
    """Yields in what two outputs differ: the names of values, or of values in them that both have ("source: PATH")."""
    for name, value in identity.items():
        found = other.get(name)
        if found == value:
            continue
        if not isinstance(value, dict) or not isinstance(found, dict) or value.keys() != found.keys():
            yield name
            continue
        yield from (f"{name}: {key}" for key in value if value[key] != found[key])


def _parsed(line: bytes) -> Any:
    crc, _, text = line.partition(b" ")
    with contextlib.suppress(ValueError):
        if int(crc, 16) == crc32(text):
            return json.loads(text)
    return None
