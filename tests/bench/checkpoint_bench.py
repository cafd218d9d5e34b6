"""`checkpoint save` on a simulated mesh beside Orbax used directly on the same arrays, in turns in one process.

Not part of the test suite: `XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/bench/checkpoint_bench.py
FOLDER [--rounds 5] [--sample qwen2_0.5b] [--mesh model=4]` prints a JSON object and exits 1 where ours takes more than
1.1 times Orbax's time (medians); `--mesh ""` is one device. Ours is all that save does with arrays that are loaded:
writing, CRC-32 of each parameter, side files, flushing, naming; the source is hashed while it is loaded. Orbax writes
in the same format.

Orbax flushes each file of values and `.zarray`, and the folder that it stands in, after each write, but neither its own
JSON files nor the folders above. Ours flushes all files and folders once more: "ours, unflushed" leaves that away.
"orbax, our handlers" is Orbax with what `prepared._writer` sets.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import orbax.checkpoint as ocp  # noqa: E402

from apr_jax.converters.checkpoint.openers import open_checkpoint  # noqa: E402
from apr_jax.converters.storage import output  # noqa: E402
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
    source, target = args.folder / "source", args.folder / "saved"
    if not source.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        sample.write_sample(args.sample, source, tokenizer="small")
    axes = {axis: int(size) for axis, _, size in (part.partition("=") for part in args.mesh.split(",") if part)}
    place = find_mesh(axes, "cpu") if axes else "cpu"
    parameters = load_model(source, "bfloat16", place).parameters

    def directly(writer: Any) -> None:
        with writer as checkpointer:
            checkpointer.save(target.resolve(), parameters)

    def through_us() -> None:
        with open_checkpoint(source) as checkpoint:
            prepared.save(checkpoint, str(target), dtype="bfloat16", device=place)

    def unflushed() -> None:
        with mock.patch.object(output, "_at_once"):
            through_us()

    turns: dict[str, Callable[[], None]] = {
        "ours": through_us,
        "ours, unflushed": unflushed,
        "orbax, our handlers": lambda: directly(prepared._writer()),
        "orbax": lambda: directly(ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=False, use_compression=False)),
    }
    with open_checkpoint(source) as checkpoint:
        known = prepared._source(checkpoint)
    loaded = mock.patch.object(prepared, "load_parameters", return_value=parameters)
    with loaded, mock.patch.object(prepared, "_source", return_value=known):
        seconds = in_turns(turns, target, args.rounds)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: median / medians["orbax"] for name, median in medians.items()}
    ok = ratios["ours"] <= BOUND
    rounded = {name: [round(each, 3) for each in found] for name, found in seconds.items()}
    print(json.dumps({"seconds": rounded, "medians": medians, "beside orbax": ratios, "ok": ok}, indent=1))
    return int(not ok)


def in_turns(turns: Mapping[str, Callable[[], None]], target: pathlib.Path, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each, round by round; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            shutil.rmtree(target, ignore_errors=True)
            # Nobody is to wait for what another one has left to the disk.
            os.sync()
            begun = time.perf_counter()
            turns[name]()
            # The first round is for what is made once.
            if number:
                seconds[name].append(time.perf_counter() - begun)
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
