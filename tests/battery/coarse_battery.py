"""The coarse battery: planted mistakes, right programs and the four-fold case, seen in layer outputs or logits alone.

    python tests/battery/coarse_battery.py [--workers N] [--shard I/N] [--sample SHARE] [--seed N] [--json FILE]
    python tests/battery/coarse_battery.py --table FILE [FILE ...]     # the table of runs that were made in shards

Every single mistake of the parity battery is planted in all layers and in one, on checkpoints of two to six layers with
and without tied heads, shared key heads and large biases, and the dump is cut down to the outputs of the layers, or to
the logits. A mistake is visible if in float64 it moves some dumped stage, computed from the dumped stages before it, by
more than the budget of the dump's dtype. It is named exactly if the finding has its name, its numbers and its layers;
or if it is among the alternatives of a finding whose own mistake, made by the same engine, gives the same dump to
within the budget. What the finding names otherwise is a wrong name, unless it is "unknown".

Exits 1 if a visible mistake is not detected, if fewer than 85 % (layer outputs) or 70 % (logits) of them are named
exactly, if more than 2 % have a wrong name, if a right run has a finding, or if the four-fold case is named less than
whole (three of four from logits) or beside something that was not made.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

if __name__ == "__main__":  # workers beside each other: one thread for each
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from safetensors.numpy import load_file, save_file

from apr_jax.parity.localise import localise
from apr_jax.testing import sample
from apr_jax.testing.sample import Sample
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import complete
from tests import paths
from tests.battery import faulty_forward, parity_battery
from tests.battery.clean_runs import BATCHES
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import REAL_CASE, Bench, matches

SHOWN = {"layer outputs": "post_ffn_residual", "logits": "logits"}
"""What a dump holds, and its stage."""
NEEDED = {"layer outputs": 0.85, "logits": 0.70}
WRONG_NAMES = 0.02
CLEAN_RUNS = 100
DTYPES = ("float32", "bfloat16", "float16")

_SIZES = {
    "six layers, GQA": {"vocab": 288, "hidden": 48, "ffn": 112, "heads": 6, "kv_heads": 2, "layers": 6},
    "four layers, MHA tied, large biases": {
        "vocab": 288,
        "hidden": 48,
        "ffn": 96,
        "heads": 3,
        "kv_heads": 3,
        "layers": 4,
        "tied": True,
    },
    "three layers, MQA": {
        "vocab": 288,
        "hidden": 64,
        "ffn": 128,
        "heads": 4,
        "kv_heads": 1,
        "layers": 3,
        "eps": 1e-5,
        "theta": 1e4,
    },
}
BENCHES = ("gqa_tied_bf16", "mha_untied_f32_sharded", *_SIZES)
_LARGE = 4.0
"""By how much biases of q and k are larger where they are called large."""


def bench_of(name: str, dtype: str = "float32") -> Bench:
    """One of `BENCHES`: a committed checkpoint, or one that is drawn."""
    if name not in _SIZES:
        return Bench.of(name, dtype)
    drawn = Sample(name, sample._config(**_SIZES[name]), "f32", "f32")  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(sample.SAMPLES, {name: drawn}):
        folder = pathlib.Path(scratch, "checkpoint")
        sample.write_sample(name, folder)
        if "large biases" in name:
            _enlarge_biases(folder / "model.safetensors")
        with mock.patch.object(paths, "checkpoint", return_value=folder):
            return Bench.of(name, dtype)


def _enlarge_biases(file: pathlib.Path) -> None:
    """Biases of q and k in every layer, as trained models have them, and not in the first layer alone."""
    tensors = load_file(file)
    large = ("q_proj.bias", "k_proj.bias")
    save_file({n: t * np.float32(_LARGE) if n.endswith(large) else t for n, t in tensors.items()}, file)


_benches = functools.lru_cache(maxsize=None)(bench_of)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
      kind: "single", "clean" or "four-fold".
      bench: One of `BENCHES`.
      shown: One of `SHOWN`.
      planted: The mistakes.
      dtype: What the engine computes in.
      batch: The batch of a clean run, one of `BATCHES`, and the seed of its tokens.
    """

    kind: str
    bench: str
    shown: str
    planted: tuple[Planted, ...] = ()
    dtype: str = "float32"
    batch: tuple[str, int] | None = None

    @property
    def label(self) -> str:
        """The case in a line."""
        made = " + ".join(f"{p.name}{parity_battery._shown(p)}" for p in self.planted) or f"clean {self.batch}"
        return f"{self.shown}, {self.bench}, {self.dtype}: {made}"


def cases() -> list[Case]:
    """All of them."""
    made = [
        Case("single", name, shown, (planted,))
        for name in BENCHES
        for planted in parity_battery.cases(_benches(name))
        for shown in SHOWN
        if planted.name != "layout"
    ]
    made += [
        Case("four-fold", name, shown, REAL_CASE) for name in BENCHES if _all_are_mistakes(name) for shown in SHOWN
    ]
    return made + [Case("clean", *each) for each in _clean()]


