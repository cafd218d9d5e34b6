"""A wrong stage, as the search for its cause sees it: their values, the right ones, and what a hypothesis leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from apr_jax.parity.faults.record import Mistakes
from apr_jax.parity.localise import EPSILON, Site
from apr_jax.parity.replay import QKV, Replay, Value
from apr_jax.parity.response import Response, is_small
from apr_jax.trace.positions import position_axis
from apr_jax.trace.stages import Key

_SLIGHT = 0.03
"""Relative L2 below which no other matrix is meant: only the same one, rounded or multiplied less precisely."""
_NOTHING = 1e-6
"""The least relative difference that counts, however fine the dtype."""


def sine(change: Value, off: Value) -> float:
    """The sine of the angle between two differences, 1 from 90 degrees: what a multiple of one leaves of the other."""
    sizes = float(np.vdot(change, change)) * float(np.vdot(off, off))
    if not (np.isfinite(sizes) and sizes):
        return 1.0
    cosine = float(np.vdot(change, off)) / sizes**0.5
    return max(0.0, 1.0 - cosine * cosine) ** 0.5 if cosine > 0 else 1.0


@dataclasses.dataclass(frozen=True)
class Question:
    """A wrong stage.

    Attributes:
      replay: The replay with all positions.
      probe: The replay with some positions, which most hypotheses are judged on.
      key: The stage.
      theirs: The other side's values.
      right: What they should be, from the other side's own inputs.
      tokens: Which positions are theirs and no padding, bool [B, T].
      given: Mistakes that are supposed to have been made before.
      dtype: What the other side declares to compute in.
      only: The projection that is looked at, of a stage that holds several; "" is all.
      site: How the stage was judged; None where that is not known.
      reference: What every stage should be, from the other side's own inputs; empty where that is not known.
    """

    replay: Replay
    probe: Replay
    key: Key
    theirs: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    given: Mistakes = ()
    dtype: str = "float32"
    only: str = ""
    site: Site | None = None
    reference: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def layer(self) -> int | None:
        """The layer, None outside the layers."""
        return self.key.layer

    @property
    def stage(self) -> str:
        """The bare stage name."""
        return self.key.stage

    @functools.cached_property
    def nodes(self) -> list[Key]:
        """The stage, and what was not dumped before it, in order of execution."""
        return self.replay.undumped(self.key)

    @property
    def nothing(self) -> float:
        """Relative difference below which values are taken for right ones, rounded."""
        return max(_NOTHING, 4 * EPSILON[self.dtype])

    @functools.cached_property
    def response(self) -> Response | None:
        """What small changes of the stages of the gap do to the stage; None without a gap, or where that is too much
        to hold."""
        nodes, whole = self.nodes, self.replay.beyond is None and not self.only and not self.given
        if len(nodes) < 2 or not whole or not self.reference.keys() >= set(nodes):
            return None
        off = self.theirs.astype(np.float64) - self.right
        if self.theirs.shape != self.right.shape or not np.isfinite(off).all() or not is_small(nodes, self.reference):
            return None
        shown = self.tokens[..., None]
        if self.key.per_pair:
            shown = (self.replay.visible(self.layer) & self.tokens[:, :, None])[:, None]
        return Response(self.replay, self.key, self.reference, off * shown)

    def all(self) -> Replay:
        """The replay with all positions in which the given mistakes are made."""
        return dataclasses.replace(self.replay.under(self.given), target=self.key)

    def shares(self, mistakes: Mistakes = ()) -> float:
        """What share of their values the mistakes, beside the given ones, leave unexplained."""
        theirs = self.compared(self.their_rows())
        return self.misfit(mistakes) / (float(np.linalg.norm(theirs)) or 1.0)

    @functools.cached_property
    def slight(self) -> bool:
        """Whether theirs are off so little that the right matrix was multiplied with, rounded or less precisely."""
        return self.shares() < _SLIGHT

    def their_tokens(self) -> np.ndarray:
        """Which of the probe's positions count, bool [B, T]."""
        return self.tokens[:, self.probe.columns()]

    def seen(self) -> np.ndarray:
        """Which scores a right engine shows of the probe's positions, bool [B, 1, T, S]."""
        return (self.probe.visible(self.layer) & self.their_tokens()[:, :, None])[:, None]

    def counted(self) -> np.ndarray:
        """Which of the probe's values count, bool, of their shape up to broadcasting."""
        return self.seen() if self.key.per_pair else self.their_tokens()[..., None]

    def their_rows(self) -> Value:
        """Their values at the probe's positions."""
        return self._part(self.probe.look(self.stage, self.theirs))

    def value(self, mistakes: Mistakes) -> Value:
        """The stage at the probe's positions, with these mistakes beside the given ones."""
        return self._part(self.probe.under(self.given + mistakes).compute(self.key))

    def _part(self, values: Value) -> Value:
        """The columns of one projection, [..., X]."""
        if not self.only:
            return values
        sizes = [len(self.replay.weight(self.layer, f"self_attn.{name}.bias")) for name in QKV]
        return np.split(values, np.cumsum(sizes)[:-1], axis=-1)[QKV.index(self.only)]

    def misfit(self, mistakes: Mistakes) -> float:
        """|theirs - the stage with these mistakes| at the probe's positions, over what is compared."""
        with np.errstate(all="ignore"):
            return float(np.linalg.norm(self.compared(self.their_rows() - self.value(mistakes))))

    def unlike(self, mistakes: Mistakes) -> float:
        """The sine of the angle between what these mistakes change and what there is to explain; 1 from 90 degrees."""
        right = self._without_more
        with np.errstate(all="ignore"):
            changed, off = self.compared(self.value(mistakes) - right), self.compared(self.their_rows() - right)
            return sine(changed, off)

    @functools.cached_property
    def _without_more(self) -> Value:
        return self.value(())

    def compared(self, values: Value) -> Value:
        """The values at the probe's positions that count."""
        if self.key.per_pair:
            return np.where(self.seen(), values, 0.0)
        return values[self.their_tokens()]

    def parts(self) -> list[Question]:
        """The parts of the stage that are computed apart, each a question of its own: q, k and v of their products."""
        apart = QKV if self.stage in ("qkv_matmul", "qkv_bias") else ()
        return [dataclasses.replace(self, only=name) for name in apart]

    def off(self) -> np.ndarray:
        """The largest difference of each of their positions from the right values, [B, T]; 0 elsewhere."""
        difference = np.abs(self.theirs - self.right)
        if self.key.per_pair:
            difference = difference * self.replay.visible(self.layer)[:, None]
        axes = tuple(axis for axis in range(1, difference.ndim) if axis != position_axis(self.key))
        return difference.max(axis=axes) * self.tokens
