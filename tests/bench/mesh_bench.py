"""A model on a mesh beside one device: loading, decoding, prompts, and where the time goes.

    python tests/bench/mesh_bench.py [MODEL] [--mesh model=2] [--device cuda] [--dtype bfloat16] [--json FILE]

MODEL is a checkpoint, or a shape of `bench` ("0.5b", "7b"; its checkpoint is written to --scratch first). On the CPU
the devices are simulated on the same cores: a dry run, whose times say nothing but that it works.

The sums over devices are counted in the compiled programs, with their bytes, and one of each size is measured alone;
what is left beside them and the machine's limit is launches, small operations and products below their rate.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.converters.commands.arguments import SHARED

_ROUNDS = 3
_SUM = re.compile(
    r"= (?:\()?(\w+)\[([0-9,]*)\][^ ]* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
)
_WIDTHS = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default=str(pathlib.Path(__file__).parents[1] / "data/checkpoints/gqa_tied_bf16")
    )
    parser.add_argument("--mesh", type=SHARED["--mesh"]["type"], default={"model": 2})
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", default="decode-1x128,prefill-1x128")
    parser.add_argument("--scratch")
    parser.add_argument("--json")
    return parser.parse_args()


def loaded(path: str, dtype: str, places: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Times loading onto each place, in turns; returns the best of each in seconds, and bytes read for a device."""
    import jax

    from apr_jax.converters.checkpoint.openers import open_checkpoint
    from apr_jax.load.load_model import load_model

    found: dict[str, dict[str, float]] = {name: {"seconds": math.inf} for name in places}
    for _ in range(_ROUNDS):
        for name, place in places.items():
            with open_checkpoint(path) as checkpoint:
                begun = time.perf_counter()
                model = load_model(checkpoint, dtype, place)
                jax.block_until_ready(model.parameters)
                seconds = time.perf_counter() - begun
                size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
                devices = 1 if model.layout is None else model.layout.shape[1]
                read = sum(source.bytes_read for source in checkpoint.sources)
                found[name]["seconds"] = min(found[name]["seconds"], seconds)
                found[name]["bytes_per_device"], found[name]["share"] = read / devices, read / devices / size
                del model
    return found


def collectives(text: str) -> dict[tuple[str, int], int]:
    """Counts what devices tell each other in a compiled program: (operation, bytes of its result) -> how often."""
    counts: dict[tuple[str, int], int] = collections.Counter()
    for kind, shape, name in _SUM.findall(text):
        counts[name, _WIDTHS[kind] * math.prod(int(size) for size in shape.split(",") if size)] += 1
    return dict(counts)


def seconds_of_a_sum(layout: Any, nbytes: int) -> float:
    """Times a sum over `model` of so many bytes of float32, from a chain of them in one program."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    chain = 50

    def summed(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = jax.lax.psum(x, ("kv", "group", "rest")) * 0.5
        return x

    program = jax.jit(
        jax.shard_map(summed, mesh=layout.mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    )
    x = jax.device_put(jnp.ones(max(1, nbytes // 4), jnp.float32), layout.of_value(()))
    program(x).block_until_ready()
    best = math.inf
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        program(x).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return best / chain


def split(path: str, case: Any, dtype: str, place: Any) -> dict[str, Any]:
    """Measures a case on one place, and on a mesh what of it is sums."""
    from apr_jax.bench.cases import DECODE
    from apr_jax.bench.ours import Ours
    from apr_jax.generate.programs import Programs
    from apr_jax.kernels.fastest_ops import load_fastest

    made: list[Programs] = []

    class Kept(Programs):
        def __init__(self, *given: Any):
            super().__init__(*given)
            made.append(self)

    model = load_fastest(path, dtype, place)
    steps = 8 if case.kind == DECODE else 1
    with mock.patch("apr_jax.bench.ours.Programs", Kept):
        calls, _ = Ours(model).prepare(case, steps)
    seconds = min(calls(1) for _ in range(_ROUNDS)) / steps
    found: dict[str, Any] = {"milliseconds": seconds * 1e3}
    if model.layout is None:
        return found
    kind = "decode" if case.kind == DECODE else "first prefill"
    text = next(program.as_text() for key, program in made[0]._compiled.items() if key[0] == kind)
    told = collectives(text)
    found["collectives"] = [{"operation": o, "bytes": n, "count": c} for (o, n), c in sorted(told.items())]
    # XLA may put several tensors into one; of those the first is counted.
    found["collective_milliseconds"] = sum(c * seconds_of_a_sum(model.layout, n) for (_, n), c in told.items()) * 1e3
    return found


def main() -> None:
    """Runs everything and prints it."""
    args = arguments()
    count = math.prod(args.mesh.values())
    if args.device == "cpu":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    from apr_jax.bench import session
    from apr_jax.bench.cases import Case
    from apr_jax.load.load_model import find_mesh
    from apr_jax.testing.sample import write_sample

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        path = args.model
        if path in session.SHAPES:
            path = str(pathlib.Path(folder, "hf"))
            write_sample(session.SHAPES[args.model], path)
        places = {"one device": args.device, "mesh": find_mesh(args.mesh, args.device)}
        result: dict[str, Any] = {"mesh": args.mesh, "dtype": args.dtype, "load": loaded(path, args.dtype, places)}
        for name, load in result["load"].items():
            print(f"load, {name}: {load['seconds']:.3f} s, {load['share']:.3f} of the file for a device", flush=True)
        for case in map(Case.parse, args.cases.split(",")):
            rows = result[case.name] = {name: split(path, case, args.dtype, place) for name, place in places.items()}
            spread = rows["mesh"]
            print(
                f"{case.name}: one device {rows['one device']['milliseconds']:.3f} ms, mesh "
                f"{spread['milliseconds']:.3f} ms, of these "
                f"{spread.get('collective_milliseconds', 0.0):.3f} in sums over devices",
                flush=True,
            )
            for each in spread.get("collectives", ()):
                print(f"  {each['count']} x {each['operation']} of {each['bytes']} bytes", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
