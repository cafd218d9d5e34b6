"""The loss's rate beside that of prompts, and its peak memory at a vocabulary of 151,936.

    python tests/bench/loss_bench.py --device cuda          the 0.5B shape in bfloat16: tokens a second, both ways
    python tests/bench/loss_bench.py --memory               peak memory of the command on the CPU, small and whole

Random weights. A rate counts every token that goes through the model; windows do not overlap, so that each is scored
once. Exits 1 where the loss runs at less than 60 % of the rate of prompts, or takes more than parameters and 1 GB.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHARE, ALLOWED = 0.6, 1e9
BATCH, LENGTH = 8, 2048
SHORT = (2, 64)  # a rehearsal's
VOCABULARY = 151936


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sample", default="qwen2_0.5b", help="the shape (default: qwen2_0.5b)")
    parser.add_argument("--batches", type=int, default=16, help="how many are timed (default: 16)")
    parser.add_argument("--rehearse", action="store_true", help=f"batches of {SHORT[0]} x {SHORT[1]} tokens")
    parser.add_argument("--memory", action="store_true", help="measure the command's memory in place of the rate")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, for --memory (default: 4096)")
    parser.add_argument("--whole", action="store_true", help="--memory: the 0.5B shape, and not a narrow one")
    args = parser.parse_args()
    found, passed = memory(args.tokens, args.whole) if args.memory else rate(args)
    print(json.dumps(found))
    return 0 if passed else 1


def rate(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Times prompts and losses of the same tokens, in turn, each compiled before."""
    import numpy as np

    from apr_jax.bench import machine
    from apr_jax.bench.cases import Case
    from apr_jax.bench.ours import Ours, random_parameters, tokens
    from apr_jax.kernels.fastest_ops import ops_for
    from apr_jax.load.load_model import find_device
    from apr_jax.loss import scoring
    from apr_jax.loss.documents import Document, windows
    from apr_jax.model.language_model import LanguageModel
    from apr_jax.testing.sample import SAMPLES

    device, config = find_device(args.device), SAMPLES[args.sample].config
    fused = device.platform == "gpu"
    dtype = "bfloat16" if fused else "float32"
    model = LanguageModel(config, random_parameters(config, dtype, fused, device), device)
    model = model.with_ops(ops_for(config, dtype, device, fused))
    batch, length = SHORT if args.rehearse else (BATCH, LENGTH)
    prompts, _ = Ours(model).prepare(Case("prefill", batch, length), 1)

    ids = tokens(config, 1, batch * length * args.batches)[0].astype(np.int32)
    documents = [Document("tokens", ids, np.arange(len(ids)) > 0)]
    cut = list(windows(documents, length, length))

    def losses() -> float:
        begun = time.perf_counter()
        scoring.score(model, documents, cut, batch)
        return time.perf_counter() - begun

    losses()
    turns = [(prompts(args.batches), losses()) for _ in range(3)]
    seconds = [min(turn[which] for turn in turns) for which in (0, 1)]
    rates = [len(ids) / each for each in seconds]
    found = {
        **machine.describe(device),
        "sample": args.sample,
        "dtype": dtype,
        "batch": [batch, length],
        "prompt_tokens_per_second": round(rates[0]),
        "loss_tokens_per_second": round(rates[1]),
        "share": round(rates[1] / rates[0], 3),
    }
    return found, rates[1] >= SHARE * rates[0]


def memory(count: int, whole: bool) -> tuple[dict[str, Any], bool]:
    """Runs the command on a text of so many tokens; the whole process counts, the interpreter and XLA too.

    Of the whole shape one window at a time, the command's default: attention's scores grow with the batch.
    """
    import numpy as np

    from apr_jax.testing import sample

    shape = sample.SAMPLES["qwen2_0.5b"].config
    if not whole:
        import dataclasses

        shape = dataclasses.replace(
            shape, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4, head_dim=16
        )
        narrow = dataclasses.replace(sample.SAMPLES["qwen2_0.5b"], name="narrow", config=shape, tokenizer="small")
        sample.SAMPLES = {**sample.SAMPLES, "narrow": narrow}  # type: ignore[misc]
    parameters = 4 * sum(int(np.prod(each)) for each in shape.tensor_shapes().values())
    with tempfile.TemporaryDirectory() as scratch:
        folder, ids = pathlib.Path(scratch, "model"), pathlib.Path(scratch, "ids.json")
        sample.write_sample("qwen2_0.5b" if whole else "narrow", folder, tokenizer="small")
        ids.write_text(json.dumps([np.random.default_rng(0).integers(0, shape.vocab_size, count).tolist()]))
        found = {}
        for batch in (1,) if whole else (1, 4):
            command = [sys.executable, __file__, "--child", str(folder), str(ids), str(batch)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
            found[f"batch {batch}"] = json.loads(done.stdout.splitlines()[-1])
    peak = max(each["peak_bytes"] for each in found.values())
    result = {"parameter_bytes": parameters, "tokens": count, **found, "beyond_parameters": peak - parameters}
    return result, peak <= parameters + ALLOWED


def child(folder: str, ids: str, batch: str) -> None:
    """Runs the command in this process and says what it took."""
    from tests import tool

    begun = time.perf_counter()
    done = tool.run("loss", folder, "--input-ids", ids, "--batch", batch, "--json")
    assert done.returncode == 0, done.stderr
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) << 10
    loss = json.loads(done.stdout)["loss_nats"]
    print(json.dumps({"peak_bytes": peak, "seconds": round(time.perf_counter() - begun, 1), "loss_nats": loss}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        sys.exit(0)
    sys.exit(main())
