"""How a tensor came to differ from its original: a search for the cause, and its proof.

Every hypothesis is tried on a sample of the differing elements first; what survives is verified over all elements,
bit for bit, so that the share that it explains is measured. Where the sample shows that nothing of the original is left
(`Pair.unrelated`), only what moves content or puts other content in its place is tried.

Families of causes, a file each:

  elementwise.py    misread types, casts, swapped bytes, a factor, a constant, fractions cut
  sparse.py         zeros, cut tails, NaN and infinities, flipped bits
  permutations.py   transposes, rows, columns, heads, fused q, k, v
  relocation.py     content of other tensors, shifts
  quantisation.py   a quantised type and back: by quantising again (replays.py), by the grid (grids.py, groupings.py)
  channels.py       single rows and columns, a factor for each of them
  low_rank.py       merged adapters
  resized.py        rows, columns, heads more or less
  missing.py        tensors that only one side has
  fallback.py       different weights

What several tensors have in common is told in story.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.ma  # np.unique imports it when it is first called, which would be in a thread.
import numpy.random  # So does whatever draws.

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.verify.diagnosis import (
    channels,
    elementwise,
    fallback,
    low_rank,
    permutations,
    quantisation,
    relocation,
    resized,
    sparse,
)
from apr_jax.converters.verify.diagnosis.causes import CAUSES, Cause, Found
from apr_jax.converters.verify.diagnosis.context import Context
from apr_jax.converters.verify.diagnosis.pair import Pair

# As many values among those sampled are no accident.
_VARIED = 256

# Causes whose alternatives say nothing: the first kind explains by construction what the second kind also would.
_IMPLIED = {
    "zero-signs": ("rows-permuted", "columns-permuted", "head-permuted", "quantised", "bit-flips", "shifted"),
    "mantissa-cut": ("quantised", "bit-flips"),
    "rounded-cast": ("mantissa-cut", "quantised"),
    "relabelled-dtype": ("quantised", "zeroed", "mantissa-cut", "rescaled-channels"),
    "scaled": ("rescaled-channels", "scaled-rows"),
    "zeroed": ("truncated", "zeroed-rows", "scaled", "rescaled-channels", "scaled-rows", "mantissa-cut", "quantised"),
    "head-permuted": ("rows-permuted", "columns-permuted"),
    "qkv-order": ("rows-permuted",),
}


def diagnose(a: Tensor, b: Tensor, context: Context) -> list[Cause]:
    """Finds out what happened to a tensor.

    Args:
      a: The original.
      b: The suspect.
      context: Both checkpoints.

    Returns:
      The cause, and after it the other ones that explain the same, with less claim to it. Empty only if nothing
      differs: type, shape and bytes are equal.

    Raises:
      StorageError: A file cannot be read.
    """
    # Damaged values overflow, and signalling NaN complain: neither is news.
    with np.errstate(all="ignore"):
        return _diagnose(Pair(a, b, scratch=context.scratch), context)


def _diagnose(pair: Pair, context: Context) -> list[Cause]:
    a, b = pair.a, pair.b
    found: list[Found] = []
    if a.dtype == b.dtype and a.nbytes == b.nbytes and (pair.original.decoded or pair.type != a.dtype.name):
        found = sorted(_found_in_bytes(Pair(a, b, as_bytes=True)), key=_rank)
    if not found:
        found = sorted(_found(pair, context), key=_rank)
    if not found:
        if pair.same_count and not pair.differing and a.dtype == b.dtype and a.shape == b.shape:
            return []
        return [fallback.different_weights(pair)]
    implied = (found[0].cause, *_IMPLIED.get(found[0].cause, ()))
    # What explains less than the answer can be told apart from it.
    others = dict.fromkeys(
        one.cause for one in found[1:] if one.explained >= found[0].explained and one.cause not in implied
    )
    return [
        Cause(
            one.cause,
            one.parameters,
            one.explained,
            (*one.alternatives, *others) if index == 0 else (),
            one.evidence,
            one.readings,
            one.factors,
        )
        for index, one in enumerate(found)
        if index == 0 or one.cause in others
    ]


def _rank(found: Found) -> float:
    return CAUSES.index(found.cause) if found.rank is None else found.rank


def _found_in_bytes(pair: Pair) -> Iterator[Found]:
    """Damage to the bytes of blocks, which decoded values do not show."""
    if pair.differing:
        yield from (found for found in sparse.zeros(pair) if found.cause == "truncated")
        yield from sparse.bit_flips(pair)
        yield from relocation.shifted(pair)


def _found_undecoded(pair: Pair, context: Context) -> Iterator[Found]:
    """What can be said without values: bytes have no rows and columns that mean something."""
    tagged = elementwise.same_bytes(pair)
    if tagged is not None:
        yield tagged
    elif pair.same_count and pair.differing:
        yield from sparse.zeros(pair)
        yield from relocation.swapped(pair, context)


def _found(pair: Pair, context: Context) -> Iterator[Found]:
    if not pair.has_elements:
        yield from _found_undecoded(pair, context)
        return
    if not pair.same_count:
        tagged = elementwise.same_bytes(pair)
        if tagged is not None:
            yield tagged
            return
        yield from elementwise.misread_width(pair)
        yield from permutations.qkv_order(pair, context)
        yield from resized.resized(pair, context)
        return
    if not pair.size:
        return
    if pair.differing:
        tagged = elementwise.same_bytes(pair)
        if tagged is not None:
            yield tagged
            return
    elif (tagged := elementwise.same_bytes(pair)) is not None and tagged.cause == "transposed":
        yield tagged
        return
    # Varied values that are explained to the last one leave nothing for what is dearer to find out.
    varied = len(np.unique(pair.x[pair.sample])) >= _VARIED and len(np.unique(pair.y[pair.sample])) >= _VARIED
    settled = some = False
    for found in _cheaper(pair, context):
        settled |= found.explained == 1.0 and (varied or found.cause == "mantissa-cut")
        some = True
        yield found
    if not pair.differing or settled:
        return
    families = [relocation.shifted(pair), channels.rescaled(pair)]
    if not pair.unrelated:
        families.append(quantisation.quantised(pair, context))
    for family in families:
        for found in family:
            some = True
            yield found
    # A few lines that changed are of low rank, too, and easier to say.
    if not some and not pair.unrelated and channels.single_lines(pair) is None:
        yield from low_rank.low_rank(pair)


def _cheaper(pair: Pair, context: Context) -> Iterator[Found]:
    if not pair.unrelated:
        yield from elementwise.casts_of(pair)
    if not pair.differing:
        return
    yield from sparse.zeros(pair)
    yield from sparse.non_finite(pair)
    yield from sparse.bit_flips(pair)
    yield from elementwise.byte_swapped(pair)
    yield from elementwise.misread(pair)
    if not pair.unrelated:
        yield from elementwise.mantissas(pair)
        yield from elementwise.scaled(pair)
        yield from channels.scaled_lines(pair)
    yield from elementwise.moved(pair)
    yield from relocation.swapped(pair, context)
    yield from permutations.transposed(pair)
    yield from permutations.permuted(pair, context)
    yield from permutations.qkv_order(pair, context)
