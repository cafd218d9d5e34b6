"""Which CUDA devices JAX finds; none, and the tests of this folder are skipped with a reason."""

import jax


def cuda_devices() -> list[jax.Device]:
    """Returns all of them, in JAX's order."""
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []
