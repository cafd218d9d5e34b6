"""Runs the benchmark: the machine's limits, each case with all contestants, start-up; gives results as they come."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.bench import ceilings, genuine, llama, machine, measure, report, start_up
from apr_jax.bench.cases import DECODE, Case, Ceilings, work
from apr_jax.bench.measure import Contestant, Plan
from apr_jax.bench.ours import Ours, quantised, random_parameters, tokens, widened
from apr_jax.converters.convert.run import convert
from apr_jax.cpu import products
from apr_jax.kernels import fastest_ops
from apr_jax.load.load_model import find_device, find_mesh
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.sharding import Layout
from apr_jax.testing.sample import SAMPLES, write_sample
from apr_jax.trace import hf_reference, tolerances

SHAPES = {"0.5b": "qwen2_0.5b", "1.5b": "qwen2_1.5b", "7b": "qwen2_7b"}
START_UP = "start-up"

# On a GPU a step takes a millisecond, on a CPU a tenth of a second.
_PLANS = {
    "gpu": Plan(rounds=3, seconds=0.2, steps=32, best=False),
    "cpu": Plan(rounds=5, seconds=0.3, steps=8, best=True),
}
_START_UP_ROUNDS = 2
_PROMPT = (2, 16)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      model: A key of `SHAPES`, for random weights, or a checkpoint.
      device: "cpu" or "cuda".
      dtype: Of parameters and computation.
      cases: In this order.
      start_up: Whether whole processes are measured as well.
      peers: Whether peers that are installed take part.
      compiled: Cases that HuggingFace is compiled for.
      seconds: No case begins later than this; None means no end.
      quick: One short turn each.
      scratch: Folder for checkpoints of a shape; None means the system's.
      ignore_config: Keys of a checkpoint's configuration that change nothing.
      mesh: How many devices lie along each axis of a mesh; None is one device. Peers have none and take no part.
    """

    model: str
    device: str
    dtype: str
    cases: tuple[Case, ...]
    start_up: bool
    peers: bool
    compiled: tuple[Case, ...]
    seconds: float | None
    quick: bool
    scratch: str | None
    ignore_config: tuple[str, ...] = ()
    mesh: Mapping[str, int] | None = None


Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


class Turns:
    """When a run has the device to itself; others than this one are for runs side by side."""

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Entered while our programs are compiled: XLA picks kernels by timing them."""
        return contextlib.nullcontext()

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        """Entered while figures are taken, after everybody's programs have been compiled."""
        return contextlib.nullcontext()


_ALONE = Turns()


def run(settings: Settings, say: Say, keep: Keep, turns: Turns = _ALONE) -> dict[str, Any]:
    """Measures everything.

    Args:
      settings: What.
      say: Gets a line for people whenever there is one.
      keep: Gets the results so far after every case.
      turns: For runs side by side.

    Returns:
      The results, as committed under tests/bench/results.
    """
    begun = time.perf_counter()
    device = find_device(settings.device)
    results: dict[str, Any] = {
        "model": SHAPES.get(settings.model, os.path.basename(os.path.normpath(settings.model))),
        "dtype": settings.dtype,
        **({"engine": products.engine()} if device.platform == "cpu" else {}),
        **machine.describe(device),
        "cases": [],
    }

    def late(what: str) -> bool:
        over = settings.seconds is not None and time.perf_counter() - begun > settings.seconds
        if over:
            results.setdefault("left_out", []).append(what)
            say(f"{what}: left out, {settings.seconds:g} s are over")
        return over

    if settings.cases:
        ours = Ours(_model(settings, device))
        if ours.model.layout is not None:
            results["mesh"] = _on_mesh(ours.model, ours.model.layout)
            say(report.mesh(results))
        contestants = _contestants(settings, ours, results, say)
        for case in settings.cases:
            if late(case.name):
                continue
            chosen = [c for c in contestants if not getattr(c, "compiled", False) or case in settings.compiled]
            measurement = measure.Measurement(case, _plan(settings, device))
            with turns.compiling():
                measurement.prepare(chosen[:1])
            measurement.prepare(chosen[1:])
            with turns.measuring():
                if "ceilings" not in results:
                    results["ceilings"] = dataclasses.asdict(ceilings.measure(device, settings.dtype))
                    say(report.heading(results))
                measurement.take_turns()
            results["cases"].append(_entry(ours.model, case, Ceilings(**results["ceilings"]), measurement.rows))
            say(_line(results["cases"][-1]))
            keep(results)
    _measure_files(settings, results, late, say)
    keep(results)
    return results


