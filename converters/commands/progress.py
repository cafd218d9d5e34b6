"""A bar on stderr while something is done; nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from apr_jax.converters.commands.terminal import shows_progress


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
