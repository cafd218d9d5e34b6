"""What a run of AdamW is asked to do, and the parameters as one vector."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import UsageError

DECAYED = ("all", "matrices")
"""Which parameters decay: all, as `torch.optim.AdamW(model.parameters())` has it, or all but norms and biases."""
KINDS = ("matrices", "norms", "biases")


@dataclasses.dataclass(frozen=True)
class Settings:
    """AdamW as it was asked for (Loshchilov and Hutter 2019); the defaults are `torch.optim.AdamW`'s.

    Attributes:
      rates: The learning rate of each step; as many as there are steps.
      betas: Decay of the first and of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled: parameters shrink by rate * weight_decay of themselves at each step.
      decayed: One of `DECAYED`.
      clip_norm: The gradient of all parameters together is scaled down to this norm; None leaves it.
    """

    rates: tuple[float, ...]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decayed: str = "all"
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        bounds = (
            ("--lr", self.rates, all(0 < rate < math.inf for rate in self.rates) and self.rates, "above 0"),
            (
                "--betas",
                self.betas,
                all(0 <= beta < 1 for beta in self.betas),
                "two numbers from 0 to 1, 1 not among them",
            ),
            ("--eps", self.eps, 0 <= self.eps < math.inf, "0 or more"),
            ("--weight-decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more"),
            ("--decay", self.decayed, self.decayed in DECAYED, " or ".join(DECAYED)),
            ("--clip-norm", self.clip_norm, self.clip_norm is None or 0 < self.clip_norm < math.inf, "above 0"),
        )
        for option, found, holds, expected in bounds:
            if not holds:
                raise UsageError(
                    f"{option} is not a setting of AdamW", code="optimizer-setting", found=found, expected=expected
                )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def kind_of(name: str) -> str:
    """Returns which of `KINDS` a parameter is, by its name."""
    if name.endswith(".bias"):
        return "biases"
    return "norms" if name.endswith("norm.weight") else "matrices"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each parameter stands in one vector of all of them.

    Attributes:
      shapes: Name -> shape, in the order of the vector.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: Qwen2Config) -> Layout:
        """Returns the layout of a model's parameters, a tied head left out."""
        return cls(config.tensor_shapes())

    @property
    def slices(self) -> dict[str, slice]:
        """Name -> its part of the vector."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()]).tolist()
        return {name: slice(start, end) for name, start, end in zip(self.shapes, [0, *ends], ends, strict=False)}

    def flat(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns arrays by name as one vector, float64 [P]."""
        return np.concatenate([np.asarray(arrays[name], np.float64).reshape(-1) for name in self.shapes])

    def arrays(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the vector's parts by name: the inverse of `flat`."""
        return {name: vector[part].reshape(self.shapes[name]) for name, part in self.slices.items()}

    def per_kind(self, values: Mapping[str, float]) -> np.ndarray:
        """Returns a value for each element, by the kind of its parameter, float64 [P]."""
        parts = [np.full(math.prod(shape), values[kind_of(name)]) for name, shape in self.shapes.items()]
        return np.concatenate(parts).astype(np.float64)


def decay_of(settings: Settings) -> dict[str, float]:
    """Returns what parameters of each kind decay by."""
    return {kind: settings.weight_decay if settings.decayed == "all" or kind == "matrices" else 0.0 for kind in KINDS}
