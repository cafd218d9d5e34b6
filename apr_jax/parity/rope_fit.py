"""What rotation an engine applied: measured from a vector before and after RoPE, and named.

A right rotation turns the pair (i, i + H/2) at position p by p theta^(-2i/H). From inputs and outputs the turn of every
pair can be measured, whatever it is; base, direction, shift and restart of the positions then follow from it in closed
form or from a short scan, instead of from guessing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.model import rotary
from apr_jax.parity import rope_rules, round_numbers
from apr_jax.parity.rope_rules import Rule

_LOGARITHMS = (0.5, 30.0)
"""Bases between 1.6 and 1e13 are told from noise."""
_MOVED = 1e-6
"""What differs by less, relative to the largest value, was not rotated."""
_NEAR = 0.02
"""As much a measured factor may be off a customary one."""
_NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
BASES = (1e3, 3e3, 1e4, 2e4, 3e4, 5e4, 1e5, 1.5e5, 2e5, 3e5, 5e5, 7e5, 1e6, 1.5e6, 2e6, 3e6, 5e6, 8e6, 1e7, 3e7, 1e8)
"""Customary bases."""
UNSCALED = Rule("linear", 1.0)
"""Plain RoPE, where the configuration asks for a rule."""
SHARES = (0.25, 0.5, 0.75)
"""Customary shares of a head that are rotated."""
CUTS = ("own", "head", "sliced")
"""Where a part of a head gets its frequencies from: they are those of a head of that width, the first of the whole
head's, or HuggingFace's cos and sin of the whole head, whose first columns are taken."""
ROUNDED = ("inv_freq", "positions", "angles", "tables")
"""What a rotation is computed from, in order: each may be held in fewer bits than float32."""


@dataclasses.dataclass(frozen=True)
class Right:
    """The rotation that a configuration asks for, in a batch whose longest row has `reach` positions."""

    config: Qwen2Config
    reach: int

    @property
    def theta(self) -> float:
        """Its base."""
        return self.config.rope_theta

    def frequencies(self, width: int, theta: float | None = None) -> tuple[np.ndarray, float]:
        """Returns what the pairs of a head turn by, and what cos and sin are multiplied by; in place of its own the
        head's width and the base may be others."""
        base, rule = self.theta if theta is None else theta, self.config.rope_scaling
        if rule is not None and rule.rule == "longrope" and width != self.config.head_dim:
            # It has a number for each frequency of a whole head.
            return rotary.inverse_frequencies(base, width), 1.0
        return rotary.frequencies(dataclasses.replace(self.config, rope_theta=base, head_dim=width), self.reach)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A way to rotate; the defaults are the right one.

    Attributes:
      theta: The base; None is the configuration's.
      adjacent: Pairs (2i, 2i + 1) in place of (i, i + H/2).
      part: The share of a head's dimensions that is rotated, the first ones.
      cut: Which of `CUTS` gives the frequencies of a part.
      negated: Angles negated.
      shift: Added to every position.
      restart: Positions start again every so many; 0 never.
      none: Nothing is rotated.
      scaling: The rule that stretches the frequencies, `UNSCALED` for none; None is the configuration's.
      rounded: A dtype ("bfloat16", "float16") and which of `ROUNDED` are rounded to it.
    """

    theta: float | None = None
    adjacent: bool = False
    part: float = 1.0
    cut: str = "own"
    negated: bool = False
    shift: int = 0
    restart: int = 0
    none: bool = False
    scaling: Rule | None = None
    rounded: tuple[str, ...] = ()

    def apply(self, x: np.ndarray, positions: np.ndarray, right: Right) -> np.ndarray:
        """Rotates x [B, T, heads, H] at positions [B, T]; `right` is what the configuration asks for."""
        return x if self.none else self.turned(x, self.turns(positions, x.shape[-1], right))

    def turns(self, positions: np.ndarray, width: int, right: Right) -> np.ndarray:
        """Returns cos and sin for both values of the pairs of a head of this width, [2, 2, B, T, 1, pairs].

        cos and sin are rounded to float32, as engines and `rotary.tables` hold them.
        """
        angles, gain = self._turns(positions, width, right)
        tables = [self._held("tables", f(angles).astype(np.float32) * np.float32(gain)) for f in (np.cos, np.sin)]
        return np.stack(tables).astype(np.float64)[:, :, :, :, None]

    def turned(self, x: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Rotates x [B, T, heads, H] by `turns`."""
        (cos, sin), (rotated, rest) = turns, self._parts(x)
        pairs = _pairs(rotated, self.adjacent)
        first, second = pairs.real * cos[0] - pairs.imag * sin[0], pairs.imag * cos[1] + pairs.real * sin[1]
        return np.concatenate([_from_pairs(first + 1j * second, self.adjacent), rest], axis=-1)

    def sizes(
        self, x: np.ndarray, positions: np.ndarray, right: Right, least: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns |x cos| + |y sin|, and (|x sin| + |y cos|) times the angle, of every value of x [B, T, heads, H].

        What is below `least`, the smallest normal number of the dtype, is rounded as that is.
        """
        if self.none:
            return np.abs(x), np.zeros_like(x)
        rotated, rest = self._parts(np.abs(x))
        angles, gain = self._turns(positions, x.shape[-1], right)
        angles, pairs = np.abs(angles)[:, :, :, None], _pairs(rotated, self.adjacent)
        cos, sin = (np.maximum(np.abs(gain * f(angles)), least) for f in (np.cos, np.sin))
        low, high = pairs.real, pairs.imag
        terms = low * cos[0] + high * sin[0] + 1j * (high * cos[1] + low * sin[1])
        moved = angles[0] * (low * sin[0] + high * cos[0]) + 1j * angles[1] * (high * sin[1] + low * cos[1])
        terms = np.maximum(_from_pairs(terms, self.adjacent), least)
        moved = _from_pairs(moved, self.adjacent)
        return np.concatenate([terms, rest], axis=-1), np.concatenate([moved, np.zeros_like(rest)], axis=-1)

    def angles(self, positions: np.ndarray, width: int, right: Right) -> np.ndarray:
        """Angles [B, T, width / 2] in float32 steps as engines compute them, float64."""
        moved = np.maximum(positions, 0) + self.shift
        if self.restart:
            moved = moved % self.restart
        frequencies, steps = self._held("inv_freq", self._frequencies(width, right)[0]), moved.astype(np.float32)
        angles = self._held("angles", self._held("positions", steps)[..., None] * frequencies).astype(np.float64)
        return -angles if self.negated else angles

    def _turns(self, positions: np.ndarray, head: int, right: Right) -> tuple[np.ndarray, float]:
        """What the first and the second value of each pair turn by, [2, B, T, pairs], and what both are multiplied by.

        They are one but where tables of whole heads were sliced.
        """
        width = self.width(head)
        whole = width if self.cut == "own" else head
        angles, gain = self.angles(positions, whole, right), self._frequencies(whole, right)[1]
        first = second = angles[..., : width // 2]
        if self.cut == "sliced":
            second = np.concatenate([angles, angles], axis=-1)[..., width // 2 : width]
        return np.stack([first, second]), gain

    def width(self, head: int) -> int:
        """How many dimensions of a head are rotated."""
        return round(self.part * head)

    def _frequencies(self, width: int, right: Right) -> tuple[np.ndarray, float]:
        """The inverse frequencies, float32, and what cos and sin are multiplied by."""
        base = right.theta if self.theta is None else self.theta
        if self.scaling is not None:
            return self.scaling.frequencies(right.config, base, width, right.reach)
        return right.frequencies(width, base)

    def _held(self, what: str, values: np.ndarray) -> np.ndarray:
        """Values as they are held: float32, or rounded to fewer bits."""
        if what not in self.rounded[1:]:
            return values
        with np.errstate(over="ignore"):
            return values.astype(_NARROW[self.rounded[0]]).astype(np.float32)

    def _parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        width = self.width(x.shape[-1])
        return x[..., :width], x[..., width:]


def candidates(before: np.ndarray, after: np.ndarray, positions: np.ndarray, right: Right) -> list[Rotation]:
    """Returns the rotations that may turn `before` into `after`, [B, T, heads, H] each; fewest deviations first.

    Args:
      before: Vectors before rotation.
      after: The other side's vectors.
      positions: int [B, T], -1 at padding.
      right: What the configuration asks for.
    """
    found = [Rotation(none=True)]
    if right.config.rope_scaling is not None:
        found.append(Rotation(scaling=UNSCALED))
    for adjacent in (False, True):
        found += _of_a_part(before, after, positions, adjacent)
        for part in (1.0, 0.5):
            shape = Rotation(adjacent=adjacent, part=part)
            rotated, _ = shape._parts(before)
            target, _ = shape._parts(after)
            if rotated.shape[-1] % 2:
                continue
            turn, steps = _in_steps(_measure(_pairs(rotated, adjacent), _pairs(target, adjacent), positions), positions)
            found += _explain(turn, steps, right, shape)
            if right.config.rope_scaling is not None:
                # Under a rule the turns of the pairs are no powers, from which a base could be solved.
                found += [dataclasses.replace(shape, theta=base) for base in BASES if base != right.theta]
            if part == 1.0:
                found += _less_precise(shape)
                found += _stretched(turn, _gain(rotated, target, positions), steps, right, shape)
    # Not a set: its order hangs on the last bits of a base, and rounder ones have to stay before it.
    return sorted(dict.fromkeys(found), key=lambda turn: (deviations(turn), _oddness(turn.theta)))


def _of_a_part(before: np.ndarray, after: np.ndarray, positions: np.ndarray, adjacent: bool) -> list[Rotation]:
    """Rotations of the first dimensions: of as many as are not the same behind it, or of a customary share."""
    tokens, width = positions >= 0, before.shape[-1]
    moved = np.flatnonzero((np.abs(after - before)[tokens] > _MOVED * np.abs(before[tokens]).max()).any(axis=(0, 1)))
    measured = -(-(int(moved.max(initial=0)) + 1) // 2) * 2 / width
    parts = (part for part in dict.fromkeys((measured, *SHARES)) if part < 1 and round(part * width) % 2 == 0)
    return [Rotation(adjacent=adjacent, part=part, cut=cut) for part in parts for cut in CUTS[: 2 if adjacent else 3]]


def deviations(rotation: Rotation) -> int:
    """Returns in how many ways a rotation is not the right one."""
    return sum(getattr(rotation, field.name) != field.default for field in dataclasses.fields(rotation))


def _oddness(theta: float | None) -> int:
    """How unlikely somebody wrote a base so: 0 if it is customary, 1 with two digits and zeros, 2 otherwise."""
    if theta is None or theta in BASES:
        return 0
    return 1 if theta == float(f"{theta:.1e}") else 2


def _pairs(x: np.ndarray, adjacent: bool) -> np.ndarray:
    if adjacent:
        return x[..., 0::2] + 1j * x[..., 1::2]
    low, high = np.split(x, 2, axis=-1)
    return low + 1j * high


def _from_pairs(z: np.ndarray, adjacent: bool) -> np.ndarray:
    if adjacent:
        return np.stack([z.real, z.imag], axis=-1).reshape(*z.shape[:-1], -1)
    return np.concatenate([z.real, z.imag], axis=-1)


def _measure(before: np.ndarray, after: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the turn of each pair, complex [B, T, pairs], weighted by what it is known from; 0 at padding."""
    turn = (after * before.conj()).sum(axis=2)
    return np.where((positions >= 0)[..., None], turn, 0.0)


def _in_steps(turn: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns with a column for every position from the first to the last: 0 for those that lie between."""
    tokens = positions >= 0
    if not any((np.diff(row[there]) > 1).any() for row, there in zip(positions, tokens, strict=True)):
        return turn, positions
    steps = np.tile(np.arange(int(positions.max()) + 1), (len(positions), 1))
    spread = np.zeros((*steps.shape, turn.shape[-1]), complex)
    rows, columns = np.nonzero(tokens)
    spread[rows, positions[rows, columns]] = turn[rows, columns]
    return spread, steps


def _gain(before: np.ndarray, after: np.ndarray, positions: np.ndarray) -> float:
    """Returns how much longer the vectors are behind the rotation."""
    tokens = positions >= 0
    power = float((before[tokens] ** 2).sum())
    return float(np.sqrt((after[tokens] ** 2).sum() / power)) if power else 1.0


def _less_precise(shape: Rotation) -> list[Rotation]:
    """Rotations whose frequencies, angles or tables are held in 16 bits."""
    return [
        dataclasses.replace(shape, rounded=(dtype, what))
        for dtype in _NARROW
        for what in ("tables", "inv_freq", "angles")
    ]


def _stretched(turn: np.ndarray, gain: float, positions: np.ndarray, right: Right, shape: Rotation) -> list[Rotation]:
    """Rotations by frequencies that a rule has stretched: with the factor that was measured, or a customary one."""
    factors: tuple[float, ...] = rope_rules.FACTORS
    if 1.005 < gain < 2:
        factors = tuple(round_numbers.near(float(np.exp((gain - 1) / 0.1)), *rope_rules.FACTORS))
    customary = rope_rules.customary(right.config, factors)
    rules = sorted(customary, key=lambda rule: -_aligned(turn, positions, right, rule))
    if (factor := _fit_factor(turn, positions, right.theta)) is not None:
        rules = [*(Rule("linear", each) for each in round_numbers.near(factor)), *rules]
    base, width = _fit_theta(turn, positions, 0), 2 * turn.shape[-1]
    if base is not None and width > 2 and base > right.theta:
        raised = (base / right.theta) ** ((width - 2) / width)
        rules += _raised(raised, right)
    return [dataclasses.replace(shape, scaling=rule) for rule in rules]


def _raised(factor: float, right: Right) -> list[Rule]:
    """Rules that raise the base by a factor.

    Beyond the model's own length "dynamic" does, and static rules with another number give the same: the one whose
    number is customary is meant.
    """
    longest = right.config.max_position_embeddings
    if right.reach > longest:
        growing = (factor - 1) / (right.reach / longest - 1)
        found = [Rule("dynamic", each, longest) for each in rope_rules.FACTORS if abs(growing / each - 1) < _NEAR]
        if found:
            return found
    return [Rule("ntk", each) for each in rope_rules.FACTORS if abs(factor / each - 1) < _NEAR]


def _aligned(turn: np.ndarray, positions: np.ndarray, right: Right, rule: Rule) -> float:
    """How well the measured turns line up with a rule's; to some digits, so that a tie hangs on no last bit."""
    angles = Rotation(scaling=rule).angles(positions, 2 * turn.shape[-1], right)
    return float(f"{(turn * np.exp(-1j * angles)).real.sum():.9e}")


def _fit_factor(turn: np.ndarray, positions: np.ndarray, theta: float) -> float | None:
    """Returns the number that all frequencies are divided by, from turns ever farther apart; None if there is none."""
    pairs, length = turn.shape[-1], turn.shape[1]
    if length < 2:
        return None
    speeds = rotary.inverse_frequencies(theta, 2 * pairs).astype(np.float64)
    ratio, lag = 0.0, 1
    while lag <= length * 3 // 4:
        apart = (turn[:, lag:] * turn[:, :-lag].conj()).sum(axis=(0, 1))
        ratio = ratio or float(np.angle(apart[0]) / speeds[0])  # the fastest pair turns by less than half a circle
        missing, slope, weight = np.angle(apart * np.exp(-1j * lag * ratio * speeds)), lag * speeds, np.abs(apart)
        power = float((weight * slope**2).sum())
        if power == 0 or ratio <= 0:
            break
        ratio += float((weight * slope * missing).sum()) / power
        lag *= 2
    return 1 / ratio if 1e-3 < ratio < 100 and abs(ratio - 1) > 1e-4 else None


def _explain(turn: np.ndarray, positions: np.ndarray, right: Right, shape: Rotation) -> list[Rotation]:
    """Fits base, direction and positions to measured turns of one pairing."""
    found = []
    for negated in (False, True):
        plain, bases = dataclasses.replace(shape, negated=negated), _bases(turn, positions, 0)
        found += [plain, *_with_bases(turn, positions, plain, bases, right)]
        for base in (None, *bases):
            for moved in _fit_positions(turn, positions, right, dataclasses.replace(plain, theta=base)):
                found.append(moved)
                if moved.restart and base is not None:
                    # Jumps back spoil the fit of the base: once they are known, it is fitted between them.
                    found += _with_bases(turn, positions, moved, _bases(turn, positions, moved.restart), right)
                elif bases and base == bases[-1]:
                    found += _with_bases(turn, positions, moved, bases, right)
    return found


def _bases(turn: np.ndarray, positions: np.ndarray, period: int) -> list[float]:
    """Returns the fitted base, round numbers near it first."""
    fitted = _fit_theta(turn, positions, period)
    return [] if fitted is None else round_numbers.near(fitted)


def _with_bases(
    turn: np.ndarray, positions: np.ndarray, rotation: Rotation, bases: Sequence[float], right: Right
) -> list[Rotation]:
    """Returns a rotation with each of the bases, and with what the last of them, which was fitted, is refined to."""
    if not bases:
        return []
    fitted = dataclasses.replace(rotation, theta=bases[-1])
    refined = _refined(turn, positions, fitted, bases[-1], right)
    better = (*bases[:-1], *round_numbers.near(refined), bases[-1])
    return [dataclasses.replace(rotation, theta=base) for base in better]


def _refined(turn: np.ndarray, positions: np.ndarray, rotation: Rotation, base: float, right: Right) -> float:
    """Returns the base near `base` that leaves least squares of angles at the positions themselves, if they are right.

    They know it better than distances between them do: eight decoding steps are no farther than 7 apart.
    """
    pairs = turn.shape[-1]
    exponents, logarithm = np.arange(pairs) / pairs, float(np.log(base))
    for _ in range(3):
        angles = rotation.angles(positions, 2 * pairs, right)
        missing, slope, weight = np.angle(turn * np.exp(-1j * angles)), -exponents * angles, np.abs(turn)
        power = float((weight * slope**2).sum())
        if power == 0:
            break
        logarithm = float(np.clip(logarithm + (weight * slope * missing).sum() / power, *_LOGARITHMS))
        base = float(np.exp(logarithm))
        rotation = dataclasses.replace(rotation, theta=base)
    return base


def _fit_theta(turn: np.ndarray, positions: np.ndarray, period: int) -> float | None:
    """Returns the base from how far each pair turns between positions 1, 2, 4, ... apart.

    Differences of positions know nothing of a shift. Each distance doubles the precision that the one before has left,
    so that no turn is ever taken for another one full circle away. With a period, only positions between two restarts
    are held against each other.
    """
    pairs, length = turn.shape[-1], turn.shape[1]
    if pairs < 2 or length < 2:
        return None
    exponents = np.arange(pairs) / pairs
    segments = positions // period if period else np.zeros_like(positions)

    def steps(lag: int) -> np.ndarray:
        together = (segments[:, lag:] == segments[:, :-lag])[..., None]
        return (turn[:, lag:] * turn[:, :-lag].conj() * together).sum(axis=(0, 1))

    first = steps(1)
    speeds = np.abs(np.angle(first))
    usable = (exponents > 0) & (speeds > 0)
    if not usable.any():
        return None
    # log speed = -exponent * log theta; a fast pair knows its speed relatively better.
    weights = (np.abs(first) * exponents * speeds)[usable]
    logarithm = float(np.average(-np.log(speeds[usable]) / exponents[usable], weights=weights))
    sign = np.sign(np.angle(first[0])) or 1.0
    lag = 1
    while lag <= (min(length, period) if period else length) * 3 // 4:
        for _ in range(3):
            logarithm = float(np.clip(logarithm, *_LOGARITHMS))
            speed = np.exp(-exponents * logarithm)
            measured = steps(lag)
            missing = np.angle(measured * np.exp(-1j * sign * lag * speed)) * sign
            slope = -lag * exponents * speed
            weight = np.abs(measured)
            denominator = float((weight * slope**2).sum())
            if denominator == 0:  # no two of the positions are that far apart
                break
            logarithm += float((weight * slope * missing).sum()) / denominator
        lag *= 2
    return float(np.exp(np.clip(logarithm, *_LOGARITHMS)))


def _fit_positions(turn: np.ndarray, positions: np.ndarray, right: Right, rotation: Rotation) -> list[Rotation]:
    """Finds a shift or a restart of the positions under which the measured turns line up best."""
    pairs, length = turn.shape[-1], turn.shape[1]
    frequencies, _ = right.frequencies(2 * pairs, rotation.theta)
    speeds = (-1.0 if rotation.negated else 1.0) * frequencies.astype(np.float64)
    steps = np.maximum(positions, 0)
    by_step = np.zeros((int(steps.max()) + 1, pairs), complex)
    np.add.at(by_step, steps, turn)
    unturning = np.exp(-1j * np.arange(len(by_step))[:, None] * speeds)
    unturned = (by_step * unturning).sum(axis=0)
    reach = np.arange(-4 * min(length, _MOST_PERIODS), 4 * min(length, _MOST_PERIODS) + 1)
    shift = int(reach[np.argmax((unturned * np.exp(-1j * reach[:, None] * speeds)).real.sum(axis=1))])
    # The turns at all positions that a restart every so many makes one, unturned as that one is.
    known, periods = np.flatnonzero(by_step.any(axis=1)), _periods(by_step, unturning)
    alignment = [(by_step[known] * unturning[known % period]).real.sum() for period in periods]
    found = [dataclasses.replace(rotation, shift=shift)] if shift else []
    if alignment and periods[np.argmax(alignment)] > 1:
        found.append(dataclasses.replace(rotation, restart=int(periods[np.argmax(alignment)])))
    return found


_MOST_PERIODS = 4096
"""Beyond as many positions not every shift and every restart is tried."""


def _periods(by_step: np.ndarray, unturning: np.ndarray) -> range:
    """How often positions may restart: as often as there are steps or, of very many, where the first wrong turn is."""
    if len(by_step) <= _MOST_PERIODS:
        return range(1, len(by_step))
    aligned, known = (by_step * unturning).real.sum(axis=1), np.abs(by_step).sum(axis=1) > 0
    wrong = np.flatnonzero(known & (aligned < 0.9 * np.abs(by_step).sum(axis=1)))
    if not len(wrong) or not wrong[0]:
        return range(0)
    before = np.flatnonzero(known[: wrong[0]])
    return range(int(before[-1]) + 1 if len(before) else 1, int(wrong[0]) + 1)
