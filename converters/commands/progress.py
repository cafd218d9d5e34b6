"""A bar on stderr while bytes go by; nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from apr_jax.converters.commands.terminal import is_terminal


@contextlib.contextmanager
def byte_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """Yields what reports bytes done, from any thread, to a bar of `total` bytes; None if stderr is no terminal."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich import console, progress

    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
