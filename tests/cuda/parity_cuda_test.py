"""Parity on an NVIDIA GPU: float32 and bfloat16 are rounding, TF32 is named.

python tests/cuda/parity_cuda_test.py --half-billion [RESULTS.json]      # the same at the true 0.5B shape
"""

import dataclasses
import itertools
import json
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.model.qwen2 import OPS, TF32_OPS
from apr_jax.parity import diagnose
from apr_jax.testing import sample
from apr_jax.trace.golden import stored
from apr_jax.trace.inputs import seeded
from tests import paths
from tests.battery import clean_runs


def examine(folder, dtype, ops, batch, length):
    """Returns the diagnosis of a CUDA run, judged by the CPU's float64 and by the CPU in the same dtype."""
    exact, same = load_model(folder, "float64", "cpu"), load_model(folder, dtype, "cpu")
    inputs = seeded(exact.config.vocab_size, batch, length)
    theirs = stored(load_model(folder, dtype, "cuda", ops).trace(inputs))
    return diagnose.diagnose(exact, same, inputs, theirs)


def worst(diagnosis):
    """The stage nearest to, or farthest beyond, its budget."""
    sites = [site for site in diagnosis.localisation.sites if site.budget]
    site = max(sites, key=lambda site: max(site.error / site.budget, site.worst))
    share = site.error / site.budget
    return f"{len(sites)} stages, worst {site.key}: {share:.2f} of its budget, worst position {site.worst:.2f}"


class ParityCudaTest(parameterized.TestCase):
    @parameterized.product(name=["gqa_tied_bf16", "mha_untied_f32_sharded"], dtype=["float32", "bfloat16"])
    def test_a_right_run_is_rounding_at_every_stage(self, name, dtype):
        diagnosis = examine(paths.checkpoint(name), dtype, OPS, 2, 80)
        print(f"{name}, {dtype}: {worst(diagnosis)}")
        self.assertEqual([finding.sentence for finding in diagnosis.findings], [])

    @parameterized.parameters("gqa_tied_bf16", "mha_untied_f32_sharded")
    def test_tf32_is_named(self, name):
        diagnosis = examine(paths.checkpoint(name), "float32", TF32_OPS, 2, 80)
        for finding in diagnosis.findings:
            print(f"{name}, TF32: {finding.sentence}")
        self.assertEqual({finding.fault for finding in diagnosis.findings}, {"tf32-dots"})

    def test_no_clean_run_of_any_checkpoint_batch_or_dtype_has_a_finding(self):
        self.assertEqual(clean_runs.main(["--sides", "CUDA"]), 0)


RUNS = (("float32", "float32", OPS), ("TF32", "float32", TF32_OPS), ("bfloat16", "bfloat16", OPS))


def half_billion(
    results: pathlib.Path | None, chosen: Sequence[str], layers: int = 24, length: int = 512, device: str = "cuda"
) -> None:
    """The 0.5B shape with Qwen2.5's statistics, 2 x 512 positions: figures as they come, and as JSON into a file."""
    name, report = (
        "qwen2_0.5b",
        {"jax": jax.__version__, "device": str(jax.devices(device)[0]), "cores": os.cpu_count()},
    )
    base = sample.SAMPLES[name]
    shape = dataclasses.replace(base, config=dataclasses.replace(base.config, num_layers=layers), tokenizer="small")
    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(sample.SAMPLES, {name: shape}):
        folder, started = pathlib.Path(scratch, "hf"), time.perf_counter()
        sample.write_sample(name, folder)
        exact = load_model(folder, "float64", "cpu")
        report["made_and_loaded_s"] = round(time.perf_counter() - started, 1)
        print(f"0.5B made and loaded in float64: {report['made_and_loaded_s']} s", flush=True)
        inputs = seeded(exact.config.vocab_size, 2, length)
        for label, dtype, ops in (run for run in RUNS if run[0] in chosen or not chosen):
            report[label] = one_run(folder, exact, inputs, dtype, device, ops)
            print(f"0.5B, 2 x {length}, {label}: {json.dumps(report[label], indent=1)}", flush=True)
            if results:
                results.write_text(json.dumps(report, indent=1) + "\n")


def one_run(folder, exact, inputs, dtype, device, ops) -> dict[str, Any]:
    """Traces on the device and diagnoses; returns what it took and what was found."""
    clock = {"started": time.perf_counter()}
    theirs = stored(load_model(folder, dtype, device, ops).trace(inputs))
    clock["traced"] = time.perf_counter()
    same = load_model(folder, dtype, "cpu")
    clock["loaded"] = time.perf_counter()
    with mock.patch.object(diagnose, "localise", stopped(diagnose.localise, clock)):
        diagnosis = diagnose.diagnose(exact, same, inputs, theirs)
    clock["explained"] = time.perf_counter()
    marks = ("started", "traced", "loaded", "localising", "localised", "explained")
    return {
        "seconds": {b: round(clock[b] - clock[a], 1) for a, b in itertools.pairwise(marks)},
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "worst": worst(diagnosis),
        "wrong_stages": sum(site.wrong for site in diagnosis.localisation.sites),
        "findings": [finding.sentence for finding in diagnosis.findings],
        "alternatives": [list(finding.alternatives) for finding in diagnosis.findings],
    }


def stopped(function, clock):
    """Notes when a function begins and ends: before it layouts and the order of layers, behind it the explanation."""

    def run(*args):
        clock["localising"] = time.perf_counter()
        result = function(*args)
        clock["localised"] = time.perf_counter()
        return result

    return run


if __name__ == "__main__":
    if "--half-billion" in sys.argv:
        named = sys.argv[sys.argv.index("--half-billion") + 1 :]
        half_billion(pathlib.Path(named[0]) if named else None, named[1:])
    else:
        absltest.main()
