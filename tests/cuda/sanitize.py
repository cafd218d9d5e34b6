"""Runs every CUDA kernel on a small model, without XLA on the GPU: for compute-sanitizer, which sees races.

    compute-sanitizer --tool racecheck python3 tests/cuda/sanitize.py [--leave-out N]
    compute-sanitizer --tool memcheck python3 tests/cuda/sanitize.py

Under the sanitizer XLA's own compiler crashes before it comes to our kernels. So the model runs on the CPU, one
operation after the other, and only what it hands to `custom_call.launch` goes to the GPU, by CUDA's driver.

Prints the kernels that ran and how far from float64 the results are; exits 1 if a kernel is missing, or further off
than bfloat16 allows. --leave-out takes the Nth `sync_compute();` out of the decode kernels: racecheck has to see that.

In the decode kernels one lane of a warp waits for the ring, and `__syncwarp` tells the others. racecheck does not see
that: it takes each read of the ring for a race with the copy that filled it. Here every lane waits for itself.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.cuda import decode_layers, kernels, nvrtc
from apr_jax.kernels import fastest_ops
from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.trace import tolerances
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs, seeded
from tests import paths

KERNELS = {"add_norm", "attention", "decode", "decode_rows", "matvec", "swiglu"}
_EVERY_LANE = {
    "if (lane == 0) wait(": "wait(",
    'if (lane == 0) asm volatile("mbarrier.arrive': 'asm volatile("mbarrier.arrive',
    '"r"(shared_address(empty + i)), "n"(WARPS)': '"r"(shared_address(empty + i)), "n"(THREADS)',
}
_ROUNDING = 1e-2  # of bfloat16, twice
_MOST_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Driver:
    """The first GPU, by CUDA's driver alone: each launch copies its arguments there and its results back."""

    def __init__(self, leave_out: int | None):
        self.ran: set[str] = set()
        self._leave_out = leave_out
        self._cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name} failed with status {status}")

    def launch(
        self,
        name: str,
        text: str,
        arguments: Sequence[jax.Array],
        results: Sequence[jax.ShapeDtypeStruct],
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int = 0,
        aliases: Mapping[int, int] | None = None,
    ) -> list[jax.Array]:
        """As `custom_call.launch`."""
        self.ran.add(name)
        sources = {result: argument for argument, result in (aliases or {}).items()}
        given = [self._copied(np.asarray(argument)) for argument in arguments]
        made = [
            given[sources[i]] if i in sources else self._copied(np.zeros(result.shape, result.dtype))
            for i, result in enumerate(results)
        ]
        pointers = [*given, *made]
        table = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
        function = self._function(name, text, shared_bytes)
        self._call("cuLaunchKernel", function, *grid, 1, threads, 1, 1, shared_bytes, None, table, None)
        self._call("cuCtxSynchronize")
        values = [np.empty(result.shape, result.dtype) for result in results]
        for value, pointer in zip(values, made, strict=True):
            self._call("cuMemcpyDtoH_v2", value.ctypes.data_as(ctypes.c_void_p), pointer, ctypes.c_size_t(value.nbytes))
        for pointer in {pointer.value: pointer for pointer in pointers}.values():
            self._call("cuMemFree_v2", pointer)
        return [jnp.asarray(value) for value in values]

    def _copied(self, value: np.ndarray) -> ctypes.c_uint64:
        pointer, size = ctypes.c_uint64(), ctypes.c_size_t(value.nbytes)
        value = np.ascontiguousarray(value)
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        self._call("cuMemcpyHtoD_v2", pointer, value.ctypes.data_as(ctypes.c_void_p), size)
        return pointer

    def _function(self, name: str, text: str, shared_bytes: int) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        if name.startswith("decode"):
            text = self._for_the_sanitizer(text)
        self._call("cuModuleLoadData", ctypes.byref(module), nvrtc.ptx(text).encode())
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        self._call("cuFuncSetAttribute", function, _MOST_SHARED_BYTES, shared_bytes)
        return function

    def _for_the_sanitizer(self, text: str) -> str:
        for one, every in _EVERY_LANE.items():
            if text.count(one) != 1:
                raise RuntimeError(f"the kernel has no single {one!r}")
            text = text.replace(one, every)
        if self._leave_out is None:
            return text
        begin, end = list(re.finditer(r"(?<=    )sync_compute\(\);", text))[self._leave_out].span()
        return text[:begin] + text[end:]


