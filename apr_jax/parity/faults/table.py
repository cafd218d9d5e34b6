"""The table of faults, by name."""

from __future__ import annotations

from collections.abc import Mapping

from apr_jax.parity.faults import attention, mlp, norms, outside, products, rope, seen, weights
from apr_jax.parity.faults.record import Fault

FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for family in (rope, norms, weights, attention, mlp, outside, products, seen)
    for fault in family.FAULTS
}
