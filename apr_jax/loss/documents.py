"""Texts, conversations and token ids as documents: what a loss is computed over, and which of its tokens count.

A document is one text of its own: a text file, a line of a .jsonl file, or a row of token ids. Nothing is predicted
across the border of two documents. A line of a .jsonl file is one JSON object:

    {"text": "..."}                                       every token counts but the first, which nothing predicts
    {"messages": [{"role": ..., "content": ...}, ...]}    the assistant's tokens count ("tools": [...] may be given)
    {"input_ids": [...], "labels": [...]}                 tokens whose label is -100 do not count, as in PyTorch
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.errors import BrokenContainerError, UsageError
from apr_jax.converters.formats import strict_json
from apr_jax.converters.storage.source import read_whole
from apr_jax.generate import tokenizer_files
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.trace import golden

_MAX_TEXT, _MAX_LINE = 1 << 30, 64 << 20
_KINDS = ('"text"', '"messages"', '"input_ids"')


@dataclasses.dataclass(frozen=True)
class Document:
    """One sequence of tokens.

    Attributes:
      source: The file that it is from.
      ids: Its tokens, int32 [N].
      counted: Which of them the loss is over, bool [N]; the first counts nowhere, since nothing predicts it.
      size: How many bytes of UTF-8 the text has; None for token ids and conversations.
    """

    source: str
    ids: np.ndarray
    counted: np.ndarray
    size: int | None = None


def of_texts(paths: Sequence[str], tokenizer: Tokenizer | None) -> list[Document]:
    """Reads text files, each one document.

    Raises:
      MissingFileError: There is no such file.
      BrokenContainerError: It is not UTF-8.
      RefusedError: There is no tokenizer, or it cannot encode it.
    """
    documents = []
    for path in paths:
        data = read_whole(path, _MAX_TEXT, "text")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise BrokenContainerError(
                "the text is not UTF-8",
                code="text-encoding",
                file=path,
                offset=error.start,
                hint="Convert it: iconv -f LATIN1 -t UTF-8 FILE",
            ) from None
        documents.append(_everything(path, _needed(tokenizer, path).encode(text), len(data)))
    return documents


def of_lines(path: str, tokenizer: Tokenizer | None, chat_template: str | None = None) -> list[Document]:
    """Reads a .jsonl file; each line that is not empty is a document.

    Args:
      path: The file.
      tokenizer: Of the checkpoint; None leaves lines of "input_ids".
      chat_template: Name or text of the chat template; None takes the checkpoint's.

    Raises:
      MissingFileError: There is no such file.
      BrokenContainerError: A line is not a JSON object of one of the three kinds.
      RefusedError: A conversation, and the template does not mark what the assistant says.
    """
    documents = []
    for number, line in enumerate(read_whole(path, _MAX_TEXT, "text").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        content = strict_json.loads(line, what="line", max_bytes=_MAX_LINE, file=where)
        documents.append(_of_line(content, tokenizer, chat_template, path, where))
    return documents


def of_token_ids(path: str | os.PathLike[str]) -> list[Document]:
    """Reads a batch of token ids (`golden.read_inputs`); each row is a document, its padding left out.

    Raises:
      AprJaxError: As `golden.read_inputs`.
    """
    inputs = golden.read_inputs(path)
    rows = zip(inputs.input_ids, inputs.attention_mask, strict=True)
    return [_everything(os.fspath(path), row[mask == 1], None) for row, mask in rows]


def _of_line(content: Any, tokenizer: Tokenizer | None, chat_template: str | None, path: str, where: str) -> Document:
    if isinstance(content, dict) and isinstance(content.get("input_ids"), list):
        return _of_ids(content, path, where)
    if isinstance(content, dict) and isinstance(text := content.get("text"), str):
        return _everything(path, _needed(tokenizer, where).encode(text), len(text.encode()))
    if isinstance(content, dict) and isinstance(messages := content.get("messages"), list):
        ids, counted = _needed(tokenizer, where).encode_marked_chat(
            messages, tools=content.get("tools"), chat_template=chat_template
        )
        return Document(path, np.asarray(ids, np.int32), _but_the_first(np.asarray(counted, bool)))
    raise BrokenContainerError(
        "a line holds nothing that a loss can be computed over",
        code="loss-line",
        file=where,
        expected=f"a JSON object with {', '.join(_KINDS[:-1])} or {_KINDS[-1]}",
    )


def _of_ids(content: dict[str, Any], path: str, where: str) -> Document:
    ids, labels = content["input_ids"], content.get("labels", content["input_ids"])
    if not isinstance(labels, list) or not all(type(number) is int for number in (*ids, *labels)):
        raise BrokenContainerError("token ids are not integers", code="loss-line", file=where)
    if len(labels) != len(ids):
        raise BrokenContainerError(
            "the number of labels is not the number of tokens",
            code="loss-labels",
            file=where,
            found=f"{len(labels)} labels",
            expected=f"{len(ids)}",
        )
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, golden.IGNORED):
            raise BrokenContainerError(
                "a label is neither its token nor ignored; a model shifts them itself",
                code="loss-labels",
                file=where,
                found=f"label {label} at token {at}, which is {token}",
                expected=f"{token}, or {golden.IGNORED} where the token does not count",
            )
    return Document(path, _int32(ids, where), _but_the_first(np.asarray(labels, np.int64) != golden.IGNORED))


def _everything(source: str, ids: Sequence[int] | np.ndarray, size: int | None) -> Document:
    array = _int32(ids, source)
    return Document(source, array, _but_the_first(np.ones(len(array), bool)), size)


def _int32(ids: Sequence[int] | np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(ids, np.int64).reshape(-1)
    if array.size and not 0 <= array.min() <= array.max() < 2**31:
        raise UsageError("a token id is out of range", code="input-ids", file=where, expected="0 to 2**31 - 1")
    return array.astype(np.int32)


def _but_the_first(counted: np.ndarray) -> np.ndarray:
    counted[:1] = False
    return counted


def _needed(tokenizer: Tokenizer | None, where: str) -> Tokenizer:
    if tokenizer is None:
        raise tokenizer_files.missing(where)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a document that the model sees at once.

    Attributes:
      document: The document's number.
      start: Its first token.
      end: One behind its last.
      first: The first token whose loss is taken from this window; the others were scored with more before them.
    """

    document: int
    start: int
    end: int
    first: int


def windows(documents: Sequence[Document], length: int, stride: int) -> Iterator[Window]:
    """Yields the windows of all documents, as transformers' guide to perplexity of fixed-length models places them.

    A window begins every `stride` tokens and reaches over `length`; each token is scored in the first window that
    reaches it, and not at a window's own first place, where nothing predicts it. So a stride that is as long as the
    window leaves one token of each out.
    """
    for number, document in enumerate(documents):
        done, total = 0, len(document.ids)
        for start in range(0, total, stride):
            end = min(start + length, total)
            yield Window(number, start, end, max(done, start + 1))
            done = end
            if end == total:
                break
