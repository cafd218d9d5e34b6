"""Right backward passes of several programs: nothing may be found in any. Run by `backward_battery.py --groups clean`.

This model's own gradients and those of the NumPy engine with stages; HuggingFace's by torch's autograd, eager with
stages in float32 and bfloat16, and of parameters alone with fused attention, compiled, with checkpointed layers, under
autocast to bfloat16 and accumulated over four micro-batches.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax.load.load_model import load_model
from apr_jax.model.gradients import gradients
from apr_jax.parity.backward.diagnose import diagnose_backward, undumped_values
from apr_jax.parity.diagnose import diagnose, nothing
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import predicted_pairs
from apr_jax.trace.stages import GRADIENT
from tests import oracle, paths
from tests.battery.backward_engine import backward

ROWS, LENGTH, PADDED, IGNORED = 4, 64, 7, 11
COMPILED = ("gqa_tied_bf16",)


def batch(vocabulary: int, even: bool, seed: int = 0) -> tuple[Inputs, np.ndarray]:
    """Inputs and labels; with padding and ignored tokens, or (for micro-batches that are equal) without."""
    ids = np.array(seeded(vocabulary, ROWS, LENGTH, seed).input_ids)
    mask, labels = np.ones_like(ids), ids.copy()
    if not even:
        mask[0, :PADDED] = 0
        labels[0, :PADDED] = labels[1, :IGNORED] = -100
    return Inputs.of(ids, mask), labels


def judged(
    folder: pathlib.Path, dtype: str, inputs: Inputs, labels: np.ndarray, dump: Mapping[str, np.ndarray]
) -> list[str]:
    """The findings' sentences: of the forward pass where its values are there, and of the backward pass."""
    exact, same = load_model(folder, "float64", "cpu"), load_model(folder, dtype, "cpu")
    forward = {key: value for key, value in dump.items() if not key.startswith(GRADIENT)}
    found = {key: value for key, value in dump.items() if key.startswith(GRADIENT)}
    if not found:
        raise AssertionError("nothing is judged")
    before = diagnose(exact, same, inputs, forward) if forward else nothing(exact, inputs, dtype)
    assert before.replay is not None
    rounded = undumped_values(same, before.replay)
    back = diagnose_backward(before.replay, before.explained, found, labels >= 0, dtype, rounded)
    worst = max(back.sites, key=lambda site: site.share)
    sentences = [finding.sentence for finding in (*before.findings, *back.findings)]
    left = [f"{key}: {why}" for key, why in back.unexamined.items()]
    return [*sentences, *left] or [
        f"ok {len(back.sites)} gradients, worst {worst.share:.2f} of its budget at {worst.key}"
    ]


def own(folder: pathlib.Path, dtype: str, inputs: Inputs, labels: np.ndarray) -> dict[str, np.ndarray]:
    model = load_model(folder, dtype, "cpu")
    trace = {key: np.asarray(value, np.float32) for key, value in model.trace(inputs).items()}
    found = gradients(model, inputs, labels >= 0, with_stages=True)[1]
    return {**trace, **{key: np.asarray(value, np.float32) for key, value in found.items()}}


def engine(folder: pathlib.Path, inputs: Inputs, labels: np.ndarray) -> dict[str, np.ndarray]:
    return backward(*oracle.load(folder), inputs.input_ids, inputs.attention_mask, labels)


def eager(folder: pathlib.Path, dtype: Any, inputs: Inputs, labels: np.ndarray) -> dict[str, np.ndarray]:
    """HuggingFace with stages."""
    from apr_jax.trace import hf_reference

    arrays = (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
    values = hf_reference.run(str(folder), *arrays, dtype=dtype, trace=True)
    predicted = predicted_pairs(inputs, labels >= 0)
    found = hf_reference.gradients(str(folder), *arrays, predicted, dtype, True)[1]
    return {**values, **{GRADIENT + key: value for key, value in found.items()}}


def torch_parameters(folder: pathlib.Path, how: str, inputs: Inputs, labels: np.ndarray) -> dict[str, np.ndarray]:
    """HuggingFace's gradients of parameters, made in one of several ways."""
    import torch

    from apr_jax.trace import hf_reference

    model = hf_reference.load(str(folder), "float32")
    if how == "checkpointed":
        model.train()  # transformers checkpoints layers in training only; Qwen2 has no dropout
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "fused":
        model.set_attn_implementation("sdpa")
    run = torch.compile(model) if how == "compiled" else model
    arrays = [
        torch.tensor(np.asarray(a, np.int64)) for a in (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
    ]
    targets = torch.tensor(np.asarray(labels, np.int64))
    parts = 4 if how == "accumulated" else 1
    autocast = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
    for part in range(parts):
        rows = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
        ids, mask, positions = (array[rows] for array in arrays)
        with autocast:
            logits = run(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        counted = (targets[rows, 1:] >= 0) & (mask[:, :-1] == 1)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float()[counted], targets[rows, 1:][counted]) / parts
        loss.backward()
    return {GRADIENT + name: p.grad.float().numpy().copy() for name, p in model.named_parameters()}


def runs(name: str) -> Iterator[tuple[str, str, Inputs, np.ndarray, Callable[[], Mapping[str, np.ndarray]]]]:
    """Yields what each run is called, its dtype, its batch, and what computes it."""
    folder = paths.checkpoint(name)
    vocabulary = load_model(folder, "float32", "cpu").config.vocab_size
    uneven, even = batch(vocabulary, False), batch(vocabulary, True)
    for dtype in ("float32", "bfloat16"):
        yield f"this model in {dtype}, stages", dtype, *uneven, lambda dtype=dtype: own(folder, dtype, *uneven)
        yield f"torch eager in {dtype}, stages", dtype, *uneven, lambda dtype=dtype: eager(folder, dtype, *uneven)
    for seed in (1, 2):
        other = batch(vocabulary, False, seed)
        yield f"NumPy, stages, batch {seed}", "float32", *other, lambda other=other: engine(folder, *other)
    for how in ("fused", "checkpointed", "accumulated", *(("compiled",) if name in COMPILED else ())):
        chosen = even if how == "accumulated" else uneven
        yield f"torch {how}", "float32", *chosen, lambda how=how, chosen=chosen: torch_parameters(folder, how, *chosen)
    yield "torch autocast", "bfloat16", *uneven, lambda: torch_parameters(folder, "autocast", *uneven)


def run(only: str = "") -> bool:
    """Runs all; prints a line for each; returns whether nothing was found."""
    count = wrong = 0
    for name in paths.NAMES:
        for label, dtype, inputs, labels, compute in runs(name):
            if only not in f"{name} {label}":
                continue
            started = time.perf_counter()
            said = judged(paths.checkpoint(name), dtype, inputs, labels, compute())
            bad = not said[0].startswith("ok ")
            count, wrong = count + 1, wrong + bad
            text = "FOUND " + "; ".join(said)[:500] if bad else said[0]
            print(f"{name:24} {label:36} {time.perf_counter() - started:5.1f} s  {text}", flush=True)
    print(f"clean: {count} right programs, {wrong} of them with findings")
    return count > 0 and not wrong


if __name__ == "__main__":
    sys.exit(0 if run(" ".join(sys.argv[1:])) else 1)
