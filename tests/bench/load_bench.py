"""Time and peak memory of loading a 0.5B-shaped bf16 checkpoint (1 GB).

    python tests/bench/load_bench.py [--sample NAME] [--scratch DIR] [--json FILE]
    python tests/bench/load_bench.py --device cuda [...]

On CPU: to float32 parameters. Exits 1 if the peak resident memory is more than the parameters, 350 MB and the largest
tensor in the file.

On a GPU: from the files and from prepared checkpoints, beside `safetensors` + `device_put`, Orbax's own restore, and
what the machine can do (reads from the page cache, host to device from pageable and from page-locked memory). Exits 1
if loading takes more than half of the time of `safetensors` + `device_put`. Every case is a process of its own, in
which JAX has been started: the first load is what a user waits for, the others find page-locked memory and programs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ALLOWANCE = 350e6
SPEED_BOUND = 2.0
LOADS = 4
CEILING_BYTES = 256 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="qwen2_0.5b")
    parser.add_argument("--scratch", default="/dev/shm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--cases",
        metavar="NAME,...",
        default=",".join(ON_GPU),
        help="on a GPU; the bar needs 'bfloat16' and a safetensors case (default: all)",
    )
    parser.add_argument("--case", nargs=2, metavar=("NAME", "PATH"), help="run one case in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(CASES[args.case[0]](args.case[1], args.device)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.device == "cpu":
            results, passed = on_cpu(args.sample, pathlib.Path(scratch), args.device)
        else:
            results, passed = on_gpu(args.sample, pathlib.Path(scratch), args.device, args.cases.split(","))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0 if passed else 1


def on_cpu(sample: str, scratch: pathlib.Path, device: str) -> tuple[dict[str, Any], bool]:
    from apr_jax.converters.checkpoint.openers import open_checkpoint
    from apr_jax.testing.sample import write_sample

    folder = scratch / "hf"
    write_sample(sample, folder)
    with open_checkpoint(folder) as checkpoint:
        largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    result = run("float32", folder, device)
    made_on = result.pop("on")
    bound = result["parameters"] + ALLOWANCE + largest
    print(
        f"{sample}: loaded in {result['seconds'][0]:.1f} s; peak {result['peak_host'] / 1e6:.0f} MB,"
        f" bound {bound / 1e6:.0f} MB (parameters {result['parameters'] / 1e6:.0f}, largest tensor {largest / 1e6:.0f})"
    )
    return {"sample": sample, **made_on, "float32": result}, result["peak_host"] <= bound


def on_gpu(sample: str, scratch: pathlib.Path, device: str, cases: Sequence[str]) -> tuple[dict[str, Any], bool]:
    results: dict[str, Any] = {"sample": sample}
    prepared("hf", sample, scratch)
    for name in cases:
        results[name] = run(name, prepared(ON_GPU[name], sample, scratch), device)
        results |= results[name].pop("on", {})
        print(f"{name:34} {json.dumps(results[name])}", flush=True)
    peers = [results[name]["seconds"] for name in results if name.startswith("safetensors")]
    ours = results["bfloat16"]["seconds"]
    first = min(seconds[0] for seconds in peers) / ours[0]
    later = min(statistics.median(seconds[1:]) for seconds in peers) / statistics.median(ours[1:])
    results |= {"times as fast, first load": round(first, 2), "times as fast, later loads": round(later, 2)}
    verdict = "ok" if min(first, later) >= SPEED_BOUND else "TOO SLOW"
    print(f"beside safetensors + device_put: {first:.2f} times as fast (first load), {later:.2f} (later): {verdict}")
    return results, verdict == "ok"


def prepared(source: str, sample: str, scratch: pathlib.Path) -> pathlib.Path:
    """Writes the sample, a quantised file or a prepared checkpoint of it, where it is not there yet."""
    hf, path = scratch / "hf", scratch / source
    commands = {
        "hf": ("make_sample", sample, "-o", hf),
        "prepared": ("checkpoint", "save", hf, path, "--dtype", "bfloat16", "--fused"),
        "q4k.apr": ("convert", "--to", "apr", hf, "-o", path, "--cast", "q4k"),
    }
    if not path.exists():
        name, *arguments = commands[source]
        command = [sys.executable, ROOT / "tools" / f"{name}.py", *arguments]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return path


def run(case: str, path: pathlib.Path, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", device, "--case", case, str(path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- cases, each in a process of its own


def peak_host() -> int:
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def loads(load: Callable[[], Any], name: str) -> dict[str, Any]:
    """Times loads, memory of the first one alone: whatever it kept is let go before the next one."""
    import jax
    import numpy as np

    from apr_jax.bench import machine

    device = jax.devices(name)[0]
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32), device))
    idle, seconds, result = peak_host(), [], {}
    for _ in range(LOADS if name != "cpu" else 1):
        started = time.perf_counter()
        arrays = jax.block_until_ready(load())
        seconds.append(round(time.perf_counter() - started, 4))
        if not result:
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
            statistics_ = device.memory_stats() or {}
            result = {"parameters": size, "idle_host": idle, "peak_host": peak_host(), "on": machine.describe(device)}
            result["peak_device"] = statistics_.get("peak_bytes_in_use")
        del arrays
    return {"seconds": seconds, **result}


def ours(dtype: str, fused: bool = False) -> Callable[[str, str], dict[str, Any]]:
    def case(path: str, device: str) -> dict[str, Any]:
        from apr_jax.load.load_model import load_model

        return loads(lambda: load_model(path, dtype, device, fused=fused).parameters, device)

    return case


def peer(path: str, device: str) -> dict[str, Any]:
    import jax
    import safetensors.numpy

    target = jax.devices(device)[0]

    def load() -> Any:
        (file,) = pathlib.Path(path).glob("*.safetensors")
        tensors = safetensors.numpy.load_file(file)
        return {name: jax.device_put(values, target) for name, values in tensors.items()}

    return loads(load, device)


def orbax_restore(path: str, device: str) -> dict[str, Any]:
    import jax
    import orbax.checkpoint

    sharding = jax.sharding.SingleDeviceSharding(jax.devices(device)[0])

    def load() -> Any:
        folder = pathlib.Path(path).absolute() / "parameters"
        reader = orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False)
        tree = reader.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(
            lambda _: orbax.checkpoint.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding), tree
        )
        return reader.restore(folder, restore_args=arguments)

    return loads(load, device)


def decoded_on_the_host(path: str, device: str) -> dict[str, Any]:
    import jax

    from apr_jax.converters.checkpoint.openers import open_checkpoint
    from apr_jax.load.parameters import read_as
    from apr_jax.model.parameters import parameter_sources

    target = jax.devices(device)[0]

    def load() -> Any:
        with open_checkpoint(path) as checkpoint:
            sources = parameter_sources(checkpoint.model_config(), True).items()
            read = {name: read_as([checkpoint.tensors[part] for part in parts], "bfloat16") for name, parts in sources}
            return jax.device_put(read, target)

    return loads(load, device)


def ceilings(path: str, device: str) -> dict[str, Any]:
    """GB/s of what a load consists of, each alone: the first time, and the best of those after it."""
    import jax
    import numpy as np

    from apr_jax.load import upload

    target = jax.devices(device)[0]
    (file,) = pathlib.Path(path).glob("*.safetensors")

    def rates(work: Callable[[], Any], nbytes: int) -> list[float]:
        found = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            found.append(nbytes / (time.perf_counter() - started) / 1e9)
        return [round(found[0], 2), round(max(found[1:]), 2)]

    pageable = np.ones(CEILING_BYTES, np.uint8)
    result = {
        "pageable to device": rates(lambda: jax.block_until_ready(jax.device_put(pageable, target)), pageable.size)
    }
    started = time.perf_counter()
    locked = upload._staging(CEILING_BYTES, target)
    result["seconds to lock 256 MiB"] = [round(time.perf_counter() - started, 4)]
    result["page-locked to device"] = rates(lambda: jax.block_until_ready(jax.device_put(locked, target)), locked.size)
    fd, size = os.open(file, os.O_RDONLY), file.stat().st_size

    def read(threads: int) -> None:
        part, view = 4 << 20, memoryview(locked)
        places = [view[at : at + part] for at in range(0, CEILING_BYTES, part)]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda at: os.preadv(fd, [places[at // part % len(places)]], at), range(0, size, part)))

    for threads in (1, 8):
        result[f"read, {threads} threads"] = rates(lambda threads=threads: read(threads), size)
    return result


CASES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "ceilings": ceilings,
    "safetensors + device_put": peer,
    "safetensors + device_put (again)": peer,
    "bfloat16": ours("bfloat16"),
    "bfloat16 fused": ours("bfloat16", True),
    "float32": ours("float32"),
    "prepared bfloat16 fused": ours("bfloat16", True),
    "orbax restore": orbax_restore,
    "q4_k to bfloat16 fused": ours("bfloat16", True),
    "q4_k on the host": decoded_on_the_host,
}

# Case -> what it loads. The peer twice: memory of the machine that is used for the first time is slower.
ON_GPU = {
    "ceilings": "hf",
    "safetensors + device_put": "hf",
    "bfloat16": "hf",
    "bfloat16 fused": "hf",
    "float32": "hf",
    "prepared bfloat16 fused": "prepared",
    "orbax restore": "prepared",
    "q4_k to bfloat16 fused": "q4k.apr",
    "q4_k on the host": "q4k.apr",
    "safetensors + device_put (again)": "hf",
}

if __name__ == "__main__":
    sys.exit(main())
