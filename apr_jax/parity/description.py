"""What can be said of a stage that no known mistake explains: which parts of it are wrong, and what their values are.

A value is wrong if it is farther off than rounding may be. Wrong values are in some positions, heads, channels or keys,
or in all of them; among those they are some multiple of the right values, a linear map of them, the right values of
other places, a bound that the right values pass, or none of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.parity.faults.record import Region
from apr_jax.parity.localise import CLASS_OF, EPSILON, FACTORS, ROW_FACTOR, Localisation, Site
from apr_jax.parity.replay import QKV
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import compared_positions, dumped_tokens, position_axis

_FITS = 0.03
"""What a gain, a map or other places leave at most of the difference that they explain."""
_SPARSE = 0.5
"""Wrong values that are fewer than this share of those in their positions and channels are looked at by their size."""
_LEAST_VALUES = 8
_ROWS_PER_CHANNEL = 1.5
"""A linear map is fitted where there are as many positions for each channel."""
_MOST_CHANNELS = 1024
_CLOSE = 0.3
"""A hypothesis that leaves less is worth mentioning."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What is seen of a wrong stage.

    Attributes:
      parameters: "where" in words, and what it says: "heads" (with "part", whose they are), "channels", "positions" as
        (row, column), "keys" as columns; each only where it is not all of them.
      note: What else can be said.
    """

    parameters: dict[str, Any]
    note: str


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage's values, with what counts of them.

    Attributes:
      theirs: Their values, float64 [B, T, C] or [B, N, T, S].
      right: The right ones.
      counted: Which of them count, of the same shape.
      wrong: Which of those are farther off than rounding may be.
      places: Which columns of the sequence the positions are, int [T].
    """

    theirs: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    wrong: np.ndarray
    places: np.ndarray

    @property
    def per_pair(self) -> bool:
        return self.theirs.ndim == 4


def describe(
    config: Qwen2Config, inputs: Inputs, located: Localisation, site: Site, closest: tuple[str, float] | None
) -> Description:
    """Describes a wrong stage.

    Args:
      config: The model's configuration.
      inputs: The batch.
      located: What the stage was judged by.
      site: The stage.
      closest: The hypothesis that came nearest, and what share of the difference it leaves.
    """
    stage = _stage(config, inputs, located, site)
    bound = _bound(stage, stage.counted)
    regions = [] if bound else list(_regions(config, site, stage))
    parameters: dict[str, Any] = {region.kind: region.indices for region in regions}
    if part := "".join(region.part for region in regions):
        parameters["part"] = part
    if regions:
        parameters["where"] = ", ".join(region.where for region in regions)
    notes = [text for text in (bound or _relation(stage),) if text]
    if not regions and not notes:
        notes.append("it is spread over all positions")
    if closest and closest[1] < _CLOSE:
        notes.append(f"closest is {closest[0]}, which leaves {closest[1]:.1%} of the difference")
    return Description(parameters, "; ".join(notes))


def _stage(config: Qwen2Config, inputs: Inputs, located: Localisation, site: Site) -> _Stage:
    theirs, right = (np.asarray(values[site.key], np.float64) for values in (located.theirs, located.reference))
    mask = compared_positions(site.key, inputs, theirs.shape, window=config.window_of(site.layer))
    tokens = dumped_tokens(inputs, located.columns.get(site.key))
    if theirs.ndim == 4:
        counted = mask & tokens[:, None, :, None]
    else:
        counted = np.broadcast_to((mask & tokens)[..., None], theirs.shape)
    # Rounding grows with a value, and is no less than that of a typical one.
    rows = np.broadcast_to(site.row_budgets, theirs.shape[:-1]) if site.row_budgets.shape == theirs.shape[:-1] else None
    width = np.maximum(counted.sum(axis=-1), 1)
    typical = site.budget / max(1, int(counted.sum())) ** 0.5 if rows is None else rows / np.sqrt(width)
    factor = ROW_FACTOR * FACTORS[CLASS_OF[site.key.stage]]
    allowed = np.asarray(typical)[..., None] + factor * EPSILON[located.dtype] * np.abs(right)
    return _Stage(theirs, right, counted, counted & (np.abs(theirs - right) > allowed), inputs.places())


# --- Which parts -----------------------------------------------------------------------------------------------------


