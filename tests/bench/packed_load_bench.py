"""Time to load a model of the 0.5B shape from each published form, beside the same model in bfloat16.

    python tests/bench/packed_load_bench.py [FORM ...] [--dtype float32] [--rounds 3]

Forms are packed by tests/packers.py from a seeded checkpoint, in a temporary folder (2 GB; $TMPDIR says where). Rounds
take turns, and the fastest of each form counts; the bar is twice the time of bfloat16. Processor time stands beside:
on a machine that does something else as well, only that says anything.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import packers  # noqa: E402

FORMS = {
    "gptq int4 128": (packers.gptq(4, 128), {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "gptq int4 128 act-order": (
        packers.gptq(4, 128, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    ),
    "gptq int4 128 act-order symmetric": (
        packers.gptq(4, 128, shuffled=True, symmetric=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    ),
    "gptq int8 128": (packers.gptq(8, 128), {"quant_method": "gptq", "bits": 8, "group_size": 128}),
    "awq 128": (packers.awq(128), {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "fp8 block": packers.MEMBERS["fp8_block_128"],
    "fp8 row": packers.MEMBERS["fp8_row"],
    "nf4 64": packers.MEMBERS["bnb_nf4_64"],
    "int8 row": packers.MEMBERS["bnb_int8"],
    "compressed-tensors int4 128": (packers.ct(4, 128), packers.CT),
    "gguf Q8_0": None,
    "gguf Q4_0": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        base = root / "bf16"
        make_base(base)
        for name in args.forms or FORMS:
            path = root / "packed"
            if FORMS[name] is None:
                path = root / "packed.gguf"
                from tests import gguf_files

                gguf_files.write(base, path, name.split()[1])
            else:
                packer, config = FORMS[name]
                packers.pack_checkpoint(base, path, once_for_each_shape(packer), config)
            (plain, plain_cpu), (packed, packed_cpu) = fastest(base, path, args.dtype, args.rounds)
            verdict = "" if packed <= 2 * plain else "  OVER"
            print(
                f"{name:34} {packed:6.2f} s, bfloat16 {plain:6.2f} s, ratio {packed / plain:5.2f}; processor"
                f" {packed_cpu:6.2f} s, {plain_cpu:6.2f} s, ratio {packed_cpu / plain_cpu:5.2f}{verdict}",
                flush=True,
            )
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_base(folder: pathlib.Path) -> None:
    from apr_jax.testing import sample

    sample.write_sample("qwen2_0.5b", folder)


def once_for_each_shape(packer: packers.Packer) -> packers.Packer:
    """Packs the first matrix of each shape and takes it for the others: packing is slow, and values tell no time."""
    known: dict[tuple[int, ...], packers.Packed] = {}

    def pack(w: np.ndarray) -> packers.Packed:
        if w.shape not in known:
            known[w.shape] = packer(w)
        return known[w.shape]

    return pack


def fastest(plain: pathlib.Path, packed: pathlib.Path, dtype: str, rounds: int) -> list[tuple[float, float]]:
    """Returns the least time by the clock and of the processor, for each of the two."""
    import jax

    from apr_jax.load.load_model import load_model

    best = [(np.inf, np.inf), (np.inf, np.inf)]
    for _ in range(rounds):
        for at, path in enumerate((plain, packed)):
            begun, worked = time.perf_counter(), time.process_time()
            model = load_model(path, dtype, "cpu")
            jax.block_until_ready(jax.tree.leaves(model.parameters))
            found = (time.perf_counter() - begun, time.process_time() - worked)
            best[at] = (min(best[at][0], found[0]), min(best[at][1], found[1]))
            del model
    return best


if __name__ == "__main__":
    main()
