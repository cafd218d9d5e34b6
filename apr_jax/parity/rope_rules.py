"""The rules by which engines stretch rotary frequencies to longer contexts: what each makes of the plain ones.

linear   every frequency divided by the factor (Chen et al. 2023, Positional Interpolation)
ntk      the base raised by factor^(H / (H - 2)); "dynamic" is this with a factor that grows with the length
yarn     fast pairs kept, slow ones divided, a ramp between; cos and sin times 0.1 ln(factor) + 1 (Peng et al. 2023)
llama3   the same with a ramp over wavelengths and no factor on cos and sin

Defaults are those of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from apr_jax.model import rotary

_FAST, _SLOW = 32.0, 1.0
_LOW, _HIGH = 1.0, 4.0


class Rule(NamedTuple):
    """A rule with its numbers.

    Attributes:
      name: "linear", "ntk", "yarn" or "llama3".
      factor: How many times longer the context becomes.
      original: Positions that the model was trained on, which yarn and llama3 take their ramps from; 0 for the others.
    """

    name: str
    factor: float
    original: int = 0

    def frequencies(self, theta: float, width: int) -> tuple[np.ndarray, float]:
        """Returns the inverse frequencies, float32 [width / 2], and what cos and sin are multiplied by."""
        if self.name == "ntk":
            return rotary.inverse_frequencies(theta * self.factor ** (width / (width - 2)), width), 1.0
        plain = rotary.inverse_frequencies(theta, width).astype(np.float64)
        kept = {"linear": _none_kept, "yarn": self._yarn, "llama3": self._llama3}[self.name](plain, theta)
        gain = 0.1 * math.log(self.factor) + 1.0 if self.name == "yarn" and self.factor > 1 else 1.0
        return (plain / self.factor * (1 - kept) + plain * kept).astype(np.float32), gain

    def _yarn(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """How much of each plain frequency is kept, from 1 at the fast end to 0 at the slow one."""
        pairs = len(plain)

        def pair_with(turns: float) -> float:
            return pairs * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)

        low, high = max(math.floor(pair_with(_FAST)), 0), min(math.ceil(pair_with(_SLOW)), 2 * pairs - 1)
        return 1 - np.clip((np.arange(pairs) - low) / ((high - low) or 0.001), 0, 1)

    def _llama3(self, plain: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original * plain / (2 * math.pi)
        return np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)


def _none_kept(plain: np.ndarray, theta: float) -> np.ndarray:
    return np.zeros_like(plain)


FACTORS = (2.0, 4.0, 8.0, 1.5, 3.0, 16.0, 32.0)
"""Customary factors, the likeliest first."""


def customary(longest: int, factors: tuple[float, ...] = FACTORS) -> list[Rule]:
    """Returns the rules with ramps as engines have them: lengths that models were trained on, and the model's own."""
    yarn = dict.fromkeys((32768, longest, 4096, 8192, 2048, 131072))
    ramps = [("yarn", original) for original in yarn] + [
        ("llama3", original) for original in dict.fromkeys((8192, longest))
    ]
    return [Rule(name, factor, original) for name, original in ramps for factor in factors]
