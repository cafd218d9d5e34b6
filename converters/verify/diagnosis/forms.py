"""Tensors that a form computes: a quantised one says itself how it was quantised, and an adapter what was added."""

from __future__ import annotations

import numpy as np

from apr_jax.converters.checkpoint.decoded import DecodedTensor, Form
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.tensor_pairs import Pair

# Relative L2 up to which decoded values are the original's, quantised, by the bits of a code: several times what
# rounding normal weights to so many levels costs, since GPTQ moves errors on to other weights; unrelated weights are
# 1.4 away.
_FARTHEST = {2: 0.95, 3: 0.6, 4: 0.35, 5: 0.2, 6: 0.15, 8: 0.1}
_NAMES = {"f8_e4m3": "fp8_e4m3", "f8_e5m2": "fp8_e5m2"}
_BITS = {"nf4": 4, "fp4": 4, "nvfp4": 4, "mxfp4": 4, "fp8_e4m3": 8, "fp8_e5m2": 8}
_SCALES = {"per row": "row", "per tensor": "tensor"}


def form_cause(pair: Pair) -> Cause | None:
    """Returns the form that B is stored in, if A is not and B's values are A's, as near as the form allows."""
    if not isinstance(pair.b, DecodedTensor) or isinstance(pair.a, DecodedTensor) or pair.sums is None:
        return None
    parameters = _parameters(pair.b.form)
    bits = _bits(str(parameters["type"]))
    if bits is None or not pair.sums.relative_l2 <= _FARTHEST[bits]:
        return None
    evidence = f"stored as {pair.b.form}, {pair.sums.relative_l2:.3g} from the original (relative L2)"
    return Cause("quantised", parameters, 1.0, evidence=evidence)


def _parameters(form: Form) -> dict[str, str | int]:
    details = dict(form.details)
    kind = str(details["type"])
    group = details.get("group", details.get("block", _SCALES.get(str(details.get("scale")), "")))
    if isinstance(group, str):
        group = group.replace(" ", "")
    return {"type": _NAMES.get(kind, kind), "group": group, "form": form.name}


def _bits(kind: str) -> int | None:
    """Returns the bits of a code; None for a type whose distance is not known."""
    bits = _BITS.get(kind) or (int(kind[3:]) if kind.startswith("int") else 0)
    return bits if bits in _FARTHEST else None


# Half a unit in the last place of a type, relative to the value.
_ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24, "f64": 2.0**-24}
# Smaller values of f16 have fewer digits.
_SMALLEST = {"f16": 2.0**-25}
_PIECE = 1 << 20


def is_sum(pair: Pair) -> bool:
    """Whether B is what adding an adapter gives: A's float32 sum, rounded.

    PEFT rounds what is added to the type of the base, and then the sum: each costs half a unit in its own last place.
    A conversion here rounds once.
    """
    if pair.b.dtype.name not in _ROUNDING or not isinstance(pair.a, DecodedTensor):
        return False
    unit, base = _ROUNDING[pair.b.dtype.name], pair.a.parts[0]
    for begin in range(0, int(np.prod(pair.a.shape)), _PIECE):
        end = min(begin + _PIECE, int(np.prod(pair.a.shape)))
        wanted, before, found = (tensor.read_flat(begin, end).astype(np.float64) for tensor in (pair.a, base, pair.b))
        # In float32 the sum and its products are rounded too, in whatever order.
        slack = (unit + 2.0**-20) * (np.abs(wanted) + np.abs(wanted - before))
        slack += 2.0**-24 * np.abs(before).max() + _SMALLEST.get(pair.b.dtype.name, 0)
        if not np.all(np.abs(found - wanted) <= slack):
            return False
    return True
