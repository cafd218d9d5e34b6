"""A file layer that fails on request: at every call of `os` that reads or writes below a folder, with every fault.

    calls = file_faults.recorded(folder, action)             a clean run: what is called, in order
    with file_faults.planted(folder, fault, at): action()    call number `at` goes wrong

Signals that interrupt a call are not among the faults: Python repeats the call before anybody sees them (PEP 475);
tests/hostile/CRASHES.md has how they were planted below Python, in the system calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from apr_jax.converters.storage import output

_BY_DESCRIPTOR = frozenset(
    ("fstat", "fstatvfs", "fchmod", "fchown", "ftruncate", "fsync", "pwrite", "pread", "preadv", "close")
)
_BY_PATH = frozenset(("open", "stat", "lstat", "statvfs", "listdir", "scandir", "mkdir", "rename", "unlink", "rmdir"))
NAMES = _BY_DESCRIPTOR | _BY_PATH | {"renameat2"}
# Calls that need room on the disk.
GROWING = frozenset(("open", "mkdir", "ftruncate", "pwrite", "fsync", "rename", "renameat2"))
TRANSFERS = frozenset(("preadv", "pwrite"))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: its name, and the file or folder that it is about (the first one, where there are two)."""

    name: str
    path: str


# Takes the call, the real function and its arguments; stands in for the function.
Act = Callable[[Call, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
      name: For messages.
      calls: Which calls it can happen to.
      act: Takes the call, the real function and its arguments, and does something else.
      lasting: Whether it happens to all calls from that one on.
    """

    name: str
    calls: frozenset[str]
    act: Act
    lasting: bool = False


def fails(number: int, calls: frozenset[str] = NAMES, *, lasting: bool = False) -> Fault:
    """Returns the fault that the system answers with error `number`; a descriptor is closed all the same."""

    def act(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if call.name == "close":
            real(*args)
        raise OSError(number, os.strerror(number), *([call.path] if call.name in _BY_PATH else []))

    return Fault(errno.errorcode[number] + (" from then on" if lasting else ""), calls, act, lasting)


def _short(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    fd, data, offset = args
    if call.name == "preadv":
        view = memoryview(data[0])
        return real(fd, [view[: max(1, len(view) // 2)]], offset)
    return real(fd, data[: max(1, len(data) // 2)], offset)


def _interrupted_before(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    raise KeyboardInterrupt


def _interrupted_after(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    real(*args, **options)
    raise KeyboardInterrupt


SHORT = Fault("short count", TRANSFERS, _short)
INTERRUPTS = (
    Fault("interrupt before", NAMES, _interrupted_before),
    Fault("interrupt after", NAMES - {"open"}, _interrupted_after),
)
ERRORS = (fails(errno.EIO), fails(errno.ENOSPC, GROWING), fails(errno.EDQUOT, GROWING))
DEAD = fails(errno.EIO, lasting=True)
"""The disk goes away: nothing can be removed or put back any more."""


def before(name: str, deed: Callable[[], None], calls: frozenset[str] = frozenset(("preadv",))) -> Fault:
    """Returns the fault that somebody does something to the files just before a call, which then goes its way."""

    def act(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        deed()
        return real(*args, **options)

    return Fault(name, calls, act)


@contextlib.contextmanager
def watched(
    root: pathlib.Path, seen: Callable[[Call, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Within the block, `seen` is called in place of each call of `NAMES` about something below `root`."""
    real = {name: getattr(os, name) for name in NAMES - {"renameat2"}} | {"renameat2": output._renameat2}
    prefix = os.path.realpath(root)
    busy = threading.local()

    def path_of(name: str, args: tuple[Any, ...]) -> str | None:
        if not args or name in _BY_DESCRIPTOR or isinstance(args[0], int):
            try:
                found = os.readlink(f"/proc/self/fd/{args[0]}") if args else os.getcwd()
            except OSError:
                return None
            return found.removesuffix(" (deleted)")
        return os.path.abspath(os.fsdecode(args[0]))

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if getattr(busy, "now", False):
                return real[name](*args, **options)
            busy.now = True
            try:
                path = path_of(name, args)
                if path is None or not (path == prefix or path.startswith(prefix + os.sep)):
                    return real[name](*args, **options)
                return seen(Call(name, path), real[name], args, options)
            finally:
                busy.now = False

        return call

    with contextlib.ExitStack() as stack:
        for name in NAMES - {"renameat2"}:
            stack.enter_context(mock.patch.object(os, name, patched(name)))
        stack.enter_context(mock.patch.object(output, "_renameat2", patched("renameat2")))
        yield


@contextlib.contextmanager
def recorded(root: pathlib.Path) -> Iterator[list[Call]]:
    """Yields a list that fills with the calls of the block."""
    calls: list[Call] = []

    def seen(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        calls.append(call)
        return real(*args, **options)

    with watched(root, seen):
        yield calls


@contextlib.contextmanager
def planted(root: pathlib.Path, fault: Fault, at: int) -> Iterator[list[Call]]:
    """Within the block call number `at`, counted from 0 among those that the fault can happen to, goes wrong.

    Yields the calls that did.
    """
    hit: list[Call] = []
    counted = -1
    lock = threading.Lock()

    def seen(call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        nonlocal counted
        if call.name not in fault.calls:
            return real(*args, **options)
        with lock:
            counted += 1
            wrong = counted == at or (fault.lasting and counted > at)
        if not wrong:
            return real(*args, **options)
        hit.append(call)
        return fault.act(call, real, args, options)

    with watched(root, seen):
        yield hit