def agrees(results: report.Results) -> bool:
    """Returns whether apr_jax and HuggingFace computed the same, as far as the dtype allows; True without it."""
    bar = tolerances.FLOAT32 if results["dtype"] == "float32" else tolerances.BFLOAT16_LIMIT
    return bool(results.get("relative_l2_to_huggingface", 0.0) <= bar)


def _model(settings: Settings, device: jax.Device) -> LanguageModel:
    """Loads or makes the model, with the parameters and the table of operations that are fastest on the device."""
    mesh = device if settings.mesh is None else find_mesh(settings.mesh, settings.device)
    if settings.model not in SHAPES:
        return fastest_ops.load_fastest(settings.model, settings.dtype, mesh, settings.ignore_config)
    config = SAMPLES[SHAPES[settings.model]].config
    layout = Layout.of(config, mesh) if isinstance(mesh, Mesh) else None
    fused = device.platform == "gpu" and layout is None
    as_stored = device.platform == "cpu" and settings.dtype == "float32" and layout is None and products.available()
    matrices = "bfloat16" if as_stored else None  # as published
    parameters = random_parameters(config, settings.dtype, fused, layout or device, matrices)
    model = LanguageModel(config, parameters, device, layout=layout)
    return model.with_ops(fastest_ops.ops_for(config, model.dtype, device, fused, layout))


def _on_mesh(model: LanguageModel, layout: Layout) -> dict[str, Any]:
    """Returns what the results say about a mesh: its shape, what is cut into how many parts, bytes of a device."""
    held: dict[jax.Device, int] = collections.Counter()
    for array in jax.tree.leaves(model.parameters):
        for part in array.addressable_shards:
            held[part.device] += part.data.nbytes
    data, along = layout.shape
    flash = fastest_ops.ops_for(model.config, model.dtype, model.device, False, layout) is fastest_ops.mesh_ops(layout)
    return {
        "data": data,
        "model": along,
        "parts": layout.parts,
        "parameter_bytes_per_device": max(held.values()),
        "parameter_bytes": sum(array.nbytes for array in jax.tree.leaves(model.parameters)),
        "operations": f"XLA's own{', flash attention for prompts' if flash else ''}; kernels for one device give way",
    }


def _contestants(settings: Settings, ours: Ours, results: dict[str, Any], say: Say) -> list[Contestant]:
    if not settings.peers or ours.model.layout is not None:
        return [ours]
    contestants: list[Contestant] = [ours]
    wide = ours
    if set(ours.model.storage) != {ours.model.dtype}:
        wide = Ours(widened(ours.model), f"apr_jax, weights in {ours.model.dtype}")
        contestants.append(wide)
        if settings.model in SHAPES:
            contestants.append(Ours(quantised(ours.model), "apr_jax Q4_K"))
    ids = tokens(ours.model.config, *_PROMPT)
    if hf_reference.available():
        from apr_jax.bench.huggingface import HuggingFace

        eager, compiled = HuggingFace.over(wide.model)
        apart = measure.agreement(ours, eager, ids)
        results["relative_l2_to_huggingface"] = apart
        say(f"apr_jax and HuggingFace on the same weights: relative L2 of logits {apart:.1e}")
        contestants += [eager, compiled]
    if settings.device == "cpu" and settings.dtype == "float32" and llama.available():
        for form in (llama.BFLOAT16, llama.Q4_K):
            other = llama.LlamaCpp(wide.model, form, settings.scratch)
            apart = measure.agreement(ours, other, ids)
            say(f"apr_jax and {other.name}: relative L2 of logits {apart:.1e}")
            contestants.append(other)
    return contestants


