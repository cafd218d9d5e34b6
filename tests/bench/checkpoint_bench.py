"""`checkpoint save` on a simulated mesh beside Orbax used directly on the same arrays, in turns in one process.

Not part of the test suite: `XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/bench/checkpoint_bench.py
FOLDER [--rounds 5] [--sample qwen2_0.5b] [--mesh model=4]` prints a JSON object and exits 1 where ours takes more than
1.1 times Orbax's time (medians). Ours is all that save does with arrays that are loaded: writing, CRC-32 of each
parameter, side files, flushing, naming; the source is hashed while it is loaded. Orbax writes in the same format.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import statistics
import sys
import time
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import orbax.checkpoint as ocp  # noqa: E402

from apr_jax.converters.checkpoint.openers import open_checkpoint  # noqa: E402
from apr_jax.load import prepared  # noqa: E402
from apr_jax.load.load_model import find_mesh, load_model  # noqa: E402
from apr_jax.testing import sample  # noqa: E402

BOUND = 1.1


def main() -> int:
    """Measures; returns 1 where the bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", default="qwen2_0.5b")
    parser.add_argument("--mesh", default="model=4")
    args = parser.parse_args()
    source, ours, theirs = (args.folder / name for name in ("source", "ours", "orbax"))
    if not source.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        sample.write_sample(args.sample, source, tokenizer="small")
    axes = {axis: int(size) for axis, _, size in (part.partition("=") for part in args.mesh.split(","))}
    mesh = find_mesh(axes, "cpu")
    parameters = load_model(source, "bfloat16", mesh).parameters
    seconds: dict[str, list[float]] = {"ours": [], "orbax": []}

    def directly() -> None:
        with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=False, use_compression=False) as checkpointer:
            checkpointer.save(theirs.resolve(), parameters)

    def through_us() -> None:
        with open_checkpoint(source) as checkpoint:
            prepared.save(checkpoint, str(ours), dtype="bfloat16", device=mesh)

    with open_checkpoint(source) as checkpoint:
        known = prepared._source(checkpoint)
    loaded = mock.patch.object(prepared, "load_parameters", return_value=parameters)
    with loaded, mock.patch.object(prepared, "_source", return_value=known):
        for turn in range(args.rounds + 1):
            for name, save in (("ours", through_us), ("orbax", directly)):
                for left in (ours, theirs):
                    shutil.rmtree(left, ignore_errors=True)
                begun = time.perf_counter()
                save()
                # The first round is for what is made once.
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratio = medians["ours"] / medians["orbax"]
    rounded = {name: [round(each, 3) for each in found] for name, found in seconds.items()}
    print(json.dumps({"seconds": rounded, "medians": medians, "ratio": ratio, "ok": ratio <= BOUND}, indent=1))
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
