"""Makes the committed test data again: the tiny sample checkpoints, and HuggingFace's float32 golden values for each.

    python tests/data/regenerate.py

Needs the `reference` extra (torch, transformers). The checkpoints come out byte for byte on every machine. The golden
values may differ in the last digits from machine to machine (torch picks its kernels by CPU), which is why
tests/reference/golden_regenerates_test.py compares to 1e-6 relative L2 and not byte for byte.
"""

from __future__ import annotations

import pathlib
import sys

DATA = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parents[1]))

import numpy as np  # noqa: E402

from apr_jax.converters.checkpoint.openers import open_checkpoint  # noqa: E402
from apr_jax.testing import sample  # noqa: E402
from apr_jax.trace import golden, hf_reference  # noqa: E402
from apr_jax.trace.inputs import Inputs  # noqa: E402

_LENGTH = 64
_PADDING = 13


def golden_path(name: str) -> pathlib.Path:
    """Returns where the golden file of a tiny checkpoint lies."""
    return DATA / "golden" / f"{name}.hf_float32.safetensors"


def batch(name: str) -> Inputs:
    """Returns the inputs of a golden file: 2 rows of 64 random tokens, the second with 13 positions of left padding."""
    vocab_size = sample.SAMPLES[name].config.vocab_size
    # Raw bits, not Generator.integers: NumPy promises the former to stay the same.
    ids = (
        (np.random.PCG64(list(name.encode())).random_raw(2 * _LENGTH) % vocab_size).reshape(2, _LENGTH).astype(np.int64)
    )
    mask = np.ones_like(ids)
    ids[1, :_PADDING] = mask[1, :_PADDING] = 0
    return Inputs.of(ids, mask)


def compute(name: str) -> golden.Golden:
    """Returns HuggingFace's float32 values for a tiny checkpoint, on CPU, in eager attention."""
    folder, inputs = DATA / "checkpoints" / name, batch(name)
    values = hf_reference.run(folder, inputs.input_ids, inputs.attention_mask, inputs.position_ids, hidden_states=True)
    with open_checkpoint(folder) as checkpoint:
        metadata = golden.provenance(
            checkpoint,
            sample.SAMPLES[name].config,
            "huggingface",
            "float32",
            "cpu",
            "eager attention, float32 products",
        )
    return golden.Golden(inputs, values, metadata)


def main() -> None:
    """Writes everything."""
    (DATA / "golden").mkdir(exist_ok=True)
    for name in sample.TINY:
        sample.write_sample(name, DATA / "checkpoints" / name, force=True)
        golden.write(golden_path(name), compute(name), force=True)
        print(f"{name}: {golden_path(name).stat().st_size} bytes of golden values")


if __name__ == "__main__":
    main()
