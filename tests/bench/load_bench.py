"""Peak memory and time of loading a 0.5B-shaped bf16 checkpoint to float32 parameters on CPU.

    python tests/bench/load_bench.py [--sample NAME] [--scratch DIR]

Writes the sample, loads it in a fresh process, and exits 1 if the peak resident memory is more than the parameters,
350 MB and the largest tensor in the file.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ALLOWANCE = 350e6
LOAD = """
import json, re, sys, time
from apr_jax import load_model
import jax
started = time.perf_counter()
model = load_model(sys.argv[1], "float32", "cpu")
seconds = time.perf_counter() - started
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.parameters))
print(json.dumps({"peak": peak, "parameters": parameters, "seconds": seconds}))
"""


def main() -> int:
    from apr_jax.sample import write_sample
    from converters.checkpoint import open_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="qwen2_0.5b")
    parser.add_argument("--scratch", default="/dev/shm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = pathlib.Path(scratch, "hf")
        write_sample(args.sample, folder)
        with open_checkpoint(folder) as checkpoint:
            largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
        run = subprocess.run([sys.executable, "-c", LOAD, str(folder)], cwd=ROOT, capture_output=True, check=True)
    result = json.loads(run.stdout)
    bound = result["parameters"] + ALLOWANCE + largest
    print(
        f"{args.sample}: loaded in {result['seconds']:.1f} s; peak {result['peak'] / 1e6:.0f} MB,"
        f" bound {bound / 1e6:.0f} MB (parameters {result['parameters'] / 1e6:.0f}, largest tensor {largest / 1e6:.0f})"
    )
    return 0 if result["peak"] <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
