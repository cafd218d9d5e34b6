"""Files and folders that appear whole or not at all.

Everything is written into a temporary sibling, flushed to the disk and renamed, so that the final name holds either
what was there before or the complete new content, whatever happens in between. A writer keeps a lock on its temporary
for as long as it lives: one without a lock was left by a process that was killed, and the next run to the same output
removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator

from apr_jax.converters.errors import AprJaxError, MissingFileError, StorageError, UsageError
from apr_jax.converters.storage.interrupts import last_act

_TEMPORARY = "apr-jax-tmp"
_ASIDE = "apr-jax-old"
# Flags of renameat2.
_NOREPLACE, _EXCHANGE = 1, 2
_CODES = {
    errno.ENOSPC: "no-space",
    errno.EDQUOT: "quota",
    errno.EFBIG: "file-too-large",
    errno.ENAMETOOLONG: "name-too-long",
    errno.EROFS: "read-only",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
}

Notice = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """What a folder of one kind holds. A folder with anything else in it is never replaced.

    Attributes:
      name: What to call it.
      holds: Whether a file of this name, relative to the folder, belongs into such a folder.
      shows: Whether a file of this name shows that the folder is one.
    """

    name: str
    holds: Callable[[str], bool]
    shows: Callable[[str], bool]


class OutputFile:
    """A file being written. Writes name their place, so that several threads can fill it.

    Attributes:
      path: The final path, for messages.
      size: Bytes that the finished file will have.
    """

    def __init__(self, fd: int, path: str, size: int):
        self.path = path
        self.size = size
        self._fd = fd
        with _as_storage_error(path):
            # The size is set first: what is never written (padding) is zero then.
            os.ftruncate(fd, size)

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Writes `data` at byte `offset`, however many system calls that takes.

        Raises:
          StorageError: The operating system refused; for a full disk it says how many bytes are missing.
        """
        rest = memoryview(data)
        while rest:
            try:
                written = os.pwrite(self._fd, rest, offset)
            except OSError as error:
                raise _storage_error(error, self.path, self._lacking(error)) from error
            rest = rest[written:]
            offset += written

    def sync(self) -> None:
        """Flushes the content to the disk."""
        with _as_storage_error(self.path):
            os.fsync(self._fd)

    def _lacking(self, error: OSError) -> int | None:
        if error.errno == errno.ENOSPC:
            with contextlib.suppress(OSError):
                held = os.fstat(self._fd).st_blocks * 512
                return max(1, self.size - held - _free_bytes(os.fstatvfs(self._fd)))
        return None


class OutputFolder:
    """A folder being written.

    Attributes:
      path: The final path, for messages.
    """

    def __init__(self, temporary: str, path: str):
        self.path = path
        self._temporary = temporary

    @contextlib.contextmanager
    def written_by_others(self) -> Iterator[str]:
        """Yields where the folder is until it is whole; the files that a library has written there are then flushed.

        Raises:
          StorageError: The operating system refused, in the block too.
        """
        with _as_storage_error(self.path):
            yield self._temporary
            for place, _, names in os.walk(self._temporary, onerror=_raise):
                for name in names:
                    _sync(os.path.join(place, name), os.O_RDONLY)

    @contextlib.contextmanager
    def create(self, name: str, size: int) -> Iterator[OutputFile]:
        """Opens a new file of `size` bytes in the folder; it is flushed to the disk at the end of the block.

        Args:
          name: Relative to the folder; may stand in subfolders ("layer-0/x.bin"), which are made.
          size: Bytes of the finished file.

        Raises:
          UsageError: Code "file-name": the name leads elsewhere.
          StorageError: The operating system refused.
        """
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise UsageError(
                "this is not the name of a file in the folder",
                code="file-name",
                file=self.path,
                found=name,
                hint="Give a name without folders",
            )
        shown, place = os.path.join(self.path, name), os.path.join(self._temporary, name)
        with _as_storage_error(shown):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            output = OutputFile(fd, shown, size)
            yield output
            output.sync()
        finally:
            _close(fd)


