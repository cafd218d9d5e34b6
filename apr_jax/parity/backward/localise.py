"""Which gradients of another backward pass are wrong: each is judged on its own inputs, as stages are.

The right gradient is that of the replay in float64, made from what the other side itself fed into it. What rounding
does is seen by the same replay in the other side's dtype. A gradient may be off by a small multiple of the larger of
that error and one rounding of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.replay import Backward, add_rows, factors, sizes
from apr_jax.parity.faults.record import Mistakes
from apr_jax.parity.localise import EPSILON, ROW_FACTOR, Site, row_norms, worst_share
from apr_jax.trace.positions import token_mask
from apr_jax.trace.stages import Key

_BLOCK_ELEMENTS = 1 << 20
FACTOR = 6.0
"""How many times the larger of our own error and one rounding a right program's gradient may be off."""


@dataclasses.dataclass(frozen=True)
class GradientSite(Site):
    """One gradient of the other side, judged on its own inputs; see `Site`.

    Attributes:
      kind: What kind of gradient it is (`nodes`).
      place: The layer that computes it, None outside the layers.
      label: What a finding says that it was seen at.
    """

    kind: str = ""
    place: int | None = None
    label: str = ""

    @property
    def stage(self) -> str:
        """What a finding says that it was seen at: the kind, or the parameter's name."""
        return self.label

    @property
    def layer(self) -> int | None:
        """The layer that computes it, None outside the layers."""
        return self.place

    @property
    def allowed(self) -> float:
        """What the dtype itself makes of it: the larger of our own error in it and one rounding."""
        return self.budget / FACTOR


