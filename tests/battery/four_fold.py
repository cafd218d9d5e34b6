"""The real four-fold case on many checkpoints: its four names and nothing else, on every seed.

    python tests/battery/four_fold.py [--seeds N] [--first N]

An engine with rms eps 1e-5, RoPE over adjacent pairs, base 10000 and no q, k and v biases is run on checkpoints that
are drawn with another seed each. It is examined by all of its stages, and by eight decoding steps, whose cache of keys
and values nobody dumped. A seed counts if exactly the four mistakes are named, each in all layers, with their numbers,
as certain, and nothing beside them. Exits 1 if a seed does not count.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax.load.load_model import load_model
from apr_jax.parity.diagnose import diagnose
from apr_jax.parity.findings import Finding
from apr_jax.testing import sample
from apr_jax.trace.inputs import Inputs, seeded
from tests import oracle
from tests.battery.faulty_forward import at_rows, forward
from tests.battery.parity_battery import REAL_CASE

CHECKPOINT = "gqa_tied_bf16"
LENGTH, STEPS = 80, 8
EXPECTED: Mapping[str, Mapping[str, object]] = {
    "rms-norm-eps": {"eps": 1e-5, "norms": ["input_layernorm", "norm", "post_attention_layernorm"]},
    "qkv-bias-missing": {},
    "rope-adjacent-pairs": {},
    "rope-theta": {"theta": 1e4},
}
"""The four names and their parameters, in order of execution."""


def misjudged(findings: Sequence[Finding]) -> list[str]:
    """Returns what is wrong with an answer: sentences that should not be there, names that are missing."""
    right, wrong = [], []
    for finding in findings:
        expected = finding.fault in EXPECTED and dict(finding.parameters) == EXPECTED[finding.fault]
        if expected and (finding.layers, finding.certainty) == ("all", "certain"):
            right.append(finding.fault)
        else:
            wrong.append(finding.sentence)
    wrong += [f"{name} is named {right.count(name)} times" for name in EXPECTED if right.count(name) > 1]
    return [*wrong, *(f"{name} is not named" for name in EXPECTED if name not in right)]


def examine(seed: int) -> dict[str, list[str]]:
    """Returns what is wrong with the answers on one seed, by form of the dump."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, CHECKPOINT)
        sample.write_sample(CHECKPOINT, folder, seed=seed)
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        weights, config = oracle.load(folder)
    ids = seeded(exact.config.vocab_size, 1, LENGTH, seed=seed).input_ids
    dump = forward(weights, config, ids, faults=REAL_CASE)
    steps = np.arange(LENGTH - STEPS, LENGTH)
    found = {}
    for form, values, columns in (("full dump", dump, None), ("decode rows", at_rows(dump, steps), steps[None])):
        found[form] = misjudged(diagnose(exact, same, Inputs.of(ids), values, columns).findings)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="how many checkpoints")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    args = parser.parse_args(argv)
    right: dict[str, int] = {}
    started = time.perf_counter()
    for seed in range(args.first, args.first + args.seeds):
        for form, wrong in examine(seed).items():
            right[form] = right.get(form, 0) + (not wrong)
            if wrong:
                print(f"seed {seed}, {form}: {'; '.join(wrong)}", flush=True)
    print("form         seeds  four names and nothing else")
    for form, count in right.items():
        print(f"{form:12} {args.seeds:5}  {count:27}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if all(count == args.seeds for count in right.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