@contextlib.contextmanager
def atomic_file(
    path: str, size: int, *, force: bool = False, sources: Iterable[str] = (), notice: Notice | None = None
) -> Iterator[OutputFile]:
    """Opens the temporary sibling of `path`; the end of the block gives it its name, an exception removes it.

    Permissions are the umask's, or those of the file that is replaced, without set-user-ID and set-group-ID; root keeps
    its owner. A symbolic link is written through.

    Args:
      path: The final path.
      size: Bytes of the finished file.
      force: Whether an existing file may be replaced.
      sources: Paths that the content comes from; writing over one of them is refused.
      notice: Told about what earlier, killed runs left and this one removed, and about what this one has to leave.

    Raises:
      UsageError, MissingFileError: As `check_target`.
      StorageError: No space, or the operating system refused. What stood at `path` stands there still.
    """
    _remove_leftovers(os.path.realpath(path), notice)
    final = check_target(path, force=force, sources=sources)
    _check_space(final, size)
    with _temporary(final, path, None) as temporary:
        output = OutputFile(temporary.fd, path, size)
        yield output
        output.sync()
        _put_in_place(temporary, final, path, None, force, notice)


@contextlib.contextmanager
def atomic_folder(
    path: str,
    size: int,
    *,
    kind: FolderKind,
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
) -> Iterator[OutputFolder]:
    """Makes a temporary sibling folder of `path`; the end of the block gives it its name, an exception removes it.

    With `force` an existing folder is exchanged for the new one in one step, and only then removed; a folder that holds
    anything but the files of its kind is refused.

    Args, Raises: As `atomic_file`; `kind` says what the folder may hold, `size` is the sum over all files.
    """
    _remove_leftovers(os.path.realpath(path), notice)
    final = check_target(path, folder=kind, force=force, sources=sources)
    _check_space(final, size)
    with _temporary(final, path, kind) as temporary:
        yield OutputFolder(temporary.path, path)
        with _as_storage_error(path):
            # Files were flushed one by one; the names in the folders, at any depth, are not part of them.
            for place, _, _ in os.walk(temporary.path, onerror=_raise):
                _sync_folder(place)
        _put_in_place(temporary, final, path, kind, force, notice)


def check_target(
    path: str, *, folder: FolderKind | None = None, force: bool = False, sources: Iterable[str] = ()
) -> str:
    """Checks that an output may be written at `path`.

    Args:
      path: The final path as the user named it.
      folder: The kind of folder to be written; None for a file.
      force: Whether something that exists may be replaced.
      sources: Paths of the input.

    Returns:
      The absolute path that is going to be written; the target, where `path` is a symbolic link.

    Raises:
      UsageError: Code "output-exists", "output-is-folder", "output-not-folder", "output-not-file", "same-file",
        "output-holds-source", "output-not-replaceable" or "output-foreign".
      MissingFileError: The folder that is to hold the output does not exist.
      StorageError: The operating system refused to look.
    """
    with _as_storage_error(path):
        final = os.path.realpath(path)
        if not _is_folder(os.path.dirname(final)):
            raise MissingFileError("the folder of the output does not exist", code="output-folder-missing", file=path)
        try:
            os.lstat(final)
        except FileNotFoundError:
            if os.path.exists(path):
                # A pipe behind /dev/stdout has no name of its own.
                raise _not_regular(path) from None
            if os.path.islink(path) and not force:
                raise _exists(path) from None
            return final
        found = os.stat(final)
        _check_not_source(path, found, sources)
        if not force:
            raise _exists(path)
        _check_replaceable(path, final, folder)
        if found.st_uid != os.geteuid() and os.geteuid() != 0:
            raise UsageError(
                "the output belongs to another user, who would lose it",
                code="output-foreign",
                file=path,
                hint="Remove it yourself, or name another output",
            )
        return final


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _exists(path: str) -> UsageError:
    return UsageError("the output exists", code="output-exists", file=path, hint="--force replaces it")