@dataclasses.dataclass(frozen=True)
class Judged:
    """A gradient with what it was judged by.

    Attributes:
      site: The verdict.
      given: Their values in the shape of the right ones.
      right: The right ones, from their own inputs.
      counted: Which of them count.
      dtype: What the other side computes in.
    """

    site: GradientSite
    given: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    dtype: str

    @functools.cached_property
    def theirs(self) -> np.ndarray:
        """Their values in float64. Of a right gradient nobody asks for them, and an embedding's take a gigabyte."""
        return np.asarray(self.given, np.float64)

    def error(self, values: np.ndarray) -> tuple[float, float, float]:
        """Returns |theirs - values| over what counts, what it may be, and the largest share of a row in its budget.

        Values that are larger than the right ones are rounded more.
        """
        with np.errstate(all="ignore"):
            rows = _norms(self.counted, self.theirs, minus=values)
            size = float(np.linalg.norm(_norms(self.counted, values)))
        more = max(1.0, size / self.site.norm) if self.site.norm else 1.0
        rounding = FACTOR * EPSILON[self.dtype] * size
        budgets = np.maximum(more * self.site.row_budgets, 0.0 if self.site.norm else ROW_FACTOR * rounding)
        return float(np.linalg.norm(rows)), max(more * self.site.budget, rounding), worst_share(rows, budgets)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What gradients are judged with.

    Attributes:
      exact: The replay in float64, with what is believed of gradients that were not dumped.
      narrow: The same in the other side's dtype.
    """

    exact: Backward
    narrow: Backward

    @classmethod
    def of(cls, exact: Backward, dtype: str, rounded: Mapping[str, np.ndarray]) -> Bench:
        """Returns the two for a dtype.

        Args:
          exact: The replay in float64.
          dtype: What the other side computes in.
          rounded: Values of the forward pass as a right engine has them in that dtype, for those that were not dumped.
        """
        forward = exact.forward
        values = {**rounded, **forward.theirs}
        forward = dataclasses.replace(forward, theirs=values, memo={}, composed={})
        return cls(exact, dataclasses.replace(exact, forward=forward, dtype=dtype, kept={}, composed={}))

    @property
    def dtype(self) -> str:
        """What the other side computes in."""
        return self.narrow.dtype

    def over(self, gradients: Mapping[str, np.ndarray]) -> Bench:
        """Returns the two for other gradients of theirs."""
        exact, narrow = (
            dataclasses.replace(back, theirs=gradients, kept={}, composed={}) for back in (self.exact, self.narrow)
        )
        return Bench(exact, narrow)

    def believing(self, mistakes: Mistakes) -> Bench:
        """Returns the two in which these mistakes are made too."""
        return Bench(self.exact.believing(mistakes), self.narrow.believing(mistakes))

    def supposing(self, mistakes: Mistakes) -> Bench:
        """Returns the two in which these are tried."""
        return Bench(self.exact.supposing(mistakes), self.narrow.supposing(mistakes))


def judge(bench: Bench, key: Key, theirs: np.ndarray) -> Judged:
    """Judges one gradient of the other side."""
    back, dtype = bench.exact, bench.dtype
    right, own = back.compute(key), bench.narrow.compute(key)
    theirs = np.asarray(theirs).reshape(right.shape)
    counted = _counted(back, key, right)
    finite = bool((np.isfinite(theirs) | ~counted).all())
    with np.errstate(all="ignore"):
        error, size = _norms(counted, theirs, minus=right), _norms(counted, right)
        own_error = _norms(counted, own, minus=right, finite=True)
        del own
        if key.of_parameter and nodes.kind_of(key, back.config) != nodes.LOW_RANK:
            own_error = np.maximum(own_error, _typical(bench, key))
        elif not key.of_parameter and (added := sizes(back, key)) is not None:
            own_error = np.maximum(own_error, row_norms(added, _rows(counted)) * EPSILON[dtype] / np.sqrt(3))
    rounding = size * EPSILON[dtype] / np.sqrt(3)
    total = float(np.linalg.norm(own_error))
    typical = total / max(1, int(np.count_nonzero(size))) ** 0.5
    rows = ROW_FACTOR * FACTOR * np.maximum(np.maximum(own_error, rounding), typical)
    site = GradientSite(
        key,
        error=float(np.linalg.norm(error)) if finite else float("inf"),
        own=total,
        budget=FACTOR * max(total, float(np.linalg.norm(rounding))),
        norm=float(np.linalg.norm(size)),
        worst=worst_share(error, rows) if finite else float("inf"),
        row_budgets=rows,
        channel_budgets=None,
        elements=int(counted.sum()),
        finite=finite,
        constant=False,
        kind=nodes.kind_of(key, back.config),
        place=nodes.layer_of(key, back.config),
        label=nodes.label_of(key, back.config),
    )
    return Judged(site, theirs, right, counted, dtype)


def _typical(bench: Bench, key: Key) -> np.ndarray:
    """What each row of a parameter's gradient is typically off, if every product that it sums is off by itself.

    Our own error is one of many: where it happens to be small it is no measure.
    """
    total: np.ndarray | float = 0.0
    epsilon = EPSILON[bench.dtype] / np.sqrt(3)
    for exact, narrow in zip(factors(bench.exact, key), factors(bench.narrow, key), strict=True):
        (gradient, x, rows), (gradient_off, x_off, _) = exact, narrow
        square = np.square(gradient_off - gradient) + np.square(epsilon * gradient)
        if x is None or x_off is None:
            square = np.nan_to_num(square)
            if rows is None:
                # A running sum in the dtype, as some engines take it over positions.
                partial = np.cumsum(gradient.reshape(-1, gradient.shape[-1]), axis=0)
                part = square.sum(axis=(0, 1)) + np.square(epsilon * partial).sum(axis=0)
            else:
                of_rows = square.sum(axis=-1, keepdims=True)
                part = add_rows(of_rows, rows, bench.exact.config.vocab_size)[:, 0]
        else:
            # Over what a row of the weight is multiplied with: |x|^2 of each position.
            read, read_off = (np.square(each).sum(axis=-1) for each in (x, x_off - x))
            part = np.einsum("BTo,BT->o", square, read) + np.einsum("BTo,BT->o", np.square(gradient), read_off)
        total = total + part
    return np.asarray(np.sqrt(total))


def _norms(
    counted: np.ndarray, values: np.ndarray, minus: np.ndarray | None = None, finite: bool = False
) -> np.ndarray:
    """L2 over the last axis of values, or of what they are beyond others, in float64; of vectors their sizes.

    Some rows at a time: an embedding's gradient in float64 takes a gigabyte, and so does each step of a formula.
    `finite` leaves out what is not a number.
    """
    shape = _rows(values).shape
    mask, whole = (_rows(each).reshape(-1, shape[-1]) for each in (counted, values))
    less = None if minus is None else _rows(minus).reshape(-1, shape[-1])
    norms = np.empty(len(whole))
    step = max(1, _BLOCK_ELEMENTS // max(1, shape[-1]))
    for begin in range(0, len(norms), step):
        rows = slice(begin, begin + step)
        block = np.asarray(whole[rows], np.float64)
        if less is not None:
            block = block - less[rows]
        norms[rows] = row_norms(np.nan_to_num(block) if finite else block, mask[rows])
    return norms.reshape(shape[:-1])


def _rows(values: np.ndarray) -> np.ndarray:
    """The values so that the last axis is a row: numbers of a vector each are one."""
    return values[:, None] if values.ndim == 1 else values


def _counted(back: Backward, key: Key, right: np.ndarray) -> np.ndarray:
    """Which values count: tokens', and those at padding that have to be 0; of shares the keys that a query sees."""
    if key.of_parameter:
        return np.broadcast_to(np.True_, right.shape)
    inputs = back.forward.inputs
    tokens = token_mask(inputs)
    if not key.per_pair:
        return np.broadcast_to(tokens[..., None] | (right == 0).all(axis=-1, keepdims=True), right.shape)
    if key.stage == "attn_softmax":
        return np.broadcast_to(back.visible(key.layer) & tokens[:, None, :, None], right.shape)
    return np.broadcast_to(tokens[:, None, :, None], right.shape)
