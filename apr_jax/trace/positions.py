"""Which positions of a batch a dump holds, and which entries of its values count when two sides are compared.

A dump may hold some positions only: decoding steps, or the logits of the last token. Its values are then rows
[B, R, ...] (attention stages [B, N, R, T]: every row has all keys), and `columns` [B, R] say where in the batch they
stand. To be judged they are completed to the whole length: what the other side did not dump is ours, so that its rows
are computed from its own values at the dumped positions and from right ones before them.

What counts are tokens, not padding; of attention stages the keys that a query sees; of a dump of some positions these.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import MissingFileError, RefusedError, UsageError
from apr_jax.converters.formats import strict_json
from apr_jax.converters.storage.source import read_whole
from apr_jax.trace import stages
from apr_jax.trace.inputs import MAX_POSITIONS, Inputs
from apr_jax.trace.stages import Key

_MAX_BYTES = 16 << 20

Positions = Sequence[int] | Sequence[Sequence[int]]
"""Positions of the dumped rows: one list for all rows of the batch, or one for each."""


def parse_positions(text: str) -> Positions:
    """Reads what `--positions` says: "64-71", "0,64-71" (both ends included), or the name of a JSON file.

    Raises:
      MissingFileError: It is no list, and no such file exists.
      BrokenContainerError: The file is not JSON.
      UsageError: A range that goes backwards, or a file that holds something else.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return positions_from_json(text)
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        # By their length first: Python refuses to read numbers of thousands of digits.
        if max(len(first), len(last)) > 9 or int(last or first) >= MAX_POSITIONS or len(found) > MAX_POSITIONS:
            raise UsageError(
                "a position is out of range", code="positions", found=part[:80], expected=f"below {MAX_POSITIONS}"
            )
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise UsageError("a range of positions goes backwards", code="positions", found=text, expected="such as 64-71")
    return found


def positions_from_json(path: str | os.PathLike[str]) -> Positions:
    """Reads a JSON list of positions, or a list of such lists, one for each row of the batch."""
    if not os.path.exists(path) or os.path.isdir(path):
        raise MissingFileError(
            "neither a list of positions nor a file", code="positions", file=path, expected="64-71, or a JSON file"
        )
    data = read_whole(path, _MAX_BYTES, "positions")
    return checked_positions(
        strict_json.loads(data, what="positions", max_bytes=_MAX_BYTES, file=os.fspath(path)), path
    )


def checked_positions(value: object, file: str | os.PathLike[str]) -> Positions:
    """Returns `value` if it is a list of positions, or of such lists; else raises UsageError."""
    lists = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if all(isinstance(one, list) and one and all(type(position) is int for position in one) for one in lists):
        return value  # type: ignore[return-value]
    raise UsageError(
        "not a list of positions",
        code="positions",
        file=file,
        found=reprlib.repr(value),
        expected="such as [64, 65, 66]",
    )


def find_columns(positions: Positions, inputs: Inputs) -> np.ndarray:
    """Returns the columns of the batch at which each of its rows has these positions, int [B, R].

    Raises:
      UsageError: A position that a row does not have; positions that do not rise; lists of unequal length.
    """
    batch = len(inputs.input_ids)
    same = [position for position in positions if isinstance(position, int)]
    given = [list(one) for one in positions if isinstance(one, Sequence)] or [same] * batch
    if len(given) != batch or len({len(one) for one in given}) != 1:
        raise UsageError(
            "the positions do not fit the batch",
            code="positions",
            found=f"{len(given)} lists of {sorted({len(one) for one in given})} positions",
            expected=f"one list for all rows, or {batch} of the same length",
        )
    columns = []
    for row, (wanted, known) in enumerate(zip(given, inputs.positions(), strict=True)):
        where = {int(position): column for column, position in enumerate(known) if position >= 0}
        strange = [position for position in wanted if position not in where]
        if strange or any(second <= first for first, second in itertools.pairwise(wanted)):
            raise UsageError(
                f"not positions of the tokens in row {row}, rising",
                code="positions",
                found=(strange or wanted)[:8],
                expected=f"of {min(where)} to {max(where)}",
            )
        columns.append([where[position] for position in wanted])
    return np.array(columns)


