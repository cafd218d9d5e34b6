"""Keeps compiled programs on disk, so that a tool that was run before starts without compiling."""

from __future__ import annotations

import contextlib
import os

_LEAST_SECONDS = 0.1
# Every shape, dtype, device and version of JAX has programs of its own.
_MOST_BYTES = 4 << 30


def enable() -> None:
    """Turns JAX's persistent compilation cache on, in $XDG_CACHE_HOME/apr_jax/compiled (~/.cache without it).

    For tools, not for the library: it is a setting of the process. A folder that the user chose by
    JAX_COMPILATION_CACHE_DIR (or by jax.config) stays, and an empty JAX_COMPILATION_CACHE_DIR means no cache. Where the
    folder cannot be written there is none. Beyond 4 GiB, what was not used for longest goes.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "apr_jax", "compiled")
    with contextlib.suppress(OSError):
        # Programs are loaded and run: nobody else may put any there.
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.access(folder, os.W_OK) and os.stat(folder).st_uid == os.getuid():
            jax.config.update("jax_compilation_cache_dir", folder)
            # Compilations of a second each add up; those of milliseconds are not worth a file.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
            _trim(folder)


def _trim(folder: str) -> None:
    """Removes the files used longest ago until the rest fits.

    JAX's own limit (jax_compilation_cache_max_size) takes a file beside each program for granted: a tool that was
    killed between the two would never write to the cache again.
    """
    with os.scandir(folder) as entries:
        files = [(entry.stat(follow_symlinks=False), entry.path) for entry in entries if entry.is_file()]
    held = sum(info.st_size for info, _ in files)
    for info, path in sorted(files, key=lambda file: max(file[0].st_atime, file[0].st_mtime)):
        if held <= _MOST_BYTES:
            return
        os.unlink(path)
        held -= info.st_size
