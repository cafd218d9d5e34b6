"""Holds another engine's losses against ours, and names what is wrong with them.

The other side gives the loss of each token, a mean over all of them, or both. A mistake is named only if it reproduces
the values: its number, where it has one, is solved for from all tokens at once. What is computed from logits that are
the model's own is tried: wrong logits are parity's business.

The file is safetensors and holds at least one of

    losses        one value for each token that counts, in order; or for each token, or for each but the first of every
                  document (NaN, 0 or anything where the token does not count); any shape; or [B, T] or [B, T - 1] of
                  documents that are padded to one length, on either side
    loss          their mean, [] or [1]
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import DumpError
from apr_jax.loss.documents import Document, Window
from apr_jax.loss.scoring import Scores, Variant, logits_before, score
from apr_jax.loss.summary import counts
from apr_jax.model.language_model import LanguageModel

BARS = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""What |theirs - ours| / |ours| over all tokens may be, by the dtype of the computation."""
_SAMPLED = 12  # tokens whose logits are looked at whole, to find where a vocabulary ends
_SCALAR = 2e-6  # a mean of float32 losses, relative


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What is wrong with the other side's losses.

    Attributes:
      name: Of the mistake.
      says: The same as a sentence.
      error: How far it is from the other side's values, |theirs - replayed| / |theirs|.
      numbers: What was solved for.
      alternatives: Names of other mistakes that give the same value.
    """

    name: str
    says: str
    error: float
    numbers: dict[str, float | int] = dataclasses.field(default_factory=dict)
    alternatives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self) | {"alternatives": list(self.alternatives)}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How another engine's losses compare with ours.

    Attributes:
      tokens: How many losses of tokens were compared; 0 where there is only a mean.
      error: |theirs - ours| / |ours| over the tokens; None without them.
      worst: The document and the token that differ most; None without losses of tokens.
      mean: The other side's mean loss; None if it gives none.
      ours: Ours.
      mistakes: What is wrong; "unknown" where nothing reproduces the values.
    """

    tokens: int
    error: float | None
    worst: tuple[int, int] | None
    mean: float | None
    ours: float
    mistakes: tuple[Mistake, ...]

    @property
    def within(self) -> bool:
        """Whether nothing is wrong."""
        return not self.mistakes

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self) | {
            "within": self.within,
            "mistakes": [mistake.to_json() for mistake in self.mistakes],
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """What was computed here.

    Attributes:
      model: By which model.
      documents: From what.
      windows: How it was cut.
      batch: How many windows at once.
      scores: The result, for each document.
    """

    model: LanguageModel
    documents: Sequence[Document]
    windows: Sequence[Window]
    batch: int
    scores: Sequence[Scores]

    def taken(self, values: Callable[[Scores], np.ndarray], scores: Sequence[Scores] | None = None) -> np.ndarray:
        """Returns some numbers of all tokens that the loss is over, float64 [M]."""
        rows = zip(self.documents, self.scores, scores or self.scores, strict=True)
        return np.concatenate([values(of)[counts(document, own)] for document, own, of in rows]).astype(np.float64)

    def again(self, variant: Variant) -> np.ndarray:
        """Returns the losses from logits that are computed in another way, float64 [M]."""
        again = score(self.model, self.documents, self.windows, self.batch, variant)
        return self.taken(lambda scores: scores.loss, again)


def check(run: Run, path: str | os.PathLike[str]) -> Verdict:
    """Compares the losses in a file with a run's, and looks for what is wrong.

    Raises:
      AprJaxError: As `open_checkpoint`.
      DumpError: The file holds no losses, or not as many as there are tokens.
    """
    losses, mean = _read(path)
    ours = run.taken(lambda scores: scores.loss)
    bar = BARS[run.model.dtype]
    mistakes: list[Mistake] = []
    error, worst = None, None
    given = None
    if losses is not None:
        given = _aligned(losses, run, path)
        theirs = given.counted
        error = _distance(theirs, ours)
        worst = _token(run, int(np.nanargmax(np.abs(theirs - ours)))) if np.isfinite(theirs).any() else _token(run, 0)
        if not error <= bar:
            mistakes.append(_named(run, theirs, bar))
        ours = theirs if np.isfinite(theirs).all() else ours
    if mean is not None and (wrong := _mean_mistake(run, ours, mean, given)):
        mistakes.append(wrong)
    expected = float(np.mean(run.taken(lambda scores: scores.loss)))
    return Verdict(0 if losses is None else len(ours), error, worst, mean, expected, tuple(mistakes))


def _read(path: str | os.PathLike[str]) -> tuple[np.ndarray | None, float | None]:
    with open_checkpoint(path) as checkpoint:
        found = {name: checkpoint.tensors[name].read() for name in ("losses", "loss") if name in checkpoint.tensors}
        names = sorted(checkpoint.tensors)
    if not found or any(array.dtype.kind not in "fV" for array in found.values()):
        raise DumpError(
            "the file holds no losses",
            code="nothing-compared",
            file=path,
            found=names[:8],
            expected='"losses" (of each token) or "loss" (their mean), floating-point',
            hint="`loss MODEL ... --per-token OUT` writes such a file",
        )
    mean = found.get("loss")
    if mean is not None and mean.size != 1:
        raise DumpError("a mean loss is one number", code="loss-shape", file=path, found=list(mean.shape))
    losses = found.get("losses")
    return (
        None if losses is None else losses.astype(np.float64),
        None if mean is None else float(mean.astype(np.float64).reshape(-1)[0]),
    )


@dataclasses.dataclass(frozen=True)
class _Given:
    """The other side's losses, float64.

    Attributes:
      counted: Of the tokens that count, [M].
      predicted: Of all tokens that something predicts, those that do not count too; None where they are not given.
      places: Of padding as well, [N]; None where it is not given.
    """

    counted: np.ndarray
    predicted: np.ndarray | None = None
    places: np.ndarray | None = None


def _aligned(losses: np.ndarray, run: Run, path: str | os.PathLike[str]) -> _Given:
    """Picks the losses of the tokens that count out of all that the other side gives."""
    counted = np.concatenate([counts(*pair) for pair in zip(run.documents, run.scores, strict=True)])
    predicted = np.concatenate([np.arange(len(document.ids)) > 0 for document in run.documents])
    size = losses.size
    if size == counted.sum():
        return _Given(losses.reshape(-1))
    if size in (len(counted), predicted.sum()):
        values = np.full(len(counted), np.nan)
        values[predicted if size < len(counted) else slice(None)] = losses.reshape(-1)
        return _Given(values[counted], values[predicted])
    if (placed := _of_padded(losses, run)) is not None:
        return placed
    raise DumpError(
        "the number of losses is not the number of tokens",
        code="loss-shape",
        file=path,
        found=list(losses.shape),
        expected=f"{counted.sum()} that count, {predicted.sum()} that are predicted, all {len(counted)}, or documents "
        "that are padded to one length",
        hint="Were other tokens, windows or a special token in front used?",
    )


def _of_padded(losses: np.ndarray, run: Run) -> _Given | None:
    """Reads losses [B, T] or [B, T - 1] of documents that are padded, on the side where they come nearer to ours."""
    longest = max(len(document.ids) for document in run.documents)
    if losses.shape not in {(len(run.documents), longest), (len(run.documents), longest - 1)}:
        return None
    # A column for the first place, which nothing predicts.
    whole = losses if losses.shape[1] == longest else np.pad(losses, ((0, 0), (1, 0)), constant_values=np.nan)
    ours, found = run.taken(lambda scores: scores.loss), []
    for on_left in (False, True):
        rows = [
            row[longest - len(document.ids) :] if on_left else row[: len(document.ids)]
            for row, document in zip(whole, run.documents, strict=True)
        ]
        pairs = zip(rows, run.documents, run.scores, strict=True)
        counted = [row[counts(document, scores)] for row, document, scores in pairs]
        # Where padding stands in front, it predicts the first token.
        places = whole[:, 1:].reshape(-1)
        given = _Given(np.concatenate(counted), np.concatenate([row[1:] for row in rows]), places)
        found.append((float(np.nansum(np.abs(given.counted - ours))), given))
    return min(found, key=lambda each: each[0])[1]


def _token(run: Run, number: int) -> tuple[int, int]:
    """Returns the document and the place in it of a token that counts."""
    for at, pair in enumerate(zip(run.documents, run.scores, strict=True)):
        places = np.flatnonzero(counts(*pair))
        if number < len(places):
            return at, int(places[number])
        number -= len(places)
    raise IndexError(number)


def _distance(theirs: np.ndarray, ours: np.ndarray) -> float:
    """|theirs - ours| / |ours|; infinite where they have a value that is not finite and ours has."""
    if not np.isfinite(theirs).all():
        return math.inf
    norm = float(np.linalg.norm(ours))
    return float(np.linalg.norm(theirs - ours)) / norm if norm else math.inf


# --- Losses of tokens ------------------------------------------------------------------------------------------------


def _named(run: Run, theirs: np.ndarray, bar: float) -> Mistake:
    """Returns the mistake that reproduces the other side's losses, or says that none does."""
    if not np.isfinite(theirs).all():
        count = int((~np.isfinite(theirs)).sum())
        return Mistake("not-finite", f"{count} losses are not finite", math.inf, {"tokens": count})
    if len(theirs) > 1 and (theirs == theirs[0]).all():
        uniform = math.log(run.model.config.vocab_size)
        of = ", which is ln(vocabulary): all logits are alike" if _near(theirs[0], uniform, bar) else ": a placeholder"
        return Mistake("constant-loss", f"every token has the same loss, {theirs[0]:.6g}{of}", 0.0)
    nearest = math.inf
    # What has to go through the model again comes last, and only if nothing else fits.
    for candidates in (
        lambda: _of_labels(run),
        lambda: _in_bits(run),
        lambda: _solved(run, theirs),
        lambda: _of_other_logits(run, theirs),
    ):
        tried = [dataclasses.replace(mistake, error=_distance(theirs, losses)) for mistake, losses in candidates()]
        best = min(tried, key=lambda mistake: mistake.error)
        if best.error <= bar:
            return best
        nearest = min(nearest, best.error)
    return Mistake("unknown", "nothing that is known gives these losses", nearest)


Candidates = Iterator[tuple[Mistake, np.ndarray]]
"""Mistakes, each with the losses that it gives, float64 [M]."""


def _in_bits(run: Run) -> Candidates:
    says = "they are in bits (log2), not in nats"
    yield Mistake("log2-for-ln", says, 0.0), run.taken(lambda scores: scores.loss) / math.log(2)
    for mistake, losses in _of_labels(run):
        both = dataclasses.replace(mistake, name=f"log2-for-ln+{mistake.name}", says=f"{says}; and {mistake.says}")
        yield both, losses / math.log(2)


def _of_other_logits(run: Run, theirs: np.ndarray) -> Candidates:
    # Rounding to float16 moves a loss by less than two right engines may differ.
    says = "the logits were rounded to bfloat16 before the loss"
    yield Mistake("logits-bfloat16", says, 0.0), run.again(Variant(rounded="bfloat16"))
    if (rows := _last_row(run, theirs)) is not None:
        says = f"the vocabulary ends after {rows} of {run.model.config.vocab_size} rows of the head"
        yield Mistake("vocabulary-cut", says, 0.0, {"rows": rows}), run.again(Variant(vocabulary=rows))


def _of_labels(run: Run) -> Candidates:
    """Yields what other labels, or losses of other tokens, give."""
    own, after = (run.taken(functools.partial(Scores.against, ahead=ahead)) for ahead in (0, 2))
    right = run.taken(lambda scores: scores.loss)
    yield Mistake("labels-not-shifted", "each position is compared with its own token, not the next one", 0.0), own
    # The last token of a document has none behind it; what an engine does there is its own affair.
    filled = np.where(np.isnan(after), right, after)
    if np.isnan(after).sum() < len(after):
        yield (
            Mistake("labels-shifted-twice", "each position is compared with the token after the next one", 0.0),
            filled,
        )
    for offset in (1, -1):
        says = (
            f"each token has the loss of the one {'before' if offset == 1 else 'after'} it: a slice is off by one row"
        )
        yield Mistake("row-off-by-one", says, 0.0, {"rows": offset}), np.roll(right, offset)


def _solved(run: Run, theirs: np.ndarray) -> Candidates:
    """Yields mistakes with one number, which is solved for by least squares."""
    right, total, mean = (run.taken(value) for value in (lambda s: s.loss, lambda s: s.log_total, lambda s: s.mean))
    difference = theirs - right
    smoothing = _slope(difference, total - mean - right)
    if 0 < smoothing < 1:
        says = f"labels are smoothed by {smoothing:.3g}: that share is spread over the vocabulary"
        yield (
            Mistake("label-smoothing", says, 0.0, {"smoothing": smoothing}),
            right + smoothing * (total - mean - right),
        )
    weight = _slope(difference, total**2)
    says = f"a z-loss is added: {weight:.3g} times the square of log(sum(exp(logits)))"
    yield Mistake("z-loss", says, 0.0, {"weight": weight}), right + weight * total**2
    # Rows of zeros behind the vocabulary: each adds exp(0) to the sum. Best told where the sum is small.
    added = np.exp(total) * np.expm1(difference)
    rows = round(float(np.average(added, weights=np.exp(-2 * total))))
    if rows >= 1:
        says = f"{rows} logits of 0 stand behind the vocabulary: padded rows of the head take part in the softmax"
        yield Mistake("vocabulary-padded", says, 0.0, {"rows": rows}), right + np.log1p(rows * np.exp(-total))


def _slope(difference: np.ndarray, direction: np.ndarray) -> float:
    """Returns the number that takes `direction` nearest to `difference`."""
    norm = float(direction @ direction)
    return float(difference @ direction) / norm if norm else 0.0


def _last_row(run: Run, theirs: np.ndarray) -> int | None:
    """Returns how many rows of the head a cut vocabulary has, from whole logits of a few tokens."""
    missing = run.taken(lambda scores: scores.loss) - theirs
    order = [int(at) for at in np.argsort(-missing)[:_SAMPLED] if missing[at] > 0]
    if not order:
        return None
    costs = np.zeros(run.model.config.vocab_size)
    for at in order:
        number, token = _token(run, at)
        document = run.documents[number]
        window = next(w for w in run.windows if w.document == number and w.first <= token < w.end)
        (logits,) = logits_before(run.model, document, window, [token]).astype(np.float64)
        # log of the sum over the rows up to each, held against what the other side must have had.
        sums = np.logaddexp.accumulate(logits)
        costs += (sums - logits[document.ids[token]] - theirs[at]) ** 2
    rows = int(np.argmin(costs)) + 1
    return rows if rows < run.model.config.vocab_size else None


# --- Means -----------------------------------------------------------------------------------------------------------


def _mean_mistake(run: Run, losses: np.ndarray, mean: float, given: _Given | None) -> Mistake | None:
    """Returns what is wrong with a mean, given the losses that it should be of; None if it is right.

    Args:
      run: What was computed here.
      losses: Of the tokens that count: the other side's where it gives them, else ours.
      mean: What it says.
      given: The other side's losses, so that only the mean can be wrong; None where it gives none.
    """
    loose = BARS[run.model.dtype]
    bar = loose if given is None else _SCALAR
    if _near(mean, float(np.mean(losses)), bar):
        return None
    tried = [(*each, bar) for each in _means(run, losses, given)]
    tried += [(*each, loose) for each in _means_of_ours(run, given)]
    found = [(abs(mean - value) / max(abs(value), 1e-30), mistake, within) for mistake, value, within in tried]
    fitting = sorted((each for each in found if each[0] <= each[2]), key=lambda each: each[0])
    if not fitting:
        nearest = min((error for error, _, _ in found), default=math.inf)
        return Mistake("unknown", "nothing that is known gives this mean", nearest)
    error, mistake, _ = fitting[0]
    others = tuple(dict.fromkeys(each.name for _, each, _ in fitting[1:] if each.name != mistake.name))
    return dataclasses.replace(mistake, error=error, alternatives=others)


def _means_of_ours(run: Run, given: _Given | None) -> Iterator[tuple[Mistake, float]]:
    """Yields wrong means that are made of losses which the other side does not give."""
    if given is None:
        for mistake, values in _of_labels(run):
            yield mistake, float(np.mean(values))
    if given is None or given.predicted is None:
        everything = np.concatenate([scores.loss for scores in run.scores]).astype(np.float64)
        everything = everything[~np.isnan(everything)]
        if len(everything) > len(run.taken(lambda scores: scores.loss)):
            yield _IGNORED_COUNTED, float(np.mean(everything))
    uniform = math.log(run.model.config.vocab_size)
    yield Mistake("uniform-loss", f"it is ln(vocabulary), {uniform:.4f}: all logits are alike", 0.0), uniform


_IGNORED_COUNTED = Mistake("mean-over-ignored", "losses of tokens that do not count are in the mean", 0.0)
_PADDING_COUNTED = Mistake("mean-over-padding", "losses at padding are in the mean", 0.0)


def _near(value: float, expected: float, bar: float) -> bool:
    return abs(value - expected) <= bar * abs(expected)


def _means(run: Run, losses: np.ndarray, given: _Given | None) -> Iterator[tuple[Mistake, float]]:
    """Yields wrong ways to take a mean, with what they give."""
    wider = () if given is None else ((_IGNORED_COUNTED, given.predicted), (_PADDING_COUNTED, given.places))
    for mistake, values in wider:
        if values is not None and np.isfinite(values).any():
            yield mistake, float(np.mean(values[np.isfinite(values)]))
    total, scored = float(losses.sum()), len(losses)
    everything = sum(len(document.ids) for document in run.documents)
    predicted = everything - len(run.documents)
    yield Mistake("sum-for-mean", "it is the sum over the tokens, not their mean", 0.0), total
    yield Mistake("log2-for-ln", "it is in bits (log2), not in nats", 0.0), total / scored / math.log(2)
    yield Mistake("perplexity", "it is the perplexity, not the loss", 0.0), math.exp(min(total / scored, 700))
    for count, what in ((everything, "all tokens"), (predicted, "all tokens that are predicted")):
        if count != scored:
            says = f"the sum is divided by {what} ({count}), and not by those that count ({scored})"
            yield Mistake("mean-over-ignored", says, 0.0, {"divided_by": count}), total / count
    longest = max(len(document.ids) for document in run.documents)
    padded = longest * len(run.documents)
    for count in (padded, padded - len(run.documents)):
        if count not in (scored, everything, predicted):
            says = f"the sum is divided by all places of the padded batch ({count}), and not by the tokens ({scored})"
            yield Mistake("mean-over-padding", says, 0.0, {"divided_by": count}), total / count
    yield from _means_of_batches(run, losses)


def _means_of_batches(run: Run, losses: np.ndarray) -> Iterator[tuple[Mistake, float]]:
    """Yields what happens to batches of documents: a mean of their means, or one that is not whole left out."""
    sizes = [int(counts(*pair).sum()) for pair in zip(run.documents, run.scores, strict=True)]
    ends = np.cumsum(sizes)
    sums = np.add.reduceat(np.append(losses, 0.0), np.minimum(ends - sizes, len(losses)))
    sums = np.where(np.asarray(sizes) > 0, sums, 0.0)
    for batch in range(1, len(sizes)):
        starts = np.arange(0, len(sizes), batch)
        totals, tokens = np.add.reduceat(sums, starts), np.add.reduceat(np.asarray(sizes), starts)
        if len(set(tokens.tolist())) > 1 and (tokens > 0).all():
            says = f"it is the mean of the means of batches of {batch}, which have unequal numbers of tokens"
            yield Mistake("mean-of-means", says, 0.0, {"batch": batch}), float(np.mean(totals / tokens))
        if len(sizes) % batch and (kept := tokens[:-1].sum()):
            says = f"the last batch, which has fewer than {batch} documents, is left out"
            yield Mistake("last-batch-dropped", says, 0.0, {"batch": batch}), float(totals[:-1].sum() / kept)
