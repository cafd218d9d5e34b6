"""Gradients on an NVIDIA GPU: the CPU's within the same bars, bfloat16 as near, TF32 in the backward alone is seen."""

import dataclasses
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from apr_jax.load.load_model import load_model
from apr_jax.model.gradients import gradients
from apr_jax.model.qwen2 import OPS, TF32_OPS, dot
from apr_jax.trace import tolerances
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs
from tests import paths

BOUNDS = {"float64": 1e-10, "float32": 2e-5}


def batch(vocab_size):
    """Three rows: whole, padded on the left, padded on the right; and some labels that do not count."""
    generator = np.random.default_rng(5)
    mask = np.ones((3, 20), np.int64)
    mask[1, :6], mask[2, 13:] = 0, 0
    return Inputs.of(generator.integers(0, vocab_size, mask.shape), mask), generator.random(mask.shape) < 0.8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def backward_in_tf32(spec, a, b, dtype):
    """A product that is right forwards, and whose gradients are products of TF32."""
    return dot(spec, a, b, dtype)


def _forward(spec, a, b, dtype):
    return dot(spec, a, b, dtype), (a, b)


def _backward(spec, dtype, kept, given):
    coarse = functools.partial(dot, spec, dtype=dtype, precision=lax.DotAlgorithmPreset.TF32_TF32_F32)
    return jax.vjp(coarse, *kept)[1](given)


backward_in_tf32.defvjp(_forward, _backward)
TF32_BACKWARD = dataclasses.replace(OPS, dot=lambda spec, a, b, dtype=None: backward_in_tf32(spec, a, b, dtype))


class GradientsCudaTest(parameterized.TestCase):
    def errors(self, name, dtype, ops=OPS, device="cuda"):
        """The relative L2 of each gradient against float64 on the CPU, the loss first."""
        exact = load_model(paths.checkpoint(name), "float64", "cpu")
        model = load_model(paths.checkpoint(name), dtype, device).with_ops(ops)
        inputs, counted = batch(exact.config.vocab_size)
        loss, right = gradients(exact, inputs, counted)
        ours, found = gradients(model, inputs, counted)
        self.assertEqual(set(found), set(right))
        return abs(ours - loss) / loss, {key: relative_l2(found[key], right[key]) for key in right}

    @parameterized.product(name=paths.NAMES, dtype=list(BOUNDS))
    def test_every_gradient_is_the_cpus(self, name, dtype):
        loss, errors = self.errors(name, dtype)
        worst = max(errors, key=errors.get)
        print(f"{name}, CUDA {dtype}: loss {loss:.1e}, {len(errors)} gradients, worst {errors[worst]:.1e} ({worst})")
        self.assertLessEqual(loss, BOUNDS[dtype])
        self.assertLessEqual(errors[worst], BOUNDS[dtype], worst)

    @parameterized.parameters(paths.NAMES)
    def test_tf32_in_the_backward_alone_leaves_the_bars(self, name):
        bars = {key: tolerances.gradient("float32", error) for key, error in self.errors(name, "float32")[1].items()}
        for what, ops in (("backward", TF32_BACKWARD), ("both", TF32_OPS)):
            loss, errors = self.errors(name, "float32", ops)
            outside = [key for key, error in errors.items() if error > bars[key]]
            print(f"{name}, CUDA TF32 {what}: loss {loss:.1e}, {len(outside)} of {len(errors)} gradients outside")
            # The head's gradient alone is a product of what is right forwards; all that lies behind products is wrong.
            self.assertGreaterEqual(len(outside), 0.9 * len(errors))
            if what == "backward":
                self.assertLessEqual(loss, BOUNDS["float32"])

    @parameterized.parameters(paths.NAMES)
    def test_bfloat16_is_as_near_as_on_the_cpu(self, name):
        means = []
        for device in ("cuda", "cpu"):
            _, errors = self.errors(name, "bfloat16", device=device)
            means.append(float(np.sqrt(np.mean(np.square(list(errors.values()))))))
        print(f"{name}, bfloat16 against float64: CUDA {means[0]:.2e}, CPU {means[1]:.2e}")
        self.assertLessEqual(means[0], 1.3 * means[1])


if __name__ == "__main__":
    absltest.main()