def _not_regular(path: str) -> UsageError:
    return UsageError(
        "the output is not a regular file", code="output-not-file", file=path, hint="Choose another output"
    )


def _check_not_source(path: str, found: os.stat_result, sources: Iterable[str]) -> None:
    """Compares device and inode, so that links, bind mounts and other spellings of one path do not matter."""
    for source in sources:
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.stat(source)):
                raise UsageError(
                    "input and output are the same",
                    code="same-file",
                    file=path,
                    found=source,
                    hint="Choose another output",
                )
        parent = os.path.dirname(os.path.realpath(source))
        while True:
            with contextlib.suppress(OSError):
                if os.path.samestat(found, os.stat(parent)):
                    raise UsageError(
                        "the output is a folder that holds the input",
                        code="output-holds-source",
                        file=path,
                        hint="Choose another output",
                    )
            if parent == os.path.dirname(parent):
                break
            parent = os.path.dirname(parent)


def _check_replaceable(path: str, place: str, kind: FolderKind | None) -> None:
    """Raises UsageError unless what is at `place` may make room for a folder of a kind, or for a file."""
    mode = os.stat(place).st_mode
    if kind is None:
        if stat.S_ISDIR(mode):
            raise UsageError(
                "the output is a folder, a file is to be written",
                code="output-is-folder",
                file=path,
                hint="Name a file in it",
            )
        if not stat.S_ISREG(mode):
            raise _not_regular(path)
        return
    if not stat.S_ISDIR(mode):
        raise UsageError(
            "the output exists and is not a folder",
            code="output-not-folder",
            file=path,
            hint="Remove it yourself, or name another output",
        )
    names = list(_files(place))
    foreign = sorted(name for name in names if not kind.holds(name))
    if foreign or (names and not any(map(kind.shows, names))):
        raise UsageError(
            f"the folder does not look like a {kind.name}, so it is not replaced",
            code="output-not-replaceable",
            file=path,
            found=", ".join(foreign[:8]) or f"nothing that shows a {kind.name}",
            hint="Remove it yourself, or name another output",
        )