def last_columns(inputs: Inputs) -> np.ndarray:
    """Returns the column of the last token of each row, int [B, 1]."""
    return np.where(token_mask(inputs), np.arange(inputs.input_ids.shape[1]), -1).max(axis=1)[:, None]


def shown_positions(inputs: Inputs, columns: np.ndarray) -> str:
    """Returns the positions at `columns` as text, in ranges: "64-71"."""
    positions = sorted(set(np.take_along_axis(inputs.positions(), columns, axis=1).ravel().tolist()) - {-1})
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1] + 1:
            ranges[-1][1] = position
        else:
            ranges.append([position, position])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


# --- Values ----------------------------------------------------------------------------------------------------------


def position_axis(key: str) -> int:
    """Returns the axis of a stage's values that runs over positions, batch axis counted."""
    return 2 if Key(key).per_pair else 1


def dumped_columns(key: str, count: int, inputs: Inputs, columns: np.ndarray | None) -> np.ndarray | None:
    """Returns the columns that `count` rows of a stage stand for; None if they are all there, or fit nothing."""
    if count == inputs.input_ids.shape[1]:
        return None
    if columns is not None and count == columns.shape[1]:
        return columns
    return last_columns(inputs) if count == 1 and not Key(key).per_pair else None


def dumped_shape(
    config: Qwen2Config,
    key: str,
    size: int,
    inputs: Inputs,
    columns: np.ndarray | None,
    file: str | os.PathLike[str],
) -> tuple[int, ...]:
    """Returns the shape [B, T or R, ...] of a stage of which a file holds `size` elements.

    Raises:
      RefusedError: Neither all positions, nor those at `columns`, nor the last token have that many. Engines compute
        logits, and what comes before them behind the last attention, of the last token alone.
    """
    batch, length = inputs.input_ids.shape
    counts = [length, *([] if columns is None else [columns.shape[1]]), *([] if Key(key).per_pair else [1])]
    whole, axis = (batch, *stages.shape(config, Key(key).stage, length)), position_axis(key)
    shapes = [(*whole[:axis], count, *whole[axis + 1 :]) for count in counts]
    for shape in shapes:
        if math.prod(shape) == size:
            return shape
    raise RefusedError(
        "the number of elements does not fit this model and these tokens",
        code="dump-size",
        file=file,
        tensor=key,
        found=size,
        expected=" or ".join(f"{math.prod(shape)}, that is {list(shape)}" for shape in dict.fromkeys(shapes)),
        hint="--positions says which it holds, where it does not hold all",
    )