def _entry(model: LanguageModel, case: Case, found: Ceilings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the results say about a case: its least work, the machine's limit, and the contestants' rows."""
    matrices = [leaf for leaf in jax.tree.leaves(model.parameters) if leaf.ndim == 2]
    count = sum(math.prod(shape) for shape in model.config.tensor_shapes().values() if len(shape) == 2)
    stored = sum(leaf.nbytes for leaf in matrices) / count
    least = work(model.config, case, jax.numpy.dtype(model.dtype).itemsize, stored)
    # Devices of a CPU are simulated: they share one memory and its cores.
    devices = 1 if model.layout is None or model.device.platform == "cpu" else model.layout.mesh.size
    found = Ceilings(found.flops * devices, found.bytes * devices)
    return {
        "case": case.name,
        "flops": least.flops,
        "bytes": least.bytes,
        "limit_milliseconds": found.floor(least) * 1e3,
        "bound": found.bound(least),
        "rows": rows,
    }


def _line(entry: dict[str, Any]) -> str:
    rows = (
        f"{row['contestant']} " + (f"{row['milliseconds']:.3f}" if "milliseconds" in row else row["error"])
        for row in entry["rows"]
    )
    reached = report.share(entry, report.OURS)
    end = "" if reached is None else f"; {reached:.0%} of the limit"
    return f"{entry['case']}, ms: limit {entry['limit_milliseconds']:.3f} ({entry['bound']}), {', '.join(rows)}{end}"


def _plan(settings: Settings, device: jax.Device) -> Plan:
    plan = _PLANS["cpu" if device.platform == "cpu" else "gpu"]
    return dataclasses.replace(plan, rounds=1, seconds=0.0) if settings.quick else plan


def _case_for_genuine(settings: Settings, results: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the shortest decode of one row, which the genuine `apr` goes beside; None if it takes no part."""
    if not settings.peers or settings.device != "cpu" or genuine.program() is None:
        return None
    cases = {Case.parse(entry["case"]): entry for entry in results["cases"]}
    return min(
        ((case, entry) for case, entry in cases.items() if (case.kind, case.batch) == (DECODE, 1)),
        key=lambda pair: pair[0],
        default=(None, None),
    )[1]


def _add_genuine(settings: Settings, path: str, beside: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        file = path
        if not path.endswith(".apr"):
            file = os.path.join(folder, "model.apr")
            convert(path, file, to="apr")
        beside["rows"].append(genuine.run(file))


def _measure_files(settings: Settings, results: dict[str, Any], late: Callable[[str], bool], say: Say) -> None:
    """Measures what needs a file: the genuine `apr`, and whole processes to the first token."""
    beside = _case_for_genuine(settings, results)
    if beside is None and not settings.start_up:
        return
    with _checkpoint(settings) as path:
        if beside is not None and not late("apr"):
            _add_genuine(settings, path, beside)
            say(_line(beside))
        if settings.start_up and not late(START_UP):
            rounds = 1 if settings.quick else _START_UP_ROUNDS
            peers = settings.peers and hf_reference.available() and os.path.isdir(path)
            results["start_up"] = start_up.run(
                path, settings.device, settings.dtype, rounds, peers, settings.ignore_config
            )


@contextlib.contextmanager
def _checkpoint(settings: Settings) -> Iterator[str]:
    """Yields a checkpoint of the model; one of a shape is written for the time being."""
    if settings.model not in SHAPES:
        yield settings.model
        return
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        path = str(pathlib.Path(folder, "hf"))
        write_sample(SHAPES[settings.model], path)
        yield path
