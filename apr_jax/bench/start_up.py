"""Measures whole processes up to a first token: ours with a cold and a warm compilation cache, and HuggingFace's."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

_PROMPT = 16
_OURS = "from apr_jax.commands.entry import run; run()"
_HUGGINGFACE = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
folder, ids, device, dtype = sys.argv[1:]
begun = time.perf_counter()
where = {"device_map": device} if device != "cpu" else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where)
loaded = time.perf_counter() - begun
prompt = torch.tensor(json.load(open(ids)), device=device)
made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
print(json.dumps({"load_seconds": loaded, "token": made[0, -1].item()}))
"""


def run(
    model: str,
    device: str,
    dtype: str,
    rounds: int,
    with_huggingface: bool,
    ignore_config: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Measures whole processes: interpreter, imports, load, compile, prompt of 16 tokens, one token.

    Args:
      model: A HuggingFace folder, or, without HuggingFace, anything that `generate` opens.
      device: "cpu" or "cuda".
      dtype: Of parameters and computation.
      rounds: Turns with a warm cache, alternating with HuggingFace's; the fastest counts.
      with_huggingface: Whether transformers is there.
      ignore_config: Keys of the configuration that change nothing.

    Returns:
      A row for each contestant, `seconds` and `load_seconds`, and `compile_seconds` of ours, which has one row for the
      first process, whose compilation cache is empty, and one for the later ones; `tokens_agree` in HuggingFace's, or
      its `error`.

    Raises:
      RuntimeError: A process of ours failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ids = pathlib.Path(scratch, "ids.json")
        ids.write_text(json.dumps([list(range(100, 100 + _PROMPT))]))
        arguments = ["generate", model, "--input-ids", str(ids), "--max-new-tokens", "1", "--greedy", "--json"]
        arguments += [f"--ignore-config={key}" for key in ignore_config]
        arguments += ["--device", device, "--dtype", dtype]
        ours = [sys.executable, "-c", _OURS, *arguments]
        theirs = [sys.executable, "-c", _HUGGINGFACE, model, str(ids), device, dtype]
        environment = {**os.environ, "XDG_CACHE_HOME": scratch}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        cold = _ours(ours, environment) | {"contestant": "apr_jax, nothing compiled before"}
        warm, other, failed = [], [], None
        for _ in range(rounds):
            warm.append(_ours(ours, environment))
            if with_huggingface and failed is None:
                try:
                    other.append(_process(theirs, environment))
                except RuntimeError as error:
                    failed = str(error)
    rows = [cold, min(warm, key=_seconds) | {"contestant": "apr_jax, compiled before"}]
    if failed is not None:
        rows.append({"contestant": "HuggingFace", "error": failed})
    elif with_huggingface:
        best = min(other, key=_seconds)
        rows.append(best | {"contestant": "HuggingFace", "tokens_agree": best["token"] == cold["token"]})
    return rows


def _ours(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    report = _process(command, environment)
    timing = report["timing"]
    return {
        "seconds": report["seconds"],
        "load_seconds": timing["load_seconds"],
        "compile_seconds": timing["compile_seconds"],
        "token": report["generations"][0]["token_ids"][0],
    }


def _process(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    root = str(pathlib.Path(__file__).resolve().parents[2])
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    taken = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{command[3]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return {**json.loads(done.stdout), "seconds": taken}


def _seconds(row: dict[str, Any]) -> float:
    return float(row["seconds"])
