"""Whether the head of a model is its embedding: what a checkpoint says of it, what holds, and whether both are equal.

What holds, the configuration says (config.json, or `hf_config` in its place); without one, whether there is a head.
`tied_embeddings` of an `.apr` decides nothing, since other writers set it beside heads of their own: but programs
believe it, so that it is worth a warning where it is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.qwen2 import HEAD, TIED
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import FindingError, RefusedError
from apr_jax.converters.formats.dtypes import element_count

if TYPE_CHECKING:
    import numpy as np

_COMPARED_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Statement:
    """What a checkpoint says of its head.

    Attributes:
      tied: Whether it says that the head is the embedding.
      where: Which key says so, in words.
    """

    tied: bool
    where: str


def stated(checkpoint: Checkpoint) -> Statement | None:
    """Returns what a checkpoint says of its head; of two places that disagree the one that says it is tied.

    A configuration without the key says that the head is not tied, as HuggingFace takes it for Qwen2. None: there is no
    configuration that can be read, and no `tied_embeddings`.
    """
    found = []
    given = checkpoint.metadata.get("tied_embeddings")
    if checkpoint.kind == "apr" and isinstance(given, bool):
        found.append(Statement(given, "tied_embeddings in the metadata"))
    if checkpoint.has_config:
        place = CONFIG_NAME if CONFIG_NAME in checkpoint.files else "hf_config"
        with contextlib.suppress(FindingError):
            found.append(Statement(bool(checkpoint.config.get(TIED, False)), f"{TIED} in {place}"))
    return next((statement for statement in found if statement.tied), found[0] if found else None)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head of the model that a checkpoint holds is its embedding, as the model is loaded.

    Of another model than those that are known here, a head without data tells.
    """
    try:
        return checkpoint.model_config().tie_word_embeddings
    except RefusedError:
        return HEAD in checkpoint.placeholders


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and, read exactly, the same values; ends at the first difference.

    Of one type they are the same if their bytes are. Between floating-point or quantised types signs of zeros count,
    payloads of NaN do not; other types are never the same.

    Raises:
      RefusedError: Values of two types that nothing here decodes.
      StorageError: They cannot be read.
    """
    if a.shape != b.shape:
        return False
    if a.dtype is b.dtype and a.nbytes == b.nbytes:
        # As bytes they are compared by memcmp, as memoryviews element by element.
        streams = zip(a.stream(_COMPARED_BYTES), b.stream(_COMPARED_BYTES), strict=True)
        return all(bytes(ours) == bytes(theirs) for ours, theirs in streams)
    if not all(tensor.dtype.is_float or tensor.dtype.is_block for tensor in (a, b)):
        return False
    if not a.shape or 0 in a.shape:
        return _same(a.read(), b.read())
    rows = max(1, _COMPARED_BYTES // (8 * element_count(a.shape[1:])))
    parts = (slice(row, row + rows) for row in range(0, a.shape[0], rows))
    return all(_same(a.read((part,)), b.read((part,))) for part in parts)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    import numpy as np

    a, b = (values.astype(np.float64) for values in (a, b))
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b))