def _files(folder: str) -> Iterator[str]:
    """Yields the names of all files below a folder, relative to it; "NAME/" for subfolders that hold none."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.name
                continue
            inner = [f"{entry.name}/{name}" for name in _files(entry.path)]
            yield from inner or [f"{entry.name}/"]


def _check_space(final: str, size: int) -> None:
    with _as_storage_error(final):
        found = os.statvfs(os.path.dirname(final))
    free = _free_bytes(found)
    # Some network file systems report no sizes at all.
    if found.f_blocks and free < size:
        raise StorageError(
            f"not enough space: {size} bytes are needed, {free} are free, {size - free} are missing",
            code="no-space",
            file=final,
        )


def _free_bytes(found: os.statvfs_result) -> int:
    return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize


def _prefix(final: str, kind: str) -> str:
    name = os.path.basename(final)
    if len(os.fsencode(name)) > 200:
        # File names end at 255 bytes.
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{kind}."


def _temporary_name(final: str, kind: str = _TEMPORARY) -> str:
    return os.path.join(os.path.dirname(final), f"{_prefix(final, kind)}{os.getpid()}.{os.urandom(4).hex()}")


@dataclasses.dataclass
class _Temporary:
    """What an output is until it is whole.

    Attributes:
      path: Where it is.
      fd: Its descriptor, which holds the lock.
      made: By what it is known under any name.
      kept: Whether it must not be removed: it may have the final name, for all that the disk has been told.
    """

    path: str
    fd: int = -1
    made: os.stat_result | None = None
    kept: bool = False

    def discard(self) -> None:
        # Behind an exchange, what was replaced has this name: it is not ours to remove.
        with contextlib.suppress(FileNotFoundError):
            if not self.kept and (self.made is None or os.path.samestat(os.stat(self.path), self.made)):
                _remove(self.path)


@contextlib.contextmanager
def _temporary(final: str, path: str, kind: FolderKind | None) -> Iterator[_Temporary]:
    """Makes the temporary sibling of `final`. What ends the block early removes it, or names it where that fails."""
    temporary = _Temporary(_temporary_name(final))
    with last_act(temporary.discard):
        try:
            with _as_storage_error(path):
                temporary.fd = _create_locked(temporary.path, folder=kind is not None)
                temporary.made = os.fstat(temporary.fd)
                with contextlib.suppress(FileNotFoundError):
                    _take_over(os.stat(final), temporary.fd)
            yield temporary
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.discard()
            if not _is_gone(temporary.path):
                _add_hint(error, f"'{temporary.path}' is left behind; the next run removes it")
            raise
        finally:
            if temporary.fd >= 0:
                _close(temporary.fd)


def _is_gone(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _take_over(before: os.stat_result, fd: int) -> None:
    """Gives a temporary the owner and the permissions of what it replaces; other content is no longer set-user-ID."""
    if os.geteuid() == 0:
        os.fchown(fd, before.st_uid, before.st_gid)
    kept = 0o7777 if stat.S_ISDIR(before.st_mode) else 0o777
    os.fchmod(fd, stat.S_IMODE(before.st_mode) & kept)


def _create_locked(temporary: str, *, folder: bool) -> int:
    while True:
        if folder:
            os.mkdir(temporary, 0o777)
            fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        # Some network file systems have no locks; the process id in the name stands in there.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            # Another run may have taken it for a leftover, and removed it, in the moment before the lock.
            os.stat(temporary)
            return fd
        except FileNotFoundError:
            _close(fd)
        except OSError:
            _close(fd)
            raise


def _close(fd: int) -> None:
    # What was written has been flushed by now: a close can lose nothing, whatever it reports.
    with contextlib.suppress(OSError):
        os.close(fd)


def _remove_leftovers(final: str, notice: Notice | None) -> None:
    """Removes what killed runs to the same output left, and puts back a folder that one of them had set aside."""
    say = notice or _unheard
    folder = os.path.dirname(final)
    with _as_storage_error(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted(names):
        path = os.path.join(folder, name)
        if not name.startswith((_prefix(final, _TEMPORARY), _prefix(final, _ASIDE))) or _is_held(path):
            continue
        try:
            if name.startswith(_prefix(final, _ASIDE)) and not os.path.lexists(final):
                os.rename(path, final)
                say(f"put '{name}' back, which an earlier run had set aside before it was killed")
            else:
                _remove(path)
                say(f"removed '{name}', which an earlier run had left")
        except OSError as error:
            say(f"could not remove '{name}', which an earlier run had left: {_said(error)}")


def _is_held(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return _is_alive(path)
    finally:
        _close(fd)


def _is_alive(path: str) -> bool:
    process = path.rsplit(".", 2)[-2]
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _remove(path: str) -> None:
    """Removes a file or a folder; links are removed, not followed."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    for name in os.listdir(path):
        _remove(os.path.join(path, name))
    os.rmdir(path)


def _put_in_place(
    temporary: _Temporary, final: str, path: str, kind: FolderKind | None, force: bool, notice: Notice | None
) -> None:
    """Gives the temporary its final name, and flushes that. An error leaves there what was there before."""
    with _as_storage_error(path):
        if force:
            # Where nothing is there to be replaced.
            with contextlib.suppress(FileNotFoundError):
                _replace(temporary, final, path, kind, notice)
                return
        _name_new(temporary, final, path)


def _name_new(temporary: _Temporary, final: str, path: str) -> None:
    """Renames without replacing anything that has appeared in the meantime."""
    try:
        if not _renameat2(temporary.path, final, _NOREPLACE):
            if os.path.lexists(final):
                raise _exists(path)
            os.rename(temporary.path, final)
    except FileExistsError:
        raise _exists(path) from None
    with _undone(lambda: os.rename(final, temporary.path), temporary, final):
        _flush_names(final, path)


