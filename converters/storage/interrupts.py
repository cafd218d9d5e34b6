"""How a process ends when a signal asks it to: cleanly, with exit code 130, and soon.

`termination_as_interrupt` makes every signal that ends a process a KeyboardInterrupt, so that temporary files are
removed. `bounded` ends a process that cannot notice one: XLA compiles for seconds without returning to the interpreter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_INTERRUPTED = 130
GRACE_SECONDS = 1.0
"""How long the main thread has to end by itself; it does, unless it is inside a long call of a library."""


@contextlib.contextmanager
def termination_as_interrupt(*, last: bool = False) -> Iterator[Callable[[], None]]:
    """Lets SIGTERM and SIGHUP end the block as Ctrl-C does (KeyboardInterrupt), so that temporaries are removed.

    Only the first signal is raised where the program happens to be: another one would cut the cleaning up short. Some
    code swallows what it is interrupted by (imports, callbacks of the garbage collector), or turns it into an error of
    its own: what the block gets raises KeyboardInterrupt if there was a signal, and so does the end of the block.

    Args:
      last: Whether the process ends with the block: signals are then ignored after it, so that they do not make another
        end of it than was decided.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received = False

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    def interrupt(*_: object) -> None:
        nonlocal received
        if not received:
            received = True
            raise KeyboardInterrupt

    # A signal that was ignored (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield check
    except Exception:
        check()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)
    check()


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
            os._exit(EXIT_INTERRUPTED)

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
