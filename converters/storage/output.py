"""Files and folders that appear whole or not at all.

Everything is written into a temporary sibling, flushed to the disk and renamed, so that the final name holds either
what was there before or the complete new content, whatever happens in between. A writer keeps a lock on its temporary
for as long as it lives: one without a lock was left by a process that was killed, and the next run to the same output
removes it. With a journal beside it (`resumable`) the next run that makes the very same goes on with it instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator

from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
    StorageError,
    UsageError,
)
from apr_jax.converters.storage import journal
from apr_jax.converters.storage.interrupts import last_act
from apr_jax.converters.storage.journal import Identity, Journal
from apr_jax.converters.storage.temporaries import (
    ASIDE,
    JOURNAL,
    TEMPORARY,
    Notice,
    as_storage_error,
    close_quietly,
    create_locked,
    files_below,
    is_gone,
    open_unheld,
    prefix,
    remove,
    remove_leftovers,
    said,
    storage_error,
    temporary_name,
    token_of,
    unheard,
)
from apr_jax.converters.storage.workers import Workers

# A disk flushes what several files or folders wait for in one go.
_FLUSHED_AT_ONCE = 32
# Flags of renameat2.
_NOREPLACE, _EXCHANGE = 1, 2


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
      journal: Where to note what is done of it, if another run is to go on where this one is killed.
    """

    def __init__(self, fd: int, path: str, size: int, journal: Journal | None = None):
        self.path = path
        self.size = size
        self.journal = journal
        self._fd = fd
        with as_storage_error(path):
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
                raise storage_error(error, self.path, self._lacking(error)) from error
            rest = rest[written:]
            offset += written

    def readinto_at(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with what stands at byte `offset`: what an earlier run has written.

        Raises:
          StorageError: The operating system refused, or the file ends there.
        """
        with as_storage_error(self.path):
            while buffer:
                count = os.preadv(self._fd, [buffer], offset)
                if not count:
                    raise OSError(errno.EIO, "the file has become shorter")
                buffer, offset = buffer[count:], offset + count

    def sync(self) -> None:
        """Flushes the content to the disk."""
        with as_storage_error(self.path):
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
      journal: As `OutputFile`, for all files.
    """

    def __init__(self, temporary: str, path: str, journal: Journal | None = None):
        self.path = path
        self.journal = journal
        self._temporary = temporary
        self._made: set[str] = set()

    @contextlib.contextmanager
    def written_by_others(self) -> Iterator[str]:
        """Yields where the folder is until it is whole; the files that a library has written there are then flushed.

        Raises:
          StorageError: The operating system refused, in the block too.
        """
        with as_storage_error(self.path):
            yield self._temporary
            walked = os.walk(self._temporary, onerror=_raise)
            _at_once(_sync_file, [os.path.join(place, name) for place, _, names in walked for name in names])

    def check_complete(self) -> None:
        """Raises UsageError, code "resume-foreign", if what an earlier run left holds files that no run has written."""
        if self.journal is None:
            return
        with as_storage_error(self.path):
            foreign = sorted(set(files_below(self._temporary)) - self._made)
        if foreign:
            raise UsageError(
                "somebody has put files into what an earlier run left",
                code="resume-foreign",
                file=self._temporary,
                found=", ".join(foreign[:8]),
                hint="Take them out, or leave --resume away: it then starts anew",
            )

    @contextlib.contextmanager
    def create(self, name: str, size: int) -> Iterator[OutputFile]:
        """Opens a new file of `size` bytes in the folder; it is flushed to the disk at the end of the block.

        With a journal it may be there already, with what an earlier run has written.

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
        with as_storage_error(shown):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            new = os.O_EXCL if self.journal is None else os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | new, 0o666)
        self._made.add(name)
        try:
            output = OutputFile(fd, shown, size, self.journal)
            yield output
            output.sync()
        finally:
            close_quietly(fd)


@contextlib.contextmanager
def atomic_file(
    path: str,
    size: int,
    *,
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
    resumable: Identity | None = None,
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
      resumable: What the output is made of. It then has a journal, stays with it under its temporary name when the
        block is interrupted or the disk fails, and goes on from what an earlier run to the same has left.

    Raises:
      UsageError, MissingFileError: As `check_target`. Code "resume-differs": what is left was made of something else.
      StorageError: No space, or the operating system refused. What stood at `path` stands there still.
    """
    with _begun(path, size, None, force, sources, notice, resumable) as temporary:
        output = OutputFile(temporary.fd, path, size, temporary.journal)
        yield output
        output.sync()
        _put_in_place(temporary, path, None, force, notice)


@contextlib.contextmanager
def atomic_folder(
    path: str,
    size: int,
    *,
    kind: FolderKind,
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
    resumable: Identity | None = None,
) -> Iterator[OutputFolder]:
    """Makes a temporary sibling folder of `path`; the end of the block gives it its name, an exception removes it.

    With `force` an existing folder is exchanged for the new one in one step, and only then removed; a folder that holds
    anything but the files of its kind is refused.

    Args, Raises: As `atomic_file`; `kind` says what the folder may hold, `size` is the sum over all files.
    """
    with _begun(path, size, kind, force, sources, notice, resumable) as temporary:
        output = OutputFolder(temporary.path, path, temporary.journal)
        yield output
        output.check_complete()
        with as_storage_error(path):
            # Files were flushed one by one; the names in the folders, at any depth, are not part of them.
            _at_once(_sync_folder, [place for place, _, _ in os.walk(temporary.path, onerror=_raise)])
        _put_in_place(temporary, path, kind, force, notice)


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
    with as_storage_error(path):
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
    names = list(files_below(place))
    foreign = sorted(name for name in names if not kind.holds(name))
    if foreign or (names and not any(map(kind.shows, names))):
        raise UsageError(
            f"the folder does not look like a {kind.name}, so it is not replaced",
            code="output-not-replaceable",
            file=path,
            found=", ".join(foreign[:8]) or f"nothing that shows a {kind.name}",
            hint="Remove it yourself, or name another output",
        )


def _check_space(final: str, size: int) -> None:
    with as_storage_error(final):
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


@dataclasses.dataclass
class _Temporary:
    """What an output is until it is whole.

    Attributes:
      final: The path that it is going to have.
      path: Where it is.
      fd: Its descriptor, which holds the lock.
      made: By what it is known under any name.
      kept: Whether it must not be removed: it may have the final name, for all that the disk has been told.
      journal: What is done of it; the next run goes on from there.
    """

    final: str
    path: str
    fd: int = -1
    made: os.stat_result | None = None
    kept: bool = False
    journal: Journal | None = None

    def held_bytes(self) -> int:
        """Bytes of the disk that it takes already."""
        if not stat.S_ISDIR(os.fstat(self.fd).st_mode):
            return os.fstat(self.fd).st_blocks * 512
        places = (os.path.join(self.path, name) for name in files_below(self.path))
        return sum(os.lstat(place).st_blocks * 512 for place in places)

    def close(self) -> None:
        if self.fd >= 0:
            close_quietly(self.fd)
        if self.journal is not None:
            self.journal.close()

    def end(self, error: BaseException) -> None:
        """Removes it, unless a later run may go on with it; says in the error what is left."""
        wrong = isinstance(error, BrokenContainerError | RefusedError)
        if self.journal is not None and not wrong:
            _add_hint(error, f"--resume goes on from '{self.path}'; without it the next run removes that")
            return
        with contextlib.suppress(OSError):
            self.discard()
        with contextlib.suppress(OSError):
            if self.journal is not None:
                self.journal.remove()
        if not is_gone(self.path):
            _add_hint(error, f"'{self.path}' is left behind; the next run removes it")

    def interrupted(self) -> None:
        if self.journal is None:
            self.discard()

    def discard(self) -> None:
        # Behind an exchange, what was replaced has this name: it is not ours to remove.
        with contextlib.suppress(FileNotFoundError):
            if not self.kept and (self.made is None or os.path.samestat(os.stat(self.path), self.made)):
                remove(self.path)


@contextlib.contextmanager
def _begun(
    path: str,
    size: int,
    kind: FolderKind | None,
    force: bool,
    sources: Iterable[str],
    notice: Notice | None,
    resumable: Identity | None,
) -> Iterator[_Temporary]:
    """Makes the temporary sibling of an output, or finds it. What ends the block early removes it or names it."""
    final = os.path.realpath(path)
    left = None if resumable is None else _unfinished(final, path, kind is not None, resumable)
    temporary = left or _Temporary(final, temporary_name(final))
    try:
        remove_leftovers(final, notice)
        check_target(path, folder=kind, force=force, sources=sources)
        with as_storage_error(path):
            held = left.held_bytes() if left else 0
        _check_space(final, size - held)
        if left is not None:
            (notice or unheard)(f"goes on from '{left.path}', which an earlier run had left")
        with last_act(temporary.interrupted):
            try:
                with as_storage_error(path):
                    _make(temporary, kind is not None, resumable)
                yield temporary
            except BaseException as error:
                temporary.end(error)
                raise
        if temporary.journal is not None:
            try:
                temporary.journal.remove()
            except OSError as error:
                (notice or unheard)(f"'{temporary.journal.path}' could not be removed: {said(error)}")
    finally:
        temporary.close()


def _make(temporary: _Temporary, folder: bool, resumable: Identity | None) -> None:
    if temporary.fd < 0:
        temporary.fd = create_locked(temporary.path, folder=folder)
        temporary.made = os.fstat(temporary.fd)
        if resumable is not None:
            place = temporary_name(temporary.final, JOURNAL, token_of(temporary.path))
            journal_fd = create_locked(place, folder=False)
            try:
                temporary.journal = Journal(journal_fd, place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(place)
                raise
            temporary.journal.begin(resumable)
    with contextlib.suppress(FileNotFoundError):
        _take_over(os.stat(temporary.final), temporary.fd)


def _unfinished(final: str, path: str, folder: bool, resumable: Identity) -> _Temporary | None:
    """Finds what a killed run to the same output left with a journal, and makes it this one's.

    Raises:
      UsageError: Code "resume-differs": there is such a thing, and it was made of something else.
    """
    place = os.path.dirname(final)
    with as_storage_error(place):
        names = sorted(os.listdir(place)) if _is_folder(place) else []
    differs = None
    for name in names:
        of_it = [
            each for each in names if each.startswith(prefix(final, TEMPORARY)) and token_of(each) == token_of(name)
        ]
        if not name.startswith(prefix(final, JOURNAL)) or len(of_it) != 1:
            continue
        left = _opened(final, os.path.join(place, of_it[0]), os.path.join(place, name), folder)
        if left is None:
            continue
        assert left.journal is not None
        identity = left.journal.identity
        if identity is None:
            # Killed before it had begun.
            left.close()
        elif different := list(journal.differing(resumable, identity)):
            differs = differs or _differs(path, left.path, different)
            left.close()
        else:
            with as_storage_error(path):
                _take(left)
            return left
    if differs is not None:
        raise differs
    return None


def _opened(final: str, path: str, journal_path: str, folder: bool) -> _Temporary | None:
    """Opens and locks a temporary and its journal; None if another process has them, or may have made them."""
    owners = {os.geteuid()}
    journal_fd = open_unheld(journal_path, folder=False, owners=owners)
    if journal_fd is None:
        return None
    if os.geteuid() == 0:
        # Root gives an output the owner of what it replaces.
        with contextlib.suppress(OSError):
            owners.add(os.stat(final).st_uid)
    fd = open_unheld(path, folder=folder, owners=owners)
    if fd is None:
        close_quietly(journal_fd)
        return None
    try:
        journal = Journal(journal_fd, journal_path)
    except BaseException:
        # Its lock would keep this process from going on with it later.
        close_quietly(fd)
        raise
    try:
        with as_storage_error(path):
            return _Temporary(final, path, fd, os.fstat(fd), journal=journal)
    except BaseException:
        close_quietly(fd)
        journal.close()
        raise


def _take(left: _Temporary) -> None:
    """Gives both the names of this process, which stand in for a lock where there are none."""
    assert left.journal is not None
    token = token_of(left.path)
    try:
        path = temporary_name(left.final, TEMPORARY, token)
        os.rename(left.path, path)
        left.path = path
        left.journal.rename(temporary_name(left.final, JOURNAL, token))
    except BaseException:
        left.close()
        raise


def _differs(path: str, left: str, different: list[str]) -> UsageError:
    return UsageError(
        "what an earlier run left of this output was made of something else",
        code="resume-differs",
        file=path,
        found=", ".join(different[:8]) + (f" and {len(different) - 8} more" if len(different) > 8 else ""),
        expected="the same version, source and options",
        hint=f"Leave --resume away to start anew, which removes '{left}'; or give what was given then",
    )


def _take_over(before: os.stat_result, fd: int) -> None:
    """Gives a temporary the owner and the permissions of what it replaces; other content is no longer set-user-ID."""
    if os.geteuid() == 0:
        os.fchown(fd, before.st_uid, before.st_gid)
    kept = 0o7777 if stat.S_ISDIR(before.st_mode) else 0o777
    os.fchmod(fd, stat.S_IMODE(before.st_mode) & kept)


def _put_in_place(
    temporary: _Temporary, path: str, kind: FolderKind | None, force: bool, notice: Notice | None
) -> None:
    """Gives the temporary its final name, and flushes that. An error leaves there what was there before."""
    with as_storage_error(path):
        if force:
            # Where nothing is there to be replaced.
            with contextlib.suppress(FileNotFoundError):
                _replace(temporary, path, kind, notice)
                return
        _name_new(temporary, path)


def _name_new(temporary: _Temporary, path: str) -> None:
    """Renames without replacing anything that has appeared in the meantime."""
    final = temporary.final
    try:
        if not _renameat2(temporary.path, final, _NOREPLACE):
            if os.path.lexists(final):
                raise _exists(path)
            os.rename(temporary.path, final)
    except FileExistsError:
        raise _exists(path) from None
    with _undone(lambda: os.rename(final, temporary.path), temporary):
        _flush_names(final, path)


def _replace(temporary: _Temporary, path: str, kind: FolderKind | None, notice: Notice | None) -> None:
    final = temporary.final
    with _held(final):
        _check_replaceable(path, final, kind)
        old = _swap(temporary.path, final, kind)
        with _undone(lambda: _swap_back(temporary.path, final, old), temporary):
            if old is not None:
                # Nobody has added anything to it since it was looked at.
                _check_replaceable(path, old, kind)
            _flush_names(final, path)
        if old is not None:
            try:
                remove(old)
            except OSError as error:
                (notice or unheard)(f"'{old}', which was replaced, could not be removed: {said(error)}")


def _swap(temporary: str, final: str, kind: FolderKind | None) -> str | None:
    """Lets two paths change places. Returns where the old output is; None where the system does that for no file."""
    if _renameat2(temporary, final, _EXCHANGE):
        return temporary
    if kind is None:
        os.rename(temporary, final)
        return None
    aside = temporary_name(final, ASIDE)
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
        close_quietly(fd)


@contextlib.contextmanager
def _undone(undo: Callable[[], None], temporary: _Temporary) -> Iterator[None]:
    """Calls `undo` if the block fails, so that the final name is again what it was."""
    try:
        yield
    except BaseException as error:
        # Until the disk knows that the temporary has its own name again, its content is not touched.
        temporary.kept = True
        try:
            undo()
            _sync_folder(os.path.dirname(temporary.final))
            temporary.kept = False
        except OSError as failed:
            _add_hint(
                error, f"'{temporary.final}' is whole, but may be either output after a power cut ({said(failed)})"
            )
        raise


def _flush_names(final: str, path: str) -> None:
    with as_storage_error(path):
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


def _at_once(flush: Callable[[str], None], paths: list[str]) -> None:
    with Workers(min(_FLUSHED_AT_ONCE, len(paths))) as workers:
        for _ in workers.map(flush, paths):
            pass


def _sync_file(path: str) -> None:
    _sync(path, os.O_RDONLY)


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
        close_quietly(fd)


def _add_hint(error: BaseException, hint: str) -> None:
    if isinstance(error, AprJaxError):
        error.hint = hint if error.hint is None else f"{error.hint}. {hint}"
    else:
        error.add_note(hint)


def _raise(error: OSError) -> None:
    raise error
