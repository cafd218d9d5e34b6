"""Finds out what became of tensors that only one checkpoint has: fused, split, or under another name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.verify.diagnosis import pair as pairs
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.diagnosis.context import FUSED, Context
from apr_jax.converters.verify.diagnosis.permutations import layouts


@dataclasses.dataclass(frozen=True)
class Match:
    """Tensors of the original and of the suspect that hold the same under different names.

    Attributes:
      only_in_a, only_in_b: Their names, in the order of the parts where one side is fused.
      cause: `qkv-order`, with the layout of the fused tensor; None where a tensor only changed its name.
    """

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    cause: Cause | None


def diagnose_missing(only_in_a: Iterable[str], only_in_b: Iterable[str], context: Context) -> list[Match]:
    """Finds out what became of tensors that only one side has.

    Args:
      only_in_a: Names that the suspect lacks.
      only_in_b: Names that the original lacks.
      context: Both checkpoints.

    Returns:
      What belongs together; names that are in none of it are really missing, or unexpected.

    Raises:
      StorageError: A file cannot be read.
    """
    left, right = dict.fromkeys(only_in_a), dict.fromkeys(only_in_b)
    found = []
    for fused_side, parts_side in ((right, left), (left, right)):
        tensors = (context.b, context.a) if fused_side is right else (context.a, context.b)
        for fused in list(fused_side):
            names = _parts(fused, parts_side)
            if names is None:
                continue
            cause = _fused(tensors[0][fused], [tensors[1][name] for name in names], context, fused_side is right)
            if cause is None:
                continue
            found.append(Match(names, (fused,), cause) if fused_side is right else Match((fused,), names, cause))
            for name in (fused, *names):
                fused_side.pop(name, None)
                parts_side.pop(name, None)
    return found + _renamed(left, right, context)


def _parts(fused: str, names: Mapping[str, None]) -> tuple[str, ...] | None:
    """Returns the names of q, k and v that a fused name stands for, as far as the other side has all three."""
    for part in FUSED:
        if part in fused:
            wanted = tuple(fused.replace(part, f"{role}_proj") for role in "qkv")
            if all(name in names for name in wanted):
                return wanted
    return None


def _fused(fused: Tensor, parts: list[Tensor], context: Context, suspect_is_fused: bool) -> Cause | None:
    whole = pairs.load(fused)
    loaded = [pairs.load(part) for part in parts]
    rows = sum(part.shape[0] if part.shape else 0 for part in parts)
    if not rows or fused.shape[:1] != (rows,) or whole.bits.size != sum(part.bits.size for part in loaded):
        return None
    bits = np.concatenate([pairs.cast_bits(part.bits, part.dtype.name, whole.dtype.name) for part in loaded])
    bits, found = bits.reshape(rows, -1), whole.bits.reshape(rows, -1)
    for name, order in layouts(context, rows):
        if np.array_equal(bits[order], found):
            fate = ("separate", name) if suspect_is_fused else (name, "separate")
            evidence = f"q, k and v are one tensor, its rows laid out as {name}; every element is equal"
            return Cause("qkv-order", {"from": fate[0], "to": fate[1]}, 1.0, evidence=evidence)
    return None


def _renamed(left: dict[str, None], right: dict[str, None], context: Context) -> list[Match]:
    found = []
    for name in list(right):
        tensor = context.b[name]
        for other in context.same_as(tensor, side="a"):
            if other in left and context.a[other].shape == tensor.shape and _equal(context.a[other], tensor):
                found.append(Match((other,), (name,), None))
                del left[other], right[name]
                break
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    one, two = pairs.load(a), pairs.load(b)
    return all(
        np.array_equal(pairs.cast_bits(one.bits[part], one.dtype.name, two.dtype.name), two.bits[part])
        for part in pairs.Pair.chunks(two.bits.size, 1)
    )
