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
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 1.0
"""How long the main thread has to end by itself; it does, unless it is inside a long call of a library."""


def end_at_once() -> None:
    """Lets Ctrl-C end a command that has done nothing yet, while its modules are imported, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))


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
    before = {number: signal.getsignal(number) for number in _ENDING}
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


_last_acts: list[Callable[[], None]] = []
_acting = threading.Lock()


@contextlib.contextmanager
def last_act(act: Callable[[], None]) -> Iterator[None]:
    """Within the block, an interrupted process calls `act` before it ends: here, or where `bounded` ends it.

    Args:
      act: Prints what there is so far, or removes what is not whole; must do no harm when what it is for is over.
    """
    _last_acts.append(act)
    try:
        yield
    except KeyboardInterrupt:
        # Where the other thread has begun, it speaks and ends the process: this waits for it without end.
        with _acting:
            act()
        raise
    finally:
        _last_acts.remove(act)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within the block, a process that a signal does not end within `GRACE_SECONDS` is ended with exit code 130.

    What `last_act` was given is done first, the latest before the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(reader, 1)) and number[0] not in _ENDING:
            # Others have handlers too, such as a window that changes its size.
            pass
        if ended.wait(GRACE_SECONDS):
            return
        _acting.acquire()
        try:
            for act in reversed(_last_acts):
                with contextlib.suppress(Exception):
                    act()
            print("interrupted", file=sys.stderr)
            sys.stdout.flush()
        finally:
            os._exit(EXIT_INTERRUPTED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        os.close(writer)
        # An interpreter that ends while a daemon thread wakes up may be aborted. This one wakes up now, and ends.
        watcher.join()
        # Not before: Python complains where a second signal finds the pipe broken.
        os.close(reader)
