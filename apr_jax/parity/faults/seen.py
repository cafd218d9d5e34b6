"""What is said where no mistake is known that explains a stage: what is seen, not how it came about."""

from __future__ import annotations

from apr_jax.parity.faults.record import Fault

NON_FINITE = Fault("non-finite", "values are not finite", unexplained=True)
OVERFLOW = Fault(
    "float16-overflow",
    "float16 overflows: beyond {largest:.0f} there is no number, and {what} pass that",
    unexplained=True,
)
CONSTANT = Fault("constant", "all values are {value:.6g}", unexplained=True)
PERMUTED = Fault(
    "positions-permuted", "the values of {moved} positions are right ones of other positions", unexplained=True
)
UNKNOWN = Fault("unknown", "wrong, and no known mistake explains it", unexplained=True)
UPLOAD = Fault("upload", "{different} parameters differ from the file's where they were uploaded to")
RANK_ORDER = Fault("rank-order", "the tensor-parallel ranks are in another order than their weights: {order}")
APART = Fault("ranks-apart", "of what all ranks should hold alike, other values stand on the ranks {ranks}")
ALL_REDUCE = Fault("all-reduce-missing", "the parts of the {ranks} ranks are not summed: an all-reduce is missing")

FAULTS = (NON_FINITE, OVERFLOW, CONSTANT, PERMUTED, UNKNOWN, UPLOAD, RANK_ORDER, ALL_REDUCE, APART)
