"""What a disk may hold after a power cut: a model of one, fed with the calls that a program made.

What was flushed (fsync of a file, or of the folder for the names in it) is there. Of the rest anything may be: each
write, each change of a name may have reached the disk or not, whatever came before or after it. A rename is one change,
so is an exchange: file systems with a journal promise that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tests import file_faults

# A file's bytes, or the names in a folder with what they stand for.
Tree = bytes | frozenset[tuple[str, Any]]
_ALL_SUBSETS_UP_TO = 9


@dataclasses.dataclass(frozen=True)
class Names:
    """A change of names in one folder: name -> inode, or None where the name goes away."""

    folder: int
    changes: Mapping[str, int | None]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A change of a file's content: data at a place, or (data None) a new length."""

    file: int
    offset: int
    data: bytes | None


@dataclasses.dataclass(frozen=True)
class Flushed:
    """An fsync, and what the file or folder held at that time."""

    inode: int
    held: bytes | Mapping[str, int]


Event = Names | Bytes | Flushed


@dataclasses.dataclass
class Record:
    """The disk at the beginning, all of it flushed, and what happened since, in order."""

    root: int
    before: dict[int, bytes | Mapping[str, int]]
    events: list[Event] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def recorded(root: pathlib.Path) -> Iterator[Record]:
    """Records what the block does below `root`, through `os` and `output._renameat2`."""
    record = Record(root.stat().st_ino, dict(_disk(root)))

    def seen(call: file_faults.Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        before = {os.fspath(path): _inode(path) for path in args[:2] if isinstance(path, str | bytes)}
        result = real(*args, **options)
        record.events += _events(call.name, args, result, before)
        return result

    with file_faults.watched(root, seen):
        yield record


def _events(name: str, args: tuple[Any, ...], result: Any, before: Mapping[str, int | None]) -> Iterator[Event]:
    if name == "pwrite":
        yield Bytes(os.fstat(args[0]).st_ino, args[2], bytes(memoryview(args[1])[:result]))
    elif name == "ftruncate":
        yield Bytes(os.fstat(args[0]).st_ino, args[1], None)
    elif name == "fsync":
        yield Flushed(os.fstat(args[0]).st_ino, _held(args[0]))
    elif name in ("open", "mkdir"):
        if before[args[0]] is None:
            yield _change({args[0]: _inode(args[0])})
    elif name in ("unlink", "rmdir"):
        yield _change({args[0]: None})
    elif name == "rename" or (name == "renameat2" and result):
        exchanged = name == "renameat2" and args[2] == 2
        yield _change({args[0]: before[args[1]] if exchanged else None, args[1]: before[args[0]]})


def _change(changes: Mapping[str, int | None]) -> Names:
    (folder,) = {os.path.dirname(path) for path in changes}
    inode = _inode(folder)
    assert inode is not None
    return Names(inode, {os.path.basename(path): found for path, found in changes.items()})


def _inode(path: str | bytes) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _held(fd: int) -> bytes | Mapping[str, int]:
    found = os.fstat(fd)
    if stat.S_ISDIR(found.st_mode):
        with os.scandir(fd) as entries:
            return {entry.name: entry.inode() for entry in entries}
    return os.pread(fd, found.st_size, 0)


def _disk(path: pathlib.Path) -> Iterator[tuple[int, bytes | Mapping[str, int]]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield path.stat().st_ino, _held(fd)
    finally:
        os.close(fd)
    if path.is_dir():
        for inner in path.iterdir():
            yield from _disk(inner)


def after(record: Record, calls: int) -> Iterator[dict[str, Tree]]:
    """Yields what the folder may hold when the power goes after the first so many calls, names with their content."""
    flushed: dict[int, bytes | Mapping[str, int]] = dict(record.before)
    pending: dict[int, list[Names | Bytes]] = {}
    for event in record.events[:calls]:
        match event:
            case Flushed(inode, held):
                flushed[inode] = held
                pending.pop(inode, None)
            case Names(inode) | Bytes(inode):
                pending.setdefault(inode, []).append(event)
    folders = {event.folder for event in record.events if isinstance(event, Names)}
    folders |= {inode for inode, held in record.before.items() if isinstance(held, Mapping)}
    for entries in _folder_states(record.root, flushed, pending):
        names = sorted(entries)
        possible = [_trees(entries[name], flushed, pending, folders) for name in names]
        first = [next(iter(trees)) for trees in possible]
        yield dict(zip(names, first, strict=True))
        # One at a time: what is whole in each of them is whole whatever the others are.
        for at, trees in enumerate(possible):
            for tree in trees[1:]:
                yield dict(zip(names, [*first[:at], tree, *first[at + 1 :]], strict=True))


def _trees(inode: int, flushed: Mapping[int, Any], pending: Mapping[int, list[Any]], folders: set[int]) -> list[Tree]:
    if inode not in folders:
        return list(dict.fromkeys(_file_states(inode, flushed, pending)))
    found: dict[Tree, None] = {}
    for entries in _folder_states(inode, flushed, pending):
        names = sorted(entries)
        possible = [_trees(entries[name], flushed, pending, folders) for name in names]
        first = [trees[0] for trees in possible]
        found[frozenset(zip(names, first, strict=True))] = None
        for at, trees in enumerate(possible):
            for tree in trees[1:]:
                found[frozenset(zip(names, [*first[:at], tree, *first[at + 1 :]], strict=True))] = None
    return list(found)


def _folder_states(
    inode: int, flushed: Mapping[int, Any], pending: Mapping[int, list[Names]]
) -> Iterator[dict[str, int]]:
    for kept in _subsets(pending.get(inode, [])):
        entries = dict(flushed.get(inode, {}))
        for event in kept:
            for name, found in event.changes.items():
                if found is None:
                    entries.pop(name, None)
                else:
                    entries[name] = found
        yield entries


def _file_states(inode: int, flushed: Mapping[int, Any], pending: Mapping[int, list[Bytes]]) -> Iterator[bytes]:
    for kept in _subsets(pending.get(inode, [])):
        content = bytearray(flushed.get(inode, b""))
        for event in kept:
            end = event.offset + len(event.data or b"")
            content.extend(bytes(max(0, end - len(content))))
            if event.data is None:
                del content[event.offset :]
            else:
                content[event.offset : end] = event.data
        yield bytes(content)


def _subsets(events: list[Any]) -> Iterable[tuple[Any, ...]]:
    """All subsets, in order; of many events none, all, each alone and each one missing."""
    if len(events) <= _ALL_SUBSETS_UP_TO:
        return itertools.chain.from_iterable(
            itertools.combinations(events, count) for count in reversed(range(len(events) + 1))
        )
    without = [(*events[:at], *events[at + 1 :]) for at in range(len(events))]
    return [tuple(events), (), *((event,) for event in events), *without]


def tree(path: pathlib.Path) -> Tree | None:
    """What stands at a path now, in the form that `after` yields; None for nothing."""
    if path.is_dir():
        return frozenset((inner.name, tree(inner)) for inner in path.iterdir())
    return path.read_bytes() if path.exists() else None
