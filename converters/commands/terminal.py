"""What is printed and how: what --quiet, --verbose and --color ask for, and what a stream can show."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TextIO

RED, YELLOW = "31;1", "33;1"


@dataclasses.dataclass
class Manner:
    """How a command speaks: what its common options ask for."""

    quiet: bool = False
    verbose: bool = False
    color: str = "auto"

    def settle(self, args: argparse.Namespace) -> None:
        """Takes over what a command line asks for."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(args, field.name, field.default))


manner = Manner()
"""That of this process; commands set it once, at their start."""


def is_terminal(stream: TextIO) -> bool:
    """Whether escape sequences do what they are for: a terminal that says which one it is, and is not dumb."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def shows_progress(stream: TextIO) -> bool:
    """Whether a bar is wanted there."""
    return is_terminal(stream) and not manner.quiet


def has_colours(stream: TextIO) -> bool:
    """Whether text is coloured there: on a terminal, if nobody set NO_COLOR (no-color.org), or as --color says."""
    if manner.color != "auto":
        return manner.color == "always"
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """Text in a colour, where the stream has colours."""
    return f"\x1b[{colour}m{text}\x1b[0m" if has_colours(stream) else text
