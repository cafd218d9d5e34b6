"""The GPU that the tests of this folder need: JAX has to compute on it, or they fail and say why it cannot.

Skipping would not do: a CUDA that is broken, or has no memory left, looks to JAX like a machine without a GPU.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np

DEV = pathlib.Path("/dev")


def share_memory(environment: MutableMapping[str, str]) -> None:
    """Has JAX take memory as it needs it, so that several processes fit on one GPU; before CUDA is first asked for."""
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def signs_of_a_gpu(dev: pathlib.Path = DEV, path: str | None = None) -> list[str]:
    """Returns what shows that this machine has an NVIDIA GPU, whatever JAX says: device nodes, and nvidia-smi.

    Args:
      dev: Where device nodes are.
      path: Where programs are, in the form of $PATH; None is $PATH.
    """
    nodes = sorted(str(node) for node in dev.glob("nvidia[0-9]*"))
    return [*nodes, *filter(None, [shutil.which("nvidia-smi", path=path)])]


def why_not(find: Callable[[str], Sequence[Any]] | None = None, signs: Sequence[str] | None = None) -> str | None:
    """Returns why JAX cannot compute on CUDA, whatever the cause: the machine and what JAX says; None if it can.

    Args:
      find: Gives the devices of a platform; None is `jax.devices`.
      signs: What shows that there is a GPU; None looks for it.
    """
    import jax

    try:
        devices = (find or jax.devices)("cuda")
        totals = [int(np.asarray(jax.device_put(np.arange(4), device) + 1).sum()) for device in devices]
        if totals and set(totals) == {10}:
            return None
        said = f"1 + 2 + 3 + 4 gives {totals} on {list(devices)}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if found := signs_of_a_gpu() if signs is None else signs:
        return f"this machine has an NVIDIA GPU ({', '.join(found)}), but JAX cannot compute on it: {said}"
    return f"this machine has no NVIDIA GPU, which the tests in tests/cuda need: {said}"
