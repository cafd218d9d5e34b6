"""Token inputs: ids, mask and positions of a batch, from lists, arrays or files, checked before anything computes."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from converters import strict_json
from converters.errors import MissingFileError, UsageError

_MAX_BYTES = 256 << 20
MAX_POSITIONS = 1 << 20
"""Rotary tables are as long as the largest position; no Qwen2 reaches farther."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch in HuggingFace's convention.

    Attributes:
      input_ids: Token ids, int32 [B, T].
      attention_mask: 1 for tokens, 0 for padding (on either side), int32 [B, T].
      position_ids: Position of each token in its sequence, int32 [B, T]; meaningless at padding.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Inputs:
        """Builds a batch.

        Args:
          input_ids: [B, T] array, or a list of lists of equal or unequal length (shorter rows are padded on the right).
          attention_mask: [B, T]; None means no padding beyond that of unequal rows.
          position_ids: [B, T]; None counts the tokens of each row from 0, as HuggingFace's `generate` does.

        Raises:
          UsageError: Empty, ragged beyond one level, not integers, shapes that differ, or positions that do not rise
            along a row (a causal mask is built from them).
        """
        try:
            rows = [np.asarray(row) for row in input_ids]
        except (TypeError, ValueError):
            rows = []
        if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
            raise UsageError(
                "input ids are not a batch",
                code="input-ids",
                expected="a non-empty list of non-empty lists of token ids",
            )
        if any(row.dtype.kind not in "iu" for row in rows):
            raise UsageError("token ids are not integers", code="input-ids", found=sorted({str(r.dtype) for r in rows}))
        lengths = [len(row) for row in rows]
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        mask = np.zeros(ids.shape, np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        if attention_mask is not None:
            given = _like(attention_mask, ids, "attention_mask")
            if not np.isin(given, (0, 1)).all() or (given > mask).any():
                raise UsageError("attention_mask holds something else than 0 and 1", code="attention-mask")
            mask = given
        if not mask.any(axis=1).all():
            raise UsageError("a row of the batch has no token that is not masked", code="attention-mask")
        if position_ids is None:
            positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0)
        else:
            positions = _like(position_ids, ids, "position_ids")
        _check_rising(positions, mask)
        if (worst := int(positions[mask == 1].max())) >= MAX_POSITIONS:
            raise UsageError(
                "a position is out of range", code="position-ids", found=worst, expected=f"below {MAX_POSITIONS}"
            )
        if ids.min() < 0 or ids.max() >= 2**31:
            raise UsageError(
                "a token id is out of range", code="input-ids", found=int(ids.min() if ids.min() < 0 else ids.max())
            )
        return cls(ids.astype(np.int32), mask, positions)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UsageError if a token, padding included, is not below `vocab_size`."""
        worst = int(self.input_ids.max())
        if worst >= vocab_size:
            raise UsageError(
                "a token id is beyond the vocabulary", code="input-ids", found=worst, expected=f"below {vocab_size}"
            )

    def positions(self) -> np.ndarray:
        """Returns positions with -1 at padding, int32 [B, T]: what the model takes."""
        return np.where(self.attention_mask == 1, self.position_ids, np.int32(-1)).astype(np.int32)

    def next_token_pairs(self) -> np.ndarray:
        """Returns at which positions a token is followed by another one, bool [B, T - 1]."""
        return (self.attention_mask[:, :-1] == 1) & (self.attention_mask[:, 1:] == 1)

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return int(self.attention_mask.sum())


def seeded(vocab_size: int, batch: int = 2, length: int = 64, seed: int = 0) -> Inputs:
    """Returns `batch` rows of `length` tokens drawn uniformly from the vocabulary."""
    generator = np.random.default_rng(seed)
    return Inputs.of(generator.integers(0, vocab_size, (batch, length), dtype=np.int64))


def from_json(path: str | os.PathLike[str]) -> Inputs:
    """Reads a JSON list of lists of token ids.

    Raises:
      MissingFileError: No such file.
      BrokenContainerError: It is not JSON.
      UsageError: It holds something else.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFileError("no such file", code="file-missing", file=path) from None
    rows = strict_json.loads(data, what="input ids", max_bytes=_MAX_BYTES, file=os.fspath(path))
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and all(type(token) is int for token in row) for row in rows
    ):
        raise UsageError("not a list of lists of token ids", code="input-ids", file=path)
    return Inputs.of(rows)


def _like(values: Any, ids: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != ids.shape or array.dtype.kind not in "iub":
        raise UsageError(
            f"{name} does not match input_ids",
            code=name.replace("_", "-"),
            found=f"{array.dtype} {list(array.shape)}",
            expected=f"integers {list(ids.shape)}",
        )
    return array.astype(np.int32)


def _check_rising(positions: np.ndarray, mask: np.ndarray) -> None:
    for row, (row_positions, row_mask) in enumerate(zip(positions, mask, strict=True)):
        tokens: Sequence[int] = row_positions[row_mask == 1]
        if (np.diff(tokens) <= 0).any() or min(tokens) < 0:
            raise UsageError(
                f"position_ids do not rise along row {row}; the causal mask is built from them", code="position-ids"
            )
