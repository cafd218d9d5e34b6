"""Numbers that are solved for: round ones are what engines hold."""

from __future__ import annotations


def near(value: float) -> list[float]:
    """Returns round numbers near a solved one, then itself: engines hold round ones."""
    return list(dict.fromkeys([*(float(f"{value:.{digits}e}") for digits in (0, 1, 2, 4)), value]))
