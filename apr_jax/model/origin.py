"""Where a model came from: what goes along, besides the tensors, when it is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a checkpoint holds beside its tensors. Some megabytes, for most is the tokenizer; no file stays open.

    Attributes:
      path: Of the checkpoint, as it was given.
      kind: "safetensors", or "apr" for an `.apr` of another writer, which holds no HuggingFace files.
      files: config.json, the tokenizer and other side files, name -> content.
      metadata: The `__metadata__` of safetensors, or all metadata of such an `.apr`; None if there is none.
    """

    path: str
    kind: str
    files: Mapping[str, bytes]
    metadata: Mapping[str, Any] | None

    def __repr__(self) -> str:
        return f"Origin({self.path!r}, {', '.join(self.files) or 'no files'})"
