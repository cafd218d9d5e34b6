"""Reading a file at given offsets, and nothing else: no mapping, no re-opening, no surprise.

One descriptor serves for the life of a checkpoint, so a file replaced by a rename changes nothing; a file that shrinks
is an error that names the byte, where a mapped file would end the process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType

from apr_jax.converters.errors import BrokenContainerError, MissingFileError, RefusedError, StorageError
from apr_jax.converters.storage.crc import Bytes

# One read of the kernel ends at 2 GiB; below that it is one call.
_READ_BYTES = 1 << 30
_SNIFF_BYTES = 64

# First bytes -> what they begin. Order matters only where one is the beginning of another.
_FOREIGN = (
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"FUGG", "a byte-swapped GGUF file"),
    (b"APRN", "an .apr container of version 1 (APRN), which has another layout"),
    (b"APR1", "a whisper.apr file (APR1), which has another layout"),
    (b"\0RPA", "a byte-swapped .apr file"),
    (b"PK\x03\x04", "a ZIP archive (PyTorch's .bin and .pt files are such)"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"BZh", "a bzip2 file"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"version https://git-lfs", "a Git-LFS pointer, not the file that it stands for"),
    (b"<?xml", "an XML document, perhaps the error page of a server"),
)
_TSP_TYPE = (0x54535000).to_bytes(4, "little")


def foreign_format(first: Bytes) -> str | None:
    """Returns, from a file's first bytes, what it is if it is neither safetensors nor `.apr` v2; None if unknown."""
    head = bytes(first[:_SNIFF_BYTES])
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if head[:12] == b"APR\0\1\0\0\0" + _TSP_TYPE:
        return "a route-solver file of aprender-tsp, which shares the magic of .apr and nothing else"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and len(head) > 1:
        return "a Python pickle"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return "an HTML page, perhaps the error page of a server"
    return None


def refuse_foreign(first: Bytes, *, wanted: str, file: str | None) -> None:
    """Raises BrokenContainerError, code "foreign-format", if the first bytes are those of another known format."""
    name = foreign_format(first)
    if name is not None:
        hint = "Fetch it with `git lfs pull`" if "Git-LFS" in name else None
        raise BrokenContainerError(
            f"this is {name}", code="foreign-format", file=file, offset=0, expected=wanted, hint=hint
        )


class SourceFile:
    """A regular file, opened once for reading.

    Attributes:
      path: As the user or the index named it.
      size: Bytes, at the time of opening.
      device, inode: Its identity (st_dev, st_ino), to see that an output is not the input.
      links: Hard links to it.
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
        self.device, self.inode, self.links = found.st_dev, found.st_ino, found.st_nlink
        self._stamp = (found.st_size, found.st_mtime_ns)

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
                    "the file ends before the data does; did it shrink while it was being read?",
                    code="short-read",
                    file=self.path,
                    offset=offset + done,
                    found=f"{done} bytes",
                    expected=f"{len(view)} bytes from byte {offset}",
                )
            done += count

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
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != self._stamp:
            raise StorageError(
                "the file was changed while it was being read",
                code="source-changed",
                file=self.path,
                found=f"{now.st_size} bytes",
                expected=f"{self.size} bytes",
            )

    def close(self) -> None:
        """Closes the file; closing twice is no error."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SourceFile({self.path!r}, size={self.size})"


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
    )
