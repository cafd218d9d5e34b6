"""Times contestants in rounds that alternate between them, so that what else the machine does hits all alike."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from apr_jax.bench.cases import PREFILL, Case
from apr_jax.trace.compare import relative_l2

Calls = Callable[[int], float]


class Contestant(Protocol):
    """Something that can run a case: `Ours`, `HuggingFace`."""

    name: str

    def prepare(self, case: Case, steps: int) -> tuple[Calls, dict[str, Any]]: ...

    def last_logits(self, ids: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to look.

    Attributes:
      rounds: Turns of every contestant.
      seconds: About how long a turn takes; as many calls as fit are made back to back, at least one.
      steps: Tokens that one call of a decode makes for each row.
      best: Whether a contestant's figure is its fastest turn (a machine that others use as well) or the median one.
    """

    rounds: int
    seconds: float
    steps: int
    best: bool


class Measurement:
    """A case: everybody prepares first, then they take turns.

    Attributes:
      rows: For each contestant its name, `milliseconds` of a call or of a step (a token for every row), `slowest` and
        `fastest` turn, number of calls, tokens a second, and what its `prepare` says; or its name and `error`.
    """

    def __init__(self, case: Case, plan: Plan):
        self.rows: list[dict[str, Any]] = []
        self._case, self._plan = case, plan
        self._ready: list[tuple[dict[str, Any], Calls]] = []

    def prepare(self, contestants: Iterable[Contestant]) -> None:
        """Compiles what these need."""
        for contestant in contestants:
            row: dict[str, Any] = {"contestant": contestant.name}
            self.rows.append(row)
            try:
                calls, known = contestant.prepare(self._case, self._plan.steps)
            # Whatever a peer's compiler or a full memory raises: the others are measured all the same.
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                continue
            row |= known
            self._ready.append((row, calls))

    def take_turns(self) -> None:
        """Fills in the figures."""
        once = [calls(1) for _, calls in self._ready]
        counts = [max(1, int(self._plan.seconds / seconds)) for seconds in once]
        taken = [[seconds] if count == 1 else [] for seconds, count in zip(once, counts, strict=True)]
        for turn in range(self._plan.rounds):
            for (_, calls), count, turns in zip(self._ready, counts, taken, strict=True):
                if len(turns) <= turn:
                    turns.append(calls(count) / count)
        for (row, _), count, turns in zip(self._ready, counts, taken, strict=True):
            row |= _figures(self._case, turns, count, self._plan)


def _figures(case: Case, taken: Sequence[float], calls: int, plan: Plan) -> dict[str, Any]:
    parts = 1 if case.kind == PREFILL else plan.steps
    seconds = (min(taken) if plan.best else statistics.median(taken)) / parts
    made = case.batch * (case.length if case.kind == PREFILL else 1)
    return {
        "milliseconds": seconds * 1e3,
        "fastest": min(taken) / parts * 1e3,
        "slowest": max(taken) / parts * 1e3,
        "calls": calls * plan.rounds,
        "tokens_per_second": made / seconds,
    }


def agreement(ours: Contestant, peer: Contestant, ids: np.ndarray) -> float:
    """Returns the relative L2 between both sides' logits of the last positions: they are to compute the same."""
    return relative_l2(ours.last_logits(ids), peer.last_logits(ids))
