"""The bars of `golden --check` and of tests: how far apart two right forward passes may be, and why that far.

Measured relative L2 of logits against float64 on CPU, 3 x 97 tokens, the seven committed checkpoints and six small ones
with the genuine files (`make test-reference` prints them): float32 0.6e-6 .. 2.0e-6 here, 0.7e-6 .. 2.9e-6 for
HuggingFace; bfloat16 1.6e-2 .. 8.4e-2 here, 1.6e-2 .. 8.6e-2 for HuggingFace; float64 against the oracle below 1e-13.
"""

from __future__ import annotations

# Relative L2 that two float64 passes may differ by: they differ in the order of sums alone.
FLOAT64 = 1e-11
# The same for float32, up to this many positions: beyond, it grows with the length, as the rounding of rotary angles
# does.
FLOAT32 = 1e-5
FLOAT32_POSITIONS = 170
# A bfloat16 pass may be this many times as far from the reference as this model's own bfloat16 is from its float32...
BFLOAT16_FACTOR = 2.0
# ... but never farther than this: about twice the worst that both implementations were measured at.
BFLOAT16_LIMIT = 0.2

# Gradients: this many times our own error in the coarser dtype against float64, tensor by tensor, since what cancels in
# one (a bias of k) does not in another; and at least this much.
GRADIENT_FACTOR = 4.0
GRADIENT_FLOORS = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 1e-2}


def relative_l2(dtype: str, positions: int) -> float:
    """Returns the bar for values computed in float32 or float64.

    Args:
      dtype: The coarser of the two sides' dtypes.
      positions: Length of the longest row.
    """
    return FLOAT64 if dtype == "float64" else FLOAT32 * max(1.0, positions / FLOAT32_POSITIONS)


def gradient(dtype: str, own_error: float) -> float:
    """Returns the bar for a gradient.

    Args:
      dtype: The coarser of the two sides' dtypes.
      own_error: This model's own error of it in that dtype, against float64.
    """
    return max(GRADIENT_FLOORS[dtype], GRADIENT_FACTOR * own_error)


def bfloat16(own_error: float) -> float:
    """Returns the bar for values computed in bfloat16, given this model's own bfloat16 error on the same inputs."""
    return min(BFLOAT16_FACTOR * own_error, BFLOAT16_LIMIT)
