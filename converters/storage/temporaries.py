"""What an output is until it is whole: a temporary sibling, locked for as long as its writer lives.

One without a lock was left by a process that was killed. The next run to the same output removes it, or goes on with
it where a journal lies beside it (`journal`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator

from apr_jax.converters.errors import StorageError

TEMPORARY, JOURNAL, ASIDE = KINDS = ("apr-jax-tmp", "apr-jax-journal", "apr-jax-old")
"""What stands beside an output meanwhile: itself, what is done of it, and a folder that it replaces."""
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


def prefix(final: str, kind: str) -> str:
    """Returns how the names begin of what belongs to an output and is of one kind."""
    name = os.path.basename(final)
    if len(os.fsencode(name)) > 200:
        # File names end at 255 bytes.
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{kind}."


def temporary_name(final: str, kind: str = TEMPORARY, token: str | None = None) -> str:
    """Returns a name of this process; what belongs together has the same token, whichever process goes on with it."""
    token = os.urandom(4).hex() if token is None else token
    return os.path.join(os.path.dirname(final), f"{prefix(final, kind)}{os.getpid()}.{token}")


def token_of(path: str) -> str:
    """Returns the token in a name of `temporary_name`."""
    return path.rpartition(".")[2]


def is_gone(path: str) -> bool:
    """Whether nothing is at a path, not even a link; False where the system cannot say."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def create_locked(temporary: str, *, folder: bool) -> int:
    """Makes a temporary, and returns its descriptor, which holds the lock."""
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
            close_quietly(fd)
        except OSError:
            close_quietly(fd)
            raise


def close_quietly(fd: int) -> None:
    """Closes a descriptor."""
    # What was written has been flushed by now: a close can lose nothing, whatever it reports.
    with contextlib.suppress(OSError):
        os.close(fd)


def remove_leftovers(final: str, notice: Notice | None) -> None:
    """Removes what killed runs to the same output left, and puts back a folder that one of them had set aside."""
    say = notice or unheard
    folder = os.path.dirname(final)
    with as_storage_error(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted(names):
        path = os.path.join(folder, name)
        if not name.startswith(tuple(prefix(final, kind) for kind in KINDS)) or _is_held(path):
            continue
        try:
            if name.startswith(prefix(final, ASIDE)) and not os.path.lexists(final):
                os.rename(path, final)
                say(f"put '{name}' back, which an earlier run had set aside before it was killed")
            else:
                remove(path)
                say(f"removed '{name}', which an earlier run had left")
        except OSError as error:
            say(f"could not remove '{name}', which an earlier run had left: {said(error)}")


def _is_held(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return not _is_locked(fd, path)
    finally:
        close_quietly(fd)


def open_unheld(path: str, *, folder: bool, owners: Collection[int]) -> int | None:
    """Opens and locks what a killed process left; None where it is held, somebody else's, or not what it should be."""
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        found = os.fstat(fd)
        alone = folder or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
        if alone and found.st_uid in owners and _is_locked(fd, path) and os.path.samestat(os.stat(path), found):
            return fd
    close_quietly(fd)
    return None


def _is_locked(fd: int, path: str) -> bool:
    """Locks a descriptor if nobody else has; where a file system has no locks, nobody may be alive who made it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not _is_alive(path)
    return True


def _is_alive(path: str) -> bool:
    process = path.rsplit(".", 2)[-2]
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def remove(path: str) -> None:
    """Removes a file or a folder; links are removed, not followed."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    for name in os.listdir(path):
        remove(os.path.join(path, name))
    os.rmdir(path)


def files_below(folder: str) -> Iterator[str]:
    """Yields the names of all files below a folder, relative to it; "NAME/" for subfolders that hold none."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.name
                continue
            inner = [f"{entry.name}/{name}" for name in files_below(entry.path)]
            yield from inner or [f"{entry.name}/"]


@contextlib.contextmanager
def as_storage_error(path: str) -> Iterator[None]:
    """Raises a StorageError about `path` for the system's errors in the block."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: str, missing: int | None = None) -> StorageError:
    """Returns the error that says what the system said; `missing` is how many bytes a full disk lacks."""
    code = _CODES.get(error.errno or 0, "write-failed")
    lacking = f": {missing} bytes are missing" if missing is not None else ""
    hint = ". ".join(getattr(error, "__notes__", ())) or None
    return StorageError(f"cannot write the output: {said(error)}{lacking}", code=code, file=path, hint=hint)


def said(error: OSError) -> str:
    """Returns the system's words for an error."""
    return (error.strerror or str(error)).lower()


def unheard(message: str) -> None:
    """Takes a notice that nobody has asked for."""
