"""Numbers of things, in words."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Returns "1 tensor", "2 tensors"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