def _all_are_mistakes(name: str) -> bool:
    """Whether the numbers of the four-fold case are not those that the checkpoint asks for."""
    config = _benches(name).exact.config
    asked = {"eps": config.rms_norm_eps, "theta": config.rope_theta}
    return all(asked[key] != value for planted in REAL_CASE for key, value in planted.parameters.items())


def _clean() -> Iterator[tuple[Any, ...]]:
    batches = [name for name in BATCHES if name != "1 x 257"]
    for shown in SHOWN:
        for number in range(CLEAN_RUNS):
            bench, dtype = BENCHES[number % len(BENCHES)], DTYPES[number // len(BENCHES) % len(DTYPES)]
            yield bench, shown, (), dtype, (batches[number % len(batches)], number)


def cut(dump: Mapping[str, np.ndarray], shown: str) -> dict[str, np.ndarray]:
    """The part of a dump that is shown."""
    return {key: value for key, value in dump.items() if key.split(".")[-1] == SHOWN[shown]}


def run_case(case: Case) -> dict[str, Any]:
    """Runs one case; returns what is said of it in the table."""
    bench = _benches(case.bench, case.dtype)
    if case.batch is not None:
        made = BATCHES[case.batch[0]](bench.exact.config.vocab_size)
        ids = seeded(bench.exact.config.vocab_size, *made.input_ids.shape, seed=100 + case.batch[1]).input_ids
        bench = dataclasses.replace(bench, inputs=Inputs.of(ids, made.attention_mask))
    started, processor = time.perf_counter(), time.process_time()
    findings = bench.diagnose(cut(bench.dump(case.planted), case.shown)).findings
    result: dict[str, Any] = {
        "kind": case.kind,
        "shown": case.shown,
        "label": case.label,
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "findings": [finding.sentence for finding in findings],
    }
    if case.kind == "single":
        result |= _judged(bench, case, findings)
    elif case.kind == "four-fold":
        named = [any(matches(bench, planted, finding) for finding in findings) for planted in case.planted]
        extra = [f for f in findings if f.fault != "unknown" and not any(matches(bench, p, f) for p in case.planted)]
        result |= {"named": sum(named), "wrong": len(extra)}
    return result


def _judged(bench: Bench, case: Case, findings: Sequence[Any]) -> dict[str, Any]:
    (planted,) = case.planted
    effects = visible_effects(bench, case.planted, case.shown)
    size = max(effects.values(), default=0.0)
    exact = len(findings) == 1 and _is_named(bench, planted, findings[0], effects, case.shown)
    wrong = [
        f
        for f in findings
        if f.fault != "unknown" and not (_is_named(bench, planted, f, effects, case.shown) or _gives(bench, case, f))
    ]
    return {"effect": size, "exact": exact, "wrong": len(wrong)}


def visible_effects(bench: Bench, planted: Sequence[Planted], shown: str) -> dict[str, float]:
    """For each dumped stage how many budgets it is off in float64, computed from those before it."""
    right, wrong = (cut(bench.dump(made, "float64"), shown) for made in ((), planted))
    if len(right) != len(wrong):
        return dict.fromkeys(right, float("inf"))
    sites = localise(bench.exact, bench.same, bench.inputs, complete(wrong, bench.inputs)).sites
    return {site.key: site.share for site in sites}


def _is_named(bench: Bench, planted: Planted, finding: Any, effects: Mapping[str, float], shown: str) -> bool:
    """Whether the finding is the mistake, in the layers that show it; or has it as an alternative, its own giving the
    same dump."""
    if planted.name in finding.alternatives:
        return _gives(bench, Case("single", bench.name, shown, (planted,)), finding)
    _, layers, _ = parity_battery.expected(bench, planted)
    if not matches(bench, dataclasses.replace(planted, layers=None), dataclasses.replace(finding, layers="all")) and (
        layers != ()
    ):
        return False
    if layers is None or layers == ():
        return matches(bench, planted, finding)
    every = range(bench.exact.config.num_layers)
    meant, named = (set(every if where == "all" else where) for where in (layers, finding.layers))
    if shown == "logits":
        return meant == named or (named <= meant and _gives(bench, Case("", "", shown, (planted,)), finding))
    visible = {layer for layer in meant if effects.get(f"stage.{layer}.post_ffn_residual", 0.0) > 1.0}
    return visible <= named <= meant


def _gives(bench: Bench, case: Case, finding: Any) -> bool:
    """Whether the finding's mistake, made by the engine in float64, gives the dump of the planted ones to within the
    budget of the dump's dtype."""
    parameters = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in finding.parameters.items()
        if name in faulty_forward.FAULTS.get(finding.fault, faulty_forward.Kind("")).parameters
    }
    layers = None if finding.layers in ("all", ()) else finding.layers
    try:
        other = bench.dump([Planted(finding.fault, layers, parameters)], "float64")
    except (ValueError, KeyError, TypeError):
        return False
    theirs, other = cut(bench.dump(case.planted, "float64"), case.shown), cut(other, case.shown)
    tokens = bench.inputs.attention_mask == 1
    sites = localise(bench.exact, bench.same, bench.inputs, complete(theirs, bench.inputs)).sites
    return all(float(np.linalg.norm((theirs[s.key] - other[s.key])[tokens])) <= s.budget for s in sites)


