"""Token inputs: ids, mask and positions of a batch, from lists, arrays or files, checked before anything computes.

For programs that read nothing else a batch is also written as plain files (`write_plain`): each of `input_ids`,
`attention_mask` and `position_ids` as little-endian integers [B, T] in C order, `NAME.2x64.i32` and `NAME.2x64.i64` for
two rows of 64 tokens, and all of them in `inputs.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import reprlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.errors import BrokenContainerError, MissingFileError, UsageError, in_file
from apr_jax.converters.formats import strict_json
from apr_jax.converters.storage.output import FolderKind, atomic_folder
from apr_jax.converters.storage.source import SourceFile, read_whole
from apr_jax.converters.storage.temporaries import Notice

# Two million tokens, an id of seven digits each.
_MAX_BYTES = 16 << 20
# Positions of a batch, 16 bytes each here, of which more than half may be padding.
_MAX_PADDED = 1 << 21
TOKEN_IDS = "token_ids.json"
"""The token ids of one sequence as `apr` and others leave them beside a dump: a JSON list."""
PLAIN = "inputs.json"
_NAMES = ("input_ids", "attention_mask", "position_ids")
_RAW = re.compile(rf"({'|'.join(_NAMES)})\.(\d+)x(\d+)\.i(32|64)")
PLAIN_FOLDER = FolderKind(
    "folder of inputs",
    holds=lambda name: name == PLAIN or _RAW.fullmatch(name) is not None,
    shows=lambda name: name == PLAIN,
)
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

    def __repr__(self) -> str:
        rows, length = self.input_ids.shape
        return f"Inputs({rows} rows of {length} positions, {self.tokens} tokens)"

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Inputs:
        """Builds a batch.

        Args:
          input_ids: [B, T] array, or a list of lists of equal or unequal length (shorter rows are padded on the right).
          attention_mask: [B, T]; None means no padding beyond that of unequal rows.
          position_ids: [B, T]; None counts the tokens of each row from 0, as HuggingFace's `generate` does.

        Raises:
          UsageError: Empty, ragged beyond one level, not integers, rows too unequal to be padded, shapes that differ,
            or positions that do not rise along a row (a causal mask is built from them).
        """
        refuse_traced(input_ids, attention_mask, position_ids)
        try:
            rows = [np.asarray(row) for row in input_ids]
        except (TypeError, ValueError):
            rows = []
        if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
            raise UsageError(
                "input ids are not a batch",
                code="input-ids",
                expected="a non-empty list of non-empty lists of token ids",
                hint=_how_to_make_a_batch(input_ids, rows),
            )
        if any(row.dtype.kind not in "iu" for row in rows):
            raise UsageError(
                "token ids are not integers",
                code="input-ids",
                found=sorted({str(r.dtype) for r in rows}),
                hint="Convert them: numpy.asarray(ids, numpy.int32)",
            )
        lengths = [len(row) for row in rows]
        if len(rows) * max(lengths) > max(_MAX_PADDED, 2 * sum(lengths)):
            raise UsageError(
                "the rows are too unequal: most of the batch would be padding",
                code="input-ids",
                found=f"{len(rows)} rows, {sum(lengths)} tokens, {max(lengths)} of them in one row",
                hint="Run short and long sequences apart",
            )
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        mask = np.zeros(ids.shape, np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        if attention_mask is not None:
            given = _like(attention_mask, ids, "attention_mask")
            if not np.isin(given, (0, 1)).all() or (given > mask).any():
                raise UsageError(
                    "attention_mask holds something else than 0 and 1, or marks what is no token",
                    code="attention-mask",
                    found=np.unique(given)[:5].tolist(),
                    hint="1 stands for a token, 0 for padding",
                )
            mask = given.astype(np.int32)
        if not mask.any(axis=1).all():
            raise UsageError(
                "a row of the batch has no token that is not masked",
                code="attention-mask",
                found=f"row {int(mask.any(axis=1).argmin())}",
                hint="Leave the row out, or set its mask to 1 where it has tokens",
            )
        if position_ids is None:
            positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int64) - 1, 0)
        else:
            positions = _like(position_ids, ids, "position_ids")
        _check_rising(positions, mask)
        if (worst := int(positions[mask == 1].max())) >= MAX_POSITIONS:
            raise UsageError(
                "a position is out of range", code="position-ids", found=worst, expected=f"below {MAX_POSITIONS}"
            )
        if ids.min() < 0 or ids.max() >= 2**31:
            raise UsageError(
                "a token id is out of range",
                code="input-ids",
                found=int(ids.min() if ids.min() < 0 else ids.max()),
                hint="Padding is said by attention_mask; its id may be any of the vocabulary",
            )
        return cls(ids.astype(np.int32), mask, positions.astype(np.int32))

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

    @property
    def tokens(self) -> int:
        """Number of positions that are not padding."""
        return int(self.attention_mask.sum())

    @property
    def sequence(self) -> Inputs:
        """The batch whose keys the tokens see: this one, or what it is an excerpt of."""
        return self

    def places(self) -> np.ndarray:
        """Returns which columns of `sequence` the tokens are, int [T]."""
        return np.arange(self.input_ids.shape[1])


@dataclasses.dataclass(frozen=True, repr=False)
class Excerpt(Inputs):
    """Some columns of a long batch: a batch whose tokens see the keys of all of it.

    Attributes:
      whole: The batch.
      columns: Which of its columns, rising, int [T].
    """

    whole: Inputs
    columns: np.ndarray

    @classmethod
    def taken(cls, whole: Inputs, columns: np.ndarray) -> Excerpt:
        """Returns the columns of a batch."""
        ids, mask, positions = (x[:, columns] for x in (whole.input_ids, whole.attention_mask, whole.position_ids))
        return cls(ids, mask, positions, whole, columns)

    @property
    def sequence(self) -> Inputs:
        """The whole batch."""
        return self.whole

    def places(self) -> np.ndarray:
        """Returns which columns of the whole batch these are."""
        return self.columns


def refuse_traced(*values: Any) -> None:
    """Raises UsageError, code "traced", if one of `values` is an array that JAX traces and that holds no numbers."""
    jax = sys.modules.get("jax")
    if jax is not None and any(isinstance(value, jax.core.Tracer) for value in values):
        raise UsageError(
            "this works on numbers, but was called inside jax.jit, jax.grad, jax.vmap or another transform",
            code="traced",
            hint="Call `model.module(input_ids, positions, attention_mask)` there: a pure function of its parameters",
        )


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
    rows = _json(path, "input ids")
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and all(type(token) is int for token in row) for row in rows
    ):
        raise UsageError(
            "not a list of lists of token ids",
            code="input-ids",
            file=path,
            found=reprlib.repr(rows),
            hint="A JSON list with a list for each row: [[1, 2, 3]]",
        )
    with in_file(path):
        return Inputs.of(rows)


def write_plain(
    folder: str | os.PathLike[str],
    inputs: Inputs,
    force: bool = False,
    sources: Iterable[str] = (),
    notice: Notice | None = None,
) -> None:
    """Writes a batch as plain files, atomically.

    Args:
      folder: Where to.
      inputs: The batch.
      force: Whether an existing folder of inputs may be replaced.
      sources: Files and folders that it was made from; none of them is replaced.
      notice: Told about leftovers of earlier runs, and what this one has to leave.

    Raises:
      UsageError: The folder exists and `force` is not given, it holds something else, or it is one of the sources.
    """
    arrays = {name: getattr(inputs, name) for name in _NAMES}
    batch, length = inputs.input_ids.shape
    content = {"shape": [batch, length]} | {name: array.tolist() for name, array in arrays.items()}
    files = {PLAIN: json.dumps(content).encode()}
    for name, array in arrays.items():
        for bits in (32, 64):
            files[f"{name}.{batch}x{length}.i{bits}"] = array.astype(f"<i{bits // 8}").tobytes()
    size = sum(map(len, files.values()))
    with atomic_folder(
        os.fspath(folder), size, kind=PLAIN_FOLDER, force=force, sources=sources, notice=notice
    ) as output:
        for name, data in files.items():
            with output.create(name, len(data)) as file:
                file.write_at(data, 0)


def paths_of(path: str | os.PathLike[str] | None) -> list[str]:
    """Returns what an input that was named consists of: a file, or a folder and the files in it."""
    if path is None:
        return []
    within = os.listdir(path) if os.path.isdir(path) else []
    return [os.fspath(path), *(os.path.join(path, name) for name in sorted(within))]


def beside(folder: str | os.PathLike[str]) -> Inputs:
    """Reads the inputs that lie in a folder: `token_ids.json`, `inputs.json`, or integers as `write_plain` writes them.

    Raises:
      MissingFileError: No such folder, or none of these in it.
      BrokenContainerError, UsageError: They hold something else.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise MissingFileError("no such folder", code="file-missing", file=root)
    if (path := root / TOKEN_IDS).is_file():
        return _token_ids(path)
    if (path := root / PLAIN).is_file():
        return from_mapping(_json(path, "inputs"), path)
    arrays = {}
    for path in sorted(root.iterdir()):
        if (found := _RAW.fullmatch(path.name)) and path.is_file():
            arrays[found[1]] = _raw(path, int(found[2]), int(found[3]), int(found[4]) // 8)
    if "input_ids" not in arrays:
        raise MissingFileError(
            "there is no record of the tokens that were run",
            code="token-ids-missing",
            file=root,
            expected=f"{TOKEN_IDS}, or what golden --export-inputs writes",
            hint="Or say which tokens were run with --input-ids FILE.",
        )
    with in_file(root):
        return Inputs.of(*(arrays.get(name) for name in _NAMES))


def from_mapping(content: Any, file: str | os.PathLike[str]) -> Inputs:
    """Takes a batch out of a JSON object: "input_ids" and, where given, "attention_mask" and "position_ids"."""
    if not isinstance(content, dict) or "input_ids" not in content:
        raise BrokenContainerError('no "input_ids" in it', code="token-ids", file=file, found=reprlib.repr(content))
    try:
        with in_file(file):
            return Inputs.of(*(content.get(name) for name in _NAMES))
    except (TypeError, ValueError, OverflowError) as error:
        raise BrokenContainerError(
            f"not a batch of tokens: {error}", code="token-ids", file=file, found=reprlib.repr(content)
        ) from None


def _token_ids(path: pathlib.Path) -> Inputs:
    ids = _json(path, "token ids")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise BrokenContainerError("not a list of token ids", code="token-ids", file=path, found=reprlib.repr(ids))
    with in_file(path):
        return Inputs.of([ids])


def _json(path: str | os.PathLike[str], what: str) -> Any:
    return strict_json.loads(read_whole(path, _MAX_BYTES, what), what=what, max_bytes=_MAX_BYTES, file=os.fspath(path))


def _raw(path: pathlib.Path, batch: int, length: int, width: int) -> np.ndarray:
    with SourceFile(path) as source:
        if source.size != batch * length * width or source.size > _MAX_BYTES:
            raise BrokenContainerError(
                "the size is not what the name says",
                code="inputs-size",
                file=path,
                found=f"{source.size} bytes",
                expected=f"{batch} x {length} integers of {width} bytes, {_MAX_BYTES} bytes at most",
            )
        data = source.read_at(0, source.size)
    return np.frombuffer(data, f"<i{width}").reshape(batch, length)


def _how_to_make_a_batch(input_ids: Any, rows: Sequence[np.ndarray]) -> str | None:
    if isinstance(input_ids, str) or any(row.dtype.kind in "US" for row in rows):
        return "For text, apr_jax.load_generator(path) has `generate`, and `tokenizer.encode`, which makes token ids"
    if rows and all(row.ndim == 0 for row in rows):
        return "One sequence is a batch of one row: [[5, 6, 7]], not [5, 6, 7]"
    return None


def _like(values: Any, ids: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != ids.shape or array.dtype.kind not in "iub":
        raise UsageError(
            f"{name} does not match input_ids",
            code=name.replace("_", "-"),
            found=f"{array.dtype} {list(array.shape)}",
            expected=f"integers {list(ids.shape)}",
        )
    return array.astype(np.int64)  # wide, so that what is out of range is seen


def _check_rising(positions: np.ndarray, mask: np.ndarray) -> None:
    for row, (row_positions, row_mask) in enumerate(zip(positions, mask, strict=True)):
        tokens: Sequence[int] = row_positions[row_mask == 1]
        if (np.diff(tokens) <= 0).any() or min(tokens) < 0:
            raise UsageError(
                f"position_ids do not rise along row {row}; the causal mask is built from them",
                code="position-ids",
                found=[int(position) for position in tokens[:8]],
                hint="Give rows whose positions rise, and sequences that were packed together one to a row",
            )
