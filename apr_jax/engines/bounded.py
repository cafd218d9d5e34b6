"""Reading files that somebody else wrote: looked at before they are read, never further than the map says, bounded."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import math
import os
import pathlib
import stat
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.errors import (
    BrokenContainerError,
    DumpError,
    MissingFileError,
    StorageError,
    UsageError,
)
from apr_jax.converters.formats import strict_json

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
}
MAX_FILE = 64 << 30
"""A whole trace of a large model fits; what is larger is no dump."""
MAX_TEXT = 256 << 20
_NPY_HEADER = 1 << 16
_MAX_FILES = 1_000_000
# What lists an archive's members, some 100 bytes each: `zipfile` takes 10 us for one; large models have 5,000 stages.
_MAX_DIRECTORY = 1 << 20
_MAX_PACKED = 1 << 30


def data(path: str | os.PathLike[str], most: int = MAX_FILE) -> bytes:
    """Reads a whole regular file of at most `most` bytes; a pipe or device is not opened.

    Raises:
      MissingFileError: No such file.
      RefusedError: Code "dump-size": larger; "dump-file": no regular file.
      StorageError: The operating system refused.
    """
    with _opened(path, most) as file:
        return file.read()


def checked(path: str | os.PathLike[str], most: int = MAX_FILE) -> None:
    """Looks at a file that another library is going to read: errors as `data`."""
    _opened(path, most).close()


def _opened(path: str | os.PathLike[str], most: int) -> Any:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DumpError("this is not a regular file", code="dump-file", file=path, expected="a regular file")
        if found.st_size > most:
            raise DumpError(
                "the file is larger than what it can hold",
                code="dump-size",
                file=path,
                found=f"{found.st_size} bytes",
                expected=f"at most {most}",
            )
        return open(path, "rb")
    except FileNotFoundError:
        raise MissingFileError("no such file", code="file-missing", file=path) from None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", code="read", file=path) from None


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file that a map names.

    Raises:
      RefusedError: Code "file-name": the name is absolute, leads out of the folder or holds a NUL.
    """
    parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
    if not name or "\0" in name or name.startswith(("/", "\\")) or ".." in parts or ":" in (parts[:1] or ("",))[0]:
        raise DumpError(
            "the map names a file outside of its folder",
            code="file-name",
            file=folder,
            found=name,
            expected="names relative to the folder, without ..",
        )
    return folder / name


