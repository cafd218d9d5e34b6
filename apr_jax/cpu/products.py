"""Products of float32 vectors with weights of 16 bits, 8 and 4, in XLA programs for the CPU.

The weights stay as narrow as they are stored and are widened in registers, which is exact: results are float32's, from
half the bytes.

numba compiles the kernels on the user's machine, for its processor and without a compiler, and keeps them on disk. It
is optional; `APR_JAX_CPU_KERNELS=off` leaves it out.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SWITCH = "APR_JAX_CPU_KERNELS"

_FORMS = {"bfloat16": 0, "float16": 1, "int8": 2, "uint8": 3}
"""By the dtype that tells them, as `rows` numbers them."""


@functools.cache
def available() -> bool:
    """Whether products can be had: numba is there, nobody said otherwise, and XLA calls the kernels as it should.

    The last is tried out on one product; if it fails there is a warning, and the plain operations remain.
    """
    if os.environ.get(SWITCH) == "off" or os.name != "posix" or sys.byteorder != "little":
        return False
    if not importlib.util.find_spec("numba"):
        return False
    try:
        with jax.default_device(jax.devices("cpu")[0]), jax.ensure_compile_time_eval():
            found = np.asarray(product(jnp.ones((5, 3)), jnp.full((2, 3), 0.5, jnp.bfloat16)))
        if (found != 1.5).any():
            raise ValueError("a product came out wrong")
    except Exception as error:  # whatever another jaxlib or numba makes of it
        warnings.warn(f"the CPU's kernels are left out, plain operations remain: {error}", stacklevel=2)
        return False
    return True


def engine() -> str:
    """Says what computes products with narrow weights here."""
    if not available():
        return "XLA"
    from apr_jax.cpu.machine_code import AVX512

    return f"numba {importlib.metadata.version('numba')}, vectors of {512 if AVX512 else 256} bits"


def supports(x: Array, weight: Array) -> bool:
    """Whether `product` takes these."""
    return x.dtype == jnp.float32 and str(weight.dtype) in _FORMS and weight.size > 0 and available()


def product(x: Array, weight: Array) -> Array:
    """Multiplies vectors with a weight.

    Args:
      x: float32 [vectors, in].
      weight: bfloat16 or float16 [out, in]; or rows of AprQ8 or Q4_K as `load.packed_rows` makes them.

    Returns:
      float32 [vectors, out].
    """
    from apr_jax.cpu import custom_call

    custom_call.register()
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(custom_call.TARGET, result, vmap_method="sequential")
    return call(weight, x, form=np.int64(_FORMS[str(weight.dtype)]))