def logits_of(model: LanguageModel, batch: int, length: int) -> np.ndarray:
    """Logits [B, 3, V] of three tokens behind a prompt, step by step."""
    ids = seeded(model.config.vocab_size, batch, length + 3).input_ids
    cache, found = model.empty_cache(batch, 128), []
    for begin, end in ((0, length), *((at, at + 1) for at in range(length, length + 3))):
        positions = np.broadcast_to(np.arange(begin, end), (batch, end - begin))
        logits, cache = model.step(Inputs.of(ids[:, begin:end], np.ones(positions.shape, int), positions), cache)
        found.append(np.asarray(logits, np.float64)[:, -1:])
    return np.concatenate(found[1:], axis=1)


def errors() -> dict[str, tuple[float, float]]:
    """The relative L2 of what the kernels give against float64, and the bar for it."""
    checkpoint = paths.checkpoint("gqa_tied_bf16")
    exact, plain = load_model(checkpoint, "float64", "cpu"), load_model(checkpoint, "bfloat16", "cpu", fused=True)
    kernelled, found = plain.with_ops(fastest_ops.cuda_ops(132)), {}
    for batch, length in ((1, 20), (3, 20), (9, 20)):
        right = logits_of(exact, batch, length)
        with jax.disable_jit():
            error = relative_l2(logits_of(kernelled, batch, length), right)
        own = relative_l2(logits_of(plain, batch, length), right)
        found[f"tokens of {batch} rows"] = error, tolerances.bfloat16(own)
    draw = np.random.default_rng(0).standard_normal
    weight, x = (jnp.asarray(draw(shape), jnp.bfloat16) for shape in ((64, 8192), (1, 1, 8192)))
    product = np.asarray(weight, np.float64) @ np.asarray(x, np.float64)[0, 0]
    found["matvec"] = relative_l2(np.asarray(kernels.matvec(weight, x), np.float64)[0, 0], product), _ROUNDING
    x, update = (jnp.asarray(draw((2, 8, 64)), jnp.bfloat16) for _ in range(2))
    total = np.asarray(x, np.float64) + np.asarray(update, np.float64)
    normed = total / np.sqrt(np.mean(np.square(total), axis=-1, keepdims=True) + 1e-6)
    ours = kernels.add_norm(x, update, jnp.ones(64, jnp.bfloat16), 1e-6)[1]
    found["add_norm"] = relative_l2(np.asarray(ours), normed), _ROUNDING
    both = jnp.asarray(draw((2, 8, 128)), jnp.bfloat16)
    gate, up = np.split(np.asarray(both, np.float64), 2, axis=-1)
    found["swiglu"] = relative_l2(np.asarray(kernels.swiglu(both)), gate / (1 + np.exp(-gate)) * up), _ROUNDING
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leave-out", type=int, metavar="N", help="the Nth sync_compute(); of the decode kernels")
    driver = Driver(parser.parse_args().leave_out)
    with mock.patch.multiple(kernels, launch=driver.launch), mock.patch.multiple(decode_layers, launch=driver.launch):
        found = errors()
    print("ran:", ", ".join(sorted(driver.ran)))
    for what, (error, bar) in found.items():
        print(f"{what}: {error:.1e} from float64, at most {bar:.1e}")
    return 0 if driver.ran == KERNELS and all(error <= bar for error, bar in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
