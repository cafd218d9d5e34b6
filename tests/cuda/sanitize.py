"""Runs every CUDA kernel once, on a small model: for compute-sanitizer, which watches what they read and write.

    compute-sanitizer --tool racecheck python3 tests/cuda/sanitize.py
    compute-sanitizer --tool memcheck python3 tests/cuda/sanitize.py

Prints the kernels that ran; exits 1 if one of them is missing, or gives something else than numbers.
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Trying out kernels that are not ours takes minutes under the sanitizer: in 60 s it did not get to ours.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.cuda import custom_call, decode_layers, kernels
from apr_jax.load.load_model import load_model
from apr_jax.trace.inputs import Inputs, seeded
from tests import paths

KERNELS = {"add_norm", "attention", "decode", "matvec", "swiglu"}


def main() -> int:
    ran: set[str] = set()
    launch = custom_call.launch

    def noting(name: str, *arguments: object, **options: object) -> object:
        ran.add(name)
        return launch(name, *arguments, **options)

    decode_layers.launch = kernels.launch = noting
    model = load_model(paths.checkpoint("gqa_tied_bf16"), "bfloat16", "cuda", fused=True)
    finite = []
    for batch, length in ((1, 20), (3, 96)):
        ids = seeded(model.config.vocab_size, batch, length + 3).input_ids
        cache = model.empty_cache(batch, 128)
        for begin, end in ((0, length), *((at, at + 1) for at in range(length, length + 3))):
            positions = np.broadcast_to(np.arange(begin, end), (batch, end - begin))
            part = ids[:, begin:end]
            logits, cache = model.step(Inputs.of(part, np.ones_like(part), positions), cache)
            finite.append(bool(np.isfinite(np.asarray(logits, np.float32)).all()))
    weight, x = (jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) for shape in ((64, 8192), (1, 1, 8192)))
    product = np.asarray(jax.jit(kernels.matvec)(weight, x), np.float64)[0, 0]
    exact = np.asarray(weight, np.float64) @ np.asarray(x, np.float64)[0, 0]
    finite.append(bool(np.allclose(product, exact, rtol=2e-2, atol=1.0)))
    print("ran:", ", ".join(sorted(ran)))
    return 0 if ran == KERNELS and all(finite) else 1


if __name__ == "__main__":
    sys.exit(main())
