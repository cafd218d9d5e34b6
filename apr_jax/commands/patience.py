"""Ends a process a second after Ctrl-C or a signal even while XLA compiles, when the interpreter notices neither."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from apr_jax.converters.commands import cli

GRACE_SECONDS = 1.0
"""How long the main thread has to end by itself; it does, unless it is inside a long call of a library."""


@contextlib.contextmanager
def bounded(last_words: Callable[[], None]) -> Iterator[None]:
    """Within the block, a process that a signal does not end within `GRACE_SECONDS` is ended with exit code 130.

    Args:
      last_words: Prints what is to be said in any case. It is called once: here, when the block is interrupted, or by
        another thread where the block does not notice.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended, claim = threading.Event(), threading.Lock()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        with open(reader, "rb", buffering=0) as signals:
            signals.read(1)
        if ended.wait(GRACE_SECONDS) or not claim.acquire(blocking=False):
            return
        try:
            last_words()
            print("interrupted", file=sys.stderr)
            sys.stdout.flush()
        finally:
            os._exit(cli.EXIT_INTERRUPTED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if not claim.acquire(blocking=False):
            # The other thread speaks and ends the process.
            threading.Event().wait()
        last_words()
        raise
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        # An interpreter that ends while a daemon thread wakes up may be aborted. This one wakes up now, and ends.
        watcher.join()
