"""Right programs run many times: the parity search has to find nothing.

    python tests/battery/clean_runs.py [--sides SIDE ...] [--only CHECKPOINT]

Sides: our own model on the CPU, whole and decoding with a cache; the NumPy engine; HuggingFace; the genuine `apr`
where $APR_BIN names it; our model on CUDA where there is a GPU. float32, bfloat16 and float16 (`apr`: float32), all
committed checkpoints, several batch sizes, lengths and paddings. Each dump goes through what `parity` does: its dtype
is inferred, every stage is judged, and what is beyond its budget is explained. Exits 1 on any finding, with fewer than
20 runs, or where HuggingFace was asked for and cannot be run: what is missing is counted, never left out in silence.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from apr_jax.converters.convert.run import convert
from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.diagnose import diagnose
from apr_jax.parity.localise import infer_dtype
from apr_jax.trace import aprt, hf_reference, stages
from apr_jax.trace.golden import stored
from apr_jax.trace.inputs import Inputs, seeded
from tests import oracle, paths
from tests.battery.faulty_forward import forward

LEAST = 20
Dump = Mapping[str, np.ndarray]
load = functools.lru_cache(maxsize=6)(load_model)


def padded(ids: np.ndarray, lengths: Sequence[int], side: str) -> Inputs:
    """Rows of `lengths` tokens, padded on the left or on the right."""
    columns = np.arange(ids.shape[1])
    rows = [columns >= ids.shape[1] - n if side == "left" else columns < n for n in lengths]
    return Inputs.of(ids, np.array(rows, np.int32))


BATCHES: Mapping[str, Callable[[int], Inputs]] = {
    "2 x 80, one row padded left": lambda v: padded(seeded(v, 2, 80).input_ids, (71, 80), "left"),
    "1 x 257": lambda v: seeded(v, 1, 257, seed=1),
    "4 x 97, unequal, padded left": lambda v: padded(seeded(v, 4, 97, seed=2).input_ids, (97, 60, 31, 1), "left"),
    "3 x 33, unequal, padded right": lambda v: padded(seeded(v, 3, 33, seed=3).input_ids, (33, 2, 20), "right"),
    "1 x 1": lambda v: seeded(v, 1, 1, seed=4),
}
FIRST = next(iter(BATCHES))
EVERY_BATCH = "gqa_tied_bf16"
"""The checkpoint that every batch is run with; the others with the first one."""
APR_CHECKPOINTS = [name for name in paths.NAMES if name != "head_dim_given"]
"""`apr` 0.72.3 knows no head_dim, and computes other values for a checkpoint that gives one."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a right program.

    Attributes:
      side: Which program.
      checkpoint: Name of a committed checkpoint.
      dtype: What it computes in.
      batch: A key of BATCHES, or "its prompt" for `apr`.
    """

    side: str
    checkpoint: str
    dtype: str
    batch: str

    def inputs(self) -> Inputs:
        return BATCHES[self.batch](load(paths.checkpoint(self.checkpoint), "float64", "cpu").config.vocab_size)


def ours(run: Run) -> tuple[Inputs, Dump]:
    return run.inputs(), stored(_model(run).trace(run.inputs()))


def cuda(run: Run) -> tuple[Inputs, Dump]:
    return run.inputs(), stored(load(paths.checkpoint(run.checkpoint), run.dtype, "cuda").trace(run.inputs()))


def cached(run: Run) -> tuple[Inputs, Dump]:
    """Logits alone: the first half of the batch in one step, then token by token with the cache."""
    model, inputs, parts = _model(run), run.inputs(), []
    batch, length = inputs.input_ids.shape
    cache, ends = model.empty_cache(batch, length), [length // 2, *range(length // 2 + 1, length + 1)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        ids, mask, positions = (x[:, start:end] for x in (inputs.input_ids, inputs.attention_mask, inputs.position_ids))
        logits, cache = model.step(Inputs.of(ids, mask, positions), cache)
        parts.append(np.asarray(logits, np.float32))
    return inputs, {stages.LOGITS: np.concatenate(parts, 1)}


def numpy_engine(run: Run) -> tuple[Inputs, Dump]:
    i = run.inputs()
    weights, config = oracle.load(paths.checkpoint(run.checkpoint))
    return i, forward(weights, config, i.input_ids, i.attention_mask, i.position_ids, (), run.dtype)


def huggingface(run: Run) -> tuple[Inputs, Dump]:
    i, folder = run.inputs(), paths.checkpoint(run.checkpoint)
    return i, hf_reference.run(folder, i.input_ids, i.attention_mask, i.position_ids, dtype=run.dtype, trace=True)


def genuine_apr(run: Run) -> tuple[Inputs, Dump]:
    """`apr trace` of the checkpoint as we convert it, with the one prompt that it has."""
    with tempfile.TemporaryDirectory() as scratch:
        file, dump = pathlib.Path(scratch, "model.apr"), pathlib.Path(scratch, "dump")
        convert(paths.checkpoint(run.checkpoint), file, to="apr")
        config = _model(run).config
        command = [os.environ["APR_BIN"], "trace", "--payload", file, "--save-tensor", "all"]
        command += ["--save-tensor-layers", f"0..{config.num_layers}", "--save-tensor-dir", dump]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ids = re.search(r"Token ids: *(\[.*?\])", printed)
        assert ids, printed
        return aprt.read(dump, config, Inputs.of([json.loads(ids[1])]))


def _model(run: Run) -> LanguageModel:
    return load(paths.checkpoint(run.checkpoint), run.dtype, "cpu")


SIDES: Mapping[str, Callable[[Run], tuple[Inputs, Dump]]] = {
    "ours": ours,
    "ours, cached": cached,
    "NumPy": numpy_engine,
    "HuggingFace": huggingface,
    "apr": genuine_apr,
    "CUDA": cuda,
}


def missing(side: str) -> str:
    """Returns why a side cannot be run here, or nothing."""
    if side == "HuggingFace" and not hf_reference.available():
        return "no torch"
    if side == "apr" and not os.environ.get("APR_BIN"):
        return "APR_BIN does not name it"
    if side == "CUDA" and not any(device.platform == "gpu" for device in jax.devices()):
        return "no GPU; make test-cuda runs them"
    return ""


def runs(sides: Sequence[str], only: str = "") -> Iterator[Run]:
    """Every run, those that cannot be made here included."""
    for checkpoint in paths.NAMES:
        if only not in checkpoint:
            continue
        for dtype in ("float32", "bfloat16", "float16"):
            for batch in BATCHES if checkpoint == EVERY_BATCH else (FIRST,):
                whole = [side for side in sides if side in ("ours", "NumPy", "HuggingFace", "CUDA")]
                yield from (Run(side, checkpoint, dtype, batch) for side in whole)
            if "ours, cached" in sides and checkpoint == EVERY_BATCH:
                yield Run("ours, cached", checkpoint, dtype, FIRST)
        if "apr" in sides and checkpoint in APR_CHECKPOINTS:
            yield Run("apr", checkpoint, "float32", "its prompt")


def examine(run: Run) -> tuple[int, float, str, list[str]]:
    """Makes a run; returns stages compared, worst share of a budget and where, and what was found."""
    inputs, dump = SIDES[run.side](run)
    exact, same = load(paths.checkpoint(run.checkpoint), "float64", "cpu"), _model(run)
    diagnosis = diagnose(exact, same, inputs, dump)
    found = [finding.sentence for finding in diagnosis.findings]
    if (inferred := infer_dtype(dump)) != run.dtype:
        found.append(f"taken for {inferred}")
    worst = max(diagnosis.localisation.sites, key=lambda site: site.share)
    return len(diagnosis.localisation.sites), worst.share, worst.key, found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--only", default="", help="checkpoints whose name holds this")
    args = parser.parse_args(argv)
    made, findings, absent = 0, 0, collections.Counter[str]()
    print("run | stages | worst share of a budget | findings")
    for run in runs(args.sides, args.only):
        if missing(run.side):
            absent[run.side] += 1
            continue
        compared, share, where, found = examine(run)
        made += 1
        findings += len(found)
        label = f"{run.side}, {run.checkpoint}, {run.dtype}, {run.batch}"
        print(f"{label} | {compared} | {share:.2f} at {where} | {len(found)}", *found, flush=True)
    for side, count in absent.items():
        print(f"NOT RUN: {side}, {count} runs: {missing(side)}")
    print(f"{made} clean runs, {findings} findings; {absent.total()} runs missing")
    return 1 if findings or made < LEAST or "HuggingFace" in absent else 0


if __name__ == "__main__":
    sys.exit(main())