def files(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """Returns all files below a folder with this ending, sorted; links to folders are not followed."""
    found = []
    for count, path in enumerate(_walk(folder)):
        if count > _MAX_FILES:
            raise DumpError(
                "too many files for a dump", code="dump-files", file=folder, expected=f"at most {_MAX_FILES}"
            )
        if path.suffix == suffix:
            found.append(path)
    return sorted(found)


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for place, _, names in os.walk(folder):
        yield from (pathlib.Path(place, name) for name in names)


def json(path: str | os.PathLike[str], what: str, most: int = MAX_TEXT) -> Any:
    """Reads a JSON file of at most `most` bytes; errors as `strict_json.loads`."""
    return strict_json.loads(data(path, most), what=what, max_bytes=most, file=os.fspath(path))


def npy(path: str | os.PathLike[str], most_elements: int | None = None, floats: bool = True) -> np.ndarray:
    """Reads a `.npy` array; its header is looked at before anything is allocated, and pickles are never read.

    Args:
      path: The file.
      most_elements: The most that the stage can hold; None is what the file's size allows.
      floats: Whether only floats are taken; else integers are as well.

    Raises:
      BrokenContainerError: It is no such file, or its size is not what the header says.
      RefusedError: More elements than that, or another kind of elements.
    """
    most = MAX_FILE if most_elements is None else most_elements * 8 + _NPY_HEADER
    return _npy(data(path, most), path, floats)


def _npy(content: bytes, path: str | os.PathLike[str], floats: bool, name: str | None = None) -> np.ndarray:
    def broken(what: str) -> BrokenContainerError:
        return BrokenContainerError("not a .npy array", code="npy", file=path, tensor=name, found=what)

    if content[:6] != b"\x93NUMPY" or len(content) < 10:
        raise broken(f"{bytes(content[:10])!r} at the beginning")
    if content[6] not in (1, 2, 3) or content[7]:
        raise broken(f"version {content[6]}.{content[7]}")
    wide = content[6] >= 2
    start = 12 if wide else 10
    if len(content) < start:
        raise broken("a header that is cut short")
    (length,) = struct.unpack("<I" if wide else "<H", content[8:start])
    if length > _NPY_HEADER or start + length > len(content):
        raise broken(f"a header of {length} bytes")
    try:
        header = ast.literal_eval(content[start : start + length].decode("latin-1").lstrip(" "))
        dtype, shape, fortran = _header(header)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, KeyError, OverflowError) as error:
        raise broken(f"a header that cannot be read ({type(error).__name__})") from None
    if dtype.kind == "V" and dtype.itemsize == 2:
        dtype = np.dtype(ml_dtypes.bfloat16)  # what np.save makes of ml_dtypes' bfloat16
    kinds = "f" if floats else "fiub"
    if (dtype.kind not in kinds and dtype != ml_dtypes.bfloat16) or (dtype.kind == "f" and dtype.itemsize > 8):
        raise DumpError(
            "not an array of floats" if floats else "not an array of numbers",
            code="dump-dtype",
            file=path,
            tensor=name,
            found=str(dtype),
            expected="float32",
        )
    body = memoryview(content)[start + length :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise broken(f"{len(body)} bytes of values where the header says {math.prod(shape) * dtype.itemsize}")
    array = np.frombuffer(body, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(header: Any) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    shape, descr = header["shape"], header["descr"]
    if set(header) != {"descr", "fortran_order", "shape"} or not isinstance(descr, str) or not isinstance(shape, tuple):
        raise ValueError("keys")
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape) or len(shape) > 32:
        raise ValueError("shape")
    if not isinstance(header["fortran_order"], bool):
        raise ValueError("fortran_order")
    return np.dtype(descr), shape, header["fortran_order"]


def npz(path: str | os.PathLike[str]) -> dict[str, Callable[[int | None], np.ndarray]]:
    """Returns name -> what reads that array of an `.npz` archive, of at most so many elements.

    The archive stays open, its list of members read once, until nobody holds one of these functions.

    Raises:
      BrokenContainerError: It is no archive.
      RefusedError: Too many members.
    """
    file = _Archive(_opened(path, MAX_FILE).detach())
    with _archive_errors(path):
        archive = zipfile.ZipFile(file)
    file.most = None
    weakref.finalize(archive, file.close)
    return {
        member.filename.removesuffix(".npy"): functools.partial(_member, archive, path, member)
        for member in archive.infolist()
        if member.filename.endswith(".npy")
    }


class _Archive(io.BufferedReader):
    """A file that refuses to be read in pieces above `most`: `zipfile` reads the list of members in one.

    How long the list is stands in one of several end records, and which one counts is `zipfile`'s to say.
    """

    most: int | None = _MAX_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None and size is not None and size > self.most:
            raise DumpError(
                "too many arrays for a dump",
                code="dump-files",
                file=self.name,
                found=f"{size} bytes of names",
                expected=f"at most {self.most}",
            )
        return super().read(size)


def _member(
    archive: zipfile.ZipFile,
    path: str | os.PathLike[str],
    member: zipfile.ZipInfo,
    most_elements: int | None,
    floats: bool = False,
) -> np.ndarray:
    """Reads one array of an archive; it is unpacked only if the archive says that it is not too large."""
    most = _MAX_PACKED if most_elements is None else most_elements * 8 + _NPY_HEADER
    if member.file_size > most:
        raise DumpError(
            "an array is larger than what it can hold",
            code="dump-size",
            file=path,
            tensor=member.filename,
            found=f"{member.file_size} bytes",
            expected=f"at most {most}",
        )
    with _archive_errors(path), archive.open(member) as file:
        content = file.read(member.file_size + 1)
    return _npy(content, path, floats, member.filename.removesuffix(".npy"))


@contextlib.contextmanager
def _archive_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        RuntimeError,
        zlib.error,
        OSError,
        KeyError,
        ValueError,
    ) as error:
        raise BrokenContainerError("not a .npz archive", code="npz", file=path, found=str(error)[:200]) from None


def raw(path: str | os.PathLike[str], name: Any, most_elements: int) -> np.ndarray:
    """Reads raw little-endian values of a dtype, flat.

    Raises:
      UsageError: The dtype is none of DTYPES.
      BrokenContainerError: No whole number of elements.
    """
    dtype = np.dtype(DTYPES[checked_dtype(name, path)])
    content = data(path, most_elements * dtype.itemsize + dtype.itemsize)
    if len(content) % dtype.itemsize:
        raise BrokenContainerError(
            "the size is not a whole number of elements",
            code="dump-size",
            file=path,
            found=f"{len(content)} bytes",
            expected=f"a multiple of {dtype.itemsize} for {name}",
        )
    return np.frombuffer(content, dtype)


def checked_dtype(name: Any, path: str | os.PathLike[str]) -> str:
    """Returns the name of a dtype that a dump may have; else raises UsageError."""
    if not isinstance(name, str) or name not in DTYPES:
        raise UsageError("unknown dtype", code="dtype", file=path, found=name, expected=" or ".join(DTYPES))
    return name
