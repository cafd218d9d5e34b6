"""The rules by which engines stretch rotary frequencies to longer contexts, where nobody asked for it.

What linear, yarn and llama3 compute is `rotary.frequencies`, with the numbers that transformers takes where none are
given. "ntk" is the base raised by factor^(H / (H - 2)); "dynamic" is this with a factor that grows with the length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.checkpoint.rope_scaling import RopeScaling
from apr_jax.model import rotary

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


class Rule(NamedTuple):
    """A rule with its numbers.

    Attributes:
      name: "linear", "ntk", "dynamic", "yarn" or "llama3".
      factor: How many times longer the context becomes.
      original: Positions that the model was trained on: yarn and llama3 take their ramps from them, and beyond them
        "dynamic" raises the base; 0 for the others.
    """

    name: str
    factor: float
    original: int = 0

    def frequencies(self, config: Qwen2Config, theta: float, width: int, reach: int) -> tuple[np.ndarray, float]:
        """Returns the inverse frequencies, float32 [width / 2], and what cos and sin are multiplied by.

        `reach` is how many positions the longest row of the batch has.
        """
        if self.name in ("ntk", "dynamic"):
            longer = max(reach / self.original, 1) if self.original else 1
            factor = self.factor if self.name == "ntk" else self.factor * longer - (self.factor - 1)
            return rotary.inverse_frequencies(theta * factor ** (width / (width - 2)), width), 1.0
        gain = 0.1 * math.log(self.factor) + 1.0 if self.name == "yarn" and self.factor > 1 else 1.0
        scaling = RopeScaling(self.name, self.factor, self.original, gain, **_DEFAULTS[self.name])
        return rotary.frequencies(dataclasses.replace(config, rope_theta=theta, head_dim=width, rope_scaling=scaling))


FACTORS = (2.0, 4.0, 8.0, 1.5, 3.0, 16.0, 32.0)
"""Customary factors, the likeliest first."""


def customary(config: Qwen2Config, factors: tuple[float, ...] = FACTORS) -> list[Rule]:
    """Returns the rules with ramps as engines have them: lengths that models were trained on, the model's own, and the
    one that its own rule has."""
    own = [config.max_position_embeddings]
    if config.rope_scaling is not None and config.rope_scaling.original_max_position_embeddings:
        own.append(config.rope_scaling.original_max_position_embeddings)
    yarn, llama3 = dict.fromkeys((32768, *own, 4096, 8192, 2048, 131072)), dict.fromkeys((8192, *own))
    ramps = [*(("yarn", original) for original in yarn), *(("llama3", original) for original in llama3)]
    return [Rule(name, factor, original) for name, original in ramps for factor in factors]