def gather_positions(key: str, values: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """Returns the rows of a stage's whole values [B, T, ...], or of a mask of them, that stand at `columns`.

    Values that are such rows already are returned as they are, and so is everything without `columns`.
    """
    if columns is None or values.shape[position_axis(key)] == columns.shape[1]:
        return values
    index = columns[:, None, :, None] if position_axis(key) == 2 else columns[..., *([None] * (values.ndim - 2))]
    return np.take_along_axis(values, index, axis=position_axis(key))


def scatter_positions(key: str, whole: np.ndarray, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns `whole` [B, T, ...] with rows [B, R, ...] put in at `columns`, in their dtype."""
    made = whole.astype(values.dtype)
    index = columns[:, None, :, None] if position_axis(key) == 2 else columns[..., *([None] * (values.ndim - 2))]
    np.put_along_axis(made, index, values, axis=position_axis(key))
    return made


@dataclasses.dataclass(frozen=True)
class Dumped:
    """Another engine's values at the whole length.

    Attributes:
      values: Trace key -> [B, T, ...]; positions that were not dumped hold ours or, of logits, 0: no stage follows
        them.
      columns: For the stages of which some positions were dumped: which, [B, R].
    """

    values: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]

    @property
    def partial(self) -> bool:
        """Whether a stage that others follow was dumped at some positions only."""
        return bool(self.columns.keys() - {stages.LOGITS})

    def rows(self) -> dict[str, np.ndarray]:
        """Returns what was dumped, as it was: [B, T, ...] or rows [B, R, ...]."""
        return {key: gather_positions(key, value, self.columns.get(key)) for key, value in self.values.items()}

    def over(self, trace: Mapping[str, np.ndarray]) -> Dumped:
        """Returns the same dump with the values of another trace where it holds none."""
        values, rows = dict(self.values), self.rows()
        for key in (self.columns.keys() & trace.keys()) - {stages.LOGITS}:
            values[key] = scatter_positions(key, trace[key], rows[key], self.columns[key])
        return Dumped(values, self.columns)


def complete(
    theirs: Mapping[str, np.ndarray],
    inputs: Inputs,
    columns: np.ndarray | None = None,
    ours: Callable[[], Mapping[str, np.ndarray]] = dict,
) -> Dumped:
    """Completes a dump to the whole length.

    Args:
      theirs: Trace key -> [B, T, ...], or rows [B, R, ...]. Logits may hold the last position only.
      inputs: The batch.
      columns: Which columns the rows of a partial dump stand for, [B, R].
      ours: Gives a trace for what the other side did not dump; called only if something is missing that a stage
        depends on.
    """
    values, columns_of = dict(theirs), {}
    for key, rows in theirs.items():
        axis, length = position_axis(key), inputs.input_ids.shape[1]
        part = dumped_columns(key, rows.shape[axis], inputs, columns)
        if part is not None:
            nothing = np.zeros((*rows.shape[:axis], length, *rows.shape[axis + 1 :]), rows.dtype)
            values[key], columns_of[key] = scatter_positions(key, nothing, rows, part), part
    dumped = Dumped(values, columns_of)
    return dumped.over(ours()) if dumped.partial else dumped


# --- What counts -----------------------------------------------------------------------------------------------------


def token_mask(inputs: Inputs) -> np.ndarray:
    """Returns which positions hold a token and no padding, bool [B, T]."""
    return inputs.attention_mask == 1


def next_token_pairs(inputs: Inputs) -> np.ndarray:
    """Returns at which positions a token is followed by another one, bool [B, T - 1]: what a loss is over."""
    tokens = token_mask(inputs)
    return tokens[:, :-1] & tokens[:, 1:]


def predicted_pairs(inputs: Inputs, counted: np.ndarray | None = None) -> np.ndarray:
    """Returns which positions predict a token that a loss is over, bool [B, T - 1].

    `counted` says which tokens count, bool [B, T]; None is all.
    """
    pairs = next_token_pairs(inputs)
    return pairs if counted is None else pairs & counted[:, 1:]


def dumped_tokens(inputs: Inputs, columns: np.ndarray | None) -> np.ndarray:
    """Returns which positions hold a token and are the other side's, bool [B, T]."""
    tokens = token_mask(inputs)
    if columns is None:
        return tokens
    dumped = np.zeros_like(tokens)
    np.put_along_axis(dumped, columns, True, axis=1)
    return tokens & dumped


def visible(queries: np.ndarray, keys: np.ndarray, window: int | None = None) -> np.ndarray:
    """Which keys each query sees: positions [B, R] and [B, T], -1 at padding -> bool [B, R, T].

    A key is seen at the query's own position and before it, with a window at that many positions in all; padding is
    never seen and sees nothing. In programs the same is `qwen2.visible`.
    """
    seen = (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])
    return seen if window is None else seen & (keys[:, None, :] > queries[:, :, None] - window)


def compared_positions(
    key: str,
    inputs: Inputs,
    shape: tuple[int, ...],
    columns: np.ndarray | None = None,
    window: int | None = None,
) -> np.ndarray:
    """Which entries of a stage's values count.

    Args:
      key: The stage's key in a trace.
      inputs: The batch.
      shape: Shape of the values: [B, T, ...], or of rows [B, R, ...].
      columns: Which columns of the batch the rows stand for, [B, R]; None where they are all there.
      window: How many keys a query of the stage's layer sees; None is all before it.

    Returns:
      bool [B, T or R] for stages with rows, the whole `shape` for attention stages.
    """
    positions = inputs.positions()
    queries = positions if columns is None else np.take_along_axis(positions, columns, axis=1)
    if not Key(key).per_pair:
        return queries >= 0
    return np.broadcast_to(visible(queries, inputs.sequence.positions(), window)[:, None], shape)
