"""Describes what a benchmark ran on and with: processor or GPU, date, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = ("apr-jax", "jax", "jaxlib", "flax", "torch", "transformers", "numba", "llama-cpp-python")


def describe(device: jax.Device) -> dict[str, Any]:
    """Returns machine, date, versions and commit, as a results file carries them."""
    return {
        "machine": {
            "device": device.device_kind if device.platform != "cpu" else _processor(),
            "platform": device.platform,
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Returns the processor's name and its widest vector instructions."""
    info = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = fields.get("flags", "").split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    return " ".join(part for part in (fields.get("model name", platform.processor()), vectors) if part)


def _commit() -> str | None:
    """Returns the commit of the checkout that this file lies in, "+" behind it if files differ from it.

    $APR_JAX_COMMIT goes before: a machine may have a copy of the files beside an older history, or none.
    """
    if given := os.environ.get("APR_JAX_COMMIT"):
        return given
    root = pathlib.Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
