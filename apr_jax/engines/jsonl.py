"""MaxText's golden logits: JSON lines with "tokens" and "logits", a prompt each; read and written, never pickles."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import BrokenContainerError, DumpError
from apr_jax.converters.formats import strict_json
from apr_jax.converters.storage.output import atomic_file
from apr_jax.engines import bounded
from apr_jax.engines.found import Found, of_array
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs

_MAX_BYTES = 1 << 30
# Lines of floats that are made into an array: one has the logits of a vocabulary.
_BUDGET = strict_json.Budget(48 << 20, 20)
_TOKENS = ("tokens", "prompt_tokens", "input_ids", "token_ids")


def read(path: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads a file of JSON lines; prompts of unequal length become rows padded on the right."""
    lines = [line for line in bounded.data(path, _MAX_BYTES).split(b"\n") if line.strip()]
    rows = [_line(line, number, path, config) for number, line in enumerate(lines, 1)]
    if not rows:
        raise DumpError("the file holds no prompt", code="nothing-compared", file=path)
    inputs = Inputs.of([tokens for tokens, _ in rows])
    logits = np.zeros((*inputs.input_ids.shape, config.vocab_size), np.float32)
    for row, (tokens, values) in enumerate(rows):
        logits[row, : len(tokens)] = values
    return Found({stages.LOGITS: of_array(logits, path)}, inputs)


def _line(line: bytes, number: int, path: pathlib.Path, config: Qwen2Config) -> tuple[list[int], np.ndarray]:
    content = strict_json.loads(
        line, what=f"line {number}", max_bytes=bounded.MAX_TEXT, budget=_BUDGET, file=os.fspath(path)
    )
    content = content if isinstance(content, dict) else {}
    tokens = next((content[name] for name in _TOKENS if isinstance(content.get(name), list)), None)
    if not tokens or not all(type(token) is int for token in tokens) or "logits" not in content:
        raise BrokenContainerError(
            f"line {number} is not a golden prompt",
            code="jsonl",
            file=path,
            expected='{"tokens": [...], "logits": [[...], ...]}',
            hint="Files of the kind whose logits are pickled are not read: generate them as jsonl with lists.",
        )
    try:
        values = np.asarray(content["logits"], np.float32)
    except (TypeError, ValueError):
        values = np.zeros(0, np.float32)
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.shape != (len(tokens), config.vocab_size):
        raise DumpError(
            f"the logits of line {number} do not fit this model",
            code="dump-size",
            file=path,
            tensor=stages.LOGITS,
            found=list(values.shape),
            expected=[len(tokens), config.vocab_size],
        )
    return tokens, values


def write(path: str | os.PathLike[str], inputs: Inputs, logits: np.ndarray, force: bool = False) -> None:
    """Writes logits [B, T, V] as such a file: one line for each row, without its padding."""
    lines = []
    for row, mask in enumerate(inputs.attention_mask == 1):
        tokens, values = inputs.input_ids[row, mask].tolist(), logits[row, mask]
        lines.append(json.dumps({"tokens": tokens, "logits": [[float(x) for x in each] for each in values]}))
    text = ("\n".join(lines) + "\n").encode()
    with atomic_file(os.fspath(path), len(text), force=force) as output:
        output.write_at(text, 0)
