"""What stderr shows while something takes its time: a bar where the end is known, else what is being done."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from apr_jax.converters.commands.terminal import is_terminal, manner, shows_progress
from apr_jax.converters.errors import printable

_FIRST, _BETWEEN = 2.0, 10.0
"""Seconds before the first word, and where stderr is no terminal from one to the next."""


@contextlib.contextmanager
def bar_of(total: int, *, in_bytes: bool = True) -> Iterator[Callable[[int], None] | None]:
    """Yields what reports how much is done, from any thread, to a bar; None if stderr is no terminal.

    Args:
      total: How much there is to do.
      in_bytes: Whether that is bytes; else things that are counted.
    """
    if not shows_progress(sys.stderr):
        yield None
        return
    from rich import console, progress

    columns: tuple[progress.ProgressColumn, ...] = (progress.BarColumn(), progress.DownloadColumn())
    columns += (progress.TransferSpeedColumn(),)
    if not in_bytes:
        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


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
