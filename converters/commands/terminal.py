"""What a stream can show: a terminal that moves its cursor, colours, or plain text alone."""

from __future__ import annotations

import os
from typing import TextIO


def is_terminal(stream: TextIO) -> bool:
    """Whether escape sequences do what they are for: a terminal that says which one it is, and is not dumb."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def has_colours(stream: TextIO) -> bool:
    """Whether text may be coloured or bold there: a terminal, and nobody set NO_COLOR (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
