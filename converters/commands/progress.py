"""What stderr shows while something takes its time: a bar where the end is known, else what is being done."""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator

from apr_jax.converters.commands.terminal import is_terminal, manner, shows_progress
from apr_jax.converters.errors import printable

_FIRST, _BETWEEN = 2.0, 10.0
"""Seconds before the first word, and where stderr is no terminal from one to the next."""

# Told the phase, and how much of it is done and is in it; from any thread.
Show = Callable[[str, int, int], None]


@contextlib.contextmanager
def bar_of(total: int, *, in_bytes: bool = True) -> Iterator[Callable[[int], None] | None]:
    """Yields what reports how much more is done, from any thread; None with --quiet.

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
    """Yields what shows a bar for each phase, or a line now and then where there is no terminal; None with --quiet.

    Args:
      in_bytes: As `bar_of`; None where phases differ in that: their share is shown.
    """
    if shows_progress(sys.stderr):
        with _bars(in_bytes) as show:
            yield show
    elif manner.quiet:
        yield None
    else:
        yield _Lines().show


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
            if now - self._last < _BETWEEN or not done or not total:
                return
            self._last = now
            left = datetime.timedelta(seconds=round((now - self._begun) * (total - done) / done))
        at = (datetime.datetime.now() + left).strftime("%H:%M:%S")
        print(f"{phase or 'data'}: {100 * done // total} %, done at {at}, in {left}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def telling(doing: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, once it has taken two seconds; nothing with --quiet.

    On a terminal that is a line with the time that it has taken, gone at the end. Elsewhere it is a line now and then,
    of what is said meanwhile.

    Args:
      doing: What it is, "loading the model".

    Yields:
      What takes the next thing that is being done.
    """
    if manner.quiet:
        yield lambda text: None
    elif not is_terminal(sys.stderr):
        yield _in_lines()
    else:
        from rich import console, progress

        columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}", markup=False))
        bar = progress.Progress(
            *columns, progress.TimeElapsedColumn(), console=console.Console(stderr=True), transient=True
        )
        task = bar.add_task(doing, total=None)
        begin = threading.Timer(_FIRST, bar.start)
        begin.daemon = True
        begin.start()
        try:
            yield lambda text: bar.update(task, description=printable(text))
        finally:
            begin.cancel()
            begin.join()
            bar.stop()


def _in_lines() -> Callable[[str], None]:
    due = time.monotonic() + _FIRST

    def say(text: str) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due = now + _BETWEEN
            print(f"... {printable(text)}", file=sys.stderr, flush=True)

    return say