# --- The table -------------------------------------------------------------------------------------------------------


def table(results: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """Returns the table, and whether everything is as good as it has to be."""
    lines, good = [], bool(results)
    for shown in SHOWN:
        here = [r for r in results if r["shown"] == shown]
        visible = [r for r in here if r["kind"] == "single" and r["effect"] > 1.0]
        hidden = [r for r in here if r["kind"] == "single" and r["effect"] <= 1.0]
        detected, exact = (sum(bool(r[name]) for r in visible) for name in ("findings", "exact"))
        wrong = sum(bool(r["wrong"]) for r in visible)
        false = sum(bool(r["wrong"]) for r in hidden)
        clean = [r for r in here if r["kind"] == "clean"]
        found = sum(bool(r["findings"]) for r in clean)
        seconds = sorted(r["processor_seconds"] for r in here)
        lines += [
            f"{shown}: {len(visible)} visible, {detected} detected, {exact} named exactly"
            f" ({exact / max(1, len(visible)):.1%}, at least {NEEDED[shown]:.0%} needed), {wrong} with a wrong name;"
            f" {len(hidden)} not visible, {false} wrong names there",
            f"{shown}: {len(clean)} clean runs, {found} with a finding",
            f"{shown}: processor time of a case: median {np.median(seconds or [0]):.1f} s,"
            f" largest {max(seconds, default=0):.0f} s, all {sum(seconds):.0f} s",
        ]
        four = [r for r in here if r["kind"] == "four-fold"]
        least = 4 if shown == "layer outputs" else 3
        lines += [f"{r['label'].split(':')[0]}: four-fold: {r['named']} of 4 named, {r['wrong']} wrong" for r in four]
        good &= all(r["named"] >= least and not r["wrong"] for r in four) and not found and not false
        good &= detected == len(visible) and exact >= NEEDED[shown] * len(visible)
        good &= wrong <= WRONG_NAMES * len(visible)
        for r in here:
            if r["kind"] == "single" and r["effect"] > 1.0 and not r["exact"]:
                lines.append(f"  NOT EXACT ({r['effect']:.3g} budgets, {r['seconds']} s) {r['label']}")
                lines += [f"    {'WRONG ' if r['wrong'] else ''}{sentence[:400]}" for sentence in r["findings"][:3]]
            elif r["kind"] != "four-fold" and r.get("wrong", len(r["findings"])):
                lines.append(f"  FALSE {r['label']}: {r['findings'][0][:300]}")
            elif r["kind"] == "four-fold" and (r["named"] < 4 or r["wrong"]):
                lines += [f"  {r['label']}", *(f"    {sentence[:300]}" for sentence in r["findings"])]
    return "\n".join(lines), good


def run(chosen: Sequence[Case], workers: int, file: str | None = None) -> list[dict[str, Any]]:
    """Runs cases beside each other; a worker keeps the checkpoints that it has loaded.

    What there is so far stands in `file` at any time, so that a run that is ended early is not lost.
    """
    results = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run_case, case) for case in chosen]):
            result = done.result()
            results.append(result)
            said = "" if result["kind"] != "single" else f" {result['effect']:.2g} budgets, exact {result['exact']}"
            print(f"{len(results)}/{len(chosen)} {result['seconds']:6.1f} s {result['label']}{said}", flush=True)
            if file is not None:
                pathlib.Path(file).write_text(json.dumps(results, indent=1))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard", default="1/1", help="I/N: every Nth case, from the Ith on")
    parser.add_argument("--sample", type=float, default=1.0, help="a share of the cases, drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="cases whose line holds this")
    parser.add_argument("--json", metavar="FILE", help="write all results")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only the table of these results")
    args = parser.parse_args(argv)
    if args.table:
        results = [result for file in args.table for result in json.loads(pathlib.Path(file).read_text())]
    else:
        index, count = map(int, args.shard.split("/"))
        drawn = np.random.default_rng(args.seed).random(10**5)
        chosen = [case for case, value in zip(cases(), drawn, strict=False) if value < args.sample]
        chosen = [case for case in chosen if args.only in case.label][index - 1 :: count]
        results = run(chosen, args.workers, args.json)
    text, good = table(results)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