def _regions(config: Qwen2Config, site: Site, stage: _Stage) -> Iterator[Region]:
    """Positions, heads or channels, and keys that hold all wrong values, where these are not all of them."""
    if not stage.wrong.any():
        return
    axis = position_axis(site.key)
    others = tuple(other for other in range(1, stage.wrong.ndim) if other != axis)
    positions, counted = (np.asarray(each.any(axis=others)) for each in (stage.wrong, stage.counted))
    if stage.per_pair:
        heads = np.flatnonzero(stage.wrong.any(axis=(0, 2, 3)))
        if len(heads) < stage.wrong.shape[1]:
            yield Region("heads", tuple(heads.tolist()), stage.wrong.shape[1])
    else:
        yield from _in_channels(config, site, np.flatnonzero(stage.wrong.any(axis=(0, 1))), stage.wrong.shape[-1])
    if stage.per_pair:
        keys = stage.wrong.any(axis=(0, 1, 2))
        seen = (stage.counted & positions[:, None, :, None]).any(axis=(0, 1, 2))
        if keys.sum() < seen.sum():
            yield Region("keys", tuple(np.flatnonzero(keys).tolist()), int(seen.sum()))
            # Queries that see none of these keys are right because of that.
            counted &= (stage.counted & keys).any(axis=(1, 3))
    if 0 < positions.sum() < counted.sum():
        places = tuple((int(row), int(stage.places[column])) for row, column in np.argwhere(positions))
        yield Region("positions", places, int(counted.sum()))