def _replace(temporary: _Temporary, final: str, path: str, kind: FolderKind | None, notice: Notice | None) -> None:
    with _held(final):
        _check_replaceable(path, final, kind)
        old = _swap(temporary.path, final, kind)
        with _undone(lambda: _swap_back(temporary.path, final, old), temporary, final):
            if old is not None:
                # Nobody has added anything to it since it was looked at.
                _check_replaceable(path, old, kind)
            _flush_names(final, path)
        if old is not None:
            try:
                _remove(old)
            except OSError as error:
                (notice or _unheard)(f"'{old}', which was replaced, could not be removed: {_said(error)}")


def _swap(temporary: str, final: str, kind: FolderKind | None) -> str | None:
    """Lets two paths change places. Returns where the old output is; None where the system does that for no file."""
    if _renameat2(temporary, final, _EXCHANGE):
        return temporary
    if kind is None:
        os.rename(temporary, final)
        return None
    aside = _temporary_name(final, _ASIDE)
    try:
        os.rename(final, aside)
        os.rename(temporary, final)
    except BaseException:
        if not os.path.lexists(final):
            os.rename(aside, final)
        raise
    return aside


def _swap_back(temporary: str, final: str, old: str | None) -> None:
    if old == temporary:
        _renameat2(temporary, final, _EXCHANGE)
    elif old is None:
        raise OSError(errno.ENOENT, "what was replaced is gone")
    else:
        os.rename(final, temporary)
        os.rename(old, final)


@contextlib.contextmanager
def _held(final: str) -> Iterator[None]:
    """Locks what is going to be replaced, so that no other run takes it for a leftover under its other name."""
    try:
        fd = os.open(final, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        yield
        return
    try:
        # Not waited for: whoever has a lock on it keeps it from being taken for a leftover as well.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        _close(fd)


@contextlib.contextmanager
def _undone(undo: Callable[[], None], temporary: _Temporary, final: str) -> Iterator[None]:
    """Calls `undo` if the block fails, so that the final name is again what it was."""
    try:
        yield
    except BaseException as error:
        # Until the disk knows that the temporary has its own name again, its content is not touched.
        temporary.kept = True
        try:
            undo()
            _sync_folder(os.path.dirname(final))
            temporary.kept = False
        except OSError as failed:
            _add_hint(error, f"'{final}' is whole, but may be either output after a power cut ({_said(failed)})")
        raise


def _flush_names(final: str, path: str) -> None:
    with _as_storage_error(path):
        _sync_folder(os.path.dirname(final))


def _renameat2(source: str, target: str, flags: int) -> bool:
    """Calls Linux's renameat2. Returns False where the system or the file system has no such operation."""
    import ctypes

    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD
    if function(here, os.fsencode(source), here, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), target)


def _sync_folder(folder: str) -> None:
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot flush a folder, and need not.
        if not flags & os.O_DIRECTORY or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        _close(fd)


@contextlib.contextmanager
def _as_storage_error(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(error, path) from error


def _storage_error(error: OSError, path: str, missing: int | None = None) -> StorageError:
    code = _CODES.get(error.errno or 0, "write-failed")
    lacking = f": {missing} bytes are missing" if missing is not None else ""
    hint = ". ".join(getattr(error, "__notes__", ())) or None
    return StorageError(f"cannot write the output: {_said(error)}{lacking}", code=code, file=path, hint=hint)


def _said(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _add_hint(error: BaseException, hint: str) -> None:
    if isinstance(error, AprJaxError):
        error.hint = hint if error.hint is None else f"{error.hint}. {hint}"
    else:
        error.add_note(hint)


def _raise(error: OSError) -> None:
    raise error


def _unheard(message: str) -> None:
    """Takes a notice that nobody has asked for."""
