"""The loss whose gradient is taken: which token each position is held against, and how much it weighs."""

from __future__ import annotations

import dataclasses

import numpy as np

from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import predicted_pairs


@dataclasses.dataclass(frozen=True)
class Loss:
    """A weighted sum of cross-entropies, in nats; right, it is their mean over what is predicted.

    Attributes:
      inputs: The batch.
      counted: Which tokens the loss is over, bool [B, T]; None is all that another one stands before.
      targets: The token that each position is held against, int [B, T].
      weights: How much each position weighs, float64 [B, T]; 0 where it does not count.
    """

    inputs: Inputs
    counted: np.ndarray | None
    targets: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, inputs: Inputs, counted: np.ndarray | None = None) -> Loss:
        """The mean over the next tokens, as HuggingFace's `ForCausalLMLoss` takes it."""
        wanted = behind(predicted_pairs(inputs, counted), 1)
        return cls(inputs, counted, np.roll(inputs.input_ids, -1, axis=1), wanted / max(1, int(wanted.sum())))

    @property
    def count(self) -> int:
        """How many positions count."""
        return int((self.weights != 0).sum())

    def gradient(self, logits: np.ndarray) -> np.ndarray:
        """Returns the gradient with respect to logits [B, T, V]: weight times (softmax - one for the target)."""
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        rows, columns = np.indices(self.targets.shape)
        shares[rows, columns, self.targets] -= 1.0
        return shares * self.weights[..., None]


def behind(pairs: np.ndarray, count: int) -> np.ndarray:
    """Adds `count` positions that predict nothing at the end, bool [B, T - count] -> [B, T]."""
    return np.pad(pairs, ((0, 0), (0, count)))
