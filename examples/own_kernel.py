"""Replaces one operation of the model by a kernel of one's own and holds it against a golden file.

    python own_kernel.py MODEL GOLDEN            # RMSNorm as a Pallas kernel, SiLU in plain JAX
    python own_kernel.py MODEL GOLDEN --mistake  # the same with epsilon forgotten: seen at once

GOLDEN holds what HuggingFace computed: `apr-jax golden MODEL --reference hf -o GOLDEN`. The exit code is 1 where the
kernel's values are off.
"""

import argparse
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from apr_jax import OPS, load_model
from apr_jax.trace import golden, stages, tolerances
from apr_jax.trace.compare import compare


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, forget_eps: bool = False) -> jax.Array:
    """A row to each program: x [B, T, D], weight [D]."""

    def kernel(x_ref, weight_ref, out_ref):
        wide = x_ref[...].astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True) + (0.0 if forget_eps else eps)
        out_ref[...] = weight_ref[...] * (wide * jax.lax.rsqrt(mean_square)).astype(out_ref.dtype)

    rows = x.reshape(-1, x.shape[-1])
    row, whole = pl.BlockSpec((1, rows.shape[1]), lambda i: (i, 0)), pl.BlockSpec(weight.shape, lambda i: (0,))
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(rows.shape, x.dtype),
        grid=(len(rows),),
        in_specs=[row, whole],
        out_specs=row,
        interpret=True,  # runs anywhere; take it out on the accelerator that your kernel is written for
    )
    return run(rows, weight).reshape(x.shape)


def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x), by way of tanh."""
    return x * (0.5 + 0.5 * jnp.tanh(0.5 * x))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("golden")
    parser.add_argument("--mistake", action="store_true")
    args = parser.parse_args()

    # Every field of the table is a function; whatever is not replaced stays as it is.
    norm = functools.partial(rms_norm, forget_eps=args.mistake)
    model = load_model(args.model, ops=dataclasses.replace(OPS, rms_norm=norm, activation=silu))
    print(model)

    reference = golden.read(args.golden)
    trace = model.trace(reference.inputs, {*stages.hidden_sources(model.config.num_layers).values(), stages.LOGITS})
    ours = golden.with_hidden_states(trace, model.config.num_layers)
    bar = tolerances.relative_l2("float32", reference.inputs.input_ids.shape[1])
    results = compare(ours, reference.values, reference.inputs, bar=lambda key: bar)
    for result in results:
        print(f"{result.key:20} relative L2 {result.relative_l2:.1e} {'fine' if result.within else 'WRONG'}")
    return 0 if all(result.within for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
