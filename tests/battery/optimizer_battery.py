"""Every mistake of AdamW that is known, planted by a NumPy engine in float32 and looked for in its parameters alone.

    python tests/battery/optimizer_battery.py

prints a table: what was planted, in one step and in four, on a GQA and an MHA checkpoint, and what it was called.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import tempfile
from collections.abc import Mapping

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from safetensors.numpy import save_file

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.load.load_model import load_model
from apr_jax.model.parameters import named
from apr_jax.optimizer.checking import Verdict, check
from apr_jax.optimizer.reference import by_optax, gradients_at
from apr_jax.optimizer.settings import Settings
from apr_jax.trace.inputs import seeded
from tests import paths
from tests.battery import faulty_adamw

ONE, FOUR = (5e-4,), (2e-4, 5e-4, 1e-3, 8e-4)
SAME = {
    # A gradient that is scaled is an eps that is scaled the other way, and in one step a clipped one is scaled.
    "adamw-gradient-scaled": {"adamw-eps"},
    # In one step, the rate of the step before the first is a step that is not taken.
    "adamw-schedule-off-by-one": {"adamw-not-moved"},
    "adamw-steps": {"adamw-not-moved"},
}

DIVERGES = "adamw-root-missing"
"""After a few such steps the parameters are anywhere; one step tells it."""


class Bench:
    """One checkpoint, one number of steps: what engines are asked to do, and the judge.

    Attributes:
      settings: Decay on matrices alone, so that decay on norms and biases is a mistake.
      inputs: The batch of every step.
    """

    def __init__(self, name: str, rates: tuple[float, ...], clip_norm: float | None = None):
        self.settings = Settings(rates, weight_decay=0.1, decayed="matrices", clip_norm=clip_norm)
        self._exact, self._engine = (load_model(paths.checkpoint(name), dtype) for dtype in ("float64", "float32"))
        self.inputs = seeded(self._exact.config.vocab_size, 2, 32)
        self._at = gradients_at(self._engine, self.inputs, None)
        self.start = {name: np.asarray(value) for name, value in named(self._engine.parameters).items()}

    def gradients(self, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns gradients in float32."""
        return self._at(parameters)[1]

    def optax(self) -> dict[str, np.ndarray]:
        """Returns the parameters after right steps by optax, float32."""
        return by_optax(self._engine, self.inputs, self.settings)[0]

    def planted(self, mistake: str, gradients=None) -> dict[str, np.ndarray]:
        """Returns the parameters after steps of the NumPy engine."""
        rates = list(self.settings.rates)
        return faulty_adamw.run(self.start, gradients or self.gradients, rates, mistake=mistake)

    def judge(self, parameters: Mapping[str, np.ndarray]) -> Verdict:
        """Returns what the check says of parameters after the steps."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "after.safetensors")
            save_file({name: np.ascontiguousarray(value, np.float32) for name, value in parameters.items()}, path)
            with open_checkpoint(path) as theirs:
                return check(self._exact, self._engine, self.inputs, self.settings, theirs)


@functools.cache
def bench(name: str, rates: tuple[float, ...]) -> Bench:
    """Returns a bench that is made once: its programs are compiled."""
    return Bench(name, rates)


def outcome(verdict: Verdict, mistake: str) -> str:
    """Returns what came of a planted mistake: "exact", "alternative", "wrong", "unknown", or "no effect"."""
    name = mistake.split(" ")[0]
    if verdict.within:
        return "no effect"
    found = [tuple(each.name for each in verdict.mistakes), *(tuple(e.name for e in o) for o in verdict.alternatives)]
    numbers = verdict.mistakes[0].numbers
    right = all(
        abs(numbers[key] - value) <= 0.05 * abs(value)
        for key, value in faulty_adamw.MISTAKES[mistake].items()
        if key in numbers
    )
    if found[0] == (name,):
        return "exact" if right else "wrong"
    if (name,) in found or any(found[0] == (other,) for other in SAME.get(name, ())):
        return "alternative"
    return "unknown" if found[0] == ("unknown",) else "wrong"


def main() -> int:
    counts: dict[str, int] = {}
    for name in ("gqa_tied_bf16", "mha_untied_f32_sharded"):
        for rates in (ONE, FOUR):
            place = bench(name, rates)
            for engine, parameters in (("optax", place.optax()), ("NumPy", place.planted(""))):
                verdict = place.judge(parameters)
                counts["clean"] = counts.get("clean", 0) + verdict.within
                print(f"{name}, {len(rates)} steps, clean {engine}: {verdict.right.worst:.2f}", flush=True)
            for mistake in faulty_adamw.MISTAKES:
                verdict = place.judge(place.planted(mistake))
                said = outcome(verdict, mistake)
                if (mistake, said) == (DIVERGES, "unknown") and len(rates) > 1:
                    said = "diverged"
                counts[said] = counts.get(said, 0) + 1
                named_ = "; ".join(f"{each.name}: {each.says}" for each in verdict.mistakes)
                others = ", ".join("+".join(each.name for each in other) for other in verdict.alternatives)
                print(f"{len(rates)} {mistake:36} {said:12} {named_}{f' (or {others})' if others else ''}", flush=True)
    print(counts)
    return int(bool(counts.get("wrong") or counts.get("unknown") or counts["clean"] < 8))


if __name__ == "__main__":
    sys.exit(main())
