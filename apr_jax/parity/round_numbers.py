"""Numbers that an engine may hold, near one that was solved for.

A solved number carries the rounding of the values that it was solved from, in digits that differ from one CPU to the
next. Engines hold round ones. So candidates are given in the order of how likely an engine holds them, the solved one
last, and whoever judges them takes the first that leaves about as little as the best: a rounder one wins wherever the
values cannot tell it from the fit.
"""

from __future__ import annotations

EPSILONS = (1e-5, 1e-6, 2.0**-23, 1e-8, 1e-12)
"""Customary eps of norms; 2^-23 is torch's default in float32, 1e-12 stands for none."""
_DIGITS = (0, 1, 2)


def near(value: float, *likely: float) -> list[float]:
    """Returns the likely ones, round decimals near the value, then itself; none twice."""
    return list(dict.fromkeys([*likely, *(float(f"{value:.{digits}e}") for digits in _DIGITS), value]))


def epsilons(value: float, doubt: float = float("inf")) -> list[float]:
    """Returns eps near a solved one: the customary ones that are no farther off than `doubt` first.

    Where activations are large, what is solved for a small eps is noise, and may be negative.
    """
    customary = [eps for eps in EPSILONS if abs(eps - value) <= doubt]
    return near(value, *customary) if value > 0 else customary


def scales(value: float) -> list[float]:
    """Returns softmax scales near a solved one: decimals, 1 / sqrt(n) as of a head of n dimensions, then itself."""
    decimals = near(value)
    if not 1e-3 < value <= 1.0:
        return decimals
    return list(dict.fromkeys([*decimals[:-1], round(value**-2) ** -0.5, value]))
