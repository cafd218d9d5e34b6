"""What is said where no mistake is known that explains a stage: what is seen, not how it came about."""

from __future__ import annotations

from apr_jax.parity.faults.record import Fault, Instead

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
UPLOAD = Fault(
    "upload",
    "{different} parameters differ from the file's where they were uploaded to",
    formula=Instead("W on the device ≠ W₀, for {different} parameters", "W on the device = W₀"),
)
RANK_ORDER = Fault(
    "rank-order",
    "the tensor-parallel ranks are in another order than their weights: {order}",
    formula=Instead("y = [y of ranks {order}]", "y = [y of ranks 0, 1, 2, …]"),
)
ALL_REDUCE = Fault(
    "all-reduce-missing",
    "the parts of the {ranks} ranks are not summed: an all-reduce is missing",
    formula=Instead("y = x[r] W[r]ᵀ on each rank r", "y = Σ_r x[r] W[r]ᵀ over {ranks} ranks"),
)
APART = Fault(
    "ranks-apart",
    "of what all ranks should hold alike, other values stand on the ranks {ranks}",
    formula=Instead("y on the ranks {ranks} ≠ y on the others", "y alike on all ranks"),
)

FAULTS = (NON_FINITE, OVERFLOW, CONSTANT, PERMUTED, UNKNOWN, UPLOAD, RANK_ORDER, ALL_REDUCE, APART)
