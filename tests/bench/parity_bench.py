"""How long `parity` takes, and how much memory, to explain a mistake at the true 0.5B shape: `make bench-parity`.

The NumPy engine, wrong in one way in all layers, dumps every stage of 64 positions of a checkpoint with Qwen2.5's
statistics; then the command is run on that dump as its user runs it, in a process of its own. Exits 1 if the mistake is
not what is named, alone, or if the command takes more than 3 minutes or 8 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.testing.sample import SAMPLES, write_sample
from apr_jax.trace.inputs import seeded
from tests import oracle, paths
from tests.battery.faulty_forward import Planted, forward, write_aprt

MOST_SECONDS, MOST_BYTES = 180, 8e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="qwen2_0.5b", choices=sorted(SAMPLES), help="default: qwen2_0.5b")
    parser.add_argument("--fault", default="rope-adjacent-pairs", help="without parameters; default: adjacent pairs")
    parser.add_argument("--scratch", default="/dev/shm", help="for the checkpoint and the dump (default: /dev/shm)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        model, dump = pathlib.Path(scratch, "hf"), pathlib.Path(scratch, "dump")
        write_sample(args.sample, model)
        begun = time.perf_counter()
        ids = seeded(SAMPLES[args.sample].config.vocab_size, 1, 64).input_ids
        write_aprt(dump, forward(*oracle.load(model), ids, faults=[Planted(args.fault, None, {})]), ids)
        print(f"{args.sample}, 64 positions: dumped by NumPy in {time.perf_counter() - begun:.0f} s", flush=True)
        begun = time.perf_counter()
        command = [sys.executable, paths.ROOT / "tools" / "parity.py", model, "--right", dump, "--json"]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            report = json.loads(child.stdout.read())
            _, _, used = os.wait4(child.pid, 0)
            child.returncode = 0
        seconds, peak = time.perf_counter() - begun, used.ru_maxrss * 1024
    named = [(finding["fault"], finding["layers"]) for finding in report["findings"]]
    passed = named == [(args.fault, "all")] and seconds <= MOST_SECONDS and peak <= MOST_BYTES
    print(
        f"parity: {report['compared']['stages']} stages, {named} in {seconds:.0f} s"
        f" ({used.ru_utime + used.ru_stime:.0f} s of processor time), peak {peak / 1e9:.1f} GB;"
        f" bounds {MOST_SECONDS} s, {MOST_BYTES / 1e9:.0f} GB: {'ok' if passed else 'FAILED'}"
    )
    for finding in report["findings"]:
        print(f"  {finding['sentence']}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
