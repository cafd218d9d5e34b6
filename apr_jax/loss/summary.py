"""What a loss means: nats and bits, per token and per byte, beside the uniform distribution, and what is odd."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from apr_jax.loss.documents import Document
from apr_jax.loss.scoring import Scores

_NEARLY_CONSTANT = 0.9
_MOSTLY_UNKNOWN = 0.1


@dataclasses.dataclass(frozen=True)
class Loss:
    """The mean loss over some tokens.

    Attributes:
      tokens: How many there are in all.
      scored: Over how many the mean is: those that count and that something predicts.
      nats: Mean of -log p; NaN over no tokens.
      total_nats: Sum of the same.
      size: Bytes of UTF-8 of the texts; None if some of it is no text.
    """

    tokens: int
    scored: int
    total_nats: float
    size: int | None

    @classmethod
    def of(cls, documents: Sequence[Document], scores: Sequence[Scores]) -> Loss:
        """Sums the losses of documents in float64."""
        taken = [scored.loss[counts(document, scored)] for document, scored in zip(documents, scores, strict=True)]
        sizes = [document.size for document in documents]
        return cls(
            sum(len(document.ids) for document in documents),
            sum(map(len, taken)),
            math.fsum(float(losses.sum(dtype=np.float64)) for losses in taken),
            None if None in sizes else sum(size or 0 for size in sizes),
        )

    @property
    def nats(self) -> float:
        """Mean over the scored tokens."""
        return self.total_nats / self.scored if self.scored else math.nan

    def to_json(self) -> dict[str, Any]:
        """Returns the loss in every unit."""
        return {
            "tokens": self.tokens,
            "scored": self.scored,
            "loss_nats": self.nats,
            "loss_bits": self.nats / math.log(2),
            "perplexity": math.exp(self.nats) if self.nats < 700 else math.inf,
            "bytes": self.size,
            "bits_per_byte": self.total_nats / math.log(2) / self.size if self.size else None,
        }


def counts(document: Document, scores: Scores) -> np.ndarray:
    """Returns which tokens the loss is over: those that count and whose loss was computed, bool [N]."""
    return document.counted & ~np.isnan(scores.log_total)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the tokens of the documents are like.

    Attributes:
      unknown: Share of tokens that are the tokenizer's unknown token; None without such a token.
      distinct: How many different tokens there are.
      never_seen: Share of the vocabulary that does not occur.
      most_frequent: The most frequent token.
      its_share: Its share.
    """

    unknown: float | None
    distinct: int
    never_seen: float
    most_frequent: int
    its_share: float

    @classmethod
    def of(cls, documents: Iterable[Document], vocab_size: int, unknown_token: int | None) -> Corpus:
        """Counts tokens; there has to be one."""
        counter: collections.Counter[int] = collections.Counter()
        for document in documents:
            values, numbers = np.unique(document.ids, return_counts=True)
            counter.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        total = counter.total()
        ((token, number),) = counter.most_common(1)
        unknown = None if unknown_token is None else counter[unknown_token] / total
        return cls(unknown, len(counter), 1 - len(counter) / vocab_size, token, number / total)


def oddities(loss: Loss, corpus: Corpus, vocab_size: int) -> list[str]:
    """Says in words what makes a loss suspicious."""
    said = []
    uniform = math.log(vocab_size)
    if not math.isfinite(loss.total_nats):
        said.append("the loss is not finite: some logits are NaN or infinite")
    elif loss.nats > uniform:
        said.append(
            f"the loss is above uniform, {loss.nats:.4f} nats against ln({vocab_size}) = {uniform:.4f}: the model does "
            "worse than guessing, so that weights, tokenizer or forward pass do not belong together"
        )
    if corpus.its_share > _NEARLY_CONSTANT and loss.scored > 1:
        said.append(
            f"the texts are nearly constant: {corpus.its_share:.2%} of the tokens are token {corpus.most_frequent}"
        )
    if corpus.unknown is not None and corpus.unknown > _MOSTLY_UNKNOWN:
        said.append(
            f"{corpus.unknown:.2%} of the tokens are the tokenizer's unknown token: the loss says how well the model "
            "predicts that one"
        )
    return said
