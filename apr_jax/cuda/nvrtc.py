"""Compiles CUDA C++ to PTX, NVIDIA's assembly, with NVRTC, the compiler library in JAX's CUDA wheels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib

import jax

_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_OPTIONS = (b"--gpu-architecture=compute_90", b"--std=c++17")


class CompileError(RuntimeError):
    """NVRTC did not take the source; the message is its log."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns NVRTC from the folder of the `nvidia` wheels or from the loader's path; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [str(path) for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.1*"))]
    for candidate in (*found, *_NAMES):
        for builtins in pathlib.Path(candidate).parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by name, which finds it only if it is loaded already
        try:
            return ctypes.CDLL(candidate)
        except OSError:  # not there: the next one
            continue
    return None


@functools.lru_cache(maxsize=32)
def ptx(source: str) -> str:
    """Compiles CUDA C++ for compute capability 9.0, or takes what an earlier process compiled.

    That is kept beside JAX's compiled programs, where JAX keeps those on disk (`jax_compilation_cache_dir`).

    Args:
      source: One translation unit without includes.

    Returns:
      PTX.

    Raises:
      CompileError: NVRTC is not installed, or refuses the source.
    """
    nvrtc = library()
    if nvrtc is None:
        raise CompileError("NVRTC is not installed; it comes with jax[cuda13]")
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        return _compile(nvrtc, source)
    version = f"{major.value}.{minor.value} {_OPTIONS}"
    kept = pathlib.Path(folder) / f"{hashlib.sha256(f'{version} {source}'.encode()).hexdigest()}.ptx"
    with contextlib.suppress(OSError):  # not there yet
        return kept.read_text(encoding="utf-8")
    text = _compile(nvrtc, source)
    with contextlib.suppress(OSError):  # a folder that cannot be written keeps nothing
        half = kept.with_suffix(f".{os.getpid()}")
        half.write_text(text, encoding="utf-8")
        half.replace(kept)
    return text


def _compile(nvrtc: ctypes.CDLL, source: str) -> str:
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * len(_OPTIONS))(*_OPTIONS)
        if nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), options):
            raise CompileError(_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program))
        return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC failed with status {status}")


def _text(size_of: ctypes._NamedFuncPointer, fill: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(fill(program, text))
    return text.value.decode()
