"""How far something is and when it will be done, on stderr: a bar on a terminal; elsewhere, with --verbose, a line now
and then.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator

from apr_jax.converters.commands import terminal

_SECONDS_BETWEEN_LINES = 10.0

# Told the phase, and how much of it is done and is in it; from any thread.
Show = Callable[[str, int, int], None]


@contextlib.contextmanager
def bar_of(total: int, *, in_bytes: bool = True) -> Iterator[Callable[[int], None] | None]:
    """Yields what reports how much more is done, from any thread; None if nobody looks.

    Args:
      total: How much there is to do.
      in_bytes: Whether that is bytes; else things that are counted.
    """
    with phases(in_bytes=in_bytes) as show:
        if show is None:
            yield None
            return
        done, lock = 0, threading.Lock()

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                show("", done, total)

        yield advance


@contextlib.contextmanager
def phases(*, in_bytes: bool | None = None) -> Iterator[Show | None]:
    """Yields what shows a bar, or writes lines, for each phase; None if nobody looks.

    Args:
      in_bytes: As `bar_of`; None where phases differ in that: their share is shown.
    """
    if terminal.shows_progress(sys.stderr):
        with _bars(in_bytes) as show:
            yield show
    elif terminal.manner.verbose:
        yield _Lines().show
    else:
        yield None


@contextlib.contextmanager
def _bars(in_bytes: bool | None) -> Iterator[Show]:
    from rich import console, progress

    columns: dict[bool | None, tuple[progress.ProgressColumn, ...]] = {
        True: (progress.DownloadColumn(), progress.TransferSpeedColumn()),
        False: (progress.MofNCompleteColumn(),),
        None: (progress.TaskProgressColumn(),),
    }
    name = "[progress.description]{task.description}"
    bar = progress.Progress(
        name,
        progress.BarColumn(),
        *columns[in_bytes],
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, progress.TaskID] = {}

    def show(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done)

    with bar:
        yield show


class _Lines:
    """Writes "bytes: 34 %, done at 18:42:10, in 0:03:20" when some seconds have passed since the last line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase: str | None = None
        self._begun = self._last = 0.0

    def show(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if phase != self._phase:
                self._phase, self._begun, self._last = phase, now, now
            if now - self._last < _SECONDS_BETWEEN_LINES or not done or not total:
                return
            self._last = now
            left = datetime.timedelta(seconds=round((now - self._begun) * (total - done) / done))
        at = (datetime.datetime.now() + left).strftime("%H:%M:%S")
        print(f"{phase or 'data'}: {100 * done // total} %, done at {at}, in {left}", file=sys.stderr, flush=True)
