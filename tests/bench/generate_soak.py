"""500 generations of random lengths in one process: how many programs are compiled, and does memory grow?

    python tests/bench/generate_soak.py [MODEL] [--device cuda] [--count 500] [--json FILE]

Prompts of 1 to 300 tokens (the logarithm is uniform), 1 to 100 new tokens, batches of 1 and 2, greedy and sampled. The
same generations then run a second time: that must compile nothing, keep no more arrays alive, and need no more memory
than `ALLOWANCE`. Exits 1 if it does, or if the first time compiled more programs than there are combinations of
rounded lengths.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from apr_jax.generate.generator import Generator, load_generator, rounded
from tests import paths

SAMPLE = paths.checkpoint("mha_untied_f32_sharded")
LONGEST_PROMPT, MOST_NEW, BATCHES = 300, 100, (1, 2)
METHODS = ({"do_sample": False, "repetition_penalty": 1.0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8})
ALLOWANCE = 8e6  # bytes: allocators settle
STEPS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SAMPLE))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    generator = load_generator(args.model, device=args.device)
    rows = [run(generator, args.count, turn) for turn in ("first", "again")]
    bound = program_bound(generator)
    first, again = rows[0][-1], rows[1][-1]
    settled = rows[1][0]
    grown = {key: again[key] - settled[key] for key in ("resident_bytes", "device_bytes", "live_arrays")}
    passed = (
        first["programs"] <= bound
        and again["programs"] == first["programs"]
        and grown["resident_bytes"] <= ALLOWANCE
        and grown["device_bytes"] <= 0
        and grown["live_arrays"] <= 0
    )
    report(rows, bound, grown, passed)
    if args.json:
        result = {"rows": rows, "program_bound": bound, "grown": grown, "passed": passed, "jax": jax.__version__}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


def run(generator: Generator, count: int, turn: str) -> list[dict[str, Any]]:
    """Generates, and takes stock five times."""
    stock = []
    tokens, begun = 0, time.perf_counter()
    for number, (prompts, new, seed, settings) in enumerate(tasks(generator, count), start=1):
        made = generator.generate(prompts, seed=seed, max_new_tokens=new, eos_token_id=(), **settings)
        tokens += sum(len(row.token_ids) for row in made)
        if number % max(1, count // STEPS) == 0:
            stock.append({"turn": turn, "generations": number, "tokens": tokens, **taken(generator)})
            stock[-1]["seconds"] = time.perf_counter() - begun
    return stock


def tasks(generator: Generator, count: int) -> Iterator[tuple[list[list[int]], int, int, dict[str, Any]]]:
    """Yields prompts, how many new tokens, a seed and settings; the same ones every time."""
    random = np.random.default_rng(0)
    for number in range(count):
        batch = int(random.choice(BATCHES))
        lengths = np.exp(random.uniform(0, np.log(LONGEST_PROMPT), batch)).astype(int)
        prompts = [random.integers(0, generator.model.config.vocab_size, length).tolist() for length in lengths]
        yield prompts, int(random.integers(1, MOST_NEW + 1)), number, METHODS[number % len(METHODS)]


def taken(generator: Generator) -> dict[str, int]:
    """Takes stock: what is compiled and what is held."""
    statistics = generator.model.device.memory_stats() or {}
    resident = next(
        line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return {
        "programs": generator.programs.compiled,
        "live_arrays": len(jax.live_arrays()),
        "resident_bytes": int(resident.split()[1]) * 1024,
        "device_bytes": int(statistics.get("bytes_in_use", 0)),
    }


def program_bound(generator: Generator) -> int:
    """Returns how many programs there can be: one for each combination of rounded lengths that can occur."""
    bound = 0
    for rows in BATCHES:
        shapes = {
            rounded(length, new, generator.prefill_chunk(rows))
            for length in range(1, LONGEST_PROMPT + 1)
            for new in range(1, MOST_NEW + 1)
        }
        capacities = {capacity for _, capacity in shapes}
        bound += len(shapes) + len(METHODS) * (len(capacities) + 1)
    return bound


def report(rows: list[list[dict[str, Any]]], bound: int, grown: dict[str, int], passed: bool) -> None:
    print(
        f"{'turn':6}{'done':>6}{'tokens':>8}{'programs':>10}{'arrays':>8}{'resident MB':>13}{'device MB':>11}{'s':>8}"
    )
    for row in rows[0] + rows[1]:
        print(
            f"{row['turn']:6}{row['generations']:6}{row['tokens']:8}{row['programs']:10}{row['live_arrays']:8}"
            f"{row['resident_bytes'] / 1e6:13.1f}{row['device_bytes'] / 1e6:11.1f}{row['seconds']:8.1f}"
        )
    print(
        f"at most {bound} programs; grown while the same ran again: {grown['resident_bytes'] / 1e6:.1f} MB resident,"
        f" {grown['device_bytes'] / 1e6:.1f} MB on the device, {grown['live_arrays']} arrays:"
        f" {'ok' if passed else 'FAILED'}"
    )


if __name__ == "__main__":
    sys.exit(main())
