"""Parity on an NVIDIA GPU: float32 and bfloat16 are rounding, TF32 is named; --half-billion for the true 0.5B shape."""

import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
from absl.testing import absltest, parameterized

from apr_jax.explain import diagnose
from apr_jax.golden import stored
from apr_jax.inputs import seeded
from apr_jax.model import load_model
from apr_jax.modeling import OPS, TF32_OPS
from tests import paths


def cuda_devices() -> list[jax.Device]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def examine(folder, dtype, ops, batch, length):
    """Returns the diagnosis of a CUDA run, judged by the CPU's float64 and by the CPU in the same dtype."""
    exact, same = load_model(folder, "float64", "cpu"), load_model(folder, dtype, "cpu")
    inputs = seeded(exact.config.vocab_size, batch, length)
    theirs = stored(load_model(folder, dtype, "cuda", ops).trace(inputs))
    return diagnose(exact, same, inputs, theirs)


def worst(diagnosis):
    """The stage nearest to, or farthest beyond, its budget."""
    sites = [site for site in diagnosis.localisation.sites if site.budget]
    site = max(sites, key=lambda site: max(site.error / site.budget, site.worst))
    share = site.error / site.budget
    return f"{len(sites)} stages, worst {site.key}: {share:.2f} of its budget, worst position {site.worst:.2f}"


@absltest.skipUnless(cuda_devices(), "JAX finds no CUDA device")
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


def half_billion() -> None:
    """The 0.5B shape with Qwen2.5's statistics, 2 x 512 positions."""
    from apr_jax.sample import write_sample

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "hf")
        write_sample("qwen2_0.5b", folder)
        for label, dtype, ops in (
            ("float32", "float32", OPS),
            ("TF32", "float32", TF32_OPS),
            ("bfloat16", "bfloat16", OPS),
        ):
            started = time.perf_counter()
            diagnosis = examine(folder, dtype, ops, 2, 512)
            print(f"0.5B, 2 x 512, {label}: {time.perf_counter() - started:.0f} s; {worst(diagnosis)}", flush=True)
            for finding in diagnosis.findings:
                print(f"  {finding.sentence}", flush=True)


if __name__ == "__main__":
    if "--half-billion" in sys.argv:
        half_billion()
    else:
        absltest.main()
