"""Mistakes that are made in a part of a stage only: some heads, channels, pairs of a rotation, or positions.

Which part it is, the errors say: everything else of the stage is within its budget. What happened there is then any
mistake of the table that can be made at the stage, or values that are scaled, zero, or those of other heads or
channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from apr_jax.parity.faults.parts import ZEROED, exchanged, scaled
from apr_jax.parity.faults.record import Mistake, Mistakes, Region
from apr_jax.parity.localise import channel_medians, row_norms
from apr_jax.parity.question import Question
from apr_jax.parity.replay import QKV, Value
from apr_jax.trace.positions import compared_positions

_HEADED = ("qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attention")
_ROTATED = ("q_post_rope", "k_post_rope")
_NEARLY, _SIGMAS = 0.1, 4.0
"""How far a share of 0 or 1 may be off, absolutely and in standard deviations."""


def hypotheses(
    question: Question, singles: Callable[[Question], Iterable[Mistakes]], before: Iterable[Mistakes] = ()
) -> Iterator[Mistakes]:
    """Yields mistakes confined to the parts of the stage that are wrong, where others are right.

    Args:
      question: The wrong stage.
      singles: Gives what the table has for a stage, one mistake each.
      before: What it has for the stages before that were not dumped.
    """
    for region in regions(question):
        if region.kind == "heads" and question.stage == "attention" and len(question.nodes) > 1:
            yield from _of_heads_before(question, region, before)
        own = [stack for stack in singles(_seen_in(question, region)) if len(stack) == 1]
        for (mistake,) in [*scaled(question, region), *own, *exchanged(question, region)]:
            if not mistake.fault.multiplies:
                yield (mistake.confined(region, question.stage),)
    if question.stage in _ROTATED:
        yield from _in_pairs(question, singles)


def _in_pairs(question: Question, singles: Callable[[Question], Iterable[Mistakes]]) -> Iterator[Mistakes]:
    """Rotations that only some pairs show: which, all their values together tell.

    What the slow pairs of a rotation are turned by may be less than the rounding of any single value.
    """
    stacks = [stack for stack in singles(question) if len(stack) == 1 and _has_no_number(stack[0])]
    for (mistake,) in stacks:
        if len(pairs := _pairs_made_in(question, mistake)):
            region = Region("pairs", tuple(pairs.tolist()), question.replay.config.head_dim // 2)
            yield (mistake.confined(region, question.stage),)


def _has_no_number(mistake: Mistake) -> bool:
    return mistake.within is None and not any(isinstance(value, float) for _, value in mistake.pairs)


def _pairs_made_in(question: Question, mistake: Mistake) -> np.ndarray:
    """The pairs in which what a mistake changes is there, and not in all; none where some pair cannot tell.

    That is the least-squares share of the change in the difference, 1 where it was made and 0 where not.
    """
    replay, config = question.replay, question.replay.config
    with np.errstate(all="ignore"):
        change = replay.under((mistake,)).compute(question.key) - question.right
        off = question.theirs.astype(np.float64) - question.right
    if not (np.isfinite(change[question.tokens]).all() and np.isfinite(off[question.tokens]).all()):
        return np.array([], int)
    change, off = (_by_pair(each[question.tokens], config.head_dim) for each in (change, off))
    power = (change * change).sum(axis=1)
    if not power.all():
        return np.array([], int)
    share = (change * off).sum(axis=1) / power
    unsure = np.sqrt(((off - share[:, None] * change) ** 2).mean(axis=1) / power)
    made = share > 0.5
    if made.all() or not made.any() or (np.abs(share - made) > np.maximum(_NEARLY, _SIGMAS * unsure)).any():
        return np.array([], int)
    return np.flatnonzero(made) if (unsure[made] * _SIGMAS < 1).any() else np.array([], int)


def _by_pair(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Values [n, heads * H] of each pair (i, i + H/2), [H / 2, ...]."""
    return values.reshape(-1, 2, head_dim // 2).transpose(2, 0, 1).reshape(head_dim // 2, -1)


def regions(question: Question) -> Iterator[Region]:
    """Yields what parts of a stage the difference may be confined to; nothing if it is all over it."""
    site, theirs, right = question.site, question.theirs, question.right
    if site is None or not np.isfinite(theirs[question.tokens] if theirs.ndim == 3 else theirs).all():
        return
    window = question.replay.config.window_of(question.layer)
    mask = compared_positions(question.key, question.replay.inputs, theirs.shape, window=window)
    counted = question.tokens[:, None, :, None] if theirs.ndim == 4 else question.tokens
    mask = np.logical_and(mask, counted)
    difference = theirs.astype(np.float64) - right
    if theirs.ndim == 4:
        yield from _of_pairs(question, difference, mask)
        return
    if site.channel_budgets is not None:
        medians = channel_medians(question.key, difference, row_norms(right, mask), mask)
        assert medians is not None
        yield from _of_channels(question, np.flatnonzero(medians > site.channel_budgets), len(medians))
    budgets = site.row_budgets
    if budgets.shape == mask.shape:
        yield from _of_positions(np.logical_and(row_norms(difference, mask) > budgets, mask), mask)


def _of_heads_before(question: Question, region: Region, before: Iterable[Mistakes]) -> Iterator[Mistakes]:
    """Mistakes of the heads whose attention is wrong, made at stages that were not dumped: of query heads, or of the KV
    heads that they read where all that read those are wrong."""
    config = question.replay.config
    readers, kv = (
        config.num_heads // config.num_kv_heads,
        sorted({h * config.num_kv_heads // config.num_heads for h in region.indices}),
    )
    groups = Region("heads", tuple(kv), config.num_kv_heads)
    whole = len(kv) * readers == len(region.indices)
    within = {"q_post_rope": region, "attn_scores": region, "attn_softmax": region}
    within |= {"k_post_rope": groups} if whole and len(kv) < config.num_kv_heads else {}
    hidden = {node.stage for node in question.nodes[:-1]}
    for (mistake,) in before:
        if not mistake.fault.multiplies and mistake.within is None:
            yield from (
                (mistake.confined(within[stage], stage),)
                for stage in mistake.stages(question.replay)
                if stage in within and stage in hidden
            )
    for stage in ("q_post_rope", "k_post_rope", "attn_scores"):
        if stage in within and stage in hidden:
            yield (ZEROED.made().confined(within[stage], stage),)


def _of_pairs(question: Question, difference: Value, mask: np.ndarray) -> Iterator[Region]:
    """Heads or queries of stages of pairs [B, N, T, S]."""
    assert question.site is not None
    budgets = question.site.row_budgets
    if budgets.shape != difference.shape[:3]:
        return
    wrong = row_norms(difference, mask) > budgets
    heads = np.flatnonzero(wrong.any(axis=(0, 2)))
    if 0 < len(heads) < wrong.shape[1]:
        yield Region("heads", tuple(heads.tolist()), wrong.shape[1])
    yield from _of_positions(np.asarray(wrong.any(axis=1)), np.asarray(mask.any(axis=(1, 3))))


def _of_positions(wrong: np.ndarray, counted: np.ndarray) -> Iterator[Region]:
    if 0 < wrong.sum() < counted.sum():
        places = tuple((int(row), int(column)) for row, column in np.argwhere(wrong))
        yield Region("positions", places, int(counted.sum()))


def _of_channels(question: Question, wrong: np.ndarray, count: int) -> Iterator[Region]:
    """Heads that hold all wrong channels, pairs of a rotation in every head, or the channels themselves."""
    width = question.replay.config.head_dim
    if not len(wrong):
        return
    if question.stage in _HEADED:
        for part, start, heads in _projections(question):
            inside = wrong - start
            if inside.min() < 0 or inside.max() >= heads * width:
                continue
            found = np.unique(inside // width)
            if len(found) < heads or (part and heads):
                yield Region("heads", tuple(found.tolist()), heads, part, start)
    if question.stage in _ROTATED:
        pairs = np.unique(wrong % width % (width // 2))
        if len(pairs) < width // 2:
            yield Region("pairs", tuple(pairs.tolist()), width // 2)
    if 2 * len(wrong) <= count:
        yield Region("channels", tuple(wrong.tolist()), count)


def _projections(question: Question) -> Iterator[tuple[str, int, int]]:
    """The projections that a stage holds: name, first channel, heads."""
    config = question.replay.config
    if question.stage not in ("qkv_matmul", "qkv_bias"):
        yield "", 0, config.num_kv_heads if question.stage == "k_post_rope" else config.num_heads
        return
    start = 0
    for name, heads in zip(QKV, (config.num_heads, config.num_kv_heads, config.num_kv_heads), strict=True):
        yield name[0], start, heads
        start += heads * config.head_dim


def _seen_in(question: Question, region: Region) -> Question:
    """The question with the right values outside of the region left out of what is measured: they would hide it."""
    if region.kind not in ("heads", "pairs") or question.theirs.ndim != 3:
        return question
    inside = region.chosen(question.right, np.arange(question.right.shape[1]), question.replay.config.head_dim)
    return dataclasses.replace(question, theirs=np.where(inside, question.theirs, 0).astype(question.theirs.dtype))
