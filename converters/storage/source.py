"""Reads a file at given offsets, and does nothing else: no mapping, no re-opening, no surprise.

One descriptor serves for the life of a checkpoint, so a file replaced by a rename changes nothing; a file that shrinks
is an error that names the byte, where a mapped file would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
from types import TracebackType

from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError, StorageError

# One read of the kernel ends at 2 GiB; below that it is one call.
_READ_BYTES = 1 << 30
# A plain file name: no folder, no drive, nothing that another system would read differently.
_PLAIN = re.compile(r"[^/\\:\x00-\x1f\x7f\ud800-\udfff]*[^/\\:\x00-\x1f\x7f\ud800-\udfff. ]")

# What Windows takes for a device, whatever follows the first dot.
_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def is_plain_name(name: str) -> bool:
    """Whether a file of this name lies in the folder that it is looked for or written in, on every system."""
    return _PLAIN.fullmatch(name) is not None and _DEVICE.match(name) is None


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether something is at a path, links followed. Unlike `os.path.exists`, it never takes a failing disk for "no".

    Raises:
      StorageError: Code "open-failed": the system cannot say.
    """
    return _mode(path) is not None


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is at a path, links followed; raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: str | os.PathLike[str]) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise StorageError(error.strerror or str(error), code="open-failed", file=path) from error


class SourceFile:
    """A regular file, opened once for reading.

    Attributes:
      path: As the user or the index named it.
      size: Bytes, at the time of opening.
      links: Hard links to it.
      bytes_read: Bytes that were read of it so far.
      stamp: Size and time of modification, at the time of opening.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file.

        Raises:
          MissingFileError: There is none.
          RefusedError: Code "not-a-regular-file": a directory, FIFO, socket or device.
          StorageError: Code "open-failed".
        """
        self.path = os.fspath(path)
        self._fd = -1
        try:
            # Looked at before it is opened, since opening some devices has effects; and without waiting for a FIFO's
            # writer.
            _refuse_irregular(os.stat(self.path), self.path)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            found = os.fstat(self._fd)
            _refuse_irregular(found, self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFileError("no such file", code="file-missing", file=self.path) from None
        except OSError as error:
            self.close()
            raise StorageError(error.strerror or str(error), code="open-failed", file=self.path) from error
        except ValueError as error:
            raise MissingFileError(f"no such file: {error}", code="file-missing", file=self.path) from None
        except RefusedError:
            self.close()
            raise
        self.size = found.st_size
        self.links = found.st_nlink
        self.stamp = (found.st_size, found.st_mtime_ns)
        self.bytes_read = 0
        self._counting = threading.Lock()

    def readinto_at(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fills the whole buffer with the bytes from `offset` on.

        Raises:
          StorageError: Code "short-read" if the file ends before, "read-failed" if the system cannot read.
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _READ_BYTES]], offset + done)
            except OSError as error:
                raise StorageError(
                    f"reading failed: {error.strerror or error}",
                    code="read-failed",
                    file=self.path,
                    offset=offset + done,
                ) from error
            if count == 0:
                raise StorageError(
                    "the file ends before the data does; did it shrink while being read?",
                    code="short-read",
                    file=self.path,
                    offset=offset + done,
                    found=f"{done} bytes",
                    expected=f"{len(view)} bytes from byte {offset}",
                )
            done += count
        with self._counting:
            self.bytes_read += done

    def read_at(self, offset: int, nbytes: int) -> bytearray:
        """Returns `nbytes` bytes from `offset` on; nothing is allocated if the file is not as long as that.

        Raises:
          StorageError: As `readinto_at`.
        """
        if offset + nbytes > self.size:
            raise StorageError(
                "the file ends before the data does",
                code="short-read",
                file=self.path,
                offset=self.size,
                expected=f"{nbytes} bytes from byte {offset}",
            )
        data = bytearray(nbytes)
        self.readinto_at(offset, data)
        return data

    def check_unchanged(self) -> None:
        """Raises StorageError, code "source-changed", if the file was written to since it was opened."""
        try:
            now = os.fstat(self._fd)
        except OSError as error:
            raise StorageError(
                f"reading failed: {error.strerror or error}", code="read-failed", file=self.path
            ) from error
        if (now.st_size, now.st_mtime_ns) != self.stamp:
            raise changed(self.path, now.st_size, self.size)

    def close(self) -> None:
        """Closes the file; closing twice is no error."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Nothing was written that a close could lose.
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SourceFile({self.path!r}, size={self.size})"


def changed(path: str, found: int, expected: int) -> StorageError:
    """Returns the error for a file that is no longer what was opened, with its bytes now and then."""
    return StorageError(
        "the file changed while it was being read",
        code="source-changed",
        file=path,
        found=f"{found} bytes",
        expected=f"{expected} bytes, as when it was opened",
    )


def read_whole(path: str | os.PathLike[str], max_bytes: int, what: str) -> bytes:
    """Returns the content of a small file, which is looked at before it is read.

    Args:
      path: The file.
      max_bytes: The most that such a file can have.
      what: What it is, for error messages ("token ids").

    Raises:
      BrokenContainerError: Code "file-size": it is larger.
      MissingFileError, RefusedError, StorageError: As `SourceFile`.
    """
    with SourceFile(path) as source:
        if source.size > max_bytes:
            raise BrokenContainerError(
                f"the file is too large for {what}",
                code="file-size",
                file=path,
                found=f"{source.size} bytes",
                expected=f"at most {max_bytes}",
            )
        return bytes(source.read_at(0, source.size))


def _refuse_irregular(found: os.stat_result, path: str) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    raise RefusedError(
        f"this is {kinds.get(stat.S_IFMT(found.st_mode), 'no file')}",
        code="not-a-regular-file",
        file=path,
        expected="a regular file",
        hint="Name a file; save what a pipe or a device gives to a file first",
    )