def _in_channels(config: Qwen2Config, site: Site, wrong: np.ndarray, count: int) -> Iterator[Region]:
    """Whole heads, or channels."""
    width = config.head_dim
    for part, start, heads in _projections(config, site.key.stage):
        inside = wrong - start
        if inside.min() < 0 or inside.max() >= heads * width:
            continue
        found = np.unique(inside // width)
        if 2 * len(wrong) > len(found) * width and (part or len(found) < heads):
            yield Region("heads", tuple(found.tolist()), heads, part, start)
            return
    if len(wrong) < count:
        yield Region("channels", tuple(wrong.tolist()), count)


def _projections(config: Qwen2Config, stage: str) -> list[tuple[str, int, int]]:
    """The projections that a stage of heads holds: name, first channel, heads."""
    q, kv = config.num_heads, config.num_kv_heads
    if stage in ("qkv_matmul", "qkv_bias"):
        starts = (0, q * config.head_dim, (q + kv) * config.head_dim)
        return [(name[0], start, heads) for name, start, heads in zip(QKV, starts, (q, kv, kv), strict=True)]
    return {"q_post_rope": [("", 0, q)], "k_post_rope": [("", 0, kv)], "attention": [("", 0, q)]}.get(stage, [])


# --- What their values are -------------------------------------------------------------------------------------------


def _relation(stage: _Stage) -> str:
    """What the wrong values are of the right ones, in words; "" if nothing fits."""
    ours, theirs = stage.right[stage.wrong], stage.theirs[stage.wrong]
    off = float(np.linalg.norm(theirs - ours))
    if not off:
        return ""

    def fits(value: np.ndarray) -> bool:
        return float(np.linalg.norm(theirs - value)) <= _FITS * off

    gain = float(ours @ theirs / (ours @ ours)) if ours.any() else 0.0
    shift = float((theirs - ours).mean())
    if np.abs(theirs).max() <= 1e-6 * np.abs(ours).max():
        return "theirs is zero there"
    if fits(gain * ours):
        return f"theirs is {gain:.6g} times the right value"
    if len(ours) >= _LEAST_VALUES and fits(ours + shift):
        return f"theirs is the right value and {shift:.6g}"
    if len(ours) >= _LEAST_VALUES and np.ptp(theirs) <= _FITS * np.abs(theirs).max():
        return f"theirs is {float(theirs.mean()):.6g} there"
    if bound := _bound(stage, _box(stage)):
        return bound
    if stage.per_pair:
        return ""
    more: tuple[Callable[[_Stage], str], ...] = (_gains, _elsewhere, _linear)
    return next((text for text in (find(stage) for find in more) if text), "")


def _box(stage: _Stage) -> np.ndarray:
    """The values in the channels, or heads and keys, of the wrong ones."""
    if stage.per_pair:
        heads, keys = (np.asarray(stage.wrong.any(axis=axes)) for axes in ((0, 2, 3), (0, 1, 2)))
        return stage.counted & heads[:, None, None] & keys
    return stage.counted & stage.wrong.any(axis=(0, 1))


def _bound(stage: _Stage, box: np.ndarray) -> str:
    """Values from some size on, among those in a box: cut off there, or otherwise wrong."""
    size, inside = np.abs(stage.right), stage.wrong & box
    right_there = box & ~stage.wrong
    if inside.sum() < _LEAST_VALUES or inside.sum() > _SPARSE * box.sum() or not right_there.any():
        return ""
    for said, values in (("in size", size), ("", stage.right), ("", -stage.right)):
        first, largest = float(values[inside].min()), float(values[right_there].max())
        if first >= 0.98 * largest and first > 0:
            sign = "beyond" if values is size else ("above" if values is stage.right else "below")
            limit = -first if sign == "below" else first
            cut = np.abs(stage.theirs[inside])
            what = f"; theirs is {float(cut.mean()):.6g} in size there" if np.ptp(cut) <= _FITS * cut.max() else ""
            return f"the values {sign} {limit:.4g}{' ' + said if said else ''} are wrong{what}"
    return ""


def _rows(stage: _Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The positions with wrong values: right rows [n, C] and theirs; the wrong channels; where the rows stand."""
    rows = stage.wrong.any(axis=-1)
    return stage.right[rows], stage.theirs[rows], np.flatnonzero(stage.wrong.any(axis=(0, 1))), np.argwhere(rows)


def _gains(stage: _Stage) -> str:
    """A factor for each channel."""
    ours, theirs, channels, _ = _rows(stage)
    ours, theirs = ours[:, channels], theirs[:, channels]
    power = (ours * ours).sum(axis=0)
    gains = (ours * theirs).sum(axis=0) / np.where(power > 0, power, 1)
    left = np.linalg.norm(theirs - gains * ours)
    if len(ours) < _LEAST_VALUES or left > _FITS * np.linalg.norm(theirs - ours):
        return ""
    return f"every channel has a gain of its own, from {gains.min():.4g} to {gains.max():.4g}"


def _elsewhere(stage: _Stage) -> str:
    """Right values of other positions, or of other channels."""
    ours, theirs, channels, places = _rows(stage)
    off = np.linalg.norm(theirs - ours)
    for row in np.unique(places[:, 0]):
        here = places[:, 0] == row
        pool = np.where(stage.counted[row], stage.right[row], np.inf)[:, channels]
        pool[~np.isfinite(pool).all(axis=-1)] = 1e150
        wanted = theirs[here][:, channels]
        distances = ((wanted[:, None] - pool[None]) ** 2).sum(axis=-1)
        nearest = distances.argmin(axis=-1)
        columns = places[here][:, 1]
        if np.sqrt(distances.min(axis=-1).sum()) <= _FITS * off and (nearest != columns).all():
            steps = np.unique(columns - nearest)
            what = f"{abs(int(steps[0]))} {'before' if steps[0] > 0 else 'behind'}" if len(steps) == 1 else "elsewhere"
            return f"there stand the right values of the positions {what}"
    order = _channels_of(ours, theirs, channels)
    if order is not None and np.linalg.norm(theirs[:, channels] - ours[:, order]) <= _FITS * off:
        shown = ", ".join(f"{to} holds {of}" for to, of in list(zip(channels, order, strict=True))[:4] if to != of)
        return f"there stand the right values of other channels ({shown}, ...)"
    return ""


def _channels_of(ours: np.ndarray, theirs: np.ndarray, channels: np.ndarray) -> np.ndarray | None:
    """For each wrong channel, the right one whose values it is likest."""
    if len(ours) < _LEAST_VALUES or ours.shape[1] > _MOST_CHANNELS:
        return None
    length = np.linalg.norm(ours, axis=0)
    likeness = theirs[:, channels].T @ ours / np.where(length > 0, length, 1)
    return likeness.argmax(axis=-1)


def _linear(stage: _Stage) -> str:
    """A linear map of a position's right values, fitted to one half of the positions and tried on the other."""
    ours, theirs, channels, _ = _rows(stage)
    width = ours.shape[1]
    train = np.arange(len(ours)) % 4 != 3
    if width > _MOST_CHANNELS or train.sum() < _ROWS_PER_CHANNEL * width:
        return ""
    change = (theirs - ours)[:, channels]
    found = np.linalg.lstsq(ours[train], change[train], rcond=None)[0]
    left = np.linalg.norm(ours[~train] @ found - change[~train])
    if left > _FITS * np.linalg.norm(change[~train]):
        return ""
    values = np.linalg.svd(found, compute_uv=False)
    rank = int((values > 1e-3 * values[0]).sum())
    return f"theirs is a linear map of the position's right values, the identity and a matrix of rank {rank}"
