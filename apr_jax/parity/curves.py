"""How a stage's error runs over positions, heads and channels, beside its budget: where in the stage a mistake sits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.parity.localise import Localisation, Site
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import compared_positions, gather_positions

MOST_POINTS = 240
"""More of them are put together, each the largest of its group."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The error of one stage over one of its axes, relative to the right values.

    Attributes:
      over: "positions", "heads" or "channels".
      labels: What each point stands for: a position, "q 3", or the first of a group of channels.
      theirs: Each one's error (L2); a position's is relative to its own right values, a head's or channel's to the
        typical one's. None is not finite.
      budget: What each may be off.
      group: How many are put together in a point.
    """

    over: str
    labels: tuple[str, ...]
    theirs: tuple[float | None, ...]
    budget: tuple[float, ...]
    group: int


def worst(located: Localisation) -> Site | None:
    """Returns the stage that takes most of its budget; None where all are bit for bit right, or none was judged."""
    sites = [site for site in located.sites if site.elements and (site.error or site.wrong)]
    return max(sites, key=lambda site: (site.wrong, site.share), default=None)


def curves(located: Localisation, site: Site, inputs: Inputs, config: Qwen2Config) -> list[Curve]:
    """Returns the curves of one stage: over positions, and over its heads and channels where it has such."""
    key, part = site.key, located.columns.get(site.key)
    theirs, right, positions = located.theirs[key], located.reference[key], inputs.positions()
    mask = compared_positions(key, inputs, right.shape, window=config.window_of(site.layer))
    if part is not None:
        theirs, right, mask = (gather_positions(key, values, part) for values in (theirs, right, mask))
        positions = np.take_along_axis(positions, part, axis=1)
    mask = mask if mask.ndim == right.ndim else mask[..., None]
    error, size = (_squares(values, mask) for values in (np.asarray(theirs, np.float64) - right, right))
    made = [_over_positions(error, size, np.square(site.row_budgets), positions, key.per_pair)]
    typical = site.budget / site.norm if site.norm else 0.0
    heads = list(_heads(site.stage, config))
    if heads:
        width = 1 if key.per_pair else config.head_dim
        axes = (0, 2, 3) if key.per_pair else (0, 1)
        made.append(_over("heads", heads, error.sum(axis=axes).reshape(len(heads), width).sum(axis=1), site, typical))
    if not key.per_pair:
        channels = error.sum(axis=(0, 1))
        made.append(_over("channels", [str(c) for c in range(len(channels))], channels, site, typical))
    return made


def _squares(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.square(np.where(mask, values, 0.0))


def _heads(stage: str, config: Qwen2Config) -> Iterator[str]:
    queries = {"q_post_rope", "attention", "attn_scores", "attn_softmax", "qkv_matmul", "qkv_bias"}
    keys = {"k_post_rope", "qkv_matmul", "qkv_bias"}
    if stage in queries:
        yield from (f"q {head}" for head in range(config.num_heads))
    if stage in keys:
        yield from (f"k {head}" for head in range(config.num_kv_heads))
    if stage in ("qkv_matmul", "qkv_bias"):
        yield from (f"v {head}" for head in range(config.num_kv_heads))


def _over_positions(
    error: np.ndarray, size: np.ndarray, budget: np.ndarray, positions: np.ndarray, per_pair: bool
) -> Curve:
    """Squares of errors and right values [B, T, C] or [B, N, T, S], of budgets without the last axis."""
    error, size = (values.sum(axis=(1, 3) if per_pair else 2) for values in (error, size))
    budget = budget.sum(axis=1) if per_pair else budget
    counted = positions >= 0
    numbers = np.unique(positions[counted])
    places = np.searchsorted(numbers, positions[counted])
    sums = [np.bincount(places, values[counted], len(numbers)) for values in (error, size, budget)]
    norm = np.sqrt(np.where(sums[1] > 0, sums[1], 1.0))
    return _grouped("positions", [str(n) for n in numbers], np.sqrt(sums[0]) / norm, np.sqrt(sums[2]) / norm)


def _over(name: str, labels: list[str], error: np.ndarray, site: Site, typical: float) -> Curve:
    size = site.norm / math.sqrt(len(labels)) or 1.0
    return _grouped(name, labels, np.sqrt(error) / size, np.full(len(labels), typical))


def _grouped(name: str, labels: list[str], theirs: np.ndarray, budget: np.ndarray) -> Curve:
    group = -(-len(labels) // MOST_POINTS)
    starts = np.arange(0, len(labels), group)
    largest = np.maximum.reduceat(theirs, starts)  # NaN is the largest of all
    return Curve(
        name,
        tuple(labels[start] for start in starts),
        tuple(float(value) if math.isfinite(value) else None for value in largest),
        tuple(map(float, np.maximum.reduceat(budget, starts))),
        group,
    )
