"""Peak memory of a GPU while text is generated: 7B at a context of 2048, and a prompt of 32,768 tokens on 0.5B.

    python tests/bench/memory_bench.py [--device cuda] [--json FILE]

bfloat16, random weights. Each case has a process of its own, since a peak is a process's: it holds the making of the
weights too. Exits 1 if the first case takes more than parameters and cache and a tenth of both.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Shape, tokens of the prompt, new tokens: together the last context.
CASES = {"7B, context 2048": ("qwen2_7b", 1984, 65), "0.5B, 32,768 tokens": ("qwen2_0.5b", 32_768, 1)}
REHEARSAL = {"small": ("gqa_tied_bf16", 100, 29), "small, longer": ("gqa_tied_bf16", 1000, 1)}
BOUNDED, MOST = "7B, context 2048", 1.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu rehearses with a small model, which has no peak")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--case", help="run one case in this process")
    args = parser.parse_args()
    cases = CASES if args.device == "cuda" else REHEARSAL
    if args.case:
        print(json.dumps(measure(args.device, *cases[args.case])))
        return 0
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    results = {}
    for name in cases:
        command = [sys.executable, __file__, "--device", args.device, "--case", name]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
        result = results[name] = json.loads(done.stdout.splitlines()[-1])
        held = result["parameter_bytes"] + result["cache_bytes"]
        print(
            f"{name}: peak {result['peak_bytes'] / 1e9:.2f} GB, parameters {result['parameter_bytes'] / 1e9:.2f},"
            f" cache {result['cache_bytes'] / 1e9:.2f}: {result['peak_bytes'] / held:.3f} of both;"
            f" {result['prompt']} tokens in {result['prefill_seconds']:.3f} s, then {result['new']}",
            flush=True,
        )
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    bounded = results.get(BOUNDED)
    if bounded is None:
        return 0
    return int(bounded["peak_bytes"] > MOST * (bounded["parameter_bytes"] + bounded["cache_bytes"]))


def measure(device_name: str, shape: str, prompt: int, new: int) -> dict[str, Any]:
    """Generates twice, the second time compiled; returns what it took."""
    import jax

    from apr_jax.bench import machine
    from apr_jax.bench.ours import random_parameters, tokens
    from apr_jax.generate.generator import Generator, rounded
    from apr_jax.kernels.fastest_ops import ops_for
    from apr_jax.load.load_model import find_device
    from apr_jax.model.language_model import LanguageModel
    from apr_jax.testing.sample import SAMPLES

    device, config = find_device(device_name), SAMPLES[shape].config
    parameters = random_parameters(config, "bfloat16", True, device)
    model = LanguageModel(config, parameters, device)
    generator = Generator(model.with_ops(ops_for(config, "bfloat16", device, True)))
    ids = tokens(config, 1, prompt).tolist()
    for _ in range(2):
        begun = time.perf_counter()
        stream = generator.stream(ids, do_sample=False, max_new_tokens=new, eos_token_id=())
        made = sum(len(delta.token_ids) for delta in stream)
        seconds = time.perf_counter() - begun
    capacity = rounded(prompt, new, generator.prefill_chunk(1))[1]
    return {
        **machine.describe(device),
        "prompt": prompt,
        "new": made,
        "prefill_seconds": stream.timing.prefill_seconds,
        "seconds": seconds,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(parameters)),
        "cache_bytes": capacity * config.num_layers * config.num_kv_heads * config.head_dim * 2 * 2,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
    }


if __name__ == "__main__":
    sys.exit(main())
